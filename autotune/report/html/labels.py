"""Names beside points, where they cover neither one another nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from .drawing import INK, LINE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # right first, as one reads
DISTANCES = (8.0, 16.0, 28.0, 42.0)  # points
FAR = 16.0  # from here on a line leads to the point
POINT = 5.0  # half the width of what a point covers


def write(
    axes: Axes,
    names: Sequence[tuple[float, float, str]],
    *,
    avoid: Sequence[tuple[float, float]] = (),
    clear_of: Sequence[Text] = (),
) -> None:
    """Write each name as near to its point as there is room.

    Args:
        axes: where; its layout must be final.
        names: x, y and text, in data coordinates.
        avoid: further points that must stay uncovered.
        clear_of: texts that are there already.
    """
    from matplotlib.transforms import Bbox

    to_pixels, room = axes.transData.transform, axes.get_window_extent()
    points = (*((x, y) for x, y, _ in names), *avoid)
    centres = [(float(x), float(y)) for x, y in map(to_pixels, points)]
    taken = [Bbox.from_extents(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in centres]
    taken += [text.get_window_extent() for text in clear_of]
    for (x, y, name), centre in zip(names, centres, strict=False):
        text = axes.text(0, 0, name, transform=None, fontsize=TEXT - 1, color=INK, va="center", ha="center")
        size = text.get_window_extent()
        offers = [_beside(centre, size, side, away) for away, side in product(DISTANCES, SIDES)]
        costs = [_covered(offer, taken, room) + 0.01 * index for index, offer in enumerate(offers)]
        best = min(range(len(offers)), key=lambda index: costs[index])
        box = offers[best]
        taken.append(box)
        middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        text.set_position(middle)
        if DISTANCES[best // len(SIDES)] >= FAR:
            end = axes.transData.inverted().transform(middle)
            axes.plot([x, end[0]], [y, end[1]], color=LINE, linewidth=0.8, zorder=1, scalex=False, scaley=False)


def _beside(centre: tuple[float, float], size: Bbox, side: tuple[int, int], away: float) -> Bbox:
    from matplotlib.transforms import Bbox

    x = centre[0] + side[0] * (away + size.width / 2)
    y = centre[1] + side[1] * (away + size.height / 2)
    return Bbox.from_extents(x - size.width / 2, y - size.height / 2, x + size.width / 2, y + size.height / 2)


def _covered(box: Bbox, taken: Sequence[Bbox], room: Bbox) -> float:
    """Area, square points, that would be covered or lie outside."""
    from matplotlib.transforms import Bbox

    shared = sum(both.width * both.height for other in taken if (both := Bbox.intersection(box, other)) is not None)
    inside = Bbox.intersection(box, room)
    outside = box.width * box.height - (inside.width * inside.height if inside is not None else 0.0)
    return shared + 10 * outside
