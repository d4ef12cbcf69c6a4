"""Draw charts as inline SVG with matplotlib, without a display and without scripts.

Colours are placeholders that become the page's CSS variables, so that one drawing fits a light page, a dark page and
paper. Every chart is drawn twice, for a wide page and for a phone; the style sheet shows one. Text stays text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ...errors import PackageError
from ...machine import forking
from .elements import Html, joined, printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Figure", bool], None]  # fills a figure; the flag says whether it is narrow

WIDTHS = {"wide": 720, "narrow": 344}  # points; a point is a pixel of the page
TEXT = 11.5  # font size in points

# placeholder -> CSS variable
INK, MUTED, LINE, SOFT, PANEL = "#010101", "#010102", "#010103", "#010104", "#010105"
BEFORE, AFTER, GOOD, BAD, DOUBT = "#010106", "#010107", "#010108", "#010109", "#01010a"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    SOFT: "soft",
    PANEL: "panel",
    BEFORE: "before",
    AFTER: "after",
    GOOD: "good",
    BAD: "bad",
    DOUBT: "doubt",
}
TONES = {"accepted": GOOD, "rejected": BAD, "error": BAD, "inconclusive": DOUBT}
STYLE: dict[str, Any] = {
    "font.size": TEXT,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": TEXT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": SOFT,
    "grid.linewidth": 1,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "path.simplify": False,
}
COLOUR = re.compile("#0101[0-9a-f]{2}")
FONT = re.compile(r"font-family:[^;]*;?")
TIP = "tip:"

_settings = forking.lock()  # held while matplotlib's settings and Python's warning filters are those of a chart


def chart(draw: Draw, description: str, *, height: float, narrow_height: float | None = None) -> Html:
    """Draw a chart for every width.

    Args:
        draw: fills a figure of matplotlib's object interface; called once per width.
        description: text for readers who cannot see the chart.
        height: height at the full width, in points.
        narrow_height: height on a phone, in points; by default the same.

    Raises:
        PackageError: matplotlib is not installed.
    """
    heights = {"wide": height, "narrow": narrow_height or height}
    return joined(_svg(draw, description, name, heights[name]) for name in WIDTHS)


def panels(sheet: Figure, rows: Collection[Sequence[Any]], narrow: bool) -> list[Axes]:
    """Make a panel for each list of rows: side by side or, if `narrow`, one above the other, as high as its rows."""
    if narrow:
        return list(sheet.subplots(len(rows), 1, squeeze=False, height_ratios=list(map(len, rows))).flat)
    return list(sheet.subplots(1, len(rows), squeeze=False).flat)


def tip(artist: Artist, text: str) -> None:
    """Set the text that is shown while a pointer is on `artist`."""
    artist.set_gid(TIP + " ".join(text.split()))


def _svg(draw: Draw, description: str, name: str, height: float) -> Html:
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageError("the HTML report's charts need matplotlib: pip install 'matplotlib>=3.10'") from error
    written = io.BytesIO()
    own = {"svg.hashsalt": f"{name} {description}"}  # makes element ids unique on the page
    with _settings, style.context(["default", STYLE, own]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib warns of characters that its font lacks; the page's may have them
        figure = Figure(figsize=(WIDTHS[name] / 72, height / 72), dpi=72)
        draw(figure, name == "narrow")
        figure.savefig(written, format="svg")
    root = ElementTree.fromstring(written.getvalue())  # noqa: S314  # the input is matplotlib's output
    _tidy(root)
    root.attrib = {
        "class": f"chart {name}",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": printable(description),
    }
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _tidy(root: ElementTree.Element) -> None:
    """Adapt a drawing to the page: remove unused ids and all fonts, and replace colours by the page's variables."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _plain(child.tag) in ("metadata", "style"):
                parent.remove(child)
    whole = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', whole))
    for node in list(root.iter()):
        node.tag = _plain(node.tag)
        node.attrib = {_plain(key): value for key, value in node.attrib.items()}
        if (name := node.attrib.get("id", "")) not in used:
            node.attrib.pop("id", None)
        if name.startswith(TIP):
            title = ElementTree.Element("title")
            title.text = name.removeprefix(TIP)
            node.insert(0, title)
        if "style" in node.attrib:
            node.attrib["style"] = COLOUR.sub(_variable, FONT.sub("", node.attrib["style"]))


def _variable(found: re.Match[str]) -> str:
    return f"var(--{VARIABLES[found[0]]})"


def _plain(name: str) -> str:
    """Return a name without its namespace, which inline SVG in HTML does not need."""
    return name.rpartition("}")[2]
