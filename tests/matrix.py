"""The compatibility suite on other versions of what autotune builds on, as a table of versions and results.

    make test-matrix                                                 every row, two at a time; a few minutes each
    make test-matrix MATRIX_ARGS="--only transformers==5.17.0,torchao==0.17.0"
    make test-matrix MATRIX_ARGS="--torch 2.14.1"                    another torch: gigabytes, so only on request
    make test-latest                                                 the newest of everything but torch

A row is a virtual environment in .matrix/ that lies over the project's own: the row's packages, and what they need in
another version, are found first, everything else is the project's. The suite runs there with a time limit. The table is
printed and written to out/matrix.md; out/matrix.json holds the failures, too. Exit codes: 0 every row passed, 1 one did
not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FOLDER, OUT = ROOT / ".matrix", ROOT / "out"

# All ways to call generate and forward, each transform's contract, a whole search, a plan kept and replayed, and
# Triton's kernels.
SUITE = [  # arguments of pytest
    "tests/live/test_wrap.py",
    "tests/test_inputs.py",
    "tests/runtime/test_loop.py",
    "tests/model/test_route.py",
    "tests/transforms/test_contract.py",
    "tests/test_compat.py",
    "tests/runtime/test_narrow.py",  # Triton's interpreter and its compiler, neither of which needs a GPU
    # a quarter of a minute and more each, of compiling what each transform's contract compiles, too
    *("--deselect", "tests/runtime/test_loop.py::test_a_compiled_step_decodes_the_same_tokens[gpt2]"),
    *("--deselect", "tests/runtime/test_loop.py::test_a_compiled_step_decodes_the_same_tokens[mixtral]"),
    *("--deselect", "tests/runtime/test_loop.py::test_a_damaged_artifact_costs_a_compilation_and_nothing_else"),
]

# The latest patch of every minor release since 5.17, and of older ones that are still in use; two of everything else.
VERSIONS: dict[str, list[str]] = {
    "transformers": [
        *("4.57.6", "5.0.0", "5.5.4", "5.10.4"),
        *("5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0"),
    ],
    "torchao": ["0.17.0", "0.18.0"],
    "bitsandbytes": ["0.49.2", "0.50.2"],
    "accelerate": ["1.14.0", "1.15.0"],
}
SHOWN = ("torch", *VERSIONS, "triton")
INSTALL_S = 1800.0  # the largest torch is a download of gigabytes
LIMIT_S = 1200.0  # for the suite, which takes a quarter of that on two quiet cores
JOBS = 2  # rows at a time; each computes with one thread
FAILURES_SHOWN = 5  # of a row, below the table

PASSED, FAILED, TIMED_OUT, NOT_INSTALLED, NOT_RUN = "passed", "FAILED", "TIME-OUT", "NOT INSTALLED", "DID NOT RUN"


class SetupError(Exception):
    """A row's packages could not be installed; the message says why."""


@dataclass(frozen=True)
class Row:
    """One set-up.

    Args:
        name: what the table calls it.
        requirements: what is installed over the project's own environment, each as NAME==VERSION.
        newest: names whose newest versions are installed, and those of all that they need.
    """

    name: str
    requirements: tuple[str, ...] = ()
    newest: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / re.sub(r"[^\w.=-]+", "-", self.name)


@dataclass(frozen=True)
class Result:
    """What became of a row. `failures` maps a test to the first line of its message."""

    row: Row
    outcome: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    detail: str = ""


PINNED = Row("as pinned")
RUNNING: set[int] = set()  # process groups of the suites that run now


# ---- which rows


def rows(installed: dict[str, str]) -> list[Row]:
    """The project's own environment, and every listed version that differs from it."""
    others = [(name, version) for name, versions in VERSIONS.items() for version in versions]
    return [PINNED, *(one(f"{name}=={version}") for name, version in others if installed.get(name) != version)]


def one(requirement: str) -> Row:
    """The row of one package; raises ValueError for anything but NAME==VERSION."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", requirement):
        raise ValueError(f"{requirement!r} is no row; expected NAME==VERSION or {PINNED.name!r}")
    return Row(requirement.replace("==", " "), (requirement,))


def selected(only: str, torch: Iterable[str], latest: bool, with_torch: bool, installed: dict[str, str]) -> list[Row]:
    """The rows that the command line asks for."""
    wanted = [PINNED if text.strip() == PINNED.name else one(text.strip()) for text in only.split(",") if text.strip()]
    wanted += [one(f"torch=={version}") for version in torch]
    if latest:
        names = sorted(direct() - (set() if with_torch else {"torch"}))
        wanted.append(Row("newest of everything" + (", torch too" if with_torch else ""), (), tuple(names)))
    return wanted or rows(installed)


def direct() -> set[str]:
    """Everything that pyproject.toml asks for to run autotune and its tests on this platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("demo", "torchao", "bitsandbytes", "dev")
    asked = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    needed = [each for each in map(Requirement, asked) if each.marker is None or each.marker.evaluate()]
    return {canonicalize_name(each.name) for each in needed}


