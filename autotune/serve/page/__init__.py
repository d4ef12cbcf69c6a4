"""The page at `/` and the routes that it reads: what serves and why, phases, trials, and figures as they change.

    page.html, page.css, page.js, icon.svg   the page; it holds no data, so a browser gets it without a key
    view                                     the plan, the reasons and the lines of tuning as a dictionary
    chapters                                 chapters of the report: the roofline and the trials

The page's script reads the rest with the key that its user types. It builds everything from text; chapters of the
report are markup that the report escapes.
"""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from ...errors import PackageError, StateError
from ...report.html.page import style_sheet
from .. import switching
from ..events import EventStream
from ..openapi import STREAM, errors, json_body
from ..refusal import Refusal
from .chapters import chapters
from .view import view

if TYPE_CHECKING:
    from ...tune.plan import Plan
    from ..service import Service

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FRESH = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
ANY = json_body({}, "not read; that it is declared as JSON keeps other sites' pages out")
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def add_routes(app: FastAPI, served: Service) -> None:
    """Add the page, what it reads, and the switch of the plan."""
    for path, (name, kind) in FILES.items():
        _add_file(app, path, _read(name), kind)
    handle, drawn, switch = served.model.autotune, Drawn(), asyncio.Lock()

    def shown() -> JSONResponse:
        return JSONResponse(view(served.name, handle.status, handle.plan, _record(served), served.progress), 200, FRESH)

    @app.get("/autotune", response_model=dict[str, Any])
    async def overview() -> JSONResponse:
        """What serves and why, what limits each phase, and the lines of tuning."""
        return shown()

    @app.get("/autotune/events", response_class=StreamingResponse, responses=STREAM | errors(429, 503))
    async def events() -> Response:
        """Figures once a second as server-sent events: one `history` of the last two minutes, then each as it comes."""
        samples = served.feed.events()
        return EventStream(await anext(samples), samples)

    @app.get("/autotune/chapters", response_model=list[dict[str, str]])
    async def report_chapters() -> JSONResponse:
        """The report's chapters on what limits the model and on what was tried, as HTML; none before tuning is over."""
        return JSONResponse(await drawn.get(handle.plan, _record(served)), 200, FRESH)

    @app.get("/autotune/report", response_class=HTMLResponse, responses=errors(409, 501))
    async def report() -> Response:
        """The whole report as one HTML page to download."""
        try:
            text = await anyio.to_thread.run_sync(lambda: handle.report().to_html())
        except StateError as error:
            raise Refusal(409, str(error)) from error
        except PackageError as error:
            raise Refusal(501, str(error)) from error
        return HTMLResponse(text, 200, FRESH | {"Content-Disposition": 'attachment; filename="report.html"'})

    @app.post("/autotune/rollback", response_model=dict[str, Any], responses=errors(403, 409, 415), openapi_extra=ANY)
    async def roll_back(request: Request) -> JSONResponse:
        """Serve with the original from the next request on. Requests under way end as they began."""
        switching.check_own(request.headers)
        async with switch:
            await anyio.to_thread.run_sync(switching.roll_back, handle)
        return shown()

    @app.post("/autotune/commit", response_model=dict[str, Any], responses=errors(403, 409, 415), openapi_extra=ANY)
    async def commit(request: Request) -> JSONResponse:
        """Serve with the plan again from the next request on."""
        switching.check_own(request.headers)
        async with switch:
            await anyio.to_thread.run_sync(switching.commit, handle)
        return shown()


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)


def _read(name: str) -> bytes:
    """Return a file of the page; its style sheet follows the report's."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return (style_sheet() + text if name.endswith(".css") else text).encode()


def _record(served: Service) -> dict[str, Any] | None:
    try:
        return served.model.autotune.report().to_dict()  # type: ignore[no-any-return]
    except StateError:
        return None


class Drawn:
    """The chapters of the latest report, drawn once, in a thread."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._of: Plan | None = None
        self._chapters: list[dict[str, str]] = []

    async def get(self, plan: Plan | None, record: dict[str, Any] | None) -> list[dict[str, str]]:
        """Return the chapters of a record, which belongs to a plan."""
        if plan is None or record is None:
            return []
        async with self._lock:
            if plan is not self._of:
                self._chapters = await anyio.to_thread.run_sync(chapters, record)
                self._of = plan
            return self._chapters
