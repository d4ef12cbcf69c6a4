"""The proof of the gates: its rates, its tables, and a small part of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prove import clocks, faults, plan, quality
from benchmarks.prove.__main__ import main
from benchmarks.prove.corruptions import CORRUPTIONS
from benchmarks.prove.machines import MACHINES
from benchmarks.prove.quality import Case
from benchmarks.prove.rates import Rate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [  # Clopper and Pearson's tables
        (0, 500, 0.0, 0.0074),
        (5, 500, 0.0033, 0.0232),
        (10, 10, 0.6915, 1.0),
        (0, 10, 0.0, 0.3085),
        (5, 10, 0.1871, 0.8129),
    ],
)
def test_exact_intervals(count: int, total: int, low: float, high: float) -> None:
    rate = Rate(count, total)
    assert (rate.low, rate.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_names_are_unique_and_faults_are_known() -> None:
    assert len({c.name for c in CORRUPTIONS}) == len(CORRUPTIONS)
    assert {c.fault for c in CORRUPTIONS} <= set(faults.FAULTS)
    assert set(plan.ON_A_REAL_MODEL) <= {c.name for c in CORRUPTIONS}
    assert set(faults.CAVEATS) <= set(faults.FAULTS)
    numbers = [int(number[1:]) for number in faults.FAULTS]
    assert numbers == list(range(1, 79))


@pytest.mark.parametrize(("limit_s", "answered"), [(None, 3), (0.0, 0)])
def test_a_limit_of_time_holds_for_one_worker(limit_s: float | None, answered: int) -> None:
    answers = plan.run([plan.Job(("a",), lambda: [1], ())] * 3, 1, limit_s)
    assert (len(answers.by_group["a",]), answers.left_out) == (answered, 3 - answered)


def case(effect: float, verdict: str) -> Case:
    return Case("llama", "made up", "A8", "strict", effect, 0.005, verdict, "")


@pytest.mark.parametrize(
    ("cases", "share", "missed"),
    [
        ([case(0.1, "fail"), case(0.1, "error")], 1.0, 0),
        ([case(0.1, "fail"), case(0.1, "pass")], 0.5, 1),
        ([case(0.1, "fail"), case(0.1, "inconclusive")], 0.5, 1),  # not committed, but not caught either
        ([case(0.1, "fail"), case(0.004, "pass")], 1.0, 0),  # within the limit: nothing to catch
    ],
)
def test_only_what_is_over_the_limit_has_to_be_caught(cases: list[Case], share: float, missed: int) -> None:
    answers: dict[tuple[str, ...], Any] = {("quality",): cases}
    figures = {figure.name: figure for figure in plan.figures(answers)}
    assert figures["corruptions caught at tier strict"].value == share
    assert len(plan.misses(answers)) == missed


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        ({}, "not covered"),
        ({"A4": {"tests/test_a.py::test_x": "skipped"}}, "not covered"),
        ({"A4": {"tests/test_a.py::test_x": "passed"}}, "passed"),
        ({"A4": {"tests/test_a.py::test_x": "passed", "tests/test_b.py::test_y": "failed"}}, "failed"),
    ],
)
def test_a_row_for_every_fault(found: dict[str, dict[str, str]], outcome: str) -> None:
    rows = {row.number: row for row in faults.table(found)}
    assert len(rows) == 78
    assert rows["A4"].outcome == outcome


@pytest.mark.parametrize("machine", MACHINES)
def test_a_few_seeds_of_every_machine(machine: str) -> None:
    assert clocks.summarise_commits(clocks.false_commits(machine, range(10))).count <= 1
    assert abs(clocks.bias(clocks.estimates(machine, 1.05, range(9)), 1.05)) < 0.05


@pytest.mark.slow
def test_a_large_corruption_counts_and_is_caught_where_a_small_one_does_not_count() -> None:
    cases = quality.examine_tiny("llama", ["NaN on one token", "padding attended to", "zeroed head"], batches=2)
    tiers = {
        name: {c.tier for c in cases if c.corruption == name and c.counts} for name in {c.corruption for c in cases}
    }
    assert tiers["NaN on one token"] == {"lossless", "strict", "relaxed", "aggressive"}
    assert "aggressive" not in tiers.get("padding attended to", set())
    assert all(c.caught for c in cases if c.counts)


@pytest.mark.slow
def test_whole_models_are_not_called_damaged() -> None:
    assert {verdict for _, verdict, _ in quality.false_alarms("llama", [0])} == {"pass"}


def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [job for job in plan.latency_jobs(clocks.Sizes(4, 0, 4, 4)) if job.group[-1] in ("steady", "1.050")]
    monkeypatch.setattr(plan, "jobs", lambda model, quick: chosen)
    main(["--quick", "--no-model", "--workers", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "prove.json").read_text())
    assert written["command"].endswith(f"--out {tmp_path}")
    assert "| false commits, steady | 0.0% (0 of 4" in capsys.readouterr().out
    assert {"created", "hardware", "figures", "cases", "faults", "misses", "alarms"} <= set(written)
