"""One sequence of a caller in the engine: what it asked for, its tokens so far, and what comes back to its thread."""

from __future__ import annotations

import contextvars
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AutotuneError, CancelledRequestError, RequestError, VariantError, first_line
from ...machine import device as devices
from ...machine import ending
from ...model import seam
from ..loop_state import Room, drawn, drawn_unwaiting, largest
from .terms import CURRENT, RequestTerms

if TYPE_CHECKING:
    from ...model.seam import Sampling


@dataclass(frozen=True)
class Token:
    """A new token [1], for the caller's streamer."""

    token: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """The whole sequence [1, P + new]."""

    ids: torch.Tensor


@dataclass(frozen=True)
class Failed:
    """What the engine raised for this request."""

    error: BaseException


class Request:
    """A call of generate's loop for one sequence.

    The caller's streamer is called in the caller's thread. Its logits processors and stopping criteria are called in
    the engine's thread, within a copy of the caller's context variables.

    Attributes:
        prompt: its tokens.
        terms: on which it is served; those of the thread that makes it.
        is_ours: whether the thread that waits for it is one of autotune's.
        queued: the end of what the caller's thread had queued on the device, which made the prompt.
    """

    def __init__(self, call: Sampling) -> None:
        device = devices.of(call.input_ids.device)
        self.call = call
        self.queued = device.mark()
        self._room = Room(call.input_ids.cpu())
        self._on_device = None if device.is_host else call.input_ids
        self.prompt: tuple[int, ...] = tuple(self._room.ids[0].tolist())
        self.terms = CURRENT.get() or RequestTerms()
        self.is_ours = isinstance(threading.current_thread(), ending.Worker)
        self._is_abandoned = False  # the terms live on: the original may answer after the engine failed
        self._context = contextvars.copy_context()
        self._events: queue.SimpleQueue[Token | Finished | Failed] = queue.SimpleQueue()
        self._streams = call.streamer is not None
        self._processes = call.processes()
        self._stops = seam.stops(call.criteria, self._room)

    @property
    def ids(self) -> torch.Tensor:
        """Prompt and tokens so far, [1, T] int64 on the host. Later tokens do not change it."""
        return self._room.ids

    @property
    def tokens(self) -> int:
        """Tokens of its sequence so far."""
        return self._room.length

    # In the caller's thread

    def wait(self) -> torch.Tensor:
        """Wait for the sequence, and pass tokens to the streamer as they come.

        Returns:
            ids [1, P + new].

        Raises:
            What the engine raised for this request, or what the streamer raises.
        """
        streamer = self.call.streamer
        try:
            while True:
                match self._events.get():
                    case Token(token):
                        streamer.put(token)
                    case Finished(ids):
                        if streamer is not None:
                            streamer.end()
                        return ids.to(self.call.input_ids.device)
                    case Failed(error):
                        raise error
        except BaseException:
            self._is_abandoned = True
            raise

    # In the engine's thread

    def violated(self, now_s: float) -> RequestError | None:
        """Why it must not be served any longer, or None."""
        if self._is_abandoned:
            return CancelledRequestError("the caller no longer waits")
        return self.terms.violated(now_s, self.tokens - self.call.input_ids.shape[1])

    @property
    def is_greedy(self) -> bool:
        """Whether its token is the largest logit, which the engine finds for all such rows at once."""
        return not (self.call.settings.do_sample or self._processes)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from logits [1, V] on the host, by the caller's processors. Raises what these raise."""
        score = self._scores(logits)
        return int(drawn(score) if self.call.settings.do_sample else largest(score)[0])

    def chosen_unwaiting(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token from logits [1, V] on a device, which the host does not wait for.

        Returns:
            The token [1], and whether it could be drawn [1].
        """
        score = self._scores(logits)
        if self.call.settings.do_sample:
            return drawn_unwaiting(score)
        token = score.argmax(dim=-1)
        return token, torch.ones_like(token, dtype=torch.bool)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        given = logits.clone() if self._processes else logits  # a processor may keep it beyond the next step
        score: torch.Tensor = self._context.run(self.call.processors, self._callers_ids, given)
        return score

    @property
    def _callers_ids(self) -> torch.Tensor:
        """Prompt and tokens so far, [1, T], where the caller's processors and criteria expect them."""
        return self.ids if self._on_device is None else self._on_device

    def take(self, token: int) -> bool:
        """Append a token. Returns whether the sequence is finished. Raises what a stopping criterion raises."""
        self._room.append(token)
        if self._on_device is not None and (self._processes or self._stops is None):
            self._on_device = torch.cat([self._on_device, self._on_device.new_full((1, 1), token)], dim=1)
        if self._streams:
            self._events.put(Token(torch.tensor([token], dtype=torch.int64, device="cpu")))
        if self._stops is not None:
            return self._stops.after(self.tokens, token)
        stopped: Any = self._context.run(self.call.criteria, self._callers_ids, None)
        return bool(stopped.all())

    def finish(self) -> None:
        self._events.put(Finished(self.ids.clone()))

    def fail(self, error: BaseException) -> None:
        self._events.put(Failed(error))

    def fail_with_others(self, error: BaseException) -> None:
        """Fail with an error of its own: threads that raised the same object would all extend its traceback."""
        known = isinstance(error, AutotuneError)
        own = type(error)(str(error)) if known else VariantError(first_line(error))
        own.__cause__ = error
        self.fail(own)
