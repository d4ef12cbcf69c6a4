"""One call of generate's decoding loop, in autotune's own terms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .arguments import CACHE_NAMES, LOOP, bare_class, cache_in, output_cache_name, over
from .preparation import drops_cache
from .relays import relayed
from .scoring import scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .scoring import Score

OPTIONS = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer")  # LOOP's arguments
# arguments of generate's own that it hands to the loop as if they were forward's
LEFT_BY_GENERATE = frozenset({"tokenizer"})
# the loop's arguments that a plan understands
UNDERSTOOD = LEFT_BY_GENERATE.union({"attention_mask", "position_ids", "use_cache", "logits_to_keep"}, CACHE_NAMES)
REPLACED = LEFT_BY_GENERATE.union(CACHE_NAMES)  # those that a forward of autotune's own does not take over

REMEMBERING = {  # transformers' logits processors that keep state between tokens
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",  # it calls a function of the caller
}


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
        """Make a call from the loop's keyword arguments, separated into `options` and `model_kwargs`."""
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
    def longest(self) -> int:
        """Tokens of prompt and answer together at most. A caller's own length criterion replaces the settings'."""
        longest: int | None = getattr(self.criteria, "max_length", None)
        return self.settings.max_length if longest is None else longest

    @property
    def mask(self) -> torch.Tensor | None:
        """Attention mask [B, P], 0 on padding; None if there is none."""
        mask: torch.Tensor | None = self.model_kwargs.get("attention_mask")
        return mask

    @property
    def positions(self) -> torch.Tensor:
        """Position of every token of the prompt, [B, P] or [1, P] int64."""
        prepared: torch.Tensor | None = self.model_kwargs.get("position_ids")
        if prepared is not None:
            return prepared
        if self.mask is None:
            return torch.arange(self.input_ids.shape[1], dtype=torch.int64, device=self.input_ids.device)[None]
        return (self.mask.long().cumsum(-1) - 1).masked_fill(self.mask == 0, 1)

    @property
    def last_position(self) -> torch.Tensor:
        """The position before the first new token, [B, 1] int64.

        If the loop prepares the positions, it counts the tokens that the mask admits: right padding takes no position.
        """
        if self.model_kwargs.get("position_ids") is None and self.mask is not None:
            return self.mask.long().sum(-1, keepdim=True) - 1
        return self.positions[:, -1:].long().expand(len(self.input_ids), -1)

    @property
    def cache(self) -> Any:
        """The cache that generate prepared or was given; None if forward is to make one (5.0)."""
        return cache_in(self.model_kwargs)

    @property
    def is_draft(self) -> bool:
        """Whether an assistant makes it, to guess tokens of another call."""
        return bool(self.settings.is_assistant)

    def has_callers_cache(self) -> bool:
        """Whether the caller passed the cache."""
        return bool(getattr(self.cache, "_is_user_defined", False))

    def has_embeddings(self) -> bool:
        """Whether the caller passed the prompt's embeddings in place of its tokens."""
        return self.model_kwargs.get("inputs_embeds") is not None

    def prompt(self, cache: Any, part: slice = slice(None)) -> dict[str, Any]:
        """Keyword arguments for a forward over the prompt that fills `cache`.

        Args:
            part: tokens to compute; the cache holds those before them.
        """
        given = {k: v for k, v in self.model_kwargs.items() if k not in REPLACED}
        if self.mask is not None:
            given["attention_mask"] = self.mask[..., : part.stop]
        return {
            "input_ids": self.input_ids[..., part],
            **given,
            "position_ids": self.positions[..., part],
            **over(self.model, cache),
            "return_dict": True,
        }

    def unusual_argument(self) -> str | None:
        """The argument for forward that no plan understands, in words, or None."""
        if unknown := sorted(k for k, v in self.model_kwargs.items() if k not in UNDERSTOOD and v is not None):
            return f"argument {unknown[0]}"
        positions, width = self.model_kwargs.get("position_ids"), self.input_ids.shape[1]
        if any(each is not None and each.shape[-1:] != (width,) for each in (self.mask, positions)):
            return "a mask or positions of another width than the prompt's"  # generate reads the last ones
        if positions is not None and not hasattr(self.model, "_prepare_position_ids_for_generation"):
            return "argument position_ids"  # to 5.1 the loop does not continue the caller's positions
        if positions is not None and positions.dim() != 2:  # of time, height and width, as for images
            return "positions of several dimensions"
        return "a cache of the caller's" if self.has_callers_cache() else None

    def unusual(self) -> str | None:
        """What the call asks for that no plan can serve, or None."""
        settings = self.settings
        if reason := self.unusual_argument():
            return reason
        if not self.model_kwargs.get("use_cache", True):
            return "use_cache=False"
        if settings.cache_implementation is not None:
            return f"cache_implementation={settings.cache_implementation!r}"
        if self.options.get("synced_gpus") or settings.prefill_chunk_size is not None or self.is_draft:
            return "chunked, synchronised or assistant generation"
        return None

    def pads_left(self) -> bool:
        """Whether every prompt's padding, if it has any, is on its left."""
        return self.mask is None or bool((self.mask[:, 1:] >= self.mask[:, :-1]).all())

    def starts_over(self) -> bool:
        """Whether generate's loop may drop the cache between two tokens and compute all earlier tokens again."""
        prompt, last = self.input_ids.shape[1], self.longest - 1  # the last token is never fed back
        return last > prompt and drops_cache(self.model, prompt, last)

    def run_on(self, model: PreTrainedModel) -> Any:
        """Run transformers' own loop on `model`, which must be unrouted or route its forward itself."""
        cls: Any = bare_class(model)
        return getattr(cls, LOOP)(model, self.input_ids, **self.options, **self.model_kwargs)

    def original(self) -> Any:
        return self.run_on(self.model)

    def portable(self) -> Sampling:
        """The same call for another process, which has a model of its own and shows nobody the tokens."""
        return replace(self.with_streamer(None), model=None)  # type: ignore[arg-type]

    def with_streamer(self, streamer: Any) -> Sampling:
        return replace(self, options={**self.options, "streamer": streamer})

    def scoring(self) -> Score | None:
        """What makes scores [B, V] of ids [B, T] and logits [B, V]; None if nothing sees or changes them."""
        return scoring(self.processors, self.input_ids.shape[1])

    def through(
        self,
        processors: Callable[..., Any],
        criteria: Callable[..., Any] | None = None,
        *,
        is_transparent: bool = False,
    ) -> Sampling:
        """The same call, whose logits processors and stopping criteria are called through the given functions.

        Args:
            processors: called with the list of processors, tokens [B, T] and scores [B, V]; returns scores [B, V].
            criteria: the same for the list of stopping criteria; returns [B] bool. None: they are called directly.
            is_transparent: whether both only observe, so that they may be left out. Who leaves out the criteria puts
                an object that knows the tokens into their list's `told` (`stops`).
        """
        options = {**self.options, "logits_processor": relayed(self.processors, processors, is_transparent)}
        if criteria is not None:
            options["stopping_criteria"] = relayed(self.criteria, criteria, is_transparent)
        return replace(self, options=options)

    def with_processor_before(self, processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Sampling:
        """The same call with one more logits processor, which runs before all others."""
        return self.through(lambda others, ids, scores: others(ids, processor(ids, scores)))

    def seeded(self, seed: int) -> Sampling:
        """The same call, whose tokens are drawn by `seed` and the position alone, whatever else draws numbers."""

        def choose(processors: Callable[..., torch.Tensor], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = processors(ids, scores)
            source = torch.Generator(scores.device).manual_seed((1_000_003 * seed + ids.shape[1]) % 2**63)
            odds = torch.nn.functional.softmax(scores, dim=-1)
            token = torch.multinomial(odds, num_samples=1, generator=source)
            return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

        return self.through(choose) if self.settings.do_sample else self

    def with_fresh_cache(self, model: PreTrainedModel) -> Sampling:
        """The same call for `model` with a new cache, made as generate makes it."""
        given = {k: v for k, v in self.model_kwargs.items() if k not in CACHE_NAMES}
        if self.cache is not None:
            loose: Any = model
            loose._prepare_cache_for_generation(
                self.settings, given, None, self.input_ids.shape[0], self.settings.max_length
            )
        return replace(self, model=model, model_kwargs=given)

    def pads(self) -> torch.Tensor | None:
        """The token that fills finished sequences, [] int64; None if nothing ends a sequence early."""
        if not any(hasattr(criterion, "eos_token_id") for criterion in self.criteria):
            return None
        pads: torch.Tensor = self.settings._pad_token_tensor
        return pads.to(self.input_ids.device)

    def result(
        self, ids: torch.Tensor, scores: Sequence[torch.Tensor], logits: Sequence[torch.Tensor], cache: Any
    ) -> Any:
        """Build what the loop returns when a dictionary is requested.

        Args:
            ids: [B, P + new].
            scores, logits: one tensor [B, V] per token; returned only if the settings request them.
            cache: filled with all tokens except the last.
        """
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        result: dict[str, Any] = {
            "sequences": ids,
            "scores": tuple(scores) if self.settings.output_scores else None,
            "logits": tuple(logits) if self.settings.output_logits else None,
            output_cache_name(): cache,
        }
        return GenerateDecoderOnlyOutput(**result)


def processed(
    processors: Sequence[Callable[..., torch.Tensor]],
    repetition_penalty: float = 1.0,
    watching: Callable[..., torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Arguments of `generate` with logits processors of one's own.

    Args:
        processors: each is called with ids [B, T] and logits [B, V], and returns logits [B, V].
        repetition_penalty: applied before them.
        watching: called like them, with the model's own logits.
    """
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    chain: list[Any] = [] if watching is None else [watching]
    if repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    return {"logits_processor": LogitsProcessorList([*chain, *processors]), "repetition_penalty": 1.0}


def remembers(call: Sampling) -> bool:
    """Whether a processor or criterion of a call may keep state between tokens."""
    return any(
        not type(each).__module__.startswith("transformers.generation.") or type(each).__name__ in REMEMBERING
        for each in (*call.processors, *call.criteria)
    )


def marking(cls: type) -> dict[str, Callable[..., Any]]:
    """Methods by name for a routed class. They mark a cache that was passed to generate as the caller's.

    Releases to 5.16 do not mark it. Without the mark it looks like a cache that generate prepared.
    """
    name = "_prepare_cache_for_generation"
    if not hasattr(cls, name):
        return {}

    @functools.wraps(getattr(cls, name))
    def marked(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(model_kwargs)
        if hasattr(cache, "__dict__"):
            cache._is_user_defined = True
        return getattr(cls, name)(self, generation_config, model_kwargs, *args, **kwargs)

    return {name: marked}


def other_loops(cls: type) -> list[str]:
    """Names of the decoding loops of a model class that no plan serves (beam search, assisted decoding, ...)."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    return [name for name in sorted(set(GENERATION_MODES_MAPPING.values()) - {LOOP}) if hasattr(cls, name)]


def routable(cls: type) -> bool:
    """Whether a model class has the loop that is routed."""
    return hasattr(cls, LOOP)
