"""A recorded step over contexts of growing length, with keys and values in FP32 and in FP16 slots.

    python -m benchmarks.contexts

SmolLM2-135M-Instruct with INT8 weights. A text is read once by the original. Steps then go on from its beginnings,
token by token over the text itself. Both kinds of slots take turns; ratios are within a turn. Beside the times stand
the bytes that a token reads, the bandwidth that they come to, and how far FP16's logits are from FP32's.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median, quantiles
from typing import Any

import torch

from autotune import transforms
from autotune.cli import demo
from autotune.machine import processor
from autotune.model import seam
from autotune.model.load import load
from autotune.profile.survey import cache_bytes
from autotune.runtime.cache.slots import SlotCache
from autotune.runtime.variant import Variant
from autotune.validate.divergence import compare_logits
from autotune.workload import Workload
from autotune.workload.texts import TEXTS
from benchmarks.loaded import ratios
from benchmarks.peers.hugging_face import bytes_per_token
from benchmarks.table import grid

CONTEXTS = (64, 512, 1024, 2048, 4096, 8000)
SLOTS: dict[str, tuple[str, ...]] = {"FP32": (), "FP16": ("half_cache",)}
STEPS = 48  # tokens timed at each context

Step = Callable[[torch.Tensor, torch.Tensor, SlotCache], torch.Tensor]
Begun = dict[str, tuple[Step, SlotCache]]  # by kind of slots


def plans(model: Any, prompt: Sequence[int]) -> dict[str, Variant]:
    """A recorded step by kind of slots."""
    work = Workload((tuple(prompt),), STEPS)
    chains = {kind: ("weight_only", *caches, "step_program") for kind, caches in SLOTS.items()}
    return {
        kind: Variant(model, workload=work).with_transforms([transforms.make(name, {}, "decode") for name in chain])
        for kind, chain in chains.items()
    }


@torch.no_grad()
def read(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, Hk, T, D] of every layer, by the original."""
    cache = seam.growing_cache(model.config)
    for part in ids.split(512, dim=1):
        model(part, **seam.over(model, cache))
    return [(keys, values) for keys, values in seam.keys_and_values(cache)]


def begun(variant: Variant, prompt: Any, context: int) -> tuple[Step, SlotCache]:
    """The step, and slots that hold the text's first tokens."""
    assert variant.caches is not None
    assert variant.step is not None
    cut = seam.growing_cache()
    for layer, (keys, values) in enumerate(prompt):
        cut.update(keys[:, :, :context], values[:, :, :context], layer)
    cache = SlotCache(cut, variant.caches.slots, dtype=variant.slot_dtype)
    cache.fill(cut, None)
    step = variant.step.fitting(cache)
    assert step is not None
    return step, cache


@torch.no_grad()
def turns(steps: Begun, ids: torch.Tensor, context: int) -> tuple[dict[str, list[float]], float]:
    """Seconds a token by kind of slots, and the mean KL divergence of FP16 from FP32."""
    took: dict[str, list[float]] = {kind: [] for kind in steps}
    losses, draw = [], random.Random(0)
    for at in range(context, context + STEPS):
        token, position = ids[:, at : at + 1], torch.tensor([[at]])
        logits = {}
        for kind in draw.sample(list(steps), len(steps)):
            step, cache = steps[kind]
            start = time.perf_counter()
            logits[kind] = step(token, position, cache)
            took[kind].append(time.perf_counter() - start)
            cache.advance()
        losses.append(compare_logits(logits["FP32"], logits["FP16"], ids[0, at + 1 : at + 2]).kld.item())
    return took, fmean(losses)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens before the timed ones")
    given = parser.parse_args(arguments)
    loaded: tuple[Any, Any] = load(str(demo.model_file()))
    model, tokenizer = loaded
    once = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    needed = max(given.contexts) + STEPS + 1
    ids = torch.tensor([(once * (1 + needed // len(once)))[:needed]])
    found, prompt, rows = plans(model, once[:64]), read(model, ids[:, : max(given.contexts)]), []
    weights = bytes_per_token(found["FP32"].modules["decode"])
    for context in given.contexts:
        took, loss = turns({kind: begun(variant, prompt, context) for kind, variant in found.items()}, ids, context)
        cells = [f"{context}"]
        for kind, variant in found.items():
            moved, spent_s = weights + cache_bytes(variant, 1, context), median(took[kind])
            cells += [f"{1e3 * spent_s:.2f}", f"{moved / 1e6:.0f}", f"{moved / spent_s / 1e9:.1f}"]
        low, middle, high = quantiles(ratios(took["FP32"], took["FP16"]), n=4)
        rows.append([*cells, f"{middle:.2f}x ({low:.2f} to {high:.2f})", f"{loss:.1e}"])
    threads = torch.get_num_threads()
    print(f"\n{processor.name()} ({processor.instruction_set()}), {threads} threads, {STEPS} tokens each\n")
    heads = [f"{kind}, {unit}" for kind in found for unit in ("ms a token", "MB read", "GB/s")]
    print(grid(["context", *heads, "times as fast (quartiles)", "mean KLD"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
