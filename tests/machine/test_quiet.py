"""What libraries log while candidates are tried does not reach standard error; what others log does."""

from __future__ import annotations

import io
import logging
import threading
from typing import TYPE_CHECKING

import pytest

from autotune.machine.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def shown() -> Iterator[io.StringIO]:
    """What a library's handler writes: a logger with a handler of its own, whose children log."""
    stream = io.StringIO()
    logger = logging.getLogger("torch.autotune_test")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)


def warn(text: str, level: int = logging.WARNING) -> None:
    logging.getLogger("torch.autotune_test.compiler").log(level, text)


def test_warnings_go_to_our_own_log(shown: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="autotune")
    warn("before")
    with quiet():
        warn("a traceback of a hundred lines")
        with quiet():
            warn("inner")
        warn("it broke", logging.ERROR)
    warn("after")
    assert shown.getvalue().split("\n")[:-1] == ["before", "it broke", "after"]
    own = [record.getMessage() for record in caplog.records if record.name == "autotune"]
    assert own == [
        "torch.autotune_test.compiler: a traceback of a hundred lines",
        "torch.autotune_test.compiler: inner",
    ]


def test_other_threads_are_heard(shown: io.StringIO) -> None:
    with quiet():
        thread = threading.Thread(target=warn, args=("theirs",))
        thread.start()
        thread.join()
    assert shown.getvalue() == "theirs\n"


def test_a_logger_without_a_handler_is_muted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    bare = logging.getLogger("torchao.autotune_test")
    bare.setLevel(logging.WARNING)  # of its own: other tests set the level of "torchao"
    with quiet():
        bare.warning("unheard")
    bare.warning("heard")
    assert capsys.readouterr().err == "heard\n"
