"""Intra-op threads of the calling thread alone.

`torch.set_num_threads` sets more than that: threads that start meanwhile begin with the number, and MKL computes with
it in every thread. OpenMP and MKL keep a number for each thread, too, which is what torch asks for where it computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")


@cache
def _setters() -> tuple[Callable[[int], int], ...]:
    """What sets the calling thread's number, in OpenMP and, where torch has it, in MKL; nothing where nothing does."""
    folder = Path(torch.__file__).parent / "lib"
    for path in filter(Path.exists, (folder / name for name in LIBRARIES)):
        library = ctypes.CDLL(str(path))
        names = ["omp_set_num_threads", *(["MKL_Set_Num_Threads_Local"] if torch._C.has_mkl else [])]
        if all(hasattr(library, name) for name in names):
            return tuple(getattr(library, name) for name in names)
    return ()


def is_settable() -> bool:
    """Whether a thread's number can be set without other threads noticing."""
    return bool(_setters())


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Compute with so many threads in here; other threads, and those that start meanwhile, with theirs as before.

    Args:
        threads: at least 1. Nothing changes where it is the number already, or where `is_settable` is False.
    """
    before = torch.get_num_threads()
    setters = _setters() if threads != before else ()
    earlier = [setter(threads) for setter in setters]
    try:
        yield
    finally:
        for setter, back in zip(setters, (before, *earlier[1:]), strict=False):
            setter(back)  # MKL says what was set before, with 0 for "as all threads"
