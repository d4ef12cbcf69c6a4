"""Build HTML from values. Text is escaped unless it is `Html`, so that a user's names cannot become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from ..layout import Section, Table

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
VOID = {"meta", "link", "input"}
TONES = {
    **dict.fromkeys(("accepted", "pass"), "good"),
    **dict.fromkeys(("rejected", "error", "blocked", "fail"), "bad"),
    **dict.fromkeys(("inconclusive", "unreached"), "doubt"),
}


class Html(str):
    """Markup that is put into a page unchanged."""

    __slots__ = ()


@dataclass(frozen=True)
class Chapter:
    """A part of a page.

    Args:
        id: the element's id, for links.
        title: the heading.
        body: the markup below the heading.
    """

    id: str
    title: str
    body: Html


def printable(text: str) -> str:
    """Replace control characters, surrogates, noncharacters, and characters that change the direction of writing."""
    return UNPRINTABLE.sub("\ufffd", text)


def cleaned(value: Any) -> Any:
    """Return the same values with all texts and all keys printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(name): cleaned(item) for name, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def safe(text: str) -> Html:
    """Escape text; return markup unchanged."""
    return text if isinstance(text, Html) else Html(escape(printable(text)))


def element(tag: str, /, *children: str, **attributes: str | None) -> Html:
    """Return one element.

    Args:
        tag: name of the element.
        children: text, which is escaped, or `Html`.
        attributes: None leaves one out; `class_` is class, `data_label` is data-label.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{escape(printable(value))}"' for key, value in given.items())
    if tag in VOID:
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str | None], between: str = "") -> Html:
    """Join parts; None is left out."""
    return Html(between.join(safe(part) for part in parts if part is not None))


def paragraphs(sentences: Iterable[str]) -> Html:
    return joined(element("p", sentence) for sentence in sentences)


def section(found: Section | None) -> Html:
    """Return the sentences and the table of a section of the report's other forms."""
    if found is None:
        return Html("")
    drawn = table(found.table, found.title) if found.table is not None else None
    return joined((paragraphs(found.sentences), drawn))


def titled(found: Section | None) -> Html:
    """Return a section under a small heading."""
    return joined((element("h3", found.title), section(found))) if found is not None else Html("")


def fold(summary: str, *children: str) -> Html:
    """Return a block that a click on its summary line opens; in print, it is open."""
    return element("details", element("summary", summary), *children)


def table(found: Table, caption: str, *, stacked: bool = False) -> Html:
    """Return a table that scrolls separately if it is too wide.

    Args:
        found: cells of text.
        caption: description for readers who cannot see the table.
        stacked: whether a row becomes a block of labelled lines on a phone; for rows with long text.
    """
    body = [row(cells, found) for cells in found.rows]
    if found.total:
        body[-1] = row(found.rows[-1], found, class_="total")
    return tabulated(found, caption, body, stacked=stacked)


def tabulated(found: Table, caption: str, body: Iterable[Html], *, stacked: bool = False) -> Html:
    """Return a table with the columns of `found` and with rows that are markup already."""
    headings = (
        element("th", name, scope="col", class_=_side(side))
        for name, side in zip(found.columns, found.align, strict=True)
    )
    drawn = element(
        "table",
        element("caption", caption, class_="unseen"),
        element("thead", element("tr", *headings)),
        element("tbody", *body),
        class_="stacked" if stacked else None,
    )
    return element("div", drawn, class_="scroll", role="region", aria_label=caption, tabindex="0")


def row(cells: Iterable[str], found: Table, **attributes: str | None) -> Html:
    """Return one row; its first cell is its heading."""
    drawn = (
        element(
            "td" if index else "th",
            cell,
            scope=None if index else "row",
            class_=_side(side),
            data_label=name,
        )
        for index, (cell, name, side) in enumerate(zip(cells, found.columns, found.align, strict=True))
    )
    return element("tr", *drawn, **attributes)


def _side(letter: str) -> str | None:
    return "right" if letter == "r" else None


def code(name: str) -> Html:
    """Return a name in code style, in which a line may break after "(", ",", "@" or "="."""
    return element("code", joined(re.split(r"(?<=[(,@=])", name), Html("<wbr>")))


def badge(word: str, tone: str | None = None) -> Html:
    """Return a highlighted word; its tone is good, bad, doubt or none."""
    return element("span", word, class_=f"badge {tone or TONES.get(word, '')}".strip())


def figure(drawing: Html, caption: str, *after: str, keys: Mapping[str, str] | None = None) -> Html:
    """Return a chart with its caption and its legend.

    Args:
        drawing: the chart.
        caption: one or two sentences.
        after: markup that follows, such as the chart's table.
        keys: class of a swatch -> its meaning.
    """
    swatches = (
        element("span", element("i", class_=f"swatch {name}", aria_hidden="true"), meaning)
        for name, meaning in (keys or {}).items()
    )
    legend = element("div", *swatches, class_="legend") if keys else None
    return element("figure", joined((element("figcaption", caption), legend, drawing, *after)))
