"""Reports from hand-made values: the record's names, and what a reader sees."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
from rich.console import Console

from autotune.diagnose.costs import MemoryUse, Operator, PhaseProfile, Profile, ScalePoint
from autotune.diagnose.diagnosis import Diagnosis
from autotune.machine.hardware import Hardware
from autotune.report import Report, read
from autotune.report import numbers as n
from autotune.report.candidates import contributions, not_tried
from autotune.report.markdown import escape
from autotune.report.sections import quality, result
from autotune.runtime.variant import Stage, Transform
from autotune.tune.contributions import Contribution
from autotune.tune.findings import Findings
from autotune.tune.plan import Trial, TrialOutcome
from autotune.tune.record import report_of, reverified
from autotune.tune.sharing import CallersPoint, Sharing
from autotune.validate import BucketTimes, Latency, Quality, Speedup, Verdict
from autotune.workload import Phase

NAN = float("nan")


@dataclass(frozen=True)
class Shrink(Transform):
    phase: Literal["prefill", "decode", "both"] = "decode"
    bits: int = 8
    name: ClassVar[str] = "shrink"
    stage: ClassVar[Stage] = Stage.WEIGHTS


@dataclass(frozen=True)
class Named(Transform):
    name_of: str = ""
    name: ClassVar[str] = "named"
    stage: ClassVar[Stage] = Stage.WEIGHTS


def phase_profile(phase, seconds, rows):
    operators = tuple(Operator(group, s, 1e6, 1e6, bottleneck) for group, s, bottleneck in rows)
    return PhaseProfile(
        phase,
        (seconds, seconds * 0.9, seconds * 1.2),
        1e9,
        5e8,
        1e6,
        0.9,
        "float32",
        seconds / 2,
        seconds / 8,
        300,
        0.0,
        operators,
    )


def profile(prefill_s, decode_s, weights=540_000_000):
    rows = [("attention", 0.45, "memory"), ("FFN", 0.35, "memory"), ("framework overhead", 0.2, "overhead")]
    return Profile(
        {
            "prefill": phase_profile("prefill", prefill_s, [(g, s * prefill_s, b) for g, s, b in rows]),
            "decode": phase_profile("decode", decode_s, [(g, s * decode_s, b) for g, s, b in rows]),
        },
        batch_scaling=(ScalePoint(1, 64, decode_s), ScalePoint(4, 64, 2 * decode_s)),
        context_growth=(ScalePoint(1, 64, decode_s), ScalePoint(1, 512, 1.5 * decode_s)),
        memory=MemoryUse(weights, 10_000_000, 5_000_000),
        prompt_tokens=64,
        batch=1,
    )


HARDWARE = Hardware("cpu", "Example CPU", "AVX2", 2, 8 * 10**9, 25e9, {"float32": 140e9}, "g++ 13", {"torch": "2.13.0"})
DIAGNOSES: dict[Phase, Diagnosis] = {
    "prefill": Diagnosis("prefill", "compute", "prefill computes 17 GFLOP at 130 GFLOP/s: compute-bound", 1.08, 0.93),
    "decode": Diagnosis("decode", "overhead", "decode moves 538 MB a token at 10.0 GB/s: overhead-bound", 2.5, 0.4),
}
PASSED = Quality(
    "strict",
    Verdict.PASS,
    "mean KLD 0.0017, at most 0.0050",
    0.0017,
    0.002,
    0.02,
    NAN,
    0.981,
    0.975,
    1.0004,
    1.001,
    0.003,
    4096,
    64,
    {"natural": 0.0016},
)
RUINED = Quality(
    "strict", Verdict.FAIL, "mean KLD 1.21, at most 0.0050", 1.21, 1.4, 6.0, 9.0, 0.548, 0.5, 3.04, 3.2, 0.2, 1024, 16
)
FASTER = Latency(
    Verdict.PASS,
    "lower bound 2.40, at least 1.03.",
    Speedup(1.0, 0.98, 1.02, 25),
    Speedup(2.5, 2.4, 2.6, 25),
    Speedup(2.2, 2.1, 2.3, 25),
    0.012,
    {
        "b1/p64/n32": BucketTimes(
            {},
            {"tpot": (0.030, 0.032, 0.034), "ttft": (0.09,)},
            {"tpot": (0.012, 0.0128, 0.014), "ttft": (0.09,)},
        )
    },
    warnings=("IQR is 12 % of the median",),
)
TRIALS = (
    Trial(
        Shrink(), "smaller weights", "decode", TrialOutcome.ACCEPTED, "2.50x faster", 3.1, PASSED, FASTER, 42.0, 13.0
    ),
    Trial(
        Shrink(bits=4),
        "smaller weights",
        "decode",
        TrialOutcome.REJECTED,
        "mean KLD 1.21, at most 0.0050",
        4.0,
        RUINED,
        None,
        9.0,
    ),
    Trial(Shrink(phase="prefill"), "smaller weights", "prefill", TrialOutcome.SKIPPED, "prefill is compute-bound"),
    Trial(Shrink(bits=2), "smaller weights", "decode", TrialOutcome.UNAVAILABLE, "needs | AVX-512", NAN),
)
ORIGINAL = Findings(
    model="tiny-llama",
    parameters=134_500_000,
    hardware=HARDWARE,
    workload="16 prompts of 64 tokens, 64 new tokens each, batch 1",
    before=profile(0.093, 0.032),
    diagnoses_before=DIAGNOSES,
    verdict="Kept the original: no candidate passed.",
    trials=TRIALS[1:],
    policy="balanced",
    tier="strict",
    objective="latency",
    budget_s=300.0,
    seconds=125.0,
    created="2026-11-22T18:00:00Z",
)
COMMITTED = replace(
    ORIGINAL,
    verdict="Committed shrink(bits=8)@decode.",
    after=profile(0.093, 0.013, weights=680_000_000),
    diagnoses_after={
        **DIAGNOSES,
        "decode": Diagnosis("decode", "memory", "decode moves 135 MB at 20 GB/s: memory-bound", 1.2, 0.8),
    },
    transforms=(Shrink(),),
    trials=TRIALS,
    quality=PASSED,
    latency=FASTER,
    break_even_tokens=12_345.0,
    sharing=Sharing(
        "callers are decoded together: 4 callers get 2.00x the tokens per second of one at a time",
        4,
        (50.0, 50.0),
        (
            CallersPoint(1, (49.0, 51.0), (0.98, 1.02), (0.09,), (0.011,)),
            CallersPoint(4, (90.0, 110.0), (1.8, 2.2), (0.2, 0.3, 0.4), (0.02, 0.03, 0.022)),
        ),
        gap_s=0.0624,
        long_prompt=1500,
    ),
)
CALLED = report_of(COMMITTED).with_calls(0, {"beam search": 3})
PROFILED = replace(
    ORIGINAL,
    verdict="Profiled; nothing was tried.",
    trials=(),
    policy=None,
    tier=None,
    objective=None,
    budget_s=None,
    seconds=None,
)
IDLE = replace(
    ORIGINAL,
    verdict="kept the original, but 2 of 3 candidates could not be tried: no compiler (shrink); out of memory (shrink)",
    doubt="2 of 3 candidates could not be tried",
    trials=(
        Trial(Shrink(), "smaller weights", "decode", TrialOutcome.BLOCKED, "no compiler", 3.1),
        Trial(Shrink(bits=3), "smaller weights", "decode", TrialOutcome.ERROR, "out of memory", 3.6, seconds=4.0),
        *TRIALS[1:],
    ),
)
REPORTS = pytest.mark.parametrize(
    "report",
    [report_of(each) for each in (ORIGINAL, COMMITTED, PROFILED, IDLE)],
    ids=["original", "committed", "profiled", "idle"],
)

PHASE_KEYS = {
    "bottleneck",
    "evidence",
    "ceiling",
    "baseline_ms",
    "final_ms",
    "speedup",
    "speedup_low",
    "speedup_high",
    "roofline_share",
}


def test_callers_at_once_are_shown():
    text = report_of(COMMITTED).to_markdown()
    assert "Callers are decoded together: 4 callers get 2.00x" in text
    assert (
        "While a prompt of 1500 tokens arrives, the longest time between two tokens of a running answer is 62.4 ms"
        in text
    )
    assert "One at a time, they get 50.0 tokens per second." in text
    assert "| 4 | 100 | 2.00x | 1.80x to 2.20x | 300 | 22.0 |" in text
    found = report_of(COMMITTED).to_dict()["callers"]
    assert (found["accepted"], found["rows"], found["gap_ms"]) == (True, 4, pytest.approx(62.4))
    assert (found["points"][0]["ratio"], found["points"][1]["tpot_ms"]) == (1.0, pytest.approx(22.0))
    refused = replace(COMMITTED, sharing=Sharing("callers are served one at a time: it needs a recorded decode step"))
    assert "it needs a recorded decode step" in report_of(refused).to_markdown()
    assert "Callers at once" not in report_of(replace(COMMITTED, sharing=None)).to_markdown()


@pytest.mark.parametrize(("high", "shown"), [(3e-6, "<= 3e-06"), (0.002, "<= 0.0020"), (math.nan, "")])
def test_a_bound_is_shown_however_small_it_is(high: float, shown: str) -> None:
    tight = replace(COMMITTED, quality=replace(PASSED, mean_kld_high=high))
    shown_quality = quality(report_of(tight).to_dict())
    assert shown_quality is not None
    assert shown_quality.table is not None
    assert shown_quality.table.rows[0][2] == shown


@REPORTS
def test_record_has_the_promised_names(report):
    record = report.to_dict()
    assert set(record["phases"]) == {"prefill", "decode"}
    assert all(set(figures) == PHASE_KEYS for figures in record["phases"].values())
    assert set(record["quality"]) == {"tier", "mean_kld", "p99_kld", "same_top", "ppl_ratio", "verdict"}
    for trial in record["trials"]:
        assert {"transform", "phase", "params", "predicted", "speedup", "outcome", "reason", "seconds"} <= set(trial)
    assert {"operators", "batch_scaling", "hardware", "bypassed", "schema", "memory", "break_even_tokens"} <= set(
        record
    )


@REPORTS
def test_json_keeps_everything_and_has_no_nan(report):
    assert json.loads(report.to_json()) == report.to_dict()
    assert "NaN" not in report.to_json()


def test_paired_timing_outranks_the_profiles():
    decode = CALLED.to_dict()["phases"]["decode"]
    assert decode["baseline_ms"] == pytest.approx(32.0)
    assert decode["final_ms"] == pytest.approx(12.8)
    assert (decode["speedup"], decode["speedup_low"], decode["speedup_high"]) == (2.5, 2.4, 2.6)


def test_requests_of_several_sizes_are_not_thrown_together():
    sizes = {
        "b1/p64/n8": BucketTimes({}, {"tpot": (0.010,) * 5}, {"tpot": (0.005,) * 5}),
        "b8/p64/n8": BucketTimes({}, {"tpot": (0.040,) * 5}, {"tpot": (0.030,) * 5}),
    }
    assert COMMITTED.latency is not None
    timed = report_of(replace(COMMITTED, latency=replace(COMMITTED.latency, buckets=sizes)))
    decode = timed.to_dict()["phases"]["decode"]
    assert (decode["baseline_ms"], decode["final_ms"]) == pytest.approx((10.0, 5.0))


def test_without_paired_timing_there_is_no_interval():
    decode = report_of(replace(COMMITTED, latency=None)).to_dict()["phases"]["decode"]
    assert decode["speedup"] == pytest.approx(32 / 13)
    assert decode["speedup_low"] is None


def test_the_original_is_exactly_as_fast_as_itself():
    decode = report_of(ORIGINAL).to_dict()["phases"]["decode"]
    assert decode["final_ms"] == decode["baseline_ms"]
    assert decode["speedup"] == decode["speedup_low"] == decode["speedup_high"] == 1.0


def test_operators_are_paired_by_group():
    assert COMMITTED.after is not None
    changed = replace(
        COMMITTED.after,
        phases={
            **COMMITTED.after.phases,
            "decode": phase_profile("decode", 0.013, [("FFN", 0.01, "memory"), ("lm_head", 0.003, "memory")]),
        },
    )
    rows = {row["group"]: row for row in report_of(replace(COMMITTED, after=changed)).to_dict()["operators"]["decode"]}
    assert rows["FFN"]["before_ms"] == pytest.approx(11.2)
    assert rows["FFN"]["after_ms"] == pytest.approx(10.0)
    assert rows["attention"]["after_ms"] == 0.0
    assert rows["lm_head"]["before_ms"] == 0.0
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("report", "said", "unsaid"),
    [
        (
            CALLED,
            [
                "2.50x",
                "2.40-2.60x",
                "Committed shrink(bits=8)@decode.",
                "31.2",
                "mean KLD 1.21, at most 0.0050",
                "prefill is compute-bound",
                "Now decode moves 135 MB at 20 GB/s: memory-bound.",
                "beam search",
                "Example CPU",
                "2026-11-22",
                "12,345 generated",
                "IQR is 12 %",
                "2 min 5 s",
                "97.5 %",
                "-59 %",
                "needs",
                "The original is kept beside the plan",
            ],
            ["nan"],
        ),
        (
            report_of(ORIGINAL),
            ["Kept the original", "mean KLD 1.21, at most 0.0050", "2.50x", "skipped", "unavailable"],
            ["after ms", "went to the original", "nan", "Applied", "Could not be tried", "not kept as a plan"],
        ),
        (
            report_of(IDLE),
            [
                "Kept the original, but 2 of 3 candidates could not be tried: no compiler (shrink)",
                "This outcome is not kept as a plan, and the next run searches anew: 2 of 3 candidates could not be",
                "Could not be tried",
                "3.10x",
                "blocked: no compiler",
                "error: out of memory",
                "0 of 1 candidates accepted",
            ],
            ["nan", "Applied"],
        ),
        (
            report_of(PROFILED),
            ["Decode moves 538 MB a token at 10.0 GB/s: overhead-bound.", "attention", "45 %", "batch"],
            ["Tried", "speed-up", "after ms", "nan"],
        ),
        (
            CALLED.without_original(148_500_000),
            [
                "Without the original the weights take 0.28x of its bytes.",
                "148 MB",
                "the plan's layers one by one",
            ],
            ["The original is kept", "went to the original"],
        ),
        (
            CALLED.without_original(148_500_000),
            ["Without the original the weights take 0.28x of its bytes.", "148 MB"],
            ["The original is kept"],
        ),
    ],
    ids=["committed", "original", "idle", "profiled", "released", "released, read back"],
)
def test_every_form_says_what_matters(report, said, unsaid):
    out = io.StringIO()
    report.to_terminal(Console(file=out, width=400))
    flat = report.to_markdown().replace("\\", "")
    for text in (out.getvalue(), flat):
        assert [s for s in said if s not in text] == []
        assert [s for s in unsaid if s in text] == []


@REPORTS
def test_markdown_tables_are_rectangular(report):
    blocks = [b for b in report.to_markdown().split("\n\n") if b.startswith("|")]
    assert blocks
    for block in blocks:
        widths = {line.replace("\\|", "").count("|") for line in block.splitlines()}
        assert len(widths) == 1, block


@REPORTS
def test_plain_text_fits_and_has_no_escapes(report):
    assert "\x1b" not in str(report)
    assert max(len(line) for line in str(report).splitlines()) <= 120


def test_a_long_name_leaves_room_for_the_reason():
    layers = "layers.0.self_attn,down_proj,gate_proj,k_proj,o_proj,v_proj,up_proj,embed_tokens"
    findings = replace(ORIGINAL, trials=(replace(TRIALS[1], transform=Named(name_of=layers)),))
    text = str(report_of(findings))
    assert "mean KLD 1.21" in text


@REPORTS
def test_a_recorded_report_shows_the_same(report):
    recorded = Report(json.loads(report.to_json()))
    assert recorded.to_markdown() == report.to_markdown()
    assert str(recorded) == str(report)


def test_the_verdict_comes_first_and_what_could_not_be_tried_is_listed_before_what_was():
    text = report_of(IDLE).to_markdown()
    marks = ["Kept the original, but 2 of 3", "## Diagnosis", "## Could not be tried", "## Tried", "## Ruled out"]
    assert sorted(marks, key=text.index) == marks
    page = report_of(IDLE).to_html()
    assert "2 of 3 candidates that were called for could not be tried." in page
    assert page.index("Kept the original, but 2 of 3") < page.index("not kept as a plan") < page.index("no compiler</")


def test_a_replay_shows_the_figures_of_today():
    today = replace(FASTER, tpot=Speedup(3.0, 2.8, 3.2, 9))
    doubt = replace(PASSED, verdict=Verdict.INCONCLUSIVE, reason="need 1 more prompt", tokens=160)
    recorded = reverified(CALLED, verdict="Replayed.", seconds=12.0, latency=today, quality=doubt).with_calls(
        7, {"beam search": 1}
    )
    record = recorded.to_dict()
    assert record["phases"]["decode"]["speedup"] == 3.0
    assert record["trials"] == CALLED.to_dict()["trials"]
    assert (record["served"], record["bypassed"]) == (7, {"beam search": 1})
    assert "verified again in 12 s" in str(recorded)
    assert record["quality"]["verdict"] == "pass"
    assert "inconclusive. Need 1 more prompt." in str(recorded)
    assert CALLED.to_dict()["phases"]["decode"]["speedup"] == 2.5


BUSY = "This machine was busy: 23 % of the CPU time went elsewhere."

# what the record holds, and what a replay measured -> whether the first lines say that the machine was busy
ELSEWHERE = [(None, None, False), (0.04, None, False), (0.234, None, True), (0.0, 0.234, True), (0.234, 0.0, False)]


@pytest.mark.parametrize(("tuning", "replay", "said"), ELSEWHERE)
def test_the_first_lines_say_that_the_machine_was_busy(tuning: float | None, replay: float | None, said: bool):
    shown = report_of(replace(COMMITTED, elsewhere=tuning))
    assert shown.to_dict()["elsewhere"] == tuning
    if replay is not None:
        shown = reverified(shown, verdict="Replayed.", seconds=12.0, elsewhere=replay)
        assert shown.to_dict()["replayed"]["elsewhere"] == replay
    story = result(shown.to_dict()).sentences
    assert (BUSY in story[:2]) == said
    assert (BUSY in " ".join(str(shown).split())) == said


def test_a_record_of_before_says_nothing_of_others():
    record = CALLED.to_dict()
    del record["elsewhere"], record["hardware"]["disturbed"]
    assert str(read(record)) == str(CALLED)


def test_peaks_that_others_disturbed_are_shown_as_such():
    said = "measured beside others' work, perhaps too low"
    disturbed = replace(COMMITTED, hardware=replace(HARDWARE, disturbed=True))
    assert said in " ".join(str(report_of(disturbed)).split())
    assert said not in " ".join(str(CALLED).split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (n.milliseconds(123.456), "123"),
        (n.milliseconds(9.876), "9.88"),
        (n.milliseconds(0.01234), "0.0123"),
        (n.milliseconds(1234.5), "1234"),
        (n.milliseconds(0.0), "0"),
        (n.milliseconds(NAN), "-"),
        (n.duration(0.42), "0.4 s"),
        (n.duration(42.4), "42 s"),
        (n.duration(300), "5 min"),
        (n.duration(310), "5 min 10 s"),
        (n.duration(3720), "1 h 2 min"),
        (n.scaled(538e6, "B"), "538 MB"),
        (n.scaled(34.04e9, "B/s"), "34.0 GB/s"),
        (n.count(134_515_008), "135 M"),
        (n.count(7.24e9), "7.24 B"),
        (n.count(12), "12"),
        (n.ratio(2.514), "2.51x"),
        (n.ratio(12.51), "12.5x"),
        (n.ratio(None), "-"),
        (n.interval(2.4, 2.6), "2.40-2.60x"),
        (n.interval(None, 2.6), ""),
        (n.percent(0.975, 1), "97.5 %"),
        (n.change(8.2, 4.1), "-50 %"),
        (n.change(1.0, 1.1), "+10 %"),
        (n.change(0.0, 1.0), "-"),
        (n.divergence(0.00168), "0.0017"),
        (n.divergence(1.21), "1.2"),
        (n.divergence(2.5e-7), "2e-07"),
    ],
)
def test_numbers(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("weight_only(bits=8)", "weight_only(bits=8)"),
        ("_emphasis_", r"\_emphasis\_"),
        ("a | b * c `d`", r"a \| b \* c \`d\`"),
        ("<= 5 <script>", r"<= 5 \<script>"),
        ("two\nlines", "two lines"),
        ("back\\slash", r"back\\slash"),
    ],
)
def test_markdown_takes_no_text_for_markup(text, escaped):
    assert escape(text) == escaped


def test_what_each_transform_contributes_is_shown_and_why_where_it_was_not_measured() -> None:
    found = (
        Contribution(Shrink(), "decode", FASTER),
        Contribution(Shrink(phase="prefill"), "prefill", None, "the others need it: no weights"),
    )
    record = report_of(replace(COMMITTED, contributions=found)).to_dict()
    section, own, whole = contributions(record), FASTER.tpot, FASTER.end_to_end
    assert section is not None
    assert section.table is not None
    name, figures = str(Shrink()), (n.ratio(own.ratio), n.interval(own.low, own.high), n.ratio(whole.ratio))
    assert section.table.rows == (
        (name, "decode", *figures, ""),
        (str(Shrink(phase="prefill")), "prefill", "", "", "", "the others need it: no weights"),
    )
    assert contributions(CALLED.to_dict()) is None
    assert contributions({key: value for key, value in record.items() if key != "contributions"}) is None


def test_a_step_that_was_not_called_for_takes_one_line() -> None:
    def trial(candidate: str, step: str, outcome: str, reason: str, predicted: float | None = None) -> dict[str, Any]:
        return {"candidate": candidate, "step": step, "outcome": outcome, "reason": reason, "predicted": predicted}

    record = {
        "trials": [
            trial("a", "graphs", "skipped", "only for cuda; this machine has cpu"),
            trial("b", "graphs", "skipped", "only for cuda; this machine has cpu"),
            trial("c", "weights", "skipped", "only for cuda; this machine has cpu"),
            trial("d", "weights", "skipped", "the roofline allows 1.00x", 1.0),
            trial("e", "weights", "skipped", "the roofline allows 1.00x", 1.0),
            trial("f", "weights", "unavailable", "no compiler"),
        ]
    }
    section = not_tried(record)
    assert section is not None
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == ["graphs (2 candidates)", "c", "d", "e", "f"]
