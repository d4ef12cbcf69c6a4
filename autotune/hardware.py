"""What the machine can do, measured."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import device as devices
from .peaks import matmul_peaks, read_bandwidth

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
COMPILERS = ("c++", "g++", "clang++")


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
        flops_per_s: measured matmul peak by dtype name ("float32", "bfloat16", "float16"; on a GPU also "tf32", "int8"
            and "float8_e4m3fn", where it has them).
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


def probe(where: str | torch.device | PreTrainedModel = "cpu") -> Hardware:
    """Measure this machine at the process's present thread count; under two seconds, once per process and device.

    Args:
        where: "cpu", "cuda", "cuda:N", or a model, which means the device of its first weights.
    """
    return _probe(devices.of(where), torch.get_num_threads())


@functools.cache
def _probe(device: Device, threads: int) -> Hardware:
    identity = device.identity()
    with torch.inference_mode():
        found = Hardware(
            device=device.kind,
            name=identity.name,
            capability=identity.capability,
            threads=threads,
            memory_bytes=identity.memory_bytes,
            bandwidth_bytes_per_s=read_bandwidth(device),
            flops_per_s=matmul_peaks(device),
            compiler=find_compiler(),
            versions=library_versions(),
        )
    if device.asynchronous:
        device.trim()  # what was measured with is the model's again
    return found


def instruction_set() -> str:
    """The vector instructions torch uses here; "NEON" on every 64-bit ARM, where torch calls them its default."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() in ("aarch64", "arm64") and capability == "DEFAULT":
        return "NEON"
    return capability


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, platform.processor() or platform.machine())


def instruction_sets() -> str:
    """The CPU's model and instruction sets, as far as the system tells: what code compiled here depends on."""
    told = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told += sorted({line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))})
    return "\n".join(told)


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(limit)
        if file.exists() and (text := file.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def find_compiler() -> str | None:
    """Path of a C++ compiler: $CXX, or the first of the usual names on the path."""
    candidates = (os.environ.get("CXX", ""), *COMPILERS)
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def library_versions() -> dict[str, str]:
    """Versions of the libraries a result depends on, read from their metadata without importing them."""
    found = {}
    for name, distribution in (LIBRARIES | OPTIONAL_LIBRARIES).items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue  # optional, or autotune itself run from its source tree
    return found
