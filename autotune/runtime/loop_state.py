"""The sequences of a decoding loop so far: in the host's memory, or on a device that the host does not wait for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch.nn.functional import softmax

from ..model import seam

if TYPE_CHECKING:
    from ..machine.device import Device
    from ..model.seam import Sampling

Tokens = numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]  # [B]
ROOM = 64  # tokens, beyond as many as a prompt has
Look = Callable[[], tuple[torch.Tensor, bool]]  # waits -> token [B] on the host, whether all sequences are finished


class Room:
    """Sequences in the CPU's memory that grow, without an operator for each token.

    Args:
        ids: their first tokens, [B, T] int64.

    Attributes:
        length: tokens of each so far.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.length = ids.shape[1]
        self._held = torch.cat([ids, torch.empty(len(ids), self.length + ROOM, dtype=torch.int64, device="cpu")], dim=1)
        self._numbers = self._held.numpy()

    @property
    def ids(self) -> torch.Tensor:
        """All tokens so far, [B, T] int64. Later ones do not change it."""
        return self._held[:, : self.length].contiguous()  # as transformers' are, for processors that take a view

    def append(self, token: Any) -> None:
        """Append a token to each sequence: [B], or a number for all."""
        if self.length == self._held.shape[1]:
            self._held = torch.cat([self._held, torch.empty_like(self._held)], dim=1)
            self._numbers = self._held.numpy()
        self._numbers[:, self.length] = token
        self.length += 1


class LoopState(ABC):
    """The sequences of a call, of which the loop adds a token each at a time."""

    @property
    @abstractmethod
    def ids(self) -> torch.Tensor:
        """Prompt and tokens so far, [B, T] int64. Later tokens do not change it."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a sequence so far, T."""

    @abstractmethod
    def choose(self, scores: torch.Tensor, *, sampling: bool) -> torch.Tensor:
        """Choose the next token [B] of every sequence from its scores [B, V], and append it."""

    @abstractmethod
    def stop(self, scores: tuple[torch.Tensor, ...] | None) -> None:
        """Ask the criteria which sequences are finished. Further tokens of theirs are padding.

        Args:
            scores: of every token so far, [B, V] each; None if they are not kept.
        """

    @abstractmethod
    def look(self) -> Look:
        """Start bringing to the host what it has to see of the latest token."""

    @abstractmethod
    def position(self) -> torch.Tensor:
        """The position of the latest token, [B, 1] or [1, 1] int64."""


class HostState(LoopState):
    """Sequences in the CPU's memory.

    Between two steps, numpy does what operators would: each takes 10 to 50 us there, because the step has filled the
    processor's caches with weights.
    """

    def __init__(self, call: Sampling) -> None:
        self._room = Room(call.input_ids)
        self._going = numpy.ones(len(call.input_ids), bool)
        self._position = call.last_position.numpy()
        self._criteria, self._stops = call.criteria, seam.stops(call.criteria, self._room)
        pads = call.pads()
        self._pad = None if pads is None else pads.numpy()
        self._token = numpy.empty(0, numpy.int64)

    @property
    def ids(self) -> torch.Tensor:
        return self._room.ids

    @property
    def length(self) -> int:
        return self._room.length

    def choose(self, scores: torch.Tensor, *, sampling: bool) -> torch.Tensor:
        token = drawn(scores).numpy() if sampling else largest(scores)
        if self._pad is not None and not self._going.all():
            token = numpy.where(self._going, token, self._pad)
        self._room.append(token)
        self._position = self._position + 1
        self._token = token
        return torch.from_numpy(token)

    def stop(self, scores: tuple[torch.Tensor, ...] | None) -> None:
        if self._stops is None:
            ended = self._criteria(self.ids, scores).numpy().reshape(self._going.shape)
            self._going = self._going & (~ended & 1).astype(bool)  # a criterion may return 0 and 1
            return
        for row, token in enumerate(self._token.tolist()):
            if self._stops.after(self.length, token):
                self._going[row] = False

    def look(self) -> Look:
        return lambda: (torch.from_numpy(self._token), not self._going.any())

    def position(self) -> torch.Tensor:
        return torch.from_numpy(self._position)


