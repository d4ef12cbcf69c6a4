"""A slot cache whose rows are independent: each has its own length, begins at slot 0 and is freed alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ...model.seam import growing_cache, keys_and_values
from .slots import SlotCache

if TYPE_CHECKING:
    from typing import Self


class RowCache(SlotCache):
    """Keys and values of several sequences that join and leave at any time.

    A row without a sequence admits no slot, so its attention is zero. A step writes its token into slot 0, which the
    next sequence overwrites.

    On a GPU nothing here makes the host wait: slots and validity are written in place, and a step that is captured over
    a view (`upper`) reads them where they are.

    Attributes:
        slot: [rows] int64, the slot of each row's next token.
        valid: [rows, slots] bool, False for a row without a sequence.
        lengths: valid tokens of each row; 0 for a row without a sequence.
    """

    def __init__(self, prompt: Any, slots: int, rows: int, dtype: torch.dtype | None = None) -> None:
        """Allocate with the shapes of a prefilled cache.

        Args:
            prompt: keys and values [1, Hk, P, D] per layer.
            slots: tokens that a row has room for.
            rows: number of rows.
            dtype: dtype of keys and values in slots; None means the prompt's.
        """
        super().__init__(prompt, slots, rows, dtype)
        with torch.inference_mode(False):
            self.slot = torch.zeros(rows, dtype=torch.int64, device=self.valid.device)
            self._taken = torch.zeros_like(self.slot)  # 1 for a row with a sequence
        self._look_at_slot()
        self._valid = None if self._slot is None else self.valid.numpy()
        self.valid.zero_()
        self.batch = rows
        self.lasting = True
        self.lengths = [0] * rows
        self._written = [0] * rows  # slots of each row that may hold numbers of an earlier sequence
        self._singles: dict[int, SlotCache] = {}
        self._rooms: dict[int, list[torch.Tensor]] = {}  # of each row: its keys and values [1, Hk, slots, D]

    def join(self, row: int, prompt: Any) -> None:
        """Begin a sequence in a free row: copy a prefilled cache.

        Args:
            prompt: keys and values [1, Hk, P, D] per layer.
        """
        filled = keys_and_values(prompt)
        length = filled[0][0].shape[2]
        self._copy(filled, row)
        self._begin(row, length)

    def copy_of(self, row: int) -> Any:
        """A prefilled cache with the tokens of a row, from which `join` begins the sequence again."""
        copied = growing_cache()
        for layer, (keys, values) in enumerate(self._held(row)):
            copied.update(keys.clone(), values.clone(), layer)
        return copied

    def _held(self, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of a row's keys and values [1, Hk, P, D] per layer."""
        here = slice(row, row + 1), slice(None), slice(self.lengths[row])
        return [(keys[here], values[here]) for keys, values in zip(self.keys, self.values, strict=True)]

    def leave(self, row: int) -> None:
        """Free a row."""
        self._place(row, 0)
        self.lengths[row] = 0

    def begin_all(self, prompt: Any) -> None:
        """Begin a sequence in every row, of one token or two in turn, so that a step can be tried.

        Args:
            prompt: keys and values of one token, [1, Hk, 1, D] per layer.
        """
        for row in range(len(self.lengths)):
            self.join(row, prompt)
            self._begin(row, 1 + row % 2)

    def move(self, source: int, target: int) -> None:
        """Move a sequence to a free row."""
        self._copy(self._held(source), target)
        self._begin(target, self.lengths[source])
        self.leave(source)

    def advance(self, count: int = 1, discarded: int = 0) -> None:
        """Make the next tokens valid, in every row that has a sequence. Steps have written them.

        Args:
            count: tokens of each row.
            discarded: slots after them that the steps may have written, too.
        """
        rows = self.shape[0]
        self.lengths[:rows] = [length + count if length else 0 for length in self.lengths[:rows]]
        for row, length in enumerate(self.lengths[:rows]):
            if length:
                self._written[row] = max(self._written[row], length + 1 + discarded)
        if self._slot is None:
            self.slot.add_(self._taken, alpha=count)
        else:
            self._slot[:rows] = self.lengths[:rows]

    @property
    def longest(self) -> int:
        return max(self.lengths[: self.shape[0]])

    def _copy(self, filled: Iterable[tuple[torch.Tensor, torch.Tensor]], row: int) -> None:
        """Write keys and values [1, Hk, P, D] per layer into a row."""
        if row not in self._rooms:  # a slice takes as long as a copy of a short prompt
            here = slice(row, row + 1)
            self._rooms[row] = [held[here] for pair in zip(self.keys, self.values, strict=True) for held in pair]
        given = [new for pair in filled for new in pair]
        rooms = zip(self._rooms[row], given, strict=True)
        torch._foreach_copy_([room.narrow(2, 0, new.shape[2]) for room, new in rooms], given)

    def _begin(self, row: int, length: int) -> None:
        if length < self._written[row]:
            self._clear(slice(row, row + 1), slice(length, self._written[row]))
        self._place(row, length)
        self.lengths[row] = length
        self._written[row] = length + 1  # a step writes the slot after the last valid one

    def _place(self, row: int, length: int) -> None:
        """Set a row's next slot; 0: it has no sequence."""
        if self._slot is not None and self._valid is not None:
            self._valid[row] = length > 0  # as for `SlotCache.advance`
            self._slot[row] = length
            return
        self.valid[row].fill_(length > 0)
        self.slot[row].fill_(length)
        self._taken[row].fill_(int(length > 0))

    def single(self, row: int) -> SlotCache:
        """A view of one row's sequence, which has as many valid tokens as now."""
        if row not in self._singles:
            one, here = SlotCache.__new__(SlotCache), slice(row, row + 1)
            one.given, one.lasting, one.left, one._capacity = self.given, False, None, self._capacity
            one.slot, one.valid, one.batch = self.slot[here], self.valid[here], 1
            one._look_at_slot()
            one.keys, one.values = ([held[here] for held in each] for each in (self.keys, self.values))
            self._singles[row] = one
        self._singles[row].length = self.lengths[row]
        return self._singles[row]

    def upper(self, rows: int) -> Self:
        """A view of the first `rows` rows, for a step of fewer sequences. Their lengths are those of this cache."""
        if rows == self.shape[0]:
            return self
        part = copy.copy(self)
        part.keys = [keys[:rows] for keys in self.keys]
        part.values = [values[:rows] for values in self.values]
        part.valid = self.valid[:rows]
        part.slot = self.slot[:rows]
        part._taken = self._taken[:rows]
        part.batch = rows
        return part
