"""Repeat requests under the device's clock and counters, separately for prefill and decode."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from ..machine.device.nvml import sampled
from ..workload import Phase

if TYPE_CHECKING:
    from ..machine.device import Device
    from ..machine.device.counters import Counters

OBSERVE_S = 0.5  # seconds of repetition per phase, because NVML's utilisation is a mean over up to a second
REPEATS = 200  # most repetitions, reached only by very short requests


@dataclass(frozen=True)
class DevicePhase:
    """One phase as the device saw it.

    Args:
        event_s: seconds of a call or token, measured between two events of the device.
        counters: readings during that time; None if the device has none.
    """

    event_s: float
    counters: Counters | None


def observe(
    device: Device,
    request: Callable[[int], object],
    new_tokens: int,
    turn: Callable[[], AbstractContextManager[object]],
) -> dict[Phase, DevicePhase]:
    """Observe prefill alone, then whole requests, which decode for most of their time.

    Args:
        device: the device that runs them.
        request: runs a request; it is called with the number of tokens to generate.
        new_tokens: tokens of a whole request, at least two.
        turn: encloses each request; it may wait for live requests, before the device's clock starts.
    """
    call_s, during_prefill = _repeated(device, lambda: request(1), turn)
    whole_s, during_decode = _repeated(device, lambda: request(new_tokens), turn)
    token_s = max(0.0, whole_s - call_s) / (new_tokens - 1)
    return {"prefill": DevicePhase(call_s, during_prefill), "decode": DevicePhase(token_s, during_decode)}


def _repeated(
    device: Device, work: Callable[[], object], turn: Callable[[], AbstractContextManager[object]]
) -> tuple[float, Counters | None]:
    seconds = list[float]()
    with sampled(device) as sampler:
        end = time.perf_counter() + (OBSERVE_S if sampler is not None and sampler.reads else 0)
        while not seconds or (time.perf_counter() < end and len(seconds) < REPEATS):
            with turn():
                seconds.append(device.seconds(work))
    return median(seconds), sampler.counters if sampler is not None else None
