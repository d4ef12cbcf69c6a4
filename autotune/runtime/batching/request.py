"""One sequence of a caller in the engine: what it asked for, its tokens so far, and what comes back to its thread."""

from __future__ import annotations

import contextvars
import queue
import threading
from typing import TYPE_CHECKING, Any

import torch

from ...errors import AutotuneError, CancelledRequestError, RequestError, VariantError, first_line
from ...machine import device as devices
from ...machine import ending
from ...model import seam
from ..loop_state import Room, drawn, drawn_by_one_number, drawn_unwaiting, largest
from ..token_clock import never_waits
from .terms import CURRENT, RequestTerms

if TYPE_CHECKING:
    from ...model.seam import Sampling


def refusal(call: Sampling) -> str | None:
    """Why a call cannot be a request, so that it runs alone between two steps; or None."""
    if call.input_ids.shape[0] != 1:
        return "a batch that the caller made"
    if call.settings.return_dict_in_generate:
        return "return_dict_in_generate"
    if call.mask is not None and not bool(call.mask.all()):
        return "padding in a single sequence"
    positions = call.positions
    usual = torch.arange(positions.shape[-1], dtype=torch.int64, device=positions.device)
    return None if bool((positions == usual).all()) else "positions of the caller's"


class Request:
    """A call of generate's loop for one sequence.

    The caller's streamer is called in the caller's thread, unless it never waits. Its logits processors and stopping
    criteria are called in the engine's thread, within a copy of the caller's context variables.

    Attributes:
        prompt: its tokens.
        terms: on which it is served; those of the thread that makes it.
        is_ours: whether the thread that waits for it is one of autotune's.
        is_drawn: whether its token is drawn from the process's random numbers.
        is_greedy: whether its token is the largest logit, which the engine finds for all such rows at once.
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
        # What the caller's thread gets: tokens if it streams, then None for the end, or what the engine raised.
        self._events: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._kept_back = list[int]()  # tokens that are not handed on yet
        self._streams = call.streamer is not None
        self._at_once = never_waits(call.streamer)
        self._scored = call.scoring()
        self.is_drawn: bool = call.settings.do_sample
        self.is_greedy = not self.is_drawn and self._scored is None
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
                    case int(token):
                        self._show(token)
                    case None:
                        if streamer is not None:
                            streamer.end()
                        return self.ids.clone().to(self.call.input_ids.device)
                    case error:
                        raise error
        except BaseException:
            self._is_abandoned = True
            raise

    # In the engine's thread

    def violated(self, now_s: float) -> RequestError | None:
        """Why it must not be served any longer, or None."""
        if self._is_abandoned:
            return CancelledRequestError("the caller no longer waits")
        return self.terms.violated(now_s, self._room.length - len(self.prompt))

    def choose(self, logits: torch.Tensor, *, among_others: bool = False) -> int:
        """The next token from logits [1, V] on the host, by the caller's processors. Raises what these raise.

        Args:
            among_others: whether other sequences draw from the process's random numbers at the same time. So its answer
                could not be repeated anyway, and need not be drawn as slowly as transformers draws it.
        """
        score = self._scores(logits)
        if not self.is_drawn:
            return int(largest(score)[0])
        return drawn_by_one_number(score) if among_others else int(drawn(score))

    def chosen_unwaiting(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token from logits [1, V] on a device, which the host does not wait for.

        Returns:
            The token [1], and whether it could be drawn [1].
        """
        score = self._scores(logits)
        if self.is_drawn:
            return drawn_unwaiting(score)
        token = score.argmax(dim=-1)
        return token, torch.ones_like(token, dtype=torch.bool)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if self._scored is None:
            return logits
        # a copy: a processor may keep it beyond the next step
        score: torch.Tensor = self._context.run(self._scored, self._callers_ids, logits.clone())
        return score

    @property
    def _callers_ids(self) -> torch.Tensor:
        """Prompt and tokens so far, [1, T], where the caller's processors and criteria expect them."""
        return self.ids if self._on_device is None else self._on_device

    def take(self, token: int) -> bool:
        """Append a token, which `hand_on` gives to the caller.

        Returns:
            Whether the sequence is finished. Raises what a stopping criterion raises.
        """
        self._room.append(token)
        if self._on_device is not None and (self._scored is not None or self._stops is None):
            self._on_device = torch.cat([self._on_device, self._on_device.new_full((1, 1), token)], dim=1)
        if self._streams:
            self._kept_back.append(token)
        if self._stops is not None:
            return self._stops.after(self.tokens, token)
        stopped: Any = self._context.run(self.call.criteria, self._callers_ids, None)
        return bool(stopped.all())

    def hand_on(self) -> None:
        """Give the caller the tokens since the last time. A thread that wakes wants the interpreter's lock."""
        tokens, self._kept_back = self._kept_back, []  # none is shown again after a streamer raised
        for token in tokens:
            self._show(token) if self._at_once else self._events.put(token)

    def _show(self, token: int) -> None:
        self.call.streamer.put(torch.tensor([token], dtype=torch.int64, device="cpu"))

    def finish(self) -> None:
        self.hand_on()
        self._events.put(None)

    def fail(self, error: BaseException) -> None:
        self.hand_on()
        self._events.put(error)

    def fail_with_others(self, error: BaseException) -> None:
        """Fail with an error of its own: threads that raised the same object would all extend its traceback."""
        known = isinstance(error, AutotuneError)
        own = type(error)(str(error)) if known else VariantError(first_line(error))
        own.__cause__ = error
        self.fail(own)
