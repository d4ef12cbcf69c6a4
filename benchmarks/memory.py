"""How much memory a plan of policy `memory` takes once the original is released, and while it serves.

    python -m benchmarks.memory
    python -m benchmarks.memory --plans INT8 --callers 1

SmolLM2-135M-Instruct in FP32. Every row is a process of its own: it loads the model, puts a plan on by hand, releases
the original and answers callers who ask at the same time. "Peak" is the most that was resident meanwhile, as the system
counts it (VmHWM), without what the process took once a tiny model of the same class had answered by the same plan:
Python, libraries, kernels, but not the pages of the model's file that had been looked at. "Weights" are the plan's
layers, and "cache" the keys and values of all tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from autotune import transforms
from autotune.cli import demo
from autotune.live.original import Original
from autotune.machine import device as devices
from autotune.machine import processor
from autotune.model import route, shrink
from autotune.model.linear_layers import stored_bytes
from autotune.model.load import load
from autotune.profile.survey import cache_bytes
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.workload import Workload
from benchmarks.serving import Parts, answer
from benchmarks.size_row import forget_peak
from benchmarks.table import grid
from benchmarks.worker import memory

COMMON: Parts = (
    ("packed_embedding", "both", {}),
    ("fused_layers", "prefill", {}),
    ("prefill_attention", "prefill", {"precision": "float32"}),
    ("prefill_parts", "prefill", {}),
    ("half_cache", "decode", {}),
    ("step_program", "decode", {}),
)
PLANS: dict[str, Parts] = {
    "INT4, lm_head in INT8": (("weight_only", "both", {"bits": 4, "wide": "lm_head"}), *COMMON),
    "INT8": (("weight_only", "both", {"bits": 8}), *COMMON),
}
NEW_TOKENS = 32
FIGURES = ("original", "weights", "released", "cache", "peak")


def put_on(model: Any, plan: str, prompt_tokens: int) -> Variant:
    work = Workload(((1,) * prompt_tokens,), NEW_TOKENS)
    chain = [transforms.make(name, given, phase) for name, phase, given in PLANS[plan]]
    return Variant(model, workload=work).with_transforms(chain)


def ask(variant: Variant, callers: int, prompt_tokens: int, tokens: int) -> None:
    """A prompt of random tokens by each of the callers, all at once."""
    served, draw = route.greedy(serving(variant), pad_token_id=0), random.Random(0)
    prompts = [draw.choices(range(3, variant.original.config.vocab_size), k=prompt_tokens) for _ in range(callers)]
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda prompt: answer(served, [prompt], tokens), prompts))


def mapped_bytes(suffix: str) -> int:
    """Resident bytes of mapped files with such a name."""
    found, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):  # a mapping's addresses begin its lines
            counted = line.endswith(suffix)
        elif counted and key == "Rss:":
            found += int(values[0]) * 1024
    return found


def measure(plan: str, callers: int, prompt_tokens: int) -> dict[str, int]:
    """Bytes by `FIGURES`."""
    model, _ = load(str(demo.model_file()))
    original = stored_bytes(model)
    ask(put_on(shrink.shrunk(model), plan, 40), callers, 40, 8)
    devices.of(model).trim()
    floor = memory()["rss_bytes"] - mapped_bytes(".safetensors")  # a mapped file's pages go with the original
    variant = put_on(model, plan, prompt_tokens)
    Original(model).release(variant)
    gc.collect()
    released = memory()["rss_bytes"] - floor
    forget_peak()
    ask(variant, callers, prompt_tokens, NEW_TOKENS)
    return {
        "original": original,
        "weights": stored_bytes(*variant.modules.values()),
        "released": released,
        "cache": cache_bytes(variant, callers, prompt_tokens + NEW_TOKENS),
        "peak": memory()["peak_bytes"] - floor,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--row", action="store_true", help="measure in this process and print JSON")
    given = parser.parse_args(arguments)
    if given.row:
        print(json.dumps(measure(given.plans[0], given.callers[0], given.prompt_tokens)))
        return 0
    rows = []
    for plan in given.plans:
        for callers in given.callers:
            asked = ["--row", "--plans", plan, "--callers", str(callers), "--prompt-tokens", str(given.prompt_tokens)]
            ran = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", *asked], stdout=subprocess.PIPE, check=True
            )
            found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
            needed = found["weights"] + found["cache"]
            share = f"{found['weights'] / found['original']:.3f}x"
            sizes = [f"{found[name] / 1e6:.0f}" for name in FIGURES[1:]]
            rows.append([plan, str(callers), share, *sizes, f"{found['peak'] / needed:.2f}x"])
    print(f"\n{processor.name()} ({processor.instruction_set()}), {torch.get_num_threads()} threads\n")
    heads = ["plan", "callers", "weights of FP32's", *(f"{name}, MB" for name in FIGURES[1:])]
    print(grid([*heads, "peak of weights and cache"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
