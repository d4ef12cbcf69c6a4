"""The GPU's part of a report: launches, idle time, waits and copies, kernels, counters. It is empty on a CPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from . import numbers as n
from .layout import Section, Table, sentence

UNIT = re.compile("_(hz|w|c|bytes)$")
ROWS = 8  # most kernels in a table, the longest first
NAME_WIDTH = 60  # characters shown of a kernel's name; the rest is its template's arguments


def sections(record: Mapping[str, Any]) -> Iterator[Section]:
    """Yield all sections about the device. Records of earlier versions have no data about it."""
    if found := record.get("device"):
        yield _use(found)
        for phase in ("decode", "prefill"):
            if phase in found:
                yield _rooflines(phase, record["operators"].get(phase, ()))
                yield _kernels(phase, found[phase]["after"] or found[phase]["before"])
    for phase, reading in (record.get("ncu") or {}).items():
        yield _reading(phase, reading)


def _use(found: Mapping[str, Any]) -> Section:
    rows, told = list[tuple[str, ...]](), dict[str, None]()
    for phase, states in found.items():
        for name, use in ((phase, states["before"]), (f"{phase}, now", states["after"])):
            if use is None:
                continue
            rows.append((
                name,
                n.count(use["launches"]),
                n.count(use["kernel_count"]),
                n.percent(use["idle"]),
                n.milliseconds(use["busy_ms"]),
                n.milliseconds(use["event_ms"]),
                n.milliseconds(use["host_wait_ms"]),
                n.milliseconds(use["copy_ms"]),
                n.milliseconds(use["sync_ms"]),
            ))  # fmt: skip
            told |= dict.fromkeys(f"Warning: {warning}." for warning in use["warnings"])
    last = [(phase, states["after"] or states["before"]) for phase, states in found.items()]
    told |= dict.fromkeys(text for phase, use in last for text in _counters(phase, use["counters"]))
    columns = (
        "",
        "launches",
        "kernels",
        "idle",
        "busy ms",
        "by events ms",
        "waits for host ms",
        "copies ms",
        "sync ms",
    )
    return Section("What the GPU does in a call and for a token", tuple(told), Table(columns, "lrrrrrrrr", tuple(rows)))


def _counters(phase: str, counters: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a sentence with the counters, and sentences that say why others are missing."""
    if counters is None:
        return
    c, parts = counters, list[str]()
    shares = {
        "a kernel running": "sm_utilization",
        "memory in use": "memory_utilization",
        "SMs active": "sm_active",
        "occupancy": "sm_occupancy",
        "tensor cores": "tensor_active",
        "DRAM bandwidth": "dram_active",
    }
    parts += [f"{name} {n.percent(c[key])}" for name, key in shares.items() if n.known(c[key])]
    if n.known(c["sm_clock_hz"]) and n.known(c["sm_clock_max_hz"]):
        parts.append(f"SM clock {c['sm_clock_hz'] / 1e6:.0f} of {c['sm_clock_max_hz'] / 1e6:.0f} MHz")
    if n.known(c["power_w"]):
        limit = f" of {c['power_limit_w']:.0f}" if n.known(c["power_limit_w"]) else ""
        parts.append(f"{c['power_w']:.0f}{limit} W")
    if n.known(c["temperature_c"]):
        parts.append(f"{c['temperature_c']:.0f} degrees C")
    if n.known(c["memory_used_bytes"]) and n.known(c["memory_total_bytes"]):
        parts.append(f"{n.scaled(c['memory_used_bytes'], 'B')} of {n.scaled(c['memory_total_bytes'], 'B')} taken")
    if c["mig"]:
        parts.append("divided into instances (MIG)")
    if parts:
        yield f"Counters during {phase}: {', '.join(parts)}."
    missing = dict[str, list[str]]()
    for name, why in c["unavailable"].items():
        missing.setdefault(why, []).append(UNIT.sub("", name).replace("_", " "))
    for why, names in missing.items():
        which = ", ".join(names) if parts else "counters"
        yield f"Not available: {which} ({why.rstrip('.')})."


def _rooflines(phase: str, operators: Iterable[Mapping[str, Any]]) -> Section:
    """Return arithmetic intensity and roofline share of the original's operations that compute or move something."""
    rows = tuple(
        (
            row["group"],
            n.milliseconds(row["before_ms"]),
            n.scaled(row["flops"], "FLOP"),
            n.scaled(row["moved_bytes"], "B"),
            n.significant(row["flops"] / row["moved_bytes"]) if row["moved_bytes"] else n.MISSING,
            n.percent(row["roofline_share"]),
        )
        for row in operators
        if row.get("flops") or row.get("moved_bytes")
    )
    columns = ("operation", "ms", "computes", "moves", "FLOP per byte", "of its roofline")
    return Section(f"Roofline of {phase}", table=Table(columns, "lrrrrr", rows))


def _kernels(phase: str, use: Mapping[str, Any]) -> Section:
    rows = tuple(
        (
            _short(kernel["name"]),
            kernel["operator"] or n.MISSING,
            kernel["group"] or n.MISSING,
            n.count(kernel["count"]),
            n.milliseconds(1e3 * kernel["seconds"]),
            n.percent(1e3 * kernel["seconds"] / use["busy_ms"] if use["busy_ms"] else None),
        )
        for kernel in use["kernels"][:ROWS]
    )
    columns = ("kernel", "operator", "part", "count", "ms", "of busy time")
    return Section(f"Longest kernels of {phase}", table=Table(columns, "lllrrr", rows))


def _reading(phase: str, reading: Mapping[str, Any]) -> Section:
    rows = tuple(_counted_row(kernel) for kernel in (*reading["kernels"][:ROWS], reading["total"]))
    columns = ("kernel", "count", "ms", "SM", "memory", "DRAM", "tensor", "sectors/request")
    told = [sentence(reading["evidence"]), *(f"It warned: {sentence(note)}" for note in reading["notes"])]
    return Section(f"Nsight Compute, {phase}", tuple(told), Table(columns, "lrrrrrrr", rows, total=True))


def _counted_row(kernel: Mapping[str, Any]) -> tuple[str, ...]:
    seconds, sectors = kernel["seconds"], kernel["sectors_per_request"]
    return (
        _short(kernel["name"]),
        n.count(kernel["count"]),
        n.milliseconds(1e3 * seconds if n.known(seconds) else None),
        *(n.percent(kernel[key]) for key in ("sm", "memory", "dram", "tensor")),
        f"{sectors:.1f}" if n.known(sectors) else n.MISSING,
    )


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."
