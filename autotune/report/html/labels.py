"""Write names beside points so that they cover neither one another nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from .drawing import INK, LINE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # right of the point is preferred
DISTANCES = (8.0, 16.0, 28.0, 42.0)  # distances to try between a name and its point, in points
FAR = 16.0  # distance in points from which a line connects the name with its point
POINT = 5.0  # half the width of the square that a drawn point covers, in points


class Box(NamedTuple):
    """A rectangle; the unit is points."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> Box:
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.top - self.bottom)

    def shared(self, other: Box) -> float:
        """Return the area that both cover, in square points."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0


def write(
    axes: Axes,
    names: Sequence[tuple[float, float, str]],
    *,
    avoid: Sequence[tuple[float, float]] = (),
    clear_of: Sequence[Text] = (),
) -> None:
    """Write each name as near to its point as there is room.

    Args:
        axes: the axes to write on; the layout must be final.
        names: x, y and text, in data coordinates.
        avoid: further points that must stay uncovered.
        clear_of: texts that are drawn already and must stay uncovered.
    """
    room = Box(*axes.get_window_extent().extents)
    points = axes.transData.transform([*((x, y) for x, y, _ in names), *avoid])
    taken = [Box.around(x, y, 2 * POINT, 2 * POINT) for x, y in points.tolist()]
    taken += [Box(*text.get_window_extent().extents) for text in clear_of]
    for (x, y, name), centre in zip(names, points.tolist(), strict=False):
        text = axes.text(0, 0, name, transform=None, fontsize=TEXT - 1, color=INK, va="center", ha="center")
        size = text.get_window_extent()
        places = list(product(DISTANCES, SIDES))
        offers = [_beside(centre, size.width, size.height, side, away) for away, side in places]
        costs = [_cost(offer, taken, room) + 0.01 * index for index, offer in enumerate(offers)]
        best = costs.index(min(costs))
        taken.append(offers[best])
        text.set_position(offers[best].middle)
        if places[best][0] >= FAR:
            end = axes.transData.inverted().transform(offers[best].middle)
            axes.plot([x, end[0]], [y, end[1]], color=LINE, linewidth=0.8, zorder=1, scalex=False, scaley=False)


def _beside(centre: Sequence[float], width: float, height: float, side: tuple[int, int], away: float) -> Box:
    x, y = centre[0] + side[0] * (away + width / 2), centre[1] + side[1] * (away + height / 2)
    return Box.around(x, y, width, height)


def _cost(box: Box, taken: Sequence[Box], room: Box) -> float:
    """Return the area that the box would cover, plus ten times its area outside the axes, in square points."""
    return sum(box.shared(other) for other in taken) + 10 * (box.area - box.shared(room))
