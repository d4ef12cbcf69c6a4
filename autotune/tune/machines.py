"""What another machine would bring, by data sheets: pure functions over the variant that serves now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

from ..diagnose.ceilings import roofline_s
from ..diagnose.diagnosis import FULL, UNITS, overhead_s
from ..machine.catalogue import MACHINES, Machine
from ..machine.roofline import floor_s
from ..profile.operators import SMALL_KERNEL_S
from ..report import numbers as n
from ..workload import METRIC_OF, PHASES, Phase
from .served import Advice, ServingVariant, ms

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile
    from ..machine.hardware import Hardware

SIMILAR = {"int8": "float32", "int16": "float32", "bfloat16x3": "bfloat16"}  # peaks that no data sheet lists
MIN_MACHINE_GAIN = 1.25  # least speed-up by data sheets that counts; they promise 10 to 25 % more than is measured


def other_machines(served: ServingVariant) -> Iterator[Advice]:
    """Use a faster machine, by data sheets: for each kind, the one with the least and the one with the most gain."""
    found = [(machine, gains) for machine in MACHINES if (gains := gains_on(served, machine))]
    ranked = sorted(found, key=lambda item: prod(item[1].values()) ** (1 / len(item[1])))
    for kind in sorted({machine.device for machine, _ in ranked}, key=lambda device: device != served.hardware.device):
        same = [item for item in ranked if item[0].device == kind]
        for machine, gains in same[:1] + same[1:][-1:]:
            yield Advice(machine.name, gains, _figures(served, machine, gains), _assumed(served, machine, gains))


def gains_on(served: ServingVariant, machine: Machine) -> dict[str, float] | None:
    """Metric -> speed-up on another machine; None if it gains too little, loses in a phase, or has too little memory.

    Overhead time stays the same. The other time keeps its share of the roofline. From a CPU to a GPU, overhead is at
    least one launch for every operator of the original.
    """
    memory, gains = served.profile.memory, dict[str, float]()
    needed = memory.weights_bytes + memory.cache_bytes + memory.activations_bytes
    too_small = machine.memory_bytes is not None and needed > FULL * machine.memory_bytes
    if machine.is_here(served.hardware) or too_small:
        return None
    for phase in PHASES:
        if (found := served.profile.phases.get(phase)) is None:
            continue
        if (there_s := _sheet_s(found, machine, _compared_in(found, served.hardware))) is None:
            continue
        if here_s := _here_s(found, served.hardware):
            kept_s, worked_s = _divided(found)
            launched_s = _launches(served, machine).get(phase, 0) * SMALL_KERNEL_S
            gains[METRIC_OF[phase]] = found.seconds / (max(kept_s, launched_s) + worked_s * there_s / here_s)
    useful = gains and min(gains.values()) >= 1 and max(gains.values()) >= MIN_MACHINE_GAIN
    return gains if useful else None


def _compared_in(phase: PhaseProfile, here: Hardware) -> str:
    """The arithmetic in which machines are compared: the phase's, or one whose units grow with its own."""
    dtype = phase.compute_dtype
    return dtype if dtype in here.flops_per_s else SIMILAR.get(dtype, dtype)


def _sheet_s(phase: PhaseProfile, machine: Machine, dtype: str) -> float | None:
    """The phase's floor by a data sheet, seconds; None if the sheet has no peak for `dtype`."""
    peak = machine.flops_per_s.get(dtype)
    return floor_s(phase.flops, phase.moved_bytes, peak, machine.bandwidth_bytes_per_s) if peak else None


def _here_s(phase: PhaseProfile, hardware: Hardware) -> float:
    """The phase's floor on this machine, seconds: by its data sheet, as for other machines, else by measured peaks."""
    sheet, dtype = _sheet(hardware), _compared_in(phase, hardware)
    return (_sheet_s(phase, sheet, dtype) if sheet else None) or roofline_s(phase, hardware, dtype)


def _sheet(hardware: Hardware) -> Machine | None:
    """This GPU's data sheet. A CPU's is not used: which share of its cores and channels we have is unknown."""
    return next((m for m in MACHINES if m.device == hardware.device == "cuda" and m.is_here(hardware)), None)


def _divided(phase: PhaseProfile) -> tuple[float, float]:
    """Split a phase's time into seconds of overhead and of work."""
    kept_s = min(overhead_s(phase), phase.seconds)
    return kept_s, phase.seconds - kept_s


def _launches(served: ServingVariant, machine: Machine) -> Mapping[Phase, int]:
    """Number of the original's operators to launch, by phase, if a model moves from a CPU to a GPU; else empty."""
    return served.operators if (served.hardware.device, machine.device) == ("cpu", "cuda") else {}


def _figures(served: ServingVariant, machine: Machine, gains: Mapping[str, float]) -> str:
    """Describe both machines' figures, for the dtypes that serve."""
    phases = [found for p, found in served.profile.phases.items() if METRIC_OF[p] in gains]
    dtypes = dict.fromkeys(_compared_in(found, served.hardware) for found in phases)

    def figures(of: Machine | Hardware) -> str:
        rates = [f"{n.scaled(of.flops_per_s.get(dtype), 'FLOP/s')} in {dtype}" for dtype in dtypes]
        return ", ".join((n.scaled(of.bandwidth_bytes_per_s, "B/s"), *rates))

    sheet = _sheet(served.hardware)
    here = f"{figures(sheet)} by data sheet here" if sheet else f"{figures(served.hardware)} measured here"
    return f"{figures(machine)} ({machine.source}), against {here}"


def _assumed(served: ServingVariant, machine: Machine, gains: Mapping[str, float]) -> str:
    """Describe what a prediction for another machine assumes from this one."""
    shares, kept, launched = list[str](), list[str](), list[str]()
    launches = _launches(served, machine)
    for phase, found in served.profile.phases.items():
        if METRIC_OF[phase] in gains:
            kept_s, worked_s = _divided(found)
            share = min(1.0, _here_s(found, served.hardware) / worked_s) if worked_s else None
            shares.append(f"{phase} {n.percent(share)}")
            kept.append(f"{ms(kept_s)} {UNITS[phase]}")
            launched.append(f"{launches.get(phase, 0)} {UNITS[phase]}")
    work = f"work reaches the same share of the roofline as here ({', '.join(shares)})"
    overhead = f"overhead stays ({', '.join(kept)})"
    if launches:
        per_launch = f"{1e6 * SMALL_KERNEL_S:.0f} us to launch each of the original's operators ({', '.join(launched)})"
        overhead += f", or takes {per_launch} where that is longer"
    return f"{work}, and that {overhead}"
