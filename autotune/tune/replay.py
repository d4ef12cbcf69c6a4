"""A plan from disk: applied, verified again by quality and latency, and what it packed kept for the next process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ..errors import PlanError, TransformError, first_line
from ..machine import busy, outside
from ..model import sharding
from ..report import read
from ..runtime.variant import Variant
from ..transforms.linears import reusing
from ..validate import Verdict
from .bench import LiveBench
from .packed import PackedWeights
from .plan import Plan
from .programs import PlanPrograms
from .record import reverified
from .tuned import Tuned
from .verdict import doubts

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("autotune")


def replay(
    plan: Plan,
    bench: LiveBench,
    start: float,
    serve: Callable[[Variant], None],
    meter: busy.Meter,
    *,
    proven: bool = True,
) -> Tuned | None:
    """Apply a plan from disk and verify it again. Returns None if that fails, as a plan from disk is only a hint.

    Args:
        proven: whether it was proven for this same model, machine and workload. Then it serves as soon as it answers a
            request. One from another machine, or made otherwise, has yet to be proven here.
    """
    try:
        tuned = apply_and_verify(plan, bench, start, serve if proven else None, meter)
    except PlanError as error:
        log.warning("the kept plan is not used (%s); searching anew", error)
        return None
    keep(tuned, bench)
    return tuned


def keep(tuned: Tuned, bench: LiveBench) -> None:
    """Keep what a plan packed and recorded for the next process."""
    if bench.cached_as is not None:
        with optional("packed weights and recorded steps"):
            PackedWeights(bench.cached_as).save(tuned.variant)
            PlanPrograms(bench.cached_as, tuned.plan.transforms).save(tuned.variant)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """What only saves the next process time fails nothing: disk or memory may have run out."""
    try:
        yield
    except Exception as error:
        outside.pass_on(error)
        log.warning("%s are not kept for the next process: %s", what, first_line(error))


def apply_and_verify(
    plan: Plan, bench: LiveBench, start: float, serve: Callable[[Variant], None] | None, meter: busy.Meter
) -> Tuned:
    """Apply a plan from disk and verify it again.

    Args:
        serve: called with the variant before it is verified, and with the original if it does not hold; None for a plan
            that was never proven here, whose quality must then pass.
        plan, bench, start, meter: as for `replay`.

    Raises:
        PlanError: it cannot be applied, or does not hold.
    """
    if not plan.transforms and (doubt := doubts(plan.trials)):  # an earlier version saved every outcome
        raise PlanError(doubt)
    if not plan.transforms:
        seconds = time.monotonic() - start
        verdict = "kept the original, as the search that made this plan concluded"
        return Tuned(bench.original, plan, reverified(read(plan.summary), verdict=verdict, seconds=seconds), verdict)
    try:
        variant = build(plan, bench)
        if serve is not None:
            serve(variant)
        quality, latency = bench.prove(variant) if serve is None else bench.reverify(variant)
        report = read(plan.summary)  # shows all of it, for which nobody should wait
    except Exception as error:  # any error of an old plan leads to a fresh search
        outside.pass_on(error)
        if serve is not None:
            serve(bench.original)
        raise PlanError(f"it could not be applied: {type(error).__name__}: {error}") from error
    if latency is None or latency.verdict is not Verdict.PASS:
        if serve is not None:
            serve(bench.original)
        raise PlanError(f"it did not hold: {quality.reason if latency is None else latency.reason}")
    seconds = time.monotonic() - start
    verdict = (
        f"replayed and re-verified on short requests: {latency.reason}; a check of quality found mean KLD "
        f"{quality.mean_kld:.2g}, same top token {quality.same_top:.1%} on {quality.tokens} tokens"
    )
    again = reverified(report, verdict=verdict, seconds=seconds, elsewhere=meter.elsewhere())
    return Tuned(variant, plan, again, verdict)


def build(plan: Plan, bench: LiveBench) -> Variant:
    """Build the variant of a plan from disk and let it answer a request of the workload.

    Raises:
        TransformError: a transform is no longer available, or had no effect.
        CandidateError: the variant cannot answer.
    """
    variant = bench.original
    layers: Mapping[object, nn.Module] = {}
    recorded: AbstractContextManager[None] = nullcontext()
    if bench.cached_as is not None:
        layers = PackedWeights(bench.cached_as).restore(variant, plan.transforms)
        recorded = PlanPrograms(bench.cached_as, plan.transforms).reused()
    with reusing(layers=layers), recorded:
        variant = variant.copy()
        for transform in sorted(plan.transforms, key=lambda each: each.stage):
            if reason := transform.unavailable(variant, bench.hardware):
                raise TransformError(f"{transform}: {reason}")
            variant.add(transform)
            with sharding.alone(bench.original.original):
                missing = transform.took_effect(variant)
            if missing:
                raise TransformError(f"{transform} had no effect: {missing}")
    bench.answer(variant)
    return variant
