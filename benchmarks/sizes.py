"""Real sizes with random weights (shapes.py): what tuning takes and what it gives, by size and dtype.

    make bench-sizes
    python -m benchmarks.sizes --only 0.5B-bf16

Prints Markdown and writes out/sizes.json. See README.md in this directory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cores import physical_cores
from benchmarks.loaded import competing
from benchmarks.measures import STEPS, Timing, tpot_ms, ttft_ms
from benchmarks.peers import Setup
from benchmarks.remote import ROOT, Remote, WorkerError
from benchmarks.results import Spread, spread
from benchmarks.size_row import PROMPT_TOKENS, TIMED
from benchmarks.table import NONE, grid, number

POLICY = "balanced"  # the default of wrap
BUDGET_S, LARGE_BUDGET_S = 600.0, 1200.0
ROUNDS, ROUNDS_S = 5, 240.0  # no round begins later, once there are two
LOAD_S, TIME_S = 900.0, 3600.0  # when a process that does not answer is given up
BEYOND_S = 900.0  # the same for tuning, beyond its budget
RESERVE = 2.0  # times the model's bytes that have to be free: a plan may come to as much
LLAMA = "llama.cpp-q8_0"
BENCH_VENV = ROOT / ".venv-bench" / "bin" / "python"
TARGETS = {"fp32": 2.5, "bf16": 1.5}  # times as fast as the original in decode
TARGET_MEMORY = 1.8  # times the model that may be resident while it is tuned
TARGET_TUNING_S = {"3B": 1200.0}  # of the others: BUDGET_S
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        shape: of shapes.py.
        parameters: how many the shape has.
    """

    shape: str
    dtype: str
    parameters: int
    budget_s: float = BUDGET_S

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.dtype}"

    @property
    def model_bytes(self) -> int:
        return self.parameters * BYTES[self.dtype]


# 3B in FP32 is 12.3 GB: twice that is more than the 24 GB of the machine that this is for
CASES = (
    Case("0.5B", "fp32", 494_032_768),
    Case("0.5B", "bf16", 494_032_768),
    Case("1B", "fp32", 1_235_814_400),
    Case("1B", "bf16", 1_235_814_400),
    Case("3B", "bf16", 3_085_938_688, LARGE_BUDGET_S),
)
TINY = (Case("tiny", "fp32", 106_944, 60.0), Case("tiny", "bf16", 106_944, 60.0))


