"""Kinds of calls of generate. Each is a function of one side's model and of the call's sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from tests.fuzz import models
from tests.fuzz.seen import LOG


class Call(NamedTuple):
    """One call.

    Args:
        kind: one of KINDS.
        rows, length, new: sequences, tokens of their prompts, and new tokens at most.
        seed: of the prompts, and of the generator.
    """

    kind: str
    rows: int = 1
    length: int = 8
    new: int = 5
    seed: int = 0

    @property
    def ids(self) -> torch.Tensor:
        return models.prompts(self.rows, self.length, self.seed)


Kind = Callable[[Any, Call], Any]
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def generate(model: Any, call: Call, **options: Any) -> Any:
    given = {"max_new_tokens": call.new, "do_sample": False, "pad_token_id": 0, **options}
    if not {"input_ids", "inputs_embeds"} & set(given):
        given["input_ids"] = call.ids
    return model.generate(**given)


def plain(**options: Any) -> Kind:
    return lambda model, call: generate(model, call, **options)


class Streamer:
    """Notes what it is shown; at token number `at` it does something of its own."""

    def __init__(self, at: int = -1, act: Callable[[], Any] = lambda: None) -> None:
        self.left = at
        self.act = act

    def put(self, value: torch.Tensor) -> None:
        LOG.append(("shown", value.tolist()))
        if self.left == 0:
            self.act()
        self.left -= 1

    def end(self) -> None:
        LOG.append("end")


class Processor(LogitsProcessor):
    """Notes what it is asked, forbids a token that depends on how often that was, and may raise."""

    def __init__(self, at: int = -1) -> None:
        self.asked = 0
        self.at = at

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        LOG.append(("processor", ids.tolist(), list(scores.shape), str(scores.dtype)))
        if self.asked == self.at:
            raise LookupError("a processor of the caller's")
        self.asked += 1
        scores = scores.clone()
        scores[:, self.asked % scores.shape[1]] = -torch.inf
        return scores


class Criterion(StoppingCriteria):
    """Notes what it is asked, and ends everything at some time, or raises."""

    def __init__(self, last: int, error: Exception | None = None) -> None:
        self.asked = 0
        self.last = last
        self.error = error

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        LOG.append(("criterion", ids.tolist(), scores is None))
        self.asked += 1
        if self.error is not None and self.asked == self.last:
            raise self.error
        return torch.full((ids.shape[0],), self.asked >= self.last, dtype=torch.bool, device=ids.device)


class Interrupted(BaseException):
    """Not an Exception, as KeyboardInterrupt is none."""


def _raise(error: BaseException) -> None:
    raise error


def interrupted(model: Any, call: Call) -> Any:
    try:
        return generate(model, call, streamer=Streamer(2, lambda: _raise(Interrupted())))
    except Interrupted:
        return "interrupted"


def within(model: Any, call: Call) -> Any:
    """A call in the midst of a call."""
    inner: list[Any] = []
    streamer = Streamer(1, lambda: inner.append(generate(model, call._replace(length=5, rows=2, new=3))))
    return generate(model, call, streamer=streamer), inner


def continued(model: Any, call: Call) -> Any:
    """The cache that a first call returned is handed to a second one."""
    first = generate(model, call, return_dict_in_generate=True)
    cache = getattr(first, "past_key_values", None)
    cache = getattr(first, "cache", None) if cache is None else cache
    ids = torch.cat([first.sequences, first.sequences[:, :2]], dim=1)
    return first.sequences, generate(model, call, input_ids=ids, past_key_values=cache, return_dict_in_generate=True)


def own_cache(model: Any, call: Call) -> Any:
    cache = DynamicCache(config=model.config)
    return generate(model, call, past_key_values=cache), cache.get_seq_length()


def embedded(model: Any, call: Call) -> Any:
    return generate(model, call, inputs_embeds=model.get_input_embeddings()(call.ids))


def assisted(model: Any, call: Call) -> Any:
    return generate(model, call, assistant_model=models.build("llama", seed=call.seed % 2))


def copied(model: Any, call: Call) -> Any:
    return generate(copy.deepcopy(model), call)


def configured(model: Any, call: Call) -> Any:
    """Defaults of the model's own configuration, set for a call."""
    was = model.generation_config
    model.generation_config = copy.deepcopy(was)
    model.generation_config.update(repetition_penalty=1.4, no_repeat_ngram_size=2, num_return_sequences=2, num_beams=2)
    try:
        return generate(model, call)
    finally:
        model.generation_config = was


