"""What a process or a thread may be set to while a model is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

Mode = Callable[[], AbstractContextManager[Any]]


def default_dtype(dtype: torch.dtype) -> Mode:
    @contextmanager
    def mode() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return mode


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def threads(count: int) -> Mode:
    @contextmanager
    def mode() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return mode


MODES: dict[str, Mode] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "float64": default_dtype(torch.float64),
    "float16": default_dtype(torch.float16),
    "bfloat16": default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("cpu"),
    "meta device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "two threads": threads(2),
}
