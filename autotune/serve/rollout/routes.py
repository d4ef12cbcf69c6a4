"""`/autotune/rollout`: offer a plan to all replicas, and see what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from ...errors import PlanError
from ...tune import codec
from ..openapi import errors, json_body
from ..refusal import Refusal
from ..switching import check_own

if TYPE_CHECKING:
    from ..service import Service
    from .replica import Replica


def add_routes(app: FastAPI, served: Service) -> None:
    """Add the routes. They answer 409 if the server takes part in no rollouts."""

    @app.get("/autotune/rollout", response_model=dict[str, Any], responses=errors(409))
    async def rollout() -> JSONResponse:
        """The latest rollout, and this replica's part in it."""
        return JSONResponse(await anyio.to_thread.run_sync(_described, _part(served)))

    @app.post(
        "/autotune/rollout",
        status_code=202,
        response_model=dict[str, Any],
        responses=errors(400, 403, 409, 415, 503),
        openapi_extra=json_body({"type": "object"}, "a plan.json"),
    )
    async def offer(request: Request) -> JSONResponse:
        """Offer a plan.json, the body, to all replicas, also one that was rolled back before. One takes it first."""
        check_own(request.headers)
        part, text = _part(served), await request.body()
        try:
            await anyio.to_thread.run_sync(part.folder.offer, text)
        except PlanError as error:
            raise Refusal(400, f"the body is not a plan: {error}") from error
        except OSError as error:
            raise Refusal(503, f"the plan cannot be kept: {error.strerror}") from error
        return JSONResponse(await anyio.to_thread.run_sync(_described, part), 202)


def _part(served: Service) -> Replica:
    if served.rollout is None:
        raise Refusal(409, "this server takes part in no rollouts; replicas on Ray Serve do")
    return served.rollout


def _described(part: Replica) -> dict[str, Any]:
    offered, promoted, rollout = part.folder.offered, part.folder.promoted, part.folder.rollout
    return {
        "replica": part.id,
        "serves": part.serves,
        "is_canary": part.is_canary,
        "offered": offered.hash if offered else None,
        "promoted": promoted.hash if promoted else None,
        "rollout": codec.encode(rollout),
    }
