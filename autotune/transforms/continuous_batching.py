"""Decode the sequences of several callers together; they join and leave between steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ChoiceError, TransformError
from ..machine.ending import NoThreadError
from ..model.seam import keys_and_values
from ..runtime.batching.request import refusal
from ..runtime.batching.terms import MOST_WAITING
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..model.seam import Sampling
    from ..runtime.batching.engine import Engine
    from ..runtime.cache.rows import RowCache
    from ..runtime.variant import Variant
    from ..workload import Phase

MOST_ROWS = 64


def decode_together(engine: Engine, variant: Variant, call: Sampling) -> Any:
    """Serve a call through an engine, or one that it does not take alone between two of its steps."""
    copied = variant is not engine.variant  # and another transform is added to the copy
    if copied or engine.turns.is_here():
        return decode(variant, call)
    if refusal(call) is None:
        with suppress(NoThreadError):  # the caller's own thread will do
            return engine.generate(call)
    with engine.alone():
        return decode(variant, call)


@dataclass(frozen=True)
class ContinuousBatching(Transform):
    """One thread decodes the sequences of all callers together, over slots of their own.

    On a CPU steps are recorded programs. On a GPU they are captured as the plan's own step is, or else run as it does.

    Calls for one sequence go through it. Other calls (batches that the caller made, `return_dict_in_generate`) run
    alone between two steps.

    Args:
        rows: sequences that are decoded together, 2 to 64. Steps of 1, 2, 4, ... rows are recorded, compiled
            or captured when it is applied.
        queue: requests that may wait for a row.
        wait_ms: how long a request may wait for others while no sequence is under way; see `Engine`.
    """

    rows: int = 8
    queue: int = MOST_WAITING
    wait_ms: float = 0.0

    name: ClassVar[str] = "continuous_batching"
    stage: ClassVar[Stage] = Stage.BATCHING
    summary: ClassVar[str] = "sequences of several callers decoded together, joining and leaving between steps"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 2 <= self.rows <= MOST_ROWS:
            raise ChoiceError(f"continuous_batching: rows must be 2 to {MOST_ROWS}, not {self.rows}")
        if self.queue < 1 or not 0 <= self.wait_ms < math.inf:
            raise ChoiceError("continuous_batching: queue must be 1 or more, and wait_ms a number from 0 on")
        if self.phase != "decode":
            raise ChoiceError("continuous_batching: phase must be 'decode'")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        return self._obstacle(variant)

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return {"decode": 1.0}  # a caller alone gains nothing

    def extra_bytes(self, variant: Variant) -> float:
        return self.rows * bytes_per_row(variant)

    def apply(self, variant: Variant) -> None:
        from ..runtime.batching.engine import Engine
        from ..runtime.batching.rows import sizes
        from ..runtime.cache.rows import RowCache

        if reason := self._obstacle(variant):
            raise TransformError(reason)
        pool, prompt = variant.caches, variant.example(1)
        assert pool is not None  # noqa: S101 - checked above; for the type checker
        whole = RowCache(prompt, pool.slots, self.rows, pool.dtype)
        caches = {rows: whole.upper(rows) for rows in sizes(self.rows)}
        prepare(variant, caches, prompt)
        variant.engine = engine = Engine(variant, caches, most_waiting=self.queue, wait_s=self.wait_ms / 1e3)
        variant.loop = partial(decode_together, engine)

    def took_effect(self, variant: Variant) -> str | None:
        return "calls are served one by one" if variant.engine is None else None

    def _obstacle(self, variant: Variant) -> str | None:
        from ..runtime.steps.inductor_graphs import InductorGraphStep
        from ..runtime.steps.program import StepPrograms

        if variant.engine is not None:
            return "calls are decoded together already"
        if reason := variant.state.unseen("a step of several sequences"):
            return reason
        if variant.device.is_host:
            if not isinstance(variant.step, StepPrograms) or variant.caches is None:
                return "it needs a recorded decode step (step_program)"
        elif variant.caches is None:
            return "it needs a captured decode step (cuda_graph), or a static cache (static_cache)"
        elif isinstance(variant.step, InductorGraphStep):
            return "inductor's graphs (compile_step with mode='reduce-overhead') have no slots for each row"
        return None


def prepare(variant: Variant, caches: Mapping[int, RowCache], prompt: Any) -> None:
    """Record, compile or capture the step of a variant for rows, as its step for one caller is.

    Guesses are for a sequence that is alone. It is in the first row, for which their check is captured.

    Args:
        caches: number of rows -> empty cache for a step of these rows.
        prompt: keys and values of one token, as of `Variant.example`.

    Raises:
        TransformError: a step that the workload needs cannot be.
    """
    from ..runtime.steps.captures import capture_checks, capture_rows
    from ..runtime.steps.compiled import CompiledStep
    from ..runtime.steps.graphs import GraphSteps
    from ..runtime.steps.program import StepPrograms

    step = variant.step
    with variant.running("decode"):
        for cache in caches.values():
            if isinstance(step, StepPrograms | CompiledStep):
                step.prepare(cache)
        if isinstance(step, GraphSteps):
            capture_rows(step, caches, prompt, variant.context_tokens, variant.turn)
            if variant.speculation is not None and (checks := variant.speculation.stride.several) is not None:
                capture_checks(checks, caches[max(caches)].single(0), variant.context_tokens, variant.turn)


def bytes_per_row(variant: Variant) -> float:
    """Bytes of the keys and values of one sequence, whose slots are all allocated at once."""
    pool = variant.caches
    if pool is None:
        return 0.0
    one_token = keys_and_values(variant.example(1))
    numbers = sum(keys.numel() + values.numel() for keys, values in one_token)
    return float(pool.slots * numbers * (pool.dtype or one_token[0][0].dtype).itemsize)
