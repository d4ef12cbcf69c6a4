"""The decode step as CUDA graphs that autotune captures itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..machine import device as devices
from ..model import linear_layers, placement
from ..model.configured import text_config
from ..runtime.loop import decode
from ..runtime.variant import Stage, Transform
from .static_cache import automatic_slots, over_few_slots, slot_bytes, slotless

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.steps.graphs import GraphSteps
    from ..runtime.variant import Variant
    from ..workload import Phase

LASTING = 2  # caches with graphs for each batch size; a third generation at the same time runs uncaptured


@dataclass(frozen=True)
class CudaGraph(Transform):
    """Capture a decode step over static slots, compiled or not, for batches of 1, 2, 4, ... and replay it.

    A batch in between is padded to the next size. A batch larger than all of them runs uncaptured.

    Args:
        largest: the largest batch to capture for; 0 means the workload's largest.
        shortest: slots that the shortest graph reads; each further graph reads twice as many, up to all slots.
        slots: tokens a sequence has room for; 0 means the same as in `static_cache`. Ignored if the cache is static
            already.
    """

    largest: int = 0
    shortest: int = 256
    slots: int = 0

    name: ClassVar[str] = "cuda_graph"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "the decode step captured as CUDA graphs, one launch a token, by batch and context"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.phase != "decode":
            raise ChoiceError("cuda_graph: phase must be 'decode'")
        if self.largest < 0 or self.slots < 0:
            raise ChoiceError("cuda_graph: largest and slots must be 0 (automatic) or more")
        if self.shortest < 1:
            raise ChoiceError(f"cuda_graph: shortest must be at least 1 slot, not {self.shortest}")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if reason := devices.of(variant.original).without_graphs():
            return reason
        return uncapturable(variant)

    def rehearsed(self) -> Transform:
        return over_few_slots()

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: only the time for moving data and for arithmetic remains."""
        return {"decode": ceilings.less_overhead(profile.phases["decode"], hardware)}

    def extra_bytes(self, variant: Variant) -> float:
        return slot_bytes(variant, self.slots)

    def apply(self, variant: Variant) -> None:
        from ..runtime.cache.pool import CachePool
        from ..runtime.steps.compiled import CompiledStep
        from ..runtime.steps.graphs import GraphSteps, buckets, lengths

        device = devices.of(variant.original)
        if reason := device.without_graphs() or uncapturable(variant):
            raise TransformError(reason)
        config = text_config(variant.original)
        slots = variant.caches.slots if variant.caches else self.slots or automatic_slots(variant)
        rows, reads = buckets(self.largest or max(variant.batch_sizes)), lengths(slots, self.shortest)
        tokens = min(variant.context_tokens, slots)
        inner = variant.step if isinstance(variant.step, CompiledStep) else None
        if inner is not None:  # each length costs a compilation, so two are enough: the workload's and the longest
            reads = tuple(sorted({next(read for read in reads if read >= tokens), slots}))
        variant.caches = CachePool(config, slots, rows, LASTING)
        variant.loop = decode
        steps = GraphSteps(variant.modules["decode"], device, rows, reads, inner)
        for batch in sorted({_bucket(rows, batch) for batch in variant.batch_sizes if batch <= rows[-1]}):
            with variant.running("decode"), variant.caches.lend(variant.example(batch), None) as cache:
                if inner is not None:
                    steps.look(cache)  # before the compilations, which take minutes
                    for read in reads:
                        inner.prepare(cache.first(read))
                with variant.turn():  # no request meanwhile: one that runs out of memory could not free this cache
                    steps.prepare(cache, tokens)
        variant.step = steps

    def took_effect(self, variant: Variant) -> str | None:
        from ..runtime.steps.graphs import GraphSteps

        if not isinstance(variant.step, GraphSteps):
            return "the decode step was not captured"
        return _missing(variant.step, variant.batch_sizes)


def uncapturable(variant: Variant) -> str | None:
    """Why this variant's decode step cannot be captured, or None."""
    from ..runtime.steps.compiled import CompiledStep

    if variant.step is not None and not isinstance(variant.step, CompiledStep):
        return "the decode step is captured or recorded already"
    if variant.kv is not None:
        return f"the KV cache is {variant.kv}, which does not stay at one address"
    if reason := variant.state.unseen("a captured step") or placement.unrecordable(variant.original):
        return reason
    model = variant.modules["decode"]
    places = {str(tensor.device) for tensor in chain(model.parameters(), model.buffers())}
    if len(places) > 1:
        return f"the model is on several devices ({', '.join(sorted(places))}); a graph belongs to one"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate's hooks move tensors at every call, which a graph does not repeat"
    if waiting := linear_layers.waiting(model):
        return waiting
    return slotless(variant)


def _bucket(rows: tuple[int, ...], batch: int) -> int:
    return next(size for size in rows if size >= batch)


def _missing(steps: GraphSteps, batch_sizes: tuple[int, ...]) -> str | None:
    captured = {rows for rows, _ in steps.shapes}
    wanted = {_bucket(steps.rows, batch) for batch in batch_sizes if batch <= steps.rows[-1]}
    if missing := sorted(wanted - captured):
        return f"no graph was captured for batches of {', '.join(map(str, missing))}"
    return None if steps.replays else "no graph was replayed"