class DeviceState(LoopState):
    """Sequences on a device that works on while the host goes on."""

    def __init__(self, call: Sampling, device: Device) -> None:
        self._ids, self._position, self._pads = call.input_ids, call.last_position, call.pads()
        self._criteria, self._device = call.criteria, device
        self._unfinished = torch.ones(len(self._ids), dtype=torch.long, device=self._ids.device)
        self._token = self._ids[:, -1]
        self._sound: torch.Tensor | None = None  # whether the scores that tokens were drawn from were sound, [B]

    @property
    def ids(self) -> torch.Tensor:
        return self._ids

    @property
    def length(self) -> int:
        return self._ids.shape[1]

    def choose(self, scores: torch.Tensor, *, sampling: bool) -> torch.Tensor:
        if sampling:
            token, self._sound = drawn_unwaiting(scores)
        else:
            token = scores.argmax(dim=-1)
        if self._pads is not None:
            token = token * self._unfinished + self._pads * (1 - self._unfinished)
        self._ids = torch.cat([self._ids, token[:, None]], dim=-1)
        self._position = self._position + 1
        self._token = token
        return token

    def stop(self, scores: tuple[torch.Tensor, ...] | None) -> None:
        self._unfinished = self._unfinished & ~self._criteria(self._ids, scores)

    def look(self) -> Look:
        """Start copying what the host has to see. The `Look` that is returned waits only for this copy.

        Raises (when looking):
            RuntimeError: the scores give no probabilities; the message is torch.multinomial's.
        """
        sound = [] if self._sound is None else [self._sound.long()]
        arrived = self._device.fetch(torch.stack([self._token, self._unfinished, *sound]))  # [2 or 3, B]

        def look() -> tuple[torch.Tensor, bool]:
            shown, going, *checked = arrived()
            if checked:
                require_sound(checked[0].numpy().all())
            return shown, not going.numpy().any()

        return look

    def position(self) -> torch.Tensor:
        return self._position


def drawn(scores: torch.Tensor) -> torch.Tensor:
    """Draw an index of every row of scores [B, V]; [B] int64."""
    return torch.multinomial(softmax(scores, dim=-1), num_samples=1).squeeze(1)


def drawn_by_one_number(scores: torch.Tensor) -> int:
    """Draw an index of scores [1, V] in the CPU's memory by one random number, where the cumulative chances pass it.

    `torch.multinomial` takes V random numbers: 1 ms for 49 152. From the same seed it draws others.

    Raises:
        RuntimeError: the scores give no probabilities.
    """
    reached = softmax(scores, dim=-1).numpy()[0].cumsum(dtype=numpy.float64)
    require_sound(numpy.isfinite(reached[-1]))
    number = float(torch.rand((), dtype=torch.float64, device="cpu")) * reached[-1]
    return min(int(reached.searchsorted(number, side="right")), len(reached) - 1)


def drawn_unwaiting(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw as `torch.multinomial` does, from the same random numbers, without waiting for the device.

    That function makes the host wait for its checks. After them it computes the index of the largest p / q with q from
    an exponential distribution, which is repeated here.

    Args:
        scores: [B, V].

    Returns:
        Tokens [B], and whether the scores were sound [B]. Both stay on the device.
    """
    odds = softmax(scores, dim=-1)
    waits = torch.empty_like(odds).exponential_()
    sound = (odds.amax(dim=-1) < torch.inf) & (odds.amin(dim=-1) >= 0)
    return (odds / waits).argmax(dim=-1), sound


def require_sound(sound: Any) -> None:
    """Raise torch.multinomial's RuntimeError if scores that a token was drawn from give no probabilities."""
    if not sound:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


def largest(scores: torch.Tensor) -> Tokens:
    """The index of the first largest score, or the first NaN, of every row [B, V] in the CPU's memory; [B]."""
    if scores.dtype in (torch.float32, torch.float64):
        found: Tokens = scores.numpy().argmax(-1)  # in a tenth of the operator's time
    else:
        found = scores.argmax(dim=-1).numpy()
    return found
