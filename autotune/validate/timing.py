"""Time one request, and detect what disturbed it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..machine import device as devices
from ..profile.timing import timed
from ..workload import Bucket
from .score import OutputError, Served, Tokens

Clock = Callable[[], float]  # monotonic seconds

TIMED_TOKENS = 32  # most tokens generated per timed request; longer requests are extrapolated from them
JUMP_S = 0.5  # seconds that wall clock and monotonic clock may drift apart within one request
STOLEN = 0.05  # share of one request's time for which the hypervisor or the quota may stop the process


@dataclass(frozen=True)
class Timing:
    """One request.

    Args:
        ttft_s: call to first token.
        tpot_s: time per further token; NaN when there is only one.
        end_to_end_s: time of a request with all n tokens of its bucket: ttft + (n - 1) x tpot.
        polluted: what disturbed the request, or empty.
    """

    ttft_s: float
    tpot_s: float
    end_to_end_s: float
    polluted: str = ""


@dataclass(frozen=True)
class Pair:
    """The same request on both arms, one right after the other."""

    reference: Timing
    candidate: Timing

    @property
    def polluted(self) -> str:
        return self.reference.polluted or self.candidate.polluted


def time_request(
    served: Served,
    prompts: Sequence[Tokens],
    new_tokens: int,
    clock: Clock = time.perf_counter,
    most_tokens: int = TIMED_TOKENS,
) -> Timing:
    """Time one request of `new_tokens` tokens, of which at most `most_tokens` are generated.

    End-of-sequence must be off, so that all arms generate equally many.

    The time includes work that the device has not finished when the call returns (`profile.timing.timed`): a variant
    that returns early does not count as faster.

    Raises:
        CandidateError: the variant raised, or stopped early (OutputError).
    """
    count, before = min(new_tokens, most_tokens), Disturbance()
    start, marks = timed(
        lambda watch: served.generate(prompts, count, streamer=watch), devices.of(served.model.device), clock
    )
    if len(marks) != count:
        raise OutputError(f"{len(marks)} tokens reached the streamer, expected {count}")
    return timing(start, marks, new_tokens, before.since())


def timing(start_s: float, marks_s: Sequence[float], new_tokens: int, polluted: str = "") -> Timing:
    """Return the timing of a request from its start and the times of its tokens. Pure."""
    ttft = marks_s[0] - start_s
    steps = len(marks_s) - 1
    tpot = (marks_s[-1] - marks_s[0]) / steps if steps else math.nan
    total = ttft + (new_tokens - 1) * tpot if steps else ttft
    if not (ttft > 0 and total > 0 and (math.isnan(tpot) or tpot > 0) and math.isfinite(total)):
        polluted = "the clock did not advance"
    return Timing(ttft, tpot, total, polluted)


class Disturbance:
    """Detects what disturbed this process since the object was made. What cannot be observed is not reported."""

    def __init__(self) -> None:
        self.wall_s = time.time()
        self.monotonic_s = time.monotonic()
        self.cpu = _cpu_ticks()
        self.throttled_s = _throttled_s()

    def since(self) -> str:
        jump = (time.time() - self.wall_s) - (time.monotonic() - self.monotonic_s)
        if abs(jump) > JUMP_S:
            return f"the clock jumped by {jump:.1f} s"
        ticks = [b - a for a, b in zip(self.cpu, _cpu_ticks(), strict=False)]
        if len(ticks) > 7 and sum(ticks) > 0 and ticks[7] / sum(ticks) > STOLEN:
            return f"the hypervisor took {ticks[7] / sum(ticks):.0%} of the CPU"
        waited = (_throttled_s() - self.throttled_s) / max(time.monotonic() - self.monotonic_s, 1e-9)
        if waited > STOLEN:
            return f"the CPU quota was used up {waited:.0%} of the time"
        return ""


def _cpu_ticks() -> list[int]:
    """Return user, nice, system, idle, iowait, irq, softirq, steal, ... of all CPUs; empty outside Linux."""
    try:
        with Path("/proc/stat").open() as stat:
            return [int(t) for t in stat.readline().split()[1:9]]
    except (OSError, ValueError):
        return []


def _throttled_s() -> float:
    """Return the seconds for which the CPU quota has stopped this container so far; 0 if unknown."""
    try:
        text = Path("/sys/fs/cgroup/cpu.stat").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("throttled_usec ")]
    return int(found[0]) / 1e6 if found else 0.0


def request(bucket: Bucket, prompts: Sequence[Tokens], turn: int) -> list[Tokens]:
    """Return prompts [batch][prompt_tokens] for one timed request, taken in turn and joined if they are too short."""
    filled: list[Tokens] = []
    for row in range(bucket.batch):
        k = turn * bucket.batch + row
        tokens: list[int] = []
        while len(tokens) < bucket.prompt_tokens:
            tokens += prompts[k % len(prompts)]
            k += 1
        filled.append(tokens[: bucket.prompt_tokens])
    return filled
