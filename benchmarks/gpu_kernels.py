"""Kernels of a decode step on a GPU, one by one: attention over slots, and a few rows times weights.

    python -m benchmarks.gpu_kernels

Each kernel is captured several times over in one graph, so that launches cost the host nothing, and the median of its
replays is printed with its relative error against FP32. Weights are many enough not to stay in the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.machine import device as devices
from autotune.runtime import attention_sdpa, attention_slots

HEADS, KV_HEADS, SIZE = 32, 8, 128  # of Llama 3.1 8B
SLOTS = (1024, 4096, 16384)
LAYERS = ((512, 2048), (2048, 2048), (8192, 2048), (4096, 4096), (14336, 4096), (4096, 14336), (128256, 2048))
ROWS = (1, 16)
EMPTY = 100  # slots that are not filled
TIMES, REPLAYS = 8, 7  # calls in a graph, and its replays
WEIGHTS_BYTES = 600e6  # of all weights of a shape: more than any cache holds


def microseconds(device: devices.Device, work: Callable[[], Any], calls: int) -> float:
    """Median time of one of the `calls` calls that `work` makes, captured."""
    graph, _ = device.owner.run(lambda: device.capture(lambda: (work(), torch.empty(()))[1]))
    device.owner.run(graph.replay)
    found = [device.owner.run(lambda: device.seconds(graph.replay)) for _ in range(REPLAYS)]
    return median(found) / calls * 1e6


def attention(batch: int, slots: int) -> tuple[Tensor, Mapping[str, Callable[[], Tensor]]]:
    """The right result [B, H, 1, D], and ways to it over slots with a mask."""
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, HEADS, 1, SIZE, **half)
    k, v = (torch.randn(batch, KV_HEADS, slots, SIZE, **half) for _ in range(2))
    there = (torch.arange(slots, device="cuda") < slots - EMPTY).expand(batch, 1, 1, slots)
    bias = torch.zeros(batch, 1, 1, slots, **half).masked_fill_(~there, torch.finfo(torch.bfloat16).min)
    module: Any = nn.Module()
    last, padding = (torch.full((batch, 1), slot, device="cuda") for slot in (slots - EMPTY - 1, 0))
    spans = attention_slots.spans(last, padding, None, k)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: attention_sdpa.attend(backend, module, q, k, v, bias)[0].transpose(1, 2)

    def repeated() -> Tensor:  # what transformers' SDPA does wherever there is a mask
        keys, values = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=there)

    right = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=there, enable_gqa=True)
    return right, {
        "SDPA, keys repeated": repeated,
        "SDPA, grouped": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=there, enable_gqa=True),
        "slots": lambda: attention_slots.attend(module, q, k, v, spans)[0].transpose(1, 2),
        **{f"sdpa:{backend}": ours(backend) for backend in ("cudnn", "efficient", "math")},
    }


def products(rows: int, outputs: int, inputs: int) -> tuple[Tensor, dict[str, list[Callable[[], Tensor]]]]:
    """The right result [rows, outputs], and ways to it, each with as many weights as the cache cannot hold."""
    from autotune.runtime.narrow.layers import NarrowInt4Linear, NarrowInt8Linear
    from autotune.runtime.steps.compiled import OPTIONS

    many = range(max(2, min(TIMES, int(WEIGHTS_BYTES / (outputs * inputs)))))
    linear = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127  # a scale per row
    numbers = (linear.weight / scale).round().to(torch.int8)

    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return (x @ weight.t().to(x.dtype)) * scale.t()

    generated = torch.compile(product, dynamic=False, options=OPTIONS["cuda"])
    return linear(x).float(), {
        "BF16": [partial(F.linear, x, linear.weight.clone()) for _ in many],
        "INT8, inductor": [partial(generated, x, numbers.clone(), scale) for _ in many],
        "INT8, groups, Triton": [partial(NarrowInt8Linear(linear, 32), x) for _ in many],
        "INT4, groups, Triton": [partial(NarrowInt4Linear(linear, 32), x) for _ in many],
    }


def error(given: Tensor, right: Tensor) -> float:
    return float((given.float() - right).norm() / right.norm())


def cell(name: str, ways: Sequence[Callable[[], Tensor]], right: Tensor) -> tuple[str, bool]:
    """What is printed of a kernel, called with different weights, and whether it ran."""
    try:
        spent = microseconds(devices.of("cuda"), lambda: [way() for way in ways], len(ways))
        return f"{name} {spent:.1f} ({error(ways[0](), right):.0e})", True
    except Exception as problem:  # a library may refuse a shape with anything
        return f"{name} {type(problem).__name__}: {str(problem)[:80]}", False


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__).parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device here", file=sys.stderr)
        return 1
    print(f"{devices.of('cuda').identity().name}, torch {torch.__version__}; microseconds (relative error)\n")
    ran = True
    with torch.no_grad():
        for batch in (1, 8):
            for slots in SLOTS:
                right, ways = attention(batch, slots)
                found = [cell(name, [way] * TIMES, right) for name, way in ways.items()]
                print(
                    f"attention, {batch} sequences, {slots} slots: " + ", ".join(text for text, _ in found), flush=True
                )
                ran &= all(each for _, each in found)
        for outputs, inputs in LAYERS:
            for rows in ROWS:
                right, layers = products(rows, outputs, inputs)
                found = [cell(name, each, right) for name, each in layers.items()]
                print(f"{rows} rows times [{outputs}, {inputs}]: " + ", ".join(text for text, _ in found), flush=True)
                ran &= all(each for _, each in found)
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
