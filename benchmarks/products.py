"""Products with packed weights on a CPU: in integers and in FP32, beside the platform's own FP32 product.

    python -m benchmarks.products

For each format and number of tokens it prints how many times as fast as `x @ w.T` the kernels are: the median over
rounds in which all ways take turns, and the quartiles. A round takes the time of this process's threads alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import quantiles

import torch
from torch import Tensor

from autotune.machine import processor
from autotune.runtime import kernels

INPUTS, OUTPUTS = 576, 3072  # gate and up of SmolLM2-135M
TOKENS = (1, 4, 8, 16, 32, 96, 512)
ROUNDS, ROUND_S = 15, 0.02


def ways(weight: Tensor) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """The ways to multiply with a weight [N, K] here, the platform's own first."""
    plain = weight.T.contiguous()
    found: dict[str, Callable[[Tensor], Tensor]] = {"FP32": lambda x: x @ plain}
    for kind in (kernels.Int8Linear, kernels.Int6Linear, kernels.Int4Linear):
        layer = kind.from_weight(weight)
        for digits in (0, 2, 1):
            if digits and (not layer.in_integers or (digits == 1 and kernels.no_byte_unit(layer.bits))):
                continue
            found[f"INT{layer.bits}, inputs of {(32, 8, 16)[digits]} bits"] = with_digits(
                kind.from_weight(weight), digits
            )
    return found


def with_digits(layer: kernels.GroupedLinear, digits: int) -> kernels.GroupedLinear:
    layer.digits = digits
    return layer


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, of all threads."""
    began, calls = time.process_time(), 0
    while (spent := time.process_time() - began) < ROUND_S:
        work()
        calls += 1
    return spent / calls


def ratios(tokens: int, multiply: Mapping[str, Callable[[Tensor], Tensor]]) -> Mapping[str, tuple[float, float, float]]:
    """Quartiles of how many times as fast as the first way each other one is."""
    x = torch.randn(tokens, INPUTS)
    rounds = [[seconds(partial(way, x)) for way in multiply.values()] for _ in range(ROUNDS)]
    shares = {name: [r[0] / r[i] for r in rounds] for i, name in enumerate(multiply) if i}
    return {name: tuple(quantiles(found, n=4)) for name, found in shares.items()}  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of rows of x")
    parser.add_argument("--threads", type=int, default=1, help="threads of every product")
    options = parser.parse_args(arguments)
    if reason := kernels.available():
        print(f"there is nothing to compare: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    multiply = ways(torch.randn(OUTPUTS, INPUTS) / 8)
    print(f"{processor.name()}, {processor.instruction_set()}, {options.threads} threads; [{INPUTS}, {OUTPUTS}]\n")
    print("| tokens | " + " | ".join(name for name in list(multiply)[1:]) + " |")
    print("|---" * len(multiply) + "|")
    for tokens in options.tokens:
        cells = [f"{m:.2f} ({low:.2f} to {high:.2f})" for low, m, high in ratios(tokens, multiply).values()]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