@dataclass
class Row:
    """What became of a case; None: not measured.

    Args:
        failure: why figures are missing, or "".
        model_bytes: of the weights.
        process_bytes, loaded_bytes: resident before the model was there, and with it.
        tune_s: seconds of tuning, in a process with empty caches: kernels are compiled in it.
        peak_bytes: most that was resident while tuning; `peak_is_of_tuning`: not of loading as well.
        tuned_bytes, promised_bytes: resident after tuning, and the weights that the report says are kept.
        released_bytes, released_promised_bytes: the same once the original is let go.
        state, verdict, plan, trials: what tuning came to; a trial is a candidate, its outcome and why.
        stages: what was done, from which second of tuning on, and the most that was resident meanwhile.
        samples: "original" or "plan" -> "ttft" or "tpot" -> milliseconds by round.
        read_bytes: "original" or "plan" -> bytes of weights read a token.
        bandwidth_bytes_per_s: measured read bandwidth.
        stderr: lines that were written to standard error once the model was there.
        llama: as `samples` has it, of llama.cpp; `llama_missing`: why it has no figures.
    """

    name: str
    shape: str
    dtype: str
    budget_s: float
    failure: str = ""
    model_bytes: int | None = None
    process_bytes: int | None = None
    loaded_bytes: int | None = None
    tune_s: float | None = None
    peak_bytes: int | None = None
    peak_is_of_tuning: bool = True
    tuned_bytes: int | None = None
    promised_bytes: int | None = None
    released_bytes: int | None = None
    released_promised_bytes: int | None = None
    state: str = ""
    verdict: str = ""
    plan: list[str] = field(default_factory=list)
    trials: list[list[str]] = field(default_factory=list)
    stages: list[list[Any]] = field(default_factory=list)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    read_bytes: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bandwidth_bytes_per_s: float | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    stderr: list[str] = field(default_factory=list)
    llama: dict[str, list[float]] = field(default_factory=dict)
    llama_missing: str = ""

    def take(self, answer: dict[str, Any]) -> None:
        """Book what a process answered."""
        for name, value in answer.items():
            if not hasattr(self, name):
                raise AttributeError(f"a row has no {name!r}")
            setattr(self, name, value)

    def spread(self, side: str, metric: str) -> Spread | None:
        return spread(self.samples.get(side, {}).get(metric, ()))

    @property
    def speedup(self) -> Spread | None:
        """How many times as fast decode is, round by round."""
        pairs = zip(*(self.samples.get(side, {}).get("tpot", ()) for side in ("original", "plan")), strict=False)
        return spread([original / plan for original, plan in pairs])

    def share(self, side: str) -> float | None:
        """The bandwidth that reading the weights once a token uses, over the one measured."""
        found, read = self.spread(side, "tpot"), self.read_bytes.get(side)
        if found is None or not read or not self.bandwidth_bytes_per_s:
            return None
        return read / (found.median / 1e3) / self.bandwidth_bytes_per_s

    @property
    def peak_ratio(self) -> float | None:
        return self.peak_bytes / self.model_bytes if self.peak_bytes and self.model_bytes else None

    @property
    def own_peak_ratio(self) -> float | None:
        """The same without what the process took before the model was there: libraries, mostly."""
        if not (self.peak_bytes and self.model_bytes and self.process_bytes):
            return None
        return (self.peak_bytes - self.process_bytes) / self.model_bytes

    @property
    def highest(self) -> tuple[str, int] | None:
        """The stage of the peak, and what was resident then."""
        return max(((name, peak) for name, _, peak in self.stages), key=lambda stage: stage[1], default=None)

    @property
    def shortfalls(self) -> list[str]:
        """Which targets are missed; there are none for tiny shapes."""
        found: list[str] = []
        if self.shape not in {case.shape for case in CASES}:
            return found
        target_s = TARGET_TUNING_S.get(self.shape, BUDGET_S)
        if self.tune_s is not None and self.tune_s > target_s:
            found.append(f"tuning took {self.tune_s:.0f} s, {target_s:.0f} s are the target")
        if self.peak_ratio is not None and self.peak_ratio > TARGET_MEMORY:
            at = f", while {self.highest[0]!r}" if self.highest else ""
            found.append(f"{self.peak_ratio:.2f}x the model was resident, {TARGET_MEMORY}x is the target{at}")
        times, target = self.speedup, TARGETS[self.dtype]
        if self.samples and (times is None or times.median < target):
            got = "no plan was committed" if times is None else f"decode is {times.median:.2f}x as fast"
            found.append(f"{got}, {target}x is the target")
        return found


@dataclass
class Sizes:
    """All rows, and where they ran."""

    created: str
    threads: int
    rows: list[Row]
    seconds: float = 0.0
    taken: int = 0  # processes that competed


def markdown(run: Sizes) -> str:
    """The report."""
    machine = next((row.machine for row in run.rows if row.machine), {})
    where = f"{machine['name']} ({machine['capability']}), " if machine else ""
    bandwidths = [row.bandwidth_bytes_per_s for row in run.rows if row.bandwidth_bytes_per_s]
    measured = f"{min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s measured, " if bandwidths else ""
    beside = f" beside {run.taken} processes that compute without end" if run.taken else ""
    parts = [
        "# Real sizes, random weights",
        f"{where}{run.threads} threads{beside}, {measured}{run.created}, {run.seconds / 60:.0f} min in all. TTFT after "
        f"{PROMPT_TOKENS} tokens and TPOT over the next {STEPS}, medians of rounds that take turns with the original, "
        "lowest and highest in brackets.",
        grid(
            [
                "size, dtype",
                "model, GB",
                "tuning, s",
                "peak while tuning, GB",
                "x the model",
                "without the process's own",
                "after, GB (promised)",
                "original released, GB (promised)",
            ],
            [_costs(row) for row in run.rows],
        ),
        grid(
            [
                "size, dtype",
                "TTFT original, ms",
                "TTFT plan, ms",
                "llama.cpp Q8_0, ms",
                "TPOT original, ms",
                "TPOT plan, ms",
                "llama.cpp Q8_0, ms",
                "decode",
                "of the memory roofline: original",
                "plan",
            ],
            [_speeds(row) for row in run.rows],
        ),
        "\n".join(f"* {row.name}: {line}" for row in run.rows for line in _lines(row)),
    ]
    return "\n\n".join(parts) + "\n"


