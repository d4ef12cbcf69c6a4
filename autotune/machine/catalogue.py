"""Other machines that a model could run on, with their vendors' figures, which are promised and not measured.

A GPU's peaks are dense ones, with FP32 accumulation. A CPU's figures are computed from its product page: channels x
transfers/s x 8 bytes, and cores x base clock x FLOP per cycle and core. Two FMA units of 256 bits (Zen 4) do 32 FLOP a
cycle in FP32 and twice as many in BF16 (VDPBF16PS), two of 512 bits (Zen 5, Xeon) 64 in FP32; AMX does 1024 in BF16 and
2048 in INT8 (Intel's optimization manual, chapter on AMX). A dtype whose peak is not certain is not listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .hardware import Hardware


@dataclass(frozen=True)
class Machine:
    """One processor or GPU.

    Args:
        name: its usual name.
        device: "cpu" or "cuda".
        system_name: the name that the system reports: a GPU's whole name, a part of a CPU's.
        memory_bytes: a GPU's memory; None for a CPU, whose memory size varies.
        bandwidth_bytes_per_s: memory bandwidth.
        flops_per_s: dense matmul peak by dtype name, as in `Hardware.flops_per_s`.
        source: where the figures come from, or how they were computed.
    """

    name: str
    device: str
    system_name: str
    memory_bytes: int | None
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    source: str

    def is_here(self, hardware: Hardware) -> bool:
        """Whether this is the machine of `hardware`. A MIG instance of a GPU has another name than the GPU."""
        if self.device == "cuda":
            return hardware.name == self.system_name
        return hardware.device == "cpu" and self.system_name in hardware.name


def _cpu(
    name: str, system_name: str, memory: tuple[int, str, int], cores: int, ghz: float, per_cycle: Mapping[str, int]
) -> Machine:
    """A CPU with its memory (channels, kind, millions of transfers/s), base clock and FLOP per cycle and core."""
    channels, kind, rate = memory
    work = ", ".join(f"{flops} in {dtype}" for dtype, flops in per_cycle.items())
    return Machine(
        name,
        "cpu",
        system_name,
        None,
        channels * rate * 8e6,
        {dtype: cores * ghz * 1e9 * flops for dtype, flops in per_cycle.items()},
        f"product page: {channels} x {kind}-{rate}, {cores} cores of {ghz} GHz; FLOP a cycle and core: {work}",
    )


def _gpu(
    name: str, system_name: str, memory_gb: int, gb_per_s: float, tera: tuple[float, float, float, float], source: str
) -> Machine:
    """A GPU with its peaks in 1e12/s: float32, tf32, bfloat16 and float16, int8."""
    peaks = zip(("float32", "tf32", "bfloat16", "float16", "int8"), (*tera[:3], *tera[2:]), strict=True)
    flops_per_s = {dtype: 1e12 * rate for dtype, rate in peaks}
    return Machine(name, "cuda", system_name, memory_gb * 10**9, 1e9 * gb_per_s, flops_per_s, source)


ZEN4, ZEN5 = {"float32": 32, "bfloat16": 64}, {"float32": 64, "bfloat16": 128}
XEON = {"float32": 64, "bfloat16": 1024, "int8": 2048}
SHEET, SPARSE = "data sheet", "data sheet, half of the sparse peaks"
GEFORCE = "NVIDIA GeForce RTX 4090"
MACHINES: tuple[Machine, ...] = (
    _cpu("AMD Ryzen 9 9950X", "Ryzen 9 9950X", (2, "DDR5", 5600), 16, 4.3, ZEN5),
    _cpu("Intel Xeon Platinum 8480+", "Platinum 8480+", (8, "DDR5", 4800), 56, 2.0, XEON),
    _cpu("AMD Ryzen Threadripper PRO 7995WX", "PRO 7995WX", (8, "DDR5", 5200), 96, 2.5, ZEN4),
    _cpu("AMD EPYC 9654", "EPYC 9654", (12, "DDR5", 4800), 96, 2.4, ZEN4),
    _cpu("AMD EPYC 9755", "EPYC 9755", (12, "DDR5", 6000), 128, 2.7, ZEN5),
    _cpu("Intel Xeon 6980P", "6980P", (12, "MRDIMM", 8800), 128, 2.0, XEON),
    _gpu("NVIDIA L4", "NVIDIA L4", 24, 300, (30.3, 60, 121, 242.5), SPARSE),
    _gpu("NVIDIA A10", "NVIDIA A10", 24, 600, (31.2, 62.5, 125, 250), SHEET),
    _gpu(GEFORCE, GEFORCE, 24, 1008, (82.6, 82.6, 165.2, 660.6), "Ada GPU architecture whitepaper"),
    _gpu("NVIDIA A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 80, 2039, (19.5, 156, 312, 624), SHEET),
    _gpu("NVIDIA H100 SXM", "NVIDIA H100 80GB HBM3", 80, 3350, (67, 494.5, 989.5, 1979), SPARSE),
    _gpu("NVIDIA H200 SXM", "NVIDIA H200", 141, 4800, (67, 494.5, 989.5, 1979), SPARSE),
)
