"""What the tests of a server share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serve.servers import READY_S, Running


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """Have httpx wait for longer than 5 s, which a busy machine may take for any answer."""
    default = inspect.signature(httpx.get).parameters["timeout"].default
    with pytest.MonkeyPatch.context() as waiting:
        for step in ("connect", "read", "write", "pool"):
            waiting.setattr(default, step, READY_S)
        assert httpx.Client().timeout.read == READY_S
        yield


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of the `server` of a test's file. It tries once."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
