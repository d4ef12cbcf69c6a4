"""pytest plugin: a fixture that checks a live model against a recorded baseline; see `autotune.compare.check`.

    def test_quality(autotune_check):
        autotune_check(my_model, tokenizer=my_tokenizer)

    pytest --autotune-baseline baseline/ --autotune-tier strict

It is a package of its own because pytest loads its plugins in every run: importing anything of autotune imports torch,
and this does so only once a test asks for the fixture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from autotune.compare.check import CheckResult

TIERS = ("lossless", "strict", "relaxed", "aggressive")  # spelled out: pytest starts without importing autotune
WHEN_INCONCLUSIVE = ("skip", "fail", "pass")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("autotune", "quality-regression checks of language models")
    group.addoption("--autotune-baseline", metavar="DIR", help="what `autotune check record` wrote")
    group.addoption("--autotune-tier", choices=TIERS, help="quality tier; default strict")
    group.addoption(
        "--autotune-max-slowdown", type=float, metavar="SHARE", help="compare latency, too, with this limit, not 0.05"
    )
    group.addoption("--autotune-latency", action="store_true", default=None, help="compare latency, too")
    group.addoption("--autotune-inconclusive", choices=WHEN_INCONCLUSIVE, help="what then; default skip")
    group.addoption("--autotune-junit", metavar="FILE", help="write the latest check's metrics as JUnit XML")
    for name, what in (("baseline", "folder"), ("tier", "tier"), ("inconclusive", "skip, fail or pass")):
        parser.addini(f"autotune_{name}", f"{what}, unless --autotune-{name} is given", default="")


@pytest.fixture
def autotune_check(request: pytest.FixtureRequest) -> Callable[..., CheckResult]:
    """Checks a live model against the baseline: `autotune_check(model, tokenizer=..., ...)`.

    Arguments are those of `autotune.compare.check.run` and take precedence over the command line. Latency is compared
    if --autotune-latency, a limit (`max_slowdown`) or the recorded model (`against`) is given. A regression fails
    the test with the reason and where it is, an inconclusive check skips it unless told otherwise, and one that could
    not be made is an error. A baseline on the command line is relative to where pytest was called, one in a
    configuration file to that file.
    """
    config = request.config

    def check(model: Any, baseline: Any = None, **options: Any) -> CheckResult:
        __tracebackhide__ = True
        from autotune.compare.check import run

        when_inconclusive = _setting(config, "inconclusive") or "skip"
        if when_inconclusive not in WHEN_INCONCLUSIVE:
            raise pytest.UsageError(
                f"autotune_inconclusive is {when_inconclusive!r}; one of {', '.join(WHEN_INCONCLUSIVE)} was expected"
            )
        options.setdefault("tier", _setting(config, "tier") or "strict")
        if (limit := config.getoption("autotune_max_slowdown")) is not None:
            options.setdefault("max_slowdown", limit)
        asked = any(options.get(name) is not None for name in ("max_slowdown", "against"))
        options.setdefault("measure_latency", asked or bool(config.getoption("autotune_latency")))
        result = run(model, _baseline(config) if baseline is None else baseline, **options)
        if file := config.getoption("autotune_junit"):
            Path(file).write_text(result.to_junit(), encoding="utf-8")
        _conclude(result, when_inconclusive)
        return result

    return check


def _conclude(result: CheckResult, when_inconclusive: str) -> None:
    __tracebackhide__ = True
    said = f"autotune check: {result.reason}"
    match result.verdict.value:
        case "fail":
            pytest.fail(f"{said}\n\n{result.to_markdown()}", pytrace=False)
        case "error":
            from autotune.errors import MeasurementError

            raise MeasurementError(said)
        case "inconclusive" if when_inconclusive == "fail":
            pytest.fail(f"inconclusive: {said}", pytrace=False)
        case "inconclusive" if when_inconclusive == "skip":
            pytest.skip(f"inconclusive: {said}")


def _setting(config: pytest.Config, name: str) -> str:
    return str(config.getoption(f"autotune_{name}") or config.getini(f"autotune_{name}"))


def _baseline(config: pytest.Config) -> Path:
    if given := config.getoption("autotune_baseline"):
        return Path(config.invocation_params.dir, given)
    if kept := config.getini("autotune_baseline"):
        return Path(config.inipath.parent if config.inipath else config.rootpath, kept)
    raise pytest.UsageError(
        "there is no baseline: give --autotune-baseline DIR, autotune_baseline in the configuration file, or "
        "autotune_check(model, baseline)"
    )
