"""What the tests of a server share."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serve.servers import Running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of the `server` of a test's file. It tries once."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
