"""The pytest plugin, run by pytest's own tester in a process that has torch already."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.compare.check.conftest import subject

pytest_plugins = ["pytester"]

SUITE = """
from tests.compare.check.conftest import subject

def test_quality(autotune_check):
    model = subject()
    {change}
    autotune_check(model{options})
"""
UNRECORDED = "*BaselineError: latency cannot be checked, because it was not recorded*"
BROKEN = "model.lm_head.weight.data.mul_(1.5)"


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    return pytester


@pytest.mark.parametrize(
    ("change", "options", "arguments", "outcome", "said"),
    [
        ("", "", [], "passed", ""),
        (BROKEN, "", [], "failed", "*autotune check: quality: *over*model.*"),
        (BROKEN, "", ["--autotune-tier", "aggressive"], "failed", "*over * of tier aggressive*"),
        ("", ", tuning_prompts={leaked}", [], "skipped", ""),
        ("", ", tuning_prompts={leaked}", ["--autotune-inconclusive", "fail"], "failed", "*were tuned on*"),
        ("", ", tuning_prompts={leaked}", ["--autotune-inconclusive", "pass"], "passed", ""),
        (
            "model.model.norm.forward = lambda states: 1 / 0",
            "",
            [],
            "failed",
            "*MeasurementError: autotune check: quality*",
        ),
        ("", ", baseline='nowhere'", [], "failed", "*nowhere is not a baseline*"),
        ("", ", max_slowdown=0.02", [], "failed", UNRECORDED),
        ("", "", ["--autotune-max-slowdown", "0.01"], "failed", UNRECORDED),
        ("", "", ["--autotune-latency"], "failed", UNRECORDED),
        ("", ", measure_latency=False", ["--autotune-latency", "--autotune-max-slowdown", "0.01"], "passed", ""),
        ("", ", against=subject(seed=3)", [], "failed", "*to measure against is not the one recorded*"),
        ("", ", against=None", [], "passed", ""),
    ],
)
def test_a_check_inside_a_suite(suite, folder, baseline, change, options, arguments, outcome, said):
    leaked = [list(baseline.questions.prompts[0])]
    suite.makepyfile(SUITE.format(change=change or "pass", options=options.format(leaked=leaked)))
    result = suite.runpytest_inprocess("--autotune-baseline", folder, "-p", "no:cacheprovider", *arguments)
    result.assert_outcomes(**{outcome: 1})
    if said:
        result.stdout.fnmatch_lines([said])


def test_a_configuration_file_names_the_baseline_and_junit_is_written(suite, folder):
    suite.makeini(f"[pytest]\nautotune_baseline = {folder}\nautotune_tier = lossless\n")
    suite.makepyfile(SUITE.format(change="pass", options=""))
    suite.runpytest_inprocess("--autotune-junit", "metrics.xml", "-p", "no:cacheprovider").assert_outcomes(passed=1)
    cases = Xml.parse(suite.path / "metrics.xml").getroot().iter("testcase")
    assert "autotune.lossless" in {case.get("classname") for case in cases}


def test_a_misspelt_setting_is_refused(suite, folder):
    suite.makeini(f"[pytest]\nautotune_baseline = {folder}\nautotune_inconclusive = Fail\n")
    suite.makepyfile(SUITE.format(change="pass", options=""))
    result = suite.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*autotune_inconclusive is 'Fail'; one of skip, fail, pass was expected*"])


def test_without_a_baseline_it_says_how_to_name_one(suite):
    suite.makepyfile(SUITE.format(change="pass", options=""))
    result = suite.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*give --autotune-baseline DIR*"])


def test_loading_it_imports_neither_torch_nor_autotune():
    code = "import sys, autotune_pytest; print([m for m in ('torch', 'numpy', 'autotune') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_subject_is_the_recorded_model(baseline):
    from autotune.tune.fingerprint import of_model

    assert of_model(subject()) == baseline.subject.fingerprint