# ---- installing


def install(row: Row, log: Path) -> Path:
    """Make the row's environment anew and return its Python.

    Raises:
        SetupError: pip failed, or another version than the row's is what would be imported.
    """
    if not (row.requirements or row.newest):
        return Path(sys.executable)
    python = overlay(row.folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-warn-conflicts"]
    if row.requirements:
        _run([*pip, "--ignore-installed", "--no-deps", *row.requirements], log)  # not taken from the project's own
        _run([*pip, *row.requirements], log)  # and what it needs in another version
    if row.newest:
        keep = row.folder / "keep.txt"
        keep.write_text("" if "torch" in row.newest else f"torch=={versions(Path(sys.executable))['torch']}\n")
        _run([*pip, "-c", str(keep), "--upgrade", "--upgrade-strategy", "eager", *row.newest], log)
    found = versions(python)
    for requirement in map(Requirement, row.requirements):
        if not requirement.specifier.contains(found.get(canonicalize_name(requirement.name), "0"), prereleases=True):
            raise SetupError(f"{requirement} was asked for and {found.get(requirement.name)} is imported")
    return python


def overlay(folder: Path) -> Path:
    """An empty virtual environment that finds in this interpreter's packages what it does not have; its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    below = sysconfig.get_path("purelib")
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(own) / "zz_below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    return folder / "bin" / "python"


def versions(python: Path) -> dict[str, str]:
    """Versions of all distributions that `python` would import, by normalised name and without a build's local part."""
    code = (
        "import importlib.metadata as m, json; found = {};"
        "[found.setdefault(d.metadata['Name'], d.version) for d in m.distributions()]; print(json.dumps(found))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER)
    return {canonicalize_name(name): version.split("+")[0] for name, version in json.loads(done.stdout).items()}


def newer_torch(installed: str) -> list[str]:
    """A note that names the newest torch on the index where it is not the installed one."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"^torch \(([^)+]+)", done.stdout, re.MULTILINE)
    if found is None:
        return ["Whether there is a newer torch is not known: pip did not say."]
    if Version(found[1]) <= Version(installed):
        return []
    return [f"Not tried: torch {found[1]}, the newest. This was {installed}; --with-torch takes the newest, too."]


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(command, stdout=out, stderr=out, timeout=INSTALL_S, check=False)
    if done.returncode:
        raise SetupError(_last_lines(log))


# ---- testing


def test(row: Row, limit_s: float) -> Result:
    """Install a row and run the suite there."""
    folder, start = row.folder, time.monotonic()
    log, junit = FOLDER / f"{folder.name}.log", FOLDER / f"{folder.name}.xml"
    FOLDER.mkdir(exist_ok=True)
    for old in (log, junit):
        old.unlink(missing_ok=True)
    try:
        python = install(row, log)
    except (SetupError, subprocess.TimeoutExpired) as error:
        return Result(row, NOT_INSTALLED, seconds=time.monotonic() - start, detail=str(error))
    found = {name: version for name, version in versions(python).items() if name in SHOWN}
    command = [str(python), "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", f"--junit-xml={junit}"]
    code = limited([*command, *SUITE], log, limit_s)
    return conclude(row, code, junit, log, time.monotonic() - start, found)


def limited(command: Sequence[str], log: Path, limit_s: float) -> int | None:
    """Exit code of a command, or None once it took too long and was killed with all its children."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # kernels and compiled code are kept under names that hold all they depend on, so that rows may share them
    environment |= {
        "AUTOTUNE_TEST_CACHE": str(FOLDER / "kept"),
        "OMP_NUM_THREADS": "1",  # on tiny models two threads take three times the CPU time, waiting for each other
    }
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
        RUNNING.add(process.pid)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            RUNNING.discard(process.pid)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def conclude(
    row: Row, code: int | None, junit: Path, log: Path, seconds: float, found: dict[str, str] | None = None
) -> Result:
    """The result of a finished suite from its JUnit file; what pytest's exit code calls a failure is one."""
    cases = _cases(junit)
    failures = {name: message for name, kind, message in cases if kind in ("failure", "error")}
    skipped = sum(kind == "skipped" for _, kind, _ in cases)
    passed = sum(kind == "" for _, kind, _ in cases)
    detail = ""
    if code is None:
        outcome, detail = TIMED_OUT, _last_lines(log)
    elif failures:
        outcome = FAILED
    elif code or not passed:
        outcome, detail = NOT_RUN, f"exit code {code}: {_last_lines(log)}"
    else:
        outcome = PASSED
    return Result(row, outcome, passed, len(failures), skipped, seconds, found or {}, failures, detail)


def _cases(junit: Path) -> list[tuple[str, str, str]]:
    """Each test with what became of it ("" is a pass) and the first line of why."""
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError):  # it died before it wrote it
        return []
    cases = []
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        outcomes = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        kind = next((tag for tag in ("failure", "error", "skipped") if tag in outcomes), "")
        message = (outcomes[kind].get("message") or "") if kind else ""
        cases.append((name, kind, (message.splitlines() or [""])[0]))
    return cases


def _last_lines(log: Path, count: int = 5) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-count:])


