"""The packed embedding: rows against the dequantised table, and one table where the model had one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune import transforms
from autotune.errors import TransformError
from autotune.model.linear_layers import stored_bytes
from autotune.runtime.kernels import (
    HalfLinear,
    Int4Linear,
    Int6Linear,
    Int8Linear,
    PackedLinear,
    PackedTable,
    QuantisedLinear,
    available,
)
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.packed_embedding import PackedEmbedding as Packed
from autotune.transforms.weight_only import WeightOnly
from tests.models import tiny, token_prompts

# A draft of policy `memory` for SmolLM2: name, phase, parameters.
MEMORY: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("weight_only", "both", {"bits": 8}),
    ("packed_embedding", "both", {}),
    ("prefill_attention", "prefill", {"precision": "float32"}),
    ("fused_layers", "prefill", {}),
    ("half_cache", "decode", {}),
    ("prefill_parts", "prefill", {}),
    ("step_program", "decode", {}),
)
SENTENCE = available()
pytestmark = pytest.mark.skipif(SENTENCE is not None, reason=str(SENTENCE))

FORMATS = [
    pytest.param(HalfLinear, {}, id="f16"),
    pytest.param(HalfLinear, {"dtype": torch.bfloat16}, id="bf16"),
    pytest.param(HalfLinear, {"dtype": torch.float32}, id="f32"),
    pytest.param(Int8Linear, {}, id="i8-32"),
    pytest.param(Int8Linear, {"group": 0}, id="i8-row"),
    pytest.param(Int6Linear, {}, id="i6-32"),
    pytest.param(Int6Linear, {"group": 0}, id="i6-row"),
    pytest.param(Int4Linear, {}, id="i4-32"),
    pytest.param(Int4Linear, {"group": 128}, id="i4-128"),
]


def packed(kind: type[HalfLinear | QuantisedLinear], options: dict[str, Any], rows: int, width: int) -> PackedLinear:
    torch.manual_seed(rows * 1000 + width)
    return kind.from_weight(torch.randn(rows, width), **options)


@pytest.mark.parametrize(("kind", "options"), FORMATS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 8), (37, 100), (50, 33), (129, 260)])
def test_every_row_is_that_of_the_dequantised_table(
    kind: type[HalfLinear | QuantisedLinear], options: dict[str, Any], rows: int, width: int
) -> None:
    table = packed(kind, options, rows, width)
    found = PackedTable(table)(torch.arange(rows))
    torch.testing.assert_close(found, table.dequantize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor(3),
        torch.tensor([[1, 2], [36, 0]]),
        torch.tensor([[1, 2], [36, 0]]).T,
        torch.tensor([7, 7], dtype=torch.int32),
        torch.empty(2, 0, dtype=torch.int64),
    ],
    ids=["scalar", "batch", "transposed", "int32", "none"],
)
def test_ids_of_any_shape_stride_and_integer_type(ids: torch.Tensor) -> None:
    table = packed(Int8Linear, {}, 37, 100)
    assert torch.equal(PackedTable(table)(ids), table.dequantize()[ids.long()])


@pytest.mark.parametrize("number", [-1, 37, 47])
def test_an_id_outside_the_table_is_refused(number: int) -> None:
    with pytest.raises(RuntimeError, match=f"index {number} is out of range for a table of 37 rows"):
        PackedTable(packed(Int4Linear, {}, 37, 100))(torch.tensor([[0, number]]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 60}, "must be contiguous"),
        ({"width": 200}, "fewer than the 200"),
        ({"scales": torch.ones(3, 5, 16)}, "groups must divide"),
        ({"scales": torch.ones(2, 4, 16)}, "scales and zeros"),
        ({"packed": torch.ones(3, 128, 16, dtype=torch.float64)}, "takes tables in"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    table = packed(Int8Linear, {}, 37, 100)
    whole: dict[str, Any] = {"packed": table.weight, "scales": table.scales, "zeros": None, "rows": 37, "width": 100}
    with pytest.raises(RuntimeError, match=said):
        torch.ops.autotune.packed_rows(torch.tensor([0]), **(whole | change))


@pytest.mark.parametrize(("kind", "options"), FORMATS)
def test_it_traces(kind: type[HalfLinear | QuantisedLinear], options: dict[str, Any]) -> None:
    table = packed(kind, options, 37, 72)
    arguments = (torch.tensor([[3, 5]]), table.weight, getattr(table, "scales", None), getattr(table, "zeros", None))
    torch.library.opcheck(torch.ops.autotune.packed_rows.default, (*arguments, 37, 72))


CPU: Any = SimpleNamespace(device="cpu")
INT8 = WeightOnly(bits=8)


@pytest.mark.parametrize(
    ("architecture", "changes", "shares"),
    [
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": False}, False),
        ("gpt2", {}, True),
        ("opt", {}, True),
        ("qwen3", {}, False),
        ("phi3", {}, False),
        ("mixtral", {}, False),
    ],
)
def test_the_table_is_packed_once(architecture: str, changes: dict[str, Any], shares: bool) -> None:
    model = tiny(architecture, **changes)
    quantised = Variant(model).with_transform(INT8)
    assert Packed().unavailable(quantised, CPU) is None
    variant = quantised.with_transform(Packed())
    assert Packed().took_effect(quantised) is not None
    assert Packed().took_effect(variant) is None
    (module,) = set(variant.modules.values())
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    assert (embedding.weight is head.weight) is shares
    table = model.get_input_embeddings().weight
    assert table.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in module.parameters()}
    own = 0 if shares else sum(buffer.nbytes for buffer in embedding.buffers())
    assert stored_bytes(module) == stored_bytes(*quantised.modules.values()) - table.nbytes + own
    ids = torch.tensor(token_prompts(2))
    expected = head.dequantize()[ids] if shares else Int8Linear.from_weight(table).dequantize()[ids]
    assert torch.equal(embedding(ids), expected)


@pytest.mark.parametrize(
    ("architecture", "transforms", "said"),
    [
        ("llama", [], "is not packed: the table would stay"),
        ("llama", [WeightOnly(bits=8, skip="lm_head")], "is not packed: the table would stay"),
        ("llama", [WeightOnly(bits=8, phase="decode")], "prefill: lm_head shares"),
        ("llama", [INT8, Packed()], "packed already"),
        ("gemma3", [INT8], "does more than look rows up"),
        ("mamba", [INT8], "is not packed: the table would stay"),  # its own code reads lm_head's weight
    ],
)
def test_it_says_why_not(architecture: str, transforms: list[Transform], said: str) -> None:
    variant = Variant(tiny(architecture)).with_transforms(transforms)
    assert said in str(Packed().unavailable(variant, CPU))
    with pytest.raises(TransformError, match=said):
        variant.with_transform(Packed())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_rows_are_given_in_the_models_dtype(architecture: str, dtype: torch.dtype) -> None:
    model = tiny(architecture).to(dtype)
    variant = Variant(model).with_transforms([INT8, Packed()])
    (module,) = set(variant.modules.values())
    embedding, table, ids = module.get_input_embeddings(), model.get_input_embeddings().weight, torch.arange(200)
    assert table.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in module.buffers()}
    rows = embedding(ids)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, table[ids], rtol=0.02, atol=0.02)
    assert torch.equal(embedding.widened()(ids).to(dtype), rows)
    assert embedding.widened().weight is embedding.weight
    assert module(torch.tensor(token_prompts(2))).logits.dtype == dtype


def test_phases_with_modules_of_their_own_share_the_table() -> None:
    variant = Variant(tiny("phi3"))
    variant.edit("decode")
    prefill, decode = variant.with_transform(Packed()).modules.values()
    assert prefill is not decode
    assert prefill.get_input_embeddings().weight is decode.get_input_embeddings().weight


def test_a_table_that_cannot_be_quantised_is_an_expected_refusal() -> None:
    model = tiny("phi3")
    model.get_input_embeddings().weight[3, 3] = torch.nan
    with pytest.raises(TransformError, match="NaN"):
        Variant(model).with_transform(Packed())


def test_both_phases_compute_with_the_same_weights_of_about_a_third_of_the_originals_bytes() -> None:
    model = tiny()
    variant = Variant(model).with_transforms(transforms.make(name, given, phase) for name, phase, given in MEMORY)
    held = stored_bytes(*variant.modules.values())
    assert {phase: stored_bytes(module) for phase, module in variant.modules.items()} == {
        "prefill": held,
        "decode": held,
    }
    assert held <= 0.35 * stored_bytes(model)
