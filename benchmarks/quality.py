"""How far each runtime's next-token distributions are from the reference's on text that nothing was tuned on."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from autotune.validate.divergence import Divergence, compare_logits
from benchmarks.remote import Remote, WorkerError
from benchmarks.results import Quality

TEXTS = Path(__file__).with_name("held_out.txt")
TEXT_TOKENS = 96  # of each text
ANSWER_S = 300.0


def paragraphs(file: Path = TEXTS) -> list[str]:
    return [text for text in file.read_text(encoding="utf-8").split("\n\n") if text.strip()]


def compare(
    remotes: Mapping[str, Remote], reference: str, texts: Sequence[Sequence[int]], notify: Callable[[str], None]
) -> dict[str, dict[str, Quality]]:
    """Quality of each runtime but the reference, by the path that computed the logits.

    Args:
        remotes: the workers; empty where the reference is gone.
        reference: the name of the one that is right.
        texts: token ids.
    """
    found: dict[str, dict[str, list[Divergence]]] = defaultdict(lambda: defaultdict(list))
    silent: set[str] = set()
    if reference not in remotes:
        return {}
    for i, ids in enumerate(texts):
        notify(f"quality, text {i + 1} of {len(texts)}")
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            right = logits(remotes[reference], ids, folder)["prefill"]
            for name in remotes.keys() - {reference} - silent:
                try:
                    answers = logits(remotes[name], ids, folder)
                except WorkerError as error:
                    notify(f"{name} gives no logits: {error}")
                    silent.add(name)
                    continue
                for path, rows in answers.items():
                    found[name][path].append(diverge(right, rows, ids))
    return {name: {path: summary(parts) for path, parts in by.items()} for name, by in found.items()}


def logits(remote: Remote, ids: Sequence[int], folder: str) -> dict[str, np.ndarray]:
    """Logits by path, each read and removed."""
    files = remote.ask({"do": "logits", "ids": list(ids), "folder": folder}, ANSWER_S)
    rows = {path: np.load(file) for path, file in files.items()}
    for file in files.values():
        with suppress(OSError):
            Path(file).unlink()
    return rows


def diverge(reference: np.ndarray, rows: np.ndarray, ids: Sequence[int]) -> Divergence:
    """The last rows of the reference against the candidate's, [rows, V]; the last predicts the text's last token."""
    count = len(rows)
    return compare_logits(
        torch.from_numpy(reference[-count:]), torch.from_numpy(rows), torch.tensor(list(ids[-count:]))
    )


def summary(parts: Sequence[Divergence]) -> Quality:
    kld, gap = (np.concatenate([getattr(part, name) for part in parts]) for name in ("kld", "top_gap"))
    return Quality(float(kld.mean()), float((gap == 0).mean()), len(kld))
