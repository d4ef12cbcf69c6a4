"""Prefill of short prompts as CUDA graphs, into the slots that decode reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..machine import device as devices
from ..model.configured import text_config
from ..model.twins import fork
from ..runtime.variant import Stage, Transform
from .cuda_graph import immovable

if TYPE_CHECKING:
    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase

SHORTEST = 32  # tokens of the shortest graph
GRAPH_BYTES = 10e6  # of device memory for a graph of 32 layers, besides what it computes with


@dataclass(frozen=True)
class CapturePrefill(Transform):
    """Capture prefill of single sequences for 32, 64, ... tokens, and replay the shortest that holds the prompt.

    Keys and values go straight into the slots. Longer prompts, batches and padded prompts run uncaptured, compiled if
    prefill is.

    Args:
        longest: tokens of the longest graph, at most the slots. What computes longer prompts takes longer than
            launching it.
    """

    longest: int = 512

    name: ClassVar[str] = "capture_prefill"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "prefill of short prompts captured as CUDA graphs that write into the static slots"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.phase != "prefill":
            raise ChoiceError("capture_prefill: phase must be 'prefill'")
        if self.longest < SHORTEST:
            raise ChoiceError(f"capture_prefill: longest must be at least {SHORTEST} tokens, not {self.longest}")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if reason := devices.of(variant.original).without_graphs():
            return reason
        if variant.prompts is not None:
            return "prefill is captured already"
        if 1 not in variant.batch_sizes:
            return f"it serves single sequences; the workload has batches of {', '.join(map(str, variant.batch_sizes))}"
        shortest = min(map(len, variant.workload.prompts)) if variant.workload else 0
        if shortest > self.longest:
            return f"it captures up to {self.longest} tokens; the workload's prompts have {shortest} and more"
        if variant.caches is None:
            return "it writes keys and values into static slots, and decode reads none yet"
        return immovable(variant, "prefill")

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: only the time for moving data and for arithmetic remains."""
        return {"prefill": ceilings.less_overhead(profile.phases["prefill"], hardware)}

    def extra_bytes(self, variant: Variant) -> float:
        """Graphs, and the activations of the longest one, whose memory the others share."""
        if variant.caches is None:
            return 0.0
        config = text_config(variant.original)
        hidden: int = config.hidden_size
        wide: int = getattr(config, "intermediate_size", None) or 4 * hidden
        numbers = min(self.longest, variant.caches.slots) * (8 * hidden + 3 * wide)
        return len(self._lengths(variant)) * variant.caches.lasting * GRAPH_BYTES + 4.0 * numbers

    def apply(self, variant: Variant) -> None:
        from ..runtime.steps.captures import capture_all
        from ..runtime.steps.prompts import PromptGraphs

        device, pool = devices.of(variant.original), variant.caches
        if reason := device.without_graphs() or immovable(variant, "prefill"):
            raise TransformError(reason)
        if pool is None:
            raise TransformError("it writes keys and values into static slots, and decode reads none")
        module = variant.modules["prefill"]
        if "forward" in vars(module):  # compiled, for growing caches
            module = fork(module)
        graphs = PromptGraphs(module, device, (1,), self._lengths(variant))
        needed = min(variant.context_tokens, graphs.lengths[-1])
        with variant.running("prefill"):
            capture_all(graphs, pool, {1: variant.example(1)}, needed, variant.turn)
        variant.prompts = graphs

    def took_effect(self, variant: Variant) -> str | None:
        if variant.prompts is None:
            return "prefill was not captured"
        if not variant.prompts.shapes:
            return "no graph was captured"
        return None if variant.prompts.replays else "no graph was replayed"

    def _lengths(self, variant: Variant) -> tuple[int, ...]:
        """Tokens of each graph."""
        from ..runtime.steps.captures import lengths

        return lengths(min(self.longest, variant.caches.slots if variant.caches is not None else 0), SHORTEST)
