"""What whoever has a GPU runs first: `make first-hour-on-gpu`.

Runs doctor, the tests that need a GPU, a soak of graphs, and the benchmarks for 1 and 8 billion parameters, each in a
process of its own with a limit of its own. A part that fails or takes too long ends, and the next one begins. The tests
are several parts: one that hangs, or breaks the device for its process, hides only the rest of its part. Tests that
are all skipped fail: then the GPU is gone. All output goes into one file, which is written anew after every part, to
read or to send. Nothing on the GPU is reset or set: clocks, modes and partitions stay as they are. Where torch sees no
GPU from the start, the first part says why, and no other runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PYTHON = sys.executable
MINUTES = 50.0
ENDING = {  # signals that end a part, in this order, and seconds until the next; pytest prints its summary at the first
    signal.SIGINT: 10.0,
    signal.SIGTERM: 5.0,
    signal.SIGKILL: 5.0,
}
GRACE_S = sum(ENDING.values())  # of a part that ignores all but the last
SILENT_S = 100  # seconds of one test after which pytest prints where each thread is
MOST_CHARACTERS = 60_000  # of a part's output that the file keeps, from its end


@dataclass(frozen=True)
class Part:
    """One command.

    Args:
        command: what runs.
        seconds: its limit.
    """

    command: tuple[str, ...]
    seconds: float


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", name, *arguments)


def tests(marks: str, *paths: str) -> tuple[str, ...]:
    """Tests of the marks and paths. The name of each is printed before it runs, and the reason as soon as it fails."""
    shown = ("-v", "-p", "benchmarks.at_once", "--durations=10", "-o", f"faulthandler_timeout={SILENT_S}")
    return module("pytest", "-m", marks, *shown, *paths)


DEVICE = "device"  # the part without which no other runs
PARTS: Mapping[str, Part] = {
    DEVICE: Part(module("benchmarks.gpu_seen"), 60),
    "doctor": Part(module("autotune", "doctor"), 90),
    "tests-device": Part(tests("gpu and not slow", "tests/machine", "tests/model", "tests/profile"), 90),
    "tests-runtime": Part(tests("gpu and not slow", "tests/runtime"), 210),
    "tests-transforms": Part(tests("gpu and not slow", "tests/transforms"), 240),
    "soak": Part(module("benchmarks.graph_soak", "--seconds", "60"), 120),
    "kernels": Part(module("benchmarks.gpu_kernels"), 90),
    "steps-1b": Part(module("benchmarks.gpu_steps", "--shape", "1b", "--batches", "1,8", "--seconds", "180"), 240),
    "steps-8b": Part(module("benchmarks.gpu_steps", "--shape", "8b", "--seconds", "250"), 330),
    "tests-compiled": Part(tests("gpu and slow", "tests"), 240),
    "tune-1b": Part(module("benchmarks.gpu", "--shape", "1b", "--policy", "balanced", "--budget", "240"), 390),
    "tune-8b": Part(module("benchmarks.gpu", "--shape", "8b", "--policy", "latency", "--budget", "540"), 660),
}


def most_s(parts: Mapping[str, Part]) -> float:
    """Seconds that parts take together at most, with the ending of each."""
    return sum(part.seconds + GRACE_S for part in parts.values())


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Args:
        code: its exit code; None if it was ended for want of time.
        seconds: how long it ran.
        output: what it printed.
    """

    code: int | None
    seconds: float
    output: str

    def __str__(self) -> str:
        return "passed" if self.code == 0 else "ended: out of time" if self.code is None else f"failed ({self.code})"


def run(part: Part, limit_s: float) -> Outcome:
    """Run a part, and end it with its children after `limit_s`."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # unlike a pipe, it does not wait for children
        began = time.monotonic()
        code = _code(part, limit_s, output)
        seconds = time.monotonic() - began
        output.seek(0)
        return Outcome(code, seconds, output.read())


def _code(part: Part, limit_s: float, output: IO[str]) -> int | None:
    """Exit code of a part; None if it was ended after `limit_s`."""
    process = subprocess.Popen(
        part.command,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_heed,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _heed() -> None:
    """Heed the first signal, which jobs in the background of a shell ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part's processes: itself if it is late, and children that it left behind."""
    for number, grace_s in ENDING.items():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)


def report(outcomes: Mapping[str, Outcome], parts: Mapping[str, Part]) -> str:
    """The file: a table of all parts, then what each printed."""
    lines = ["# First hour on a GPU", "", "| part | outcome | seconds |", "|---|---|---|"]
    for name in parts:
        found = outcomes.get(name)
        lines.append(f"| {name} | {found or 'not run'} | {f'{found.seconds:.0f}' if found else '-'} |")
    for name, found in outcomes.items():
        kept = found.output[-MOST_CHARACTERS:]
        cut = f"[{len(found.output) - len(kept)} characters before this]\n" if len(kept) < len(found.output) else ""
        lines += ["", f"## {name}", "", f"`{' '.join(parts[name].command[1:])}`", "", "```", cut + kept.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main(
    arguments: Sequence[str] | None = None,
    parts: Mapping[str, Part] = PARTS,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    parser = argparse.ArgumentParser(prog="make first-hour-on-gpu BENCH_ARGS=...", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all parts together")
    parser.add_argument("--parts", default=",".join(parts), help="some of them, in this order")
    parser.add_argument("--out", type=Path, default=Path("out/first-hour.md"))
    asked = parser.parse_args(arguments)
    chosen = asked.parts.split(",")
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(parts)}")
    end, outcomes = clock() + 60 * asked.minutes, dict[str, Outcome]()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        left_s = end - clock() - GRACE_S
        if left_s <= 0:
            break
        print(f"{name}: at most {min(left_s, parts[name].seconds):.0f} s", flush=True)
        outcomes[name] = run(parts[name], min(left_s, parts[name].seconds))
        print(f"{name}: {outcomes[name]} after {outcomes[name].seconds:.0f} s", flush=True)
        asked.out.write_text(report(outcomes, {name: parts[name] for name in chosen}), encoding="utf-8")
        if name == DEVICE and outcomes[name].code:
            print(outcomes[name].output.rstrip())
            break
    print(f"everything is in {asked.out}")
    return 0 if len(outcomes) == len(chosen) and all(found.code == 0 for found in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
