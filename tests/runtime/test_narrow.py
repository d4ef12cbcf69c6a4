"""INT8 and INT4 products on a GPU: numbers by Triton's interpreter, code by its compiler; neither needs a device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from autotune.machine import device as devices
from autotune.machine.hardware import Hardware
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms import make, triton_weights
from tests.fakes.cuda import FakeCuda
from tests.models import tiny, token_prompts

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from autotune.runtime.narrow import layers
from autotune.runtime.narrow import product as narrow

SHAPES = [(40, 96), (33, 130), (64, 256)]  # outputs and inputs; 130 inputs are five groups, the last one not full
ROWS = [1, 3, 16, 17, 70]
CASES: list[tuple[int, str, tuple[int, int], int, int]] = [  # bits, dtype, shape, group, rows
    *product((8, 4), ("float16",), SHAPES, (32,), ROWS),
    *product((8, 4), ("float32",), SHAPES[1:2], (32,), (1, 3, 17)),
    *product((8, 4), ("bfloat16",), SHAPES, (32,), (1,)),  # the interpreter does not multiply BF16 with tl.dot
    *product((8, 4), ("float16",), [(24, 2208)], (32,), (1, 2)),  # several blocks of inputs
    *product((8, 4), ("float16",), [(70, 328)], (64, 128), (1, 9)),  # more outputs than NARROW
]
SCRIPT = """
import json, sys
import torch
from autotune.runtime.kernels.modules import Int4Linear, Int8Linear
from autotune.runtime.narrow import product
from autotune.runtime.narrow.layers import NarrowInt4Linear, NarrowInt8Linear

found, product.NARROW = [], 64
for bits, dtype, (outputs, inputs), group, rows in json.loads(sys.argv[1]):
    torch.manual_seed(rows)
    linear = torch.nn.Linear(inputs, outputs, dtype=getattr(torch, dtype)).requires_grad_(False)
    narrow, packed = (NarrowInt8Linear, Int8Linear) if bits == 8 else (NarrowInt4Linear, Int4Linear)
    layer, x = narrow(linear, group), torch.randn(2, rows, inputs, dtype=linear.weight.dtype)[:1]
    y, weight = layer(x), packed.from_linear(linear, group=group).dequantize()  # what a CPU multiplies by
    right = torch.nn.functional.linear(x.float(), weight, linear.bias.float())
    assert y.dtype == x.dtype and y.shape == right.shape
    assert torch.equal(layer.widened(torch.float32), weight)
    error = float((y.float() - right).norm() / right.norm())
    found.append([error, layer.weight_bytes, layer.weights[1].itemsize])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[Any, list[float]]:
    """Case -> (relative error, bytes of the layer, of a factor). Triton decides at import whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_are_those_of_the_packed_layer_of_a_cpu(case: Any, interpreted: dict[Any, list[float]]) -> None:
    bits, dtype, (outputs, inputs), group, _ = case
    error, size, factor = interpreted[case]
    assert error < {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}[dtype]
    factors = factor if bits == 8 else 2 * factor  # a scale, and a zero
    groups = -(-inputs // group)
    assert size == outputs * groups * (group * bits // 8 + factors) + outputs * getattr(torch, dtype).itemsize


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("rows", "units"), [(1, False), (16, True)])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_compiles_for_gpus_that_are_not_here(
    bits: int, rows: int, units: bool, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one row loads are 16 bytes wide and products are added as they are made; tensor cores multiply several.

    No register spills.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # the default from Triton 3.10
    chosen = narrow.tile(rows, 4096, bits)
    options = {name: value for name, value in chosen.items() if not name.isupper()}
    constants = {"K": 4096, "GROUP": 32} | {name: value for name, value in chosen.items() if name.isupper()}
    types = {"x": "*bf16", "scales": "*fp16", "out": "*fp32", "M": "i32", "N": "i32", "KX": "i32"}
    types |= {"numbers": "*i8"} if bits == 8 else {"words": "*i32", "zeros": "*fp16", "one": "i32"}
    kernel: Any = narrow._linear_few_rows if bits == 8 else narrow._linear_few_rows_int4
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types if name != "M"}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ptx"]
    assert compiled.metadata.name == kernel.fn.__name__, "a profile knows it by another name"
    assert f".target sm_{capability}" in code
    assert bool(re.search(r"\b(mma|wgmma|tcgen05)\b", code)) is units
    assert units or ("ld.global.v4.b32" in code and "fma.rn.f32" in code)
    assert ".local" not in code
    assert ("cvt.rn.f32" in code) is (bits == 8)  # numbers of 4 bits become FP32 by their bits


@pytest.mark.parametrize(
    ("device", "capability", "reason"),
    [("cpu", "AVX512", "it runs on cuda"), ("cuda", "7.5", "compute capability"), ("cuda", "9.0", "Triton cannot run")],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_what_it_needs(bits: int, device: Any, capability: str, reason: str) -> None:
    """Of a GPU that is only said to be there, the trial on a small layer finds out."""
    hardware = Hardware(device, "test", capability, 2, 1 << 34, 2e12, {"float32": 19e12}, None, {})
    found = make("triton_weights", {"bits": bits}, "decode").unavailable(Variant(tiny("llama")), hardware)
    assert reason in (found or "")


@pytest.mark.parametrize(
    ("bits", "group", "inputs", "outputs", "taken"),
    [
        (8, 32, 64, 48, True),
        (4, 32, 40, 50257, True),
        (4, 64, 48, 64, False),  # less than a group
        (8, 128, 96, 64, False),
        (8, 32, 12288, 256000, False),  # the last place would not fit into 32 bits
        (4, 32, 12288, 256000, False),
        (4, 32, 5376, 262208, True),
    ],
)
def test_layers_that_do_not_fit_are_left(
    bits: int, group: int, inputs: int, outputs: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NarrowInt8Linear", "NarrowInt4Linear"):
        monkeypatch.setattr(layers, name, lambda linear, group: "exchanged")
    transform: Any = make("triton_weights", {"bits": bits, "group": group})
    assert transform.exchange(nn.Linear(inputs, outputs, device="meta")) == ("exchanged" if taken else None)


def int8(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    weight = numbers.view(*scales.shape, -1) * scales[..., None].float()
    return x.float() @ weight.flatten(1)[:, : x.shape[1]].T


def int4(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    by_place = [words.view(*scales.shape, -1) >> 4 * j & 15 for j in range(8)]  # [N, groups, group / 8] each
    weight = (torch.cat(by_place, -1) - 8) * scales[..., None].float() + zeros[..., None].float()
    return x.float() @ weight.flatten(1)[:, : x.shape[1]].T


@pytest.fixture
def on_a_cpu() -> Iterator[None]:
    """The operators on a CPU, instead of Triton's kernels."""
    triton_weights._missing.cache_clear()
    with torch.library._scoped_library("autotune", "IMPL") as library:
        library.impl("linear_few_rows_int8", int8, "CPU")
        library.impl("linear_few_rows_int4", int4, "CPU")
        yield
    triton_weights._missing.cache_clear()


