"""A wrapped model and its plain twin, and what is known about the plan that one of them has."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from autotune import StateError
from autotune.live.watch.breaker import Breaker, Rules
from tests.fuzz import models, plans
from tests.fuzz.adapters import ADAPTERS, row_by_row
from tests.fuzz.calls import KINDS, PLAIN, SINGLE, Call
from tests.fuzz.changes import CHANGES, INEXACT, SILENT, Change, Undo
from tests.fuzz.failures import Failure, injected
from tests.fuzz.forwards import FORWARDS
from tests.fuzz.modes import MODES
from tests.fuzz.seen import Seen, difference, look, unequal

ALL_CALLS = {**KINDS, **FORWARDS, "adapters row by row": row_by_row}
ALL_CHANGES: dict[str, Change] = {**CHANGES, **ADAPTERS}
COUNTS: Counter[str] = Counter()  # what was done, over all examples
RULES = Rules()
THREADS = 3
UNSTEADY = {"meta device"}  # modes in which a model reads memory that nobody has written


class Pair:
    """Both sides of one example.

    Args:
        architecture: one of models.NAMES.
        plan: one of plans.PLANS.
        watch: share of the served calls that are scored again in the background.
        shape: one of models.SHAPES.
    """

    def __init__(self, architecture: str, plan: str, watch: float = 0.0, shape: str = "usual") -> None:
        self.plain = models.build(architecture, shape=shape)
        self.wrapped = plans.wrap(models.build(architecture, shape=shape), plan, watch)
        self.now_s = 0.0
        self.watch = watch
        self.done: list[tuple[str, Undo, Undo]] = []  # changes that are not undone, the latest last
        self.lasting = 0  # changes that nothing undoes
        self._committed()

    @property
    def handle(self) -> Any:
        return self.wrapped.autotune

    def _committed(self) -> None:
        """The plan fits the model as it is now."""
        self.handle._serving.watch.clock = lambda: self.now_s
        self.handle._serving.watch._note_pace = lambda *_: None  # what else the machine does is not the plan's fault
        self.handle._serving.watch.breaker = Breaker(since_s=self.now_s)
        self.fitting = self._stamp()
        COUNTS["plans" if self.handle._serving.active is not None else "plans without a transform"] += 1

    def _stamp(self) -> tuple[int, tuple[str, ...]]:
        return self.lasting, tuple(name for name, *_ in self.done if name not in SILENT)

    def _must_serve(self, call: Call) -> bool:
        """Whether nothing stands between a call and the plan."""
        hooked = any("hook" in name for name, *_ in self.done)
        usual = call.kind in PLAIN and call.length + call.new <= plans.PROMPT + plans.NEW
        watch = self.handle._serving.watch
        rows = 1 if call.kind in SINGLE else call.rows
        breakers = (watch.breaker, watch._batches.get(rows, Breaker()))
        return (
            usual
            and all(each.phase == "closed" or each.due(self.now_s) for each in breakers)
            and self.handle._serving.active is not None
            and not hooked
            and not self.plain.training
            and self.fitting == self._stamp()
        )

    # Calls

    def call(self, call: Call, mode: str = "none", failure: Failure | None = None) -> None:
        """Make a call on both sides and compare.

        Raises:
            AssertionError: what differs, or what the plan should have done and did not.
        """
        kind, entered = ALL_CALLS[call.kind], MODES[mode]
        failed, must = self._failures(), mode == "none" and failure is None and self._must_serve(call)
        resting = self.handle._serving.watch.breaker.phase in ("open", "disabled") and not self._due()
        served = self.handle.status.served
        with entered():
            plain = look(lambda: kind(self.plain, call), call.seed)
        if mode in UNSTEADY:
            with entered():
                again = look(lambda: kind(self.plain, call), call.seed)
            if difference(plain, again):  # not even the original answers the same twice
                return
        with injected(failure) as found, entered():
            wrapped = look(lambda: kind(self.wrapped, call), call.seed)
        self._settle()
        self._count(call, mode, failure, plain, found.fired, served)
        said = f"{call} mode={mode!r} {failure or ''}: "
        if failure is not None and failure.place == "alarm" and found.fired:
            assert "Late" in str(wrapped.error), f"{said}the alarm became {wrapped.error}"
        else:
            found_different = difference(plain, wrapped, anew=bool(found.fired))
            assert found_different is None, said + found_different
        blamed = failure is not None and failure.place != "alarm" and found.fired
        if not blamed:
            assert self._failures() == failed, f"{said}the plan failed: {self._problem()}"
        elif plain.error is None and plain.value != "interrupted" and not resting:
            assert self._failures() != failed, f"{said}the plan failed, and nothing became of it"
        if resting:
            assert not found.entered, f"{said}the plan was run while it rests"
        if must and wrapped.error is None:
            assert self.handle.status.served > served, f"{said}the plan did not serve: {self.handle.status}"

    def in_threads(self, call: Call, failure: Failure | None) -> None:
        """The same calls at the same time: each is answered as if it were alone."""
        if any(module.training for module in self.plain.modules()):  # dropout draws from a generator that threads share
            return
        kind, results = ALL_CALLS[call.kind], dict[int, Any]()
        calls = [call._replace(seed=call.seed + i, rows=1 + (call.rows + i) % 3) for i in range(THREADS)]
        alone = [look(lambda each=each: kind(self.plain, each), 0) for each in calls]
        start = threading.Barrier(THREADS)

        def run(number: int) -> None:
            start.wait()
            results[number] = look_quietly(lambda: kind(self.wrapped, calls[number]))

        with injected(failure):
            workers = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        self._settle()
        COUNTS["calls in threads"] += THREADS
        for number, one in enumerate(alone):
            answer, error = results[number]
            assert error == one.error, f"{calls[number]} among threads: {error}, alone {one.error}"
            found = unequal(one.value, answer, "the answer")
            assert found is None, f"{calls[number]} among threads: {found}"

    def _settle(self) -> None:
        """What is scored again in the background is done before anything else happens."""
        if (worker := self.handle._serving.watch._worker) is not None:
            worker.join()

    def _failures(self) -> tuple[int, int]:
        """Times that the plan was taken out, and that a batch could not be prepared for."""
        handle = self.handle
        reason = "no room or no step for a batch of that size"
        opened = [e for e in handle.events if e.phase in ("open", "disabled") and not e.reason.startswith("the trial")]
        return len(opened), handle.status.bypassed.get(reason, 0)

    def _problem(self) -> str:
        return f"{self.handle.status.detail}; {[event.reason for event in self.handle.events]}"

    def _due(self) -> bool:
        return bool(self.handle._serving.watch.breaker.due(self.now_s))

    def _count(self, call: Call, mode: str, failure: Any, plain: Seen, fired: int, served: int) -> None:
        COUNTS["calls"] += 1
        COUNTS["calls in a mode"] += mode != "none"
        COUNTS["calls that raise"] += plain.error is not None
        COUNTS["served by the plan" if self.handle.status.served > served else "answered by the original"] += 1
        COUNTS["failures injected"] += bool(fired)
        COUNTS[f"kind {call.kind}"] += 1

    # Changes

    def change(self, name: str) -> None:
        torch.manual_seed(11)
        one = ALL_CHANGES[name](self.plain)
        torch.manual_seed(11)
        other = ALL_CHANGES[name](self.wrapped)
        COUNTS["changes"] += 1
        COUNTS[f"change {name}"] += 1
        if one is None:
            self.lasting += 1
        else:
            self.done.append((name, one, other))

    def undo(self) -> None:
        """The latest change; a change of a class is undone in the order that this asks for."""
        if not self.done:
            return
        name, one, other = self.done.pop()
        for undo in (other, one):
            assert undo is not None
            undo()
        self.lasting += name in INEXACT
        COUNTS["changes undone"] += 1

    # Plans

    def switch(self, plan: str) -> None:
        """Tune again, for the model as it is now."""
        if self.plain.training:
            return
        with plans.scripted(self._lossless(plan)):
            self.handle.tune()
        self._committed()
        COUNTS["plan switches"] += 1

    def rewrap(self, plan: str) -> None:
        if self.plain.training or any(name == "hook of accelerate" for name, *_ in self.done):  # it would be refused
            return
        self.handle.unwrap()
        assert type(self.wrapped) is type(self.plain)
        plans.wrap(self.wrapped, self._lossless(plan), self.watch)
        self._committed()
        COUNTS["plan switches"] += 1

    def _lossless(self, plan: str) -> str:
        """The plan, or one that answers as the original does also with weights such as there are now."""
        if self.plain.dtype != torch.float32:
            return plans.EXACT[0]
        return "merged" if plan in plans.NARROW and (self.done or self.lasting) else plan

    def roll_back(self) -> None:
        self.handle.rollback()

    def commit(self) -> None:
        """The latest plan again; it says so where it does not fit any more."""
        try:
            self.handle.commit()
        except StateError as refused:
            if "stale" not in str(refused):
                raise
            return
        self.handle._serving.watch.breaker = Breaker(since_s=self.now_s)

    def wait(self, pauses: int) -> None:
        self.now_s += RULES.pause_s * pauses

    def close(self) -> None:
        """Undo everything; the two are the same plain models again."""
        while self.done:
            self.undo()
        self.handle.unwrap()
        assert type(self.wrapped) is type(self.plain)
        other = set(vars(self.wrapped)) ^ set(vars(self.plain))
        assert not other, f"unwrapped, it differs in the attributes {other}"
        found = difference(*(look(lambda m=m: m.state_dict(), 0) for m in (self.plain, self.wrapped)))
        assert found is None, f"after everything: {found}"


def look_quietly(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The answer and the error of a call in a thread, where generator and notes are shared with others."""
    from tests.fuzz.seen import ADDRESS, plainly

    try:
        return plainly(call()), None
    except Exception as error:
        return None, ADDRESS.sub("0x", f"{type(error).__module__}.{type(error).__name__}: {error}")
