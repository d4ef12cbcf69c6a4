"""A lean decoding loop: generate's greedy search and sampling, token for token, without its work between the steps.

It serves the calls that `dispatch.unsupported` accepts: inputs are ids, the cache is generate's own, and neither
attentions nor hidden states are returned.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..machine import device as devices
from ..model import seam
from ..model.configured import text_config
from .loop_state import DeviceState, HostState
from .reading import read
from .steps.step import preparing

if TYPE_CHECKING:
    from ..model.seam import Sampling
    from .cache.slots import SlotCache
    from .steps.step import NextLogits, Step
    from .variant import Variant


def decode(variant: Variant, call: Sampling) -> Any:
    """Serve one call of generate's loop.

    Returns:
        The same as generate's own loop: ids [B, P + new], or a dictionary of them and more.
    """
    return over_slots(variant, call) if variant.caches is not None else over_growing_cache(variant, call)


def over_growing_cache(variant: Variant, call: Sampling) -> Any:
    """Decode with the cache that generate prepared."""
    config, kv = text_config(variant.original), variant.kv
    cache, mask = call.cache if kv is None else kv.make(config), call.mask
    cache = seam.growing_cache(config) if cache is None else cache
    logits = read(variant, call, cache)

    def following(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        nonlocal mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        with variant.running("decode") as module:
            given = {"attention_mask": mask, "position_ids": position, **seam.over(variant.original, cache)}
            return seam.logits(module(token, **given))[:, -1]

    returned = call.settings.return_dict_in_generate  # then the cache must not hold a token too many
    final_cache = (lambda: cache) if kv is None else (lambda: kv.returned(cache, config))
    return sample(call, logits, following, final_cache, None if returned else lambda: None)


def over_slots(variant: Variant, call: Sampling) -> Any:
    """Decode over a static cache.

    A prompt that is captured is computed in the slots, and on the host prefill fills them. Else they get a copy of what
    grew in prefill.
    """
    from .cache import slot_forward

    pool = variant.caches
    assert pool is not None  # noqa: S101 - the caller checked; for the type checker
    batch = call.input_ids.shape[0]
    with ExitStack() as lent:
        filled = variant.prompts.room(call, pool, lent) if variant.prompts is not None else None
        prompt = seam.growing_cache()  # no configuration: every layer at full length
        if filled is None and "forward" not in vars(variant.modules["prefill"]):  # else compiled, and again for slots
            with preparing(batch):
                prompt = lent.enter_context(pool.read(batch))
        if variant.prompts is not None and filled is not None:
            with variant.running("prefill"):
                logits = variant.prompts.compute(call, filled)
        else:
            logits = read(variant, call, prompt)

        @cache
        def decoder() -> tuple[SlotCache, Step | None]:  # called after the first token, which needs no slots
            with preparing(batch):
                held = filled or lent.enter_context(pool.lend(prompt, call.mask))
                return held, variant.step.fitting(held) if variant.step is not None else None

        def following(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            held, step = decoder()
            with variant.running("decode") as module:
                return slot_forward.step(module, token, position, held) if step is None else step(token, position, held)

        def final_cache() -> Any:
            return decoder()[0].to_dynamic(variant.original.config)

        coming: NextLogits = following
        if variant.speculation is not None and call.input_ids.shape[0] == 1:
            coming = variant.speculation.ahead(variant.running, call, lambda: decoder()[0], following, lent)
        return sample(call, logits, coming, final_cache, lambda: decoder()[0].advance())


def sample(
    call: Sampling,
    logits: torch.Tensor,
    following: NextLogits,
    final_cache: Callable[[], Any],
    keep: Callable[[], None] | None = None,
) -> Any:
    """Run greedy search or sampling from the prompt's last logits [B, V], with the semantics of generate's loop.

    On a GPU, the next step is launched before the host has seen the token. So the GPU has work while the host reads the
    token, feeds the streamer and decides. If all sequences turn out to be finished, the launched step is discarded. The
    first token is an exception: nothing is launched before it is out, because the caller waits for it and the first
    step has to set up the cache.

    Args:
        call: the call that is served.
        logits: the prompt's last logits [B, V].
        following: runs one step. Without `keep`, the step is kept at once.
        final_cache: gives the cache to return, with every kept step.
        keep: keeps the latest step; None if a step cannot be taken back.
    """
    config, scored, streamer = call.settings, call.scoring(), call.streamer
    device = devices.of(call.input_ids.device)
    state = HostState(call) if device.is_host else DeviceState(call, device)
    returns_scores = config.return_dict_in_generate and config.output_scores
    returns_logits = config.return_dict_in_generate and config.output_logits
    # a step on the host may write over logits that are kept
    copies = device.is_host and bool(returns_scores or returns_logits or scored is not None)
    first, longest = call.input_ids.shape[1] + 1, 0  # for lengths between these, the next step is launched early
    if device.asynchronous and keep is not None:
        longest = call.longest
    scores: list[torch.Tensor] = []
    raw: list[torch.Tensor] = []
    while True:
        logits = logits.to(dtype=torch.float32, device=call.input_ids.device, copy=copies)
        score = logits if scored is None else scored(state.ids, logits)
        if returns_scores:
            scores.append(score)
        if returns_logits:
            raw.append(logits)
        token = state.choose(score, sampling=config.do_sample)  # [B]
        state.stop(tuple(scores) or None)
        seen, position = state.look(), state.position()
        ahead = following(token[:, None], position) if first < state.length < longest else None
        shown, finished = seen()
        if streamer is not None:
            streamer.put(shown)
        if finished:
            break
        logits = following(token[:, None], position) if ahead is None else ahead
        if keep is not None:
            keep()
    if streamer is not None:
        streamer.end()
    ids = state.ids.clone()
    return call.result(ids, scores, raw, final_cache()) if config.return_dict_in_generate else ids
