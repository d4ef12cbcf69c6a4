"""One answer of the model: pieces of text as they come, then why it ended."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import CancelledRequestError, DeadlineError, QueueFullError, StateError
from . import logs
from .detokenise import AnswerText, Detokeniser, Stops, decoded, hidden_ids
from .grammar import Grammar, GrammarError
from .pieces import Chances, Piece, Pieces
from .refusal import NO_RETRY, Refusal, retry_after
from .schema import CompletionBody
from .timing import AnswerTimes
from .traces import AnswerSpan, Traces

if TYPE_CHECKING:
    from .metrics import Metrics
    from .sampling import SamplingDefaults
    from .schema import Generation

MOST_TEXTS = 65_536  # texts of single tokens that are kept; 100 bytes each
FINISHED = ("stop", "length")  # outcomes of an answer that came to its end


@dataclass(frozen=True)
class Failure:
    """What an error that ends an answer means.

    Args:
        outcome: of the answer, see `Answered`.
        status, code, param, headers: of the refusal.
        lead: comes before the error's message.
    """

    outcome: str
    status: int
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    lead: str = ""


FAILURES = {
    QueueFullError: Failure("rejected", 429, "queue_full"),
    DeadlineError: Failure("deadline", 408, "deadline", headers=NO_RETRY),
    GrammarError: Failure("form", 400, param="response_format"),
    StateError: Failure("error", 503, "unavailable"),  # no thread can be started, or the process ends
    CancelledRequestError: Failure("ending", 503, "ending", lead="the server is ending: "),
}


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
class UnderWay:
    """An answer under way.

    Args:
        times: of its parts.
        span: traces it.
        asked: the request to the model; None: not yet.
        outcome: that it has if it ends now.
    """

    times: AnswerTimes
    span: AnswerSpan
    asked: Any = None
    outcome: str = "abort"


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
        chances = None if alternatives is None else Chances(len(prompt), alternatives)
        witness = None if chances is None else chances.witness
        options = self.sampling.options(body, len(prompt), room, witness, grammar)
        seed = None if body.seed is None else (body.seed + number) % 2**63
        continued = prompt if isinstance(body, CompletionBody) else ()  # a chat's answer begins a text
        text = AnswerText(Detokeniser(self.tokenizer, self._hidden, continued), Stops(body.stop))
        made = Pieces(text, () if body.ignore_eos else self.sampling.eos, room, chances)
        with self._under_way(answer_id, len(prompt)) as answer:
            self._submit(answer, prompt, priority=body.priority - rank, seed=seed, **options)
            async with answer.asked:
                async for token in answer.asked:
                    self._came(answer)
                    if (piece := made.add(token)) is not None:
                        yield piece
                    if made.reason is not None:
                        break
                if made.reason is None:
                    yield made.rest()
            answer.outcome = str(made.reason)

    @contextmanager
    def _under_way(self, answer_id: str, prompt: int) -> Iterator[UnderWay]:
        """Enclose an answer, which is counted, traced and logged when it ends, however that is.

        Args:
            answer_id: of the response, for the log.
            prompt: number of tokens.

        Raises:
            Refusal: in place of an error of those in `FAILURES`.
        """
        request = logs.CURRENT.get()
        arrived_s = request.arrived_s if request is not None else time.monotonic()
        answer = UnderWay(AnswerTimes(arrived_s), self.traces.answer())
        self.running += 1
        try:
            yield answer
        except tuple(FAILURES) as error:
            failure = next(each for kind, each in FAILURES.items() if isinstance(error, kind))
            answer.outcome = failure.outcome
            raise self._refusal(failure, error) from error
        except Exception:
            answer.outcome = "error"
            raise
        finally:
            self.running -= 1
            self._asked.discard(answer.asked)
            answer.span.ended(answer.outcome, prompt, answer.times.tokens)
            self._ended(answer_id, answer.outcome, prompt, answer.times)

    def _submit(self, answer: UnderWay, prompt: Sequence[int], **options: Any) -> None:
        """Ask the model for an answer, unless too many wait."""
        if self.most_waiting is not None and (waiting := self._waiting()) >= self.most_waiting:
            raise QueueFullError(f"{waiting} requests wait, and no more may; ask again later")
        answer.asked = self.model.autotune.submit(list(prompt), deadline_s=self.deadline_s, **options)
        self._asked.add(answer.asked)

    def _came(self, answer: UnderWay) -> None:
        """Time and count a token."""
        times = answer.times
        if is_first := not times.tokens:
            answer.span.first_token()
            times.begun_s = answer.asked.terms.begun_s
        self.metrics.token(times.token(time.monotonic()), first=is_first)

    def _refusal(self, failure: Failure, error: Exception) -> Refusal:
        headers = failure.headers
        if isinstance(error, QueueFullError):
            self.metrics.rejections.inc()
            headers = retry_after(self._waiting(), self.metrics.whole.per_s())
        return Refusal(failure.status, f"{failure.lead}{error}", failure.param, failure.code, headers)

    def _waiting(self) -> int:
        waiting: int = self.model.autotune.waiting  # asked for every answer, in the event loop
        return waiting

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
