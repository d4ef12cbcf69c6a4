"""Imports torch so that its threads wait for each other actively for a short time only.

GCC's OpenMP, which torch computes with, has a thread spin for some milliseconds where it waits for another one. If
another process has a core, two threads may share one: each then spins through its time slice while the other could
work, and a forward takes 10 to 20 times as long. A short wait covers the gaps between a model's operators just as well.
OpenMP reads this once, when torch is imported. So it is said before; an environment that says something itself is left
alone, and what was said is taken back afterwards, because child processes are none of our business.
"""

from __future__ import annotations

import os
import sys

VARIABLE, OTHERS = "GOMP_SPINCOUNT", ("OMP_WAIT_POLICY",)
SPINS = 3000  # some 20 us; the default is 300,000


def is_free() -> bool:
    """Whether nobody has said how threads wait, and OpenMP has not read it."""
    return "torch" not in sys.modules and not any(name in os.environ for name in (VARIABLE, *OTHERS))


if is_free():
    os.environ[VARIABLE] = str(SPINS)
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[VARIABLE]
