"""Sketches of hidden states, and the layer at which a difference begins."""

from __future__ import annotations

import pytest
import torch

from autotune.compare.check.layers import QUIET, WIDTH, Shift, fingerprint, first_jump, shifts, sketch, stages
from tests.models import ARCHITECTURES, tiny, token_prompts


def test_distances_between_sketches_are_those_between_states():
    draw = torch.Generator().manual_seed(0)
    was = torch.randn(64, 576, generator=draw)
    now = was + 0.1 * torch.randn(64, 576, generator=draw)
    near, far = (sketch(now) - sketch(was)).norm(), (now - was).norm()
    assert sketch(was).shape == (64, WIDTH)
    assert float(near / far) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_has_its_stages(name):
    model = tiny(name)
    assert len(stages(model)) == model.config.get_text_config().num_hidden_layers + 2
    found = fingerprint(model, token_prompts(2, 20))
    assert found.keys() == stages(model).keys()
    assert not any(module._forward_hooks for module in model.modules())
    assert first_jump(shifts(found, fingerprint(model, token_prompts(2, 20)))) is None


@pytest.mark.parametrize(
    ("deviations", "first"),
    [
        ([0.0, 0.0, 0.0], None),
        ([QUIET / 2] * 3, None),
        ([0.0, 0.0, 0.2], "2"),
        ([0.0, 0.1, 0.2], "1"),
        ([0.002, 0.004, 0.008], "0"),
        ([QUIET / 2, QUIET, 0.1], "2"),
        ([0.0, float("inf"), float("inf")], "1"),
        ([], None),
    ],
)
def test_the_first_jump(deviations, first):
    assert first_jump([Shift(str(k), d) for k, d in enumerate(deviations)]) == first
