"""Process exit: all of autotune's threads end before the interpreter does.

Before Python 3.14, a daemon thread that returns from C++ while the interpreter is finalised is unwound by force. C++
treats that as an uncaught exception and aborts the process (status 134). So every background thread is stopped at exit:
first as `unwrap` does it, at the next measured step. If that does not suffice, the compilers that it waits for are
killed, and `Cancelled` is raised in it, wherever it is. The script's own daemon threads are not touched; one that C++
would unwind waits instead (`_let_wait`).
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread as executors  # imported first: its exit hook then runs after ours
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
from typing import Any, NoReturn

from ..errors import AutotuneError
from . import forking

log = logging.getLogger("autotune")

MOST_S = 2.0  # seconds that an exit may wait for all threads together
GENTLE_S = 0.3  # seconds of these in which threads may end at their next step, before they are interrupted
AGAIN_S = 0.05  # seconds between two attempts to stop a thread
COMPUTING = ("autotune", "torch", "transformers")  # packages that call C++
PATIENCE_S = 0.5  # seconds after which a process that was asked to end is killed

_lock = forking.lock()
_workers: set[Worker] = set()
_compilers: set[int] = set()  # process groups of running compilers
_asked: dict[int, float] = {}  # processes that were asked to end -> when, by time.monotonic
_torn: dict[int, Path] = {}  # compilers that were asked to end -> the file that they were writing
_ended = False


class NoThreadError(AutotuneError, RuntimeError):
    """No thread can be started now; nothing was begun."""


class Worker(threading.Thread):
    """A background thread that ends with the process at the latest.

    Args:
        work: the function that it runs. It may raise `Cancelled`.
        name: the thread's name.
        stop: called at exit, from another thread, so that `work` returns or raises soon.
    """

    def __init__(self, work: Callable[[], None], name: str, stop: Callable[[], None] = lambda: None) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.stop = stop
        self._interruptible = False
        self._guard = threading.Lock()

    def launch(self) -> bool:
        """Start the thread. Returns False if the process is ending and the thread cannot start.

        Raises:
            NoThreadError: the process, or its container, has as many threads as it may.
        """
        with _lock:
            if _ended:
                return False
            _workers.add(self)
        try:
            self.start()
        except RuntimeError as error:  # from 3.12 on, no thread starts while the interpreter ends
            with _lock:
                _workers.discard(self)
            if threading.main_thread().is_alive() and not _ended:
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
        _kill_what_was_started_by(self)
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
    """Whether the process is ending. That can itself cause errors: no thread starts, some modules do not load."""
    return _ended or (getattr(threading, "_SHUTTING_DOWN", False) and not _goes_on())


def refuse(error: Exception) -> NoReturn:
    """Raise an error because the process ends. A daemon thread of the script's own waits, and ends silently with it.

    Call it without a lock.
    """
    while _is_daemon(threading.current_thread()):
        time.sleep(MOST_S)
    raise error


def end() -> None:
    """End all of autotune's threads, within `MOST_S`."""
    global _ended
    with _lock:
        _ended = True
        running = [worker for worker in _workers if worker.is_alive()]  # none is alive after a fork
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
            _kill_group(group)
        _join(running, start + GENTLE_S)
        while (left := [w for w in running if w.is_alive()]) and time.monotonic() < start + MOST_S:
            for worker in left:
                worker.interrupt()
            _stop_compilations()
            _join(left, min(time.monotonic() + AGAIN_S, start + MOST_S))
    _remove_torn()
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
    """End our threads before the hook that waits for executors' threads, which may be compiling for ours."""
    if not _goes_on():
        end()


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


def _kill_group(group: int) -> None:
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)


def _kill_what_was_started_by(thread: threading.Thread) -> None:
    """End a thread's child processes and their descendants, on Linux only. Torch closes its own pool of compilers.

    They are asked first: a compiler then removes what it has half written. Torch keeps that file under the name of its
    source, and would fail to load it ("file too short") in every later process. A linker that is killed after its
    driver has cleaned up leaves it behind, so the file's name is noted.
    """
    pools = getattr(sys.modules.get("torch._inductor.async_compile"), "_pool_set", ())
    spared = {getattr(getattr(pool, "process", None), "pid", None) for pool in pools}
    for process in _descendants(Path(f"/proc/self/task/{thread.native_id}")):
        if process not in spared:
            now = time.monotonic()
            if (written := _output(process)) is not None:
                _torn[process] = written
            patient = now - _asked.setdefault(process, now) < PATIENCE_S
            with suppress(OSError):
                os.kill(process, signal.SIGTERM if patient else signal.SIGKILL)


def _output(process: int) -> Path | None:
    """The file that a process was told to write (`-o file`), if it is a compiler's."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        return Path(f"/proc/{process}/cwd").readlink() / words[words.index("-o") + 1]
    except (OSError, ValueError, IndexError):
        return None


def _remove_torn() -> None:
    """Remove what compilers were writing when they were asked to end, once none of them can write it any more."""
    for process, written in _torn.items():
        if _output(process) == written:  # it lives, and is no later process with the same number
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with suppress(OSError):
            written.unlink()
    _torn.clear()


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
    """Stop torch's C++ compilations, which run in an executor's threads: cancel queued ones, kill running ones."""
    module = sys.modules.get("torch._inductor.async_compile")
    pool: Any = getattr(getattr(module, "AsyncCompile", None), "pool", None)
    if pool is None or not pool.cache_info().currsize:
        return
    executor = pool()
    executor.shutdown(wait=False, cancel_futures=True)
    for thread in executor._threads:
        _kill_what_was_started_by(thread)


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
    os.register_at_fork(after_in_child=_torn.clear)
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_before_executors)  # type: ignore[attr-defined]


class Cancelled(BaseException):
    """Tuning was cancelled, by unwrap or at exit. A BaseException, so that no trial mistakes it for its own failure."""
