"""Paired timing through the real serving path of a tiny model, on a clock that only moves when the model works."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autotune.machine import device as devices
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.validate import Verdict
from autotune.validate.latency import affordable, compare, decide, noise_floor
from autotune.validate.limits import Limits
from autotune.validate.score import OutputError, Served
from autotune.validate.timing import Disturbance, Pair, Timing, request, time_request, timing
from autotune.workload import Bucket
from tests.fakes.cuda import FakeCuda
from tests.validate.loops import looping

BUCKET = Bucket(batch=1, prompt_tokens=12, new_tokens=8)
PROMPTS = [list(range(3, 3 + n)) for n in (5, 20, 9)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Clock:
    """Seconds that only pass where a test says so."""

    now_s: float = 1.0

    def __call__(self):
        return self.now_s


@dataclass(frozen=True)
class Cost(Transform):
    """The phases' modules take made-up time on a made-up clock."""

    clock: Clock | None = None
    prefill_s: float = 0.1
    decode_s: Callable[[int], float] = lambda batch: 0.03

    name: ClassVar[str] = "cost"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "a test's cost"

    def apply(self, variant: Variant) -> None:
        for (module,), takes_s in (
            (variant.edit("prefill"), lambda batch: self.prefill_s),
            (variant.edit("decode"), self.decode_s),
        ):
            self._charge(module, takes_s)

    def _charge(self, module: Any, takes_s: Callable[[int], float]) -> None:
        inner = module.forward

        def forward(input_ids, **kwargs):
            self.clock.now_s += takes_s(input_ids.shape[0])
            return inner(input_ids=input_ids, **kwargs)

        module.forward = forward


def costing(model, clock, prefill_s=0.1, decode_s=lambda batch: 0.03):
    return Variant(model).with_transform(Cost("both", clock, prefill_s, decode_s))


def race(model, objective="tpot", buckets=(BUCKET,), limits=Limits(), noise=0.0, **candidate):  # noqa: B008
    clock = Clock()
    return compare(
        costing(model, clock),
        costing(model, clock, **candidate),
        buckets,
        PROMPTS,
        objective=objective,
        limits=limits,
        noise=noise,
        clock=clock,
    )


@pytest.mark.parametrize(
    ("candidate", "objective", "verdict", "words"),
    [
        ({"decode_s": lambda batch: 0.015}, "tpot", Verdict.PASS, "x2.000"),
        ({}, "tpot", Verdict.FAIL, "no gain"),
        ({"decode_s": lambda batch: 0.033}, "tpot", Verdict.FAIL, "tpot of b1/p12/n8"),
        ({"decode_s": lambda batch: 0.015, "prefill_s": 0.14}, "tpot", Verdict.FAIL, "ttft of b1/p12/n8"),
        ({"prefill_s": 0.05}, "ttft", Verdict.PASS, "x2.000"),
        ({"prefill_s": 0.05}, "tpot", Verdict.FAIL, "no gain"),
        ({"prefill_s": 0.05, "decode_s": lambda batch: 0.015}, "end_to_end", Verdict.PASS, "x2.000"),
    ],
)
def test_verdicts(model, candidate, objective, verdict, words):
    found = race(model, objective, **candidate)
    assert found.verdict is verdict, found.reason
    assert words in found.reason


def test_a_clear_answer_takes_five_pairs(model):
    found = race(model, decode_s=lambda batch: 0.015)
    assert found.tpot.pairs == 5
    (times,) = found.buckets.values()
    assert len(times.reference_s["tpot"]) == len(times.candidate_s["tpot"]) == 5
    assert times.reference_s["ttft"][0] == pytest.approx(0.1)
    assert times.candidate_s["tpot"][0] == pytest.approx(0.015)


@pytest.mark.parametrize(
    ("each", "budget_s", "tokens"),
    [
        ([(0.5, 0.1), (0.5, 0.1)], 60.0, 32),
        ([(0.5, 0.1), (0.5, 0.1)], 15.0, 11),  # 3 s a pair: 1 s for the prompts, 0.2 s for each further token of both
        ([(0.5, 0.1), (0.5, 0.1)], 5.0, 8),
        ([(0.5, 0.1), (0.5, 0.1)], -1.0, 8),
        ([(0.5, math.nan), (0.5, math.nan)], 1.0, 32),  # answers of one token
    ],
)
def test_requests_are_timed_over_as_many_tokens_as_there_is_time_for(each, budget_s, tokens):
    assert affordable([Timing(ttft_s, tpot_s, 1.0) for ttft_s, tpot_s in each], budget_s) == tokens


