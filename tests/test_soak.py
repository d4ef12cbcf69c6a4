"""A short soak of each kind: it passes, and the two ways in which it must not pass are noticed."""

from __future__ import annotations

import pytest

from autotune.runtime import kernels
from tests.soak import Soak

pytestmark = [
    pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available())),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize(("callers", "seconds"), [(6, 6.0), pytest.param(32, 20.0, marks=pytest.mark.slow)])
def test_every_answer_is_right_whatever_happens(callers: int, seconds: float) -> None:
    soak = Soak(callers)
    soak.run(seconds)
    assert soak.wrong == []
    assert soak.counts["stream"] > 0
    assert soak.counts["generate"] > 0
    assert sum(count for kind, count in soak.counts.items() if kind.startswith("fault")) > 0
    assert soak.model.autotune.status.served > 0


def test_wrong_answers_are_noticed() -> None:
    soak = Soak(4, spoil="answers")
    assert not soak.run(2.0)
    assert soak.wrong


@pytest.mark.slow
def test_a_leak_is_noticed() -> None:
    soak = Soak(2, spoil="leak")
    assert not soak.run(6.0)
    assert soak.wrong == []
    assert soak.growth() > 0
