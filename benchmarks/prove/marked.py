"""A pytest plugin: which faults a run's tests inject (`@pytest.mark.fault("A4")`), and how they ended."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

FILE = "AUTOTUNE_FAULTS_FILE"
_found: dict[str, dict[str, str]] = {}  # fault -> test -> outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        for mark in item.iter_markers("fault"):
            for fault in mark.args:
                _found.setdefault(fault, {})[item.nodeid] = report.outcome
    return report


def pytest_sessionfinish() -> None:
    if where := os.environ.get(FILE):
        Path(where).write_text(json.dumps(_found))
