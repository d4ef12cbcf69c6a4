"""Which operators of a step make the host wait for the device, found before the step is captured.

A capture records what is queued, and fails at the first operator whose result the host needs. Before torch 2.14 a
failed capture keeps its memory for as long as the process lives (pytorch#190308).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import TransformError

# Operators that read a value, a size or the outcome of a check back from the device. `_Watch` sees the operators that a
# step calls, not those that they call in turn.
WAITS = frozenset(
    {
        *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose"),
        *("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
        *("aten::bincount", "aten::multinomial", "aten::_linalg_check_errors"),
    }
)
COPIES = frozenset({"aten::_to_copy", "aten::copy_"})
INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})
MASKS = (torch.bool, torch.uint8)


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
        copied = name in COPIES and len(places) > 1 and not kwargs.get("non_blocking")
        if name in WAITS or copied or _sized_by_values(name, args, kwargs):
            self.found.append(name)
        return result


def _sized_by_values(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the values of an argument decide how many elements an operator, which usually does not wait, works on."""
    if name in INDEXING:  # a mask becomes the numbers of what it selects, unless one value fills all of it
        masks = [t for t in tree_leaves(args[1]) if t is not None and t.dtype in MASKS]
        return bool(masks) and not (len(args) > 2 and args[2].dim() == 0)
    if name == "bitsandbytes::int8_vectorwise_quant":  # the outliers' columns
        return bool(kwargs.get("threshold") or args[1:])
    return name == "aten::repeat_interleave" and kwargs.get("output_size") is None
