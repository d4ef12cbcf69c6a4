"""The engine: one thread that owns prefill, decode and sampling for as long as there are sequences.

Between two steps, sequences leave, at most one part of one prompt is computed, or several short prompts, and the next
sequences join. If no row is free, a sequence that is less urgent than a request that waits gives up its row, and goes
on later from where it was. A step computes all sequences together over slots of their own (`cache/rows.py`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...errors import CancelledRequestError, DeviceError, QueueFullError
from ...machine import ending, forking, intraop, outside
from ...machine.ending import Cancelled
from ..steps.step import preparing
from .joined import SHORTEST, SIDE, Joined, Prefilled, is_exact, together
from .load import EngineLoad, StepTimes, summary
from .prefill import Prefill, parts_agree
from .prefixes import Prefixes
from .request import Request
from .sequences import Sequences
from .terms import MOST_WAITING
from .turns import ModelTurns

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ..cache.rows import RowCache
    from ..variant import Variant

CHUNK = 128  # tokens of prompts that are computed between two steps
CHUNKS_AT_REST = 4  # the same in chunks while no sequence waits for its next token
LINGER_S = 0.5  # time without a request after which the thread ends; a new thread's first prompt takes a tenth longer


class Engine:
    """Decodes the sequences of all callers together.

    Its thread ends soon after nothing is left to do, so it keeps no unused model alive.

    Args:
        variant: decodes over slots.
        caches: number of rows -> cache for a step of so many; all are views of the one with the most, which is as many
            sequences as are decoded together.
        chunk: tokens of a prompt that are computed between two steps; up to `SHORTEST` - 1 more at its end if the
            engine merges parts.
        most_waiting: requests that may wait for a row.
        wait_s: how long a request may wait for others while no sequence is under way. Callers of a burst ask one after
            the other; those who wait begin together. A request after a time with one sequence alone does not wait.

    Attributes:
        joins: whether several short prompts are computed together, because each then gets the numbers it has alone.
        turns: who has the model, the engine or a caller.
        merges: whether several parts of a prompt are computed in one forward while no sequence waits for its next
            token, because the prompt then gets the numbers it has part by part.
        counts: requests, forwards over prompts, evicted sequences, steps, and in all steps the rows that were computed
            and the tokens that came of them.
    """

    def __init__(
        self,
        variant: Variant,
        caches: Mapping[int, RowCache],
        *,
        chunk: int = CHUNK,
        most_waiting: int = MOST_WAITING,
        wait_s: float = 0.0,
    ) -> None:
        self.variant = variant
        self.caches = caches
        self.most_rows = max(caches)
        self.joins = is_exact(variant, chunk + SHORTEST - 1)
        self.merges = self.joins and parts_agree(variant, chunk)
        self.prefixes = Prefixes(chunk, SHORTEST, SIDE) if self.merges else Prefixes(chunk)
        self.most_waiting = most_waiting
        self.wait_s = wait_s
        self.counts: Counter[str] = Counter()
        self.sequences = Sequences(variant, caches, self.counts)
        self._changed = forking.free(threading.Condition())
        self._forget()
        forking.tell(self)

    def _forget(self) -> None:
        self._waiting = list[Request]()
        self._placing = list[Request]()  # those on their way from the queue to a prompt, or from that to a row
        self._times = StepTimes()
        self._prompt: Prefill | Joined | None = None
        self._worker: ending.Worker | None = None
        self._stopped = False
        self._at_once = 0  # most sequences that were under way together since none was
        self.turns = ModelTurns(self._changed)

    def after_fork(self) -> None:
        """Forget all requests in a forked child: their callers are threads of the parent, and its GPU is."""
        self._forget()
        if self.variant.device.is_host:
            self.sequences = Sequences(self.variant, self.caches, self.counts)

    def summary(self) -> str:
        """How many sequences are decoded together and wait, in a sentence."""
        with self._changed:
            used, waiting = self.sequences.used, len(self._waiting)
        did = summary(self.counts, self.prefixes.tokens_found)
        return f"{used} of {self.most_rows} rows in use, {waiting} requests wait; {did}"

    @property
    def load(self) -> EngineLoad:
        """What it has to do now, and what it has done so far."""
        found, sequences = self.prefixes, self.sequences
        return EngineLoad(
            len(self._waiting),
            sequences.usage,
            found.tokens_queried,
            found.tokens_found,
            dict(sequences.together),
            dict(self._times.spent_s),
        )

    # In the callers' threads

    def generate(self, call: Sampling) -> torch.Tensor:
        """Serve a call of one sequence.

        Returns:
            ids [1, P + new].

        Raises:
            QueueFullError: too many requests wait.
            DeadlineError, CancelledRequestError: the request's terms were violated, or the process ends.
            VariantError: the prompt or a step failed.
            NoThreadError: the engine's thread cannot be started; nothing was begun.
        """
        request = Request(call)
        with self._changed:
            if len(self._waiting) >= self.most_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait for one of {self.most_rows} rows, and no more may; ask again "
                    "later, or call from fewer threads"
                )
            self._waiting.append(request)
            if self._worker is None:
                run = partial(self._run, torch.get_num_threads())  # a new thread may begin with another number
                worker, launched = ending.Worker(run, "autotune-engine", stop=self._stop, serves=True), False
                try:
                    launched = worker.launch()
                finally:
                    if launched:
                        self._worker = worker
                    else:
                        self._waiting.remove(request)
            has_ended = self._worker is None
            self._changed.notify_all()
        if has_ended:
            ending.refuse(CancelledRequestError("the process ends, and with it the thread that decodes"))
        intraop.rest()  # while the engine's thread computes
        return request.wait()

    def remember(self, prompts: bool) -> None:
        """Keep prompts for later ones that begin alike, as from the start, or forget them and compute every prompt."""
        self.prefixes = self.prefixes.emptied(keeps=prompts)

    def alone(self) -> AbstractContextManager[None]:
        """Enclose a call that the engine does not take: no step runs meanwhile. It takes turns with the steps."""
        return self.turns.alone()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # In the engine's thread

    def _run(self, threads: int) -> None:
        try:
            device = self.variant.device
            with torch.no_grad(), intraop.computing_with(threads), device.current(), device.guard():
                while self._has_turn():
                    try:
                        self._turn()
                    finally:
                        self.turns.end()
        except BaseException as error:
            with self._changed:
                self._worker = None
                if isinstance(error, Cancelled):
                    self._end_ours()
                else:
                    self._fail_all(error)
            if not isinstance(error, DeviceError):  # which every caller was told
                raise

    def _has_turn(self) -> bool:
        """Wait for the engine's turn. Returns False when nothing is left to do; then the thread has ended."""
        with self._changed:
            if not self._is_busy():
                self._times.end()  # the next turn may be long in coming
            if not (self._waiting or self._is_busy() or self._lingers()):
                self._worker = None
                return False
            self._gather()
            self.turns.begin(lambda: self._stopped, self._drop_violated_that_wait)
            return True

    def _lingers(self) -> bool:
        """Wait a little for the next request, and return whether it came. The lock is held."""
        intraop.rest()
        self._changed.wait_for(lambda: self._stopped or self._waiting, LINGER_S)
        return bool(self._waiting)

    def _is_busy(self) -> bool:
        """Whether sequences are under way."""
        return self._prompt is not None or self.sequences.are_under_way

    def _gather(self) -> None:
        """While no sequence is under way, wait for as many requests as there were before. The lock is held."""
        if self._is_busy():
            return
        expected, self._at_once = self._at_once, 0
        if expected > 1:
            due_s = min(request.terms.arrived_s for request in self._waiting) + self.wait_s
            came = lambda: self._stopped or len(self._waiting) >= expected  # noqa: E731
            self._changed.wait_for(came, timeout=max(0.0, due_s - time.monotonic()))

    def _turn(self) -> None:
        self._drop_violated()
        if self._prompt is None:
            order = self._first_waiting()
            self.sequences.evict_for(order)
            self.sequences.resume_before(order)
        self._times.end()
        self._admit()
        if under_way := self.sequences.used:
            self._at_once = max(self._at_once, under_way)
            self._times.begin(under_way)
            self.sequences.step()

    def _drop_violated(self) -> None:
        """End the requests that were cancelled or are late."""
        now_s = time.monotonic()
        self.sequences.drop_violated(now_s)
        for request in self._prompt.requests if self._prompt else ():
            if error := request.violated(now_s):
                self._end_prompt()
                request.fail(error)
        with self._changed:
            self._drop_violated_that_wait()

    def _drop_violated_that_wait(self) -> None:
        """End the requests that are not begun, and were cancelled or are late. The lock is held."""
        now_s = time.monotonic()
        for request in tuple(self._waiting):
            if error := request.violated(now_s):
                self._waiting.remove(request)
                request.fail(error)

    def _first_waiting(self) -> float:
        """The order of the most urgent request that waits; infinite if none does."""
        with self._changed:
            return min((request.terms.order for request in self._waiting), default=math.inf)

    def _admit(self) -> None:
        """Compute one part of a prompt, or several short prompts; before that, take those that need not be computed."""
        for _ in range(self.most_rows):
            if (prompt := self._prompt or self._next_prompt()) is None:
                return
            self._advance(prompt)
            if not prompt.is_known:
                return

    def _advance(self, prompt: Prefill | Joined) -> None:
        """Compute the next part of a prompt. After its last part, its sequence takes a row."""
        self._prompt, self._placing = prompt, []
        try:
            found = prompt.advance(self.variant, self._most() if self.merges else self.prefixes.part)
        except Exception as error:
            outside.pass_on(error)
            self._end_prompt()
            for request in prompt.requests:
                request.fail(error) if len(prompt.requests) == 1 else request.fail_with_others(error)
            return
        self.counts["prefills"] += not prompt.is_known
        if found is not None:
            self._prompt, self._placing = None, [each.request for each in found]
            for each in found:
                self.prefixes.keep_last(each.cache, each.request.prompt, each.logits)
                self._begin(each)
                self._placing.remove(each.request)

    def _end_prompt(self) -> None:
        """Drop the prompt under way. What was queued for it on a GPU reads tensors that its caller frees."""
        self._prompt = None
        with suppress(Exception):  # if the device is dead, the next step says so
            self.variant.device.fetch(self.sequences.tokens.first(1))()

    def _begin(self, prompt: Prefilled) -> None:
        """Give a sequence its first token, and a row unless that was its last."""
        request = prompt.request
        try:
            token = self.sequences.tokens.after_prompt(request, prompt.logits)
            if request.take(token):
                request.finish()
                return
            request.hand_on()
            with preparing(1):
                self.sequences.join(request, prompt.cache, token)
        except Exception as error:  # of the caller's processors or criteria: it concerns this request alone
            outside.pass_on(error)
            request.fail(error)

    def _next_prompt(self) -> Prefill | Joined | None:
        """What is computed next for the requests that are served next; None if none waits or no row is free."""
        free, room = self.sequences.free, self._most()
        with self._changed:
            if not free or not self._waiting:
                return None
            order = sorted(self._waiting, key=lambda each: each.terms.order)[:free]
            chosen = together(order, room, self._longest, self.prefixes.knows_last) if self.joins else order[:1]
            self._placing = list(chosen)
            for request in chosen:
                self._waiting.remove(request)
                request.terms.begun_s = time.monotonic()
                self.variant.device.wait(request.queued)
        self.counts["requests"] += len(chosen)
        try:
            return Joined(chosen) if len(chosen) > 1 else Prefill(chosen[0], self.prefixes)
        except Exception as error:  # no room for what was known of it
            outside.pass_on(error)
            self.prefixes.forget()
            self._placing = []
            for request in chosen:
                request.fail_with_others(error)
            return None

    @property
    def _longest(self) -> int:
        """Tokens of the longest prompt that is one part."""
        return self.prefixes.part + self.prefixes.least - 1

    def _most(self) -> int:
        """Tokens of prompts that are computed now at most: a sequence under way waits for no more than one chunk."""
        return self.prefixes.part * (1 if self.sequences.used else CHUNKS_AT_REST)

    def _without_rows(self) -> list[Request]:
        """The requests that are not among the sequences yet."""
        return [*self._waiting, *self._placing, *(self._prompt.requests if self._prompt else ())]

    def _end_ours(self) -> None:
        """End the requests of our own threads as the process ends. Users' daemon threads wait on and end silently."""
        for request in (*self._without_rows(), *self.sequences.requests()):
            if request.is_ours:
                request.fail(CancelledRequestError("the process ends"))

    def _fail_all(self, error: BaseException) -> None:
        for request in self._without_rows():
            request.fail_with_others(error)
        self.sequences.fail(error)
        self._waiting.clear()
        self._prompt, self._placing = None, []