GPU = Hardware("cuda", "a GPU", "9.0", 2, 80 << 30, 2e12, {"float32": 60e12, "bfloat16": 700e12}, None, {})


@pytest.mark.parametrize(("bits", "kernel"), [(8, "_linear_few_rows"), (4, "_linear_few_rows_int4")])
def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(
    bits: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, launched = list[Tensor](), list[Tensor]()

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.clear()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(narrow, kernel, {(2, 1, 1): lambda *_, **__: launched.extend(current)})
    layer: Any = make("triton_weights", {"bits": bits}).exchange(nn.Linear(64, 8 if bits == 8 else 16))  # type: ignore[attr-defined]
    x = torch.ones(1, 64)
    (narrow.product_int8 if bits == 8 else narrow.product_int4)(x, *layer.weights)
    assert launched == [x]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "name"), [(8, "linear_few_rows_int8"), (4, "linear_few_rows_int4")])
def test_compilers_see_an_operator(bits: int, name: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(96, 40, dtype=dtype).requires_grad_(False)
    layer: Any = make("triton_weights", {"bits": bits}).exchange(linear)  # type: ignore[attr-defined]
    seen = list[str]()

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for rows in (1, 5, 70):
        x = torch.randn(1, rows, 96, dtype=dtype)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = layer(mode.from_tensor(x))
        assert (fake.shape, fake.dtype) == ((1, rows, 40), dtype)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, backend=compiler, fullgraph=True)(x), layer(x))
        assert (f"autotune.{name}" in seen) is (rows <= narrow.MOST_ROWS)
        seen.clear()
    torch.library.opcheck(getattr(torch.ops.autotune, name).default, (x[0, :3], *layer.weights))


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("params", [{"bits": 8}, {"bits": 4}, {"bits": 4, "wide": "lm_head"}], ids=str)
def test_a_captured_step_says_what_an_uncaptured_one_says(params: dict[str, Any], dtype: torch.dtype) -> None:
    ids = torch.tensor(token_prompts(1, 20))
    transform = make("triton_weights", params, "decode")
    with devices.stand_in(FakeCuda()):
        variant = Variant(tiny("llama").to(dtype))
        assert transform.unavailable(variant, GPU) is None
        variant = variant.with_transform(transform)
        assert transform.took_effect(variant) is None
        captured = variant.with_transform(make("cuda_graph", {}, "decode"))
        plain = variant.with_transform(make("static_cache", {}, "decode"))
        got, expected = (serving(v).generate(ids, max_new_tokens=8, min_new_tokens=8) for v in (captured, plain))
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(("bits", "head"), [(4, layers.NarrowInt8Linear), (8, nn.Linear)])
def test_sensitive_layers_get_the_wider_form(bits: int, head: type[nn.Module]) -> None:
    transform: Any = make("triton_weights", {"bits": bits})
    model = Variant(tiny("llama")).with_transform(transform.widened("lm_head")).modules["decode"]
    assert type(model.lm_head) is head
    assert type(model.model.layers[0].mlp.up_proj) is transform.kind


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_on_a_gpu(bits: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(416, 1000, device="cuda", dtype=dtype).requires_grad_(False)
    layer: Any = make("triton_weights", {"bits": bits}).exchange(linear)  # type: ignore[attr-defined]
    x = torch.randn(1, rows, 416, device="cuda", dtype=dtype)
    weight, bias = layer.widened(torch.float32), linear.bias.float()
    right = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (layer(x).double() - right).norm() < 5e-3 * right.norm()
