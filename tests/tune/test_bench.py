"""The search's measuring side: what a candidate leaves behind, and what only the largest request shows."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from autotune.errors import BudgetSpentError, DeviceError
from autotune.machine import device, intraop
from autotune.model.linear_layers import stored_bytes
from autotune.runtime.traffic import Traffic
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.linear_dtype import LinearDtype
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.weight_only import WeightOnly
from autotune.tune import policy
from autotune.tune.bench import LiveBench
from autotune.tune.exams import filled_up
from autotune.validate import BucketTimes, Latency, Quality, Speedup, Verdict, latency
from autotune.validate.score import CandidateError, Served
from autotune.validate.texts import LONGEST_CONTEXT, choose, effort
from autotune.validate.tiers import SIZES
from autotune.workload import PHASES, Phase, Workload
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts
from tests.profile.crowded import Crowded
from tests.transforms.test_packed_prefill import CPU
from tests.transforms.test_weights import profile_of


def bench_of(model: Any, batches: tuple[int, ...] = (1, 4), traffic: Traffic | None = None) -> LiveBench:
    work = Workload(tuple(map(tuple, token_prompts(8))), new_tokens=4, batch_sizes=batches)
    return LiveBench(Variant(model, traffic, work), work, policy.load("balanced"), None, notify=str)


def exhausted_beyond(bench: LiveBench, rows: int, error: Exception) -> Variant:
    """A variant that fails for more sequences than `rows`."""
    variant = bench.original.with_transform(LeanLoop(phase="decode"))
    (module,) = variant.edit("decode")
    forward = module.forward

    def limited(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(ids) > rows:
            raise error
        return forward(ids, *args, **kwargs)

    module.forward = limited
    return variant


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has ...")


@pytest.mark.fault("A14")
@pytest.mark.parametrize(
    ("rows", "said"),
    [(4, None), (3, "largest request (4 x "), (1, "out of memory")],
    ids=["fits", "does not", "memory"],
)
def test_what_only_the_largest_request_shows(rows: int, said: str | None) -> None:
    with device.stand_in(FakeCuda()) as fake:
        bench = bench_of(tiny("llama"))
        found = bench.stress(exhausted_beyond(bench, rows, MEMORY))
    assert (found is None) == (said is None)
    assert said is None or said in str(found)
    assert fake.trims == (0 if said is None else 1)  # type: ignore[attr-defined]


ERRORS = [
    (MEMORY, "out of memory: CUDA out of memory. Tried to allocate 2 GiB"),
    (ZeroDivisionError("oops"), "ZeroDivisionError: oops"),
    (ValueError(), "ValueError"),
]


@pytest.mark.parametrize(("error", "said"), ERRORS, ids=["memory", "one line", "no line"])
def test_what_a_candidate_raised_in_words(error: Exception, said: str) -> None:
    assert bench_of(tiny("llama")).describe_error(error) == said


def test_a_dead_device_is_no_candidates_failure() -> None:
    with device.stand_in(FakeCuda()):
        bench = bench_of(tiny("llama"))
        death = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(DeviceError, match="restart the process"):
            bench.describe_error(death)
    for call in (bench.stress, lambda variant: Served(variant, 0).step([(1, 2, 3)], [(4, 5)])):
        with device.stand_in(FakeCuda()), pytest.raises(DeviceError, match="restart the process"):
            call(exhausted_beyond(bench, 0, death))


@pytest.mark.parametrize(
    "transform",
    [WeightOnly("decode"), WeightOnly("both", bits=4), LinearDtype("prefill")],
    ids=str,
)
def test_what_a_transform_takes_is_known_before_it_is_tried(transform: Transform) -> None:
    original = Variant(tiny("qwen3"))
    predicted = transform.extra_bytes(original)
    modules = original.with_transform(transform).modules.values()
    assert predicted == stored_bytes(original.original, *modules) - stored_bytes(original.original) > 0


def test_a_gate_with_one_output_says_little_of_what_a_mixture_takes() -> None:
    """Packed, it is sixteen rows: fifteen of padding."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_experts": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    shared = {"shared_expert_intermediate_size": 96, "num_experts_per_tok": 2, "max_position_embeddings": 128}
    original = Variant(Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **heads, **shared)).eval())
    transform = WeightOnly("decode", bits=8)
    modules = original.with_transform(transform).modules.values()
    taken = stored_bytes(original.original, *modules) - stored_bytes(original.original)
    assert transform.extra_bytes(original) == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("transform", [StaticCache("decode", 128), CompileStep("decode", slots=128)], ids=str)
