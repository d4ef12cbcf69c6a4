"""One answer of the model: pieces of text as they come, then why it ended."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import CancelledRequestError, DeadlineError, QueueFullError, StateError
from . import logs
from .detokenise import Detokeniser, Stops, decoded, hidden_ids
from .grammar import Grammar, GrammarError
from .refusal import NO_RETRY, Refusal, retry_after
from .sampling import Witness
from .schema import CompletionBody
from .timing import AnswerTimes
from .traces import Traces

if TYPE_CHECKING:
    from .metrics import Metrics
    from .sampling import SamplingDefaults
    from .schema import Generation

MOST_TEXTS = 65_536  # texts of single tokens that are kept; 100 bytes each
LEAST = -9999.0  # stands for the logarithm of 0, as in vLLM
Reason = Literal["stop", "length"]
FINISHED = ("stop", "length")  # outcomes of an answer that came to its end


@dataclass(frozen=True)
class TokenChance:
    """A token and the logarithm of its probability."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Chosen:
    """A token of the answer, with the alternatives that were asked for, likeliest first.

    Args:
        offset: where its text begins in the answer's, in characters.
    """

    token: int
    logprob: float
    alternatives: tuple[TokenChance, ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """A part of the answer.

    Args:
        text: what can be shown; it may be empty.
        tokens: number of the answer's tokens so far.
        chosen: tokens since the piece before, where log-probabilities are asked for.
        reason: why the answer ended with this piece, or None.
    """

    text: str
    tokens: int
    chosen: tuple[Chosen, ...] = ()
    reason: Reason | None = None


@dataclass(frozen=True)
class Answered:
    """How one answer went.

    Args:
        began_s: when its request arrived, monotonic seconds.
        outcome: "stop", "length", "abort" (its client went), "rejected" (too many waited), "deadline", "form" (its
            grammar became too complex), "ending" (the server ended) or "error".
        ttft_s: seconds to the first token; None without one.
        tpot_s: seconds per token after the first; None with fewer than two.
    """

    began_s: float
    outcome: str
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass
class TextAnswers:
    """Asks one wrapped model.

    Args:
        model: wrapped by autotune.
        tokenizer: the model's.
        sampling: how answers are drawn.
        metrics: counts what happens.
        deadline_s: seconds after which an answer is given up; None: never.
        most_waiting: requests that may wait; None: as many as the model admits.
        traces: makes spans of answers.
        tell: called with each answer that ended, in the event loop.
    """

    model: Any
    tokenizer: Any
    sampling: SamplingDefaults
    metrics: Metrics
    deadline_s: float | None = None
    most_waiting: int | None = None
    traces: Traces = field(default_factory=Traces)
    tell: Callable[[Answered], None] = lambda answered: None
    text_of: Callable[[int], str] = field(init=False)  # a single token's text
    _hidden: frozenset[int] = field(init=False)  # tokens that are no text
    _anchor: list[int] = field(init=False)  # a token with a text, and that text
    _begin: str = field(init=False)
    running: int = field(default=0, init=False)  # answers under way
    finished: int = field(default=0, init=False)  # answers that came to an end
    _asked: set[Any] = field(default_factory=set, init=False)  # requests to the model under way

    def __post_init__(self) -> None:
        # The tokenizer takes 10 us for a token, and log-probabilities are asked of the same ones again and again.
        self.text_of = lru_cache(MOST_TEXTS)(self._text_of)
        self._hidden = hidden_ids(self.tokenizer)
        self._anchor = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        self._begin = decoded(self.tokenizer, self._anchor)

    def _text_of(self, token: int) -> str:
        """A single token's text, as it is behind another one: some tokenizers write no space at a text's beginning."""
        behind = decoded(self.tokenizer, [*self._anchor, token])
        return behind[len(self._begin) :] if behind.startswith(self._begin) else decoded(self.tokenizer, [token])

    async def pieces(
        self,
        prompt: Sequence[int],
        body: Generation,
        room: int,
        *,
        alternatives: int | None,
        number: int = 0,
        rank: int = 0,
        grammar: Grammar | None = None,
        answer_id: str = "",
    ) -> AsyncGenerator[Piece]:
        """The pieces of one answer; the last one has a reason. Closing the iterator frees the model's row.

        Args:
            prompt: token ids.
            body: what was asked.
            room: most new tokens.
            alternatives: at each token, or None for no log-probabilities.
            number: of the answer among those to one prompt; each has a seed of its own.
            rank: answers of the same request before this one. Each puts it a step of priority behind, so that a request
                of many answers lets others begin.
            grammar: of the form that the answer keeps to; None: any text.
            answer_id: of the response, for the log.

        Raises:
            Refusal: the queue is full, the deadline passed, or the form became too complex.
        """
        witness = None if alternatives is None else Witness()
        options = self.sampling.options(body, len(prompt), room, witness, grammar)
        seed = None if body.seed is None else (body.seed + number) % 2**63
        continued = prompt if isinstance(body, CompletionBody) else ()  # a chat's answer begins a text
        text, stops = Detokeniser(self.tokenizer, self._hidden, continued), Stops(body.stop)
        said = 0  # characters
        request = logs.CURRENT.get()
        times = AnswerTimes(request.arrived_s if request is not None else time.monotonic())
        chosen, reason = list[Chosen](), cast("Reason | None", None)
        outcome = "abort"  # unless it comes to an end
        self.running, asked = self.running + 1, cast("Any", None)
        span = self.traces.answer()
        try:
            self._admit()
            asked = self.model.autotune.submit(
                list(prompt), priority=body.priority - rank, deadline_s=self.deadline_s, seed=seed, **options
            )
            self._asked.add(asked)
            async with asked:
                async for token in asked:
                    if is_first := not times.tokens:
                        span.first_token()
                        times.begun_s = asked.terms.begun_s
                    self.metrics.token(times.token(time.monotonic()), first=is_first)
                    ended = token in self.sampling.eos and not body.ignore_eos
                    if witness is not None:
                        chosen.append(_chosen(witness, len(prompt) + times.tokens - 1, token, alternatives or 0, said))
                    piece = "" if ended else text.add(token)
                    said += len(piece)
                    shown = stops.add(piece)
                    reason = "stop" if ended or stops.found else "length" if times.tokens == room else None
                    if reason and not stops.found:
                        shown += stops.add(text.rest())
                        shown += stops.rest()
                    if shown or reason or chosen:
                        yield Piece(shown, times.tokens, tuple(chosen), reason)
                        chosen.clear()
                    if reason:
                        break
                if reason is None:  # generate stopped by itself, as a model's own criteria may make it
                    reason = "stop"
                    yield Piece(stops.add(text.rest()) + stops.rest(), times.tokens, (), reason)
        except QueueFullError as error:
            self.metrics.rejections.inc()
            outcome = "rejected"
            headers = retry_after(self._waiting(), self.metrics.whole.per_s())
            raise Refusal(429, str(error), code="queue_full", headers=headers) from error
        except DeadlineError as error:
            outcome = "deadline"
            raise Refusal(408, str(error), code="deadline", headers=NO_RETRY) from error
        except GrammarError as error:
            outcome = "form"
            raise Refusal(400, str(error), "response_format") from error
        except StateError as error:  # no thread can be started, or the process ends
            outcome = "error"
            raise Refusal(503, str(error), code="unavailable") from error
        except CancelledRequestError as error:
            outcome = "ending"
            raise Refusal(503, f"the server is ending: {error}", code="ending") from error
        except Exception:
            outcome = "error"
            raise
        else:
            outcome = reason
        finally:
            self.running -= 1
            self._asked.discard(asked)
            span.ended(outcome, len(prompt), times.tokens)
            self._ended(answer_id, outcome, len(prompt), times)

    def _waiting(self) -> int:
        waiting: int = self.model.autotune.waiting  # asked for every answer, in the event loop
        return waiting

    def _admit(self) -> None:
        if self.most_waiting is not None and (waiting := self._waiting()) >= self.most_waiting:
            raise QueueFullError(f"{waiting} requests wait, and no more may; ask again later")

    def cut(self) -> None:
        """End all answers under way. Their clients are told that the server is ending."""
        for asked in self._asked:
            asked.cancel()

    def _ended(self, answer_id: str, outcome: str, prompt: int, times: AnswerTimes) -> None:
        """Count and log an answer that ended."""
        if outcome in FINISHED:
            self.finished += 1
            self.metrics.finished(outcome, prompt, times)
        else:
            self.metrics.unfinished(outcome)
        self.tell(Answered(times.arrived_s, outcome, times.ttft_s, times.tpot_s))
        logs.event(
            "answer",
            response=answer_id,
            prompt_tokens=prompt,
            completion_tokens=times.tokens,
            ttft_s=times.ttft_s and round(times.ttft_s, 4),
            finish_reason=outcome,
            seconds=round(time.monotonic() - times.arrived_s, 4),
        )


def _chosen(witness: Witness, length: int, token: int, alternatives: int, offset: int) -> Chosen:
    row = witness.take(length)
    best = row.topk(min(alternatives, len(row))) if alternatives else None
    others = () if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    chances = tuple(TokenChance(t, _finite(chance)) for t, chance in others)
    return Chosen(token, _finite(float(row[token])), chances, offset)


def _finite(logprob: float) -> float:
    """A logarithm that JSON can hold, also of a probability of 0."""
    return max(logprob, LEAST)
