"""A server whose model decodes the sequences of all clients together, its turns counted out, and clients of it.

Nothing here waits for time to pass: a test says how many turns the engine takes, and looks what its clients got.
"""

from __future__ import annotations

import http.client
import json
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import httpx
import pytest

from autotune.live.watch.paces import Paces
from autotune.runtime import kernels
from autotune.runtime.batching.engine import Engine
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.step_program import StepProgram
from tests.models import tiny, token_prompts
from tests.serve.servers import Running, running, until

ROWS = 4
SLOTS = 2304  # tokens of a sequence: a prompt of 2,000 and its answer
TOGETHER = (StepProgram("decode", slots=SLOTS), ContinuousBatching("decode", rows=ROWS))
WAIT_S = 60.0
PROMPTS = token_prompts(9, length=9)
needs_kernels = pytest.mark.skipif(kernels.available() is not None, reason=str(kernels.available()))


@contextmanager
def together(**options: Any) -> Iterator[Running]:
    """Serve a tiny model with the engine; options of `running`.

    Its watch hears of no times: turns are held up here, and a plan that became slow would rest.
    """
    model = tiny("llama", max_position_embeddings=SLOTS)
    with mock.patch.object(Paces, "slowed", return_value={}), running(model, plan=TOGETHER, **options) as found:
        assert found.model.autotune.status.batching
        yield found


def engine_of(server: Running) -> Engine:
    found: Engine = server.model.autotune.active.engine
    return found


def used(server: Running) -> int:
    """How many sequences have a row."""
    return engine_of(server).sequences.used


def waiting(server: Running) -> int:
    """How many requests wait for a row."""
    return engine_of(server).load.waiting


def busy(server: Running) -> int:
    """How many sequences have a row or wait for one."""
    return used(server) + waiting(server) if server.model.autotune.active else 0


class Turns:
    """Stands before each turn of a server's model, and lets so many pass as it is told to.

    A turn is one of the engine's: a part of a prompt and a step for all rows. Without an engine it is one forward.
    """

    def __init__(self, server: Running) -> None:
        self._server = server
        self._clients = list[Client]()
        variant = server.model.autotune.active
        self._owner, self._name = (variant.engine, "_turn") if variant else (server.model.lm_head, "forward")
        self._turn = getattr(self._owner, self._name)
        self._changed = threading.Condition()
        self._left = 0
        self._stands = False
        self._is_open = False
        setattr(self._owner, self._name, self._one)

    def _one(self, *args: Any) -> Any:
        with self._changed:
            self._stands = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._left or self._is_open, WAIT_S)
            self._left = max(self._left - 1, 0)
            self._stands = False
            self._changed.notify_all()
        return self._turn(*args)

    def take(self, count: int = 1) -> None:
        """Let so many turns pass, and wait until the last of them has begun."""
        with self._changed:
            self._left = count
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: not self._left, WAIT_S)

    def gather(self, count: int) -> None:
        """Wait until so many requests have come to the engine, then let turns pass until each has a row if any is left.

        A server counts an answer as one that runs before its request has come so far.
        """
        until(lambda: busy(self._server) == count)
        while used(self._server) < min(count, ROWS):
            self.take()

    def settle(self) -> None:
        """Wait until the turn under way is over, and the model stands before the next one."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._stands, WAIT_S)

    def open(self) -> None:
        """Let all turns pass from now on."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def client(self, prompt: list[int], tokens: int, **options: Any) -> Client:
        """A client that asks, and goes at the latest when this is closed."""
        self._clients.append(Client(self._server, prompt, tokens, **options))
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.open()
        delattr(self._owner, self._name)


@contextmanager
def counted(server: Running) -> Iterator[Turns]:
    """Count out the turns of a server's model. Afterwards its clients have gone, and it has nothing left to do."""
    turns = Turns(server)
    try:
        yield turns
    finally:
        turns.close()
        until(lambda: server.served.answers.running == 0 and not busy(server))


class Client:
    """A completion request. Making it sends the request and waits for nothing; a stream is read token by token.

    Attributes:
        tokens: texts of a stream's tokens that were read.
        text: of the answer so far.
        last: the data of a stream's events after its tokens: usage, an error, "[DONE]".
    """

    def __init__(self, server: Running, prompt: list[int], tokens: int, stream: bool = True, **options: Any) -> None:
        host, port = address(server)
        self._connection = http.client.HTTPConnection(host, port, timeout=WAIT_S)
        self._streams = stream
        body = json.dumps(ask(prompt, tokens, stream=stream, logprobs=0, **options))
        self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        self._answer: http.client.HTTPResponse | None = None
        self.tokens, self.text, self.last = list[str](), "", list[Any]()

    @property
    def answer(self) -> http.client.HTTPResponse:
        """What came back; waits for the first token, or for the whole answer if it is no stream."""
        if self._answer is None:
            self._answer = self._connection.getresponse()
        return self._answer

    @property
    def has_answer(self) -> bool:
        """Whether something came back that was not read yet."""
        poll = select.poll()
        poll.register(self._connection.sock, select.POLLIN)
        return bool(poll.poll(0))

    def read(self, count: int = 1) -> list[str]:
        """Wait for so many tokens more, and return them."""
        before = len(self.tokens)
        while len(self.tokens) < before + count:
            assert self._next(), f"it ended after {len(self.tokens)} tokens: {self.last}"
        return self.tokens[before:]

    def rest(self) -> str:
        """Read to the end, and return the whole text."""
        assert self.answer.status == 200, self.answer.read()
        if self._streams:
            while self._next():
                pass
        else:
            self.text = json.loads(self.answer.read())["choices"][0]["text"]
        self.close()
        return self.text

    def _next(self) -> bool:
        for line in iter(self.answer.readline, b""):
            if not line.startswith(b"data: "):
                continue
            data = line[6:].decode().strip()
            event = data if data == "[DONE]" else json.loads(data)
            if isinstance(event, str) or not event.get("choices"):
                self.last.append(event)
                continue
            (choice,) = event["choices"]
            self.tokens += choice["logprobs"]["tokens"]
            self.text += choice["text"]
            return True
        return False

    def close(self) -> None:
        """Go away."""
        if self._answer is not None:
            self._answer.close()
        self._connection.close()


def ask(prompt: list[int], tokens: int, **options: Any) -> dict[str, Any]:
    """The body of a completion request of so many tokens."""
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **options}


def post(server: Running, prompt: list[int], tokens: int, **options: Any) -> httpx.Response:
    """Wait for an answer of so many tokens."""
    return httpx.post(f"{server.url}/v1/completions", json=ask(prompt, tokens, **options), timeout=WAIT_S)


def text(answer: httpx.Response) -> str:
    found: str = answer.raise_for_status().json()["choices"][0]["text"]
    return found


def address(server: Running) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)
