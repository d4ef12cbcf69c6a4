"""Decides which models can be tuned, and which can guess for them. Pure, except for a try on a tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..model import configured, placement, sharding
from ..transforms.static_cache import no_slots
from . import selfcheck

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unsupported(model: Any) -> str | None:
    """Why a model cannot be tuned by one process, in a sentence that says what to do, or None."""
    return mismatch(model) or _sharded(model) or selfcheck.problem(model)


def mismatch(model: Any) -> str | None:
    """Why the model itself cannot be tuned, whatever the installed releases, or None."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        wrapped = placement.inner(model)
        hint = f"; pass the model inside, {wrapped}" if wrapped else ""
        return f"{name} is not a transformers PreTrainedModel; autotune tunes causal LMs of that library{hint}"
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder model; autotune tunes decoder-only causal LMs"
    if not model.can_generate():
        return f"{name} cannot generate (an encoder, or a head other than a language model's); pass a ...ForCausalLM"
    if (reason := placement.obstacle(model)) is not None:
        return f"{name} cannot be tuned where it is: {reason}"
    if model.training:
        return f"{name} is in training mode (dropout would be measured and served); call model.eval() first"
    return None


def _sharded(model: PreTrainedModel) -> str | None:
    reason = sharding.reason(model)
    return reason and f"{reason}: only wrap(model) tunes it, on all ranks together; load it without tp_size for this"


def draft_mismatch(draft: Any, model: PreTrainedModel) -> str | None:
    """Why `draft` cannot guess for `model`, in a sentence that says what to do, or None."""
    if reason := unsupported(draft):
        return f"the draft model cannot be used: {reason}"
    name = type(draft).__name__
    if draft is model:
        return "the draft model is the model itself, which guesses no faster than it answers; pass a smaller one"
    own, wanted = configured.vocabulary(draft), configured.vocabulary(model)
    if own != wanted:
        return (
            f"the draft model {name} has a vocabulary of {own} tokens, the model one of {wanted}: its guesses would "
            "mean other tokens; pass a draft with the same tokenizer and vocabulary size"
        )
    if draft.device != model.device:
        return f"the draft model {name} is on {draft.device}, the model on {model.device}; move it there first"
    if reason := no_slots(draft):
        return f"the draft model {name} cannot decode over slots: {reason}"
    return None
