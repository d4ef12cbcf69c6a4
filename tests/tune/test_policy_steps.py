"""Which steps each built-in policy considers, by device, architecture, size of the model and diagnosis."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from autotune import transforms
from autotune.diagnose.diagnosis import Diagnosis
from autotune.machine.hardware import Hardware
from autotune.runtime.variant import Stage
from autotune.tune import policy
from autotune.tune.choose import why_not
from tests.tune.test_policy import NAMES

Machine = tuple[Literal["cpu", "cuda"], str]
CPU: Machine = ("cpu", "AVX512")
AMPERE, ADA, HOPPER, BLACKWELL = (("cuda", number) for number in ("8.0", "8.9", "9.0", "12.0"))
SMALL, LARGE = 135_000_000, 8_000_000_000


def considered(name: str, machine: Machine, parameters: int, decode: Any, prefill: Any = "compute") -> list[str]:
    """Names of a policy's steps for a machine, a model and what limits its two phases."""
    device, capability = machine
    hardware = Hardware(device, "test", capability, 2, 1 << 34, 25e9, {"float32": 140e9}, None, {})
    diagnoses: Any = {
        phase: Diagnosis(phase, kind, "because", 2.0, 0.5) for phase, kind in (("decode", decode), ("prefill", prefill))
    }
    steps = policy.load(name).steps
    return [step.name for step in steps if why_not(step, diagnoses, hardware, parameters) is None]


# What each policy considers on a CPU, in order.
ON_CPU = {
    "balanced": [
        "smaller weights for decode",
        "smaller weights for decode, other libraries",
        "less overhead in decode",
        "attention over slots",
        "narrower keys and values",
        "cheaper arithmetic in prefill",
        "cheaper arithmetic in prefill, other libraries",
        "fewer passes in prefill",
        "another attention",
        "threads for decode",
        "threads for prefill",
    ],
    "lossless": [
        "narrower storage for decode",
        "less overhead in decode",
        "attention over slots",
        "cheaper arithmetic in prefill",
        "fewer passes in prefill",
        "another attention",
        "threads for decode",
        "threads for prefill",
    ],
    "memory": [
        "smaller weights",
        "narrower keys and values",
        "one table",
        "prompts in parts",
        "less overhead in decode",
        "cheaper arithmetic in prefill",
        "fewer passes in prefill",
        "another attention",
        "threads for prefill",
    ],
}
ON_CPU["throughput"] = ON_CPU["balanced"]
before = ON_CPU["balanced"].index("fewer passes in prefill")
ON_CPU["latency"] = [*ON_CPU["balanced"][:before], "8-bit activations in prefill", *ON_CPU["balanced"][before:]]


@pytest.mark.parametrize("parameters", [SMALL, LARGE])
@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_is_tuned_as_ever(name: str, parameters: int) -> None:
    assert considered(name, CPU, parameters, "memory") == ON_CPU[name]


@pytest.mark.parametrize("name", NAMES)
def test_decode_that_computes_on_a_cpu_gets_weights_that_compute_in_fp32(name: str) -> None:
    """A BF16 model where BF16 is emulated."""
    steps = {step.name: step for step in policy.load(name).steps}
    taken = [steps[step].choices for step in considered(name, CPU, SMALL, "compute") if steps[step].phase == "decode"]
    assert "weight_storage" in {choice.transform for choices in taken for choice in choices}


# pattern -> what limits decode and prefill, and steps of which some have to be considered and some must not
NARROW, OLD = "narrower weights for decode, FP8 hardware", "narrower weights for decode"
MERGED, GRAPH, GUESS = "fewer, larger matmuls", "one launch a token", "guess ahead"
SLOTS, FEWER = "attention over slots, GPU", "fewer kernels a token"
LONG, FLASH = "attention over a long cache", "flash attention in prefill"
ONE, LAUNCHES = "one launch a prompt", "fewer launches in prefill"
FP8, INT8 = "FP8 arithmetic in prefill", "INT8 arithmetic in prefill"


