"""Why a request is not served, in the form that OpenAI's clients read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
RETRY = {"Retry-After": "1"}  # seconds after which a refused request may come again, if nothing better is known
MOST_RETRY_S = 60  # OpenAI's clients do not wait for longer
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients repeat a 408 otherwise
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: RETRY, 503: RETRY}


class Refusal(Exception):  # noqa: N818 - not every refusal is an error of ours
    """A request that is not served.

    Args:
        status: HTTP status.
        message: what was wrong, what was expected and what to do.
        param: the field of the body that is meant.
        code: OpenAI's short name of the reason.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """What is sent, with further headers."""
        own = HEADERS.get(self.status, {})
        return JSONResponse(self.body, self.status, {**own, **self.headers, **(headers or {})})


def retry_after(waiting: int, per_s: float) -> Mapping[str, str]:
    """Return the header that says when a refused request finds room: when those that wait now have been answered.

    Args:
        waiting: requests that wait.
        per_s: answers that were finished per second of late.
    """
    seconds = math.ceil(waiting / per_s) if per_s > 0 else MOST_RETRY_S
    return {"Retry-After": str(min(max(seconds, 1), MOST_RETRY_S))}
