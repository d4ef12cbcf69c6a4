"""NVIDIA Nsight Compute: build the command that profiles a phase, and parse the tool's CSV export.

The tool replays every kernel many times to read the hardware counters, so it runs separately, over one call or one
token.
"""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MeasurementError
from ..workload import Phase

RANGES: Mapping[Phase, str] = {"prefill": "autotune.prefill", "decode": "autotune.decode"}  # NVTX; see ncu_replay.py

SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
SECONDS = "gpu__time_duration.sum"
SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum"
REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum"
TENSOR = "sm__inst_executed_pipe_tensor"  # prefix; the suffix differs by architecture: _op_hmma, _op_imma, _op_gmma
_BUSY = ".avg.pct_of_peak_sustained_active"
METRICS = (
    SM,
    MEMORY,
    DRAM,
    SECONDS,
    SECTORS,
    REQUESTS,
    rf"regex:^{TENSOR}\w*[.](sum|avg[.]pct_of_peak_sustained_active)$",
)
NAMES = {  # metric by its name on the page "details"
    "Compute (SM) Throughput": SM,
    "Memory Throughput": MEMORY,
    "DRAM Throughput": DRAM,
    "Duration": SECONDS,
}
UNITS = {  # factor to SI by unit, in the spellings of all versions of the tool
    "%": 1e-2,
    **dict.fromkeys(("ns", "nsecond"), 1e-9),
    **dict.fromkeys(("us", "usecond"), 1e-6),
    **dict.fromkeys(("ms", "msecond"), 1e-3),
    **dict.fromkeys(("s", "second"), 1.0),
}
IDEAL_SECTORS = 4  # sectors of 32 bytes for a warp's 32 adjacent loads of 4 bytes
PERMISSION = "ERR_NVGPUCTRPERM"


@dataclass(frozen=True)
class NcuKernel:
    """Launches of one kernel. Shares are from 0 to 1 and weighted by time; None if the export lacks the figure.

    Args:
        name: as the tool writes it.
        count: launches.
        seconds: total time.
        sm, memory, dram: share of their speed of light (the highest throughput any of their parts could have).
        tensor: share of the instructions that the tensor cores' busiest pipe could issue.
        tensor_instructions: total instructions issued to tensor cores.
        sectors_per_request: sectors of 32 bytes per load request of a warp; ideal is 4 for loads of 4 bytes, 16 for 16.
    """

    name: str
    count: int
    seconds: float | None = None
    sm: float | None = None
    memory: float | None = None
    dram: float | None = None
    tensor: float | None = None
    tensor_instructions: float | None = None
    sectors_per_request: float | None = None


@dataclass(frozen=True)
class NcuExport:
    """One export.

    Args:
        total: all kernels together.
        kernels: one entry per name, the longest first.
        notes: the tool's own warnings and errors.
    """

    total: NcuKernel
    kernels: tuple[NcuKernel, ...]
    notes: tuple[str, ...] = ()

    def evidence(self) -> str:
        """Describe the counts in a phrase."""
        total = self.total
        parts = [
            f"{name} {100 * share:.0f} %"
            for name, share in (("SMs", total.sm), ("memory", total.memory), ("DRAM", total.dram))
            if share is not None
        ]
        told = [f"{', '.join(parts)} of their speed of light"] if parts else []
        if total.tensor is not None:
            told.append(f"tensor pipes {100 * total.tensor:.0f} % used")
        elif total.tensor_instructions == 0:
            told.append("tensor cores unused")
        if total.sectors_per_request is not None:
            told.append(
                f"{total.sectors_per_request:.1f} sectors per request ({IDEAL_SECTORS} is ideal for 4-byte loads)"
            )
        kernels = f"{total.count} kernel" + ("" if total.count == 1 else "s")
        return f"Nsight Compute counts over {kernels}: {'; '.join(told) or 'none of the metrics asked for'}"


def command(model: str, phase: Phase, prompts: Path | None = None, ncu: str = "ncu", autotune: str = "autotune") -> str:
    """Return the shell command that profiles one call (prefill) or one token (decode) of a model.

    Args:
        model: as `autotune profile` takes it.
        phase: "prefill" or "decode".
        prompts: file of prompts; None uses the built-in ones.
        ncu, autotune: names or paths of the programs.
    """
    replay = [autotune, "profile", model, "--replay", phase]
    if prompts is not None:
        replay += ["--prompts", str(prompts)]
    options = [
        "--nvtx", "--nvtx-include", f"{RANGES[phase]}/",
        "--graph-profiling", "node",
        "--section", "SpeedOfLight",
        "--metrics", ",".join(METRICS),
        "--print-units", "base",
        "--csv", "--page", "raw", "--log-file", f"{phase}.ncu.csv",
    ]  # fmt: skip
    return shlex.join([ncu, *options, *replay])


def parse(text: str) -> NcuExport:
    """Parse an export of `ncu --csv`: the page "raw" (one row per launch) or "details" (one row per metric).

    Columns may be missing, numbers may have digit grouping, and the tool's banner lines may come between rows. The file
    may end in the middle; only whole rows count.

    Raises:
        MeasurementError: the text has no table, or the table has no kernel.
    """
    lines, notes = text.lstrip("\ufeff").splitlines(keepends=True), _notes(text)
    start = next((i for i, line in enumerate(lines) if re.match(r'"?ID"?,', line)), None)
    if start is None:
        raise MeasurementError(
            f"this is not a CSV export of Nsight Compute (no headings that begin with ID){_hint(notes)}"
        )
    launches = _launches([line for line in lines[start:] if line.startswith('"') or re.match(r"\w+,", line)])
    if not launches:
        raise MeasurementError(f"Nsight Compute profiled no kernel{_hint(notes)}")
    named = dict[str, list[_Launch]]()
    for launch in launches:
        named.setdefault(launch.name, []).append(launch)
    kernels = [_kernel(name, row) for name, row in named.items()]
    kernels.sort(key=lambda kernel: -(kernel.seconds or 0.0))
    return NcuExport(_kernel("all", launches), tuple(kernels), notes)


