"""Thousands of connections that hang, send half a request or never read, beside clients who are served."""

from __future__ import annotations

import gc
import json
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from autotune.serve import connection
from autotune.serve.gate import HttpLimits
from tests.serve import hanging
from tests.serve.engines import PROMPTS, address, ask, busy, counted, engine_of, needs_kernels, post, text, together
from tests.serve.servers import Running, until

MOST = 10_000
SPARE = 1000  # files that this process needs beside its ends of the connections
EACH_BYTES = 16 * 2**10  # of memory for a connection that hangs, generously; a half body takes 4 MiB at most
LEFT_BYTES = 2 * 2**10  # of memory that a connection may leave behind; if all of it stayed, it would be more
AT_ONCE = 500
ANSWER = 2000  # tokens; as events they are more than what small sockets hold


@pytest.fixture
def files() -> Iterator[int]:
    """As many files as this process may have; returns how many connections those are."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    allowed = before[1] if before[1] != resource.RLIM_INFINITY else MOST + SPARE
    yield min(MOST, allowed - SPARE)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def memory() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def deaf(server: Running, prompt: list[int]) -> socket.socket:
    """A client that asks for a long stream and never reads it."""
    for listening in server.server.servers[0].sockets:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # which connections inherit
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(address(server))
    body = json.dumps(ask(prompt, ANSWER, stream=True, logprobs=5)).encode()
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    client.sendall(hanging.HEAD + kind + body)
    return client


@needs_kernels
def test_a_client_that_takes_nothing_is_dropped_and_its_row_is_free_long_before_its_answer_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "autotune.serve")
    with together(limits=HttpLimits(write_s=0.01)) as server, counted(server) as turns:
        engine, connections = engine_of(server), server.server.server_state.connections
        beside = turns.client(PROMPTS[0], ANSWER)
        until(lambda: busy(server) == 1)
        with deaf(server, PROMPTS[1]):
            until(lambda: busy(server) == 2)
            steps, fullest = engine.counts["steps"], 0
            while server.served.answers.running == 2:
                turns.take(10)
                turns.settle()
                fullest = max(fullest, *(each.transport.get_write_buffer_size() for each in tuple(connections)))
                assert engine.counts["steps"] - steps < ANSWER / 2
            turns.take(2)
            turns.settle()
            assert busy(server) == 1
            assert len(beside.read(100)) == 100
            assert 0 < fullest < 2 * 64 * 2**10  # bytes: asyncio's limit, and an event more
            until(lambda: len(connections) == 1)
    (dropped,) = [record.fields for record in caplog.records if record.message == "dropped"]  # type: ignore[attr-defined]
    assert dropped["reason"] == "its client took nothing for 0.01 s"


@pytest.mark.parametrize(
    ("waits", "looks", "is_dropped"),
    [
        ([100, 100], 1, True),
        ([100, 101], 1, True),
        ([100, 99, 50, 50], 3, True),
        ([100, 90, 80, 70], 3, False),
    ],
)
def test_a_client_that_takes_something_now_and_then_is_kept(waits: list[int], looks: int, is_dropped: bool) -> None:
    later, sizes = list[Any](), iter(waits)
    held: Any = connection.TimedConnection.__new__(connection.TimedConnection)
    held._write_s, held.flow = 60.0, mock.Mock()
    held.transport = mock.Mock(get_write_buffer_size=lambda: next(sizes))
    held.loop = mock.Mock(call_later=lambda seconds, look, *given: later.append((seconds, look, given)) or mock.Mock())
    held.pause_writing()
    for number in range(looks):
        assert not held.transport.abort.called
        seconds, look, given = later[number]
        assert seconds == 60.0
        look(*given)
    assert held.transport.abort.called == is_dropped
    pending = held._unread
    held.resume_writing()
    assert pending.cancel.called


@contextmanager
def held(server: Running, count: int, stream: Iterator[None]) -> Iterator[None]:
    """So many connections at once that hang, until they all vanish. `stream` advances between them."""
    host, port = address(server)
    with subprocess.Popen(
        [sys.executable, hanging.__file__, host, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        try:
            for opened in range(0, count, AT_ONCE):
                more = min(AT_ONCE, count - opened)
                print(more, file=clients.stdin, flush=True)
                assert clients.stdout.readline().strip() == str(opened + more)
                next(stream)
            yield
        finally:
            clients.kill()


@pytest.mark.slow
@needs_kernels
def test_up_to_10000_connections_held_at_once_stop_no_stream_and_take_little_memory(
    files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 900.0)  # nothing is closed while it is held
    with together(limits=HttpLimits(body_s=900.0, write_s=900.0)) as server, ExitStack() as closing:
        connections = server.server.server_state.connections
        expected = text(post(server, PROMPTS[0], ANSWER))
        before, peaks = memory(), list[int]()
        with counted(server) as turns:
            stream = turns.client(PROMPTS[0], ANSWER)
            silent = [closing.enter_context(deaf(server, prompt)) for prompt in PROMPTS[1:3]]
            until(lambda: server.served.answers.running == 3)
            turns.take(5)

            def advance() -> Iterator[None]:
                while True:
                    turns.take(5)
                    stream.read(5)
                    yield

            going = advance()
            for _ in range(2):
                with held(server, files, going):
                    until(lambda: len(connections) >= 0.9 * files)
                    peaks.append(memory())
                    next(going)
                    assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200
                until(lambda: len(connections) <= 1 + len(silent))
            turns.open()
            assert stream.rest() == expected
            until(lambda: not busy(server) and not server.served.answers.running)  # who does not read holds no row,
            unread = [each for each in connections if each.cycle and not each.cycle.response_complete]
            assert len(unread) == len(silent)  # though its answer still waits to be sent, and nobody up
            assert text(post(server, PROMPTS[0], ANSWER)) == expected
            for client in silent:
                client.close()
        until(lambda: not connections)
        assert files >= 1000, "the limit of open files is too low to show anything"
        assert peaks[0] - before < files * EACH_BYTES
        assert peaks[1] - peaks[0] < files * LEFT_BYTES
