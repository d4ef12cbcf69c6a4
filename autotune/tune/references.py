"""Keeps originals' exam answers between runs, so that the next tuning computes only the missing ones.

There is one file per exam, in safetensors format: logits in half precision; the header has the continuations, the
original's noise and a digest of everything. A file is used only if no one else could have written it, its digest is
right and it fits the exam. Any other file is a miss and is removed. Of two files written at the same time, the later
one stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch

from ..machine import cache_dir
from ..model import seam
from ..validate.answers import Answers
from ..validate.exam import Exam
from ..validate.shelf import Shelf
from . import codec
from .fingerprint import Fingerprint

log = logging.getLogger("autotune")

SCHEMA = 2  # raised whenever the same key would mean other answers, or the file layout changes
# Bytes of all files together: three tunings with two exams each. An exam of SmolLM2-135M takes 94 MB, or 244 MB if
# layers are compared.
MOST_BYTES = 1 << 30
DTYPE = "F16"  # safetensors' name of half precision
MOST_HEADER = 1 << 20  # bytes of the longest header; one for the logits of 128 texts has 30 kB
SHARE = 0.5  # share of MOST_BYTES that one exam may take, so that two fit


@dataclass(frozen=True)
class _About:
    """What a header contains besides the logits; see `Answers`."""

    own: tuple[tuple[int, ...], ...]
    noise: tuple[float, ...] | None


class References:
    """The answers of one model on one machine.

    Args:
        identity: the fingerprint; only its model, hardware and versions count.
    """

    def __init__(self, identity: Fingerprint) -> None:
        self._said_by = [identity.model, identity.hardware, dict(identity.versions)]

    def path(self, exam: Exam) -> Path | None:
        """Path of the file for an exam's answers, existing or not; None if there is no lasting cache."""
        asked = [asdict(exam.size), exam.prompts, exam.pad_token_id, exam.eos_token_ids, exam.seed]
        key = json.dumps([SCHEMA, self._said_by, seam.experts(exam.original), _precision(), asked], sort_keys=True)
        folder = cache_dir.cache("references", lasting=True)
        return folder and folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"

    def restore(self, exam: Exam) -> bool:
        """Give the kept answers to `exam.take`. Returns whether there were answers that fit."""
        if (path := self.path(exam)) is None:
            return False
        try:
            with cache_dir.opened(path, int(SHARE * MOST_BYTES)) as (file, size):
                exam.take(_parsed(file, size))
        except FileNotFoundError:
            return False
        except Exception as error:  # a damaged file must cost only the time to compute the answers again
            log.debug("what is kept in %s is removed: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return False
        with suppress(OSError):
            os.utime(path, follow_symlinks=False)  # the least recently used go first
        return True

    def save(self, exam: Exam) -> None:
        """Save the original's answers if there are new ones."""
        if (answers := exam.answers()) is None or (path := self.path(exam)) is None:
            return
        names, most_bytes, size_bytes = sorted(answers.logits), SHARE * MOST_BYTES, Shelf.of(answers.logits).nbytes
        head = _head(answers) if size_bytes <= most_bytes else b""  # _head reads all logits
        if (size_bytes := size_bytes + len(head)) > most_bytes:
            log.debug("an exam's answers are not kept: %.0f MB are more than fits", size_bytes / 1e6)
            return
        try:
            _make_room(path.parent, size_bytes)
            cache_dir.write(path, chain([head], (_bytes(answers.logits[name]) for name in names)))
            _make_room(path.parent, 0)  # others may have written meanwhile
        except OSError as error:
            log.debug("an exam's answers are not kept: %s", error)


def _precision() -> list[str]:
    """The process's settings that allow float32 matmuls in lower precision."""
    mkldnn: Any = torch.backends.mkldnn  # a class stands in for the module, unknown to mypy
    return [torch.backends.cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision]


def _head(answers: Answers) -> bytes:
    """The first bytes of a file. The logits follow by name, one at a time, because together they may be large."""
    about = codec.dumps(_About(answers.own, answers.noise))
    header: dict[str, Any] = {"__metadata__": {"about": about, "digest": _digest(about, answers.logits)}}
    start = 0
    for name in sorted(answers.logits):
        logits = answers.logits[name]
        header[name] = {"dtype": DTYPE, "shape": list(logits.shape), "data_offsets": [start, start + logits.nbytes]}
        start += logits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


def _parsed(file: IO[bytes], size: int) -> Answers:
    """Read the answers from a file of `size` bytes.

    Raises:
        ValueError: the file is incomplete, was changed, or does not have the layout that `_head` describes.
        Exception: any other error from parsing a file that was not written here.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, MOST_HEADER):
        raise ValueError(f"it begins with {length}, which is not the length of a header")
    header = json.loads(file.read(length))
    metadata, logits, start = header.pop("__metadata__"), Shelf(), 0
    for name in sorted(header):
        shape, (first, last) = header[name]["shape"], header[name]["data_offsets"]
        whole = all(type(n) is int and 0 < n <= size for n in shape)
        if header[name]["dtype"] != DTYPE or not whole or first != start or last - first != 2 * math.prod(shape):
            raise ValueError(f"{name} is {header[name]}, which is no {DTYPE} from {start} on")
        if last + 8 + length > size:
            raise ValueError(f"{name} ends at {last} of {size} bytes")
        content = bytearray(file.read(last - first))
        if not logits.put(name, torch.frombuffer(content, dtype=torch.float16).view(shape)):
            raise ValueError(f"there is no room for {name}")
        start = last
    if start + 8 + length != size:
        raise ValueError(f"its data ends at {start} of {size} bytes")
    if metadata["digest"] != _digest(metadata["about"], logits):
        raise ValueError("it is torn or was changed")
    about: _About = codec.decode(_About, codec.loads(metadata["about"]), "it")
    return Answers(about.own, about.noise, logits)


def _digest(about: str, logits: Mapping[str, torch.Tensor]) -> str:
    """Digest of everything that is read from a file."""
    seen = hashlib.blake2b(about.encode(), digest_size=32)
    for name in sorted(logits):
        content = logits[name]
        seen.update(f"\n{name} {content.dtype} {list(content.shape)}\n".encode())
        seen.update(_bytes(content))
    return seen.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory."""
    return tensor.contiguous().view(torch.uint8).numpy().data


def _make_room(folder: Path, coming_bytes: int) -> None:
    """Remove the least recently used files until `coming_bytes` more fit, and remove leftovers of killed processes."""
    cache_dir.sweep(folder.glob(".*"))
    found = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process removed it
            status = path.lstat()
            found.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in found) + coming_bytes - MOST_BYTES
    for _, size, path in sorted(found):
        if excess > 0 and not path.name.startswith("."):  # those are being written
            with suppress(OSError):
                path.unlink()
                excess -= size
