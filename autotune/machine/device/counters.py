"""What a GPU says about itself while it works: a value, and what in it deserves a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import mean
from typing import Any

AVERAGED = frozenset({
    "sm_utilization", "memory_utilization", "sm_clock_hz", "memory_clock_hz", "power_w",
    "sm_active", "sm_occupancy", "tensor_active", "dram_active",
})  # fmt: skip
HARMLESS = frozenset({"idle", "application clocks", "display clocks"})  # reasons that the user or the load gave


@dataclass(frozen=True)
class Counters:
    """Readings of a GPU's counters over a phase; None where a figure is not available, with the reason.

    Shares are of 1. The highest reading counts, unless it says otherwise.

    Args:
        sm_utilization: share of the time in which some kernel ran, mean; not how much of the GPU it used.
        memory_utilization: share of the time in which memory was read or written, mean.
        sm_clock_hz, sm_clock_max_hz: of the multiprocessors, mean and highest possible.
        memory_clock_hz, memory_clock_max_hz: of the memory, mean and highest possible.
        lowered: why clocks were below what they could be.
        temperature_c: of the GPU.
        power_w, power_limit_w: drawn, mean, and allowed.
        memory_used_bytes, memory_total_bytes: of all processes.
        other_processes, other_bytes: that compute on the device beside this one, and their memory.
        mig: whether the device is divided into instances.
        ecc_errors: uncorrected memory errors since the driver was loaded.
        sm_active: share of the time that a multiprocessor had a warp, mean over all (GPM, Hopper and later).
        sm_occupancy: share of the warps that fit, mean (GPM).
        tensor_active: share of the time that tensor cores worked, mean (GPM).
        dram_active: share of the memory's theoretical bandwidth (GPM).
        readings: how many there were.
        unavailable: figure -> why.
    """

    sm_utilization: float | None = None
    memory_utilization: float | None = None
    sm_clock_hz: float | None = None
    sm_clock_max_hz: float | None = None
    memory_clock_hz: float | None = None
    memory_clock_max_hz: float | None = None
    lowered: tuple[str, ...] | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    other_processes: int | None = None
    other_bytes: int | None = None
    mig: bool | None = None
    ecc_errors: int | None = None
    sm_active: float | None = None
    sm_occupancy: float | None = None
    tensor_active: float | None = None
    dram_active: float | None = None
    readings: int = 0
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @property
    def told(self) -> int:
        """How many figures there are."""
        return sum(getattr(self, name) is not None for name in FIGURES)

    def warnings(self) -> tuple[str, ...]:
        """What makes figures of this device doubtful."""
        found = []
        if reasons := [reason for reason in self.lowered or () if reason not in HARMLESS]:
            clocks = ""
            if self.sm_clock_hz and self.sm_clock_max_hz:
                clocks = f" ({self.sm_clock_hz / 1e6:.0f} of {self.sm_clock_max_hz / 1e6:.0f} MHz)"
            found.append(f"the GPU's clocks were lowered{clocks}: {', '.join(reasons)}")
        if self.other_processes:
            memory = f" with {self.other_bytes / 1e9:.3g} GB" if self.other_bytes else ""
            several = "another process computes" if self.other_processes == 1 else "other processes compute"
            count = "" if self.other_processes == 1 else f"{self.other_processes} "
            found.append(f"{count}{several} on the GPU{memory}: its figures are theirs, too")
        if self.ecc_errors:
            found.append(f"the GPU counts {self.ecc_errors} uncorrected memory errors")
        return tuple(found)

    def evidence(self) -> str:
        """The counters that tell most, in a phrase, empty where none was read: support for a verdict, never one."""
        named = {
            "SMs active": self.sm_active,
            "tensor cores": self.tensor_active,
            "DRAM": self.dram_active,
        }
        known = [f"{name} {100 * share:.0f} %" for name, share in named.items() if share is not None]
        if known:
            return f"GPM counts {', '.join(known)}"
        if self.sm_utilization is None:
            return ""
        memory = "" if self.memory_utilization is None else f", memory {100 * self.memory_utilization:.0f} %"
        return f"NVML saw a kernel running {100 * self.sm_utilization:.0f} % of the time{memory}"


FIGURES = tuple(f.name for f in fields(Counters) if f.name not in ("readings", "unavailable"))


def unavailable(why: str) -> Counters:
    """No figure at all."""
    return Counters(unavailable=dict.fromkeys(FIGURES, why))


def combine(readings: Sequence[Mapping[str, Any]], missing: Mapping[str, str]) -> Counters:
    """Several readings as one.

    Args:
        readings: figure -> value, each without what could not be read then.
        missing: figure -> why it could not be read the last time that was tried.
    """
    found = dict[str, Any]()
    for name in FIGURES:
        values = [reading[name] for reading in readings if name in reading]
        if not values:
            continue
        if name in AVERAGED:
            found[name] = mean(values)
        elif name == "lowered":
            found[name] = tuple(dict.fromkeys(reason for reasons in values for reason in reasons))
        else:
            found[name] = max(values)
    lost = {name: missing.get(name, "never read") for name in FIGURES if name not in found}
    return Counters(**found, readings=len(readings), unavailable=lost)