@dataclass(frozen=True)
class _Launch:
    name: str
    metrics: Mapping[str, float]

    def get(self, metric: str) -> float | None:
        return self.metrics.get(metric)


def _launches(lines: Sequence[str]) -> list[_Launch]:
    try:
        heading, *rows = csv.reader(lines)
    except csv.Error as error:  # an unterminated field
        raise MeasurementError(f"this is not a CSV export of Nsight Compute: {error}") from error
    heading[0] = "ID"  # its quotes may have been lost
    if rows and not lines[-1].endswith(("\n", '"')):
        rows.pop()  # the file was cut, so the last number may have lost digits
    whole = [row for row in rows if len(row) >= len(heading) and row != heading]
    tables = [dict(zip(heading, row, strict=False)) for row in whole]
    if "Metric Name" in heading:
        return _by_metric(tables)
    units = next((table for table in tables if not table["ID"]), {})
    return [
        _Launch(table.get("Kernel Name", ""), dict(_numbers(table.items(), units))) for table in tables if table["ID"]
    ]


def _by_metric(tables: Sequence[Mapping[str, str]]) -> list[_Launch]:
    """Collect launches from a table with one row per metric. If a name occurs in two units, keep the share."""
    found = dict[str, tuple[str, dict[str, float]]]()
    for table in tables:
        name, unit = table["Metric Name"], table.get("Metric Unit", "")
        _, metrics = found.setdefault(table["ID"], (table.get("Kernel Name", ""), {}))
        if name == "Memory Throughput" and unit != "%":
            continue
        metrics.update(
            _numbers([(NAMES.get(name, name), table.get("Metric Value", ""))], {NAMES.get(name, name): unit})
        )
    return [_Launch(name, metrics) for name, metrics in found.values()]


def _numbers(cells: Iterable[tuple[str, str]], units: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    for name, cell in cells:
        if (value := number(cell)) is not None:
            default = 1e-2 if "pct_of_peak" in name else 1e-9 if name == SECONDS else 1.0
            yield name, value * UNITS.get(units.get(name, "").strip(), default)


def number(cell: str) -> float | None:
    """Parse a number with any digit grouping: 1,234.5 or 1.234,5 or 1 234,5; None for "n/a" and the like."""
    text = re.sub(r"[\s'\u00a0\u202f]", "", cell)
    if not re.fullmatch(r"[-+]?[\d.,]*\d[\d.,]*(?:[eE][-+]?\d+)?", text):
        return None
    if "," in text and "." in text:
        decimal = max(text.rfind(","), text.rfind("."))
        text = re.sub("[.,]", "", text[:decimal]) + "." + text[decimal + 1 :]
    elif re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+", text) or text.count(",") > 1:
        text = text.replace(",", "")
    else:
        text = text.replace(",", ".")
    try:
        return float(text)
    except ValueError:
        return None


def _kernel(name: str, launches: Sequence[_Launch]) -> NcuKernel:
    durations = [launch.get(SECONDS) for launch in launches]
    known = [seconds for seconds in durations if seconds is not None]
    weights = [seconds or 0.0 for seconds in durations] if sum(known) > 0 else [1.0] * len(launches)

    def mean(values: Sequence[float | None]) -> float | None:
        pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
        total = sum(weight for _, weight in pairs)
        return sum(value * weight for value, weight in pairs) / total if total else None

    requests = [(s, r) for launch in launches if (s := launch.get(SECTORS)) is not None and (r := launch.get(REQUESTS))]
    instructions = [count for launch in launches if (count := _tensor_instructions(launch)) is not None]
    return NcuKernel(
        name,
        len(launches),
        sum(known) if known else None,
        mean([launch.get(SM) for launch in launches]),
        mean([launch.get(MEMORY) for launch in launches]),
        mean([launch.get(DRAM) for launch in launches]),
        mean([_tensor_share(launch) for launch in launches]),
        sum(instructions) if instructions else None,
        sum(s for s, _ in requests) / sum(r for _, r in requests) if requests else None,
    )


def _tensor_share(launch: _Launch) -> float | None:
    shares = [v for name, v in launch.metrics.items() if name.startswith(TENSOR) and name.endswith(_BUSY)]
    return max(shares, default=None)


def _tensor_instructions(launch: _Launch) -> float | None:
    """Return the pipe's sum; if there is none, add the sums of its kinds of instruction."""
    if (whole := launch.get(f"{TENSOR}.sum")) is not None:
        return whole
    parts = [v for name, v in launch.metrics.items() if name.startswith(f"{TENSOR}_") and name.endswith(".sum")]
    return sum(parts) if parts else None


def _notes(text: str) -> tuple[str, ...]:
    found = re.findall(r"^==(?:ERROR|WARNING)==\s*(.+?)\s*$", text, re.MULTILINE)
    return tuple(dict.fromkeys(found))


def _hint(notes: Sequence[str]) -> str:
    if any(PERMISSION in note for note in notes):
        return (
            f": the driver lets only administrators read its counters ({PERMISSION}); run the command as root, or "
            "load the driver with NVreg_RestrictProfilingToAdminUsers=0"
        )
    if notes:
        return f": the tool said {notes[0]!r}"
    return "; make it with the command that `autotune profile MODEL --ncu` prints"
