"""Idle workers of a thread end, and start again when they are needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from autotune.machine import intraop


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif(intraop._pause() is None, reason="torch's OpenMP has no function for it")
def test_rest_ends_the_workers_until_they_are_needed() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        work = torch.ones(1 << 20)
        expected = work.sum()
        busy = threads()
        intraop.rest()
        assert threads() <= busy - 2
        assert torch.equal(work.sum(), expected)
        assert torch.get_num_threads() == 3
        assert threads() >= busy
    finally:
        intraop.rest()
        torch.set_num_threads(before)


def test_without_such_a_function_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intraop, "_pause", lambda: None)
    intraop.rest()