def _costs(row: Row) -> list[str]:
    return [
        row.name,
        _gigabytes(row.model_bytes),
        NONE if row.tune_s is None else number(row.tune_s),
        _gigabytes(row.peak_bytes),
        NONE if row.peak_ratio is None else f"{row.peak_ratio:.2f}",
        NONE if row.own_peak_ratio is None else f"{row.own_peak_ratio:.2f}",
        f"{_gigabytes(row.tuned_bytes)} ({_gigabytes(row.promised_bytes)})",
        f"{_gigabytes(row.released_bytes)} ({_gigabytes(row.released_promised_bytes)})",
    ]


def _speeds(row: Row) -> list[str]:
    cells = [row.name]
    for metric in ("ttft", "tpot"):
        cells += [_cell(row.spread(side, metric)) for side in ("original", "plan")]
        cells.append("missing" if row.llama_missing else _cell(spread(row.llama.get(metric, ()))))
    shares = [row.share(side) for side in ("original", "plan")]
    return [*cells, _cell(row.speedup, "x"), *(NONE if share is None else f"{share:.0%}" for share in shares)]


def _lines(row: Row) -> list[str]:
    """What a reader should know of a row."""
    lines = [f"failed: {row.failure}"] if row.failure else []
    if row.verdict:
        lines.append(f"{' + '.join(row.plan) or 'the original serves'}; {row.verdict}")
    lines += [f"missed: {shortfall}" for shortfall in row.shortfalls]
    if row.llama_missing:
        lines.append(f"llama.cpp is missing: {row.llama_missing}")
    if row.stderr:
        lines.append(f"{len(row.stderr)} lines on standard error, the first: {row.stderr[0]}")
    return lines


def _cell(found: Spread | None, unit: str = "") -> str:
    if found is None:
        return NONE
    return f"{number(found.median)}{unit} ({number(found.low)}-{number(found.high)})"


def _gigabytes(size_bytes: int | None) -> str:
    return NONE if size_bytes is None else f"{size_bytes / 1e9:.2f}"


