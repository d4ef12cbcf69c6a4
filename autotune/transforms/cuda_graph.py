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
    from ..runtime.variant import Variant
    from ..workload import Phase

LASTING = 2  # caches with graphs for each batch size, if memory allows; further calls at once run uncaptured


@dataclass(frozen=True)
class CudaGraph(Transform):
    """Capture a decode step over static slots, compiled or not, for the workload's batch sizes, and replay it.

    They are rounded up to powers of two. A batch in between is padded to the next size. A batch larger than all of them
    runs uncaptured.

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
        from ..runtime.steps.captures import buckets

        return slot_bytes(variant, self._slots(variant), sum(buckets(variant.batch_sizes, self.largest)), anew=True)

    def apply(self, variant: Variant) -> None:
        from ..runtime.cache.pool import CachePool
        from ..runtime.cache.slots import SlotCache
        from ..runtime.steps.captures import buckets, capture_all, lengths
        from ..runtime.steps.compiled import CompiledStep
        from ..runtime.steps.graphs import GraphSteps

        device = devices.of(variant.original)
        if reason := device.without_graphs() or uncapturable(variant):
            raise TransformError(reason)
        config = text_config(variant.original)
        slots = self._slots(variant)
        rows, reads = buckets(variant.batch_sizes, self.largest), lengths(slots, self.shortest)
        tokens = min(variant.context_tokens, slots)
        inner = variant.step if isinstance(variant.step, CompiledStep) else None
        if inner is not None:  # each length costs a compilation, so two are enough: the workload's and the longest
            reads = tuple(sorted({next(read for read in reads if read >= tokens), slots}))
        variant.caches = CachePool(config, slots, rows, LASTING)
        variant.loop = decode
        steps = GraphSteps(variant.modules["decode"], device, rows, reads, inner)
        prompts = {batch: variant.example(batch) for batch in rows}
        with variant.running("decode"):
            if inner is not None:
                for prompt in prompts.values():
                    cache = SlotCache(prompt, slots)
                    steps.look(cache)  # before the compilations, which take minutes
                    for read in reads:
                        inner.prepare(cache.first(read))
            capture_all(steps, variant.caches, prompts, tokens, variant.turn)
        variant.step = steps

    def _slots(self, variant: Variant) -> int:
        return variant.caches.slots if variant.caches else self.slots or automatic_slots(variant)

    def took_effect(self, variant: Variant) -> str | None:
        from ..runtime.steps.graphs import GraphSteps

        if not isinstance(variant.step, GraphSteps):
            return "the decode step was not captured"
        if missing := sorted(set(variant.step.rows) - {rows for rows, _ in variant.step.shapes}):
            return f"no graph was captured for batches of {', '.join(map(str, missing))}"
        return None if variant.step.replays else "no graph was replayed"


def uncapturable(variant: Variant) -> str | None:
    """Why this variant's decode step cannot be captured, or None."""
    from ..runtime.steps.compiled import CompiledStep

    if variant.step is not None and not isinstance(variant.step, CompiledStep):
        return "the decode step is captured or recorded already"
    if variant.prompts is not None:
        return "prefill is captured already, into the slots that decode has now"
    return immovable(variant, "decode")


def immovable(variant: Variant, phase: Phase) -> str | None:
    """Why what computes a phase over slots cannot be captured, or None."""
    if variant.kv is not None:
        return f"the KV cache is {variant.kv}, which does not stay at one address"
    if reason := variant.state.unseen("what is captured") or placement.unrecordable(variant.original):
        return reason
    model = variant.modules[phase]
    places = {str(tensor.device) for tensor in chain(model.parameters(), model.buffers())}
    if len(places) > 1:
        return f"the model is on several devices ({', '.join(sorted(places))}); a graph belongs to one"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate's hooks move tensors at every call, which a graph does not repeat"
    if waiting := linear_layers.waiting(model):
        return waiting
    return slotless(variant, phase)
