"""What the machine can do, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from . import busy, compilers, peaks
from . import device as devices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .device import Device

LIBRARIES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "autotune": "autotune-inference",
}
OPTIONAL_LIBRARIES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes"}
# Relative difference between two tries of a peak that shows a disturbance. On a quiet machine the best of several
# rounds repeats within 0.1.
UNEVEN = 0.2
# Of FP32's peak, by packed weights with inputs of 16 bits (AVX2 and VNNI reach 1.4) and, on AVX2, of 8 bits (it reaches
# 1.9): `python -m benchmarks.products`.
INT16_RATE, INT8_RATE_AVX2 = 1.5, 2.2
# Factor by which a peak measured beside other processes may be too low. With two threads and five other processes on
# two cores, each thread had to wait for the other, and a matmul reached 0.6 GFLOP/s instead of 80.
DOUBT = 100.0


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
        flops_per_s: measured matmul peak by dtype name ("float32", "bfloat16", "float16"; on a GPU also "int8" and
            "float8_e4m3fn", if it supports them, and "tf32" instead of "float32" where the process computes in it).
        compiler: C++ compiler found, or None.
        versions: library name to version.
        measured: False if a figure is a datasheet value or is missing.
        disturbed: whether other work disturbed the measurement, so that a peak may be too low.
        vector_bytes_per_s: measured bytes/s of weights that torch's own kernels multiply by one row, by dtype name; on
            a CPU, for dtypes that it does not emulate.
        core_bytes_per_s: measured read bandwidth of one thread on a CPU; NaN if not measured.
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
    disturbed: bool = False
    vector_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    core_bytes_per_s: float = math.nan

    def peak_flops_per_s(self, dtype: str) -> float:
        """The matmul peak of `dtype`. For a dtype that was not measured, an upper bound: predictions must be ceilings.

        The bound is the best known peak. For 8-bit numbers it is at least four times FP32's, since four of them fit in
        the space of one; AVX2 alone has no instruction that adds up their products. On a GPU it is also at least twice
        the 16-bit peak, since tensor cores do twice as many operations on 8 bits as on 16 (NVIDIA's datasheets, Ampere
        to Blackwell). They do half as many in TF32, which is at least as fast as FP32 without them.

        "int16" is the arithmetic of packed INT8 and INT4 weights on a CPU, by inputs of 16 bits; "bfloat16x3" are three
        BF16 products in place of one in FP32.
        """
        peaks = self.flops_per_s
        if dtype in peaks:
            return peaks[dtype]
        if dtype == "int8" and self.device == "cpu" and self.capability == "AVX2":
            return peaks.get("float32", 0.0) * INT8_RATE_AVX2
        if dtype == "bfloat16x3":
            return self.peak_flops_per_s("bfloat16") / 3
        if dtype == "int16":
            return peaks.get("float32", 0.0) * (INT16_RATE if self.capability in ("AVX2", "AVX512") else 1.0)
        best, half = max(peaks.values()), max(peaks.get(name, 0.0) for name in ("bfloat16", "float16"))
        if dtype == "float32" and "tf32" in peaks:
            return peaks["tf32"]
        if dtype == "tf32" and half:
            return max(peaks.get("float32", 0.0), half / 2)
        if dtype not in ("int8", "float8"):
            return best
        return max(best, 4 * peaks.get("float32", 0.0), 2 * half if self.device == "cuda" else 0)

    def at_best(self, *, bandwidth: bool = True, flops: bool = True) -> Hardware:
        """The same machine with peaks as high as they could be undisturbed; itself if nothing disturbed them."""
        if not self.disturbed:
            return self
        return replace(
            self,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s * (DOUBT if bandwidth else 1),
            flops_per_s={name: peak * (DOUBT if flops else 1) for name, peak in self.flops_per_s.items()},
            vector_bytes_per_s={},  # any kernel may be as fast as the memory, and so may any core
            core_bytes_per_s=math.nan,
        )


_known: dict[tuple[Device, int], Hardware] = {}


def identify(where: str | torch.device | PreTrainedModel = "cpu") -> Hardware:
    """Identify this machine without measuring its peaks (the bandwidth is NaN, FLOP/s are empty).

    Args:
        where: as in `probe`.
    """
    device = devices.of(where)
    identity = device.identity()
    return Hardware(
        device=device.kind,
        name=identity.name,
        capability=identity.capability,
        threads=torch.get_num_threads(),
        memory_bytes=identity.memory_bytes,
        bandwidth_bytes_per_s=math.nan,
        flops_per_s={},
        compiler=compilers.path(),
        versions=library_versions(),
        measured=False,
    )


def probe(
    where: str | torch.device | PreTrainedModel = "cpu", *, again: bool = False, turn: peaks.Turn = nullcontext
) -> Hardware:
    """Measure this machine at the process's present thread count; two to three seconds, once per process and device.

    Args:
        where: "cpu", "cuda", "cuda:N", or a model, which means the device of its first weights.
        again: repeat a measurement that was disturbed, and keep the better figures.
        turn: makes a context that keeps live requests out; see `peaks.measure`.
    """
    key = devices.of(where), torch.get_num_threads()
    if (known := _known.get(key)) is None:
        _known[key] = _probe(key[0], turn)
    elif again and known.disturbed:
        _known[key] = _better(known, _probe(key[0], turn))
    return _known[key]


def _better(old: Hardware, new: Hardware) -> Hardware:
    """Combine two measurements of one machine: the better peaks, and `disturbed` of the second one."""

    def best(one: Mapping[str, float], other: Mapping[str, float]) -> Mapping[str, float]:
        return {name: max(rate, other.get(name, 0.0)) for name, rate in one.items()}

    return replace(
        new,
        bandwidth_bytes_per_s=max(old.bandwidth_bytes_per_s, new.bandwidth_bytes_per_s),
        flops_per_s=best(new.flops_per_s, old.flops_per_s),
        vector_bytes_per_s=best(new.vector_bytes_per_s, old.vector_bytes_per_s),
        core_bytes_per_s=max(old.core_bytes_per_s, new.core_bytes_per_s),
    )


def _probe(device: Device, turn: peaks.Turn) -> Hardware:
    meter = busy.Meter()
    with torch.inference_mode():
        reached = peaks.measure(device, turn)
    beside_others = not device.asynchronous and busy.is_noticeable(meter.elsewhere())  # a GPU's peaks need no CPU
    if device.asynchronous:
        device.trim()  # free the measurement's memory for the model
    return replace(
        identify(device.where),
        bandwidth_bytes_per_s=reached.bandwidth_bytes_per_s,
        flops_per_s=reached.flops_per_s,
        measured=True,
        disturbed=beside_others or reached.spread > UNEVEN,
        vector_bytes_per_s=reached.vector_bytes_per_s,
        core_bytes_per_s=reached.core_bytes_per_s,
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries a result depends on, read from their metadata without importing them."""
    found = {}
    for name, distribution in (LIBRARIES | OPTIONAL_LIBRARIES).items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue  # optional, or autotune itself run from its source tree
    return found
