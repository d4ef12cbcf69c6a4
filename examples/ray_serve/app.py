"""Replicas of `autotune serve` on Ray Serve.

    pip install 'autotune-inference[serve,ray]'
    export AUTOTUNE_API_KEY=$(openssl rand -hex 32)
    AUTOTUNE_MODEL=path/to/model AUTOTUNE_CACHE_DIR=/shared/autotune serve run examples.ray_serve.app:app

    environment  what the environment says: the model, the key, limits, the log
    app          the deployments
    front        takes a request, has a replica answer it, asks another one if that dies before it has begun
    affinity     which replica a request goes to: those that begin alike to one
    router       that, as Ray Serve asks for it

Every replica is the whole server, with its own cores. The cache directory is shared: the first replica tunes, the
others serve the model as it is, wait for its plan, verify it on their own machine and serve it. A plan that is offered
later (`POST /autotune/rollout`) goes to one replica first, and by its verdict to all or none. Ray starts a replica
again that died; the front asks another one meanwhile.

The environment says the rest: see `environment`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from . import environment, front
from .router import PrefixRouter

CPUS = environment.cpus(os.environ)
FEWEST, MOST = environment.replicas(os.environ)
ANSWERS = 16  # that a replica decodes together; beyond it, Ray starts another one
FRONTS = 2  # one that dies takes the streams that it relays with it


@serve.deployment(
    ray_actor_options={"num_cpus": CPUS},
    autoscaling_config={"min_replicas": FEWEST, "max_replicas": MOST, "target_ongoing_requests": ANSWERS},
    max_ongoing_requests=4 * ANSWERS,
    graceful_shutdown_timeout_s=30,
    health_check_period_s=5,
    request_router_config=RequestRouterConfig(request_router_class=PrefixRouter, request_routing_stats_period_s=1),
)
class Model:
    """A replica: the whole server over one model."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Ray awaits it
        from autotune.serve import logs  # before torch: see autotune.machine.spinning

        # isort: split
        import torch

        from autotune.serve.app import create_app
        from autotune.serve.run import answer_once, prepared, warn_if_open

        torch.set_num_threads(CPUS)
        settings = environment.settings(os.environ)
        logs.install(settings.log_level, "autotune")
        warn_if_open("0.0.0.0", settings.keys)  # noqa: S104 - where Ray's proxy listens by the manifest
        self.served = prepared(settings)
        self.app: Any = create_app(self.served)
        self.name = serve.get_replica_context().replica_id.unique_id.encode()
        await answer_once(self.served)

    async def answer(
        self, scope: dict[str, Any], body: bytes, *, key: str | None = None
    ) -> AsyncGenerator[list[dict[str, Any]]]:
        """Yield the ASGI messages of an answer, those together that come together; closing the iterator ends it.

        Args:
            scope, body: of the request.
            key: of its beginning, for the router.
        """
        messages = asyncio.Queue[dict[str, Any] | None]()
        to_come = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            return to_come.pop() if to_come else await asyncio.Future()  # a client that goes cancels the task

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-replica", self.name)]}
            messages.put_nowait(message)

        task = asyncio.create_task(self.app(scope, receive, send))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            has_ended = False
            while not has_ended:
                several = [await messages.get()]
                while not messages.empty():
                    several.append(messages.get_nowait())
                has_ended = several[-1] is None
                if found := [message for message in several if message is not None]:
                    yield found
            await task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def check_health(self) -> None:
        """Raise if the device is dead, so that Ray replaces the replica. Where a plan failed, the original serves."""
        from autotune.machine import device

        device.of(self.served.model).check()

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router should know."""
        return {"canary": self.served.rollout is not None and self.served.rollout.is_canary}


Front = serve.deployment(
    serve.ingress(front.build)(),
    name="Front",
    num_replicas=FRONTS,
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=8 * ANSWERS * MOST,
)
app = Front.bind(Model.bind())  # type: ignore[attr-defined]  # the decorator's
