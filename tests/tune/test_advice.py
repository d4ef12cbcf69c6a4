"""What the user could change: predictions against those worked out by hand, and what is left out without its data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from autotune.diagnose.costs import MemoryUse, PhaseProfile, Profile, ScalePoint
from autotune.diagnose.diagnosis import Diagnosis
from autotune.machine.catalogue import MACHINES
from autotune.machine.hardware import Hardware
from autotune.report import Report
from autotune.tune.advice import (
    advise,
    grouped_queries,
    larger_batch,
    more_memory,
    no_use,
    shorter_context,
    shorter_prompts,
)
from autotune.tune.findings import Findings
from autotune.tune.machines import gains_on, other_machines
from autotune.tune.record import report_of
from autotune.tune.served import Advice, ServingVariant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Piece = Callable[[ServingVariant], Iterator[Advice]]

CPU = Hardware("cpu", "Example CPU", "AVX2", 2, 10 * 10**9, 20e9, {"float32": 200e9}, None, {"torch": "2.13.0"})
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", "9.0", 8, 80 * 10**9, 3e12, {"bfloat16": 700e12}, None, {})
# a call of 1 s: 0.1 s overhead, floor 100e9 / 200e9 = 0.5 s; 1.1 GB move in 0.055 s
PREFILL = PhaseProfile(
    "prefill", (1.0,), 100e9, 1e9, 0.1e9, 0.9, "float32", 0.6, 0.1, 500, 0.0, (), attention_flops=10e9
)
# a token of 0.1 s: 0.01 s overhead, floor 1.2e9 / 20e9 = 0.06 s; 1 GFLOP takes 0.005 s
DECODE = PhaseProfile("decode", (0.1,), 1e9, 1e9, 0.2e9, 0.9, "float32", 0.06, 0.02, 400, 0.0, ())
BATCHES = tuple(ScalePoint(batch, 50, s) for batch, s in ((1, 0.08), (2, 0.1), (4, 0.16), (8, 0.32)))
CONTEXTS = (ScalePoint(1, 50, 0.09), ScalePoint(1, 250, 0.13))  # 0.2 ms a token of context: 20 ms at 100
PROFILE = Profile(
    {"prefill": PREFILL, "decode": DECODE}, BATCHES, CONTEXTS, MemoryUse(10**9, 3 * 10**8, 10**8), 100, 1, 1.0
)
SERVED = ServingVariant(PROFILE, CPU, {"prefill": "compute", "decode": "memory"}, {"prefill": 500, "decode": 400})
SMALL = replace(CPU, memory_bytes=3 * 10**9)  # (2.7 - 1) / 0.4: four sequences fit beside the weights


def served(**changes: Any) -> ServingVariant:
    """SERVED with other phases or hardware, or with other fields of its profile."""
    phases = {"prefill": changes.pop("prefill", PREFILL), "decode": changes.pop("decode", DECODE)}
    around = {name: changes.pop(name) for name in ("hardware", "operators", "bottlenecks") if name in changes}
    return replace(SERVED, profile=replace(PROFILE, phases=phases, **changes), **around)


STEEP = (*BATCHES[:3], ScalePoint(8, 50, 0.2))
FLAT = (BATCHES[0], ScalePoint(4, 50, 0.34))
PIECES: list[tuple[str, Piece, ServingVariant, str, float | None, list[str]]] = [
    # a sequence has 0.1 GB more cache than at 50 tokens: 0.1 / 1.2 of 100 ms. 4 / (0.16 + 4 x 0.00833) against
    # 1 / 0.08833 is 1.828; 8 give no more than 4
    (
        "batch",
        larger_batch,
        SERVED,
        "4 sequences at once in decode instead of 1",
        1.827586,
        ["4 sequences takes 160 ms, one of 1 80.0 ms", "context of 50", "8.33 ms for each sequence's 100 MB", "2.19x"],
    ),
    # at the context that was measured nothing is added: 4 / 0.16 against 1 / 0.08
    ("batch, same context", larger_batch, served(prompt_tokens=50), "4 sequences", 2.0, ["2.00x the time per token"]),
    # 4 / 0.16 against 2 / 0.1
    ("batch, of two", larger_batch, served(prompt_tokens=50, batch=2), "4 sequences at once in decode instead of 2",
     1.25, []),
    # 8 would be best, but does not fit
    ("batch, little memory", larger_batch, served(batch_scaling=STEEP, hardware=SMALL), "4 sequences", 1.827586, []),
    # 4 / (0.34 + 0.0333) against 1 / 0.08833
    ("batch, no gain", larger_batch, served(batch_scaling=FLAT), "4 sequences", None, ["0.95x the tokens per second"]),
    # 1e9 + 8 x 0.4e9 in 90 %; 8 / (0.2 + 8 x 0.00833) against 4 / (0.16 + 4 x 0.00833)
    (
        "memory",
        more_memory,
        served(batch_scaling=STEEP, hardware=SMALL),
        "4.67 GB of memory for the KV cache",
        1.45,
        ["of 3.00 GB, weights take 1.00 GB, and a sequence 400 MB", "4 fit into 90 %", "8 sequences takes 200 ms"],
    ),
    ("memory, no gain", more_memory, served(hardware=SMALL), "4.67 GB of memory", None, []),
    ("memory, room", more_memory, SERVED, "More memory", None, ["20 fit into 90 %", "no more than 8 were measured"]),
    ("memory, unmeasured", more_memory, served(batch_scaling=()), "More memory", None, ["no more than 1 were served"]),
    # matmuls 0.6 -> 0.3 s; attention's floor 10e9 / 200e9 -> a quarter: 0.1 -> 0.025 s; 0.3 s stay
    (
        "prompt",
        shorter_prompts,
        SERVED,
        "Prompts of 50 tokens instead of 100",
        1.6,
        ["from 600 ms to 300 ms", "from 100 ms to 25.0 ms", "of 1000 ms a call", "1.00 GB of weights"],
    ),
    # 10 GB of weights take the 0.5 s at 20 GB/s that the matmuls took by their FLOPs: 90e9 / 200e9 = 0.45 s
    (
        "prompt, weights",
        shorter_prompts,
        served(prefill=replace(PREFILL, weight_bytes=10e9, attention_s=0.0)),
        "Prompts of 50",
        None,
        ["from 600 ms to 600 ms", "1.00x at most"],
    ),
    # 20 ms become 10 ms
    ("context", shorter_context, SERVED, "Half the context", 1 / 0.9,
     ["100 tokens costs 20.0 ms of 100 ms", "50 to 250"]),
    # of several sequences the growth of one says nothing: attention's 20 ms
    ("context, attention", shorter_context, served(batch=2), "Half the context", 1 / 0.9, ["attention takes 20.0 ms"]),
    ("context, flat", shorter_context, served(context_growth=(CONTEXTS[0], ScalePoint(1, 250, 0.0905))),
     "Half the context", None, ["0.250 ms of 100 ms", "1.00x at most"]),
    # 20 ms become 5, 10 and 15 ms
    ("queries", grouped_queries, SERVED, "A model with grouped-query", 1 / 0.85,
     ["25 % would be left", "20.0 ms of 100"]),
    ("queries of two", grouped_queries, served(query_heads_per_kv_head=2.0), "A model", 1 / 0.9, ["50 % would be"]),
    ("queries of three", grouped_queries, served(query_heads_per_kv_head=3.0),
     "A model with grouped-query attention, 4 query heads per key and value head instead of 3", 1 / 0.95, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("piece", "served", "change", "gain", "told"), [p[1:] for p in PIECES], ids=[p[0] for p in PIECES]
)
def test_each_piece_is_what_comes_out_by_hand(
    piece: Piece, served: ServingVariant, change: str, gain: float | None, told: list[str]
) -> None:
    (advice,) = piece(served)
    assert advice.change.startswith(change)
    assert list(advice.speedups.values()) == [gain if gain is None else pytest.approx(gain, rel=1e-5)]
    assert [text for text in told if text not in f"{advice.because}; {advice.assumes}"] == []


FASTEST = replace(CPU, bandwidth_bytes_per_s=9e12, flops_per_s={"float32": 99e12})
WITHOUT: list[tuple[str, Piece, ServingVariant]] = [
    ("batches unmeasured", larger_batch, served(batch_scaling=())),
    ("one batch measured", larger_batch, served(batch_scaling=BATCHES[:1])),
    ("the served batch unmeasured", larger_batch, served(batch=3)),
    ("nothing larger fits", larger_batch, served(hardware=replace(CPU, memory_bytes=16 * 10**8))),
    ("no cache", more_memory, served(memory=MemoryUse(10**9, 0, 0))),
    ("not even what is served fits", more_memory, served(hardware=replace(CPU, memory_bytes=10**9))),
    ("one token", shorter_prompts, served(prompt_tokens=1)),
    ("no matmuls traced", shorter_prompts, served(prefill=replace(PREFILL, linear_s=0.0))),
    ("no attention", shorter_context, served(context_growth=(), decode=replace(DECODE, attention_s=0.0))),
    ("no attention to share", grouped_queries, served(context_growth=(), decode=replace(DECODE, attention_s=0.0))),
    ("heads unknown", grouped_queries, served(query_heads_per_kv_head=None)),
    ("heads shared already", grouped_queries, served(query_heads_per_kv_head=4.0)),
    ("neither floor decides", no_use, served(decode=replace(DECODE, flops=7e9), bottlenecks={"decode": "memory"})),
    ("little overhead", no_use, served(decode=replace(DECODE, busy=0.25), bottlenecks={"decode": "overhead"})),
    ("mixed", no_use, served(bottlenecks={"prefill": "mixed", "decode": "mixed"})),
    ("not diagnosed", no_use, served(bottlenecks={})),
    ("no machine is faster", other_machines, served(hardware=FASTEST)),
]


@pytest.mark.parametrize(("piece", "served"), [p[1:] for p in WITHOUT], ids=[p[0] for p in WITHOUT])
def test_without_its_data_a_piece_is_left_out(piece: Piece, served: ServingVariant) -> None:
    assert list(piece(served)) == []


BF16 = {"prefill": replace(PREFILL, compute_dtype="bfloat16"), "decode": replace(DECODE, compute_dtype="bfloat16")}
FP16 = {"prefill": replace(PREFILL, compute_dtype="float16"), "decode": replace(DECODE, compute_dtype="float16")}
PACKED = {"prefill": replace(PREFILL, compute_dtype="int8"), "decode": replace(DECODE, compute_dtype="int16")}
IDLE = {"prefill": replace(PREFILL, busy=0.1), "decode": replace(DECODE, busy=0.1)}
EPYC = replace(CPU, name="AMD EPYC 9654 96-Core Processor")
DESKTOP = replace(CPU, bandwidth_bytes_per_s=80e9, flops_per_s={"float32": 4e12})
ON_H100 = served(hardware=H100, **BF16)
MACHINE_GAINS: list[tuple[str, str, ServingVariant, dict[str, float] | None]] = [
    # prefill: 100e9 / 7.3728e12 = 13.563 ms against 0.5 s, decode: 1.2e9 / 460.8e9 = 2.6042 ms against 60 ms
    (
        "processor",
        "AMD EPYC 9654",
        SERVED,
        {"ttft": 1 / (0.1 + 0.9 * 0.01356337 / 0.5), "tpot": 0.1 / (0.01 + 0.09 * 0.002604167 / 0.06)},
    ),
    # 4000 launches of 5 us are more than 10 ms of overhead; 1.2e9 / 4.8e12 = 0.25 ms, 100e9 / 67e12 = 1.4925 ms
    (
        "launches",
        "NVIDIA H200 SXM",
        served(operators={"prefill": 500, "decode": 4000}),
        {"ttft": 1 / (0.1 + 0.9 * 0.001492537 / 0.5), "tpot": 0.1 / (0.02 + 0.09 * 0.25 / 60)},
    ),
    # both by data sheet, 3.35 and 4.8 TB/s: 90 % of either phase is work that moves bytes
    (
        "data sheet here",
        "NVIDIA H200 SXM",
        ON_H100,
        {"ttft": 1 / (0.1 + 0.9 * 335 / 480), "tpot": 1 / (0.1 + 0.9 * 335 / 480)},
    ),
    # a part of an H100 is measured: 3 TB/s against 4.8
    (
        "part of a GPU",
        "NVIDIA H200 SXM",
        replace(ON_H100, hardware=replace(H100, name="NVIDIA H100 80GB HBM3 MIG 3g.40gb")),
        {"ttft": 1 / (0.1 + 0.9 * 300 / 480), "tpot": 1 / (0.1 + 0.9 * 300 / 480)},
    ),
    ("itself", "NVIDIA H100 SXM", ON_H100, None),
    ("itself, a processor", "AMD EPYC 9654", served(hardware=EPYC), None),
    ("slower", "NVIDIA A100 SXM 80 GB", ON_H100, None),
    ("too little gain", "AMD Ryzen 9 9950X", served(hardware=DESKTOP), None),
    ("dtype without a peak", "AMD EPYC 9654", served(**FP16), None),
    (
        "integers that no sheet lists",
        "AMD EPYC 9654",
        served(**PACKED),
        {"ttft": 1 / (0.1 + 0.9 * 0.01356337 / 0.5), "tpot": 0.1 / (0.01 + 0.09 * 0.002604167 / 0.06)},
    ),
    ("no room", "NVIDIA L4", served(memory=MemoryUse(25 * 10**9, 0, 0)), None),
    ("all overhead", "NVIDIA H200 SXM", served(**IDLE), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "served", "gains"), [m[1:] for m in MACHINE_GAINS], ids=[m[0] for m in MACHINE_GAINS])
def test_another_machine_scales_the_work_and_keeps_the_overhead(
    name: str, served: ServingVariant, gains: dict[str, float] | None
) -> None:
    machine = next(m for m in MACHINES if m.name == name)
    assert gains_on(served, machine) == (gains if gains is None else pytest.approx(gains, rel=1e-5))


@pytest.mark.parametrize(
    ("served", "names"),
    [
        (SERVED, ["AMD Ryzen 9 9950X", "Intel Xeon 6980P", "NVIDIA L4", "NVIDIA H200 SXM"]),
        (ON_H100, ["NVIDIA H200 SXM"]),
    ],
    ids=["processor", "GPU"],
)
def test_few_machines_are_listed_those_of_this_kind_first(served: ServingVariant, names: list[str]) -> None:
    assert [advice.change for advice in other_machines(served)] == names


def test_a_machine_says_what_it_is_compared_with() -> None:
    advice = {a.change: a for a in other_machines(SERVED)}
    desktop, gpu = advice["AMD Ryzen 9 9950X"], advice["NVIDIA L4"]
    assert "89.6 GB/s, 4.40 TFLOP/s in float32 (product page: 2 x DDR5-5600, 16 cores of 4.3 GHz" in desktop.because
    assert desktop.because.endswith("against 20.0 GB/s, 200 GFLOP/s in float32 measured here")
    assert "as here (prefill 56 %, decode 67 %)" in desktop.assumes  # 0.5 of 0.9 s, 60 of 90 ms
    assert desktop.assumes.endswith("overhead stays (100.0 ms a call, 10.00 ms a token)")
    assert gpu.assumes.endswith(
        "or takes 5 us to launch each of the original's operators (500 a call, 400 a token) where that is longer"
    )
    (other,) = other_machines(ON_H100)
    assert other.because.endswith("against 3.35 TB/s, 990 TFLOP/s in bfloat16 by data sheet here")


@pytest.mark.parametrize(
    ("served", "change", "metric", "because"),
    [
        (
            served(bottlenecks={"prefill": "compute"}),
            "Quantised weights, still multiplied in float32, or faster memory, for prefill",
            "ttft",
            "it is compute-bound, its 100 GFLOP a call taking 500 ms at 200 GFLOP/s in float32, its 1.10 GB taking "
            "55.0 ms at 20.0 GB/s",
        ),
        (
            served(bottlenecks={"decode": "memory"}),
            "More FLOP/s at the same bandwidth, for decode",
            "tpot",
            "it is memory-bound, its 1.20 GB taking 60.0 ms at 20.0 GB/s, its 1.00 GFLOP a token taking 5.00 ms at "
            "200 GFLOP/s in float32",
        ),
        (
            served(decode=replace(DECODE, busy=0.1), bottlenecks={"decode": "overhead"}),
            "Faster memory or more FLOP/s, for decode",
            "tpot",
            "90.0 ms of 100 ms a token pass between operators and in small ones; with no time for anything else it "
            "would be 1.11x as fast",
        ),
    ],
    ids=["compute", "memory", "overhead"],
)
def test_what_would_bring_nothing_says_why(served: ServingVariant, change: str, metric: str, because: str) -> None:
    assert list(no_use(served)) == [Advice(change, {metric: None}, because)]


# name -> bandwidth in GB/s, float32 and bfloat16 peaks in TFLOP/s, worked out by hand
FIGURES = {
    "AMD Ryzen 9 9950X": (89.6, 4.4032, 8.8064),
    "Intel Xeon Platinum 8480+": (307.2, 7.168, 114.688),
    "AMD Ryzen Threadripper PRO 7995WX": (332.8, 7.68, 15.36),
    "AMD EPYC 9654": (460.8, 7.3728, 14.7456),
    "AMD EPYC 9755": (576.0, 22.1184, 44.2368),
    "Intel Xeon 6980P": (844.8, 16.384, 262.144),
    "NVIDIA L4": (300, 30.3, 121),
    "NVIDIA A10": (600, 31.2, 125),
    "NVIDIA GeForce RTX 4090": (1008, 82.6, 165.2),
    "NVIDIA A100 SXM 80 GB": (2039, 19.5, 312),
    "NVIDIA H100 SXM": (3350, 67, 989.5),
    "NVIDIA H200 SXM": (4800, 67, 989.5),
}


def test_the_machines_are_those_of_their_vendors() -> None:
    found = {
        m.name: (m.bandwidth_bytes_per_s / 1e9, *(m.flops_per_s.get(d) for d in ("float32", "bfloat16")))
        for m in MACHINES
    }
    expected = {name: pytest.approx((gb, f32 * 1e12, bf16 * 1e12)) for name, (gb, f32, bf16) in FIGURES.items()}
    assert found == expected
    assert all(m.source and (m.memory_bytes is None) == (m.device == "cpu") for m in MACHINES)
    assert MACHINES[0].flops_per_s.keys() == {"float32", "bfloat16"}
    assert next(m for m in MACHINES if m.name == "NVIDIA A100 SXM 80 GB").flops_per_s == {
        "float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12,
    }  # fmt: skip


def diagnoses(prefill: Any, decode: Any) -> dict[Any, Diagnosis]:
    found = {"prefill": prefill, "decode": decode}
    return {phase: Diagnosis(phase, bound, "", 2.0, 0.5) for phase, bound in found.items()}


BEFORE = Findings(
    model="m",
    parameters=1,
    hardware=CPU,
    workload="w",
    before=PROFILE,
    diagnoses_before=diagnoses("compute", "memory"),
    verdict="v",
)
FAST = replace(DECODE, samples_s=(0.05,), busy=1.0, operator_count=1)
AFTER = replace(
    BEFORE,
    after=replace(PROFILE, phases={"prefill": PREFILL, "decode": FAST}, batch_scaling=()),
    diagnoses_after=diagnoses("mixed", "memory"),
)


def test_what_serves_now_is_what_counts() -> None:
    before, after = ({a.change: a for a in advise(report)} for report in (BEFORE, AFTER))
    context = "Half the context in decode, by shorter prompts or a sliding window"
    assert before[context].speedups == {"tpot": pytest.approx(1 / 0.9)}
    assert after[context].speedups == {"tpot": pytest.approx(1 / 0.8)}  # 20 of 50 ms
    assert "4 sequences at once in decode instead of 1" in before
    assert not any("sequences at once" in change for change in after)  # that was measured on the original alone
    assert "Quantised weights, still multiplied in float32, or faster memory, for prefill" in before
    assert not any(change.startswith("Quantised") for change in after)
    assert "(500 a call, 400 a token)" in after["NVIDIA L4"].assumes  # the original's operators: a recorded step is one


def test_what_helps_comes_first() -> None:
    helps = [any(gain is not None for gain in a.speedups.values()) for a in advise(BEFORE)]
    assert helps == sorted(helps, reverse=True)
    assert True in helps
    assert False in helps


@pytest.mark.parametrize("findings", [BEFORE, AFTER], ids=["before", "after"])
def test_every_form_ends_with_it(findings: Findings) -> None:
    report = report_of(findings)
    found = json.loads(report.to_json())["advice"]
    assert len(found) == len(advise(findings))
    assert all(set(a) == {"change", "speedups", "because", "assumes"} for a in found)
    text, markdown, page = str(report), report.to_markdown(), report.to_html()
    help_, nothing = "What you could change", "What would bring little or nothing"
    for form in (text, markdown, page):
        assert form.rindex("How it was measured") < form.rindex(help_) < form.rindex(nothing)
    for advice in found:
        assert advice["change"] in markdown[markdown.index(help_) :].replace("\\", "")
        assert advice["change"].split()[0] in text[text.index(help_) :]
    assert "decode 1.11x" in report_of(BEFORE).to_markdown()


def test_the_same_assumption_is_told_once() -> None:
    told = report_of(BEFORE).to_markdown()
    assert told.count("Assumes that work reaches the same share") == 2  # of processors, of GPUs
    assert told.count("Assumes the same.") == 2


def test_a_record_of_an_earlier_version_has_none_and_is_shown() -> None:
    record = {key: value for key, value in report_of(BEFORE).to_dict().items() if key != "advice"}
    for form in (str(Report(record)), Report(record).to_markdown(), Report(record).to_html()):
        assert "What you could change" not in form
        assert "What would bring" not in form


def test_where_nothing_helps_only_that_is_told() -> None:
    record = report_of(BEFORE).to_dict()
    record["advice"] = [a for a in record["advice"] if not any(a["speedups"].values())]
    for form in (str(Report(record)), Report(record).to_markdown()):
        assert "What you could change" not in form
        assert "What would bring little or nothing" in form
    page = Report(record).to_html()
    assert '<section id="advice"' in page
    assert "What would bring little or nothing" in page
