"""Which operators of a step make the host wait for the device, found before the step is captured.

A capture records what is queued, and fails at the first operator whose result the host needs. Before torch 2.14 a
failed capture keeps its memory for as long as the process lives (pytorch#190308).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import TransformError

WAITS = frozenset(  # operators that read a value, or the number of values, back from the device
    {
        *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"),
        *("aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::multinomial"),  # its checks are read
    }
)
COPIES = frozenset({"aten::_to_copy", "aten::copy_"})


def require_no_wait(step: Callable[[], object]) -> None:
    """Run a step once, uncompiled, and look at its operators.

    Raises:
        TransformError: the step waits for the device.
    """
    with _Watch() as watch:
        step()
    if watch.found:
        raise TransformError(
            f"the step waits for the device ({', '.join(dict.fromkeys(watch.found))}), which no graph can"
        )


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), func._schema.name
        places = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        if name in WAITS or (name in COPIES and len(places) > 1 and not kwargs.get("non_blocking")):
            self.found.append(name)
        return result
