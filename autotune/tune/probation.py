"""Tries foreign code in a child process first, so that a crash or a hang costs only the candidate.

A compiler's or a vendor's kernel may end the process that runs it (SIGSEGV, SIGILL, abort, the kernel's out-of-memory
killer), or never return. No exception is raised then, so a fork runs it first. The fork shares the model's memory,
computes with one thread, because OpenMP's other threads do not survive a fork, and is killed when its parent ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import torch

from ..machine import intraop

PATIENCE_S = 0.2  # seconds that processes have to end by themselves before they are killed
PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
KEPT_BYTES = 4096  # last bytes of a child's output that are kept
LONGEST = 160  # most characters of a child's output in a reason
STEP_S, FINAL_S = 0.2, 0.005  # seconds between two checks of a child, and when its output is closed; interruptible


def is_possible(device: str) -> bool:
    """Whether a fork can try a candidate: only on Linux, and not with a GPU, whose driver does not survive a fork."""
    on_gpu = device != "cpu" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return sys.platform == "linux" and not on_gpu and intraop.is_settable()


def death_of(
    work: Callable[[], object], most_s: float, turn: Callable[[], AbstractContextManager[None]] = nullcontext
) -> str | None:
    """Run `work` in a child process. Exceptions that it raises are ignored: the same work will raise them here, too.

    Args:
        most_s: time that it may take, seconds.
        turn: entered for the fork. No other thread should compute then: a lock that it holds stays locked in the child.

    Returns:
        How the child was killed or hung, in words; None if it ended normally.
    """
    read, write = os.pipe()
    try:
        with turn():
            child = os.fork()
            if child == 0:
                _perform(work, write)
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    with os.fdopen(read, "rb", buffering=0) as said, _reaped(child):
        last = b""
        until_s = time.monotonic() + most_s
        while (code := _ended(child)) is None and time.monotonic() < until_s:
            if select.select([said], [], [], STEP_S)[0]:
                more = os.read(said.fileno(), 1 << 16)
                last = (last + more)[-KEPT_BYTES:]
                time.sleep(0 if more else FINAL_S)  # no output: it is closed, and the child is about to end
    if code == 0:
        return None
    lines = [line for line in last.decode(errors="replace").splitlines() if line.strip()]
    wrote = f": {''.join(filter(str.isprintable, lines[-1]))[:LONGEST].strip()}" if lines else ""
    if code is None:
        return f"it did not end within the {most_s:.0f} s that were left{wrote}"
    return f"it would have ended the process with {_named(code)}{wrote}"


def _ended(child: int) -> int | None:
    """A child's exit code, negative for a signal, or None while it runs. Not reaped, so its pid is not reused."""
    try:
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # other code waited for all children of this process
        return 0
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _named(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    name = signal.strsignal(-code) or str(-code)
    with suppress(ValueError):
        name = signal.Signals(-code).name
    return f"{name}, as the kernel does when memory runs out" if -code == signal.SIGKILL else name


@contextmanager
def _reaped(child: int) -> Iterator[None]:
    """On leaving, end the child and the processes that it started.

    If it did not end well, they are asked first: a compiler then removes what it has half written (see `ending`).
    """
    try:
        yield
    finally:
        if _ended(child) != 0:
            _send(child, signal.SIGTERM)
            time.sleep(PATIENCE_S)
        _send(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def _send(child: int, number: signal.Signals) -> None:
    for kill in (os.killpg, os.kill):  # the child may not have its process group yet
        with suppress(ProcessLookupError, PermissionError):
            kill(child, number)


def _perform(work: Callable[[], object], output: int) -> NoReturn:
    """Do the work in the child, then exit without cleaning up the parent's threads, files or exit handlers."""
    try:
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)
        os.setsid()
        gc.disable()
        faulthandler.disable()  # its output would confuse the parent's user
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        with suppress(OSError):  # if memory runs out, the kernel kills the child
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        compilers = getattr(sys.modules.get("torch._inductor"), "config", None)
        if compilers is not None:
            compilers.compile_threads = 1  # the parent's pool of compile workers does not exist here
        with intraop.computing_with(1):
            work()
    finally:
        os._exit(0)
