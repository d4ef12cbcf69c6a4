"""Plans that are committed without a search. What cannot be had for a model is left out, as a search leaves it out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import autotune
from autotune import transforms
from autotune.errors import TransformError
from autotune.machine.hardware import Hardware
from autotune.model import route
from autotune.runtime.speculation.pace import evenly
from autotune.runtime.variant import Variant
from autotune.transforms import speculation
from autotune.tune import choose
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.run import obstacle_of
from autotune.tune.tuned import Tuned
from autotune.workload import Workload
from tests.fuzz import models
from tests.surroundings import surroundings

Steps = list[tuple[str, dict[str, Any], str]]
PROMPT, NEW = 12, 20  # tokens: a static cache has room for twice their sum
LEAN: Steps = [("lean_loop", {}, "both")]
SLOTS: Steps = [("static_cache", {}, "decode")]
PROGRAM: Steps = [("step_program", {}, "decode")]
FUSED: Steps = [("prefill_attention", {"precision": "float32"}, "prefill"), ("fused_layers", {}, "prefill")]
HALF: Steps = [("weight_storage", {"dtype": "float16"}, "decode")]
PLANS: dict[str, Steps] = {
    "lean": LEAN,
    "slots": SLOTS,
    "program": PROGRAM,
    "fused": FUSED,
    "half": HALF,
    "half program": HALF + PROGRAM,
    "int8": [("weight_only", {"bits": 8}, "decode"), *LEAN],
    "merged": [("merged_linears", {}, "both"), *SLOTS],
    "one query": [("one_query_attention", {}, "decode"), *SLOTS],
    "guessing": [*SLOTS, ("speculation", {"draft": "prompt"}, "decode")],
    "threads": [*LEAN, ("threads", {"count": 2}, "prefill")],
    "eager": [("attention", {"implementation": "eager"}, "both")],
    "all": [*FUSED, *HALF, *PROGRAM],
}
NARROW = {"half", "half program", "int8", "all"}  # lossless for the weights of models.build, not for any others
EXACT = ("lean", "threads")  # the very operators of the original: also in types where another order of sums would show


@dataclass(frozen=True)
class _Written:
    """A report of nothing."""

    calls: dict[str, int] = field(default_factory=dict)

    def with_calls(self, served: int, bypassed: dict[str, int]) -> _Written:
        return self

    def without_original(self, *_: Any) -> _Written:
        return self


@functools.cache
def hardware() -> Hardware:
    return Hardware(
        device="cpu",
        name="fuzzed",
        capability="AVX2",
        threads=1,
        memory_bytes=2**34,
        bandwidth_bytes_per_s=25e9,
        flops_per_s={"float32": 140e9, "bfloat16": 0.15e9},
        compiler="g++",
        versions={},
    )


def variant(model: Any, traffic: Any, work: Workload, name: str) -> Variant:
    """The variant of a plan by name, asked for as a plan from the store is."""
    made = Variant(model, traffic, work)
    obstacle = obstacle_of(made)
    steps = [transforms.make(*step) for step in PLANS[name]]
    for step in sorted(steps, key=lambda each: each.stage):
        if choose.unavailable(step, made, hardware(), obstacle) is not None:
            continue
        try:
            tried = made.with_transform(step)
        except TransformError:
            continue
        if step.took_effect(tried) is None:
            made = tried
    return made


def answers(model: Any, work: Workload) -> bool:
    """Whether the model as it is answers the longest prompt: tuning measures that, and ends where it raises."""
    ids = torch.tensor([max(work.prompts, key=len)])
    try:
        route.greedy(model, 0).generate(ids, max_new_tokens=work.new_tokens)
    except Exception:
        return False
    return True


@contextmanager
def scripted(name: str) -> Iterator[None]:
    """Within it tuning ends with the plan of this name, and measures nothing; nor does it leave anything changed."""

    def tune(model: Any, work: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        made = variant(model, traffic, work, name) if answers(model, work) else Variant(model, traffic, work)
        none = Fingerprint("", "", {}, "", "", "strict")
        return Tuned(made, plans.Plan(none, made.transforms), _Written(), f"{name} won")

    with (
        mock.patch.object(tuning, "tune", tune),
        # whether guesses pay is not left to the clock
        mock.patch.object(speculation, "measure_costs", lambda variant: evenly(variant.speculation.tokens, 1.2)),
    ):
        before = surroundings()
        yield
        assert surroundings() == before, "tuning left the process in other modes"


def workload(seed: int = 1) -> Workload:
    ids = models.prompts(4, PROMPT, 2 * seed)
    return Workload(tuple(map(tuple, ids.tolist())), NEW, (1,))


def wrap(model: Any, name: str, watch: float = 0.0) -> Any:
    """The model wrapped, with the plan committed."""
    with scripted(name):
        return autotune.wrap(model, workload=workload(), when="blocking", cache=False, watch=watch)
