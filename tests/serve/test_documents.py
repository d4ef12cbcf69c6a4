"""The code of the documents that asks a server runs, on a tiny model under the name of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import documents
from tests.serve.servers import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(name=documents.MODEL.partition("/")[2]) as found:
        yield found


@pytest.mark.parametrize("path", ["README.md", "docs/serving.md"])
def test_clients_of_the_documents_get_an_answer(server: Running, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = [block for block in documents.blocks(documents.read(path)) if documents.SERVER in block]
    assert len(code) == 1
    exec(code[0].replace(documents.SERVER, server.url), {"__name__": "readme"})
    assert capsys.readouterr().out
