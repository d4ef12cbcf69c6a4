"""The faults that autotune has to survive, and the tests that inject them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]

# Number -> what goes wrong. A: a trial or its transform. B: the measurement. C: the input.
# D: threads and the process. E: after commit. F: files.
FAULTS: dict[str, str] = {
    "A1": "a transform raises when it is applied",
    "A2": "a transform raises half-way",
    "A3": "logits of a wrong type or shape",
    "A4": "NaN on one token of one prompt",
    "A5": "infinite rows, all-equal and huge logits",
    "A6": "a constant token, a loop",
    "A7": "end of sequence at once",
    "A8": "scales x1.02, a zeroed head, swapped rows",
    "A9": "positions off by one after padding",
    "A10": "a cache bug on the second prompt",
    "A11": "wrong only at batch > 1 or beyond a boundary",
    "A12": "a cache error that grows with the context",
    "A13": "no memory for a trial",
    "A14": "no memory for the largest request",
    "A15": "the host's memory runs out",
    "A16": "compiling fails, or there is no compiler",
    "A17": "compiling hangs",
    "A18": "compiled over and over",
    "A19": "a graph cannot be captured",
    "A20": "a graph's buffer is overwritten by the next call",
    "A21": "a segmentation fault or an abort",
    "A22": "an error after which the device is dead",
    "A23": "a worker writes garbage",
    "A24": "the parent is killed",
    "A25": "an interruption in the middle of a trial",
    "A26": "an optional package is missing or broken",
    "A27": "a transform changes global state",
    "A28": "layers that a quantiser does not know",
    "A29": "a full or read-only disk",
    "A30": "a draft of another vocabulary, or one that is never right",
    "B31": "the original against itself, over 500 seeds",
    "B32": "5 % faster or slower at 5 % noise",
    "B33": "drift, steps, periods, two clock rates",
    "B34": "heavy tails",
    "B35": "a noisy neighbour",
    "B36": "stolen time and quotas",
    "B37": "a clock that stands still or jumps",
    "B38": "a slow first request, never steady",
    "B39": "decode faster, first token slower",
    "B40": "faster at batch 1, slower at batch 8",
    "B41": "timing without waiting for the device",
    "B42": "30 null candidates",
    "B43": "an original that does not reproduce itself",
    "B44": "too little text",
    "B45": "tuned on the text it is judged on",
    "C46": "empty prompts and batches",
    "C47": "more tokens than the context holds",
    "C48": "exactly at the limit; one token in, one out",
    "C49": "token ids outside the vocabulary",
    "C50": "odd ids: int32, 1-D, strided, embeddings, arguments never seen",
    "C51": "odd attention masks",
    "C52": "ragged batches, larger ones, ten times the length",
    "C53": "odd text",
    "C54": "odd sampling, callbacks that raise",
    "C55": "arguments drawn at random",
    "C56": "models that cannot be tuned",
    "D57": "threads call while plans are switched",
    "D58": "a graph is called from another thread than captured it",
    "D59": "a plan is switched in the middle of an answer",
    "D60": "a commit fails half-way",
    "D61": "forks, copies, pickles",
    "D62": "wrapped twice, unwrapped while tuning, the end of the process",
    "D63": "the weights change after tuning",
    "D64": "two processes build or keep the same thing",
    "D65": "tuning under traffic",
    "D66": "calls that leave something behind",
    "E67": "a plan fails in a request",
    "E68": "a plan fails after a part was streamed",
    "E69": "NaN, slower or compiling over and over after commit",
    "E70": "a plan that keeps failing",
    "E71": "the device is lost",
    "E72": "NVML is missing or refuses",
    "F73": "damaged files in the cache",
    "F74": "a plan of another model, machine or release",
    "F75": "planted files in the cache",
    "F76": "killed while writing, many writers",
    "F77": "a schema of another time",
    "F78": "hostile checkpoints",
}

CAVEATS: dict[str, str] = {"B41": "on a device made of CPU tensors and a made-up clock"}


@dataclass(frozen=True)
class Covered:
    """A fault, the tests that inject it, and how they ended.

    Args:
        where: test files, or why there is none.
    """

    number: str
    name: str
    outcome: Literal["passed", "failed", "not covered"]
    where: str
    tests: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(options: tuple[str, ...] = ("-m", "fault and not gpu")) -> list[Covered]:
    """Run the tests that inject faults, and say which are covered."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "faults.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.prove.marked", *options]
        environment = {**os.environ, "AUTOTUNE_FAULTS_FILE": str(file), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
        found = json.loads(file.read_text()) if file.exists() else {}
    return table(found)


def table(found: Mapping[str, Mapping[str, str]]) -> list[Covered]:
    """One row a fault. Pure."""
    return [_row(number, name, found.get(number, {})) for number, name in FAULTS.items()]


def _row(number: str, name: str, tests: Mapping[str, str]) -> Covered:
    ran = {test: outcome for test, outcome in tests.items() if outcome != "skipped"}
    if not ran:
        return Covered(number, name, "not covered", "no test injects it")
    files = sorted({Path(test.split("::")[0]).stem for test in ran})
    where = f"{len(ran)} tests of {', '.join(files)}"
    if why := CAVEATS.get(number):
        where += f" ({why})"
    return Covered(number, name, "failed" if "failed" in ran.values() else "passed", where, tuple(sorted(ran)))
