"""What those transforms promise for decode that leave its weights alone."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

import pytest

from autotune.diagnose.costs import MemoryUse, Operator, PhaseProfile, Profile
from autotune.diagnose.parts import CACHE
from autotune.transforms import make
from tests.diagnose.test_roofline import DECODE
from tests.transforms.test_contract import COMPILER

# 40 ms a token: 24 in 400 matmuls over 500 MB, which take 20 at 25 GB/s; 4 in attention and 3 around it, 1 of them to
# write the cache; 2 outside the model's forward.
TOKEN = replace(
    DECODE,
    cache_bytes=0.0,
    attention_flops=0.0,
    operators=(Operator(CACHE, 0.001, 0.0, 0.0, "memory"),),
    around_attention_s=0.003,
    loop_s=0.002,
    matmul_count=400,
)


@pytest.mark.parametrize(
    ("name", "params", "phase", "after_s"),
    [
        ("lean_loop", {}, TOKEN, 0.038),
        ("lean_loop", {}, replace(TOKEN, loop_s=nan), 0.028),
        ("static_cache", {}, TOKEN, 0.037),
        ("one_query_attention", {}, TOKEN, 0.033),
        ("compile_step", {}, TOKEN, 0.0304),
        ("step_program", {}, TOKEN, 0.020),
        ("step_program", {}, replace(TOKEN, compute_dtype="bfloat16"), 0.020),  # BF16 is emulated here, it is not used
        ("threads", {"count": 1}, TOKEN, 0.0388),
    ],
)
def test_prediction(name: str, params: dict[str, Any], phase: PhaseProfile, after_s: float) -> None:
    profile = Profile({"decode": phase}, (), (), MemoryUse(0, 0, 0), 1, 1)
    transform = make(name, params, "decode")
    assert transform.predict(profile, replace(COMPILER, threads=2)) == pytest.approx({"decode": 0.040 / after_s})
