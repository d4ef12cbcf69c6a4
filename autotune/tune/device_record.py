"""The GPU's part of a report's record; empty on a CPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..workload import PHASES

if TYPE_CHECKING:
    from ..diagnose.costs import PhaseProfile, Profile
    from ..profile.ncu import NcuExport


def record(before: Profile, after: Profile | None) -> dict[str, Any]:
    """Phase -> the device's figures for the original and for the tuned variant, if there is one; empty on a CPU."""
    return {
        phase: {
            "before": figures(before.phases[phase]),
            "after": figures(after.phases[phase]) if after is not None and phase in after.phases else None,
        }
        for phase in PHASES
        if phase in before.phases and before.phases[phase].device is not None
    }


def figures(phase: PhaseProfile) -> dict[str, Any] | None:
    """A device's activity in one call or for one token, in milliseconds and shares; None on a CPU."""
    use = phase.device
    if use is None:
        return None
    return {
        "launches": use.launches,
        "kernel_count": use.kernel_count,
        "graph_launches": use.graph_launches,
        "idle": phase.idle,
        "busy_ms": 1e3 * use.busy_s,
        "host_ms": 1e3 * phase.host_s,
        "event_ms": 1e3 * use.event_s,
        "gap_ms": 1e3 * use.gap_s,
        "host_wait_ms": 1e3 * use.host_wait_s,
        "late_gaps": use.late,
        "launch_ms": 1e3 * use.launch_s,
        "copy_ms": 1e3 * use.copy_s,
        "sync_ms": 1e3 * phase.sync_s,
        "copies": [asdict(copy) for copy in use.copies],
        "kernels": [asdict(kernel) for kernel in use.kernels],
        "counters": asdict(use.counters) if use.counters is not None else None,
        "warnings": list(use.counters.warnings()) if use.counters is not None else [],
    }


def counted(reading: NcuExport) -> dict[str, Any]:
    """The counters from Nsight Compute."""
    kernels = [asdict(kernel) for kernel in reading.kernels]
    return {
        "evidence": reading.evidence(),
        "total": asdict(reading.total),
        "kernels": kernels,
        "notes": list(reading.notes),
    }
