"""The costs of a model's phases, as values: time, bytes, FLOPs, operators, kernels, growth, memory.

`autotune.profile` measures them; diagnosis, predictions and reports read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from statistics import median
from typing import TYPE_CHECKING

from ..workload import Phase

if TYPE_CHECKING:
    from ..machine.device.counters import Counters


@dataclass(frozen=True)
class Kernel:
    """One row of the kernel table.

    Args:
        name: of the kernel.
        operator: the operator it belongs to ("aten::mm"); empty if unknown, as in a graph.
        group: part of the model ("attention", "FFN", ...); empty if unknown.
        count: how often it ran in the call or token.
        seconds: total device time.
        occupancy: mean estimated share of the warps that fit, 0 to 1, weighted by time; None if not reported.
    """

    name: str
    operator: str
    group: str
    count: int
    seconds: float
    occupancy: float | None = None


@dataclass(frozen=True)
class Copy:
    """Copies of one direction ("HtoD", "DtoH", "DtoD", ...) in a call or token."""

    direction: str
    count: int
    seconds: float
    size_bytes: int


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
class DeviceUse:
    """What a GPU did in a call (prefill) or for a token (decode), scaled to the unprofiled time.

    The profiler slows down the host but not the device. Therefore busy time is taken from the trace. The rest of the
    unprofiled time is idle and is divided in the trace's proportions.

    Args:
        busy_s: seconds in which at least one stream worked.
        launches: launches of kernels by the host; a graph counts once.
        kernel_count: kernels that ran.
        gap_s: seconds in gaps between stretches of work.
        host_wait_s: part of `gap_s` in gaps in which nothing was queued: the next kernel was launched later.
        late: share of the gaps in which nothing was queued, 0 to 1.
        copy_s: seconds in which data moved from or to the host and no kernel ran.
        graph_launches: launches that started a graph.
        launch_s: median time from a late launch to its kernel's start.
        event_s: seconds between two events of the device around the call or token; NaN if not measured.
        copies: copies by direction.
        kernels: the kernel table, the longest first.
        counters: NVML's readings during that time.
    """

    busy_s: float
    launches: int
    kernel_count: int
    gap_s: float
    host_wait_s: float
    late: float
    copy_s: float
    graph_launches: int = 0
    launch_s: float = 0.0
    event_s: float = nan
    copies: tuple[Copy, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    counters: Counters | None = None


@dataclass(frozen=True)
class PhaseProfile:
    """One phase of one variant.

    Args:
        phase: "prefill" or "decode".
        samples_s: TTFT samples (prefill) or TPOT samples (decode), seconds, unloaded and unprofiled.
        flops: FLOPs per call (prefill) or per token (decode).
        weight_bytes: weight bytes that must move per call or token, as stored.
        cache_bytes: KV-cache bytes read and written per call or token.
        busy: share of the time in which the device works inside operators, 0 to 1.
        compute_dtype: what the matmuls compute in ("float32", "int8", ...), see `Hardware.peak_flops_per_s`.
        linear_s: seconds of a call or token spent in matmuls over weights.
        attention_s: seconds in attention proper.
        operator_count: operators dispatched per call or token.
        sync_s: seconds the host waits for the device per call or token (0 on a CPU).
        operators: the operator table.
        attention_flops: FLOPs of attention proper, part of `flops`.
        small_s: seconds in operators so small that their start costs more than their work.
        around_attention_s: seconds in work that another attention may not need: rotary embeddings, masks, repeated
            keys, cache updates, and the part of a compiled step that is neither a matmul nor attention.
        device: what a GPU did during that time; None on a CPU.
        growth_s: seconds of a token that grow with the context; 0 if not measured.
        stored_bytes: bytes of the distinct weights of the phase's module. Without the other phase's and the original's.
        loop_s: seconds outside the model's forward: generate's preparation, the choice of a token; NaN if unknown.
        matmul_count: operators per call or token that are matmuls over weights or attention.
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
    attention_flops: float = 0.0
    small_s: float = 0.0
    around_attention_s: float = 0.0
    device: DeviceUse | None = None
    growth_s: float = 0.0
    stored_bytes: float = 0.0
    loop_s: float = nan
    matmul_count: int = 0

    @property
    def idle(self) -> float:
        """Share of the time in which the device does nothing, 0 to 1."""
        return max(0.0, 1 - self.busy)

    @property
    def host_s(self) -> float:
        """Seconds in which a GPU idles because of the host: wall clock minus device time. 0 on a CPU."""
        return max(0.0, self.seconds - self.device.busy_s) if self.device is not None else 0.0

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
    """Peak memory by owner, bytes.

    Args:
        weights_bytes: distinct weights of the original and of both phases' modules, all of which stay in memory.
        cache_bytes: of the requests that are measured, at their end.
        activations_bytes: of their prefill.
    """

    weights_bytes: int
    cache_bytes: int
    activations_bytes: int


@dataclass(frozen=True)
class Profile:
    """Both phases, and how decode grows with batch and context.

    Args:
        phases: each phase on the workload's median prompt.
        batch_scaling: decode by batch size; empty if not measured.
        context_growth: decode by context length, one sequence at a time; empty if not measured.
        memory: peak memory.
        prompt_tokens: tokens of the prompt that was measured.
        batch: sequences generated together.
        query_heads_per_kv_head: query heads that share a key and value head; None without a KV cache.
    """

    phases: Mapping[Phase, PhaseProfile]
    batch_scaling: tuple[ScalePoint, ...]
    context_growth: tuple[ScalePoint, ...]
    memory: MemoryUse
    prompt_tokens: int
    batch: int
    query_heads_per_kv_head: float | None = None
