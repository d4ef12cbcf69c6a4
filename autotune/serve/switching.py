"""Roll the plan back and commit it again over HTTP, from this server's own page or from an operator's command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import StateError
from ..live.status import State
from .refusal import Refusal
from .watching import may

if TYPE_CHECKING:
    from ..live.handle import Handle

OWN = ("same-origin", "none")  # values of Sec-Fetch-Site for this server's own pages, and for no page


def check_own(headers: Mapping[str, str]) -> None:
    """Refuse what another site's page may have sent from the user's browser.

    A browser sends JSON across sites only after a preflight, which this server does not grant, and names the site that
    asks in `Sec-Fetch-Site` or, an older one, in `Origin`. Other clients send neither.

    Args:
        headers: of the request, by names in lower case.

    Raises:
        Refusal: the request came from another site, or does not say that it has JSON.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    is_from_here = origin is None or urlsplit(origin).netloc == headers.get("host")
    if not (is_from_here if site is None else site in OWN):
        said = f"the request came from another site ({origin or site}); send it from this server's own page"
        raise Refusal(403, said, code="cross_site")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"expected `Content-Type: application/json`, not {kind or 'none'}; the body may be empty")


def roll_back(handle: Handle) -> None:
    """Serve with the original from the next request on.

    Raises:
        Refusal: no plan serves, or the original was released.
    """
    status = handle.status
    if status.state is State.ROLLED_BACK:
        return
    if not may(status, handle.plan)["rollback"]:
        raise Refusal(409, f"no plan serves: the model is {status.state}; there is nothing to roll back")
    _switch(handle.rollback)


def commit(handle: Handle) -> None:
    """Serve with the plan again from the next request on.

    Raises:
        Refusal: there is no plan, tuning is under way, or the model changed since.
    """
    status = handle.status
    if status.state is State.TUNING:
        raise Refusal(409, "tuning is under way; wait until it is over: it commits what it finds")
    if status.transforms:
        return
    if handle.plan is None or not handle.plan.transforms:
        raise Refusal(409, f"there is no plan: the model is {status.state}; tune it first")
    _switch(handle.commit)


def _switch(do: Any) -> None:
    try:
        do()
    except StateError as error:
        raise Refusal(409, str(error)) from error
