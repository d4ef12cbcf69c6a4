"""What quantising a layer takes for a moment: counted on a CPU, whose operators allocate as a GPU's do."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autotune.runtime.variant import Variant
from autotune.transforms import make, torchao
from autotune.transforms.torchao import SCHEMES, Torchao, TorchaoLinear
from tests import models

HALVES = (torch.bfloat16, torch.float32)


class Counting(TorchDispatchMode):
    """Counts the bytes that operators allocate, and how many are alive at once at most."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {StorageWeakRef(each.untyped_storage()).cdata for each in given}
        self.alive = list[tuple[StorageWeakRef, int]]()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = [each for each in self.alive if not each[0].expired()]
        for tensor in (each for each in tree_leaves(out) if type(each) is torch.Tensor):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in self.given | {each.cdata for each, _ in self.alive}:
                self.alive.append((storage, tensor.untyped_storage().nbytes()))
        self.most = max(self.most, sum(size for _, size in self.alive))
        return out


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao is told that the hardware is there, and HQQ computes in FP16, as it does on one."""
    quant_api = pytest.importorskip("torchao.quantization.quant_api")
    primitives = importlib.import_module("torchao.quantization.quant_primitives")
    tiles = importlib.import_module("torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor")
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda packed, inner: packed.clone())
    optimised = partial(primitives.optimize_weights_proximal_legacy, dtype=torch.float16)
    choose = partial(primitives._choose_qparams_and_quantize_affine_hqq, optimize_weights=optimised)
    monkeypatch.setattr(tiles, "_choose_qparams_and_quantize_affine_hqq", choose)


@pytest.mark.parametrize("slab", [2**25, 2**19], ids=["whole", "in slabs"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_quantising_takes_is_known(
    scheme: str, dtype: torch.dtype, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchao, "SLAB", slab)
    linear = nn.Linear(1024, 2048, bias=False, dtype=dtype).requires_grad_(False)
    with Counting(linear.weight) as counted:
        TorchaoLinear(linear, scheme, compiled=False)
    expected = Torchao("decode", scheme=scheme).working_bytes(linear)
    assert 0.68 * expected <= counted.most <= 1.01 * expected  # scales; FP8 of FP32 weights is not converted first


def test_it_is_part_of_what_a_transform_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao, "_missing", lambda scheme, where: None)
    model = models.tiny("llama", hidden_size=1024, intermediate_size=1024, vocab_size=4096).bfloat16()
    transform: Any = make("torchao", {"scheme": "int4_hqq", "compile": False}, "decode")
    with Counting(*model.parameters(), *model.buffers()) as counted:
        variant = Variant(model).with_transform(transform)
    kept = sum(size for each, size in counted.alive if not each.expired())
    assert variant.transforms
    assert 2 * kept < counted.most <= transform.extra_bytes(Variant(model)) < 1.2 * counted.most


@pytest.mark.parametrize("rows", [2048, 2040, 1001])
def test_slabs_are_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(rows, 1024)).bfloat16()
    whole: Any = torchao.quantized(weight, "int4_weight_only")
    monkeypatch.setattr(torchao, "SLAB", 300 * 1024)  # 296 rows
    joined: Any = torchao.quantized(weight, "int4_weight_only")
    assert torch.equal(joined.qdata, whole.qdata)
    assert torch.equal(joined.scale_and_zero, whole.scale_and_zero)
    assert (joined.shape, joined.block_size) == (whole.shape, whole.block_size)
