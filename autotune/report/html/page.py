"""Build one self-contained page: chapters under a heading, a style sheet, the raw data; no script, no network access.

The page builder does not depend on reports. It can show any chapters and data.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from .elements import Chapter, Html, element, joined

# Content security policy: even if a text contained markup, no script runs, nothing is loaded and nothing is sent.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(title: str, heading: Html, chapters: Iterable[Chapter | None], data: Mapping[str, Any], file: str) -> Html:
    """Return the whole document.

    Args:
        title: title of the window.
        heading: markup at the top.
        chapters: shown in this order; None leaves one out.
        data: the data behind the page, for download as JSON.
        file: name of the download.
    """
    shown = [chapter for chapter in chapters if chapter is not None]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="robots", content="noindex"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        Html(f"<style>{style_sheet()}</style>"),
    )
    body = element(
        "body",
        element("a", "Skip to the result", href="#content", class_="unseen"),
        element("header", heading),
        _contents(shown),
        element("main", *(_section(chapter) for chapter in shown), id="content"),
        element("footer", element("p", "Everything shown here is in the data: ", _download(data, file))),
    )
    return joined((Html("<!doctype html>\n"), element("html", head, body, lang="en"), Html("\n")))


def style_sheet() -> str:
    return resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def _contents(chapters: Iterable[Chapter]) -> Html:
    links = (element("a", chapter.title, href=f"#{chapter.id}") for chapter in chapters)
    return element("nav", *links, aria_label="Contents")


def _section(chapter: Chapter) -> Html:
    name = f"{chapter.id}-title"
    return element("section", element("h2", chapter.title, id=name), chapter.body, id=chapter.id, aria_labelledby=name)


def _download(data: Mapping[str, Any], file: str) -> Html:
    text = json.dumps(data, indent=2, allow_nan=False)
    packed = base64.b64encode(text.encode("ascii")).decode("ascii")
    return element(
        "a", f"{file} ({len(text) / 1e3:.0f} kB)", href=f"data:application/json;base64,{packed}", download=file
    )
