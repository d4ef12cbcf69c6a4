"""What kills or hangs a process costs the child that tried it, and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import autotune
from autotune import transforms
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.tune import policy as policies
from autotune.tune import probation
from autotune.tune.fingerprint import of_model
from autotune.tune.policy import Choice, PolicyStep
from tests.models import tiny, token_prompts

pytestmark = pytest.mark.skipif(not probation.is_possible("cpu"), reason="no fork tries candidates here")
LONG_S = 60.0  # far more than any work below takes


def forever() -> None:
    while True:
        time.sleep(1)


def write_much() -> None:
    for _ in range(400):
        os.write(1, b"\0\xff{" * (1 << 16))
    os.write(2, b"\n\x1b[31mthe end\x1b[0m\n\n")
    os.abort()


WORKS: dict[str, tuple[Callable[[], object], str]] = {
    "a segmentation fault": (lambda: ctypes.string_at(0), "it would have ended the process with SIGSEGV"),
    "an abort": (os.abort, "it would have ended the process with SIGABRT"),
    "an unknown instruction": (
        lambda: os.kill(os.getpid(), signal.SIGILL),
        "it would have ended the process with SIGILL",
    ),
    "killed for memory": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        "it would have ended the process with SIGKILL, as the kernel does when memory runs out",
    ),
    "an exit": (lambda: os._exit(3), "it would have ended the process with exit code 3"),
    "much output": (write_much, "it would have ended the process with SIGABRT: [31mthe end[0m"),
}


@pytest.mark.fault("A15", "A21", "A23")
@pytest.mark.parametrize("name", WORKS)
def test_a_child_that_dies_is_told_of(name: str) -> None:
    work, said = WORKS[name]
    assert probation.death_of(work, LONG_S) == said


def multiply() -> torch.Tensor:
    return torch.ones(300, 300).mm(torch.ones(300, 300))


@pytest.mark.parametrize("work", [lambda: None, lambda: 1 / 0, lambda: sys.exit(4), multiply])
def test_what_ends_of_its_own_will_is_no_news(work: Callable[[], object]) -> None:
    multiply()  # makes a team of threads, where there are cores for one, that a child does not have
    assert probation.death_of(work, LONG_S) is None


@pytest.mark.fault("A17")
def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    def hang() -> None:
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        (tmp_path / "started").write_text(str(started.pid))
        forever()

    others = children()
    found = probation.death_of(hang, 3.0)
    assert found == "it did not end within the 3 s that were left"
    assert children() == others
    wait_for_end(int((tmp_path / "started").read_text()))


def children() -> set[int]:
    """This process's, the dead among them that nobody asked for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid()):
                found.add(int(stat.parent.name))
    return found


def wait_for_end(process: int) -> None:
    """Fails where it lives on for a minute."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state == "Z":  # dead; nobody asked for its exit code yet
            return
        time.sleep(0.1)
    pytest.fail(f"process {process} is still there")


def test_a_compiler_of_what_hangs_may_remove_what_it_has_half_written(tmp_path: Path) -> None:
    half = tmp_path / "half.so"
    script = f"trap 'rm {half}; exit 1' TERM; touch {half}; sleep 600 & wait"
    said = probation.death_of(lambda: subprocess.run(["sh", "-c", script], check=False), 1.0)
    assert "did not end" in str(said)
    assert not half.exists()


@pytest.mark.fault("A24")
def test_a_child_ends_with_its_parent() -> None:
    """Killed as the kernel or an operator does it, with no time to clean up."""
    script = """if True:
        import os, time
        from autotune.tune import probation
        out = os.dup(1)
        probation.death_of(lambda: (os.write(out, b"%d\\n" % os.getpid()), time.sleep(1000)), 1000)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    wait_for_end(child)


def test_a_users_handlers_and_files_are_the_parents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: handled.append(1))
    try:
        with path.open("w") as file:
            file.write("once")  # not flushed yet
            found = probation.death_of(lambda: os.kill(os.getpid(), signal.SIGTERM), LONG_S)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == "it would have ended the process with SIGTERM"
    assert (handled, path.read_text()) == ([], "once")


# In a search


@dataclass(frozen=True)
class Deadly(Transform):
    """Ends the process that applies it."""

    name: ClassVar[str] = "deadly"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "a vendor's kernel"

    def predict(self, profile: object, hardware: object) -> dict[str, float]:  # type: ignore[override]
        return {"decode": 9.0}

    def apply(self, variant: Variant) -> None:
        ctypes.string_at(0)


@pytest.mark.fault("A21")
def test_a_candidate_that_crashes_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**transforms.registry(), Deadly.name: Deadly}
    monkeypatch.setattr(transforms, "registry", lambda: known)
    choices = (Choice("deadly", {}, "decode"), Choice("lean_loop", {}, "decode"))
    steps = tuple(PolicyStep(choice.transform, "decode", (choice,)) for choice in choices)
    policy = replace(policies.load("balanced"), steps=steps, budget_s=600.0)
    model = tiny("llama")
    before = of_model(model)
    autotune.wrap(model, workload=token_prompts(8), when="blocking", policy=policy, cache=False, watch=0.0)
    assert "SIGSEGV (deadly)" in model.autotune.status.detail
    assert "lean_loop" in model.autotune.report().to_markdown()
    assert of_model(model.autotune.unwrap()) == before
