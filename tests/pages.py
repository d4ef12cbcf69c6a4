"""An HTML page read back, strictly: what a browser would forgive is an error here."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "input", "wbr"}


@dataclass
class Node:
    """An element: its attributes, and its children, which are elements and text."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", **attributes: str) -> list[Node]:
        """Elements below this one, by name and attributes (`class_` is class)."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        inner = [child for child in self.children if isinstance(child, Node)]
        found = [c for c in inner if tag in ("", c.tag) and wanted.items() <= c.attributes.items()]
        return found + [node for child in inner for node in child.all(tag, **attributes)]

    def one(self, tag: str = "", **attributes: str) -> Node:
        (found,) = self.all(tag, **attributes)
        return found

    def rows(self, caption: str) -> list[list[str]]:
        """The cells of the table of that caption, its headings left out."""
        (table,) = [t for t in self.all("table") if t.one("caption").text == caption]
        rows = table.one("tbody").all("tr")
        return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in rows]

    def data(self) -> Any:
        """The JSON that the page offers."""
        packed = next(a for a in self.all("a") if "download" in a.attributes).attributes["href"]
        return json.loads(base64.b64decode(packed.removeprefix("data:application/json;base64,")))

    def urls(self) -> list[str]:
        """Everything an attribute or the style sheet could make a browser fetch."""
        found = [
            node.attributes[name]
            for node in self.all()
            for name in ("src", "href", "srcset")
            if name in node.attributes
        ]
        styles = [node.attributes.get("style", "") for node in self.all()] + [node.text for node in self.all("style")]
        return found + [url for style in styles for url in re.findall(r"url\(([^)]*)\)|@import\s*(\S*)", style)]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> says twice {names}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Node:
    """The page; elements that are not closed in order fail."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    (root,) = reader.open
    return root
