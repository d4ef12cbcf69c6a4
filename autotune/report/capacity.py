"""How many users a replica holds: what its steps cost, from its report, and a simulation of its engine. Pure.

The engine decodes all running answers in steps and reads waiting prompts between them: a chunk of one, or several short
ones. So two figures say what a load does: seconds to read so many tokens, and seconds of a step, by the answers that it
decodes.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import AutotuneError

CHUNK, SHORTEST, CHUNKS_AT_REST = 128, 32, 4  # as in runtime.batching, which reads so where numbers stay the same
ANSWERS = 30  # of each user in a simulation, the first third of which does not count: all users begin at once
MOST_USERS = 4096  # of one replica


class CapacityError(AutotuneError, ValueError):
    """A report that does not say what a step costs, here or on another machine."""


@dataclass(frozen=True)
class ReplicaCosts:
    """What one replica's work takes.

    Args:
        reads_s: seconds to read a chunk of a prompt by its tokens, ascending, at two numbers of tokens.
        steps_s: seconds of a step by the number of answers that it decodes, ascending; the last is the most.
    """

    reads_s: Mapping[int, float]
    steps_s: Mapping[int, float]

    @property
    def rows(self) -> int:
        """Most answers that are decoded together."""
        return max(self.steps_s)

    def read_s(self, tokens: int) -> float:
        """Seconds to read so many tokens at once, by the straight line through those measured."""
        (few, few_s), (many, many_s) = self.reads_s.items()
        slope = max(0.0, many_s - few_s) / (many - few)
        return max(1e-6, few_s + slope * (tokens - few))

    def sped_up(self, reads: float, steps: float) -> ReplicaCosts:
        """The costs where prompts are read and steps are made so many times as fast."""
        return ReplicaCosts(
            {tokens: seconds / reads for tokens, seconds in self.reads_s.items()},
            {rows: seconds / steps for rows, seconds in self.steps_s.items()},
        )

    def step_s(self, rows: int) -> float:
        """Seconds of a step with so many answers, between the measured numbers by a straight line."""
        return float(np.interp(rows, list(self.steps_s), list(self.steps_s.values())))


@dataclass(frozen=True)
class Usage:
    """What one user asks, again and again.

    Args:
        prompt_tokens, new_tokens: of a request.
        pause_s: mean of the seconds between an answer and the next request, exponentially distributed.
    """

    prompt_tokens: int
    new_tokens: int
    pause_s: float = 0.0


@dataclass(frozen=True)
class Experience:
    """What users of a replica get.

    Args:
        tokens_per_s: of all of them.
        ttft_s: times to the first token, ascending.
        tpot_s: times per further token, by answer, ascending.
    """

    tokens_per_s: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]

    def percentile(self, name: str, share: float) -> float:
        """A percentile of "ttft_s" or "tpot_s"."""
        return float(np.percentile(getattr(self, name), share))


def costs_of(record: Mapping[str, Any]) -> ReplicaCosts:
    """The costs of a replica, from the record of its report: what the engine took for new prompts, and for its steps.

    Raises:
        CapacityError: callers were not measured, or by a version that did not time new prompts or steps.
    """
    found = record.get("callers") or {}
    reads, steps = (_seconds(found.get(name) or {}) for name in ("reads_ms", "steps_ms"))
    if len(reads) != 2 or 1 not in steps:
        raise CapacityError(
            "the report does not say what several callers cost: tune with a policy that decodes callers together "
            "(--policy throughput), with this version of autotune"
        )
    most = found["rows"] if found["accepted"] else 1  # else the plan serves one caller at a time
    return ReplicaCosts(reads, {rows: step_s for rows, step_s in steps.items() if rows <= most})


def _seconds(found: Mapping[str, float]) -> dict[int, float]:
    """Milliseconds by numbers as texts -> seconds by the numbers, ascending."""
    return {number: found[str(number)] / 1e3 for number in sorted(map(int, found))}


def elsewhere(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The report's advice about another machine whose name contains `name`, in any case.

    Raises:
        CapacityError: the report says nothing about one such machine.
    """
    found = [a for a in record.get("advice") or () if {"ttft", "tpot"} <= a["speedups"].keys()]
    named = [a for a in found if name.lower() in a["change"].lower()]
    if len(named) != 1:
        told = ", ".join(a["change"] for a in found) or "none"
        raise CapacityError(f"the report has figures for these other machines: {told}; {name!r} is not one of them")
    return named[0]  # type: ignore[no-any-return]


