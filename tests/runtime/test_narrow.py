"""INT8 products on a GPU: numbers by Triton's interpreter, code by its compiler; neither needs a device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autotune.machine.hardware import Hardware
from autotune.runtime.variant import Variant
from autotune.transforms import make
from tests.models import tiny

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

SHAPES = [(40, 96), (33, 130), (64, 256)]  # outputs and inputs; 130 inputs are five groups, the last one not full
ROWS = [1, 3, 16, 17, 70]
CASES = [*product(("float32", "float16"), SHAPES, ROWS)]  # the interpreter does not multiply BF16
SCRIPT = """
import json, sys
import torch
from autotune.runtime.kernels.modules import Int8Linear
from autotune.runtime.narrow.layers import NarrowLinear

found = []
for dtype, (outputs, inputs), rows in json.loads(sys.argv[1]):
    torch.manual_seed(rows)
    linear = torch.nn.Linear(inputs, outputs, dtype=getattr(torch, dtype)).requires_grad_(False)
    layer, x = NarrowLinear(linear, 32), torch.randn(2, rows, inputs, dtype=linear.weight.dtype)[:1]
    y, weight = layer(x), Int8Linear.from_linear(linear).dequantize()  # what a CPU multiplies by
    right = torch.nn.functional.linear(x.float(), weight, linear.bias.float())
    assert y.dtype == x.dtype and y.shape == right.shape
    found.append([float((y.float() - right).norm() / right.norm()), layer.weight_bytes])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[Any, list[float]]:
    """Case -> (relative error, bytes of the layer). Triton decides when it is imported whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_the_packed_layer_of_a_cpu(case: Any, interpreted: dict[Any, list[float]]) -> None:
    dtype, (outputs, inputs), _ = case
    error, size = interpreted[case]
    assert error < (1e-6 if dtype == "float32" else 1e-3)
    groups = -(-inputs // 32)
    assert size == outputs * groups * (32 + 2) + outputs * getattr(torch, dtype).itemsize  # numbers, scales, bias


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("rows", "units"), [(1, False), (16, True)])
def test_it_compiles_for_gpus_that_are_not_here(capability: int, rows: int, units: bool) -> None:
    """Loads are 16 bytes wide for one row, tensor cores multiply several, and no register spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from autotune.runtime.narrow import product as narrow

    shape = narrow.tile(rows, 4096)
    options = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"K": 4096, "GROUP": 32} | shape
    types = {"x": "*bf16", "numbers": "*i8", "scales": "*fp16", "out": "*fp32", "M": "i32", "N": "i32", "KX": "i32"}
    kernel: Any = narrow._linear_few_rows
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types if name != "M"}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ptx"]
    assert compiled.metadata.name == kernel.fn.__name__, "a profile knows it by another name"
    assert f".target sm_{capability}" in code
    assert bool(re.search(r"\b(mma|wgmma|tcgen05)\b", code)) is units
    assert units or "ld.global.v4.b32" in code
    assert ".local" not in code


@pytest.mark.parametrize(
    ("device", "capability", "reason"),
    [("cpu", "AVX512", "it runs on cuda"), ("cuda", "7.5", "compute capability"), ("cuda", "9.0", "Triton cannot run")],
)
def test_what_it_needs(device: Any, capability: str, reason: str) -> None:
    """Of a GPU that is only said to be there, the trial on a small layer finds out."""
    hardware = Hardware(device, "test", capability, 2, 1 << 34, 2e12, {"float32": 19e12}, None, {})
    found = make("triton_int8", {}, "decode").unavailable(Variant(tiny("llama")), hardware)
    assert reason in (found or "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_numbers_on_a_gpu(rows: int, dtype: torch.dtype) -> None:
    from autotune.runtime.narrow.layers import NarrowLinear

    torch.manual_seed(0)
    linear = nn.Linear(416, 1000, device="cuda", dtype=dtype).requires_grad_(False)
    layer, x = NarrowLinear(linear, 32), torch.randn(1, rows, 416, device="cuda", dtype=dtype)
    weight, bias = layer.widened(torch.float32), linear.bias.float()
    right = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (layer(x).double() - right).norm() < 5e-3 * right.norm()
