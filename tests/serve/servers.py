"""A server over a tiny model, on a real socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import autotune
from autotune.report import Report
from autotune.runtime.variant import Transform, Variant
from autotune.serve.app import create_app
from autotune.serve.run import Server, listen
from autotune.serve.service import Service
from autotune.serve.watching import TuningLog
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from tests.models import tiny, tiny_tokenizer, token_prompts

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
    model: Any = None,
    template: str | None = TEMPLATE,
    name: str = "tiny",
    tls: Any = None,
    plan: Sequence[Transform] = (),
    **options: Any,
) -> Iterator[Running]:
    """Serve a tiny model, untuned or by a plan that was not searched for; options of `Service.of`."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    log = TuningLog()
    wrapped = autotune.wrap(
        model or tiny("llama"), tokenizer=tokenizer, when="manual", cache=False, progress=log.update
    )
    if plan:
        put_on(wrapped, plan)
    served = Service.of(wrapped, tokenizer, name, untuned=True, progress=log, **options)
    server, listening = Server(create_app(served), drain_s=READY_S, tls=tls), listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.run(served, listening)), daemon=True)
    thread.start()
    until(lambda: server.started and served.has_answered)
    try:
        yield Running(f"http://127.0.0.1:{port}", served, server)
    finally:
        server.should_exit = True
        thread.join(2 * READY_S)
        assert not thread.is_alive(), "it does not end"
        wrapped.autotune.unwrap()


def put_on(wrapped: Any, plan: Sequence[Transform]) -> None:
    """Have a wrapped model served by a plan. Nothing is measured."""

    def found(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms(plan)
        unmeasured = plans.Plan(Fingerprint("", "", {}, "", "", "strict"), variant.transforms)
        return Tuned(variant, unmeasured, Report({}), "won")

    with mock.patch.object(tuning, "tune", found):
        wrapped.autotune.tune(token_prompts(2))


def until(true: Any, within_s: float = READY_S) -> None:
    """Wait until something is so."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
