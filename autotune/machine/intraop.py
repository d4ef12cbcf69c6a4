"""Set the number of intra-op threads for the calling thread only, and end those that it no longer needs.

`torch.set_num_threads` does more: threads that start later begin with the number, and MKL uses it in every thread.
OpenMP and MKL also keep a number per thread, and torch uses that number when it computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft: variables of threads keep their values
LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")


def _torch_library() -> ctypes.CDLL | None:
    """Torch's own library, through which those that it is linked with are found, too; None on an unknown system."""
    folder = Path(torch.__file__).parent / "lib"
    path = next(filter(Path.exists, (folder / name for name in LIBRARIES)), None)
    return None if path is None else ctypes.CDLL(str(path))


@cache
def _setters() -> tuple[Callable[[int], int], ...]:
    """Functions that set the calling thread's number in OpenMP and, if torch has it, MKL; empty if one is missing."""
    library = _torch_library()
    names = ["omp_set_num_threads", *(["MKL_Set_Num_Threads_Local"] if torch._C.has_mkl else [])]
    if all(hasattr(library, name) for name in names):
        return tuple(getattr(library, name) for name in names)
    return ()


def is_settable() -> bool:
    """Whether a thread's number can be set without other threads noticing."""
    return bool(_setters())


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Inside the block, compute with `threads` threads. Other threads, and those that start meanwhile, keep theirs.

    Args:
        threads: at least 1. Nothing changes if this is already the number, or if `is_settable` is False.
    """
    before = torch.get_num_threads()
    setters = _setters() if threads != before else ()
    earlier = [setter(threads) for setter in setters]
    try:
        yield
    finally:
        for setter, back in zip(setters, (before, *earlier[1:]), strict=False):
            setter(back)  # MKL's setter returned the earlier number, 0 for "as all threads"


@cache
def _pause() -> Callable[[int], int] | None:
    """OpenMP's function that ends the calling thread's idle workers, or None."""
    found: Callable[[int], int] | None = getattr(_torch_library(), "omp_pause_resource_all", None)
    return found


def rest() -> None:
    """End the calling thread's idle OpenMP workers. They start again, in a fraction of a millisecond, when needed.

    Call it in a thread that is not going to compute for a while. Every thread that ever computed keeps workers, and as
    soon as all together are more than the cores, GCC's OpenMP no longer lets the busy ones wait actively: each parallel
    region then begins with waking them, which makes prefill 1.5x slower (`python -m benchmarks.idle_workers`).
    """
    if (pause := _pause()) is not None:
        pause(SOFT)
