"""The end of a process: background threads end with it, in order, and the exit code is the script's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autotune.machine import ending
from autotune.machine.ending import Cancelled, Worker

HANG_S = 240.0  # a deadlock shows as a failure, not as a hang
WRAPPED = """
import sys, time
import autotune
from tests.models import tiny, token_prompts
model = autotune.wrap(tiny("llama", hidden_size=128), workload=token_prompts(8), cache=False)
assert model.autotune.status.state == "tuning"
time.sleep({wait})
{last}
"""
COMPILING = """
import sys, threading, time, torch
from torch._inductor import config
from autotune.machine import ending
config.force_disable_caches, config.compile_threads = True, 2
begun = threading.Event()

def work():
    def many(x):
        for n in range(40):
            x = (x * n).sin().cumsum(0).softmax(0)
        return x
    begun.set()
    torch.compile(many)(torch.ones(64))

ending.Worker(work, "compiling").launch()
begun.wait()
time.sleep({wait})
"""
WORKING = """
import threading, time
import torch
from autotune.machine import ending
begun = threading.Event()

def work():
    begun.set()
    {work}

ending.Worker(work, "at work").launch()
begun.wait()
time.sleep(0.1)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore", "TORCH_LOGS": "-all"}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=HANG_S, check=False
    )


def noise(done: subprocess.CompletedProcess[str]) -> str:
    """Standard error, without what an installed torchao says when it is imported."""
    said = ("torch/utils/_pytree.py", "site-packages/torchao/")
    return "\n".join(line for line in done.stderr.splitlines() if not any(word in line for word in said))


@pytest.mark.fault("D62")
@pytest.mark.parametrize("wait", [0.5, *(pytest.param(wait, marks=pytest.mark.slow) for wait in (0.05, 1.5, 3.0))])
def test_a_process_ends_in_order_while_it_is_being_tuned_for(wait: float) -> None:
    done = run(WRAPPED.format(wait=wait, last=""))
    assert (done.returncode, noise(done)) == (0, "")


def test_the_exit_code_is_the_scripts() -> None:
    assert run(WRAPPED.format(wait=0.3, last="sys.exit(7)")).returncode == 7
    failed = run(WRAPPED.format(wait=0.3, last="raise ValueError('of the script')"))
    assert failed.returncode == 1
    assert "ValueError: of the script" in failed.stderr
    assert "Cancelled" not in failed.stderr


@pytest.mark.parametrize(
    "work",
    [
        "while True: pass",
        "while True: torch.ones(300, 300) @ torch.ones(300, 300)",
        "time.sleep(600)",  # no bytecode runs any more: what is left of it must not abort the process
        "__import__('subprocess').run(['sleep', '600'])",
        "ending.compile_with(['sleep', '600'], 600)",
    ],
)
def test_whatever_a_thread_does_the_process_ends(work: str) -> None:
    done = run(WORKING.format(work=work))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("wait", [2.0, *(pytest.param(wait, marks=pytest.mark.slow) for wait in (0.0, 6.0))])
def test_a_process_ends_in_the_middle_of_a_compilation(
    wait: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = run(COMPILING.format(wait=wait))
    assert (done.returncode, noise(done)) == (0, "")
    assert [file for file in tmp_path.rglob("*.so") if not file.stat().st_size] == []


def test_a_compiler_may_remove_what_it_has_half_written(tmp_path: Path) -> None:
    """Torch would find a torn library under the name of its source in every later process."""
    half = tmp_path / "half.so"
    script = f"trap 'rm {half}; exit 1' TERM; touch {half}; sleep 600 & wait"
    work = f"__import__('subprocess').run(['sh', '-c', {script!r}])"
    done = run(WORKING.format(work=work).replace("sleep(0.1)", "sleep(1.0)"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not half.exists()


def test_what_a_stopped_compiler_leaves_behind_is_removed(tmp_path: Path) -> None:
    """One that is killed cannot clean up; a linker may also write on after its driver has cleaned up."""
    half = tmp_path / "half.so"
    script = "trap '' TERM; touch half.so; sleep 600"
    work = f"__import__('subprocess').run(['sh', '-c', {script!r}, 'sh', '-o', 'half.so'], cwd={str(tmp_path)!r})"
    done = run(WORKING.format(work=work).replace("sleep(0.1)", "sleep(1.0)"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not half.exists()


def test_what_fails_because_the_process_ends_is_not_reported() -> None:
    """Modules first loaded then may not register what they do at exit, `concurrent.futures.process` for one."""
    work = "exec('while not threading._SHUTTING_DOWN: pass'); threading._register_atexit(print)"
    done = run(WORKING.format(work=work))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_that_goes_on_in_its_own_threads_keeps_ours() -> None:
    script = """
import threading, time
from autotune.machine import ending
went_on = threading.Event()

def work():
    time.sleep(1.0)
    went_on.set()

ending.Worker(work, "at work").launch()
def serve():
    print(went_on.wait(60))
threading.Thread(target=serve).start()
"""
    done = run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


EXECUTOR = """
import time
from concurrent.futures import Future, ThreadPoolExecutor
from autotune.machine import ending

def served():
    answer = Future()

    def serve():
        while not ending.ends():
            time.sleep(0.01)
        answer.set_result(1)

    assert ending.Worker(serve, "serving", serves=True).launch()
    return answer.result()

def ask():
    print(served(), served())  # the second begins while the process ends

def idle():
    while True:
        time.sleep(0.01)

assert ending.Worker(idle, "at work").launch()
assert ending.Worker(idle, "serving nobody", serves=True).launch()
ThreadPoolExecutor(1).submit(ask)
"""


def test_an_executors_thread_that_python_waits_for_is_served_to_the_end() -> None:
    done = run(EXECUTOR)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 1\n", "")


def test_a_worker_is_stopped_by_what_is_raised_in_it_and_forgets_its_work() -> None:
    begun, seen = threading.Event(), []

    def work() -> None:
        begun.set()
        try:
            while True:
                time.sleep(0.01)
        except Cancelled:
            seen.append("called off")
            raise

    worker = Worker(work, "at work")
    assert worker.launch()
    assert begun.wait(HANG_S)
    worker.interrupt()
    worker.join(HANG_S)
    assert seen == ["called off"]
    assert worker not in ending._workers
    worker.interrupt()  # of one that is over does nothing


def test_nothing_starts_once_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_ended", True)
    assert not Worker(lambda: pytest.fail("it started"), "late").launch()
    assert ending.compile_with(["echo", "built"], HANG_S).stdout == "built\n"  # a caller's own thread goes on
