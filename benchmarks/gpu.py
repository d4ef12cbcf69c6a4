"""What tuning does to a model of 8 billion parameters on a GPU: `make bench-gpu`.

Prints autotune's report (per-operation tables before and after, every trial per batch size, the noise of the machine)
and writes it as report.json and report.md. Without `--model` the weights are random; see `benchmarks.gpu_shapes`.
`--paper` prints what a token must read by each variant, and needs no GPU; see `benchmarks.gpu_steps`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import gpu_steps
from benchmarks.gpu_shapes import SHAPES, random_model, random_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPTS = 40


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-gpu BENCH_ARGS=...", description=__doc__)
    parser.add_argument("--model", help="directory of a checkpoint; default: random weights in the shape of 8B")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the random model")
    parser.add_argument("--layers", type=int, help="of the random model; default: the shape's")
    parser.add_argument("--policy", default="latency")
    parser.add_argument("--batches", help="batch sizes, the first one counts for the objective; default: 1,8")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--budget", type=float, default=1500.0, help="seconds of tuning")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--paper", action="store_true", help="bytes and roofline alone; needs no GPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench-gpu"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options(arguments)
    if asked.paper:
        return gpu_steps.main(["--paper", *_shared(asked)])
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu --layers 1 tries the script itself", file=sys.stderr)
        return 1
    from dataclasses import replace

    import autotune
    from autotune.model.load import load
    from autotune.tune import policy

    tokenizer = None
    if asked.model:
        model, tokenizer = load(asked.model, device=asked.device)
    else:
        model = random_model(asked.shape, asked.device, asked.layers)
    batches = tuple(map(int, (asked.batches or "1,8").split(",")))
    prompts = random_prompts(model.config.vocab_size, asked.prompt_tokens, PROMPTS)
    work = autotune.Workload(tuple(map(tuple, prompts)), new_tokens=asked.new_tokens, batch_sizes=batches)
    chosen = replace(policy.load(asked.policy), budget_s=asked.budget)
    wrapped: Any = autotune.wrap(
        model, tokenizer=tokenizer, workload=work, policy=chosen, when="blocking", cache=False, progress=print
    )
    report = wrapped.autotune.report()
    report.to_terminal()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, text in {"report.json": report.to_json(), "report.md": report.to_markdown()}.items():
        (asked.out / name).write_text(text, encoding="utf-8")
    return 0


def _shared(asked: argparse.Namespace) -> list[str]:
    """The options that `benchmarks.gpu_steps` has, too, as they were given."""
    names = ("shape", "layers", "batches", "prompt_tokens", "new_tokens")
    given = {name: value for name in names if (value := getattr(asked, name)) is not None}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


if __name__ == "__main__":
    sys.exit(main())
