"""Linear layers over rows: the same numbers, the same tensors, whatever the input's strides are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autotune.machine import hardware
from autotune.runtime.variant import Variant
from autotune.transforms import make
from autotune.transforms.flat_linears import FlatLinear
from autotune.transforms.wide_arithmetic import WideArithmetic, WideLinear
from autotune.validate import exam as exams
from tests.models import tiny, token_prompts

FLAT = make("flat_linears", {}, "prefill")


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies BF16."""
    monkeypatch.setattr("autotune.transforms.flat_linears.emulated", lambda dtype: False)
    monkeypatch.setattr("autotune.validate.exam.emulated", lambda dtype: False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [FlatLinear, WideLinear])
@pytest.mark.parametrize("last", [1, 3, 40])
def test_a_slice_gives_what_its_rows_give(kind: type[nn.Module], last: int, bias: bool) -> None:
    layer = nn.Linear(32, 48, bias=bias).bfloat16()
    x = torch.randn(2, 40, 32).bfloat16()[:, -last:]
    got = kind(layer)(x)
    expected = layer(x.contiguous().view(-1, 32)).view(2, last, 48)
    assert got.shape == (2, last, 48)
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("able")
def test_prefill_is_exchanged_and_shares_every_tensor() -> None:
    model = tiny("llama").bfloat16()
    variant = Variant(model).with_transform(FLAT)
    assert FLAT.extra_bytes(Variant(model)) == 0
    assert FLAT.took_effect(variant) is None
    assert FLAT.took_effect(Variant(model)) is not None
    assert variant.modules["decode"] is model
    head = variant.modules["prefill"].get_output_embeddings()
    assert isinstance(head, FlatLinear)
    assert head.weight is model.get_output_embeddings().weight
    ids = torch.tensor(token_prompts(2, length=8))
    with torch.no_grad():
        got, expected = (m(ids, logits_to_keep=1).logits for m in (variant.modules["prefill"], model))
    torch.testing.assert_close(got, expected)


def test_who_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here = hardware.identify()
    for emulated in (True, False):
        monkeypatch.setattr("autotune.transforms.flat_linears.emulated", lambda dtype, emulated=emulated: emulated)
        reason = FLAT.unavailable(Variant(tiny("llama").bfloat16()), here)
        assert (reason is not None) == emulated
        assert "FP32" in str(reason) or "emulates" in str(reason) or reason is None
    assert "float32" in str(FLAT.unavailable(Variant(tiny("llama")), here))


@pytest.mark.parametrize(
    ("dtype", "emulated", "expected"),
    [
        (torch.float32, False, None),
        (torch.bfloat16, False, "flat_linears"),
        (torch.bfloat16, True, "wide_arithmetic"),
        (torch.float16, True, "wide_arithmetic"),
        (torch.float16, False, None),
    ],
)
def test_what_exams_read_with(
    dtype: torch.dtype, emulated: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.validate.exam.emulated", lambda given: emulated and given != torch.float32)
    found = exams.reads_with(tiny("llama").to(dtype))
    assert (found and found.name) == expected
    assert isinstance(found, WideArithmetic) == (expected == "wide_arithmetic")
