"""Run one phase once, in a named range that NVIDIA's tools can select."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..machine import device as devices
from ..workload import PHASES
from .ncu import RANGES
from .timing import request

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..machine.device import Device
    from ..workload import Phase


class NvtxStreamer:
    """A transformers streamer that opens a range for prefill, and one for the token after the first."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._open = ExitStack()
        self._puts = 0

    def put(self, tokens: torch.Tensor) -> None:
        self._open.close()
        if self._puts < len(PHASES):  # generate passes the prompt first, then the tokens
            self._open.enter_context(self._device.range(RANGES[PHASES[self._puts]]))
        self._puts += 1

    def end(self) -> None:
        self._open.close()


def replay(model: PreTrainedModel, ids: torch.Tensor, phase: Phase) -> None:
    """Run a warm-up without a range, then a request that ends with the phase in question.

    Args:
        model: the model, run as it is.
        ids: prompts, [B, P] int64.
        phase: "prefill" is one call, "decode" one token after it.
    """
    device, new_tokens = devices.of(ids.device), {"prefill": 1, "decode": 2}[phase]
    request(model, ids, 2)()
    device.synchronize()
    ranges = NvtxStreamer(device)
    try:
        request(model, ids, new_tokens)(ranges)
    finally:
        ranges.end()
    device.synchronize()
