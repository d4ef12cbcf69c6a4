"""The decode step compiled with inductor's own CUDA graphs ("reduce-overhead").

Inductor keeps the state of its graphs ("trees" of them) by thread, so every step runs on the device's owner thread. Its
results lie in memory that the next step overwrites, so they are copied out. Addresses that it was not told to be
constant it copies at every step; keys and values it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AutotuneError, TransformError, first_line
from ...machine import outside
from ..cache.slots import SlotCache, run
from .compiled import LEAN, MODES, layers_as_regions, require_private_cache
from .step import DecodeSteps, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...machine.device import Device

WARM_UPS = 3  # one compiles, one warms up, one records


@dataclass(frozen=True)
class _Compiled:
    """One function, and what its result looks like: logits [rows, V]."""

    function: Callable[..., torch.Tensor]
    logits: torch.Tensor


class InductorGraphStep(DecodeSteps):
    """Decode steps of one module as compiled functions with graphs of their own, by the layout of a cache.

    A cache that is lent only once is not served: its graphs would be recorded for one generation.

    Args:
        module: the decode module.
        device: where its weights lie.
        regions: as in `compiled.CompiledStep`.
    """

    def __init__(self, module: PreTrainedModel, device: Device, regions: bool = True) -> None:
        self.module, self.device, self.regions = module, device, regions
        self.replays = 0
        self._steps: dict[tuple[int, int, int], _Compiled] = {}

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, slots) of every step there is."""
        return tuple((batch, slots) for batch, slots, _ in self._steps)

    def prepare(self, cache: SlotCache) -> None:
        """Compile for this cache's layout, and record its graph.

        Raises:
            TransformError: the module cannot be compiled, in a sentence, or others can write to the compiler's cache.
        """
        require_private_cache()
        guards = torch.compiler.skip_guard_on_all_nn_modules_unsafe  # the module is never edited again
        options = {"guard_filter_fn": guards, **LEAN, **MODES["reduce-overhead"]}
        compiler: Any = torch.compile  # its stubs know neither the options nor the last argument
        function = compiler(run, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True)
        token = torch.zeros(cache.shape[0], 1, dtype=torch.int64, device=cache.slot.device)
        _pin(cache)

        def record() -> torch.Tensor:
            with layers_as_regions(self.module, self.regions):
                for _ in range(WARM_UPS):
                    logits = self._call(function, token, token.clone(), cache)
            return torch.empty_like(logits)

        try:
            self._steps[cache.layout] = _Compiled(function, self.device.owner.run(record))
        except AutotuneError:
            raise
        except Exception as error:  # dynamo, inductor and Triton raise what they like
            outside.pass_on(error)
            if self.device.failure(error) == "dead":
                raise self.device.mark_dead(error) from error
            raise TransformError(f"the decode step does not compile: {first_line(error)}") from error

    def forget(self) -> None:
        """Inductor notices by itself where parameters have moved, and records anew."""

    def fitting(self, cache: SlotCache) -> Step | None:
        """The step compiled for this cache's layout, or None."""
        compiled = self._steps.get(cache.layout)
        if compiled is None or not cache.lasting:
            return None
        _pin(cache)

        def step(token: torch.Tensor, position: torch.Tensor, cache: SlotCache) -> torch.Tensor:
            with torch.inference_mode(False):  # written by the owner thread, which is not in the caller's mode
                out = torch.empty_like(compiled.logits)
            self.device.owner.run(lambda: out.copy_(self._call(compiled.function, token, position, cache)))
            self.replays += 1
            return out

        return step

    def _call(
        self, function: Callable[..., torch.Tensor], token: torch.Tensor, position: torch.Tensor, cache: SlotCache
    ) -> torch.Tensor:
        """On the owner thread. The result is valid until the next call."""
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return function(self.module, token, position, cache.slot, cache.valid, cache.keys, cache.values)


def _pin(cache: SlotCache) -> None:
    """Tell inductor that this cache's keys and values stay where they are."""
    for tensor in (*cache.keys, *cache.values):
        torch._dynamo.mark_static_address(tensor)
