"""How long OpenMP's threads spin: said before torch is imported, and only there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autotune.machine import spinning


def told(code: str, **environment: str) -> tuple[str, str]:
    """What OpenMP says that it read, and what a process's children would find, after some code."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import os; print(os.environ.get('{spinning.VARIABLE}'))"],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    spins = [line.split("'")[1] for line in done.stderr.splitlines() if spinning.VARIABLE in line]
    if not spins:
        pytest.skip("torch does not compute with GCC's OpenMP here")
    return spins[-1], done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "environment", "spins", "left"),
    [
        ("import autotune", {}, f"{spinning.SPINS}", "None"),
        ("import torch, autotune", {}, "300000", "None"),
        ("import autotune", {"GOMP_SPINCOUNT": "77"}, "77", "77"),
        ("import autotune", {"OMP_WAIT_POLICY": "active"}, "30000000000", "None"),
    ],
    ids=["said", "too late", "a number of the user's", "a policy of the user's"],
)
def test_threads_spin_for_a_short_time_unless_the_environment_says_otherwise(
    code: str, environment: dict[str, str], spins: str, left: str
) -> None:
    assert told(code, **environment) == (spins, left)
