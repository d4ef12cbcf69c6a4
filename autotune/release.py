"""Letting the original go: the model object takes over layers of the plan, and its own weights are freed.

The object stays what it was, with its class, configuration and handle. Its layers are then those of the plan's prefill,
which take any number of tokens, so that calls which the plan cannot serve run through them in transformers' own loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import StateError
from .sites import stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .variant import Variant

RELOAD = "the original's weights were released; load the model again"


def releasable_bytes(model: PreTrainedModel, variant: Variant) -> int:
    """Bytes of the model's weights that no module of the variant uses."""
    serving = variant.modules.values()
    return stored_bytes(model, *serving) - stored_bytes(*serving)


def release(model: PreTrainedModel, variant: Variant) -> None:
    """Make `model`, and every alias of it, consist of the variant's prefill module; no call may be under way.

    From then on it refuses `state_dict`, with it `save_pretrained`, and `load_state_dict`: its weights are no longer
    those that its class and configuration describe.
    """
    module = variant.modules["prefill"]
    for kind in ("_modules", "_parameters", "_buffers"):  # in place: aliases share the dictionaries
        held, new = getattr(model, kind), dict(getattr(module, kind))
        held.clear()
        held.update(new)
    model.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]


def _refuse(*_: Any) -> None:
    raise StateError(f"this model has no weights of its own to save or to load into: {RELOAD} for that")
