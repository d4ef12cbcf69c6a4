"""What a variant costs: prefill and decode measured apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from ..workload import Phase


@dataclass(frozen=True)
class Operator:
    """One row of the operator table.

    Args:
        group: "attention", "FFN", "norm", "KV-cache update", "lm_head", "framework overhead" or "other".
        seconds: time per call (prefill) or per token (decode).
        flops: floating-point operations per call or token.
        moved_bytes: bytes that must move per call or token.
        bottleneck: "compute", "memory", "overhead" or "-".
    """

    group: str
    seconds: float
    flops: float
    moved_bytes: float
    bottleneck: str


@dataclass(frozen=True)
class PhaseProfile:
    """One phase of one variant.

    Args:
        phase: "prefill" or "decode".
        samples_s: TTFT samples (prefill) or TPOT samples (decode), seconds, unloaded and unprofiled.
        flops: FLOPs per call (prefill) or per token (decode).
        weight_bytes: weight bytes that must move per call or token, as stored.
        cache_bytes: KV-cache bytes read and written per call or token.
        busy: share of the time the device works inside operators, 0 to 1.
        compute_dtype: dtype the matmuls run in ("float32", ...), the key into Hardware.flops_per_s.
        linear_s: seconds of a call or token spent in matmuls over weights.
        attention_s: seconds in attention proper.
        operator_count: operators dispatched per call or token.
        sync_s: seconds the host waits for the device per call or token (0 on a CPU).
        operators: the operator table.
    """

    phase: Phase
    samples_s: tuple[float, ...]
    flops: float
    weight_bytes: float
    cache_bytes: float
    busy: float
    compute_dtype: str
    linear_s: float
    attention_s: float
    operator_count: int
    sync_s: float
    operators: tuple[Operator, ...]

    @property
    def seconds(self) -> float:
        """Median time of one call (prefill) or one token (decode)."""
        return median(self.samples_s)

    @property
    def moved_bytes(self) -> float:
        """Bytes that must move per call or token."""
        return self.weight_bytes + self.cache_bytes

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte (Williams et al., Roofline, 2009)."""
        return self.flops / self.moved_bytes


@dataclass(frozen=True)
class ScalePoint:
    """Decode throughput at one batch size, or time per token at one context length."""

    batch: int
    context: int
    seconds_per_step: float

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.seconds_per_step


@dataclass(frozen=True)
class MemoryUse:
    """Peak memory by owner, bytes."""

    weights_bytes: int
    cache_bytes: int
    activations_bytes: int


@dataclass(frozen=True)
class Profile:
    """Both phases, and how decode grows with batch and context."""

    phases: Mapping[Phase, PhaseProfile]
    batch_scaling: tuple[ScalePoint, ...]
    context_growth: tuple[ScalePoint, ...]
    memory: MemoryUse
    prompt_tokens: int
    batch: int
