"""Process exit: all of autotune's threads end before the interpreter does.

Before Python 3.14, a daemon thread that returns from C++ while the interpreter is finalised is unwound by force. C++
treats that as an uncaught exception and aborts the process (status 134). So every background thread is stopped at exit:
first as `unwrap` does it, at the next measured step. If that does not suffice, the compilers that it waits for are
killed, and `Cancelled` is raised in it, wherever it is. The script's own daemon threads are not touched; one that C++
would unwind waits instead (`_let_wait`).

Python waits for the threads of executors, which finish what they were given. Those may be callers, so the threads that
serve callers end after them, all others before.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread as executors  # imported first: its exit hook then runs after ours
import ctypes
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..errors import AutotuneError
from . import forking, started

log = logging.getLogger("autotune")

MOST_S = 2.0  # seconds that an exit may wait for all threads together
GENTLE_S = 0.3  # seconds of these in which threads may end at their next step, before they are interrupted
AGAIN_S = 0.05  # seconds between two attempts to stop a thread
COMPUTING = ("autotune", "torch", "transformers")  # packages that call C++

_lock = forking.lock()
_workers: set[Worker] = set()
_compilers: set[int] = set()  # process groups of running compilers
_ended = False  # whether threads that serve no callers have been ended
_is_over = False  # whether all have been


class NoThreadError(AutotuneError, RuntimeError):
    """No thread can be started now; nothing was begun."""


class Worker(threading.Thread):
    """A background thread that ends with the process at the latest.

    Args:
        work: the function that it runs. It may raise `Cancelled`.
        name: the thread's name.
        stop: called at exit, from another thread, so that `work` returns or raises soon.
        serves: whether callers wait for what it does, which may be threads that the process waits for.
    """

    def __init__(
        self, work: Callable[[], None], name: str, stop: Callable[[], None] = lambda: None, *, serves: bool = False
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.stop = stop
        self.serves = serves
        self._interruptible = False
        self._guard = threading.Lock()

    @property
    def must_end(self) -> bool:
        """Whether the process ends, and with it this thread."""
        return _is_over if self.serves else _ended

    def launch(self) -> bool:
        """Start the thread. Returns False if the process is ending and the thread cannot start.

        Raises:
            NoThreadError: the process, or its container, has as many threads as it may.
        """
        with _lock:
            if self.must_end:
                return False
            _workers.add(self)
        try:
            self.start()
        except RuntimeError as error:  # from 3.12 on, no thread starts while the interpreter ends
            with _lock:
                _workers.discard(self)
            if threading.main_thread().is_alive() and not self.must_end:
                raise NoThreadError(str(error)) from error
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
            _raise_in(self.ident, None)  # withdraw a `Cancelled` that is still pending
            with _lock:
                _workers.discard(self)
            del self._work, self.stop  # they may keep an unused model alive

    def interrupt(self) -> None:
        """Raise `Cancelled` in this thread as soon as it runs Python, and kill the processes that it started."""
        started.end_started_by(self)
        with self._guard:
            if self._interruptible:
                _raise_in(self.ident, Cancelled)


def compile_with(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler in a separate process group, which is killed on a timeout and at exit.

    Raises:
        subprocess.TimeoutExpired, OSError: as in `subprocess.run`.
        Cancelled: the process is ending, and the calling thread is a `Worker`.
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
            started.kill_group(process.pid)
            raise
        finally:
            with _lock:
                _compilers.discard(process.pid)
    _go_on()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def _go_on() -> None:
    thread = threading.current_thread()
    if isinstance(thread, Worker) and thread.must_end:
        raise Cancelled


def ends() -> bool:
    """Whether the process is ending. That can itself cause errors: no thread starts, some modules do not load."""
    return _ended or (getattr(threading, "_SHUTTING_DOWN", False) and not _goes_on())


def refuse(error: Exception) -> NoReturn:
    """Raise an error because the process ends. A daemon thread of the script's own waits, and ends silently with it.

    Call it without a lock.
    """
    while _is_daemon(threading.current_thread()):
        time.sleep(MOST_S)
    raise error


def end(*, serves_on: bool = False) -> None:
    """End autotune's threads, within `MOST_S`.

    Args:
        serves_on: whether those that serve callers go on.
    """
    global _ended, _is_over
    with _lock:
        _ended, _is_over = True, not serves_on
        alive = [worker for worker in _workers if worker.is_alive()]  # none is alive after a fork
        running = [worker for worker in alive if not (serves_on and worker.serves)]
    if not running:
        if _others_compute():
            _let_wait()
        return
    start = time.monotonic()
    with _silence():
        for worker in running:
            with suppress(Exception):
                worker.stop()
        for group in tuple(_compilers):
            started.kill_group(group)
        _join(running, start + GENTLE_S)
        while (left := [w for w in running if w.is_alive()]) and time.monotonic() < start + MOST_S:
            for worker in left:
                worker.interrupt()
            _stop_compilations()
            _join(left, min(time.monotonic() + AGAIN_S, start + MOST_S))
    started.remove_torn()
    if left:
        log.debug("still running at exit: %s", ", ".join(worker.name for worker in left))
    if left or _others_compute():
        _let_wait()


def _others_compute() -> bool:
    """Whether a daemon thread of the script's own is inside torch, or about to be: it would abort the process, too."""
    daemons = {thread.ident for thread in threading.enumerate() if _is_daemon(thread)}
    for ident, frame in sys._current_frames().items():
        while ident in daemons and frame is not None:
            if str(frame.f_globals.get("__name__")).partition(".")[0] in COMPUTING:
                return True
            frame = frame.f_back  # type: ignore[assignment]  # None where the stack ends
    return False