def test_slots_take_memory_on_a_gpu(transform: Transform) -> None:
    original = bench_of(tiny("llama"), batches=(1, 4)).original
    assert transform.extra_bytes(original) == 0
    with device.stand_in(FakeCuda()):
        assert transform.extra_bytes(original) == 2 * 2 * 4 * 128 * 2 * 16 * 4  # K and V, layers, batch, slots, heads
        assert transform.extra_bytes(original.with_transform(StaticCache("decode"))) == 0


@pytest.mark.parametrize("phase", PHASES)
def test_the_wait_for_live_requests_makes_no_candidate_slow(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Crowded(0.0, 0.0, 1e6, 1e6)
    bench = bench_of(tiny("llama"), traffic=traffic)
    monkeypatch.setattr(time, "perf_counter", traffic.read)
    found = bench.first_speedup(bench.original, bench.original.with_transform(LeanLoop(phase="decode")), phase)
    assert not traffic.waits_s, "it did not wait"
    assert 0.1 < found < 10


# Speeds are made up below: which of them are believed, and what is measured for it


def raced(ratio: float, spread: float, verdict: Verdict = Verdict.PASS) -> Latency:
    """A race whose reference requests took turns between 1 s and 1 + `spread` s."""
    gain = Speedup(ratio, ratio * 0.99, ratio * 1.01, 6)
    took = tuple(1.0 + spread * (k % 2) for k in range(6))
    metrics = ("ttft", "tpot", "end_to_end")
    return Latency(
        verdict, "scripted", gain, gain, gain, 0.0, {"b1/p8/n8": BucketTimes({}, dict.fromkeys(metrics, took))}
    )


@pytest.mark.parametrize(
    ("first", "asked"),
    [
        (raced(5.0, 0.05), [0.0]),
        (raced(1.05, 0.0), [0.0]),
        (raced(1.05, 0.05), [0.0, "A/A", 0.02]),  # twice what its own requests differ by is more than that
        (raced(0.9, 0.0, Verdict.FAIL), [0.0]),
        (raced(1.05, 0.05, Verdict.INCONCLUSIVE), [0.0]),
    ],
    ids=["large gain", "small gain, steady", "small gain, restless", "loss", "open"],
)
def test_the_machines_noise_is_measured_where_it_decides(
    first: Latency, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def compare(*_: Any, noise: float, **__: Any) -> Latency:
        calls.append(noise)
        return first if len(calls) == 1 else raced(1.05, 0.05)

    def floor(*_: Any, **__: Any) -> float:
        calls.append("A/A")
        return 0.02

    monkeypatch.setattr(latency, "compare", compare)
    monkeypatch.setattr(latency, "noise_floor", floor)
    bench = bench_of(tiny("llama"))
    found = bench.race(bench.original, bench.original, "decode")
    assert calls == asked
    assert found.verdict is first.verdict
    if asked == [0.0] and first.verdict is Verdict.PASS:
        assert found.noise < (found.tpot.low - 1) / 2


def test_a_plan_that_did_not_hold_leaves_the_noise_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search follows, whose small gains it decides."""
    asked = list[tuple[float, int]]()

    def compare(_: Any, __: Any, buckets: Any, *___: Any, noise: float, **____: Any) -> Latency:
        asked.append((noise, len(buckets)))
        return raced(0.9, 0.0, Verdict.FAIL)

    monkeypatch.setattr(latency, "compare", compare)
    monkeypatch.setattr("autotune.tune.bench.quality.judge", lambda *_: Quality("strict", Verdict.PASS, "good"))
    bench = bench_of(tiny("llama"))
    bench.reverify(bench.original)
    assert asked == [(0.0, 1)]
    assert bench.races.noise is None


def test_a_disturbed_measurement_of_the_noise_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves its own race open, and no other one."""
    floors, races = [math.inf, 0.01], [raced(1.04, 0.05), raced(8.0, 0.05), raced(1.05, 0.05), raced(1.05, 0.05)]
    monkeypatch.setattr(latency, "compare", lambda *_, noise, **__: replace(races.pop(0), noise=noise))
    monkeypatch.setattr(latency, "noise_floor", lambda *_, **__: floors.pop(0))
    bench = bench_of(tiny("llama"))
    small, large, again = (bench.race(bench.original, bench.original, "decode") for _ in range(3))
    assert small.verdict is Verdict.INCONCLUSIVE
    assert "too many requests were disturbed" in small.reason
    assert large.verdict is Verdict.PASS
    assert (again.verdict, again.noise) == (Verdict.PASS, 0.01)
    assert not floors
    assert not races


@pytest.mark.parametrize("fails", [False, True])
def test_a_plan_from_elsewhere_is_timed_in_every_bucket_after_the_largest_request(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    buckets = list[int]()

    def compare(_: Any, __: Any, given: Any, *___: Any, **____: Any) -> Latency:
        buckets.append(len(given))
        return raced(5.0, 0.0)

    monkeypatch.setattr(latency, "compare", compare)
    monkeypatch.setattr("autotune.tune.bench.quality.judge", lambda *_: Quality("strict", Verdict.PASS, "good"))
    bench = bench_of(tiny("llama"))
    if fails:
        with pytest.raises(CandidateError, match="largest request"):
            bench.prove(exhausted_beyond(bench, 2, RuntimeError("no kernel for so many")))
    else:
        assert bench.prove(bench.original)[1] is not None
    assert buckets == ([] if fails else [2])


@pytest.mark.parametrize(
    ("prompts", "added"),
    [
        ([(7,) * 600 + (k,) for k in range(20)], 15),  # an exam reads their beginnings, which are one text
        ([(7, k) for k in range(20)], 0),
        ([(k,) for k in range(20)], 16),  # nothing follows the first token
        ([(7, 8)] * 20, 15),
    ],
)
def test_prompts_that_are_one_text_to_an_exam_are_filled_up(prompts: list[tuple[int, ...]], added: int) -> None:
    texts = tuple(tuple(range(k, k + 96)) for k in range(40))
    found = filled_up(tuple(prompts), texts)
    assert len(found) == len(prompts) + added
    assert len(choose(found, SIZES["quick"], LONGEST_CONTEXT, 0)) == SIZES["quick"].prompts


@pytest.mark.parametrize(("left_s", "brief"), [(1000.0, False), (-5.0, False), (-60.0, True)])
def test_a_confirmation_is_brief_where_the_budget_has_no_room(
    left_s: float, brief: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "compare", lambda *_, **__: raced(5.0, 0.0))
    bench = bench_of(tiny("llama"))
    bench.exams.to_confirm = Quality("strict", Verdict.PASS, "in full")  # type: ignore[assignment]
    monkeypatch.setattr("autotune.tune.bench.quality.judge", lambda exam, *_: exam)
    monkeypatch.setattr(bench.exams, "prepare", lambda *_: Quality("strict", Verdict.INCONCLUSIVE, "in brief"))
    bench.allowance.took_s = {"exam": 3.0, "race": 2.0}
    bench.allowance.deadline = time.monotonic() + left_s
    found = bench.confirm(bench.original.with_transform(LeanLoop(phase="decode")))
    assert found.holds
    assert found.quality is not None
    assert (found.brief, found.quality.reason) == (brief, "in brief" if brief else "in full")


@pytest.mark.parametrize(
    ("dtype", "emulated", "batch", "times"),
    [
        (torch.bfloat16, True, 1, 14.0),
        (torch.bfloat16, False, 1, 1.0),
        (torch.float32, True, 1, 1.0),
        (torch.float32, True, 16, 16.0),  # an exam reads one text at a time, prefill was measured with 16
    ],
)
def test_the_exam_is_foreseen_in_the_arithmetic_in_which_it_reads(
    dtype: torch.dtype, emulated: bool, batch: int, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 GFLOP in 6.4 s at 10 GFLOP/s, or at 140."""
    monkeypatch.setattr("autotune.validate.exam.emulated", lambda given: emulated and given == torch.bfloat16)
    bench = bench_of(tiny("llama").to(dtype))
    bench.hardware = CPU
    profile = profile_of(6.4, 0.0, weight_bytes=1e6, flops=64e9, compute_dtype=str(dtype).removeprefix("torch."))
    profile = replace(profile, prompt_tokens=64, batch=batch)
    profile.phases["decode"] = replace(profile.phases["decode"], samples_s=(0.0,))
    tokens = effort(SIZES["quick"], 64).read
    requests = 2 * (3 + 5)  # two races, of three requests to warm up and five pairs each; one prompt each
    monkeypatch.setattr("autotune.profile.measure", lambda *_, **__: profile)
    bench.profile(bench.original)
    assert bench.least_s(profile) == pytest.approx(2 * tokens * 0.1 / times + requests * 6.4, rel=0.01)


@pytest.mark.parametrize(
    ("elsewhere", "one_s", "two_s", "threads"),
    [(0.5, 1.0, 6.0, 1), (0.5, 2.0, 1.0, None), (0.1, 1.0, 6.0, None), (None, 1.0, 6.0, None)],
)
@pytest.mark.parametrize("waits_s", [(), (1000.0, 0.0, 1000.0)])  # what the faster one waits for is not its time
def test_beside_others_the_original_reads_with_the_threads_that_are_faster(
    elsewhere: float | None,
    one_s: float,
    two_s: float,
    threads: int | None,
    waits_s: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traffic, read = Crowded(*waits_s, tick_s=0.0), list[int]()
    bench = bench_of(tiny("llama"), traffic=traffic)

    def reading(*_: Any, **__: Any) -> None:
        with bench.original.turn():
            read.append(torch.get_num_threads())
            traffic.now_s += one_s if read[-1] == 1 else two_s

    profile = profile_of(4.0, 0.1, weight_bytes=1e6, flops=64e9, compute_dtype="float32")
    monkeypatch.setattr("autotune.profile.measure", lambda *_, **__: replace(profile, prompt_tokens=8))
    monkeypatch.setattr("autotune.tune.bench.busy.Meter.elsewhere", lambda _: elsewhere)
    monkeypatch.setattr(time, "perf_counter", traffic.read)
    monkeypatch.setattr(Served, "read", reading)
    with intraop.computing_with(2):
        bench.profile(bench.original)
    assert read == ([1, 2, 1, 2] if elsewhere == 0.5 else [])
    assert bench.exams.threads == threads
    prompt = bench.tuning.prompts[0]
    assert bench.exams.read_s == pytest.approx(4.1 / 8 if threads is None else one_s / len(prompt))


def test_an_exam_reads_with_the_threads_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, counts = bench_of(tiny("llama")), list[int]()
    bench.exams.threads = 1
    run, read = Served.generate, Served.read
    monkeypatch.setattr(Served, "generate", lambda *a, **k: (counts.append(torch.get_num_threads()), run(*a, **k))[1])
    monkeypatch.setattr(Served, "read", lambda *a, **k: (counts.append(torch.get_num_threads()), read(*a, **k))[1])
    with intraop.computing_with(2):
        exam = bench.exams.prepare(bench.workload, tuple(map(tuple, token_prompts(16, seed=3))))
        exam.reference((exam.texts[-1],))
    assert exam.problem is None
    assert counts[0] == 1, "it continues the prompts"
    assert counts[-1] == 1, "it reads"
    assert 2 in counts, "it steps as it serves, to measure its noise"


@pytest.mark.parametrize(
    ("request_s", "late_s", "given_up"), [(0.0, -1.0, False), (0.0, 18.0, False), (0.0, 20.0, True), (1.5, 9.0, True)]
)
@pytest.mark.parametrize("brief", [True, False, None])
def test_a_judgement_ends_with_the_budget(
    brief: bool | None, request_s: float, late_s: float, given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a little grace, 8 % of 240 s, in which a race must still end."""
    shares = list[float]()

    def judge(exam: Any, variant: Variant, tier: str, progress: Any) -> Quality:
        for share in (0.0, 0.5):
            progress("comparing", share)
            shares.append(share)
            bench.allowance.deadline = time.monotonic() - late_s
        return Quality(tier, Verdict.FAIL, "judged")

    bench = bench_of(tiny("llama"))
    bench.exams.to_choose = bench.exams.to_confirm = Any  # type: ignore[assignment]
    monkeypatch.setattr("autotune.tune.bench.quality.judge", judge)
    variant = bench.original.with_transform(LeanLoop(phase="decode"))
    bench.allowance.request_s = request_s

    def ask() -> object:
        return bench.judge(variant, "strict") if brief is None else bench.confirm(variant, brief=brief)

    if not given_up:
        ask()
        assert shares == [0.0, 0.5]
        return
    with pytest.raises(BudgetSpentError, match="the budget of 240 s was spent with 50% done of comparing answers"):
        ask()
    assert shares == [0.0]


@pytest.mark.parametrize("late", [False, True])
def test_where_the_budget_is_spent_no_noise_is_measured_and_no_small_gain_believed(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    monkeypatch.setattr(latency, "compare", lambda *_, **__: raced(1.05, 0.05))
    monkeypatch.setattr(latency, "noise_floor", lambda *_, **__: asked.append("noise") or 0.02)
    bench = bench_of(tiny("llama"))
    if late:
        bench.allowance.deadline = time.monotonic() - 1.0
    found = bench.race(bench.original, bench.original, "decode")
    assert asked == ([] if late else ["noise"])
    assert found.verdict is (Verdict.INCONCLUSIVE if late else Verdict.PASS)
    assert ("the budget was spent" in found.reason) == late
