"""The latest token of every row, and the choice of the next ones: in the host's memory, or on a device.

On a device, tokens are chosen where the logits are, those of greedy rows together. The next step reads them there. The
host waits once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING

import numpy
import torch

from ...errors import VariantError
from ...machine import outside
from ..loop_state import largest, require_sound

if TYPE_CHECKING:
    from ...machine.device import Device
    from .request import Request

Choice = int | Exception | None  # of a row: its token, why it has none, or that it has no sequence


class RowTokens(ABC):
    """The latest token of every row.

    Args:
        rows: number of rows.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._held = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def first(self, rows: int) -> torch.Tensor:
        """The tokens of the first rows, [rows, 1], which the next choice overwrites."""
        return self._held[:rows]

    @abstractmethod
    def __getitem__(self, row: int) -> int: ...

    @abstractmethod
    def __setitem__(self, row: int, token: int) -> None: ...

    @abstractmethod
    def after_prompt(self, request: Request, logits: torch.Tensor) -> int:
        """The first token of a sequence, from its prompt's logits [1, V]. Raises what the caller's processors raise."""

    @abstractmethod
    def choose(self, requests: Sequence[Request | None], logits: torch.Tensor) -> list[Choice]:
        """Choose the next token of every row that has a sequence, by its caller's processors, and keep it.

        Args:
            requests: of each row; None where a row is free.
            logits: [rows, V].
        """


class HostTokens(RowTokens):
    """Tokens in the CPU's memory, between steps that leave no time for operators."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows, torch.device("cpu"))
        self._numbers = self._held.numpy()  # the same memory
        self._rows = numpy.arange(rows)

    def __getitem__(self, row: int) -> int:
        return int(self._numbers[row, 0])

    def __setitem__(self, row: int, token: int) -> None:
        self._numbers[row] = token

    def after_prompt(self, request: Request, logits: torch.Tensor) -> int:
        return request.choose(logits)

    def choose(self, requests: Sequence[Request | None], logits: torch.Tensor) -> list[Choice]:
        best = largest(logits)
        most = logits.numpy()[self._rows[: len(best)], best].tolist()  # NaN if any logit is
        greedy, found = best.tolist(), list[Choice]()
        several = sum(request is not None and request.is_drawn for request in requests) > 1
        for row, request in enumerate(requests):
            try:
                if request is None:
                    found.append(None)
                    continue
                require_number(request, is_number=not isnan(most[row]))
                token = (
                    greedy[row] if request.is_greedy else request.choose(logits[row : row + 1], among_others=several)
                )
                self[row] = token
                found.append(token)
            except Exception as error:  # of the caller's processors, or NaN: it concerns this row alone
                outside.pass_on(error)
                found.append(error)
        return found


class DeviceTokens(RowTokens):
    """Tokens on a device, which the host sees after it waited for them.

    Args:
        device: works on while the host goes on.
        where: of the tokens.
    """

    def __init__(self, rows: int, device: Device, where: torch.device) -> None:
        super().__init__(rows, where)
        self._device = device
        self._seen = [0] * rows

    def __getitem__(self, row: int) -> int:
        return self._seen[row]

    def __setitem__(self, row: int, token: int) -> None:
        self._held[row].fill_(token)
        self._seen[row] = token

    def after_prompt(self, request: Request, logits: torch.Tensor) -> int:
        token, sound = request.chosen_unwaiting(logits)
        (shown,), (is_sound,) = self._device.fetch(torch.stack([token, sound.long()]))().tolist()
        require_sound(is_sound)
        return int(shown)

    def choose(self, requests: Sequence[Request | None], logits: torch.Tensor) -> list[Choice]:
        token, is_number = logits.argmax(dim=-1), ~logits.amax(dim=-1).isnan()  # both [rows]
        sound, failed = torch.ones_like(is_number), dict[int, Exception]()
        for row, request in enumerate(requests):
            if request is None or request.is_greedy:
                continue
            here = slice(row, row + 1)
            try:
                own, own_sound = request.chosen_unwaiting(logits[here])
                token[here].copy_(own)
                sound[here].copy_(own_sound)
            except Exception as error:  # of the caller's processors: it concerns this row alone
                outside.pass_on(error)
                failed[row] = error
        self._held[: len(token)].copy_(token[:, None])
        arrived = self._device.fetch(torch.stack([token, is_number.long(), sound.long()]))
        return [
            self._arrived(row, requests[row], failed.get(row), *each) for row, each in enumerate(arrived().T.tolist())
        ]

    def _arrived(
        self, row: int, request: Request | None, failure: Exception | None, token: int, is_number: int, sound: int
    ) -> Choice:
        if request is None or failure is not None:
            return failure
        try:
            require_number(request, is_number=bool(is_number))
            require_sound(sound)
        except Exception as error:
            return error
        self._seen[row] = token
        return token


def require_number(request: Request, *, is_number: bool) -> None:
    """Raise VariantError if a sequence's logits are NaN."""
    if not is_number:
        raise VariantError(f"NaN logits at token {request.tokens}")
