"""A body's sampling parameters as options of `generate`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..model import seam
from .refusal import Refusal

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .grammar import Grammar
    from .schema import Generation


MOST_DIGITS = 20  # of a token's number in a body; Python refuses to read thousands


class Witness:
    """Keeps the model's own distribution at each token, before anything changes it.

    Attributes:
        rows: length of the sequence before a token -> log-probabilities [V] of that token.
    """

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self.rows[input_ids.shape[1]] = scores[0].float().log_softmax(-1)
        return scores

    def take(self, length: int) -> torch.Tensor:
        """The log-probabilities [V] of the token after so many."""
        with self._lock:
            return self.rows.pop(length)


class Penalties:
    """OpenAI's presence and frequency penalties over the new tokens.

    Args:
        prompt: tokens of the prompt, which do not count.
    """

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt :], minlength=scores.shape[-1]).to(scores.dtype)
        return scores - self.frequency * counts - self.presence * (counts > 0)


class Bias:
    """Adds to the logits of some tokens."""

    def __init__(self, bias: dict[int, float]) -> None:
        self._tokens = torch.tensor(list(bias), dtype=torch.int64, device="cpu")
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32, device="cpu")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens, values = self._tokens.to(scores.device), self._values.to(scores.device, scores.dtype)
        return scores.index_add(-1, tokens, values[None])


class SamplingDefaults:
    """How a model's answers are drawn unless a request says otherwise: as its own generation config does.

    Args:
        defaults: the model's generation config.
        vocabulary: number of tokens.
        eos: tokens that end an answer.
    """

    def __init__(self, defaults: GenerationConfig, vocabulary: int, eos: frozenset[int]) -> None:
        self._defaults = defaults
        self._vocabulary = vocabulary
        self.eos = eos

    def options(
        self, body: Generation, prompt: int, room: int, witness: Witness | None, grammar: Grammar | None = None
    ) -> dict[str, Any]:
        """Options of `generate` that say everything, whatever the model's generation config says.

        Args:
            prompt: tokens of the prompt.
            room: most new tokens.
            witness: keeps the distributions, or None.
            grammar: of the answer's form, or None.

        Raises:
            Refusal: `logit_bias` names something that is not a token.
        """
        temperature = self._default(body.temperature, "temperature", 1.0)
        processors: list[Callable[..., torch.Tensor]] = []
        if body.presence_penalty or body.frequency_penalty:
            processors.append(Penalties(prompt, body.presence_penalty, body.frequency_penalty))
        if body.logit_bias:
            processors.append(Bias(self._tokens(body.logit_bias)))
        if grammar is not None:
            processors.append(grammar.constraint(prompt))  # last: no bias gets past it
        found: dict[str, Any] = {
            "max_new_tokens": room,
            "min_new_tokens": None,
            "min_length": 0,  # a number makes a processor
            "num_beams": 1,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "stop_strings": None,
            "do_sample": temperature > 0,
            "eos_token_id": sorted(self.eos) if self.eos and not body.ignore_eos else [self._vocabulary],  # or no token
            "pad_token_id": min(self.eos, default=0),
            **seam.processed(processors, self._default(body.repetition_penalty, "repetition_penalty", 1.0), witness),
        }
        if temperature > 0:
            top_k = self._default(body.top_k, "top_k", 0)
            found |= {
                "temperature": temperature,
                "top_p": self._default(body.top_p, "top_p", 1.0),
                "top_k": max(top_k, 0),
                "min_p": self._default(body.min_p, "min_p", 0.0) or None,
            }
        return found

    def _default(self, asked: Any, name: str, otherwise: Any) -> Any:
        if asked is not None:
            return asked
        own = getattr(self._defaults, name, None)
        return otherwise if own is None else own

    def _tokens(self, bias: dict[str, float]) -> dict[int, float]:
        for name in bias:
            if not name.isdecimal() or len(name) > MOST_DIGITS or int(name) >= self._vocabulary:
                named = repr(name[:MOST_DIGITS])
                raise Refusal(400, f"logit_bias names {named}; tokens are 0 to {self._vocabulary - 1}", "logit_bias")
        return {int(name): value for name, value in bias.items()}
