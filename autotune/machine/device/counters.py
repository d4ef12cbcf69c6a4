"""A GPU's own counters while it works, as a value, and the warnings that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import mean
from typing import Any

AVERAGED = frozenset({
    "sm_utilization", "memory_utilization", "sm_clock_hz", "memory_clock_hz", "power_w",
    "sm_active", "sm_occupancy", "tensor_active", "dram_active",
})  # fmt: skip
HARMLESS = frozenset({"idle", "application clocks", "display clocks"})  # caused by the user's settings or the load


@dataclass(frozen=True)
class Counters:
    """Readings of a GPU's counters over a phase. A figure that is not available is None; `unavailable` has the reason.

    Shares are fractions of 1. A figure is the highest reading unless its description says otherwise.

    Args:
        sm_utilization: share of the time in which some kernel ran, mean; not how much of the GPU it used.
        memory_utilization: share of the time in which memory was read or written, mean.
        sm_clock_hz, sm_clock_max_hz: clock of the multiprocessors, mean and highest possible.
        memory_clock_hz, memory_clock_max_hz: clock of the memory, mean and highest possible.
        lowered: reasons why clocks were below the highest possible.
        temperature_c: temperature of the GPU.
        power_w, power_limit_w: power drawn, mean, and power allowed.
        memory_used_bytes, memory_total_bytes: memory that all processes use, and memory in total.
        other_processes, other_bytes: processes beside this one that compute on the device, and their memory.
        mig: whether the device is divided into instances.
        ecc_errors: uncorrected memory errors since the driver was loaded.
        sm_active: share of the time that a multiprocessor had a warp, mean over all (GPM, Hopper and later).
        sm_occupancy: share of the warps that fit, mean (GPM).
        tensor_active: share of the time that tensor cores worked, mean (GPM).
        dram_active: share of the memory's theoretical bandwidth (GPM).
        readings: number of readings.
        unavailable: figure -> why it is not available.
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
        """Number of figures that are available."""
        return sum(getattr(self, name) is not None for name in FIGURES)

    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt figures measured on this device."""
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
        """The most informative counters in a phrase, "" if none was read. They support a verdict, never decide it."""
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
    """Counters without any figure, all for the same reason."""
    return Counters(unavailable=dict.fromkeys(FIGURES, why))


def combine(readings: Sequence[Mapping[str, Any]], missing: Mapping[str, str]) -> Counters:
    """Combine several readings into one.

    Args:
        readings: figure -> value, each without the figures that could not be read at that time.
        missing: figure -> why the last attempt to read it failed.
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
