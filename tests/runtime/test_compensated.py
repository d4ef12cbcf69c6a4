"""INT4 rounding that is compensated for what a layer reads: how much it helps, and where it must change nothing."""

from __future__ import annotations

from itertools import starmap

import pytest
import torch
from torch import Tensor

from autotune.runtime.kernels import compensated, pack

SHAPES = [  # outputs, inputs, group
    (48, 64, 32),
    (40, 256, 32),  # two blocks
    (16, 200, 64),  # inputs are not whole groups, and end within a block
    (33, 70, 32),
    (16, 96, 0),  # one scale per row
]


def drawn(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs that depend on one another, and others of the same kind."""
    chance = torch.Generator().manual_seed(seed)
    causes = torch.randn(2, 3000, inputs // 4, generator=chance)
    read, unseen = causes @ torch.randn(inputs // 4, inputs, generator=chance) + torch.randn(
        2, 3000, inputs, generator=chance
    )
    return torch.randn(outputs, inputs, generator=chance), read, unseen


def error(packed: tuple[Tensor, Tensor, Tensor], weight: Tensor, inputs: Tensor) -> float:
    """||X (W - Wq)^T||."""
    return float(((weight - pack.dequantize_i4(*packed, *weight.shape)) @ inputs.T).norm())


@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_outputs_lose_little_more_than_half_of_what_the_nearest_numbers_lose(
    outputs: int, inputs: int, group: int
) -> None:
    weight, read, unseen = drawn(outputs, inputs)
    made = compensated.quantize_i4(weight, compensated.moments(read), group)
    nearest = pack.quantize_i4(weight, group)
    assert [(part.shape, part.dtype) for part in made] == [(part.shape, part.dtype) for part in nearest]
    assert error(made, weight, unseen) <= 0.6 * error(nearest, weight, unseen)


@pytest.mark.parametrize("group", [32, 64, 0])
def test_inputs_that_have_nothing_in_common_get_the_nearest_numbers(group: int) -> None:
    weight = drawn(40, 192)[0]
    assert all(starmap(torch.equal, zip(*both(weight, torch.eye(192) * 7, group), strict=True)))


def both(weight: Tensor, moments: Tensor, group: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return compensated.quantize_i4(weight, moments, group), pack.quantize_i4(weight, group)


def test_what_is_never_read_keeps_its_nearest_number_and_takes_no_error() -> None:
    weight, read, _ = drawn(32, 96)
    read[:, 32:64] = 0
    made, nearest = (
        pack.dequantize_i4(*packed, *weight.shape) for packed in both(weight, compensated.moments(read), 32)
    )
    assert torch.equal(made[:, 32:64], nearest[:, 32:64])
    assert not torch.equal(made[:, :32], nearest[:, :32])
    everything = compensated.moments(torch.zeros(5, 96))
    assert all(starmap(torch.equal, zip(*both(weight, everything, 32), strict=True)))


def test_blocks_and_parts_of_rows_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, read, unseen = drawn(64, 200)
    moments = compensated.moments(read)
    whole = compensated.quantize_i4(weight, moments)
    assert all(starmap(torch.equal, zip(whole, compensated.quantize_i4(weight, moments), strict=True)))
    monkeypatch.setattr(compensated, "BLOCK", 24)
    monkeypatch.setattr(compensated, "AT_ONCE", 16 * 200)
    parts = compensated.quantize_i4(weight, moments)
    assert error(parts, weight, unseen) == pytest.approx(error(whole, weight, unseen), rel=0.01)


def test_every_token_counts_alike() -> None:
    read = drawn(8, 64)[1]
    louder = read.clone()
    louder[::2] *= 100
    torch.testing.assert_close(compensated.moments(louder), compensated.moments(read), rtol=1e-4, atol=1e-3)
    assert compensated.moments(read.view(30, 100, 64).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight, read, _ = drawn(16, 64)
    with pytest.raises(ValueError, match="inputs hold NaN"):
        compensated.quantize_i4(weight, compensated.moments(read) * bad)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="weight holds NaN"):
        compensated.quantize_i4(weight, compensated.moments(read))