@pytest.mark.parametrize(
    ("name", "machine", "parameters", "decode", "prefill", "expected"),
    [
        # decode reads weights
        (
            "balanced",
            HOPPER,
            LARGE,
            "memory",
            "overhead",
            ["half precision", GRAPH, SLOTS, MERGED, NARROW, FEWER, FLASH, ONE, LAUNCHES, GUESS],
        ),
        (
            "balanced",
            ADA,
            LARGE,
            "memory",
            "overhead",
            ["half precision", GRAPH, SLOTS, MERGED, NARROW, FEWER, FLASH, ONE, LAUNCHES, GUESS],
        ),
        (
            "balanced",
            BLACKWELL,
            LARGE,
            "memory",
            "sync",
            ["half precision", GRAPH, SLOTS, MERGED, NARROW, FEWER, GUESS],
        ),
        ("balanced", AMPERE, LARGE, "memory", "sync", ["half precision", GRAPH, SLOTS, MERGED, OLD, FEWER, GUESS]),
        ("balanced", HOPPER, SMALL, "memory", "sync", ["half precision", GRAPH, SLOTS, MERGED, FEWER, GUESS]),
        ("latency", AMPERE, LARGE, "memory", "sync", ["half precision", GRAPH, SLOTS, MERGED, OLD, FEWER, GUESS]),
        ("throughput", HOPPER, LARGE, "memory", "sync", ["half precision", GRAPH, SLOTS, MERGED, NARROW, FEWER]),
        ("lossless", HOPPER, LARGE, "memory", "sync", [GRAPH, SLOTS, MERGED, FEWER, GUESS]),
        # prefill computes
        ("balanced", HOPPER, LARGE, "capacity", "compute", ["half precision", FP8, FLASH]),
        ("latency", BLACKWELL, LARGE, "capacity", "compute", ["half precision", FP8, FLASH]),
        ("throughput", AMPERE, LARGE, "capacity", "compute", ["half precision", INT8, FLASH]),
        ("balanced", HOPPER, SMALL, "capacity", "compute", ["half precision", FLASH]),
        ("lossless", HOPPER, LARGE, "capacity", "compute", [FLASH]),
        # decode reads keys and values
        ("balanced", HOPPER, LARGE, "kv-cache", "sync", ["half precision", GRAPH, SLOTS, FEWER, LONG, GUESS]),
        ("throughput", HOPPER, LARGE, "kv-cache", "sync", ["half precision", GRAPH, SLOTS, FEWER, LONG]),
        ("lossless", AMPERE, SMALL, "kv-cache", "sync", [GRAPH, SLOTS, FEWER, LONG, GUESS]),
        # the host launches
        ("balanced", HOPPER, SMALL, "overhead", "sync", ["half precision", GRAPH, SLOTS, MERGED, FEWER, GUESS]),
        ("lossless", ADA, LARGE, "overhead", "sync", [GRAPH, SLOTS, MERGED, FEWER, GUESS]),
        # the host waits
        ("balanced", HOPPER, LARGE, "sync", "sync", ["half precision", GRAPH, FEWER]),
        ("latency", AMPERE, SMALL, "sync", "sync", ["half precision", GRAPH, FEWER]),
        ("throughput", BLACKWELL, LARGE, "sync", "sync", ["half precision", GRAPH, FEWER]),
        ("lossless", HOPPER, LARGE, "sync", "sync", [GRAPH, FEWER]),
        # memory: bytes first, whatever limits the time
        ("memory", HOPPER, LARGE, "overhead", "sync", ["smaller weights, FP8 hardware", GRAPH, FLASH]),
        ("memory", AMPERE, SMALL, "compute", "sync", ["smaller weights, GPU", FLASH]),
        ("memory", HOPPER, LARGE, "capacity", "sync", ["smaller weights, FP8 hardware", "smaller cache", FLASH]),
        ("memory", ADA, LARGE, "kv-cache", "sync", ["smaller weights, FP8 hardware", "smaller cache", GRAPH, FLASH]),
    ],
)
def test_the_five_patterns_on_gpus(
    name: str, machine: Machine, parameters: int, decode: str, prefill: str, expected: list[str]
) -> None:
    assert considered(name, machine, parameters, decode, prefill) == expected


def test_why_a_step_is_not_for_this_machine() -> None:
    steps = {step.name: step for step in policy.load("balanced").steps}
    hardware = Hardware("cuda", "A100", "8.0", 2, 1 << 34, 2e12, {"float32": 19e12}, None, {})
    diagnoses: Any = {phase: Diagnosis(phase, "memory", "", 2.0, 0.5) for phase in ("prefill", "decode")}
    assert (
        why_not(steps[NARROW], diagnoses, hardware, LARGE) == "only for GPUs of >= 8.9; this machine has ampere (8.0)"
    )
    assert why_not(steps[OLD], diagnoses, hardware, SMALL) == "for models of >= 1e9 parameters, this has 1.35e+08"
    assert why_not(steps[OLD], diagnoses, hardware, LARGE) is None


def test_unmeasured_schemes_need_what_their_step_is_for() -> None:
    """A step for older GPUs names nothing that needs newer ones."""
    for name in NAMES:
        for step in policy.load(name).steps:
            if not step.capabilities or step.capabilities[0].admits((9, 0)):
                continue
            for choice in step.choices:
                made = transforms.make(choice.transform, choice.params, choice.phase)
                needed = getattr(made, "capability", None) or (0, 0)
                assert any(wanted.admits(max(needed, (7, 0))) for wanted in step.capabilities), f"{step.name}: {made}"


def test_guesses_come_last_and_compiling_comes_after_the_weights() -> None:
    """A guess is checked by what all others made; a change of weights would compile the step anew."""
    for name in NAMES:
        stages = [
            {transforms.registry()[choice.transform].stage for choice in step.choices}
            for step in policy.load(name).steps
            if step.phase == "decode" and step.devices == {"cuda"}
        ]
        places = {stage: [n for n, of in enumerate(stages) if stage in of] for stage in Stage}
        assert not places[Stage.COMPILE] or max(places[Stage.WEIGHTS], default=-1) < min(places[Stage.COMPILE])
        assert not places[Stage.SPECULATION] or places[Stage.SPECULATION] == [len(stages) - 1]
