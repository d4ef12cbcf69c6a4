"""Keeps originals' exam answers between runs, so that the next tuning computes only the missing ones.

There is one file per exam, in safetensors format: logits in half precision; the header has the continuations, the
original's noise and a digest of everything. A file is used only if no one else could have written it, its digest is
right and it fits the exam. Any other file is a miss and is removed. Of two files written at the same time, the later
one stays.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..machine import cache_dir
from ..model import seam
from ..validate.answers import Answers
from ..validate.exam import Exam
from ..validate.shelf import Shelf
from . import codec, tensor_file
from .fingerprint import Fingerprint

log = logging.getLogger("autotune")

SCHEMA = 3  # raised whenever the same key would mean other answers, or the file layout changes
# Bytes of all files together: three tunings with two exams each. An exam of SmolLM2-135M takes 94 MB, or 244 MB if
# layers are compared.
MOST_BYTES = 1 << 30
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
        made_of = [SCHEMA, self._said_by, seam.experts(exam.original), _precision(), asked]
        return tensor_file.path_in(cache_dir.cache("references", lasting=True), made_of)

    def restore(self, exam: Exam) -> bool:
        """Give the kept answers to `exam.take`. Returns whether there were answers that fit."""
        if (path := self.path(exam)) is None:
            return False

        def take(file: IO[bytes], size: int) -> bool:
            exam.take(_read(file, size))
            return True

        return tensor_file.restored(path, int(SHARE * MOST_BYTES), take) or False

    def save(self, exam: Exam) -> None:
        """Save the original's answers if there are new ones."""
        if (answers := exam.answers()) is None or (path := self.path(exam)) is None:
            return
        most_bytes, size_bytes, first = SHARE * MOST_BYTES, Shelf.of(answers.logits).nbytes, b""
        if size_bytes <= most_bytes:  # the head takes reading all logits
            first = tensor_file.head(codec.dumps(_About(answers.own, answers.noise)), answers.logits)
        if (size_bytes := size_bytes + len(first)) > most_bytes:
            log.debug("an exam's answers are not kept: %.0f MB are more than fits", size_bytes / 1e6)
            return
        tensor_file.keep(path, first, answers.logits, size_bytes, MOST_BYTES)


def _precision() -> list[str]:
    """The process's settings that allow float32 matmuls in lower precision."""
    mkldnn: Any = torch.backends.mkldnn  # a class stands in for the module, unknown to mypy
    return [torch.backends.cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision]


def _read(file: IO[bytes], size: int) -> Answers:
    """The answers in a file of `size` bytes.

    Raises:
        Exception: it holds something else; see `tensor_file.read`.
    """
    logits = Shelf()

    def put(name: str, each: torch.Tensor) -> None:
        if each.dtype != torch.float16:
            raise ValueError(f"{name} is in {each.dtype}, not in half precision")
        if not logits.put(name, each):
            raise ValueError(f"there is no room for {name}")

    about: _About = codec.decode(_About, codec.loads(tensor_file.read(file, size, put)), "it")
    return Answers(about.own, about.noise, logits)
