"""llama.cpp through llama-cpp-python's C functions: as little Python per token as its own tools have.

Files of other types are quantised from the given GGUF once. Some builds crash in the matrix kernels that repack weights
(`use_extra_bufts`), so a process of its own tries them first; where it dies, they are left out and a note says so.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp as llama
import numpy as np

from benchmarks.measures import Timing
from benchmarks.peers import Setup, Weights

NO_REPACKING = ".no-repacking"  # a file that says that the default crashed here
TRIED_TOKENS = 256  # of the trial's prompt: enough for the matrix kernels
TRIAL_S = 120
PHYSICAL_BATCH = 512  # llama.cpp's default
ROOM = 128  # tokens that a sequence's room is a multiple of


class Part(NamedTuple):
    """Tokens of a sequence, after `past` others."""

    sequence: int
    tokens: Sequence[int]
    past: int


class Context:
    """One llama_context: the cache of up to `sequences` sequences, and one batch to fill."""

    def __init__(self, model: llama.llama_model_p, threads: int, sequences: int, tokens: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = sequences * tokens
        params.n_batch = sequences * tokens
        params.n_ubatch = PHYSICAL_BATCH
        params.n_seq_max = sequences
        params.n_threads = threads
        params.n_threads_batch = threads
        self.pointer = llama.llama_init_from_model(model, params)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp made no context for {sequences} sequences of {tokens} tokens")
        self.batch = llama.llama_batch_init(sequences * tokens, 0, 1)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def clear(self) -> None:
        """Forget everything: no prefix is reused."""
        llama.llama_memory_clear(llama.llama_get_memory(self.pointer), True)

    def decode(self, tokens: Sequence[Sequence[int]], past: int, every: bool = False) -> None:
        """Compute the next tokens of each sequence, [B][T], after `past` others; logits of the last or of every one."""
        self.decode_parts([Part(sequence, row, past) for sequence, row in enumerate(tokens)], every)

    def decode_parts(self, parts: Sequence[Part], every: bool = False) -> None:
        """Compute the next tokens of some sequences."""
        batch, n = self.batch, 0
        for sequence, row, past in parts:
            for i, token in enumerate(row):
                batch.token[n], batch.pos[n] = token, past + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = every or i == len(row) - 1
                n += 1
        batch.n_tokens = n
        if code := llama.llama_decode(self.pointer, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def free(self, sequence: int) -> None:
        """Forget a sequence."""
        llama.llama_memory_seq_rm(llama.llama_get_memory(self.pointer), sequence, -1, -1)

    def logits(self, rows: Sequence[int]) -> np.ndarray:
        """[rows, V], a copy; rows are positions in the latest batch."""
        found = [llama.llama_get_logits_ith(self.pointer, row) for row in rows]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in found])

    def choose(self, width: int, sequences: int) -> list[list[int]]:
        """The greedy choice of each sequence, [B][1], after a batch of `width` tokens each."""
        last = [width * (sequence + 1) - 1 for sequence in range(sequences)]
        return [[int(row.argmax())] for row in self.logits(last)]


class Llama:
    def __init__(self, file: Path, setup: Setup, repacking: bool) -> None:
        llama.llama_log_set(_silent, ctypes.c_void_p(0))
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.use_extra_bufts = repacking
        self.setup = setup
        self.repacking = repacking
        self.model = llama.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self.contexts: dict[tuple[int, int], Context] = {}

    def context(self, sequences: int, tokens: int) -> Context:
        """The context for so many sequences of so many tokens; one sequence always gets room for the longest."""
        room = self.setup.longest if sequences == 1 else -(-tokens // ROOM) * ROOM
        if (sequences, room) not in self.contexts:
            self.contexts[sequences, room] = Context(self.model, self.setup.threads, sequences, room)
        return self.contexts[sequences, room]

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        count, width = len(prompts), len(prompts[0])
        context = self.context(count, width + new_tokens)
        start = time.perf_counter()
        context.clear()
        context.decode(prompts, 0)
        tokens = context.choose(width, count)
        first = time.perf_counter()
        for past in range(width, width + new_tokens - 1):
            context.decode(tokens, past)
            tokens = context.choose(1, count)
        return Timing(first - start, time.perf_counter() - start)

    def serve(self, asked: Sequence[Sequence[Sequence[int]]], new_tokens: int) -> list[float]:
        """As its server does it: a slot for each caller, and prompts in one batch with the others' next tokens."""
        context = self.context(len(asked), max(len(prompt) for prompts in asked for prompt in prompts) + new_tokens)
        start, ended = time.perf_counter(), list[float]()
        context.clear()
        waiting = [list(prompts) for prompts in asked]
        parts = [Part(caller, prompts.pop(0), 0) for caller, prompts in enumerate(waiting)]
        left = [new_tokens] * len(asked)
        while parts:
            context.decode_parts(parts)
            last = np.cumsum([len(part.tokens) for part in parts]) - 1
            chosen = context.logits(last.tolist()).argmax(-1)
            following = []
            for (caller, tokens, past), token in zip(parts, chosen.tolist(), strict=True):
                left[caller] -= 1
                if left[caller]:
                    following.append(Part(caller, [token], past + len(tokens)))
                    continue
                context.free(caller)
                ended.append(time.perf_counter() - start)
                if waiting[caller]:
                    following.append(Part(caller, waiting[caller].pop(0), 0))
                    left[caller] = new_tokens
            parts = following
        return ended

    def logits(self, ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        context = self.context(1, len(ids))
        context.clear()
        context.decode([ids], 0, every=True)
        return {"prefill": context.logits(range(len(ids) - 1))}

    def weights(self) -> Weights:
        size = int(llama.llama_model_size(self.model))
        return Weights(size, size)  # tied embeddings: every stored byte is read for each token

    def notes(self) -> list[str]:
        return [] if self.repacking else ["crashes here with its defaults, so it runs with use_extra_bufts=False"]


@llama.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None: ...


def path(setup: Setup, file_type: str) -> Path:
    """Where the file of this type is; the given one where it has the type already."""
    given = Path(setup.gguf)
    return given if given.stem.endswith(file_type) else Path(setup.files) / f"{given.stem}.{file_type}.gguf"


def quantise(setup: Setup, file_type: str) -> Path:
    """Make the file of this type unless there is one."""
    target = path(setup, file_type)
    if target.exists():
        return target
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.allow_requantize = True
    params.nthread = setup.threads
    draft = target.with_suffix(f".{os.getpid()}.draft")
    try:
        if code := llama.llama_model_quantize(setup.gguf.encode(), str(draft).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama_model_quantize to {file_type} returned {code}")
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def prepare(setup: Setup, file_type: str) -> None:
    """Quantise, and find out whether the default way of loading runs here."""
    file = quantise(setup, file_type)
    marker = _marker(setup, file)
    trial = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.llama", str(file), str(setup.threads)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=TRIAL_S,
        check=False,
    )
    if trial.returncode:
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def _marker(setup: Setup, file: Path) -> Path:
    return Path(setup.files) / (file.name + NO_REPACKING)


def create(setup: Setup, file_type: str) -> Llama:
    file = path(setup, file_type)
    return Llama(file, setup, repacking=not _marker(setup, file).exists())


if __name__ == "__main__":  # the trial: it may die
    tried = Setup("", "", "", int(sys.argv[2]), TRIED_TOKENS + 8)
    Llama(Path(sys.argv[1]), tried, repacking=True).generate([range(TRIED_TOKENS)], 2)
