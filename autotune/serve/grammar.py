"""Answers that follow a form: JSON by a schema, a regular expression, or a grammar.

llguidance (extra `grammar`) says which tokens may come next. A form is compiled before its request is admitted, within
limits, so that one that is wrong or too complex is refused with the reason, and none can hold up other requests.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import AutotuneError
from .refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Collection

    from llguidance._lib import JsonCompileOptions

    from .forms import Form

MOST_CHARACTERS = 65_536  # of a form, as JSON
KEPT = 32  # compiled forms that are kept
# What one token may cost at most, about 7 ms (llguidance says: 14k units of fuel or 20k items a ms), and a form, about
# 40 MB (1 to 2 kB a state).
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_grammar_size": 100_000,
    "max_lexer_states": 20_000,
}
SPACED: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # as json.dumps; none without end


class GrammarError(AutotuneError):
    """A form by which an answer cannot go on."""


class Grammar:
    """A compiled form, for any number of answers.

    Args:
        matcher: llguidance's, at the beginning.
        vocabulary: number of tokens.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def constraint(self, prompt: int) -> Constraint:
        """What keeps one answer to the form; `prompt` is the number of tokens before it."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary, prompt)


class Constraint:
    """A logits processor that allows only tokens that the form can go on with, and the end once it is complete."""

    def __init__(self, matcher: Any, vocabulary: int, prompt: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._length = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fresh = input_ids[0, self._length :].tolist()
        self._length = input_ids.shape[1]
        if fresh:
            self._matcher.consume_tokens(fresh)
        if self._matcher.is_error():  # a vocabulary without a token for a byte that must come next
            raise GrammarError(
                "the answer cannot go on by its form: llguidance refused a token that it had allowed, as it does where "
                "the model's vocabulary lacks a byte that the form needs; ask for a form of fewer characters, such as "
                f"[a-z] instead of \\w: {_first(self._matcher.get_error())}"
            )
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the answer's form is too complex to go on: {_first(self._matcher.get_error())}")
        allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(bool)
        return scores.masked_fill(torch.from_numpy(~allowed).to(scores.device), -torch.inf)


class Grammars:
    """Compiles forms for one model.

    Args:
        tokenizer: the model's.
        vocabulary: number of tokens that the model knows.
        eos: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos = sorted(eos)
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(KEPT)(self._compile)

    def of(self, form: Form | None, ignores_end: bool, param: str) -> Grammar | None:
        """The grammar of a form; None if any text will do. It takes milliseconds, the first one a second.

        Args:
            ignores_end: whether the request wants to go on after the model's end.
            param: the field of the body that asks for the form.

        Raises:
            Refusal: the form is wrong or too complex, or this server cannot hold to it.
        """
        if form is None or form.type == "text":
            return None
        if importlib.util.find_spec("llguidance") is None:
            raise Refusal(400, f"{param} needs llguidance: install autotune-inference[grammar]", param, "not_installed")
        if not self._eos:
            raise Refusal(400, "this model has no token that ends an answer, so no form can be complete", param)
        if ignores_end:
            raise Refusal(
                400, f"ignore_eos and {param} exclude each other: a form ends by the model's end", "ignore_eos"
            )
        return self._compiled(form.type, form.definition, param)

    @functools.cached_property
    def _vocabulary_tree(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._eos)

    def _compile(self, kind: str, definition: str, param: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        if len(definition) > MOST_CHARACTERS:
            raise Refusal(400, f"{param} has {len(definition)} characters; the most are {MOST_CHARACTERS}", param)
        with self._lock:
            try:
                tree = self._vocabulary_tree
            except Exception as error:  # a tokenizer that llguidance cannot read
                raise Refusal(400, f"no form for this model's tokenizer: {_first(str(error))}", param) from error
        try:
            made = {
                "json_object": lambda: LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=SPACED),
                "json_schema": lambda: LLMatcher.grammar_from_json_schema(definition, overrides=SPACED),
                "regex": lambda: LLMatcher.grammar_from_regex(definition),
                "grammar": lambda: LLMatcher.grammar_from_lark(definition),
            }[kind]()
        except ValueError as error:
            raise Refusal(400, f"{param}: {_first(str(error))}", param) from error
        matcher = LLMatcher(tree, made, log_level=0, limits=LLParserLimits(**LIMITS, verbose_errors=False))
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask compiles the beginning
        if matcher.is_error():
            raise Refusal(400, f"{param} is not a form to write by: {_first(matcher.get_error())}", param)
        return Grammar(matcher.deep_copy(), self._vocabulary)


def _first(message: str) -> str:
    """The first line of a message, short."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "no reason was given")[:300]
