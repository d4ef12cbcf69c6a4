"""Measures whether callers gain from being decoded together, and what that costs one who is alone."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import AutotuneError, first_line
from ..machine import intraop, outside
from ..model import route
from ..runtime.batching.rows import sizes
from ..runtime.dispatch import serving
from ..runtime.variant import Variant, divided
from ..transforms.continuous_batching import ContinuousBatching, bytes_per_row
from . import ties
from .choose import outgrows
from .sharing import LOOKS, CallersPoint, Sharing, decide, is_clear, step_times

if TYPE_CHECKING:
    from ..machine.hardware import Hardware
    from ..workload import Workload
    from .policy import Policy

log = logging.getLogger("autotune")

ROUNDS = 3  # in each, every number of callers is measured once, next to one caller at a time
ALONE = 4  # requests of a round that are served one at a time
TOKENS = 24  # most new tokens of a request
READS = (32, 128)  # tokens of new prompts whose reading is timed: less than a chunk, and a whole one
LONG_PROMPT = 1500  # tokens of the prompt that arrives while others are answered, if the slots have room for it


class CallersBench(Protocol):
    """The parts of a bench that are needed."""

    original: Variant
    policy: Policy
    hardware: Hardware
    workload: Workload
    notify: Callable[[str], None]
    pad: int

    @property
    def deadline(self) -> float: ...

    @property
    def tie_nats(self) -> float: ...

    def free_bytes(self) -> float: ...


def measure(
    winner: Variant, bench: CallersBench, clock: Callable[[], float] = time.monotonic
) -> tuple[Variant, Sharing | None]:
    """Measure a plan with callers decoded together, if the policy asks for it.

    Returns:
        The variant to serve with, and what was measured; None if the policy does not ask.
    """
    asked = bench.policy.batching
    if asked.max_batch < 2:
        return winner, None
    transform = ContinuousBatching("decode", asked.max_batch, asked.max_queue, asked.max_wait_ms)
    reason = divided(transform, winner.original) or transform.unavailable(winner, bench.hardware)
    if reason is None and (row_bytes := bytes_per_row(winner)):
        transform = replace(transform, rows=max(2, int(min(transform.rows, 1e6 * asked.max_kv_mb / row_bytes))))
        if (needed := transform.extra_bytes(winner)) > 1e6 * asked.max_kv_mb:
            needs = f"the slots of {transform.rows} sequences take {needed / 1e6:.3g} MB"
            reason = f"{needs}, over max_kv_mb of the policy, {asked.max_kv_mb:.3g}"
    if reason := reason or outgrows(transform, winner, bench.free_bytes()):
        return winner, Sharing(f"callers are served one at a time: {reason}")
    bench.notify(f"measuring up to {transform.rows} callers at once")
    try:
        shared = winner.with_transform(transform)
        with _unqueued(winner), _unqueued(shared), _forgetting(shared):
            found = _Measurement(winner, shared, bench, clock).run(transform.rows)
        bench.notify(found.reason)
        if 0 < found.rows < transform.rows:
            shared = winner.with_transform(replace(transform, rows=found.rows))
    except Exception as error:
        outside.pass_on(error)
        if not isinstance(error, AutotuneError) and winner.device.failure(error) == "dead":
            raise
        log.warning("callers decoded together could not be measured", exc_info=True)
        return winner, Sharing(f"callers are served one at a time: {first_line(error, typed=False)}")
    return (shared if found.rows else winner), found


@contextmanager
def _unqueued(variant: Variant) -> Iterator[None]:
    """Let calls of a variant run at once. The thread that measures holds live requests back for all of them."""
    traffic, variant.traffic = variant.traffic, None
    try:
        yield
    finally:
        variant.traffic = traffic


@contextmanager
def _forgetting(variant: Variant) -> Iterator[None]:
    """Have an engine compute every prompt: the measurement asks the same ones again and again, as callers do not."""
    engine = variant.engine
    assert engine is not None  # noqa: S101 - the transform was applied; for the type checker
    engine.remember(False)
    try:
        yield
    finally:
        engine.remember(True)


@dataclass(frozen=True)
class _Answer:
    prompt_tokens: int
    tokens: tuple[int, ...]
    times_s: tuple[float, ...]  # when the request began, and when each token came

    @property
    def rate(self) -> float:
        """Tokens per second, the time to read the prompt included."""
        return len(self.tokens) / (self.times_s[-1] - self.times_s[0])

    @property
    def ttft_s(self) -> float:
        return self.times_s[1] - self.times_s[0]

    @property
    def tpot_s(self) -> float:
        return (self.times_s[-1] - self.times_s[1]) / max(1, len(self.times_s) - 2)


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times_s = [time.perf_counter()]
        self.tokens = list[int]()

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:  # the prompt comes first, as [1, P]
            self.times_s.append(time.perf_counter())
            self.tokens += value.tolist()

    def end(self) -> None: ...


class _Measurement:
    def __init__(self, winner: Variant, shared: Variant, bench: CallersBench, clock: Callable[[], float]) -> None:
        self.alone, self.together = (route.greedy(serving(v), bench.pad) for v in (winner, shared))
        self.winner, self.shared = winner, shared
        self.bench = bench
        self.clock = clock
        self.prompts = bench.workload.prompts
        self.tokens = min(bench.workload.new_tokens, TOKENS)
        self.slots = winner.caches.slots if winner.caches is not None else 0
        self.threads = torch.get_num_threads()  # a new thread may begin with another number
        self.answers: dict[int, tuple[int, ...]] = {}  # prompt -> its answer by the plan, alone
        self.differing = self.tied = 0
        self.draw = random.Random(0)  # noqa: S311 - no secret

    def run(self, most: int) -> Sharing:
        numbers, start = sizes(most), self.clock()
        self._rate(self.alone, 1, ALONE)
        needed_s = (2 * LOOKS[0] + ROUNDS * (sum(numbers[1:]) + ALONE)) * (self.clock() - start) / ALONE
        if self.clock() + needed_s > self.bench.deadline:
            return Sharing(
                f"callers are served one at a time: measuring {most} of them takes about {needed_s:.0f} s, more than "
                "the budget had left"
            )
        for number in numbers[1:]:
            self._rate(self.together, number, number)  # the first calls make slots
        before = self.shared.load
        alone, single = self._single()
        rates = {1: [answer.rate for answer in single]}
        ratios = {1: [answer.rate / without.rate for without, answer in zip(alone, single, strict=True)]}
        answered = {1: single}
        for _ in range(ROUNDS):
            without = self._rate(self.alone, 1, ALONE)[0]
            for number in numbers[1:]:
                rate, answers = self._rate(self.together, number, max(number, ALONE))
                rates.setdefault(number, []).append(rate)
                ratios.setdefault(number, []).append(rate / without)
                answered.setdefault(number, []).extend(answers)
        after = self.shared.load
        points = tuple(
            CallersPoint(
                n,
                tuple(rates[n]),
                tuple(ratios[n]),
                tuple(a.ttft_s for a in found),
                tuple(a.tpot_s for a in found),
                mean(a.prompt_tokens for a in found),
            )
            for n, found in answered.items()
        )
        gap_s, long_prompt = self._longest_gap(min(4, most - 1))
        reads_s = {tokens: self._read_s(tokens) for tokens in READS if tokens < self.slots}
        measured = Sharing(
            "",
            0,
            tuple(answer.rate for answer in alone),
            points,
            self.differing,
            gap_s,
            long_prompt,
            self.tokens,
            reads_s,
            step_times(before, after, numbers),
            self.tied,
        )
        rows, reason = decide(measured, self.bench.policy.batching.max_tpot_ms / 1e3)
        way = "decoded together" if rows else "served one at a time"
        return replace(measured, reason=f"callers are {way}: {reason}", rows=rows)

    def _single(self) -> tuple[list[_Answer], list[_Answer]]:
        """Answers to the same requests of a single caller without and with the engine: pairs, in alternate order."""
        with self.bench.original.turn():
            self._ask(self.together, self.prompts[0], 1)  # after a burst, one request waits for others
        pairs = list[tuple[_Answer, _Answer]]()
        for look in LOOKS:
            while len(pairs) < look:
                number = len(pairs) % min(ALONE, len(self.prompts))
                models, order = [self.alone, self.together], 1 if len(pairs) % 2 else -1
                with self.bench.original.turn():
                    answers = [self._ask(model, self.prompts[number], self.tokens) for model in models[::order]]
                answers = answers[::order]
                for answer in answers:
                    self._compare(number, answer.tokens)
                pairs.append((answers[0], answers[1]))
            if is_clear([answer.rate / alone.rate for alone, answer in pairs]) or self.clock() > self.bench.deadline:
                break
        return [alone for alone, _ in pairs], [answer for _, answer in pairs]

    def _rate(self, model: Any, callers: int, requests: int) -> tuple[float, list[_Answer]]:
        """Tokens per second of so many callers with so many requests in all, and the answers."""
        prompts = [n % len(self.prompts) for n in range(requests)]
        with self.bench.original.turn():
            start = time.perf_counter()
            with ThreadPoolExecutor(callers) as pool:
                answers = list(pool.map(lambda n: self._ask(model, self.prompts[n], self.tokens), prompts))
            seconds = time.perf_counter() - start
        for number, answer in zip(prompts, answers, strict=True):
            self._compare(number, answer.tokens)
        return requests * self.tokens / seconds, answers

    def _compare(self, number: int, tokens: tuple[int, ...]) -> None:
        """Compare an answer with the plan's, alone."""
        if (expected := self.answers.setdefault(number, tokens)) == tokens:
            return
        with self.bench.original.turn():
            is_tie = not self.winner.device.is_host and ties.is_tie(
                self.winner, self.prompts[number], expected, tokens, self.bench.tie_nats
            )
        self.tied += is_tie
        self.differing += not is_tie

    def _longest_gap(self, callers: int) -> tuple[float | None, int]:
        """The longest time between two tokens of running answers while a long prompt arrives, and the prompt's length.

        Returns None if the slots have no room for a prompt longer than the others.
        """
        prompt = max(self.prompts, key=len)
        length = min(LONG_PROMPT, self.slots - self.tokens)
        if length <= len(prompt):
            return None, 0
        long = (prompt * (length // len(prompt) + 1))[:length]
        with self.bench.original.turn(), ThreadPoolExecutor(callers + 1) as pool:
            running = [pool.submit(self._ask, self.together, self.prompts[0], self.tokens) for _ in range(callers)]
            arriving = pool.submit(self._ask, self.together, long, 1)
            arriving.result()
            answers = [each.result() for each in running]
        gaps = [after - before for answer in answers for before, after in pairwise(answer.times_s[1:])]
        return max(gaps), length

    def _read_s(self, tokens: int) -> float:
        """The median time to the first token after a prompt that the engine has not seen the beginning of."""
        known = [token for prompt in self.prompts for token in prompt]
        found = list[float]()
        for _ in range(ROUNDS):
            prompt = self.draw.choices(known, k=tokens)
            with self.bench.original.turn():
                found.append(self._ask(self.together, prompt, 1).ttft_s)
        return median(found)

    def _ask(self, model: Any, prompt: Sequence[int], tokens: int) -> _Answer:
        ids, seen = torch.tensor([list(prompt)], dtype=torch.int64, device=model.device), _Clock()
        with intraop.computing_with(self.threads):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=seen)
        return _Answer(len(prompt), tuple(seen.tokens), tuple(seen.times_s))
