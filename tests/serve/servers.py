"""A server over a tiny model, on a real socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import autotune
from autotune.serve.app import create_app
from autotune.serve.run import Server, listen
from autotune.serve.service import Service
from autotune.serve.watching import TuningLog
from tests.models import tiny, tiny_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
READY_S = 60.0


@dataclass
class Running:
    """A server that runs.

    Args:
        url: where it listens.
        served: its model.
        server: uvicorn's.
    """

    url: str
    served: Service
    server: Server

    @property
    def model(self) -> Any:
        return self.served.model


@contextmanager
def running(
    model: Any = None, template: str | None = TEMPLATE, name: str = "tiny", tls: Any = None, **options: Any
) -> Iterator[Running]:
    """Serve a tiny model untuned; options of `Service.of`."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    log = TuningLog()
    wrapped = autotune.wrap(
        model or tiny("llama"), tokenizer=tokenizer, when="manual", cache=False, progress=log.update
    )
    served = Service.of(wrapped, tokenizer, name, untuned=True, progress=log, **options)
    server, listening = Server(create_app(served), drain_s=10, tls=tls), listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.run(served, listening)), daemon=True)
    thread.start()
    until(lambda: server.started and served.has_answered)
    try:
        yield Running(f"http://127.0.0.1:{port}", served, server)
    finally:
        server.should_exit = True
        thread.join(READY_S)
        wrapped.autotune.unwrap()


def until(true: Any, within_s: float = READY_S) -> None:
    """Wait until something is so."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
