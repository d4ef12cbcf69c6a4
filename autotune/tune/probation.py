"""Foreign code is tried in a child process first: what kills or hangs it there costs the candidate, and nothing else.

A compiler's or a vendor's kernel may end the process that runs it (SIGSEGV, SIGILL, abort, the kernel's out-of-memory
killer), or never return. No exception tells of that, so a fork goes first. It shares the model's memory, computes with
one thread, since OpenMP's others do not outlive a fork, and ends with its parent, whatever becomes of that.
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

PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
KEPT_BYTES = 4096  # of what a child writes: the last ones
LONGEST = 160  # characters of them in a reason
STEP_S, FINAL_S = 0.2, 0.005  # between two looks at a child, so that whoever waits can be interrupted


def is_possible(device: str) -> bool:
    """Whether a fork can try a candidate: on Linux, and not on a GPU, whose driver does not outlive a fork."""
    on_gpu = device != "cpu" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return sys.platform == "linux" and not on_gpu and intraop.is_settable()


def death_of(
    work: Callable[[], object], most_s: float, turn: Callable[[], AbstractContextManager[None]] = nullcontext
) -> str | None:
    """Do `work` in a child process. What it raises is no news: it will be raised here, too.

    Args:
        most_s: the time it may take.
        turn: entered for the fork, when nobody else should be computing: what they hold then is held for ever there.

    Returns:
        What became of the child, in words, where it ended by anything but its own will; or None.
    """
    read, write = os.pipe()
    with turn():
        child = os.fork()
        if child == 0:
            _perform(work, write)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as said, _reaped(child):
        last = b""
        until_s = time.monotonic() + most_s
        while (code := _ended(child)) is None and time.monotonic() < until_s:
            if select.select([said], [], [], STEP_S)[0]:
                more = os.read(said.fileno(), 1 << 16)
                last = (last + more)[-KEPT_BYTES:]
                time.sleep(0 if more else FINAL_S)  # its output is closed: it is about to end
    if code == 0:
        return None
    lines = [line for line in last.decode(errors="replace").splitlines() if line.strip()]
    wrote = f": {''.join(filter(str.isprintable, lines[-1]))[:LONGEST].strip()}" if lines else ""
    if code is None:
        return f"it did not end within the {most_s:.0f} s that were left{wrote}"
    return f"it would have ended the process with {_named(code)}{wrote}"


def _ended(child: int) -> int | None:
    """A child's exit code, negative for a signal, or None while it runs. It is not reaped: its number stays its own."""
    try:
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody else waits for all children of this process
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
    """Leave no process behind, neither the child nor what it started."""
    try:
        yield
    finally:
        for kill in (os.killpg, os.kill):  # it may not have come to a group of its own
            with suppress(ProcessLookupError, PermissionError):
                kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def _perform(work: Callable[[], object], output: int) -> NoReturn:
    """The child's part. Nothing of the parent's is cleaned up here: not its threads, files or exit handlers."""
    try:
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)
        os.setsid()
        gc.disable()
        faulthandler.disable()  # what it says is not for the parent's user
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        with suppress(OSError):  # where memory runs out, it is this one's
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        compilers = getattr(sys.modules.get("torch._inductor"), "config", None)
        if compilers is not None:
            compilers.compile_threads = 1  # the parent's pool is not here
        with intraop.computing_with(1):
            work()
    finally:
        os._exit(0)
