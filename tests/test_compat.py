"""From profile to a kept plan with the installed libraries; tests/matrix.py runs this on every version.

A search with real measurements on tiny models, whatever it comes to on a busy machine, and a plan that a second, equal
model replays.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import autotune
from autotune.machine import hardware
from autotune.runtime import kernels
from autotune.tune import allowance, bench
from autotune.tune.bench import LiveBench
from autotune.validate import Latency, Speedup, Verdict, latency
from autotune.validate.tiers import SIZES
from tests.models import tiny, token_prompts

pytestmark = pytest.mark.slow

PROMPTS = token_prompts(32)
IDS = torch.tensor(token_prompts(2, seed=9))  # [2, 12]
STEPS = """
name = "quick"
description = "Enough of every stage to see that it works"
objective = "latency"
tier = "lossless"
budget_s = 15

[[steps]]
name = "less overhead in decode"
when = { phase = "decode" }
choices = [
    { transform = "step_program", phase = "decode" },
    { transform = "static_cache", phase = "decode" },
    { transform = "lean_loop", phase = "decode" },
]

[[steps]]
name = "another attention"
when = { phase = "prefill" }
choices = [{ transform = "attention", phase = "prefill", implementation = "sdpa" }]
"""


@pytest.fixture
def policy(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A policy of few steps, all of which are measured, but for seconds."""
    kernels.available()  # compiles them, which is longer than the budget on a busy machine
    monkeypatch.setenv("AUTOTUNE_POLICY_DIR", str(tmp_path))
    monkeypatch.setattr(bench, "PROFILE_S", 4.0)
    monkeypatch.setattr(bench, "BRIEF_PROFILE_S", 1.0)
    monkeypatch.setattr(allowance, "RACE_S", 4.0)
    monkeypatch.setattr(latency, "noise_floor", functools.partial(latency.noise_floor, budget_s=2.0))
    monkeypatch.setitem(SIZES, "quick", replace(SIZES["quick"], natural=8, own=8, padded=8, lengths=()))
    (tmp_path / "quick.toml").write_text(STEPS)
    return "quick"


def wrapped(model: Any, policy: str, cache: bool) -> Any:
    work = autotune.Workload(tuple(map(tuple, PROMPTS)), new_tokens=12, batch_sizes=(1,))
    return autotune.wrap(model, workload=work, policy=policy, when="blocking", cache=cache, watch=0.0).autotune


def greedy(model: Any) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(IDS)).tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_search_ends_in_a_verdict_and_the_same_answers(architecture: str, policy: str) -> None:
    model = tiny(architecture)
    before = greedy(model)
    handle = wrapped(model, policy, cache=False)
    trials = handle.report().to_dict()["trials"]
    assert "static_cache" in str(trials)
    assert not [trial["reason"] for trial in trials if trial["outcome"] == "error"]
    assert handle.status.state in ("tuned", "original")
    assert greedy(model) == before
    handle.unwrap()
    assert greedy(model) == before


def test_a_kept_plan_is_replayed(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is real but the clock: on a busy machine no race is sure to end the same way twice."""
    gain = Speedup(2.0, 1.9, 2.1, 8)
    won = Latency(Verdict.PASS, "as scripted", gain, gain, gain, 0.01)
    monkeypatch.setattr(latency, "compare", lambda *_, **__: won)
    monkeypatch.setattr(latency, "noise_floor", lambda *_, **__: 0.01)
    before = greedy(tiny("llama"))
    first = wrapped(tiny("llama"), policy, cache=True)
    assert first.status.state == "tuned", first.status.detail
    if kernels.available() is None:
        assert "step_program" in [transform.name for transform in first.plan.transforms]
    model, serving = tiny("llama"), []
    reverify = LiveBench.reverify

    def seen(*given: Any) -> Any:
        serving.append(model.autotune.status.transforms)
        return reverify(*given)

    monkeypatch.setattr(LiveBench, "reverify", seen)
    monkeypatch.setattr(hardware, "probe", lambda *_, **__: pytest.fail("peaks take seconds, and nothing needs them"))
    second = wrapped(model, policy, cache=True)
    assert serving == [second.status.transforms], "it serves while it is verified again"
    assert "replayed and re-verified" in second.status.detail
    assert second.plan.transforms == first.plan.transforms
    assert greedy(model) == before
    assert second.status.served == 1
