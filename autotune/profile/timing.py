"""Time requests as they are served: a streamer records when each token comes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from ..machine import device as devices
from ..model import route

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..machine.device import Device

START, TICK = "autotune.request", "autotune.token"  # marks in a torch.profiler trace: request made, token out


@dataclass(frozen=True)
class RequestTimes:
    """The times at which a request was made and each of its tokens came out, in seconds of one clock."""

    start_s: float
    tokens_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.tokens_s[0] - self.start_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; needs two tokens."""
        return (self.tokens_s[-1] - self.tokens_s[0]) / (len(self.tokens_s) - 1)


class Stopwatch:
    """A transformers streamer that keeps times instead of tokens. generate first passes it the prompt."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.ticks: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        if tokens.device.type != "cpu":  # the tokens may still be being computed; the copy waits for them
            tokens.cpu()
        with record_function(TICK):
            self.ticks.append(self.clock())

    def end(self) -> None:
        """Do nothing: there is nothing to flush."""


def timed(run: Callable[[Stopwatch], object], device: Device, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Return when a request was made and when each of its tokens came out, in seconds of `clock`.

    The device first finishes the work queued before the request. A token counts as out when it has reached the host,
    the last one when the device has finished all work.

    Args:
        run: makes the request; it is called with a streamer.
        device: the device that runs it.
        clock: seconds of a monotonic clock.
    """
    watch = Stopwatch(clock)
    device.synchronize()
    with record_function(START):
        start = clock()
    run(watch)
    tokens = watch.ticks[1:]
    if device.asynchronous and tokens:
        device.synchronize()
        tokens[-1] = clock()
    return start, tokens


def time_request(
    served: PreTrainedModel,
    ids: torch.Tensor,
    new_tokens: int,
    turn: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> RequestTimes:
    """Generate exactly `new_tokens` tokens greedily for `ids` [B, P], and time them with `timed`.

    Args:
        served: the model as it will serve (`autotune.runtime.dispatch.serving`).
        ids: prompts of one length, [B, P] int64, without padding.
        new_tokens: tokens per sequence; no token ends it earlier.
        turn: encloses the request. Its wait for live requests ends before the clock, or a trace, starts.
    """
    with turn():
        start, tokens = timed(request(served, ids, new_tokens), devices.of(ids.device), time.perf_counter)
    return RequestTimes(start, tuple(tokens))


def request(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> Callable[..., None]:
    """Return a function that generates exactly `new_tokens` tokens greedily for `ids` [B, P]; it takes a streamer."""
    plain, mask = route.greedy(model, pad_token_id=0), torch.ones_like(ids)

    def run(streamer: Any = None) -> None:
        plain.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, streamer=streamer)  # type: ignore[operator]

    return run
