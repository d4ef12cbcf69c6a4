"""What originals said in exams, kept between runs: tuning anew asks for what is missing alone.

A file an exam, in safetensors format: logits in half precision, and in its header the continuations, the original's own
noise and a digest of everything. It is believed only where no one else could have written it, its digest is right and
it fits the exam; any other file is a miss, and is removed. Of two that are written at once, the later one stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import codec, folders, seam
from .plan import Fingerprint
from .validate.answers import Answers
from .validate.exam import Exam

log = logging.getLogger("autotune")

SCHEMA = 2  # raised whenever the same key would mean other answers, or a file is laid out differently
# Of all files. An exam of SmolLM2-135M is 94 MB, 244 MB where layers are compared: three tunings with two exams each.
MOST_BYTES = 1 << 30
SHARE = 0.5  # of them that one exam may take; larger ones would leave no room for a second


@dataclass(frozen=True)
class _About:
    """What a header says beside the logits; see `Answers`."""

    own: tuple[tuple[int, ...], ...]
    noise: tuple[float, ...] | None


class References:
    """The answers of one model on one machine.

    Args:
        identity: model, hardware and versions count, workload and policy do not.
    """

    def __init__(self, identity: Fingerprint) -> None:
        self._said_by = [identity.model, identity.hardware, dict(identity.versions)]

    def path(self, exam: Exam) -> Path | None:
        """Where the answers to an exam are or would be; None where nothing lasts."""
        asked = [asdict(exam.size), exam.prompts, exam.pad_token_id, exam.eos_token_ids, exam.seed]
        key = json.dumps([SCHEMA, self._said_by, seam.experts(exam.original), _precision(), asked], sort_keys=True)
        folder = folders.cache("references", lasting=True)
        return folder and folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"

    def restore(self, exam: Exam) -> bool:
        """Hand what is kept to `exam.take`; whether there was anything that fits."""
        if (path := self.path(exam)) is None:
            return False
        try:
            exam.take(_parsed(folders.read(path, int(SHARE * MOST_BYTES))))
        except FileNotFoundError:
            return False
        except Exception as error:  # a damaged file must cost the time to ask again, nothing more
            log.debug("what is kept in %s is removed: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return False
        with suppress(OSError):
            os.utime(path, follow_symlinks=False)  # the least recently used go first
        return True

    def save(self, exam: Exam) -> None:
        """Keep what the original has said, where that is more than there was."""
        if (answers := exam.answers()) is None or (path := self.path(exam)) is None:
            return
        parts = _laid_out(answers)
        size_bytes = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)
        if size_bytes > SHARE * MOST_BYTES:
            log.debug("an exam's answers are not kept: %.0f MB are more than fits", size_bytes / 1e6)
            return
        try:
            _make_room(path.parent, size_bytes)
            folders.write(path, *parts)
            _make_room(path.parent, 0)  # others may have written meanwhile
        except OSError as error:
            log.debug("an exam's answers are not kept: %s", error)


def _precision() -> list[str]:
    """Settings of the process by which matrices of float32 are multiplied in less."""
    mkldnn: Any = torch.backends.mkldnn  # a class stands in for the module, unknown to mypy
    return [torch.backends.cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision]


def _laid_out(answers: Answers) -> list[bytes | memoryview]:
    """A file's parts, without a copy of the logits."""
    about, logits = codec.dumps(_About(answers.own, answers.noise)), _bytes(answers.logits)
    header: dict[str, Any] = {"__metadata__": {"about": about, "digest": _digest(about, answers.logits)}}
    start = 0
    for name, content in logits.items():
        shape = list(answers.logits[name].shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, start + content.nbytes]}
        start += content.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return [len(text).to_bytes(8, "little"), text, *logits.values()]


def _parsed(content: bytes) -> Answers:
    """The answers in a file.

    Raises:
        ValueError: it is torn or was changed.
        Exception: whatever parsing what was never written here runs into.
    """
    from safetensors.torch import load

    logits = load(content)  # checks that shapes and offsets are those of the data, before any memory is taken
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    metadata = json.loads(header)["__metadata__"]
    if metadata["digest"] != _digest(metadata["about"], logits):
        raise ValueError("it is torn or was changed")
    about: _About = codec.decode(_About, codec.loads(metadata["about"]), "it")
    return Answers(about.own, about.noise, logits)


def _digest(about: str, logits: Mapping[str, torch.Tensor]) -> str:
    """Of everything that is believed."""
    seen = hashlib.blake2b(about.encode(), digest_size=32)
    for name, content in sorted(_bytes(logits).items()):
        seen.update(f"\n{name} {logits[name].dtype} {list(logits[name].shape)}\n".encode())
        seen.update(content)
    return seen.hexdigest()


def _bytes(logits: Mapping[str, torch.Tensor]) -> dict[str, memoryview]:
    """The memory of each."""
    return {name: t.contiguous().view(torch.uint8).numpy().data for name, t in logits.items()}


def _make_room(folder: Path, coming_bytes: int) -> None:
    """Remove the least recently used until so much more fits, and what killed processes left."""
    folders.sweep(folder.glob(".*"))
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