def measure(case: Case, given: argparse.Namespace, folder: Path, notify: Callable[[str], None]) -> Row:
    """One row; what fails leaves the figures that are there already."""
    row = Row(case.name, case.shape, case.dtype, given.budget or case.budget_s)
    free = available_bytes()
    if free is not None and free < RESERVE * case.model_bytes:
        row.failure = f"it needs {RESERVE * case.model_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return row
    log, before, caches = folder / "stderr.log", 0, given.caches or folder
    environment = {
        "OMP_NUM_THREADS": str(given.threads),
        "HF_HUB_OFFLINE": "1",
        "AUTOTUNE_CACHE_DIR": str(caches / "autotune"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    remote = Remote([sys.executable, "-m", "benchmarks.size_row"], log, environment)
    try:
        notify(f"{row.name}: drawing the weights")
        load = {"do": "load", "shape": case.shape, "dtype": case.dtype, "threads": given.threads}
        row.take(remote.ask(load, LOAD_S))
        before = len(lines_of(log))
        notify(f"{row.name}: tuning, with a budget of {row.budget_s:.0f} s")
        tune = {"do": "tune", "budget_s": row.budget_s, "policy_name": given.policy}
        row.take(remote.ask(tune, row.budget_s + BEYOND_S))
        notify(f"{row.name}: timing")
        row.take(remote.ask({"do": "time", "rounds": given.rounds, "most_s": ROUNDS_S}, TIME_S))
        if row.plan:
            row.take(remote.ask({"do": "release"}, TIME_S))
    except WorkerError as error:
        row.failure = str(error)
        notify(f"{row.name} failed: {error}")
    finally:
        remote.stop()
        row.stderr = lines_of(log)[before:]
    return row


def lines_of(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]


def rival(shape: str, given: argparse.Namespace, folder: Path, notify: Callable[[str], None]) -> dict[str, Any]:
    """llama.cpp's figures for a shape: "llama", or why there are none as "llama_missing"."""
    log, file = folder / "llama.log", folder / f"{shape}.Q8_0.gguf"
    python = str(given.peers_python)
    try:
        remote = Remote([python, "-m", "benchmarks.worker", LLAMA], log, {"OMP_NUM_THREADS": str(given.threads)})
    except WorkerError as error:
        return {"llama_missing": str(error)}
    setup = asdict(Setup("", str(file), str(folder), given.threads, TIMED.prompt_tokens + TIMED.new_tokens))
    samples: dict[str, list[float]] = {"ttft": [], "tpot": []}
    try:
        remote.ask({"do": "find"}, LOAD_S)
        notify(f"{shape}: writing {file.name}")
        with log.open("ab") as stream:
            command = [python, "-m", "benchmarks.gguf_file", shape, str(file)]
            subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, timeout=LOAD_S, check=True)
        notify(f"{shape}: timing llama.cpp")
        remote.ask({"do": "prepare", "setup": setup}, LOAD_S)
        remote.ask({"do": "load", "setup": setup}, LOAD_S)
        for turn in range(given.rounds + 1):  # the first warms up
            prompt = [(turn * 7919 + 31 * k) % 500 for k in range(TIMED.prompt_tokens)]
            answer = remote.ask({"do": "generate", "prompts": [prompt], "new_tokens": TIMED.new_tokens}, TIME_S)
            if turn:
                timing = Timing(**answer)
                samples["ttft"].append(ttft_ms(timing, TIMED))
                samples["tpot"].append(tpot_ms(timing, TIMED))
    except (WorkerError, subprocess.SubprocessError) as error:
        return {"llama_missing": str(error)}
    finally:
        remote.stop()
        file.unlink(missing_ok=True)
    return {"llama": samples}


def available_bytes() -> int | None:
    """Memory that is free or can be freed; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-sizes BENCH_ARGS=...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(case.name for case in CASES)
    python = BENCH_VENV if BENCH_VENV.exists() else Path(sys.executable)
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"some of {names}")
    parser.add_argument("--budget", type=float, help="seconds of tuning; default 600, 1200 for 3B")
    parser.add_argument("--policy", default=POLICY, help=f"default {POLICY}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed rounds; default {ROUNDS}")
    parser.add_argument("--threads", type=int, help="default: the physical cores this process may use")
    parser.add_argument("--taken", type=int, default=0, help="processes that compete with tuning and timing; default 0")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape instead, to try the script itself")
    parser.add_argument("--out", type=Path, default=Path("out"), help="default out")
    parser.add_argument("--caches", type=Path, help="where compiled kernels are kept; default: empty for each row")
    parser.add_argument("--peers-python", default=python, help="interpreter that has llama_cpp; default .venv-bench's")
    given = parser.parse_args(arguments)
    cases = {case.name: case for case in (TINY if given.tiny else CASES)}
    wanted = [name for name in given.only.split(",") if name] or list(cases)
    if unknown := [name for name in wanted if name not in cases]:
        parser.error(f"there is no row {', '.join(unknown)}; there are {', '.join(cases)}")
    given.cases = [case for case in cases.values() if case.name in wanted]
    given.threads = given.threads or physical_cores()
    given.caches = given.caches and given.caches.absolute()
    return given


def run(given: argparse.Namespace, notify: Callable[[str], None]) -> Sizes:
    """Every row, one after the other, each in a process of its own with empty caches."""
    begin, rivals = time.monotonic(), dict[str, dict[str, Any]]()
    found = Sizes(datetime.now(UTC).isoformat(timespec="seconds"), given.threads, [], taken=given.taken)
    for case in given.cases:
        with tempfile.TemporaryDirectory(prefix="autotune-sizes-") as folder:
            with competing(given.taken):
                row = measure(case, given, Path(folder), notify)
            if case.shape not in rivals:
                rivals[case.shape] = rival(case.shape, given, Path(folder), notify)
        row.take(rivals[case.shape])
        found.rows.append(row)
        found.seconds = time.monotonic() - begin
        keep(found, given.out)
    return found


def keep(found: Sizes, out: Path) -> None:
    """Write what there is so far: a row takes many minutes."""
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f".sizes.{os.getpid()}.json"
    draft.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    draft.rename(out / "sizes.json")


def main(arguments: Sequence[str] | None = None) -> int:
    given, start = options(arguments), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the processes end, too

    def notify(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    print(markdown(run(given, notify)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
