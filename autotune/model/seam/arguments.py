"""Arguments and outputs of a model's forward, under the names that each release gives them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from ...errors import Blocker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # forward's cache argument and output field; newest first
BARE = "_autotune_bare"  # attribute of a routed class that holds the class it routes
LOOP = "_sample"  # the decoding loop of greedy search and sampling
PLACES = "cache_position"  # to 5.3: the argument that says where in the cache the tokens go
_CACHE_NAME: dict[type, str | None] = {}  # model class -> name of its forward's cache argument
_TAKES_PLACES: dict[type, bool] = {}  # model class -> whether its forward takes `PLACES`


def bare_class(model: Any) -> type[PreTrainedModel]:
    """The class that a model had before its calls were routed."""
    cls: type[PreTrainedModel] = getattr(type(model), BARE, type(model))
    return cls


def parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments of a model's forward."""
    return frozenset(inspect.signature(bare_class(model).forward).parameters)


def cache_name(model: PreTrainedModel) -> str | None:
    """Name of the cache argument of a model's forward, or None if it has none with a known name."""
    cls = bare_class(model)
    if cls not in _CACHE_NAME:  # kept: needed at every token, and while a step compiles, when no signature can be read
        _CACHE_NAME[cls] = cache_argument(cls.forward)
    return _CACHE_NAME[cls]


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Name of a function's cache argument, or None if it has none with a known name."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None)


@functools.cache
def output_cache_name() -> str:
    """Name of the cache's field in generate's result."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    known = {field.name for field in fields(GenerateDecoderOnlyOutput)}
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[0])


def over(model: PreTrainedModel, cache: Any, at: torch.Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments for a forward of `model` that reads and fills `cache`.

    Args:
        at: [K] int64, places of the tokens in the cache. Without it, releases to 5.3 wait for the cache's answer.
    """
    given = {cache_name(model) or output_cache_name(): cache, "use_cache": True}
    return given if at is None or not _takes_places(model) else {**given, PLACES: at}


def _takes_places(model: PreTrainedModel) -> bool:
    cls = bare_class(model)
    if cls not in _TAKES_PLACES:
        _TAKES_PLACES[cls] = PLACES in parameters(model)
    return _TAKES_PLACES[cls]


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache in a forward's keyword arguments or output, under any known name; None if there is none."""
    return next((given[name] for name in CACHE_NAMES if name in given and given[name] is not None), None)


def logits(output: Any) -> torch.Tensor:
    """Logits [B, S, V] of a forward's output."""
    found: torch.Tensor = output.logits
    return found


def cannot_step(model: PreTrainedModel) -> str | None:
    """Why a model cannot be driven token by token from outside generate's loop, or None."""
    if (own := own_loop(model)) is not None:
        return f"the model has a {own} of its own, which the loop would not call"
    missing = sorted({"position_ids", "attention_mask"} - parameters(model))
    if missing:  # another kind of model: state spaces, ALiBi
        return f"the model's forward does not take {', '.join(missing)}"
    return None if cache_name(model) else Blocker("the model's forward does not take cache that is known by name")


def own_loop(model: PreTrainedModel) -> str | None:
    """The name of a part of generate's loop that a class outside of transformers, or the object, has its own of."""
    kinds = [kind for kind in bare_class(model).__mro__ if not kind.__module__.startswith("transformers.")]
    of_classes = (LOOP, "_update_model_kwargs_for_generation")
    of_object = (*of_classes, "prepare_inputs_for_generation")  # which classes of remote code usually have
    found = [name for name in of_classes if any(name in vars(kind) for kind in kinds)]
    return next(iter(found + [name for name in of_object if name in vars(model)]), None)


def keeps_last_logits(model: Any) -> bool:
    """Whether generate requests only the last position's logits from a model."""
    return bool(model._supports_logits_to_keep())


def last_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Keyword arguments that limit a forward's logits to the last `count` positions, if the model supports it."""
    return {"logits_to_keep": count} if keeps_last_logits(model) else {}


def logits_at(model: PreTrainedModel, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keyword arguments that limit a forward's logits to some places [K], if the model supports it."""
    return {"logits_to_keep": places} if keeps_last_logits(model) else {}


def sequences(result: Any) -> torch.Tensor:
    """Tokens [B, P + new] of what generate returned, a tensor or a dictionary."""
    ids: torch.Tensor = result if isinstance(result, torch.Tensor) else result.sequences
    return ids


def update_layer(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments of a call of `Cache.update` besides keys and values: the layer, and arguments that few caches read.

    A dictionary of positions (to 5.3) and `kwargs` (from 5.24) are left out: static and paged caches read them.
    """
    return [*(arg for arg in args if not isinstance(arg, dict)), *sorted(set(kwargs) - {"kwargs", "cache_kwargs"})]


def pop_cache(given: dict[str, Any]) -> Any:
    """Take the cache out of the keyword arguments of an attention block's forward."""
    found = None
    for name in CACHE_NAMES:
        value = given.pop(name, None)
        found = value if found is None else found
    return found