def _is_daemon(thread: threading.Thread) -> bool:
    return thread.daemon and not isinstance(thread, Worker)


def _join(workers: Iterable[Worker], until_s: float) -> None:
    for worker in workers:
        worker.join(max(0.0, until_s - time.monotonic()))


def _before_executors() -> None:
    """End our threads before the hook that waits for executors' threads, which may be compiling for ours.

    Those that serve callers go on if such a thread may be one.
    """
    if not _goes_on():
        end(serves_on=_have_executors())


def _have_executors() -> bool:
    """Whether a thread of an executor lives, other than those that compile for torch."""
    executor = _compiling()
    compiling = set[threading.Thread]() if executor is None else executor._threads
    waited_for = tuple(getattr(executors, "_threads_queues", ()))
    return any(thread.is_alive() and thread not in compiling for thread in waited_for)


def _goes_on() -> bool:
    """Whether the script's own threads (a server's) outlive its main thread. If so, our threads continue, too."""
    own = threading.main_thread()
    waited_for = set(getattr(executors, "_threads_queues", ()))
    others = [t for t in threading.enumerate() if t is not own and not t.daemon and t not in waited_for]
    return any(type(t).__name__ != "_ExecutorManagerThread" for t in others)


@contextmanager
def _silence() -> Iterator[None]:
    """Do not print a `Cancelled` that Python cannot propagate, such as one raised in a finaliser: it is expected."""
    hooks: tuple[Any, Any] = sys.unraisablehook, threading.excepthook

    def told(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda found: None if found.exc_type is Cancelled else hook(found)

    sys.unraisablehook = told(hooks[0])
    threading.excepthook = told(hooks[1])
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hooks


def _raise_in(thread: int | None, kind: type[BaseException] | None) -> None:
    raised: Any = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), raised)


def _stop_compilations() -> None:
    """Stop torch's C++ compilations: cancel queued ones, kill running ones."""
    if (executor := _compiling()) is not None:
        executor.shutdown(wait=False, cancel_futures=True)
        for thread in executor._threads:
            started.end_started_by(thread)


def _compiling() -> Any:
    """The executor whose threads run torch's C++ compilations, or None."""
    module = sys.modules.get("torch._inductor.async_compile")
    pool: Any = getattr(getattr(module, "AsyncCompile", None), "pool", None)
    return pool() if pool is not None and pool.cache_info().currsize else None


def _let_wait() -> None:
    """Make a thread that would abort the process wait instead, because it is still inside foreign code."""
    if sys.platform != "linux" or sys.version_info >= (3, 14):  # from 3.14 on it waits by itself
        return
    with suppress(OSError, AttributeError):
        wait = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p)
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(wait)  # std::set_terminate


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compilers.clear)  # the compilers belong to the parent
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_before_executors)  # type: ignore[attr-defined]


class Cancelled(BaseException):
    """Tuning was cancelled, by unwrap or at exit. A BaseException, so that no trial mistakes it for its own failure."""
