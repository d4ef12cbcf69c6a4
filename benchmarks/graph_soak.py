"""Graphs captured, replayed and dropped for minutes, beside another thread's eager requests: `make soak-gpu`.

Tuning does this: a trial is captured while the plan before it serves, then one of the two goes. A variant must go on
answering as it did when it was new, whatever else was captured or dropped since, and memory must not grow.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autotune import transforms
from autotune.machine import device as devices
from autotune.model import route
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.workload import Workload
from benchmarks.gpu_shapes import random_model, random_prompts

ALIVE = 3  # variants at most
TOKENS = 24
GROWTH_BYTES = 64 * 2**20  # of the second half over the first; a leaked graph of this model takes tens of megabytes


@dataclass(eq=False)
class Living:
    """A variant and what it answered when it was new, by prompt."""

    served: Any
    answers: dict[int, list[int]]


def ask(served: Any, prompt: list[int], device: str) -> list[int]:
    ids = torch.tensor([prompt], device=device)
    out = served.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS)
    return out[0].tolist()


def made(model: Any, prompts: list[list[int]], draw: random.Random, device: str) -> Living:
    """A new variant with graphs of a random shape."""
    chain = [transforms.make("cuda_graph", {"shortest": draw.choice((64, 128, 256))}, "decode")]
    if draw.random() < 0.5:
        chain.append(transforms.make("merged_linears", {}, "decode"))
    work = Workload(tuple(map(tuple, prompts)), TOKENS, draw.choice(((1,), (1, 2), (1, 4))))
    served = route.greedy(serving(Variant(model, workload=work).with_transforms(chain)), pad_token_id=0)
    return Living(served, {n: ask(served, prompt, device) for n, prompt in enumerate(prompts)})


def soak(device: str, seconds: float, layers: int, seed: int) -> tuple[int, int, int, list[str]]:
    """Returns (variants made, answers checked, bytes grown in the second half, what went wrong)."""
    draw, model = random.Random(seed), random_model("1b", device, layers)
    prompts = [p[: 8 + 70 * n] for n, p in enumerate(random_prompts(model.config.vocab_size, 300, 4))]
    plain, stop, wrong = route.greedy(model, pad_token_id=0), threading.Event(), list[str]()
    expected = [ask(plain, prompt, device) for prompt in prompts]

    def beside() -> None:
        where = torch.cuda.Stream(device) if device.startswith("cuda") else None
        with torch.cuda.stream(where):
            while not stop.is_set():
                for prompt, right in zip(prompts, expected, strict=True):
                    if ask(plain, prompt, device) != right:
                        wrong.append("the original answered otherwise while graphs were captured")

    eager = threading.Thread(target=beside)
    eager.start()
    living, count, checked, half = list[Living](), 0, 0, 0
    began = time.perf_counter()
    try:
        while (spent := time.perf_counter() - began) < seconds and len(wrong) < 5:
            if len(living) >= ALIVE or (living and draw.random() < 0.3):
                living.pop(draw.randrange(len(living)))
                gc.collect()
                devices.of(device).trim()
            else:
                living.append(made(model, prompts, draw, device))
                count += 1
            for number, each in enumerate(living):
                for n, prompt in enumerate(prompts):
                    checked += 1
                    if ask(each.served, prompt, device) != each.answers[n]:
                        wrong.append(
                            f"variant {number} of {len(living)} answers prompt {n} otherwise than when it was new"
                        )
            if not half and spent > seconds / 2:
                half = held(device)
    finally:
        stop.set()
        eager.join()
    return count, checked, held(device) - half, wrong


def held(device: str) -> int:
    """Bytes of this process's tensors on the device."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make soak-gpu BENCH_ARGS=...", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args(arguments)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 1
    count, checked, grown, wrong = soak(asked.device, asked.seconds, asked.layers, asked.seed)
    print(f"{count} variants captured, {checked} answers checked, {len(wrong)} wrong")
    print(f"{grown / 2**20:+.0f} MiB in the second half")
    for each in wrong:
        print(each)
    return 1 if wrong or grown > ALIVE * GROWTH_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
