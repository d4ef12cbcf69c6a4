"""Tuning from profile to commit on a GPU made of CPU tensors: everything is real but the device and the race."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

import autotune
from autotune.machine import device
from autotune.runtime.steps.graphs import GraphSteps
from autotune.tune import bench, callers, policy, trying
from autotune.validate import Latency, Speedup, Verdict, latency
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts

pytestmark = pytest.mark.slow

PROMPTS = token_prompts(40, length=24)
FASTER = Speedup(2.0, 1.9, 2.1, 8)
STEPS = [  # of the policy, by what they choose: enough to come to captured steps and prompts, and to guess ahead
    "merged_linears",
    "cuda_graph",
    "capture_prefill",
    "speculation",
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Everything that runs is faster: what replays operators one by one in Python would never be."""
    won = Latency(Verdict.PASS, "as scripted", FASTER, FASTER, FASTER, 0.01)
    monkeypatch.setattr(latency, "compare", lambda *_, **__: won)
    monkeypatch.setattr(latency, "noise_floor", lambda *_, **__: 0.01)
    monkeypatch.setattr(trying, "MIN_FIRST_SPEEDUP", 0.0)
    monkeypatch.setattr(bench, "PROFILE_S", 2.0)
    monkeypatch.setattr(bench, "BRIEF_PROFILE_S", 1.0)
    fake = FakeCuda()
    with device.stand_in(fake):
        yield fake


def test_callers_are_decoded_together_by_captured_steps(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `throughput` to an engine that serves, and the report's table of callers; then back to the original."""
    monkeypatch.setattr(callers, "decide", lambda found, limit: (4 * (found.differing == 0), "as scripted"))
    model, asked = tiny("llama"), short("throughput", ["cuda_graph"])
    assert asked.batching.max_batch > 4
    asked = replace(asked, batching=replace(asked.batching, max_batch=4))
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS[:6]]
    ask = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompts[0])}
    expected = [model.generate(ids, **ask).tolist() for ids in prompts]
    work = autotune.Workload(tuple(map(tuple, PROMPTS)), new_tokens=12)
    autotune.wrap(model, workload=work, policy=asked, when="blocking", cache=False)
    handle: Any = model.autotune
    names = [transform.name for transform in handle.plan.transforms]
    assert names[-1] == "continuous_batching", handle.report().to_dict()["callers"]
    assert "cuda_graph" in names
    step, captures, replays = handle._serving.active.step, gpu.captures, gpu.replays
    assert isinstance(step, GraphSteps)
    fallbacks = step.fallbacks.copy()  # the exam's batches of 8 are larger than what is captured

    def answers() -> list[list[list[int]]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: model.generate(ids, **ask).tolist(), prompts))

    assert answers() == expected
    assert gpu.captures == captures
    assert 11 <= gpu.replays - replays < 6 * 11, "hardly anything was decoded together"
    assert step.fallbacks == fallbacks
    assert handle.status.bypassed == {}
    assert "of 4 rows in use" in handle.status.batching
    table = handle.report().to_dict()["callers"]
    assert [point["callers"] for point in table["points"]] == [1, 2, 4]
    assert (table["rows"], table["differing"]) == (4, 0)
    assert "| callers | tokens/s together |" in handle.report().to_markdown()
    handle.rollback()
    assert answers() == expected
    assert gpu.captures == captures
    handle.unwrap()


def short(name: str, transforms: Sequence[str] = STEPS) -> policy.Policy:
    """A built-in policy with the steps that choose these transforms, each tried whatever the diagnosis."""
    whole = policy.load(name)
    chosen = [replace(s, bottlenecks=frozenset()) for s in whole.steps if "cuda" in s.devices]
    steps = [
        replace(step, choices=tuple(c for c in step.choices if c.transform == wanted)[:1])
        for wanted in transforms
        for step in chosen
        if any(c.transform == wanted for c in step.choices)
    ]
    return replace(whole, steps=tuple({s.name: s for s in steps}.values()), budget_s=600)


def test_from_the_profile_to_a_captured_step_that_serves(gpu: FakeCuda, tmp_path: Any) -> None:
    model, ids = tiny("llama"), torch.tensor(PROMPTS[:3])
    ask = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **ask)
    work = autotune.Workload(tuple(map(tuple, PROMPTS)), new_tokens=12, batch_sizes=(1, 3))
    autotune.wrap(model, workload=work, policy=short("lossless"), when="blocking", cache=False)
    handle: Any = model.autotune
    names = [transform.name for transform in handle.plan.transforms]
    assert "cuda_graph" in names, handle.report().to_dict()["trials"]
    step = handle._serving.active.step
    assert isinstance(step, GraphSteps)

    replays, fallbacks = gpu.replays, step.fallbacks.copy()  # the exam's batches of 8 are larger than what is captured
    assert torch.equal(model.generate(ids, **ask), expected)
    assert gpu.replays > replays
    assert step.fallbacks == fallbacks
    assert handle.status.bypassed == {}

    report = handle.report().to_dict()
    assert report["hardware"]["device"] == "cuda"
    assert "launches" in report["phases"]["decode"]["evidence"]
    for told in (handle.report().to_markdown(), handle.report().to_json()):
        assert "cuda_graph" in told
    handle.rollback()
    assert torch.equal(model.generate(ids, **ask), expected)
    handle.unwrap()
    assert torch.equal(model.generate(ids, **ask), expected)
