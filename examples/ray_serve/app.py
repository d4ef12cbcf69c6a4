"""Replicas of `autotune serve` on Ray Serve.

    pip install 'autotune-inference[serve,ray]'
    AUTOTUNE_MODEL=path/to/model AUTOTUNE_CACHE_DIR=/shared/autotune serve run examples.ray_serve.app:app

Every replica is the whole server, with its own cores. The cache directory is shared: the first replica tunes, the
others serve the model as it is, wait for its plan, verify it on their own machine and serve it. Ray starts a replica
again that died, and sends its requests to the others meanwhile; clients that retry, as OpenAI's do, notice nothing.

The environment says the rest: AUTOTUNE_POLICY (`throughput`; `none` to serve untuned), AUTOTUNE_CPUS of a replica (2),
AUTOTUNE_REPLICAS, the fewest and the most ("1:4").
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve

MODEL = os.environ.get("AUTOTUNE_MODEL", "")
POLICY = os.environ.get("AUTOTUNE_POLICY", "throughput")
CPUS = int(os.environ.get("AUTOTUNE_CPUS", "2"))
FEWEST, MOST = (int(number) for number in os.environ.get("AUTOTUNE_REPLICAS", "1:4").split(":"))
ANSWERS = 16  # that a replica decodes together; beyond it, Ray starts another one


class Replica:
    """What a replica serves, made once when it starts."""

    served: Any = None


def build() -> Any:
    """The ASGI app of one replica: load, wrap, and tune beside the requests."""
    import torch

    from autotune.serve.app import create_app
    from autotune.serve.run import Settings, prepared
    from autotune.tune import policy

    torch.set_num_threads(CPUS)
    Replica.served = prepared(Settings(MODEL, policy=None if POLICY == "none" else policy.load(POLICY)))
    return create_app(Replica.served)


@serve.deployment(
    ray_actor_options={"num_cpus": CPUS},
    autoscaling_config={"min_replicas": FEWEST, "max_replicas": MOST, "target_ongoing_requests": ANSWERS},
    max_ongoing_requests=4 * ANSWERS,
    graceful_shutdown_timeout_s=30,
    health_check_period_s=5,
)
@serve.ingress(build)
class Model:
    """The server as a deployment."""

    async def check_health(self) -> None:
        """Raise if the model serves nothing any more, so that Ray replaces the replica."""
        from autotune.live.status import State

        if Replica.served is not None and Replica.served.model.autotune.status.state is State.FAILED:
            raise RuntimeError(f"the model failed: {Replica.served.model.autotune.status.detail}")


app = Model.bind()
