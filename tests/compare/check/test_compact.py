"""Kept tokens and a sample of the others against the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from autotune.compare.check import compact
from autotune.compare.check.compact import Compact
from autotune.validate.divergence import compare_logits

POSITIONS = 300


def logits(vocabulary: int, sharp: float = 2.0, seed: int = 0) -> torch.Tensor:
    return sharp * torch.randn(POSITIONS, vocabulary, generator=torch.Generator().manual_seed(seed))


def targets(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (POSITIONS,), generator=torch.Generator().manual_seed(9))


def bound(kept: Compact, worst: float, alpha: float = 1e-4) -> float:
    """The module's: how far the mean divergence may be off."""
    spread = math.expm1(worst) - worst
    return float(kept.tail_mass.max()) * spread * math.sqrt(math.log(2 / alpha) / (2 * len(kept) * compact.TAIL))


@pytest.mark.parametrize("vocabulary", [50, 256, 257, 3000])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.5])
def test_divergence_is_that_of_the_whole_vocabulary_within_the_stated_bound(vocabulary, noise):
    was, following = logits(vocabulary), targets(vocabulary)
    now = was + noise * logits(vocabulary, 1.0, seed=1)
    kept = Compact.of(was, following)
    mine, whole = kept.compare(now, following), compare_logits(was, now, following)
    log_r = (now.log_softmax(-1) - was.log_softmax(-1)).abs().max()
    allowed = bound(kept, 2 * float(log_r)) if vocabulary > compact.TOP else 0.0
    assert abs(mine.kld.mean() - whole.kld.mean()) <= allowed + 1e-6
    np.testing.assert_allclose(mine.delta_logp, whole.delta_logp, atol=1e-4)
    np.testing.assert_allclose(mine.delta_p, whole.delta_p, atol=1e-5)
    np.testing.assert_allclose(mine.top_p, whole.top_p, atol=1e-5)
    assert (mine.kld >= 0).all()


def test_the_estimate_is_close_where_half_of_the_mass_is_not_kept():
    was, following = logits(3000, sharp=1.0), targets(3000)
    now = was + 0.3 * logits(3000, 1.0, seed=1)
    kept = Compact.of(was, following)
    mine, whole = kept.compare(now, following), compare_logits(was, now, following)
    assert kept.tail_mass.mean() > 0.4
    assert mine.kld.mean() == pytest.approx(whole.kld.mean(), rel=0.05)
    lumped = Compact(
        kept.top_ids, kept.top_logp, kept.tail_ids[:, :0], kept.tail_logp[:, :0], kept.tail_mass, kept.target_logp
    )
    assert lumped.compare(now, following).kld.mean() < 0.8 * whole.kld.mean()  # without the sample it is blind there


def test_what_is_drawn_follows_the_distribution_of_what_was_not_kept():
    flat = torch.zeros(1, 1000)
    flat[0, 0], flat[0, 500:] = 9.0, -60.0  # one certain, 499 alike, 500 as good as impossible
    kept = Compact.of(flat.expand(200, -1), torch.zeros(200, dtype=torch.long))
    drawn = kept.tail_ids.flatten()
    assert drawn.max() < 500
    assert len(drawn.unique()) > 200


@pytest.mark.parametrize("beyond", [False, True])
def test_a_changed_top_token_has_the_gap_it_had(beyond):
    was = torch.arange(1000, 0, -1.0)[None] / 100
    now = was.clone()
    new = 600 if beyond else 5
    now[0, new] = 99.0
    found = Compact.of(was, torch.tensor([0])).compare(now, torch.tensor([0]))
    exact = compare_logits(was, now, torch.tensor([0])).top_gap[0]
    assert found.top_gap[0] == pytest.approx(2.55 if beyond else exact, abs=1e-4)  # at least the last kept one's
    assert found.top_gap[0] <= exact + 1e-4


@pytest.mark.parametrize("bad", [1e30, -torch.inf])
def test_absurd_logits_leave_finite_figures(bad):
    was, following = logits(600), targets(600)
    now = was.clone()
    now[:, 7] = bad
    found = Compact.of(was, following).compare(now, following)
    assert np.isfinite(found.kld).all()
    assert np.isfinite(found.top_gap).all()


def test_parts_join_and_split_again():
    was, following = logits(300), targets(300)
    kept = Compact.of(was, following)
    first, second = kept.split([100, 200])
    again = Compact.joined([first, second])
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors().values(), again.tensors().values(), strict=True))


def test_dense_has_the_kept_probabilities_and_sums_to_one():
    was, following = logits(3000), targets(3000)
    kept = Compact.of(was, following)
    dense = kept.dense(3000)
    assert torch.allclose(dense.exp().sum(-1), torch.ones(POSITIONS), atol=1e-4)
    assert torch.equal(dense.argmax(-1), was.argmax(-1))
