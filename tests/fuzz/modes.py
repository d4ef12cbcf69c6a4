"""What a process or a thread may be set to while a model is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

Mode = Callable[[], AbstractContextManager[Any]]


def setting(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Mode:
    @contextmanager
    def mode() -> Iterator[None]:
        before = read()
        write(value)
        try:
            yield
        finally:
            write(before)

    return mode


def default_dtype(dtype: torch.dtype) -> Mode:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


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
    "deterministic": setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "two threads": setting(torch.get_num_threads, torch.set_num_threads, 2),
}
