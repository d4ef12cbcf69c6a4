"""Results as JSON, Markdown and JUnit XML."""

from __future__ import annotations

import json
from xml.etree import ElementTree as Xml

import pytest

from autotune.compare.check.layers import Shift
from autotune.compare.check.localise import Localised, PromptShift
from autotune.compare.check.result import CheckResult, Metric
from autotune.compare.check.tasks import Flips
from autotune.compare.check.values import EXIT_CODES
from autotune.validate import Quality, Verdict

NASTY = "<b>&\"'| `x` \x00\x1b[31m\ud800 \ufffe end"
QUALITY = Quality("strict", Verdict.FAIL, "because")


def result(*verdicts: Verdict) -> CheckResult:
    metrics = tuple(Metric(f"m{k} {NASTY}", verdict, NASTY) for k, verdict in enumerate(verdicts))
    where = Localised(
        NASTY, "layers.1", (Shift("layers.0", 0.0), Shift("layers.1", float("inf"))), (PromptShift(0, 1.0, 9, NASTY),),
        None, (),
    )  # fmt: skip
    flips = {"tasks": Flips(("1", "2"), (), 9, 0.25, Verdict.INCONCLUSIVE, "few")}
    return CheckResult(metrics, QUALITY, "strict", NASTY, "then", where, flips, {}, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        ((Verdict.PASS,), Verdict.PASS, 0),
        ((Verdict.PASS, Verdict.INCONCLUSIVE), Verdict.INCONCLUSIVE, 2),
        ((Verdict.INCONCLUSIVE, Verdict.ERROR), Verdict.ERROR, 3),
        ((Verdict.ERROR, Verdict.FAIL, Verdict.INCONCLUSIVE), Verdict.FAIL, 1),
        ((), Verdict.INCONCLUSIVE, 2),
    ],
)
def test_the_gravest_metric_decides(verdicts, verdict, code):
    found = result(*verdicts)
    assert (found.verdict, found.exit_code) == (verdict, code)


def test_every_verdict_has_its_exit_code():
    assert sorted(EXIT_CODES.values()) == [0, 1, 2, 3]
    assert set(EXIT_CODES) == set(Verdict)


def test_junit_has_a_case_for_each_metric_and_is_well_formed():
    found = result(*Verdict)
    suite = Xml.fromstring(found.to_junit().encode()).find("testsuite")
    cases = suite.findall("testcase")
    assert [len(case) for case in cases] == [0, 1, 1, 1]
    assert [case[0].tag for case in cases[1:]] == ["failure", "skipped", "error"]
    assert cases[1][0].get("message").startswith("<b>&\"'| `x` \ufffd\ufffd[31m\ufffd \ufffd end")
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "1", "errors": "1", "skipped": "1"}


def test_markdown_is_a_table_that_nothing_breaks_out_of():
    text = result(*Verdict).to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("| m")]
    assert len(rows) == 5  # four metrics and the heading
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert "<b>" not in text.replace("\\<b>", "")
    assert "layers.1 | infinite" in text
    assert "Lost (2): 1, 2" in text


def test_json_is_strict_and_whole():
    data = json.loads(result(*Verdict).to_json(), parse_constant=pytest.fail)
    assert data["verdict"] == "fail"
    assert data["exit_code"] == 1
    assert data["metrics"][0]["value"] is None
    assert data["localised"]["first_layer"] == "layers.1"
    assert data["flips"]["tasks"]["lost"] == ["1", "2"]
