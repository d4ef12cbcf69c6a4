"""Tensors in a file of the cache, in safetensors' format, with a digest of everything that is read back.

The header holds a text about them. What a damaged or foreign file says is checked before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from ..machine import cache_dir
from .fingerprint import content

log = logging.getLogger("autotune")

Found = TypeVar("Found")

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "U8": torch.uint8,
}  # by safetensors' names
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 1 << 20  # bytes of the longest header; one for 500 tensors has 60 kB

Room = Callable[..., torch.Tensor]  # (shape, dtype=, device=) -> an empty tensor, as `torch.empty` makes it


def path_in(folder: Path | None, made_of: Sequence[Any]) -> Path | None:
    """Path of a file in a folder, existing or not; None without a folder.

    Args:
        made_of: everything that its content depends on, as JSON.
    """
    key = json.dumps(made_of, sort_keys=True)
    return folder and folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"


def head(about: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The first bytes of a file with a text and these tensors, all of which it reads."""
    header, seen, start = dict[str, Any](), _Digest(about), 0
    for name in sorted(tensors):
        tensor = tensors[name]
        seen.add(name, tensor)
        end = start + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    header["__metadata__"] = {"about": about, "digest": seen.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


def keep(path: Path, first: bytes, tensors: Mapping[str, torch.Tensor], size_bytes: int, most_bytes: int) -> None:
    """Write tensors of the CPU, all or nothing, if that can be done; the least recently used files make room.

    Args:
        first: the file's first bytes, from `head`.
        tensors: each is looked up when its turn comes, as together they may be large.
        size_bytes: of all of the file.
        most_bytes: of all files of the folder together.
    """
    if len(first) > MOST_HEADER:
        log.debug("%s is not kept: its header has %d bytes", path, len(first))
        return
    try:
        _make_room(path.parent, size_bytes, most_bytes)
        cache_dir.write(path, chain([first], (_bytes(tensors[name]) for name in sorted(tensors))))
        _make_room(path.parent, 0, most_bytes)  # others may have written meanwhile
    except OSError as error:
        log.debug("%s is not kept: %s", path, error)


def restored(path: Path, most_bytes: int, use: Callable[[IO[bytes], int], Found]) -> Found | None:
    """Return what `use` makes of a file, open, and its size; None if there is none.

    A file that is not this user's alone, or that `use` raises for, is a miss and is removed: it must cost only the time
    to do without.

    Args:
        most_bytes: of the file.
    """
    try:
        with cache_dir.opened(path, most_bytes) as (file, size):
            found = use(file, size)
    except FileNotFoundError:
        return None
    except Exception as error:
        log.debug("what is kept in %s is removed: %s", path, error)
        with suppress(OSError):
            path.unlink()
        return None
    with suppress(OSError):
        os.utime(path, follow_symlinks=False)  # the least recently used go first
    return found


def read(file: IO[bytes], size: int, put: Callable[[str, torch.Tensor], None], room: Room = torch.empty) -> str:
    """Read a file of `size` bytes. Returns its text.

    Args:
        put: takes each tensor by name, one at a time; what it took is of no use if an error follows.
        room: makes an empty tensor of a shape and a dtype on the CPU.

    Raises:
        ValueError: the file is incomplete, was changed, or does not have the layout that `write` gives it.
        Exception: any other error from parsing a file that was not written here.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, MOST_HEADER):
        raise ValueError(f"it begins with {length}, which is not the length of a header")
    header = json.loads(file.read(length))
    metadata, start = header.pop("__metadata__"), 0
    for name in sorted(header):
        shape, (first, last) = header[name]["shape"], header[name]["data_offsets"]
        whole = all(type(n) is int and 0 < n <= size for n in shape)
        dtype = DTYPES.get(header[name]["dtype"])
        if dtype is None or not whole or first != start or last - first != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name} is {header[name]}, which is no tensor from {start} on")
        if last + 8 + length > size:
            raise ValueError(f"{name} ends at {last} of {size} bytes")
        start = last
    if start + 8 + length != size:
        raise ValueError(f"its data ends at {start} of {size} bytes")
    about: str = metadata["about"]
    seen = _Digest(about)
    for name in sorted(header):
        tensor = room(header[name]["shape"], dtype=DTYPES[header[name]["dtype"]], device=torch.device("cpu"))
        if file.readinto(_bytes(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{name} is cut short")
        seen.add(name, tensor)
        put(name, tensor)
    if metadata["digest"] != seen.hexdigest():
        raise ValueError("it is torn or was changed")
    return about


def _make_room(folder: Path, coming_bytes: int, most_bytes: int) -> None:
    """Remove the least recently used files until `coming_bytes` more fit, and remove leftovers of killed processes.

    Args:
        most_bytes: of all files together.
    """
    cache_dir.sweep(folder.glob(".*"))
    found = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process removed it
            status = path.lstat()
            found.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in found) + coming_bytes - most_bytes
    for _, size, path in sorted(found):
        if excess > 0 and not path.name.startswith("."):  # those are being written
            with suppress(OSError):
                path.unlink()
                excess -= size


class _Digest:
    """Digest of everything that is read from a file: of its text, then of each tensor in the order of their names."""

    def __init__(self, about: str) -> None:
        self._seen = hashlib.blake2b(about.encode(), digest_size=32)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._seen.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for part in content(name, tensor):
            self._seen.update(part)

    def hexdigest(self) -> str:
        return self._seen.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory; of one that is not contiguous, a copy's."""
    view: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return view.cast("B")
