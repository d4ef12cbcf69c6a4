"""What of a process or a thread a call, a transform or a variant has to leave as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch


def without_threads(patch: pytest.MonkeyPatch) -> None:
    """No thread can be started, as in a container that has as many as it may."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", start)


def surroundings() -> dict[str, Any]:
    """What the process and this thread are set to."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "engine": torch.backends.quantized.engine,
    }
