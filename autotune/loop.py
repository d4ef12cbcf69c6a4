"""A lean decoding loop: generate's greedy search and sampling, token for token, without its work between the steps.

It serves what `Variant.unsupported` lets through: ids in, a cache of generate's own, no attentions or hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import softmax

if TYPE_CHECKING:
    from .program import Step
    from .route import Sampling
    from .variant import Variant

NextLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # token [B, 1], position [B, 1] -> logits [B, V]


def decode(variant: Variant, call: Sampling) -> Any:
    """Serve one call of generate's loop.

    Returns:
        what transformers' `_sample` returns: ids [B, P + new], or a GenerateDecoderOnlyOutput.
    """
    return over_slots(variant, call) if variant.caches is not None else over_growing_cache(variant, call)


def over_growing_cache(variant: Variant, call: Sampling) -> Any:
    """Decode with the cache that generate prepared."""
    given = dict(call.model_kwargs)
    cache, mask = given["past_key_values"], given.get("attention_mask")
    with variant.running("prefill") as module:
        logits = module(input_ids=call.input_ids, **given, return_dict=True).logits[:, -1]

    def following(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        nonlocal mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        with variant.running("decode") as module:
            out = module(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        last: torch.Tensor = out.logits[:, -1]
        return last

    return sample(call, logits, following, lambda: cache)


def over_slots(variant: Variant, call: Sampling) -> Any:
    """Decode over a static cache: prefill grows a cache of its own, as the original's does, and hands it over."""
    from . import cache as slots

    pool = variant.caches
    assert pool is not None  # noqa: S101 - the caller checked; for the type checker
    given = dict(call.model_kwargs)
    prompt = given["past_key_values"] = slots.DynamicCache()  # no configuration: every layer at full length
    with variant.running("prefill") as module:
        logits = module(input_ids=call.input_ids, **given, return_dict=True).logits[:, -1]
    with ExitStack() as lent:

        @cache
        def decoder() -> tuple[slots.SlotCache, Step | None]:  # once the first token is out: it needs no slots
            held = lent.enter_context(pool.lend(prompt, given.get("attention_mask")))
            return held, variant.step.fitting(held) if variant.step is not None else None

        def following(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            held, step = decoder()
            with variant.running("decode") as module:
                logits = slots.step(module, token, position, held) if step is None else step(token, position, held)
            held.advance()
            return logits

        return sample(call, logits, following, lambda: decoder()[0].to_dynamic(variant.original.config))


def sample(call: Sampling, logits: torch.Tensor, following: NextLogits, final_cache: Callable[[], Any]) -> Any:
    """Greedy search or sampling from the prompt's last logits [B, V] on; the semantics are those of `_sample`."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    config, processors = call.options["generation_config"], call.options["logits_processor"]
    criteria, streamer = call.options["stopping_criteria"], call.options.get("streamer")
    ids, position = call.input_ids, call.model_kwargs["position_ids"][:, -1:]
    unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
    pads = config._pad_token_tensor if any(hasattr(c, "eos_token_id") for c in criteria) else None
    scores: list[torch.Tensor] = []
    raw: list[torch.Tensor] = []
    while True:
        logits = logits.to(dtype=torch.float32, device=ids.device)  # every step brings a tensor of its own
        score = processors(ids, logits)
        if config.return_dict_in_generate and config.output_scores:
            scores.append(score)
        if config.return_dict_in_generate and config.output_logits:
            raw.append(logits)
        if config.do_sample:
            token = torch.multinomial(softmax(score, dim=-1), num_samples=1).squeeze(1)  # [B]
        else:
            token = score.max(dim=-1).indices  # the first of equals, as argmax, in a third of its time
        if pads is not None:
            token = token * unfinished + pads.to(ids.device) * (1 - unfinished)
        ids = torch.cat([ids, token[:, None]], dim=-1)
        unfinished = unfinished & ~criteria(ids, tuple(scores) or None)
        if streamer is not None:
            streamer.put(token.cpu())
        if unfinished.max() == 0:
            break
        position = position + 1
        logits = following(token[:, None], position)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return ids
    result: dict[str, Any] = {
        "sequences": ids,
        "scores": tuple(scores) if config.output_scores else None,
        "logits": tuple(raw) if config.output_logits else None,
        "past_key_values": final_cache(),
    }
    return GenerateDecoderOnlyOutput(**result)
