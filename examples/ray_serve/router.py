"""`affinity` as Ray Serve's request router.

Ray's own `PrefixCacheAffinityRouter` is for `ray[llm]`: it takes bodies that its ingress has parsed, and keeps every
prompt in an actor. `ConsistentHashRouter` needs a header that names the session, and is strict.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .affinity import ranked

SPARE = 8  # requests by which a beginning's own replica may be busier: half of what it decodes together


class PrefixRouter(RequestRouter):
    """Sends requests that begin alike to one replica, unless it is much busier than another.

    While a replica is a canary, requests go to the least busy replica instead, so that the canary and the others get
    the same kinds of requests.
    """

    def initialize_state(self, spare: int = SPARE, **_: Any) -> None:
        """Take `request_router_kwargs`.

        Args:
            spare: as for `affinity.ranked`.
        """
        self._spare = spare

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which they are asked whether they take the request."""
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        busy = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in known.items()}
        has_canary = any(replica.routing_stats.get("canary") for replica in candidate_replicas)
        key = pending_request.kwargs.get("key") if pending_request is not None and not has_canary else None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # if none of them takes it
        return [[known[name]] for name in ranked(key, busy, self._spare)]
