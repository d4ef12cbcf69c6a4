"""A server from the first line to the last: load, wrap, serve, tune meanwhile, drain."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..compare.experiment.store import Store
from ..errors import ExperimentError, PlanError, SettingsError, UnsupportedModelError, in_words
from ..live.wrap import wrap
from ..model.load import load
from ..report.progress import Elapsed, Lines
from ..tune import fingerprint
from ..workload import built_in
from . import traces
from .app import create_app
from .connection import TimedConnection
from .gate import Gate, HttpLimits
from .keys import VARIABLE as KEY
from .logs import Steps, event
from .rollout.folder import Folder, Offer
from .rollout.replica import Replica
from .schema import CompletionBody
from .service import Service
from .watching import TuningLog

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tune.plan import Plan
    from ..tune.policy import Policy
    from .rollout.decision import CanaryRules

KEEP_ALIVE_S = 75  # more than the 60 s of common balancers, so that it is they who close a connection
CUT_S = 2  # seconds in which answers that are cut tell their clients
LOOK_S = 0.05  # seconds between two looks at whether they have
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
        most_waiting: requests that may wait; None: as many as the model admits.
        limits: of a request's size and time.
        dtype: of the weights; None: as stored.
        revision: of a model on the hub; None: its main branch.
        template: chat template in place of the model's own.
        tls: files of the certificate and, unless that has it, of its private key; None: plain HTTP.
        keep_alive_s: seconds that a connection may be silent between two requests.
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
    drain_s: float = 30
    most_waiting: int | None = None
    limits: HttpLimits = field(default_factory=HttpLimits)
    dtype: torch.dtype | None = None
    revision: str | None = None
    template: str | None = None
    tls: tuple[Path, Path | None] | None = None
    keep_alive_s: int = KEEP_ALIVE_S
    log_level: str = "info"
    rollout: CanaryRules | None = None


def serve(settings: Settings) -> int:
    """Serve until a signal says to end. Returns the exit code.

    Raises:
        UnsupportedModelError: the model cannot be loaded, or has no tokenizer.
        PlanError: the plan was made for another model.
    """
    if settings.tls is not None:
        check_certificate(*settings.tls)
    listening = listen(settings.host, settings.port)  # first: a port that is taken is told at once
    warn_if_open(listening.getsockname()[0], settings.keys)
    served = prepared(settings)
    server = Server(create_app(served), settings.drain_s, settings.keep_alive_s, settings.tls)
    asyncio.run(server.run(served, listening))
    return 0


def prepared(settings: Settings) -> Service:
    """Load and wrap a model, whose tuning begins beside the requests; `create_app` makes an ASGI app of it.

    Raises:
        UnsupportedModelError: the model cannot be loaded, or has no tokenizer.
        PlanError: the plan was made for another model.
    """
    model, tokenizer = load(settings.model, dtype=settings.dtype, revision=settings.revision)
    if tokenizer is None:
        raise UnsupportedModelError(f"{settings.model} has no tokenizer; a server needs one")
    if settings.template is not None:
        use_template(tokenizer, settings.template)
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
        limits=settings.limits,
        deadline_s=settings.deadline_s,
        most_waiting=settings.most_waiting,
        untuned=settings.policy is None,
        traces=traces.configured(name),
        progress=tuning,
    )
    if settings.rollout is not None and folder is not None:
        served.rollout = Replica(folder, served.model.autotune, settings.rollout, _store(), promoted)
        served.answers.tell = served.rollout.tally.hear
        served.rollout.start()
    return served


def use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Use a chat template in place of the tokenizer's own.

    Raises:
        SettingsError: it cannot render a chat of one message.
    """
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise SettingsError(f"the chat template cannot render a message: {in_words(error)}") from error


def check_certificate(certificate: Path, key: Path | None) -> None:
    """Raise SettingsError if a server cannot use a certificate with its key."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=str)
    except OSError as error:  # ssl's own errors are such, too
        raise SettingsError(f"the certificate {certificate} cannot be used: {error}") from error


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
    """uvicorn that finishes answers under way when it is asked to end. Until then it says that it ends.

    A second signal, or the end of the time that answers get, cuts them: their clients get an error in their streams.

    Args:
        gate: the app.
        drain_s: seconds that answers under way get.
        keep_alive_s: seconds that a connection may be silent between two requests.
        tls: files of the certificate and, unless that has it, of its private key; None: plain HTTP.
    """

    def __init__(
        self,
        gate: Gate,
        drain_s: float,
        keep_alive_s: int = KEEP_ALIVE_S,
        tls: tuple[Path, Path | None] | None = None,
    ) -> None:
        self._gate = gate
        self._drain_s = drain_s
        self._until_s: float | None = None  # when answers under way are cut, monotonic seconds
        self._served: Service | None = None
        certificate, key = tls or (None, None)
        super().__init__(
            uvicorn.Config(
                gate,
                http=partial(TimedConnection, write_s=gate.limits.write_s),  # type: ignore[arg-type]  # called as a class
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_keep_alive=keep_alive_s,
                timeout_graceful_shutdown=CUT_S,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit |= self.should_exit
        self.should_exit = True
        self._gate.ending.set()
        event("ending", ending=signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) and self._has_drained()

    def _has_drained(self) -> bool:
        """Whether no answer is under way, or those that are get no more time."""
        self._gate.ending.set()
        now_s = time.monotonic()
        self._until_s = self._until_s or now_s + self._drain_s
        return self.force_exit or not self._gate.under_way or now_s >= self._until_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._served is not None:
            self._served.feed.end()  # these streams have no end that could be waited for
            self._served.answers.cut()
            with suppress(TimeoutError):
                async with asyncio.timeout(CUT_S):
                    while self._gate.under_way:
                        await asyncio.sleep(LOOK_S)
        await super().shutdown(sockets)

    async def run(self, served: Service, listening: socket.socket) -> None:  # type: ignore[override]  # in a loop
        self._served = served
        first = asyncio.create_task(become_ready(served))
        host, port, *_ = listening.getsockname()
        scheme = "https" if self.config.is_ssl else "http"
        event("serving", serving=served.name, url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
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
