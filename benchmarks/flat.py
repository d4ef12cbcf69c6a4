"""What torch takes to multiply a slice of a batch in BF16, and the same rows as a matrix (transforms/flat_linears.py).

    python -m benchmarks.flat

lm_head's part of a prefill: the last token's hidden states of each sequence, for a vocabulary as Llama 3's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from autotune.machine import processor
from benchmarks.table import grid

HIDDEN, VOCABULARY, TOKENS, ROUNDS = 2048, 128_256, 64, 3


def seconds(work: Callable[[], object]) -> float:
    work()
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def main() -> None:
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    rows = []
    with torch.inference_mode():
        for batch in (1, 2, 4):
            last = torch.randn(batch, TOKENS, HIDDEN, dtype=torch.bfloat16)[:, -1:]
            sliced = seconds(lambda last=last: linear(last, weight))  # type: ignore[misc]
            flat = seconds(lambda last=last: linear(last.reshape(-1, HIDDEN), weight))  # type: ignore[misc]
            rows.append([str(batch), f"{1e3 * sliced:.0f}", f"{1e3 * flat:.0f}", f"{sliced / flat:.0f}x"])
    print(f"{processor.name()} ({processor.instruction_set()}), torch {torch.__version__}, BF16")
    print(grid(["sequences", "slice, ms", "rows, ms", "times"], rows))


if __name__ == "__main__":
    main()
