"""Kinds of direct calls of the model: `forward`, and what is built on it."""

from __future__ import annotations

from typing import Any

import torch

from tests.fuzz import models
from tests.fuzz.calls import Call, Kind


def forward(**options: Any) -> Kind:
    def call(model: Any, call: Call) -> Any:
        with torch.no_grad():
            return model(call.ids, **options)

    return call


def padded(model: Any, call: Call) -> Any:
    """The logits of tokens; those of padding mean nothing, and depend on how attention is computed."""
    given = models.padded(call.rows, call.length, call.seed)
    with torch.no_grad():
        return model(**given).logits[given["attention_mask"].bool()]


def labelled(model: Any, call: Call) -> Any:
    with torch.no_grad():
        return model(input_ids=call.ids, labels=call.ids)


def stepwise(model: Any, call: Call) -> Any:
    """A loop of the caller's own over a cache that forward made."""
    found, cache, ids = [], None, call.ids
    name = "cache_params" if model.config.model_type == "mamba" else "past_key_values"
    with torch.no_grad():
        for _ in range(3):
            out = model(ids, use_cache=True, **({name: cache} if cache is not None else {}))
            cache = next(out[key] for key in ("past_key_values", "cache", "cache_params") if out.get(key) is not None)
            found.append(out.logits[:, -1])
            ids = out.logits[:, -1:].argmax(-1)
    return found


def gradient(model: Any, call: Call) -> Any:
    """Of the loss with respect to the prompt's embeddings."""
    with torch.enable_grad():
        embeddings = model.get_input_embeddings()(call.ids).detach().requires_grad_(True)
        loss = model(inputs_embeds=embeddings, labels=call.ids).loss
        return loss, torch.autograd.grad(loss, embeddings)[0]


def functional(model: Any, call: Call) -> Any:
    """With other weights than the model's, for this call."""
    weights = {name: tensor * 0.5 for name, tensor in model.named_parameters()}
    with torch.no_grad():
        return torch.func.functional_call(model, weights, (call.ids,))


def mapped(model: Any, call: Call) -> Any:
    """Over each sequence by itself."""
    with torch.no_grad():
        return torch.func.vmap(lambda ids: model(ids[None], use_cache=False).logits[0], randomness="same")(call.ids)


def saved(model: Any, call: Call) -> Any:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def outside(model: Any, call: Call) -> Any:
    with torch.no_grad():
        return model(call.ids + models.VOCABULARY)


FORWARDS: dict[str, Kind] = {
    "forward": forward(),
    "forward cached": stepwise,
    "forward uncached": forward(use_cache=False),
    "forward tuple": forward(return_dict=False),
    "forward last": forward(logits_to_keep=1),
    "forward hidden": forward(output_hidden_states=True),
    "forward attentions": forward(output_attentions=True, use_cache=False),
    "forward padded": padded,
    "forward labels": labelled,
    "forward unknown": forward(colour="red"),
    "forward outside": outside,
    "forward gradient": gradient,
    "forward functional": functional,
    "forward mapped": mapped,
    "state": saved,
}
