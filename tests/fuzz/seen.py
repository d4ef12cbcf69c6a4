"""One call as its caller sees it: the answer or the exception, what the caller's objects saw, what is left behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.surroundings import surroundings

COUNTED = "counted"  # noted by an object that took the place of a module's forward
LOG: list[Any] = []  # what hooks, streamers, processors and criteria note down during the call at hand
RELATIVE = 2e-3  # difference of floating-point results; sums are taken in another order
ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclass
class Seen:
    """What became of a call.

    Args:
        value: nested tuples, lists and dictionaries of tensors and plain values.
        error: class and text of the exception, or None.
        log: what the caller's objects noted.
        random: the state of the generator afterwards.
        left: modes of the process that the call changed, by name.
    """

    value: Any = None
    error: str | None = None
    log: list[Any] = field(default_factory=list)
    random: torch.Tensor | None = None
    left: dict[str, str] = field(default_factory=dict)


def look(call: Callable[[], Any], seed: int) -> Seen:
    """Run a call and note what there is to see."""
    LOG.clear()
    torch.manual_seed(seed)
    before, seen = surroundings(), Seen()
    try:
        seen.value = plainly(call())
    except Exception as error:
        seen.error = ADDRESS.sub("0x", f"{type(error).__module__}.{type(error).__name__}: {error}")
    seen.random = torch.get_rng_state()
    seen.log = list(LOG)
    after = surroundings()
    seen.left = {name: f"{before[name]} -> {after[name]}" for name in before if before[name] != after[name]}
    return seen


def plainly(value: Any) -> Any:
    """Model outputs and caches as dictionaries and lists of tensors that nobody writes to any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: plainly(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plainly(each) for each in value]
    if hasattr(value, "layers") and hasattr(value, "get_seq_length"):
        return {"cache": [plainly(dict(_states(layer))) for layer in value.layers]}
    return value


def _states(layer: Any) -> Iterator[tuple[str, Any]]:
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        if isinstance(held := getattr(layer, name, None), torch.Tensor | dict):
            yield name, held


def difference(plain: Seen, wrapped: Seen, anew: bool = False) -> str | None:
    """What sets the wrapped model's call apart, or None.

    Args:
        anew: the plan failed within it, after it may have run parts of the model, which the original runs again.
    """
    if plain.error != wrapped.error:
        return f"the original ended with {plain.error or 'an answer'}, the wrapped model with {wrapped.error}"
    if found := unequal(plain.value, wrapped.value, "the answer"):
        return found
    if _of_callers(plain.log, anew) != _of_callers(wrapped.log, anew):
        return f"the caller's objects saw {_short(plain.log)} of the original and {_short(wrapped.log)} of the wrapped"
    if plain.error is None and not torch.equal(plain.random, wrapped.random):
        return "random numbers were drawn in another number"
    return None if plain.left == wrapped.left else f"left behind: {wrapped.left}, by the original {plain.left}"


def _of_callers(log: list[Any], anew: bool) -> list[Any]:
    return [each for each in log if each != COUNTED] if anew else log


def unequal(a: Any, b: Any, where: str) -> str | None:
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        return _unequal_tensors(a, b, where)
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{where}: {list(a)} and {list(b)}"
        return next((found for key in a if (found := unequal(a[key], b[key], f"{where}.{key}"))), None)
    if isinstance(a, list):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} parts"
        pairs = enumerate(zip(a, b, strict=True))
        return next((found for i, (x, y) in pairs if (found := unequal(x, y, f"{where}[{i}]"))), None)
    return None if a == b else f"{where}: {a!r} and {b!r}"


def _unequal_tensors(a: torch.Tensor, b: torch.Tensor, where: str) -> str | None:
    for name in ("shape", "dtype", "device"):
        if (one := getattr(a, name)) != (other := getattr(b, name)):
            return f"{where}: {name} {one} and {other}"
    if a.device.type == "meta":
        return None
    if not a.is_floating_point():
        return None if torch.equal(a, b) else f"{where}: {a.tolist()} and {b.tolist()}"
    a, b = a.double(), b.double()
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    if torch.allclose(a, b, rtol=RELATIVE, atol=RELATIVE * scale, equal_nan=True):
        return None
    return f"{where}: numbers differ by {float((a - b).abs().nan_to_num(0.0).max()):.3g} of {scale:.3g}"


def _short(log: list[Any]) -> str:
    text = repr(log)
    return f"{len(log)}: {text[:160]}{'...' if len(text) > 160 else ''}"
