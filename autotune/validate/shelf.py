"""A store of tensors that are read rarely: some in memory, the others in an unlinked file."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..machine import cache_dir

MEMORY_BYTES = 32 * 2**20  # kept in memory; an exam's logits of SmolLM2-135M in half precision take 94 MB
FILE_BYTES = 2 * 2**30  # kept in the file, in addition to those in memory


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class Shelf(Mapping[str, torch.Tensor]):
    """Tensors by name. A lookup returns a CPU tensor: the kept one itself, or a new copy if it comes from the file.

    Args:
        memory_bytes: most bytes to keep in memory.
        file_bytes: most bytes to keep in a file of the cache folder, which is deleted with the shelf.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES, file_bytes: int = FILE_BYTES) -> None:
        self._room = memory_bytes
        self._file_room = file_bytes
        self._near: dict[str, torch.Tensor] = {}
        self._far: dict[str, _Place] = {}
        self._file: int | None = None  # the file's descriptor
        self._end = 0  # offset of the first unused byte in the file

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Shelf:
        """Return a shelf with these tensors; `tensors` itself if it is a shelf already."""
        if isinstance(tensors, Shelf):
            return tensors
        shelf = cls()
        for name, tensor in tensors.items():
            shelf.put(name, tensor)
        return shelf

    def put(self, name: str, tensor: torch.Tensor) -> bool:
        """Keep a tensor under a new name. Return whether there was room."""
        size = tensor.nbytes
        if size <= self._room:
            self._room -= size
            self._near[name] = tensor.cpu()
            return True
        if size > self._file_room:
            return False
        try:
            self._write(tensor.cpu())
        except OSError:  # usually a full disk: nothing more is written
            self._file_room = 0
            return False
        self._far[name] = _Place(self._end, tensor.shape, tensor.dtype)
        self._end += size
        self._file_room -= size
        return True

    def _write(self, tensor: torch.Tensor) -> None:
        if self._file is None:
            self._file, path = tempfile.mkstemp(prefix=".", dir=cache_dir.cache("references"))  # mode 0600
            weakref.finalize(self, os.close, self._file)
            os.unlink(path)
        rest = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        done = 0
        while done < len(rest):
            done += os.pwrite(self._file, rest[done:], self._end + done)

    def drop(self, name: str) -> None:
        """Remove a tensor. Its space in the file is not used again."""
        if (tensor := self._near.pop(name, None)) is not None:
            self._room += tensor.nbytes
        self._far.pop(name, None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        far = sum(place.shape.numel() * place.dtype.itemsize for place in self._far.values())
        return far + sum(tensor.nbytes for tensor in self._near.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._file is None or name not in self._far:
            return self._near[name]
        place = self._far[name]
        content = bytearray(place.shape.numel() * place.dtype.itemsize)
        done, view = 0, memoryview(content)
        while done < len(content):
            if not (count := os.preadv(self._file, [view[done:]], place.offset + done)):
                raise OSError("the file of kept logits was cut short")
            done += count
        return torch.frombuffer(content, dtype=place.dtype).view(place.shape)

    def __iter__(self) -> Iterator[str]:
        yield from self._near
        yield from self._far

    def __len__(self) -> int:
        return len(self._near) + len(self._far)