def test_little_time_is_enough_for_the_fewest_pairs(model):
    clock, bucket = Clock(), replace(BUCKET, new_tokens=100)
    arms = costing(model, clock), costing(model, clock, decode_s=lambda batch: 0.015)
    found = compare(
        *arms, [bucket], PROMPTS, objective="tpot", limits=Limits(), noise=0.0, clock=clock, max_pairs=25, budget_s=7.0
    )
    assert found.verdict is Verdict.PASS
    assert found.tpot.pairs == 5
    assert clock.now_s - 1.0 <= 7.0
    (times,) = found.buckets.values()
    assert times.reference_s["end_to_end"][0] == pytest.approx(0.1 + 99 * 0.03)  # of all its tokens


def test_every_bucket_counts(model):
    buckets = (BUCKET, replace(BUCKET, batch=4))
    found = race(model, buckets=buckets, decode_s=lambda batch: 0.015 if batch == 1 else 0.04)
    assert found.verdict is Verdict.FAIL
    assert "b4/p12/n8" in found.reason
    assert found.buckets["b1/p12/n8"].speedups["tpot"].ratio == pytest.approx(2.0)
    assert found.buckets["b4/p12/n8"].speedups["tpot"].ratio == pytest.approx(0.75)


def test_a_gain_within_the_noise_does_not_pass(model):
    hidden = race(model, noise=0.05, decode_s=lambda batch: 0.03 / 1.08)
    assert (hidden.verdict, hidden.drowned) == (Verdict.FAIL, True)
    assert race(model, noise=0.01, decode_s=lambda batch: 0.03 / 1.08).verdict is Verdict.PASS


@pytest.mark.fault("A7")
def test_ending_the_text_at_once_gains_nothing(model):
    clock = Clock()
    hasty = costing(model, clock)
    module = hasty.modules["decode"]
    inner = module.forward

    def forward(**kwargs):
        out = inner(**kwargs)
        out.logits = torch.nn.functional.one_hot(torch.full_like(kwargs["input_ids"], 2), 60).float()
        return out

    module.forward = forward
    found = compare(
        costing(model, clock), hasty, [BUCKET], PROMPTS, objective="end_to_end", limits=Limits(), noise=0.0, clock=clock
    )
    assert found.verdict is Verdict.FAIL
    assert found.end_to_end.ratio == pytest.approx(1.0)


def test_a_variant_that_raises_is_an_error(model):
    clock, broken = Clock(), None
    broken = costing(model, clock)

    def forward(**kwargs):
        raise RuntimeError("no kernel image")

    broken.modules["decode"].forward = forward
    found = compare(
        costing(model, clock), broken, [BUCKET], PROMPTS, objective="tpot", limits=Limits(), noise=0.0, clock=clock
    )
    assert found.verdict is Verdict.ERROR
    assert "no kernel image" in found.reason


class Queue(FakeCuda):
    """A device whose work the host only queues: it takes made-up time on the clock, and waiting lets that pass."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.done_s = 0.0

    def queue(self, takes_s: float) -> None:
        self.done_s = max(self.done_s, self.clock.now_s) + takes_s

    def wait_until(self, when_s: float) -> None:
        self.clock.now_s = max(self.clock.now_s, when_s)

    def synchronize(self) -> None:
        self.wait_until(self.done_s)

    def fetch(self, tensor):
        fetched, ready_s = super().fetch(tensor), self.done_s

        def arrived():
            self.wait_until(ready_s)
            return fetched()

        return arrived


@pytest.fixture
def queue():
    device = Queue(Clock())
    with devices.stand_in(device):
        yield device


@dataclass(frozen=True)
class Queued(Cost):
    """The phases' modules return as soon as their work is queued."""

    device: Queue | None = None
    launch_s: float = 0.001

    def _charge(self, module: Any, takes_s: Callable[[int], float]) -> None:
        def launch(batch: int) -> float:
            self.device.queue(takes_s(batch))
            return self.launch_s

        super()._charge(module, launch)


def queued(model, device, takes_s=0.03, launch_s=0.001):
    work = Queued("both", device.clock, takes_s, lambda batch: takes_s, device, launch_s)
    return Variant(model).with_transform(LeanLoop("decode")).with_transform(work)


@pytest.mark.fault("B41")
def test_what_a_device_still_works_on_is_waited_for(model, queue):
    served = Served(queued(model, queue), pad_token_id=0)
    queue.queue(5.0)  # of somebody else
    found = time_request(served, [PROMPTS[0]], 8, queue.clock)
    assert found.ttft_s == pytest.approx(0.03)
    assert found.tpot_s == pytest.approx(0.03, abs=0.002)
    assert queue.clock.now_s == pytest.approx(queue.done_s)


