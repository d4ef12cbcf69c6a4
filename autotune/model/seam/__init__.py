"""The seam to transformers: the only package that names that library's internals.

All other code uses autotune's own terms: a `Sampling` call with its cache, positions and settings; a `CacheLayer`; the
attention that a model uses. Differences between releases are detected from signatures and fields where that is enough,
and by release otherwise. The differences are:

    the cache argument and field   cache (from 5.24), past_key_values (to 5.23), cache_params (Mamba, to 5.23)
    position_ids before the loop   prepared by generate (from 5.2), by the loop itself (before)
    the cache before the loop      prepared by generate; left to forward (5.0)
    a caller's cache               marked by generate (from 5.17), by the routed class (before)
    Mamba's cache                  has layers (from 5.4); only cache_position says whether it is filled (before)
    where tokens go in the cache   read from the cache (from 5.4), passed as cache_position (before)
    CacheLayer.get_mask_sizes      takes the number of queries (from 5.4), their positions (before)
    a layer's capacity             get_max_length (from 5.13), get_max_cache_shape (before)
    sharded modules                have a forward of their own (from 5.18), hooks (before)
    attention functions            found by `get_interface` (from 5.1), by name (before)
    Cache.update                   more arguments: a dictionary (to 5.3), `kwargs` (from 5.24)
"""

from __future__ import annotations

from .arguments import (
    BARE,
    CACHE_NAMES,
    LOOP,
    PLACES,
    bare_class,
    cache_argument,
    cache_in,
    cache_name,
    cannot_step,
    keeps_last_logits,
    last_logits,
    logits,
    logits_at,
    output_cache_name,
    over,
    parameters,
    pop_cache,
    sequences,
    update_layer,
)
from .attention import (
    SUPPORTS,
    UNUSUAL,
    Attend,
    accepts_package,
    attention_function,
    attention_of,
    attentions_of,
    exchangeable_attention,
    register_attention,
    sdpa,
    supports,
    use_attention,
    with_attention,
)
from .caches import (
    appends,
    cache_over,
    counts_tokens,
    growing_cache,
    is_decoding,
    is_unfilled,
    keys_and_values,
    narrow_cache,
    replace_layers,
)
from .calls import OPTIONS, Sampling, marking, other_loops, processed, remembers, routable
from .models import (
    COMPILED,
    EAGER,
    ROTARY,
    SET_AT_WILL,
    causal_lm,
    causal_lms,
    configurations,
    conv1d,
    exchanges_experts,
    experts,
    forward_function,
    is_own_hook,
    keep_compiled,
    layer_configurations,
    uncompiled,
)
from .preparation import drops_cache, greedy_settings
from .shards import is_sharding, resharding, sharded, tensor_parallel
from .stops import SequenceEnd, stops, streamed

__all__ = [
    "BARE",
    "CACHE_NAMES",
    "COMPILED",
    "EAGER",
    "LOOP",
    "OPTIONS",
    "PLACES",
    "ROTARY",
    "SET_AT_WILL",
    "SUPPORTS",
    "UNUSUAL",
    "Attend",
    "Sampling",
    "SequenceEnd",
    "accepts_package",
    "appends",
    "attention_function",
    "attention_of",
    "attentions_of",
    "bare_class",
    "cache_argument",
    "cache_in",
    "cache_name",
    "cache_over",
    "cannot_step",
    "causal_lm",
    "causal_lms",
    "configurations",
    "conv1d",
    "counts_tokens",
    "drops_cache",
    "exchangeable_attention",
    "exchanges_experts",
    "experts",
    "forward_function",
    "greedy_settings",
    "growing_cache",
    "is_decoding",
    "is_own_hook",
    "is_sharding",
    "is_unfilled",
    "keep_compiled",
    "keeps_last_logits",
    "keys_and_values",
    "last_logits",
    "layer_configurations",
    "logits",
    "logits_at",
    "marking",
    "narrow_cache",
    "other_loops",
    "output_cache_name",
    "over",
    "parameters",
    "pop_cache",
    "processed",
    "register_attention",
    "remembers",
    "replace_layers",
    "resharding",
    "routable",
    "sdpa",
    "sequences",
    "sharded",
    "stops",
    "streamed",
    "supports",
    "tensor_parallel",
    "uncompiled",
    "update_layer",
    "use_attention",
    "with_attention",
]
