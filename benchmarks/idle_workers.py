"""Prefill in a second thread, beside the idle OpenMP workers of the first one, and after it has ended them.

    python -m benchmarks.idle_workers

A server loads and tunes a model in one thread and serves in others. GCC's OpenMP lets workers wait actively between two
parallel regions only while all threads' workers together are no more than the cores.
"""

from __future__ import annotations

import sys
import threading
import time
from statistics import median

import torch

from autotune import transforms
from autotune.cli import demo
from autotune.machine import intraop
from autotune.model import seam
from autotune.model.load import load
from autotune.runtime.variant import Variant
from autotune.workload import Workload, built_in
from benchmarks.serving import plan

TOKENS, TIMES, ROUNDS = 64, 10, 3


def main() -> int:
    model, tokenizer = load(str(demo.model_file()))
    prompt = (built_in.chats(tokenizer)[0] * 20)[:TOKENS]  # type: ignore[arg-type]
    chain = [transforms.make(name, params, phase) for name, phase, params in plan()]
    variant = Variant(model, workload=Workload((tuple(prompt),), 8)).with_transforms(chain)
    ids = torch.tensor([prompt])
    found: dict[str, list[float]] = {"the first thread": [], "a second, beside it": [], "a second, after `rest`": []}

    def measure(where: str) -> None:
        times = []
        for _ in range(TIMES):
            start, cache = time.perf_counter(), seam.growing_cache()
            with torch.no_grad(), variant.running("prefill") as module:
                module(input_ids=ids, logits_to_keep=1, **seam.over(model, cache))
            times.append(time.perf_counter() - start)
        found[where].append(median(times))

    def elsewhere(where: str) -> None:
        thread = threading.Thread(target=measure, args=(where,))
        thread.start()
        thread.join()

    first, beside, after = found
    for _ in range(ROUNDS):
        measure(first)
        elsewhere(beside)
        intraop.rest()
        elsewhere(after)
    print(
        f"prefill of {TOKENS} tokens, {torch.get_num_threads()} threads, medians of {ROUNDS} rounds [lowest, highest]"
    )
    for where, times in found.items():
        print(f"{where:24} {1e3 * median(times):6.1f} ms [{1e3 * min(times):.1f}, {1e3 * max(times):.1f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
