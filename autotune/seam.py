"""The seam to transformers: the only module that names what belongs to that library's insides.

Everything else speaks autotune's own terms: a `Sampling` call, its cache, positions and settings; a `CacheLayer`; the
attention a model uses. What differs between releases is found out by looking (signatures, fields) where that is enough
and stands in a table where it is not:

    the cache argument and field   cache (from 5.24), past_key_values (to 5.23), cache_params (Mamba, to 5.23)
    position_ids before the loop   prepared by generate (from 5.2), by the loop itself (before)
    CacheLayer.get_mask_sizes      takes the number of queries (from 5.4), their positions (before)
    a layer's capacity             get_max_length (from 5.13), get_max_cache_shape (before)
    attention functions            found by `get_interface` (from 5.1), by name (before)
    Cache.update                   more arguments: a dictionary (to 5.3), `kwargs` (from 5.24)
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of the argument and the output's field; newest first
LOOP = "_sample"  # the decoding loop of greedy search and sampling
OPTIONS = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer")  # of that loop
ARGUMENTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}  # that a plan understands
BARE = "_autotune_bare"  # attribute of a routed class that holds the class it routes
COMPILED = ("_compiled_call", "_last_compile_config")  # where generate keeps a model's compiled forward
ROTARY, EAGER = "apply_rotary_pos_emb", "eager_attention_forward"  # functions that all models' modules have
UNUSUAL = ("softcap", "s_aux", "position_bias", "cache")  # arguments of an attention function that only SDPA's knows
SUPPORTS = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}

_CACHE_NAME: dict[type, str | None] = {}  # model class -> the name that its forward has for its cache

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]  # an attention function; returns [B, Q, H, D], weights


# One call of generate's loop


@dataclass(frozen=True)
class Sampling:
    """One call of generate's greedy or sampling loop, as transformers prepared it.

    Args:
        model: the original, unrouted.
        input_ids: [B, P] int64.
        options: the loop's own keyword arguments, by the names in `OPTIONS`.
        model_kwargs: what generate would pass on to forward (attention_mask, position_ids, the cache, ...).
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    options: Mapping[str, Any]
    model_kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, input_ids: torch.Tensor, given: Mapping[str, Any]) -> Sampling:
        """The call with keyword arguments `given`, told apart."""
        options = {name: given[name] for name in OPTIONS if name in given}
        return cls(model, input_ids, options, {k: v for k, v in given.items() if k not in options})

    @property
    def settings(self) -> Any:
        """The generation configuration."""
        return self.options["generation_config"]

    @property
    def streamer(self) -> Any:
        return self.options.get("streamer")

    @property
    def processors(self) -> Any:
        """The list of logits processors."""
        return self.options["logits_processor"]

    @property
    def criteria(self) -> Any:
        """The list of stopping criteria."""
        return self.options["stopping_criteria"]

    @property
    def mask(self) -> torch.Tensor | None:
        """[B, P], 0 on padding; None where there is none."""
        mask: torch.Tensor | None = self.model_kwargs.get("attention_mask")
        return mask

    @property
    def positions(self) -> torch.Tensor:
        """[B, P] or [1, P] int64, the position of every token of the prompt."""
        prepared: torch.Tensor | None = self.model_kwargs.get("position_ids")
        if prepared is not None:
            return prepared
        if self.mask is None:
            return torch.arange(self.input_ids.shape[1], dtype=torch.int64, device=self.input_ids.device)[None]
        positions = self.mask.long().cumsum(-1) - 1  # as prepared from 5.2 on
        return positions.masked_fill(self.mask == 0, 0)

    @property
    def cache(self) -> Any:
        """The cache that generate prepared or was given, or None."""
        return cache_in(self.model_kwargs)

    def has_callers_cache(self) -> bool:
        """Whether the cache is one that the caller passed."""
        return bool(getattr(self.cache, "_is_user_defined", False))

    def prompt(self, cache: Any) -> dict[str, Any]:
        """Keyword arguments for a forward over the whole prompt that fills `cache`."""
        given = {k: v for k, v in self.model_kwargs.items() if k not in CACHE_NAMES}
        return {
            "input_ids": self.input_ids,
            **given,
            "position_ids": self.positions,
            **over(self.model, cache),
            "return_dict": True,
        }

    def unusual_argument(self) -> str | None:
        """Which argument for forward no plan understands, or None."""
        if unknown := sorted(k for k, v in self.model_kwargs.items() if k not in ARGUMENTS and v is not None):
            return f"argument {unknown[0]}"
        return "a cache of the caller's" if self.has_callers_cache() else None

    def unusual(self) -> str | None:
        """What is asked for that no plan can serve, or None."""
        settings = self.settings
        if reason := self.unusual_argument():
            return reason
        if not self.model_kwargs.get("use_cache", True):
            return "use_cache=False"
        if settings.cache_implementation is not None:
            return f"cache_implementation={settings.cache_implementation!r}"
        if self.options.get("synced_gpus") or settings.prefill_chunk_size is not None or settings.is_assistant:
            return "chunked, synchronised or assistant generation"
        return None

    def run_on(self, model: PreTrainedModel) -> Any:
        """Transformers' own loop on `model`, which must be unrouted or route its forward itself."""
        cls: Any = bare_class(model)
        return getattr(cls, LOOP)(model, self.input_ids, **self.options, **self.model_kwargs)

    def original(self) -> Any:
        return self.run_on(self.model)

    def with_streamer(self, streamer: Any) -> Sampling:
        return replace(self, options={**self.options, "streamer": streamer})

    def with_processor_before(self, processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Sampling:
        """The same call with one more logits processor, the first of all."""
        processors = type(self.processors)([processor, *self.processors])
        return replace(self, options={**self.options, "logits_processor": processors})

    def with_fresh_cache(self, model: PreTrainedModel) -> Sampling:
        """The same call for `model`, over a cache of its own, made as generate makes it."""
        given = {k: v for k, v in self.model_kwargs.items() if k not in CACHE_NAMES}
        if self.cache is not None:
            loose: Any = model
            loose._prepare_cache_for_generation(
                self.settings, given, None, self.input_ids.shape[0], self.settings.max_length
            )
        return replace(self, model=model, model_kwargs=given)

    def pads(self) -> torch.Tensor | None:
        """[] int64, what finished sequences are filled with; None where nothing ends a sequence early."""
        if not any(hasattr(criterion, "eos_token_id") for criterion in self.criteria):
            return None
        pads: torch.Tensor = self.settings._pad_token_tensor
        return pads.to(self.input_ids.device)

    def result(
        self, ids: torch.Tensor, scores: Sequence[torch.Tensor], logits: Sequence[torch.Tensor], cache: Any
    ) -> Any:
        """What the loop returns where a dictionary is asked for.

        Args:
            ids: [B, P + new].
            scores, logits: one tensor [B, V] a token; what was not asked for is not returned.
            cache: filled with all tokens but the last.
        """
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        result: dict[str, Any] = {
            "sequences": ids,
            "scores": tuple(scores) if self.settings.output_scores else None,
            "logits": tuple(logits) if self.settings.output_logits else None,
            output_cache_name(): cache,
        }
        return GenerateDecoderOnlyOutput(**result)


def sequences(result: Any) -> torch.Tensor:
    """Tokens [B, P + new] of what generate returned, a tensor or a dictionary."""
    ids: torch.Tensor = result if isinstance(result, torch.Tensor) else result.sequences
    return ids


def other_loops(cls: type) -> list[str]:
    """Names of the decoding loops of a model class that no plan serves (beam search, assisted decoding, ...)."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    return [name for name in sorted(set(GENERATION_MODES_MAPPING.values()) - {LOOP}) if hasattr(cls, name)]


def has_loop(model: Any) -> bool:
    """Whether a model is one that generates text token by token."""
    return bool(model.can_generate()) and hasattr(model, LOOP)


# What a model takes and gives


def bare_class(model: Any) -> type[PreTrainedModel]:
    """The class that a model had before its calls were routed."""
    cls: type[PreTrainedModel] = getattr(type(model), BARE, type(model))
    return cls


def parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments of a model's forward."""
    return frozenset(inspect.signature(bare_class(model).forward).parameters)


def cache_name(model: PreTrainedModel) -> str | None:
    """The name that a model's forward has for its cache, or None where it has none that is known."""
    cls = bare_class(model)
    if cls not in _CACHE_NAME:  # asked at every token, and while a step is compiled, where no signature can be read
        _CACHE_NAME[cls] = cache_argument(cls.forward)
    return _CACHE_NAME[cls]


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name that a function has for its cache, or None where it has none that is known."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None)


@functools.cache
def output_cache_name() -> str:
    """The name that generate's result has for the cache."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    known = {field.name for field in fields(GenerateDecoderOnlyOutput)}
    return next((name for name in CACHE_NAMES if name in known), CACHE_NAMES[0])


def over(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """Keyword arguments for a forward of `model` over `cache`, which it reads and fills."""
    return {cache_name(model) or output_cache_name(): cache, "use_cache": True}


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments or in its output, whatever its name; None: there is none."""
    return next((given[name] for name in CACHE_NAMES if name in given and given[name] is not None), None)


def logits(output: Any) -> torch.Tensor:
    """[B, S, V] of a forward's output."""
    found: torch.Tensor = output.logits
    return found


def cannot_step(model: PreTrainedModel) -> str | None:
    """Why a model cannot be driven token by token from outside generate's loop, or None."""
    missing = [] if cache_name(model) else ["cache that is known by name"]
    if missing := missing + sorted({"position_ids", "attention_mask"} - parameters(model)):
        return f"the model's forward takes no {', '.join(missing)}"
    return None


def keeps_last_logits(model: Any) -> bool:
    """Whether generate asks a model for the logits of the last position only."""
    return bool(model._supports_logits_to_keep())


def last_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Keyword arguments for a forward that computes logits for the last `count` positions, where it can."""
    return {"logits_to_keep": count} if keeps_last_logits(model) else {}


def uncompiled(twin: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without the compiled forward that belongs to the model it was copied from."""
    for leftover in COMPILED:
        twin.__dict__.pop(leftover, None)
    return twin


def experts(model: Any) -> str:
    """How a mixture of experts is computed; "" where the model or the release knows but one way."""
    known = getattr(model, "get_experts_implementation", None)
    return str(known()) if known is not None else ""


def conv1d() -> type[torch.nn.Module]:
    """The linear layer of GPT-2's family, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def causal_lms() -> Mapping[str, str]:
    """Model type -> name of its causal LM class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# Caches


class CacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a cache of ours, as attention and the masks see it. Subclasses give the methods below."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values [B, Hk, S, D]; returns all that attention is to read, [B, Hk, T, D]."""
        raise NotImplementedError

    def filled(self) -> Any:
        """Tokens held, an int or a tensor []."""
        raise NotImplementedError

    def visible(self, queries: int) -> int:
        """Tokens that attention reads when `queries` more come."""
        raise NotImplementedError

    def capacity(self) -> int:
        """Tokens that there is room for; -1: no limit."""
        return -1

    def lazy_initialization(self, *_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.store(key_states, value_states)

    def get_seq_length(self) -> Any:
        return self.filled()

    def get_mask_sizes(self, queries: Any) -> tuple[int, int]:
        return self.visible(queries if isinstance(queries, int) else int(queries.shape[0])), 0

    def get_max_length(self) -> int:
        return self.capacity()

    def get_max_cache_shape(self) -> int:
        return self.capacity()


def cache_over(layers: Iterable[CacheLayer]) -> Any:
    """A cache of these layers."""
    return Cache(layers=list(layers))


def growing_cache(config: PretrainedConfig | None = None, offloading: bool = False) -> Any:
    """A cache that grows with its tokens.

    Args:
        config: of the text model; its layers with a sliding window keep no more than that. None: all keep everything.
        offloading: whether all layers but the one in use lie in the host's memory.
    """
    return DynamicCache(config=config, offloading=offloading)


def narrow_cache(backend: str, config: PretrainedConfig, bits: int) -> Any:
    """Transformers' own quantised cache, by library."""
    from transformers import QuantizedCache

    return QuantizedCache(backend, config, nbits=bits)


def replace_layers(cache: Any, make: Callable[[], CacheLayer]) -> Any:
    """The same cache with another layer in place of each that keeps every token as it comes."""
    cache.layers = [make() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keys_and_values(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [B, Hk, T, D] of every layer of a filled cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def counts_tokens(cache: Any) -> bool:
    """Whether a cache has layers that keep keys and values by token; those of state-space models do not."""
    return any(hasattr(layer, "get_seq_length") for layer in cache.layers)


def holds_tokens(cache: Any) -> bool:
    """Whether a cache has seen any token."""
    if counts_tokens(cache):
        return int(cache.get_seq_length()) > 0
    return bool(cache.layers) and bool(cache.has_previous_state())


# Attention


def attention_of(model_or_config: Any) -> str:
    """Name of the attention implementation that a model or a configuration asks for."""
    config = getattr(model_or_config, "config", model_or_config)
    name: str = config._attn_implementation
    return name


def attentions_of(model: torch.nn.Module) -> set[str]:
    """Names of the implementations that the modules of a model will look up."""
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    return {attention_of(c) for c in configs if hasattr(c, "_attn_implementation")}


def use_attention(model: Any, name: str) -> None:
    """Make a model look up another implementation.

    Raises:
        ValueError, ImportError: it takes no such implementation.
    """
    model.set_attn_implementation(name)


def with_attention(config: Any, name: str) -> Any:
    """A copy of one module's configuration that asks for another implementation, unchecked."""
    other = copy.copy(config)
    other._attn_implementation_internal = name
    return other


def exchangeable_attention(model: Any) -> bool:
    """Whether a model looks its attention function up by name."""
    return bool(model._can_set_attn_implementation())


def supports(model: Any, kind: Literal["sdpa", "flash", "flex"]) -> bool:
    """Whether a model says that it works with a kind of attention."""
    return bool(getattr(model, SUPPORTS[kind], False))


def attention_function(name: str, eager: Attend) -> Attend:
    """The function registered under a name; `eager`, a model's own, for "eager"."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    find = getattr(ALL_ATTENTION_FUNCTIONS, "get_interface", None)
    if find is not None:
        found: Attend = find(name, eager)
        return found
    named: Attend = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    return named


def register_attention(name: str, function: Attend, masks: bool = True) -> None:
    """Make an attention function known under a name.

    Args:
        masks: whether masks are to be made for it, as they are for SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    if masks:
        AttentionMaskInterface.register(name, sdpa_mask)


def sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' own SDPA function: query [B, H, Q, D], key and value [B, Hk, T, D] -> [B, Q, H, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return out, None


def accepts_package(implementation: str) -> bool:
    """Whether transformers would use the installed flash-attn package of this name, and not look for a substitute."""
    from transformers import utils

    accepts = getattr(utils, f"is_flash_attn_{implementation.removeprefix('flash_attention_')}_available", None)
    return accepts is None or bool(accepts())


def forward_function(module: torch.nn.Module) -> Any:
    """The function that a module's class has written down as its forward, without what decorates it."""
    return inspect.unwrap(type(module).forward)


def update_layer(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call of `Cache.update` says beside keys and values: the layer, and what only some caches read.

    Left out are a dictionary of positions (to 5.3) and `kwargs` (from 5.24), which static and paged caches read.
    """
    return [*(arg for arg in args if not isinstance(arg, dict)), *sorted(set(kwargs) - {"kwargs", "cache_kwargs"})]


def pop_cache(given: dict[str, Any]) -> Any:
    """Take the cache out of the keyword arguments of an attention block's forward."""
    found = None
    for name in CACHE_NAMES:
        value = given.pop(name, None)
        found = value if found is None else found
    return found