@dataclass
class _Answer:
    asked_s: float
    unread: int
    left: int
    first_s: float = math.nan
    user: int = 0


@dataclass
class _Engine:
    costs: ReplicaCosts
    usage: Usage
    now_s: float = 0.0
    waiting: deque[_Answer] = field(default_factory=deque)
    running: list[_Answer] = field(default_factory=list)

    def read(self) -> None:
        """One chunk of the first prompt that waits, or several short prompts, if rows are free; more if all are."""
        room, free = CHUNK * (1 if self.running else CHUNKS_AT_REST), self.costs.rows - len(self.running)
        if not self.waiting or not free:
            return
        first, prompt = self.waiting[0], self.usage.prompt_tokens
        if SHORTEST <= prompt < CHUNK + SHORTEST:  # all are of one length
            together = max(1, min(len(self.waiting), free, room // prompt))
            tokens = together * prompt
        else:
            together, tokens = 1, first.unread if first.unread < room + SHORTEST else room
        self.now_s += self.costs.read_s(tokens)
        first.unread -= tokens // together
        for _ in range(0 if first.unread else together):
            answer = self.waiting.popleft()
            answer.first_s, answer.left = self.now_s, answer.left - 1
            self.running.append(answer)

    def turn(self) -> list[_Answer]:
        """What is read between two steps, then one step. Returns the answers that ended."""
        self.read()
        if not self.running:
            return []
        decoding = [answer for answer in self.running if answer.left]
        if decoding:
            self.now_s += self.costs.step_s(len(decoding))
            for answer in decoding:
                answer.left -= 1
        ended = [answer for answer in self.running if not answer.left]
        self.running = [answer for answer in self.running if answer.left]
        return ended


def simulate(costs: ReplicaCosts, usage: Usage, users: int, seed: int = 0) -> Experience:
    """What so many users of one replica get."""
    draw, engine = random.Random(seed), _Engine(costs, usage)  # noqa: S311 - no secret
    coming = [(draw.random() * usage.pause_s, user) for user in range(users)]
    heapq.heapify(coming)
    wanted, ended = ANSWERS * users, list[tuple[_Answer, float]]()
    while len(ended) < wanted:
        if not engine.waiting and not engine.running:
            engine.now_s = max(engine.now_s, coming[0][0])
        while coming and coming[0][0] <= engine.now_s:
            at_s, user = heapq.heappop(coming)
            engine.waiting.append(_Answer(at_s, usage.prompt_tokens, usage.new_tokens, user=user))
        for answer in engine.turn():
            ended.append((answer, engine.now_s))
            pause_s = draw.expovariate(1 / usage.pause_s) if usage.pause_s else 0.0
            heapq.heappush(coming, (engine.now_s + pause_s, answer.user))
    counted = ended[wanted // 3 :]
    seconds = counted[-1][1] - ended[wanted // 3 - 1][1]
    further = usage.new_tokens - 1
    return Experience(
        len(counted) * usage.new_tokens / seconds,
        tuple(sorted(answer.first_s - answer.asked_s for answer, _ in counted)),
        tuple(sorted((end_s - answer.first_s) / further for answer, end_s in counted)) if further else (0.0,),
    )


def holds(found: Experience, ttft_s: float, tpot_s: float) -> bool:
    """Whether 99 of 100 answers come as fast as asked for."""
    return found.percentile("ttft_s", 99) <= ttft_s and found.percentile("tpot_s", 99) <= tpot_s


def most_users(costs: ReplicaCosts, usage: Usage, ttft_s: float, tpot_s: float) -> int:
    """The most users that one replica serves as fast as asked for; 0 if not even one."""
    low, high = 0, 1
    while high <= MOST_USERS and holds(simulate(costs, usage, high), ttft_s, tpot_s):
        low, high = high, 2 * high
    if low == MOST_USERS:
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(simulate(costs, usage, middle), ttft_s, tpot_s) else (low, middle)
    return low
