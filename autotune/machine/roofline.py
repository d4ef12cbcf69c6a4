"""The roofline model's formulas: the work to be done, and how fast a machine could do it.

Every operand is counted once, and every term is defined only here. Source: Williams, Waterman and Patterson,
"Roofline: an insightful visual performance model", CACM 52(4), 2009.
"""

from __future__ import annotations

from typing import Literal


def matmul_flops(m: int, n: int, k: int) -> int:
    """FLOPs of [m, k] x [k, n]: one multiplication and one addition per term."""
    return 2 * m * n * k


def intensity(flops: float, moved_bytes: float) -> float:
    """Arithmetic intensity, FLOPs per byte; infinite where nothing moves."""
    return flops / moved_bytes if moved_bytes else float("inf")


def ridge(peak_flops_per_s: float, bandwidth_bytes_per_s: float) -> float:
    """The intensity, FLOPs per byte, above which computing takes longer than moving data."""
    return peak_flops_per_s / bandwidth_bytes_per_s


def classify(intensity: float, ridge: float) -> Literal["compute", "memory"]:
    """Which limit applies: compute above the ridge, memory below it."""
    return "compute" if intensity > ridge else "memory"


def floor_s(flops: float, moved_bytes: float, peak: float, bandwidth: float) -> float:
    """Shortest possible time in seconds. Computing and moving data overlap, so the longer of the two counts.

    Args:
        flops: floating-point operations to be done.
        moved_bytes: bytes to be moved.
        peak: FLOP/s.
        bandwidth: bytes/s.
    """
    return max(flops / peak, moved_bytes / bandwidth)


def kv_cache_bytes(tokens: int, layers: int, kv_heads: int, head_size: int, bytes_per_element: float) -> float:
    """Bytes of the keys and values of `tokens` tokens. Grouped-query attention has fewer `kv_heads` than heads."""
    return 2 * tokens * layers * kv_heads * head_size * bytes_per_element