@pytest.mark.fault("B41")
def test_where_no_token_comes_out_there_is_nothing_to_time(model, queue):
    mute = looping(model, lambda variant, call: call.input_ids)
    with pytest.raises(OutputError, match="0 tokens reached the streamer, expected 1"):
        time_request(Served(mute, pad_token_id=0), [PROMPTS[0]], 1, queue.clock)


@pytest.mark.fault("B41")
def test_launching_faster_or_answering_early_is_no_gain(model, queue):
    def against(candidate, **how):
        return compare(
            queued(model, queue),
            candidate,
            [BUCKET],
            PROMPTS,
            objective="end_to_end",
            limits=Limits(),
            noise=0.0,
            clock=queue.clock,
            **how,
        )

    def hasty(variant, call):
        """Hands over tokens that the device has not computed yet."""
        queue.queue(8 * 0.03)
        ids = call.input_ids
        for _ in range(8):
            ids = torch.cat([ids, torch.full((ids.shape[0], 1), 3)], dim=1)
            queue.clock.now_s += 1e-5
            call.streamer.put(ids[:, -1])
        call.streamer.end()
        return ids

    eager, early = against(queued(model, queue, launch_s=0.0)), against(looping(model, hasty))
    assert (eager.verdict, early.verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert eager.end_to_end.ratio == pytest.approx(1.0, abs=0.01)
    assert early.end_to_end.ratio == pytest.approx(1.0, abs=0.01)
    assert against(queued(model, queue, takes_s=0.015)).verdict is Verdict.PASS


@pytest.fixture
def neighbours():
    """Another program on every core, for as long as a test runs."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.mark.fault("B35")
@pytest.mark.parametrize("forwards", [1, 2], ids=["as fast", "twice the work"])
def test_beside_busy_neighbours_nothing_is_called_faster_that_is_not(model, neighbours, forwards):
    candidate = Variant(model).with_transform(Cost("both", Clock()))
    decode = candidate.modules["decode"]
    inner = decode.forward

    def forward(**kwargs):
        for _ in range(forwards - 1):
            torch.nn.Module.__call__(model, input_ids=kwargs["input_ids"])
        return inner(**kwargs)

    decode.forward = forward
    found = compare(
        Variant(model), candidate, [BUCKET], PROMPTS, objective="tpot", limits=Limits(), noise=None, budget_s=10.0
    )
    assert found.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE), found.reason


@pytest.mark.fault("B38")
def test_a_slow_first_request_is_warm_up(model):
    calls = []

    def compiling(batch):
        calls.append(batch)
        return 100.0 if len(calls) == 1 else 0.015

    found = race(model, decode_s=compiling)
    assert found.verdict is Verdict.PASS
    assert found.warnings == ()


@pytest.mark.fault("B38")
def test_a_candidate_that_never_settles_says_so(model):
    calls = []

    def slower_and_slower(batch):
        calls.append(batch)
        return 0.03 * 1.02 ** len(calls)

    assert any("candidate was not steady" in w for w in race(model, decode_s=slower_and_slower).warnings)


@pytest.mark.fault("B37")
def test_a_clock_that_stands_still_drops_the_pair(model):
    clock = Clock()
    found = compare(
        Variant(model),
        Variant(model),
        [BUCKET],
        PROMPTS,
        objective="tpot",
        limits=Limits(),
        noise=0.0,
        clock=clock,
        max_pairs=5,
    )
    assert found.verdict is Verdict.INCONCLUSIVE


@pytest.mark.fault("B37")
def test_a_jump_of_the_wall_clock_is_noticed(monkeypatch):
    before = Disturbance()
    assert "jumped" not in before.since()
    wall_s = time.time()
    monkeypatch.setattr(time, "time", lambda: wall_s + 3600)
    assert "the clock jumped by 3600" in before.since()


@pytest.mark.fault("B36")
def test_time_stolen_by_the_hypervisor_is_noticed(monkeypatch):
    ticks = iter([[0, 0, 0, 0, 0, 0, 0, 0], [80, 0, 0, 0, 0, 0, 0, 20]])
    monkeypatch.setattr("autotune.validate.timing._cpu_ticks", lambda: next(ticks))
    assert Disturbance().since() == "the hypervisor took 20% of the CPU"


@pytest.mark.fault("B36")
def test_a_used_up_quota_is_noticed(monkeypatch):
    held_back_s = iter([0.0, 1e6])
    monkeypatch.setattr("autotune.validate.timing._cpu_ticks", list)
    monkeypatch.setattr("autotune.validate.timing._throttled_s", lambda: next(held_back_s))
    assert "the CPU quota was used up" in Disturbance().since()


def test_noise_of_a_quiet_and_of_a_restless_machine(model):
    clock, steps = Clock(), iter(range(10**6))
    assert noise_floor(costing(model, clock), [BUCKET], PROMPTS, clock=clock) == pytest.approx(0.0, abs=1e-9)

    def restless(batch):
        return 0.03 * (1 + 0.2 * math.sin(next(steps)))

    assert noise_floor(costing(model, clock, decode_s=restless), [BUCKET], PROMPTS, clock=clock) > 0.005


def test_long_answers_are_extrapolated(model):
    clock = Clock()
    served = Served(costing(model, clock), pad_token_id=0)
    found = time_request(served, [PROMPTS[0]], 100, clock)
    assert clock.now_s == pytest.approx(1.0 + 0.1 + 31 * 0.03)  # 32 tokens were generated
    assert found.end_to_end_s == pytest.approx(0.1 + 99 * 0.03)


@pytest.mark.parametrize(
    ("marks_s", "new_tokens", "ttft_s", "tpot_s", "total_s", "polluted"),
    [
        ([1.5, 1.6, 1.7], 3, 0.5, 0.1, 0.7, False),
        ([1.5, 1.6, 1.7], 11, 0.5, 0.1, 1.5, False),
        ([1.5], 1, 0.5, math.nan, 0.5, False),
        ([0.9, 1.6, 1.7], 3, -0.1, 0.4, 0.7, True),
        ([1.5, 1.5, 1.5], 3, 0.5, 0.0, 0.5, True),
        ([1.5, math.inf], 2, 0.5, math.inf, math.inf, True),
    ],
)
def test_timing(marks_s, new_tokens, ttft_s, tpot_s, total_s, polluted):
    found = timing(1.0, marks_s, new_tokens)
    figures = (found.ttft_s, found.tpot_s, found.end_to_end_s)
    assert figures == pytest.approx((ttft_s, tpot_s, total_s), nan_ok=True)
    assert bool(found.polluted) is polluted


def test_requests_fill_their_bucket():
    rows = request(Bucket(batch=2, prompt_tokens=12, new_tokens=8), PROMPTS, turn=1)
    assert [len(row) for row in rows] == [12, 12]
    assert rows[0] == (PROMPTS[2] + PROMPTS[0])[:12]
    assert rows != request(Bucket(batch=2, prompt_tokens=12, new_tokens=8), PROMPTS, turn=0)


def test_a_machine_whose_noise_is_unknown_decides_nothing():
    found = decide({"a": [Pair(Timing(0.1, 0.03, 1.0), Timing(0.05, 0.015, 0.5))] * 8}, "tpot", Limits(), math.inf)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "this machine's noise is not known" in found.reason, "no pair of these was disturbed"


def test_label():
    assert Bucket(8, 64, 32).label == "b8/p64/n32"
    assert Bucket.of("b8/p64/n32") == Bucket(8, 64, 32)


def spread_pairs(gain: float, by: float) -> list[Pair]:
    """Pairs whose log ratios lie around a gain, with an interquartile range of `by`."""
    ratios = [gain * math.exp(by * offset) for offset in (-0.8, -0.5, -0.3, -0.5, 0.0, 0.5, 0.3, 0.5, 0.8)]
    return [Pair(Timing(0.1 * r, 0.01 * r, 0.5 * r), Timing(0.1, 0.01, 0.5)) for r in ratios]


@pytest.mark.parametrize(
    ("gain", "by", "verdict"),
    [
        (8.0, 0.44, Verdict.PASS),  # one of two cores was taken: 6.5 to 11 times as fast
        (2.0, 0.2, Verdict.PASS),
        (1.4, 0.3, Verdict.INCONCLUSIVE),  # clearly a gain by its bounds, but the machine changes by as much
        (2.0, 0.6, Verdict.INCONCLUSIVE),
    ],
)
def test_noise_hides_what_is_not_clearly_larger(gain: float, by: float, verdict: Verdict) -> None:
    found = decide({"a": spread_pairs(gain, by)}, "tpot", Limits(), 0.0)
    assert found.verdict is verdict, found.reason
    assert ("too noisy" in found.reason) is (verdict is Verdict.INCONCLUSIVE), found.reason


def test_five_pairs_that_spread_show_a_gain_that_all_of_them_have() -> None:
    """As on a machine that others disturbed: 6.7x, with two pairs of half as much."""
    pairs = [Pair(Timing(0.1 * r, 0.01 * r, 0.5 * r), Timing(0.1, 0.01, 0.5)) for r in (2.72, 3.9, 6.7, 7.2, 7.78)]
    found = decide({"a": pairs}, "tpot", Limits(), 0.0)
    assert found.verdict is Verdict.PASS, found.reason
    assert any("spread by" in warning for warning in found.warnings)
