"""The decode step of each variant on a GPU, against the memory roofline: `make bench-gpu-steps`.

Each variant is put on by hand, timed in turns with the model as it is, and dropped before the next one. A row has the
bytes that a token must read (weights as stored, and the KV cache), the time that they take at the measured and at the
datasheet's bandwidth, and the measured time per token. `--paper` prints the bytes and the roofline alone, for GPUs of
given bandwidths, without running anything on one. 69 % of the datasheet's bandwidth is what gpt-fast reaches with a
compiled BF16 step (its README: Llama-2-7B, A100).
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from autotune import transforms
from autotune.diagnose.work import Forward, activation_dtype, count
from autotune.errors import AutotuneError
from autotune.machine import device as devices
from autotune.model import linear_layers
from autotune.profile.timing import time_request
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.linears import LinearTransform
from autotune.workload import Workload
from benchmarks.gpu_shapes import SHAPES, random_model, random_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = tuple[str, str, dict[str, Any]]
GRAPH: Step = ("cuda_graph", "decode", {})
COMPILED: Step = ("compile_step", "decode", {})
MERGED: Step = ("merged_linears", "decode", {})


def narrow(scheme: str, **params: Any) -> Step:
    return ("torchao", "decode", {"scheme": scheme} | params)


INT4 = narrow("int4_weight_only", compile=False)
CUDNN: Step = ("attention", "decode", {"implementation": "sdpa:cudnn"})
SLOTS: Step = ("slot_attention", "decode", {})
INT8_TRITON: Step = ("triton_weights", "decode", {"bits": 8})
INT4_TRITON: Step = ("triton_weights", "decode", {"bits": 4})
NF4: Step = ("bitsandbytes", "decode", {"scheme": "nf4"})
PLANS: dict[str, tuple[Step, ...]] = {
    "lean loop": (("lean_loop", "decode", {}),),
    "graph": (GRAPH,),
    "graph, cuDNN attention": (CUDNN, GRAPH),
    "graph, slot attention": (SLOTS, GRAPH),
    "graph, cuDNN, merged": (CUDNN, MERGED, GRAPH),
    "graph, cuDNN, INT8 by torchao": (CUDNN, narrow("int8_weight_only"), GRAPH),
    "graph, cuDNN, FP8 by torchao": (CUDNN, narrow("float8_weight_only"), GRAPH),
    "graph, cuDNN, FP8 activations": (CUDNN, narrow("float8_dynamic"), GRAPH),
    "graph, cuDNN, INT4 by torchao": (CUDNN, INT4, GRAPH),
    "graph, cuDNN, INT8 by Triton": (CUDNN, INT8_TRITON, GRAPH),
    "graph, cuDNN, INT4 by Triton": (CUDNN, INT4_TRITON, GRAPH),
    "graph, cuDNN, NF4 by bitsandbytes": (CUDNN, NF4, GRAPH),
    "graph, cuDNN, compiled": (CUDNN, COMPILED, GRAPH),
    "graph, slot attention, compiled, INT8": (SLOTS, INT8_TRITON, COMPILED, GRAPH),
    "graph, cuDNN, compiled, INT8 by Triton": (CUDNN, INT8_TRITON, COMPILED, GRAPH),
    "graph, cuDNN, compiled, INT4 by torchao": (CUDNN, INT4, COMPILED, GRAPH),
    "graph, cuDNN, compiled, INT4 by Triton": (CUDNN, INT4_TRITON, COMPILED, GRAPH),
    "graph, cuDNN, compiled, merged, INT8": (CUDNN, MERGED, INT8_TRITON, COMPILED, GRAPH),
}
DATASHEET = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12, "L4": 0.3e12, "4090": 1.008e12, "B200": 8e12}  # bytes/s
GPT_FAST = 0.69
PAPER_BATCHES = (1, 16)


@dataclass(frozen=True)
class Row:
    """One variant's decode step.

    Args:
        name: the plan.
        token_bytes: bytes that a token must read.
        tpot_s: median seconds per token.
        ratios: times as fast as the model as it is, in the same round.
        ready_s: seconds until it could serve.
    """

    name: str
    token_bytes: float
    tpot_s: float
    ratios: tuple[float, ...]
    ready_s: float


def token_bytes(model: PreTrainedModel, batch: int, context: int) -> float:
    """Bytes of weights and cache that one decode step of `batch` sequences must move."""
    work = count(model, Forward(batch, 1, context), activation_dtype(model).itemsize)
    return sum(part.weight_bytes + part.cache_bytes for part in work.values())


def chain(name: str) -> list[Transform]:
    """The transforms of a plan."""
    return [transforms.make(kind, params, phase) for kind, phase, params in PLANS[name]]


def measure(model: PreTrainedModel, name: str, ids: torch.Tensor, new_tokens: int, rounds: int) -> Row:
    """Build one plan's variant and time it in turns with the model as it is.

    Raises:
        AutotuneError: the plan does not run here.
    """
    began = time.perf_counter()
    rows = tuple(map(tuple, ids.tolist()))
    variant = Variant(model, workload=Workload(rows, new_tokens, (len(rows),))).with_transforms(chain(name))
    served = serving(variant)
    for _ in range(2):
        time_request(served, ids, new_tokens)
    ready_s = time.perf_counter() - began
    mine, theirs = list[float](), list[float]()
    for _ in range(rounds):
        theirs.append(time_request(model, ids, new_tokens).tpot_s)
        mine.append(time_request(served, ids, new_tokens).tpot_s)
    moved = token_bytes(variant.modules["decode"], len(rows), ids.shape[1] + new_tokens // 2)
    return Row(name, moved, median(mine), tuple(b / a for a, b in zip(mine, theirs, strict=True)), ready_s)


def line(row: Row, measured: float, datasheet: float | None) -> str:
    cells = [row.name, f"{row.token_bytes / 1e9:.2f} GB", f"{row.tpot_s * 1e3:.2f} ms"]
    cells.append(f"{median(row.ratios):.2f}x ({min(row.ratios):.2f} to {max(row.ratios):.2f})")
    cells.append(f"{row.token_bytes / measured / row.tpot_s:.0%}")
    cells.append(f"{row.token_bytes / datasheet / row.tpot_s:.0%}" if datasheet else "-")
    return "| " + " | ".join([*cells, f"{row.ready_s:.0f} s"]) + " |"


def paper_bytes(model: PreTrainedModel, plan: Sequence[Transform], batch: int, context: int) -> float:
    """`token_bytes` of a plan that is not applied, by the bits that its transforms store a weight in."""
    moved = token_bytes(model, batch, context)
    bits = next((t.weight_bits for t in plan if isinstance(t, LinearTransform)), None)
    if bits is None:
        return moved
    weights = [layer.weight for layer in linear_layers.linears(model).values()]
    return moved - sum(weight.nbytes - weight.numel() * bits / 8 for weight in weights)


def paper(model: PreTrainedModel, batches: Sequence[int], context: int) -> Iterator[str]:
    """Bytes and roofline of every plan, line by line.

    Args:
        model: a model on torch's meta device.
        batches: numbers of sequences.
        context: tokens in the cache of each sequence.
    """
    share, dtype = f"{100 * GPT_FAST:.0f} %", str(model.dtype).removeprefix("torch.")
    yield f"{model.num_parameters() / 1e9:.2f}e9 parameters in {dtype}, {context} tokens in the cache of each sequence."
    yield (
        f"Bytes are of a step, in which each sequence gets a token. Times are of a step at 100 % / {share} of the "
        "datasheet's bandwidth: the least possible, and the line to pass (what gpt-fast reaches). Arithmetic, small "
        "kernels and launches are not in them: graphs, compiling, attention and merging change those, not the bytes."
    )
    yield ""
    yield "| variant | sequences | bytes a step | " + " | ".join(DATASHEET) + " |"
    yield "|---" * (3 + len(DATASHEET)) + "|"
    plans = {"as it is": list[Transform](), **{name: chain(name) for name in PLANS}}
    for batch, (name, plan) in product(batches, plans.items()):
        moved = paper_bytes(model, plan, batch, context)
        floors_ms = [moved / rate * 1e3 for rate in DATASHEET.values()]
        times = [f"{floor:.2f} / {floor / GPT_FAST:.2f} ms" for floor in floors_ms]
        yield f"| {name} | {batch} | {moved / 1e9:.2f} GB | " + " | ".join(times) + " |"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-gpu-steps BENCH_ARGS=...", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument(
        "--batches", type=lambda text: tuple(map(int, text.split(","))), help="default: 1; on paper 1,16"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plans", default=",".join(f"{n}" for n in range(len(PLANS))), help="numbers of the rows")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further row begins after this time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--paper", action="store_true", help="bytes and roofline alone; needs no GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    asked = options(arguments)
    if asked.paper:
        model, context = random_model(asked.shape, "meta", asked.layers), asked.prompt_tokens + asked.new_tokens // 2
        for text in paper(model, asked.batches or PAPER_BATCHES, context):
            say(text)
        return 0
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here; --paper needs none", file=sys.stderr)
        return 1
    from autotune.machine import hardware

    began, failed = time.perf_counter(), 0
    machine = hardware.probe(asked.device)
    sheet = next((rate for name, rate in DATASHEET.items() if name in machine.name), None)
    say(f"{machine.name}: {machine.bandwidth_bytes_per_s / 1e12:.2f} TB/s measured, torch {torch.__version__}")
    model = random_model(asked.shape, asked.device, asked.layers)
    chosen = [list(PLANS)[int(number)] for number in asked.plans.split(",")]
    for batch in asked.batches or (1,):
        ids = torch.tensor(random_prompts(model.config.vocab_size, asked.prompt_tokens, batch), device=asked.device)
        own = [time_request(model, ids, asked.new_tokens).tpot_s for _ in range(asked.rounds)]
        moved = token_bytes(model, batch, asked.prompt_tokens + asked.new_tokens // 2)
        say(f"\n{asked.shape}, {batch} sequences, {asked.prompt_tokens} tokens in, {asked.new_tokens} out\n")
        say("| variant | bytes a token | a token | against the model as it is | of measured | of datasheet | ready |")
        say("|---|---|---|---|---|---|---|")
        say(line(Row("as it is", moved, median(own), (1.0,), 0.0), machine.bandwidth_bytes_per_s, sheet))
        for name in chosen:
            if time.perf_counter() - began > asked.seconds:
                say(f"| {name} | not tried: the {asked.seconds:.0f} s are over |")
                continue
            try:
                say(
                    line(
                        measure(model, name, ids, asked.new_tokens, asked.rounds), machine.bandwidth_bytes_per_s, sheet
                    )
                )
            except AutotuneError as error:
                failed += 1
                say(f"| {name} | does not run: {str(error)[:300]} |")
            except Exception:  # a library may raise anything; the next row may run all the same
                failed += 1
                say(f"| {name} | failed |\n{traceback.format_exc()[-2500:]}")
            devices.of(asked.device).trim()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
