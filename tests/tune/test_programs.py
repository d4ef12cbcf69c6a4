"""Recorded steps of a plan that are kept between runs: not recorded again, and never in place of others."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune import workload
from autotune.machine import hardware
from autotune.runtime import kernels
from autotune.runtime.steps.program import StepPrograms, kept, recorded, trace
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.step_program import StepProgram
from autotune.transforms.weight_only import WeightOnly
from autotune.tune import fingerprint, policy, programs, run
from autotune.tune.bench import LiveBench
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.programs import PlanPrograms
from autotune.validate import Verdict
from tests.models import tiny, token_prompts
from tests.runtime.test_program import needs_kernels
from tests.tune.test_tune import KEPT, QUALITY, latency

IDENTITY = Fingerprint("weights", "a processor", {"autotune": "1"}, "work", "policy", "strict")
PLAN: tuple[Transform, ...] = (WeightOnly("decode", bits=8), StepProgram("decode", slots=64))

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_cache", "one_thread")]


@pytest.fixture
def variant() -> Variant:
    return Variant(tiny("llama")).with_transforms(PLAN)


def steps(variant: Variant) -> StepPrograms:
    assert isinstance(variant.step, StepPrograms)
    return variant.step


def asked(variant: Variant) -> tuple[Any, kept.Inputs]:
    """The module and the inputs of a variant's step."""
    return steps(variant).module, kept.inputs_of(steps(variant).programs[0].lowered)


def test_a_step_for_other_products_is_another_one(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators that were built without integer products would jump to address 0."""
    kept_at = PlanPrograms(IDENTITY, PLAN).path(*asked(variant))
    monkeypatch.setattr(kernels, "least_digits", lambda: (0, 0, 0))
    assert PlanPrograms(IDENTITY, PLAN).path(*asked(variant)) != kept_at


@pytest.fixture
def path(variant: Variant) -> Path:
    """Where the variant's step is kept."""
    of_plan = PlanPrograms(IDENTITY, PLAN)
    of_plan.save(variant)
    found = of_plan.path(*asked(variant))
    assert found is not None
    assert found.exists()
    return found


def test_a_step_is_read_back(variant: Variant, path: Path) -> None:
    found = PlanPrograms(IDENTITY, PLAN).find(*asked(variant))
    lowered = steps(variant).programs[0].lowered
    assert found is not None
    assert found.instructions == lowered.instructions
    assert (found.inputs, found.output) == (lowered.inputs, lowered.output)


OTHERS: dict[str, tuple[Fingerprint, tuple[Transform, ...]]] = {
    "another model": (replace(IDENTITY, model="others"), PLAN),
    "another release": (replace(IDENTITY, versions={"autotune": "2"}), PLAN),
    "another processor": (replace(IDENTITY, hardware="another"), PLAN),
    "another plan": (IDENTITY, (*PLAN, LeanLoop(phase="decode"))),
}


@pytest.mark.parametrize(("identity", "plan"), OTHERS.values(), ids=OTHERS.keys())
def test_other_steps_are_kept_elsewhere(
    variant: Variant, path: Path, identity: Fingerprint, plan: tuple[Transform, ...]
) -> None:
    assert PlanPrograms(identity, plan).find(*asked(variant)) is None
    assert path.exists()


def test_so_are_those_of_another_layout(variant: Variant, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "SCHEMA", programs.SCHEMA + 1)
    assert PlanPrograms(IDENTITY, PLAN).find(*asked(variant)) is None


def test_other_work_and_another_policy_take_the_same(variant: Variant, path: Path) -> None:
    other = replace(IDENTITY, workload="another", policy="another", tier="relaxed")
    assert PlanPrograms(other, PLAN).find(*asked(variant)) is not None


def test_nor_is_one_of_other_code(variant: Variant, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = asked(variant)
    kind = type(module.model.norm)
    same = types.FunctionType(kind.forward.__code__, kind.forward.__globals__)
    monkeypatch.setattr(kind, "forward", same)
    assert PlanPrograms(IDENTITY, PLAN).path(module, inputs) == path
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states: hidden_states)
    assert PlanPrograms(IDENTITY, PLAN).path(module, inputs) != path


def test_code_has_the_same_digest_in_every_process(variant: Variant, path: Path, own_cache: Path, cache: Path) -> None:
    """Sets in it are in another order in each, and its objects elsewhere."""
    shutil.copytree(cache / "kernels", own_cache / "kernels")  # which they would compile
    script = (
        "from tests.tune.test_programs import IDENTITY, PLAN, PlanPrograms, Variant, asked, tiny\n"
        "print(PlanPrograms(IDENTITY, PLAN).path(*asked(Variant(tiny('llama')).with_transforms(PLAN))))"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == str(path)


def flipped(variant: Variant, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])


def emptied(variant: Variant, path: Path) -> None:
    path.write_bytes(b"")


def loaded_otherwise(variant: Variant, path: Path) -> None:
    norm = steps(variant).module.model.norm
    norm.weight = torch.nn.Parameter(torch.cat([norm.weight, norm.weight])[len(norm.weight) :], requires_grad=False)


@pytest.mark.fault("F73")
@pytest.mark.parametrize("damage", [flipped, emptied, loaded_otherwise])
def test_what_does_not_fit_is_a_miss_and_removed(
    variant: Variant, path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "autotune")
    damage(variant, path)
    assert PlanPrograms(IDENTITY, PLAN).find(*asked(variant)) is None
    assert not path.exists()
    assert str(path) in caplog.text


def test_a_file_of_somebody_else_is_not_read(variant: Variant, path: Path) -> None:
    path.chmod(0o666)
    assert PlanPrograms(IDENTITY, PLAN).find(*asked(variant)) is None


def test_what_is_kept_is_not_written_again(variant: Variant, path: Path) -> None:
    before = path.stat().st_mtime_ns
    PlanPrograms(IDENTITY, PLAN).save(variant)
    assert path.stat().st_mtime_ns == before


def test_a_plan_that_records_nothing_keeps_nothing(own_cache: Path) -> None:
    plan = (LeanLoop(phase="decode"),)
    PlanPrograms(IDENTITY, plan).save(Variant(tiny("llama")).with_transforms(plan))
    assert not (own_cache / "programs").exists()


@pytest.mark.parametrize("cache", [True, False])
def test_a_process_that_replays_a_plan_records_once(
    cache: bool, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = list[Any]()

    def counting(*args: Any) -> Any:
        recordings.append(args)
        return trace.trace(*args)

    monkeypatch.setattr(recorded, "trace", counting)
    monkeypatch.setattr(LiveBench, "reverify", lambda self, variant: (QUALITY, latency(Verdict.PASS)))
    chosen, counts = policy.load("balanced"), list[int]()
    for _ in range(2):
        model = tiny("llama")  # as a new process loads it
        work = workload.read(token_prompts(4), tokenizer=None, model=model)
        identity = fingerprint.of(model, hardware.identify(model), work, chosen, None)
        recordings.clear()
        tuned = run.tune(model, work, chosen, cache=cache, plan=replace(KEPT, fingerprint=identity, transforms=PLAN))
        counts.append(len(recordings))
        assert tuned.variant.transforms == PLAN
    assert counts == ([1, 0] if cache else [1, 1])
