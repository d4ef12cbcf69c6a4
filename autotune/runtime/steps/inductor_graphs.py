"""The decode step compiled with inductor's own CUDA graphs ("reduce-overhead").

Inductor keeps the state of its graphs ("CUDA graph trees") per thread, so every step runs on the device's owner thread.
The next step overwrites the memory of a result, so results are copied out. Inductor copies an input at every step
unless its address is marked as constant. Keys and values are marked.

The first call compiles, which takes minutes. Other threads go on replaying graphs that autotune captured, and computing
without graphs. What needs the owner thread waits until that is done: calls of a plan with this step, and captures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AutotuneError, TransformError, first_line
from ...machine import outside
from ..cache.slot_forward import run
from ..cache.slots import Layout, SlotCache
from .compiled import LEAN, MODES, OPTIONS, layers_as_regions, require_private_cache
from .step import DecodeSteps, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...machine.device import Device

WARM_UPS = 2  # calls after the one that compiles, before use: the first warms up, the second records


@dataclass(frozen=True)
class _Compiled:
    """One compiled function, and a tensor with the shape of its result: logits [rows, V]."""

    function: Callable[..., torch.Tensor]
    logits: torch.Tensor


class InductorGraphStep(DecodeSteps):
    """Decode steps of one module as compiled functions with inductor's graphs, by the layout of a cache.

    A cache that is lent only once is not served, because its graphs would serve only one generation.

    Args:
        module: the decode module.
        device: the device of its weights.
        regions: as in `compiled.CompiledStep`.
    """

    def __init__(self, module: PreTrainedModel, device: Device, regions: bool = True) -> None:
        self.module = module
        self.device = device
        self.regions = regions
        self.replays = 0
        self._steps: dict[Layout, _Compiled] = {}

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, slots) of every compiled step."""
        return tuple((batch, slots) for batch, slots, *_ in self._steps)

    def prepare(self, cache: SlotCache) -> None:
        """Compile for this cache's layout, and record its graph.

        Raises:
            TransformError: the module cannot be compiled, or others can write to the compiler's cache; the message says
                which.
        """
        require_private_cache()
        guards = torch.compiler.skip_guard_on_all_nn_modules_unsafe  # the module is never edited again
        options = {"guard_filter_fn": guards, **LEAN, **OPTIONS[self.device.where.type], **MODES["reduce-overhead"]}
        compiler: Any = torch.compile  # torch's stubs know neither the options nor the last argument
        function = compiler(run, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True)
        token = torch.zeros(cache.shape[0], 1, dtype=torch.int64, device=cache.slot.device)
        _pin(cache)

        def called(times: int) -> torch.Tensor:
            with layers_as_regions(self.module, self.regions):
                for _ in range(times):
                    logits = self._call(function, token, token.clone(), cache)
            return torch.empty_like(logits)

        try:
            self.device.owner.run(partial(called, 1), queued=False)  # compiles
            self._steps[cache.layout] = _Compiled(function, self.device.owner.run(partial(called, WARM_UPS)))
        except AutotuneError:
            raise
        except Exception as error:  # dynamo, inductor and Triton may raise anything
            outside.pass_on(error)
            if self.device.failure(error) == "dead":
                raise self.device.mark_dead(error) from error
            raise TransformError(f"the decode step does not compile: {first_line(error)}") from error

    def forget(self) -> None:
        """Do nothing: inductor itself notices that parameters have moved, and records again."""

    def fitting(self, cache: SlotCache) -> Step | None:
        """The step compiled for this cache's layout, or None."""
        compiled = self._steps.get(cache.layout)
        if compiled is None or not cache.lasting:
            return None
        _pin(cache)

        def step(token: torch.Tensor, position: torch.Tensor, cache: SlotCache) -> torch.Tensor:
            with torch.inference_mode(False):  # the owner thread, which writes it, is not in inference mode
                out = torch.empty_like(compiled.logits)
            self.device.owner.run(lambda: out.copy_(self._call(compiled.function, token, position, cache)))
            self.replays += 1
            return out

        return step

    def _call(
        self, function: Callable[..., torch.Tensor], token: torch.Tensor, position: torch.Tensor, cache: SlotCache
    ) -> torch.Tensor:
        """Run one step, on the owner thread. The result is valid until the next call."""
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return function(self.module, token, position, cache.slot, cache.valid, cache.keys, cache.values)


def _pin(cache: SlotCache) -> None:
    """Tell inductor that the addresses of this cache's keys and values do not change."""
    for tensor in (*cache.keys, *cache.values):
        torch._dynamo.mark_static_address(tensor)