def padded(side: str) -> Kind:
    return lambda model, call: generate(model, call, **models.padded(call.rows, call.length, call.seed, side))


KINDS: dict[str, Kind] = {
    "greedy": plain(),
    "long": lambda model, call: generate(model, call, max_new_tokens=call.new + 12),
    "sampled": plain(do_sample=True),
    "sampled top": plain(do_sample=True, top_k=10, top_p=0.9, temperature=1.5),
    "sampled returns": plain(do_sample=True, num_return_sequences=2),
    "sampled dict": plain(do_sample=True, **DICT),
    "beams": plain(num_beams=3, num_return_sequences=2, **DICT),
    "dict": plain(**DICT),
    "hidden": plain(output_hidden_states=True, return_dict_in_generate=True),
    "attentions": plain(output_attentions=True, return_dict_in_generate=True),
    "streamed": lambda model, call: generate(model, call._replace(rows=1), streamer=Streamer()),
    "streamed sampled": lambda model, call: generate(
        model, call._replace(rows=1), streamer=Streamer(), do_sample=True, top_k=8
    ),
    "processor": lambda model, call: generate(model, call, logits_processor=[Processor()]),
    "processor dict": lambda model, call: generate(model, call, logits_processor=[Processor()], **DICT),
    "processor raises": lambda model, call: generate(model, call, logits_processor=[Processor(at=2)]),
    "criterion": lambda model, call: generate(model, call, stopping_criteria=[Criterion(3)]),
    "criterion raises": lambda model, call: generate(
        model, call, stopping_criteria=[Criterion(2, RuntimeError("a criterion of the caller's"))]
    ),
    "streamer raises": lambda model, call: generate(
        model, call._replace(rows=1), streamer=Streamer(2, lambda: _raise(OSError("the client is gone")))
    ),
    "interrupted": lambda model, call: interrupted(model, call._replace(rows=1)),
    "within": lambda model, call: within(model, call._replace(rows=1)),
    "stops": plain(eos_token_id=list(range(2, 20))),
    "penalty": plain(repetition_penalty=1.5, no_repeat_ngram_size=3, bad_words_ids=[[9], [10, 11]]),
    "minimum": plain(min_new_tokens=4, eos_token_id=list(range(2, 30))),
    "guidance": plain(guidance_scale=1.5),
    "padded": padded("left"),
    "padded right": padded("right"),
    "padded sampled": lambda model, call: generate(
        model, call, do_sample=True, **models.padded(call.rows, call.length, call.seed)
    ),
    "continued": continued,
    "own cache": own_cache,
    "static": plain(cache_implementation="static"),
    "no cache": plain(use_cache=False),
    "embedded": embedded,
    "lookup": lambda model, call: generate(model, call._replace(rows=1), prompt_lookup_num_tokens=3),
    "assisted": lambda model, call: assisted(model, call._replace(rows=1)),
    "chunked": plain(prefill_chunk_size=3),
    "configured": configured,
    "copied": copied,
    "unknown argument": plain(colour="red"),
    "outside": lambda model, call: generate(model, call, input_ids=call.ids + models.VOCABULARY),
    "floats": lambda model, call: generate(model, call, input_ids=call.ids.float()),
    "empty": lambda model, call: generate(model, call, input_ids=call.ids[:, :0]),
    "mask of another width": lambda model, call: generate(model, call, attention_mask=torch.ones(call.rows, 2).long()),
    "none new": plain(max_new_tokens=0),
}
PLAIN = ("greedy", "sampled", "streamed", "dict", "stops", "processor")  # calls that every plan here serves
SINGLE = ("streamed", "streamed sampled", "streamer raises", "interrupted", "within")  # of one sequence
