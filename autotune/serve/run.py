"""A server from the first line to the last: load, wrap, serve, tune meanwhile, drain."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..compare.experiment.store import Store
from ..errors import ExperimentError, PlanError, UnsupportedModelError, in_words
from ..live.wrap import wrap
from ..model.load import load
from ..report.progress import Elapsed, Lines
from ..tune import fingerprint
from ..workload import built_in
from . import traces
from .app import create_app
from .connection import TimedConnection
from .gate import Gate
from .keys import VARIABLE as KEY
from .logs import Steps, event
from .rollout.folder import Folder, Offer
from .rollout.replica import Replica
from .schema import CompletionBody
from .service import Service
from .watching import TuningLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..tune.plan import Plan
    from ..tune.policy import Policy
    from .rollout.decision import CanaryRules

AGAIN_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds between tries of the server's own request

log = logging.getLogger("autotune.serve")


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Args:
        model: a local directory, a GGUF file or a hub name.
        name: that clients name; None: the model's own name, without its folder.
        aliases: further names by which clients may call it. `model`, as it is given, is one anyway.
        host, port: where to listen.
        policy: how to tune; None: the model is served as it is.
        plan: verified first; nothing is tuned if it holds.
        keys: API keys, any of which opens every route.
        longest: most tokens of a prompt.
        deadline_s: seconds after which an answer is given up.
        drain_s: seconds that answers under way get when the server is asked to end.
        log_level: the least that is logged: one of `logs.LEVELS`.
        rollout: limits of a canary, if this is one of several replicas that share a cache directory.
    """

    model: str
    name: str | None = None
    aliases: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    policy: Policy | None = None
    plan: Plan | None = None
    keys: Sequence[str] = ()
    longest: int | None = None
    deadline_s: float | None = None
    drain_s: int = 30
    log_level: str = "info"
    rollout: CanaryRules | None = None


def serve(settings: Settings) -> int:
    """Serve until a signal says to end. Returns the exit code.

    Raises:
        UnsupportedModelError: the model cannot be loaded, or has no tokenizer.
        PlanError: the plan was made for another model.
    """
    listening = listen(settings.host, settings.port)  # first: a port that is taken is told at once
    warn_if_open(listening.getsockname()[0], settings.keys)
    served = prepared(settings)
    asyncio.run(Server(create_app(served), settings.drain_s).run(served, listening))
    return 0


def prepared(settings: Settings) -> Service:
    """Load and wrap a model, whose tuning begins beside the requests; `create_app` makes an ASGI app of it.

    Raises:
        UnsupportedModelError: the model cannot be loaded, or has no tokenizer.
        PlanError: the plan was made for another model.
    """
    model, tokenizer = load(settings.model)
    if tokenizer is None:
        raise UnsupportedModelError(f"{settings.model} has no tokenizer; a server needs one")
    name = settings.name or name_of(settings.model)
    folder = Folder.of(name) if settings.rollout is not None else None
    promoted = _promoted(folder, model)
    tuning = TuningLog()
    if settings.policy is None:
        wrapped = wrap(model, tokenizer=tokenizer, when="manual")
    else:  # beside the requests that the original answers meanwhile
        chats = built_in.chats(tokenizer)
        lines = Lines(Steps(), Elapsed())

        def notify(step: str) -> None:
            lines.update(step)
            tuning.update(step)

        wrapped = wrap(
            model,
            tokenizer=tokenizer,
            policy=settings.policy,
            workload=chats,
            plan=settings.plan or (promoted[1] if promoted else None),
            progress=notify,
        )
    served = Service.of(
        wrapped,
        tokenizer,
        name,
        aliases=settings.aliases,
        given=settings.model,
        keys=settings.keys,
        longest=settings.longest,
        deadline_s=settings.deadline_s,
        untuned=settings.policy is None,
        traces=traces.configured(name),
        progress=tuning,
    )
    if settings.rollout is not None and folder is not None:
        served.rollout = Replica(folder, served.model.autotune, settings.rollout, _store(), promoted)
        served.answers.tell = served.rollout.tally.hear
        served.rollout.start()
    return served


def name_of(model: str) -> str:
    """Return a model's own name: without its folder, and without `.gguf`."""
    return os.path.basename(os.path.abspath(model)).removesuffix(".gguf") or model


def _promoted(folder: Folder | None, model: PreTrainedModel) -> tuple[Offer, Plan] | None:
    """The plan that was promoted for a model, or None."""
    offer = folder.promoted if folder is not None else None
    if offer is None:
        return None
    try:
        plan = offer.plan()
        plan.require(fingerprint.of_model(model))
    except PlanError as error:
        log.warning("the promoted plan is not used: %s", error)
        return None
    return offer, plan


def _store() -> Store | None:
    try:
        return Store()
    except ExperimentError as error:
        log.warning("rollouts are not recorded: %s", error)
        return None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        said = error.strerror or str(error)
        said = f"cannot listen on {host}:{port}: {said}; choose another --host or --port"
        raise OSError(error.errno, said) from error


def warn_if_open(address: str, keys: Sequence[str]) -> None:
    """Log a warning if other machines reach a server that asks for no key.

    Args:
        address: where it listens, an IP address.
    """
    if not keys and not ipaddress.ip_address(address).is_loopback:
        log.warning("other machines reach %s, and no API key is asked for: set $%s or --api-key-file", address, KEY)


class Server(uvicorn.Server):
    """uvicorn that finishes answers under way when it is asked to end. A second signal ends it at once."""

    def __init__(self, gate: Gate, drain_s: int) -> None:
        self._gate = gate
        self._served: Service | None = None
        super().__init__(
            uvicorn.Config(
                gate,
                http=TimedConnection,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=drain_s,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self._gate.is_ending = True
        self.should_exit = True
        event("ending", ending=signal.Signals(sig).name)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._served is not None:
            self._served.feed.end()  # these streams have no end that could be waited for
        await super().shutdown(sockets)

    async def run(self, served: Service, listening: socket.socket) -> None:  # type: ignore[override]  # in a loop
        self._served = served
        first = asyncio.create_task(become_ready(served))
        host, port, *_ = listening.getsockname()
        event("serving", serving=served.name, url=f"http://{host}:{port}")
        try:
            await self.serve(sockets=[listening])
        finally:
            first.cancel()


async def answer_once(served: Service) -> None:
    """Answer one short request, so that the first client does not wait for what is made at the first call."""
    body = CompletionBody.model_validate({"prompt": [0], "max_tokens": 2, "temperature": 0, "ignore_eos": True})
    async for _ in served.answers.pieces([0], body, 2, alternatives=None):
        pass


async def become_ready(served: Service, again_s: Iterable[float] = AGAIN_S) -> None:
    """Answer a request of the server's own, again and again until it or a client's is answered.

    Args:
        again_s: seconds to wait after each failure; the last of them is waited for ever after.
    """
    waits, wait_s = iter(again_s), 0.0
    while not served.has_answered:
        try:
            await answer_once(served)
        except Exception as error:
            log.exception("the server's own request failed")
            served.failure = in_words(error)
            wait_s = next(waits, wait_s)
            await asyncio.sleep(wait_s)
