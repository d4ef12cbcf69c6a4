"""How the answers of this process went, as statistics by guardrail."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...compare.experiment import guardrails
from ...compare.experiment.guardrails import Figures
from .decision import FAILURES, TPOT, TTFT, CanaryRules

if TYPE_CHECKING:
    from ..answering import Answered

ANSWERED, FAILED = ("stop", "length"), ("error", "deadline")  # other outcomes are the client's doing, or the queue's


class AnswerTally:
    """Statistics of the answers that were asked for since `begin`. Any thread may call.

    Args:
        rules: name the guardrails.
        clock: the clock of `Answered.began_s`.
    """

    def __init__(self, rules: CanaryRules, clock: Callable[[], float] = time.monotonic) -> None:
        self._rails = {rail.name: rail for rail in rules.rails}
        self._clock = clock
        self._lock = threading.Lock()
        self._since_s = math.inf  # before `begin`, nothing counts
        self._figures: Figures = {}

    def begin(self) -> None:
        """Forget everything, and count the answers that are asked for from now on."""
        with self._lock:
            self._since_s, self._figures = self._clock(), {}

    def end(self) -> None:
        """Count nothing until `begin`."""
        with self._lock:
            self._since_s = math.inf

    def hear(self, answered: Answered) -> None:
        """Count an answer."""
        if answered.outcome not in (*ANSWERED, *FAILED):
            return
        raw = {FAILURES: answered.outcome in FAILED, TTFT: answered.ttft_s, TPOT: answered.tpot_s}
        values = {name: self._rails[name].scale(value) for name, value in raw.items()}
        with self._lock:
            if answered.began_s >= self._since_s:
                self._figures = guardrails.add(self._figures, values)

    @property
    def figures(self) -> Figures:
        """The statistics so far, by guardrail."""
        return self._figures
