"""Answers in OpenAI's forms: whole, and as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .bodies import respond
from .detokenise import UNFINISHED
from .refusal import Refusal

if TYPE_CHECKING:
    from fastapi import Response

    from .answering import TextAnswers
    from .grammar import Grammar
    from .pieces import Chosen, Piece
    from .schema import ChatBody, CompletionBody
    from .tools import Call, ToolUse

DONE = b"data: [DONE]\n\n"


@dataclass
class AnswerSoFar:
    """What has come of one answer."""

    text: str = ""
    tokens: int = 0
    chosen: list[Chosen] = field(default_factory=list)
    reason: str | None = None

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens, self.reason = piece.tokens, piece.reason
        self.chosen += piece.chosen


class Reply(ABC):
    """The answers to one request.

    Args:
        answers: asks the model.
        body: the request.
        prompts: token ids; each gets `body.n` answers.
        rooms: most new tokens of an answer to each.
        model: the name that the model is served under.
        grammar: of the form that the answers keep to; None: any text.
    """

    prefix: str
    kind: str  # OpenAI's name of a whole answer
    part: str  # and of a part of a stream

    def __init__(
        self,
        answers: TextAnswers,
        body: CompletionBody | ChatBody,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        model: str,
        grammar: Grammar | None = None,
    ) -> None:
        self.answers = answers
        self.body = body
        self.prompts = prompts
        self.rooms = rooms
        self.model = model
        self.grammar = grammar
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.choices = [AnswerSoFar() for _ in range(len(prompts) * body.n)]

    @abstractmethod
    def whole(self, index: int, choice: AnswerSoFar) -> dict[str, Any]:
        """A finished choice."""

    @abstractmethod
    def delta(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        """Choices of a stream's parts for a piece."""

    def opening(self) -> Iterable[dict[str, Any]]:
        """Choices that a stream begins with."""
        return ()

    async def all(self) -> Response:
        """Wait for all answers, and respond with them."""
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                self.choices[index].take(piece)
        chosen = sum(len(choice.chosen) for choice in self.choices)
        return await respond(self._whole, chosen * (1 + (self.body.alternatives or 0)))

    def _whole(self) -> dict[str, Any]:
        choices = [self.whole(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._header(self.kind), "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events, the first of which waits for the first token.

        Raises:
            Refusal: before the first event, if the request is not served. Later, an event says so.
        """
        opened = False
        try:
            async with aclosing(self._pieces()) as pieces:
                async for index, piece in pieces:
                    if not opened:
                        opened = True
                        for choice in self.opening():
                            yield self._event([choice])
                    self.choices[index].take(piece)
                    for choice in self.delta(index, piece):
                        yield self._event([choice])
        except Refusal as refusal:
            if not opened:
                raise
            yield _encoded(refusal.body)
        except Exception as error:
            if not opened:
                raise
            yield _encoded(Refusal(500, f"the answer broke off: {type(error).__name__}").body)
            raise
        else:
            if self.body.reports_usage:
                yield self._event([], self.usage())
        yield DONE

    def usage(self) -> dict[str, int]:
        read, written = sum(map(len, self.prompts)), sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """The pieces of all answers as they come."""
        arrived: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

        async def pump(index: int) -> None:
            prompt, number = divmod(index, self.body.n)
            parts = self.answers.pieces(
                self.prompts[prompt],
                self.body,
                self.rooms[prompt],
                alternatives=self.body.alternatives,
                number=number,
                rank=index,
                grammar=self.grammar,
                answer_id=self.id,
            )
            try:
                async with aclosing(parts):
                    async for piece in parts:
                        arrived.put_nowait((index, piece))
            finally:
                arrived.put_nowait((index, None))

        tasks = [asyncio.create_task(pump(index)) for index in range(len(self.choices))]
        try:
            for _ in tasks:
                while True:
                    index, piece = await arrived.get()
                    if piece is None:
                        await tasks[index]  # raises what ended it
                        break
                    yield index, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _header(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        more = {} if usage is None else {"usage": usage}
        return _encoded({**self._header(self.part), "choices": choices, **more})


class Completion(Reply):
    """`/v1/completions`."""

    prefix, kind, part = "cmpl", "text_completion", "text_completion"

    def whole(self, index: int, choice: AnswerSoFar) -> dict[str, Any]:
        chances = self._chances(choice.chosen)
        return {"index": index, "text": choice.text, "logprobs": chances, "finish_reason": choice.reason}

    def delta(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        chances = self._chances(piece.chosen)
        yield {"index": index, "text": piece.text, "logprobs": chances, "finish_reason": piece.reason}

    def _chances(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if self.body.alternatives is None:
            return None
        return {
            "tokens": [self.answers.text_of(each.token) for each in chosen],
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": [{self.answers.text_of(c.token): c.logprob for c in each.alternatives} for each in chosen],
            "text_offset": [each.offset for each in chosen],
        }


class Chat(Reply):
    """`/v1/chat/completions`."""

    prefix, kind, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        answers: TextAnswers,
        body: ChatBody,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        model: str,
        grammar: Grammar | None = None,
        use: ToolUse | None = None,
    ) -> None:
        """`use` are the tools that the answers may call."""
        super().__init__(answers, body, prompts, rooms, model, grammar)
        self._readers = [use.reader() if use is not None else None for _ in self.choices]
        self._calls = [0 for _ in self.choices]  # calls that each has made

    def whole(self, index: int, choice: AnswerSoFar) -> dict[str, Any]:
        text, calls = self._read(index, choice.text, ended=True)
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text}
        if calls:
            message["tool_calls"] = [call.body() for call in calls]
        chances = self._chances(choice.chosen)
        return {
            "index": index,
            "message": message,
            "logprobs": chances,
            "finish_reason": self._reason(index, choice.reason),
        }

    def opening(self) -> Iterable[dict[str, Any]]:
        for index in range(len(self.choices)):
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> Iterable[dict[str, Any]]:
        before = self._calls[index]
        text, calls = self._read(index, piece.text, ended=piece.reason is not None)
        if text or piece.chosen:
            chances = self._chances(piece.chosen)
            yield {"index": index, "delta": {"content": text}, "logprobs": chances, "finish_reason": None}
        for number, call in enumerate(calls, before):
            made = {"tool_calls": [{"index": number, **call.body()}]}
            yield {"index": index, "delta": made, "logprobs": None, "finish_reason": None}
        if piece.reason:
            reason = self._reason(index, piece.reason)
            yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}

    def _read(self, index: int, text: str, ended: bool) -> tuple[str, list[Call]]:
        """What of a new text can be shown, and the calls that it completes."""
        if (reader := self._readers[index]) is None:
            return text, []
        shown, calls = reader.add(text)
        if ended:
            rest, last = reader.rest()
            shown, calls = shown + rest, [*calls, *last]
        self._calls[index] += len(calls)
        return shown, calls

    def _reason(self, index: int, reason: str | None) -> str | None:
        """A call that was cut off is no call, and its reason stays the length."""
        return "tool_calls" if reason == "stop" and self._calls[index] else reason

    def _chances(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if self.body.alternatives is None:
            return None
        return {
            "content": [
                {
                    **self._chance(each.token, each.logprob),
                    "top_logprobs": [self._chance(c.token, c.logprob) for c in each.alternatives],
                }
                for each in chosen
            ]
        }

    def _chance(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.answers.text_of(token)
        whole = UNFINISHED not in text  # else the token is a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _encoded(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
