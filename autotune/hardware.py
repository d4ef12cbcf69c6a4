"""What the machine can do, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """The machine as this process sees it.

    Args:
        device: "cpu" or "cuda".
        name: processor or GPU name.
        capability: instruction set ("AVX512", "AVX2", "NEON") or compute capability ("9.0").
        threads: intra-op threads the figures were measured with.
        memory_bytes: memory in total.
        bandwidth_bytes_per_s: measured read bandwidth.
        flops_per_s: measured matmul peak by dtype name ("float32", "bfloat16", "float16", "int8").
        compiler: C++ compiler found, or None.
        versions: library name to version.
        measured: False where a figure is a datasheet value.
    """

    device: str
    name: str
    capability: str
    threads: int
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    compiler: str | None
    versions: Mapping[str, str]
    measured: bool = True
