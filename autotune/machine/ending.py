"""The end of the process: every thread of ours ends before the interpreter does.

A daemon thread that comes back from C++ while the interpreter is finalised is, before Python 3.14, unwound by force;
C++ takes that for an exception nobody catches and aborts the process (status 134). So at exit every background thread
is called off: first as `unwrap` does it, at the next measured step; then by raising `Cancelled` in it, wherever it is,
once the compilers that it waits for are killed.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread as executors  # its own hook is registered first, and so runs after ours
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import forking

log = logging.getLogger("autotune")

MOST_S = 2.0  # that an exit may wait for all threads together
GENTLE_S = 0.3  # of which for a step that ends by itself
AGAIN_S = 0.05  # between two attempts to stop a thread

_lock = forking.lock()
_workers: set[Worker] = set()
_compilers: set[int] = set()  # process groups
_ended = False


class Worker(threading.Thread):
    """A background thread that ends at the latest with the process.

    Args:
        work: what it does. It may raise `Cancelled`.
        name: of the thread.
        stop: called at exit, from another thread, so that `work` returns or raises soon.
    """

    def __init__(self, work: Callable[[], None], name: str, stop: Callable[[], None] = lambda: None) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self.stop = work, stop
        self._interruptible = False
        self._guard = threading.Lock()

    def launch(self) -> bool:
        """Start; whether there was still time to."""
        with _lock:
            if _ended:
                return False
            _workers.add(self)
        try:
            self.start()
        except RuntimeError:  # from 3.12 on no thread starts once the interpreter ends
            with _lock:
                _workers.discard(self)
            if threading.main_thread().is_alive() and not _ended:
                raise
            return False
        return True

    def run(self) -> None:
        try:
            self._interruptible = True
            self._work()
        except Cancelled:
            log.debug("%s was called off", self.name)
        except Exception:
            if not ends():
                raise
            log.debug("%s failed as the process ended", self.name, exc_info=True)
        finally:
            while self._interruptible:
                with suppress(Cancelled), self._guard:
                    self._interruptible = False
            _raise_in(self.ident, None)  # one that was on its way
            with _lock:
                _workers.discard(self)
            del self._work, self.stop  # nothing holds on to a model that nobody uses

    def interrupt(self) -> None:
        """Raise `Cancelled` in this thread as soon as it runs Python, and kill what it waits for."""
        _kill_what_was_started_by(self)
        with self._guard:
            if self._interruptible:
                _raise_in(self.ident, Cancelled)


def compile_with(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler in a process group of its own, which is killed on a timeout and at exit.

    Raises:
        subprocess.TimeoutExpired, OSError: as `subprocess.run`.
        Cancelled: the process ends, and this is a thread that ends with it.
    """
    with subprocess.Popen(  # noqa: S603 - the compiler that the user has chosen
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        with _lock:
            _compilers.add(process.pid)
        try:
            _go_on()
            out, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            _kill_group(process.pid)
            raise
        finally:
            with _lock:
                _compilers.discard(process.pid)
    _go_on()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def _go_on() -> None:
    if _ended and isinstance(threading.current_thread(), Worker):
        raise Cancelled


def ends() -> bool:
    """Whether the process ends. What fails then may follow from that: no thread starts, some modules do not load."""
    return _ended or (getattr(threading, "_SHUTTING_DOWN", False) and not _goes_on())


def end() -> None:
    """End every thread of ours, within `MOST_S`."""
    global _ended
    with _lock:
        _ended = True
        running = [worker for worker in _workers if worker.is_alive()]  # none is after a fork
    if not running:
        return
    start = time.monotonic()
    with _silence():
        for worker in running:
            with suppress(Exception):
                worker.stop()
        for group in tuple(_compilers):
            _kill_group(group)
        _join(running, start + GENTLE_S)
        while (left := [w for w in running if w.is_alive()]) and time.monotonic() < start + MOST_S:
            for worker in left:
                worker.interrupt()
            _stop_compilations()
            _join(left, min(time.monotonic() + AGAIN_S, start + MOST_S))
    if left:
        log.debug("still running at exit: %s", ", ".join(worker.name for worker in left))
        _let_wait()


def _join(workers: Iterable[Worker], until_s: float) -> None:
    for worker in workers:
        worker.join(max(0.0, until_s - time.monotonic()))


def _before_executors() -> None:
    """Runs ahead of the hook that waits for executors' threads, which may be compiling for ours."""
    if not _goes_on():
        end()


def _goes_on() -> bool:
    """Whether the script goes on in threads of its own (a server's) when its main thread is done; then all goes on."""
    own = threading.main_thread()
    waited_for = set(getattr(executors, "_threads_queues", ()))
    others = [t for t in threading.enumerate() if t is not own and not t.daemon and t not in waited_for]
    return any(type(t).__name__ != "_ExecutorManagerThread" for t in others)


@contextmanager
def _silence() -> Iterator[None]:
    """`Cancelled` may come up where Python can only print it, such as in a finaliser: it is no news."""
    hooks: tuple[Any, Any] = sys.unraisablehook, threading.excepthook

    def told(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda found: None if found.exc_type is Cancelled else hook(found)

    sys.unraisablehook, threading.excepthook = told(hooks[0]), told(hooks[1])
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hooks


def _raise_in(thread: int | None, kind: type[BaseException] | None) -> None:
    raised: Any = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), raised)


def _kill_group(group: int) -> None:
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)


def _kill_what_was_started_by(thread: threading.Thread) -> None:
    """Kill a thread's processes, and theirs; known on Linux only. Torch's pool of compilers is closed by torch."""
    pools = getattr(sys.modules.get("torch._inductor.async_compile"), "_pool_set", ())
    spared = {getattr(getattr(pool, "process", None), "pid", None) for pool in pools}
    for process in _descendants(Path(f"/proc/self/task/{thread.native_id}")):
        if process not in spared:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)


def _descendants(task: Path) -> list[int]:
    try:
        children = [int(word) for word in (task / "children").read_text().split()]
    except OSError:
        return []
    found = list(children)
    for child in children:
        with suppress(OSError):
            for inner in Path(f"/proc/{child}/task").iterdir():
                found += _descendants(inner)
    return found


def _stop_compilations() -> None:
    """Torch compiles C++ in an executor's threads: nothing queued is begun, and what runs is killed."""
    module = sys.modules.get("torch._inductor.async_compile")
    pool: Any = getattr(getattr(module, "AsyncCompile", None), "pool", None)
    if pool is None or not pool.cache_info().currsize:
        return
    executor = pool()
    executor.shutdown(wait=False, cancel_futures=True)
    for thread in executor._threads:
        _kill_what_was_started_by(thread)


def _let_wait() -> None:
    """The last resort for a thread that is still inside foreign code: what would abort the process waits instead."""
    if sys.platform != "linux" or sys.version_info >= (3, 14):  # there it waits by itself
        return
    with suppress(OSError, AttributeError):
        wait = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p)
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(wait)  # std::set_terminate


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compilers.clear)  # they are the parent's
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_before_executors)  # type: ignore[attr-defined]


class Cancelled(BaseException):
    """Tuning was called off, by unwrap or at exit. A BaseException: no trial takes it for a failure of its own."""
