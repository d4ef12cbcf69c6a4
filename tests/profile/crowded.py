"""Live requests that measured steps have to wait for, on a clock that the test reads."""

from __future__ import annotations

from typing import Any

import torch

from autotune.runtime.traffic import Traffic


class Crowded(Traffic):
    """Before each measured step, a live request computes `torch.eye` and takes a scripted time.

    Args:
        waits_s: seconds that the steps wait, in turn; later steps do not wait.
        tick_s: seconds that pass with each reading of the clock.
    """

    def __init__(self, *waits_s: float, tick_s: float = 1.0) -> None:
        super().__init__()
        self.waits_s = list(waits_s)
        self.tick_s = tick_s
        self.now_s = 0.0

    def read(self) -> float:
        """Stand in for time.perf_counter."""
        self.now_s += self.tick_s
        return self.now_s

    def _enter(self, *how: Any) -> Any:
        if self.waits_s:
            torch.eye(3)
            self.now_s += self.waits_s.pop(0)
        return super()._enter(*how)
