"""Thread modes for which no plan was proven: under them, the original serves the call."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

AUTOCAST = ("cpu", "cuda")  # kinds of device whose autocast is checked


def tracing() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records the call instead of running it."""
    return torch.compiler.is_compiling() or bool(torch._C._is_tracing())


def unserved() -> str | None:
    """The mode that is on, in words, or None. torch.set_default_device does not count: plans do not depend on it."""
    if any(torch.is_autocast_enabled(kind) for kind in AUTOCAST):
        return "autocast"
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode AD"
    if torch._C._len_torch_dispatch_stack():
        return "a mode that sees every operator"
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    if not all(isinstance(mode, DeviceContext) for mode in modes):
        return "a mode that sees every function"
    return None
