"""The model under check: what serves, its description, its machine, and whether a baseline is comparable with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...errors import BaselineError, UnsupportedModelError
from ...machine import device as devices
from ...machine.hardware import library_versions
from ...model import configured, route, seam
from ...model.linear_layers import stored_bytes
from ...runtime.variant import Variant
from ...runtime.wrapped import serving_variant
from ...tune import fingerprint
from ...tune.run import name_of
from .baseline import Baseline, Environment, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...tune.plan import Plan

PROBE = "Zwölf Boxkämpfer jagen\nViktor: 3.14159 != 22/7, naïve 東京 🙂 def f(x): return x  # end"


def serving(model: PreTrainedModel, plan: Plan | None = None) -> Variant:
    """The variant that serves a model's calls: the given plan's, a wrapped model's plan's, or the model as it is.

    Raises:
        UnsupportedModelError: the model is not a causal LM in eval mode.
        PlanError: the plan was made for another model.
        TransformError: a transform refuses.
    """
    from ...tune.supported import unsupported

    if reason := unsupported(model):
        raise UnsupportedModelError(reason)
    if plan is not None:
        plan.require(fingerprint.of_model(route.bare(model) if route.is_routed(model) else model))
        return plan.apply(model, check=False)
    return serving_variant(model) if route.is_routed(model) else Variant(model)


def describe(variant: Variant, tokenizer: PreTrainedTokenizerBase | None, dtype: str, vocabulary: int) -> Subject:
    """Describe a model that gives logits of `dtype` over `vocabulary` tokens."""
    model = variant.original
    return Subject(
        name=name_of(model),
        kind=seam.bare_class(model).__name__,
        fingerprint=fingerprint.of_model(model),
        dtype=dtype,
        vocabulary=vocabulary,
        tokenizer=tokenizer_hash(tokenizer),
        weights_bytes=stored_bytes(*variant.modules.values()),
        transforms=tuple(map(str, variant.transforms)),
    )


def environment(model: PreTrainedModel) -> Environment:
    """Identify the machine, without measuring it, and the libraries."""
    device = devices.of(model)
    identity = device.identity()
    return Environment(device.kind, identity.name, identity.capability, torch.get_num_threads(), library_versions())


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash a tokenizer's vocabulary and its tokens of a sentence with many kinds of characters."""
    if tokenizer is None:
        return ""
    ids: Any = tokenizer(PROBE)["input_ids"]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def require_comparable(
    baseline: Baseline,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]] | None,
) -> None:
    """Refuse a model that cannot be compared with the baseline.

    Raises:
        BaselineError: the vocabulary, tokenizer or prompts differ, or the context is too short for the recorded texts.
    """
    was, width = baseline.subject, configured.vocabulary(model)
    if width != was.vocabulary:
        raise BaselineError(
            f"the model has {width} tokens in its vocabulary, the baseline's {was.name} {was.vocabulary}: "
            "probabilities over different tokens cannot be compared; record a baseline of this model's kind"
        )
    mine = tokenizer_hash(tokenizer)
    if mine and was.tokenizer and mine != was.tokenizer:
        raise BaselineError(
            f"the model's tokenizer is not the one of the baseline's {was.name}: the same text gives other tokens; "
            "use the recorded tokenizer, or record a baseline with this one"
        )
    if prompts is not None and {tuple(p) for p in prompts} != set(baseline.questions.prompts):
        raise BaselineError(
            f"the prompts given are not the {len(baseline.questions.prompts)} that were recorded; "
            "leave them out to use those, or record a baseline with these"
        )
    longest = max(len(text.context) + len(text.scored) for group in baseline.questions.groups for text in group)
    if (limit := configured.context(model) or longest) < longest:
        raise BaselineError(f"the model's context is {limit} tokens, the baseline's longest text has {longest}")
