"""Times all arms side by side, in rounds that are saved as they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ...errors import MeasurementError
from ...validate.latency import EARLY_LOOKS, STEADY, WARMUP_SHARE, warm_up
from ...validate.latency import Arm as Timer
from ...validate.score import CandidateError
from ...validate.timing import Clock, Pair, Timing
from ...workload import Bucket
from .given import CONTROL
from .store import Observation, Store, Version
from .verdicts import Terms, is_settled

KIND = "latency"


@dataclass
class Rounds:
    """The timings of an experiment, from earlier runs and from this one.

    Args:
        store, version: where the timings are saved.
        timers: arm name -> function that times its n-th request of a bucket; the control's first.
        buckets: shapes of work.
        clock: returns monotonic seconds.
        notify: called with a sentence for each round.

    Attributes:
        failures: arm name -> error that it raised, in words.
        warnings: problems noticed while measuring.
    """

    store: Store
    version: Version
    timers: Mapping[str, Timer]
    buckets: Sequence[Bucket]
    clock: Clock
    notify: Callable[[str], None]
    failures: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._timings = {(arm, bucket.label): dict[int, Timing]() for arm in self.timers for bucket in self.buckets}
        for seen in self.store.observations(self.version, KIND):
            if (seen.arm, seen.bucket) in self._timings:
                self._timings[seen.arm, seen.bucket][seen.turn] = _timing(seen)

    def warm(self, noise: float, budget_s: float) -> None:
        """Run every arm until it is steady. A candidate that raises has failed; the others go on.

        Raises:
            MeasurementError: the control raised.
        """
        steady = max(STEADY, 1 + 2 * noise)
        share_s = WARMUP_SHARE * budget_s / (len(self.buckets) * len(self.timers))
        for bucket in self.buckets:
            for arm in self.racing():
                self.notify(f"warming up {arm} in {bucket.label}")
                try:
                    warm = warm_up({arm: self.timers[arm]}, bucket, self.clock, steady, share_s)
                    self.warnings += warm.restless
                except CandidateError as error:
                    self.fail(arm, error)

    def time(self, pairs: int, terms: Terms, deadline_s: float) -> None:
        """Time the rounds that are missing up to `pairs`. A candidate whose result is clear is no longer timed.

        Raises:
            MeasurementError: the control raised.
        """
        settled: set[str] = set()
        for turn in range(pairs):
            arms = [arm for arm in self.racing() if arm not in settled]
            if len(arms) < 2:
                return
            for bucket in self.buckets:
                self._round(arms, bucket, turn)
            if turn + 1 in EARLY_LOOKS:
                open_ = [arm for arm in arms if arm != CONTROL and arm not in self.failures]
                settled |= {arm for arm in open_ if is_settled(self.pairs(arm), terms, len(self.timers) - 1)}
            if self.clock() > deadline_s and turn + 1 < pairs:
                self.warnings.append(f"stopped after {turn + 1} of {pairs} rounds, when the time was used up")
                return

    def pairs(self, arm: str) -> dict[str, list[Pair]]:
        """By bucket, pairs of the control's and a candidate's timings of the same round."""
        found = {}
        for bucket in (each.label for each in self.buckets):
            reference, candidate = self._timings[CONTROL, bucket], self._timings[arm, bucket]
            turns = sorted(reference.keys() & candidate.keys())
            found[bucket] = [Pair(reference[turn], candidate[turn]) for turn in turns]
        return found

    def racing(self) -> list[str]:
        """The arms that have not failed."""
        return [arm for arm in self.timers if arm not in self.failures]

    def _round(self, arms: Sequence[str], bucket: Bucket, turn: int) -> None:
        """Time every arm once, in random order. Saved together, because only timings of one round are compared."""
        missing = [arm for arm in arms if arm != CONTROL and turn not in self._timings[arm, bucket.label]]
        if not missing:
            return
        if turn in self._timings[CONTROL, bucket.label]:
            return  # the control's timing is from an earlier run; only later rounds can be paired
        self.notify(f"timing {bucket.label}, round {turn + 1}")
        order = np.random.default_rng((turn, bucket.batch, bucket.prompt_tokens)).permutation([CONTROL, *missing])
        taken: dict[str, Timing] = {}
        for arm in map(str, order):
            try:
                taken[arm] = self.timers[arm](bucket, turn)
            except CandidateError as error:
                self.fail(arm, error)
        rows = [Observation(arm, KIND, bucket.label, turn, asdict(timing)) for arm, timing in taken.items()]
        self.store.add_all(self.version, rows)
        for arm, timing in taken.items():
            self._timings[arm, bucket.label][turn] = timing

    def fail(self, arm: str, error: CandidateError) -> None:
        """Record a candidate's failure, and leave it out from now on.

        Raises:
            MeasurementError: the arm is the control.
        """
        if arm == CONTROL:
            raise MeasurementError(f"the control itself failed: {error}") from error
        self.failures[arm] = str(error)
        self.notify(f"{arm} failed: {error}")


def _timing(seen: Observation) -> Timing:
    def seconds(name: str) -> float:
        value = seen.body.get(name)
        return float("nan") if value is None else float(value)

    return Timing(seconds("ttft_s"), seconds("tpot_s"), seconds("end_to_end_s"), str(seen.body.get("polluted", "")))
