"""The engine: one thread that owns prefill, decode and sampling for as long as there are sequences.

Between two steps, sequences leave, at most one part of one prompt is computed, and the next sequence joins. A step
computes all sequences together over slots of their own (`cache/rows.py`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AutotuneError, CancelledRequestError, QueueFullError, VariantError, first_line
from ...machine import ending, forking, intraop, outside
from ...machine.ending import Cancelled
from ..cache.rows import RowCache
from . import rows as plan
from .joined import Joined, Prefilled, count, is_exact
from .prefill import Prefill
from .prefixes import Prefixes
from .request import Request
from .terms import MOST_WAITING

if TYPE_CHECKING:
    from ...model.seam import Sampling
    from ..steps.step import Step
    from ..variant import Variant

CHUNK = 128  # tokens of prompts that are computed between two steps
CHUNKS_AT_REST = 4  # the same in chunks while no sequence waits for its next token


class Engine:
    """Decodes the sequences of all callers together.

    Its thread ends when nothing is left to do, so it keeps no unused model alive.

    Args:
        variant: decodes over slots with recorded steps.
        most_rows: sequences that are decoded together.
        chunk: tokens of a prompt that are computed between two steps.
        most_waiting: requests that may wait for a row.

    Attributes:
        joins: whether several short prompts are computed together, because each then gets the numbers it has alone.
        counts: requests, forwards over prompts, steps, and in all steps the rows that were computed and the tokens that
            came of them.
    """

    def __init__(
        self, variant: Variant, most_rows: int, *, chunk: int = CHUNK, most_waiting: int = MOST_WAITING
    ) -> None:
        self.variant = variant
        self.most_rows = most_rows
        self.prefixes = Prefixes(chunk)
        self.joins = is_exact(variant, chunk)
        self.most_waiting = most_waiting
        self.counts: Counter[str] = Counter()
        self._changed = forking.free(threading.Condition())
        self._forget()
        forking.tell(self)

    def _forget(self) -> None:
        self._waiting = list[Request]()
        self._prompt: Prefill | Joined | None = None
        self._rows: list[Request | None] = [None] * self.most_rows
        self._cache: RowCache | None = None
        self._steps: dict[int, tuple[RowCache, Step]] = {}
        self._token = torch.zeros(self.most_rows, 1, dtype=torch.int64, device="cpu")
        self._worker: ending.Worker | None = None
        self._stopped = False
        self._is_stepping = False
        self._lent_to: int | None = None  # identifier of the thread that has the model alone
        self._borrowers = 0  # such calls that wait
        self._owns_next = False  # whether the next turn is the engine's even if such calls wait

    def after_fork(self) -> None:
        """Forget all requests in a forked child: their callers are threads of the parent."""
        self._forget()

    def summary(self) -> str:
        """How many sequences are decoded together and wait, in a sentence."""
        with self._changed:
            used, waiting = sum(request is not None for request in self._rows), len(self._waiting)
        steps = self.counts["steps"]
        mean = f", {self.counts['tokens'] / steps:.1f} tokens a step" if steps else ""
        found = self.prefixes.tokens_found
        shared = f"; {found} tokens of prompts were known from earlier ones" if found else ""
        return f"{used} of {self.most_rows} rows in use, {waiting} requests wait; {steps} steps{mean}{shared}"

    # In the callers' threads

    def refusal(self, call: Sampling) -> str | None:
        """Why a call is not taken, so that it runs alone between two steps; or None."""
        if call.input_ids.shape[0] != 1:
            return "a batch that the caller made"
        if call.settings.return_dict_in_generate:
            return "return_dict_in_generate"
        mask = call.mask
        return None if mask is None or bool(mask.all()) else "padding in a single sequence"

    def generate(self, call: Sampling) -> torch.Tensor:
        """Serve a call of one sequence.

        Returns:
            ids [1, P + new].

        Raises:
            QueueFullError: too many requests wait.
            DeadlineError, CancelledRequestError: the request's terms were violated, or the process ends.
            VariantError: the prompt or a step failed.
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
                self._worker = ending.Worker(run, "autotune-engine", stop=self._stop)
                if not self._worker.launch():
                    self._worker = None
                    self._waiting.remove(request)
                    raise VariantError("the process ends, and with it the thread that decodes")
            self._changed.notify_all()
        intraop.rest()  # while the engine's thread computes
        return request.wait()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Enclose a call that the engine does not take: no step runs meanwhile. It takes turns with the steps."""
        with self._changed:
            self._borrowers += 1
            try:
                self._changed.wait_for(lambda: not self._is_stepping and self._lent_to is None)
            finally:
                self._borrowers -= 1
            self._lent_to = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._lent_to = None
                self._owns_next = True
                self._changed.notify_all()

    def is_lent_here(self) -> bool:
        """Whether the calling thread has the model alone."""
        return self._lent_to == threading.get_ident()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # In the engine's thread

    def _run(self, threads: int) -> None:
        try:
            with torch.no_grad(), intraop.computing_with(threads), self.variant.device.guard():
                while self._has_turn():
                    try:
                        self._turn()
                    finally:
                        with self._changed:
                            self._is_stepping = False
                            self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._worker = None
                if isinstance(error, Cancelled):
                    self._end_ours()
                else:
                    self._fail_all(error)
            raise

    def _has_turn(self) -> bool:
        """Wait for the engine's turn. Returns False when nothing is left to do; then the thread has ended."""
        with self._changed:
            if not (self._waiting or self._prompt or any(self._rows)):
                self._worker = None
                return False
            self._changed.wait_for(
                lambda: self._stopped or (self._lent_to is None and (self._owns_next or not self._borrowers))
            )
            if self._stopped:
                raise Cancelled
            self._owns_next = False
            self._is_stepping = True
            return True

    def _turn(self) -> None:
        self._drop_violated()
        self._admit()
        if any(self._rows):
            self._step()

    def _drop_violated(self) -> None:
        """End the requests that were cancelled or are late."""
        now_s = time.monotonic()
        for row, request in enumerate(self._rows):
            if request is not None and (error := request.violated(now_s)):
                self._free(row)
                request.fail(error)
        for request in self._prompt.requests if self._prompt else ():
            if error := request.violated(now_s):
                request.fail(error)
                self._prompt = None
        with self._changed:
            for request in tuple(self._waiting):
                if error := request.violated(now_s):
                    self._waiting.remove(request)
                    request.fail(error)

    def _admit(self) -> None:
        """Compute one part of a prompt, or several short prompts. After its last part, a sequence takes a row."""
        if self._prompt is None:
            self._prompt = self._next_prompt()
        if (prompt := self._prompt) is None:
            return
        try:
            found = prompt.advance(self.variant)
        except Exception as error:
            outside.pass_on(error)
            self._prompt = None
            for request in prompt.requests:
                request.fail(error if len(prompt.requests) == 1 else _own(error))
            return
        self.counts["prefills"] += 1
        if found is not None:
            self._prompt = None
            for each in found:
                self._begin(each)

    def _begin(self, prompt: Prefilled) -> None:
        """Give a sequence its first token, and a row unless that was its last."""
        request = prompt.request
        try:
            token = request.choose(prompt.logits)
            if request.take(token):
                request.finish()
                return
            with self.variant.preparing(1):
                row = self._rows.index(None)
                self._slots(prompt.cache).join(row, prompt.cache)
        except Exception as error:  # of the caller's processors or criteria: it concerns this request alone
            outside.pass_on(error)
            request.fail(error)
            return
        self._rows[row] = request
        self._token[row] = token

    def _next_prompt(self) -> Prefill | Joined | None:
        """What is computed next for the requests that are served next; None if none waits or no row is free."""
        free = self._rows.count(None)
        room = self.prefixes.part * (1 if free < self.most_rows else CHUNKS_AT_REST)
        with self._changed:
            if not free or not self._waiting:
                return None
            order = sorted(self._waiting, key=lambda each: each.terms.order)[:free]
            several = count([each.tokens for each in order], room, self.prefixes.part) if self.joins else 1
            chosen = order[:several]
            for request in chosen:
                self._waiting.remove(request)
        self.counts["requests"] += len(chosen)
        return Joined(chosen) if len(chosen) > 1 else Prefill(chosen[0], self.prefixes)

    def _slots(self, prompt: Any) -> RowCache:
        pool = self.variant.caches
        assert pool is not None  # noqa: S101 - the transform checked; for the type checker
        if self._cache is None:
            self._cache = RowCache(prompt, pool.slots, self.most_rows, pool.dtype)
        return self._cache

    def _step(self) -> None:
        """Decode one token of every sequence."""
        try:
            logits = self._logits()
        except Exception as error:
            outside.pass_on(error)
            for row, request in enumerate(self._rows):
                if request is not None:
                    self._free(row)
                    request.fail(_own(error))
            return
        most, best = logits.max(dim=-1)  # of each row; NaN if any of its logits is
        for row, request in enumerate(self._rows[: len(logits)]):
            if request is None:
                continue
            try:
                if bool(most[row].isnan()):
                    raise VariantError(f"NaN logits at token {request.ids.shape[1]}")
                token = best[row : row + 1] if request.is_greedy else request.choose(logits[row : row + 1])
                finished = request.take(token)
            except Exception as error:  # of the caller's processors or criteria, or NaN: it concerns this row alone
                outside.pass_on(error)
                self._free(row)
                request.fail(error)
                continue
            self._token[row] = token
            if finished:
                self._free(row)
                request.finish()

    def _logits(self) -> torch.Tensor:
        """Run a step. Returns logits [rows, V] of as many rows as were computed."""
        cache = self._cache
        assert cache is not None  # noqa: S101 - a sequence has joined; for the type checker
        for source, target in plan.moves([r is not None for r in self._rows], self.most_rows):
            cache.move(source, target)
            self._rows[target], self._rows[source] = self._rows[source], None
            self._token[target] = self._token[source]
        size = plan.size_for([r is not None for r in self._rows], self.most_rows)
        if size not in self._steps:
            self._steps[size] = self._prepared(cache.upper(size))
        view, step = self._steps[size]
        with self.variant.running("decode"):
            logits = step(self._token[:size], view.slot[:, None], view)
        cache.step_done()
        self.counts["steps"] += 1
        self.counts["rows"] += size
        self.counts["tokens"] += sum(request is not None for request in self._rows)
        return logits

    def _prepared(self, view: RowCache) -> tuple[RowCache, Step]:
        programs = self.variant.step
        with self.variant.preparing(view.shape[0]):
            step = programs.fitting(view) if programs is not None else None
            if step is None:
                raise VariantError(f"there is no recorded step for {view.shape[0]} rows")
            return view, step

    def _free(self, row: int) -> None:
        self._rows[row] = None
        self._token[row] = 0
        if self._cache is not None:
            self._cache.leave(row)

    def _all(self) -> list[Request]:
        held = self._prompt.requests if self._prompt else []
        return [*self._waiting, *held, *filter(None, self._rows)]

    def _end_ours(self) -> None:
        """End the requests of our own threads as the process ends. Users' daemon threads wait on and end silently."""
        for request in self._all():
            if request.is_ours:
                request.fail(CancelledRequestError("the process ends"))

    def _fail_all(self, error: BaseException) -> None:
        for request in self._all():
            request.fail(_own(error))
        self._waiting.clear()
        self._prompt = None
        for row in range(self.most_rows):
            self._free(row)


def _own(error: BaseException) -> BaseException:
    """An error for one request: threads that raised the same object would all extend its traceback."""
    kind = type(error) if isinstance(error, AutotuneError) else VariantError
    text = str(error) if isinstance(error, AutotuneError) else first_line(error)
    own = kind(text)
    own.__cause__ = error
    return own