# ---- showing


def table(results: Sequence[Result], today: str) -> str:
    """The results as Markdown."""
    pinned = next((r.versions for r in results if r.versions), {})
    lines = [f"{today}, Python {platform.python_version()}, torch {pinned.get('torch', 'unknown')}:", ""]
    lines += ["| versions | passed | failed | skipped | seconds | result |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {label(r)} | {r.passed} | {r.failed} | {r.skipped} | {r.seconds:.0f} | {r.outcome} |" for r in results
    ]
    return "\n".join(lines)


def label(result: Result) -> str:
    """A row's name, and the versions that it stands for where they do not show in it."""
    if result.row.requirements or not result.versions:
        return result.row.name
    return f"{result.row.name}: " + ", ".join(f"{n} {result.versions[n]}" for n in SHOWN if n in result.versions)


def details(result: Result) -> list[str]:
    """What to know of a row that did not pass."""
    found = list(result.failures.items())
    lines = [f"{result.row.name}: {name}: {message}" for name, message in found[:FAILURES_SHOWN]]
    if len(found) > FAILURES_SHOWN:
        lines.append(f"{result.row.name}: and {len(found) - FAILURES_SHOWN} more, in out/matrix.json")
    return lines + ([f"{result.row.name}: {result.detail}"] if result.detail else [])


def write(results: Sequence[Result], today: str, notes: Sequence[str]) -> None:
    OUT.mkdir(exist_ok=True)
    (OUT / "matrix.md").write_text("\n".join([table(results, today), "", *notes]).rstrip() + "\n", encoding="utf-8")
    content: dict[str, Any] = {"date": today, "python": platform.python_version(), "notes": list(notes)}
    content["rows"] = [asdict(result) for result in results]
    (OUT / "matrix.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="the compatibility suite by version")
    parser.add_argument(
        "--only", default="", metavar="NAME==VERSION,...", help=f"these rows; {PINNED.name!r} is one, too"
    )
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION", help="a row with another torch")
    parser.add_argument("--latest", action="store_true", help="the newest of everything but torch")
    parser.add_argument("--with-torch", action="store_true", help="--latest with the newest torch, which is gigabytes")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for each row's tests")
    parser.add_argument("--jobs", type=int, default=JOBS, metavar="N", help=f"rows at a time, by default {JOBS}")
    given = parser.parse_args(arguments)
    FOLDER.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the row's processes are ended, too
    installed = versions(Path(sys.executable))
    try:
        chosen = selected(given.only, given.torch, given.latest, given.with_torch, installed)
    except ValueError as error:
        parser.error(str(error))
    today = datetime.date.today().isoformat()
    notes = [] if given.with_torch or not given.latest else newer_torch(installed["torch"])

    def tested(row: Row) -> Result:
        print(f"{row.name}: log in .matrix/{row.folder.name}.log", flush=True)
        result = test(row, given.limit)
        print(f"{row.name}: {result.outcome}, {result.passed} passed, {result.failed} failed", flush=True)
        return result

    results: list[Result] = []
    with ThreadPoolExecutor(given.jobs) as pool:
        try:
            for result in pool.map(tested, chosen):
                results.append(result)
                write(results, today, notes)
        except BaseException:  # Ctrl-C and SIGTERM come in this thread; the rows' processes end with it
            pool.shutdown(wait=False, cancel_futures=True)
            for group in list(RUNNING):
                os.killpg(group, signal.SIGKILL)
            raise
    print("", table(results, today), "", *notes, *(line for r in results for line in details(r)), sep="\n")
    return int(any(result.outcome != PASSED for result in results))


if __name__ == "__main__":
    sys.exit(main())
