"""What served before another plan was adopted, to go back to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.revision import Revision
    from ..runtime.variant import Variant
    from ..tune.tuned import Tuned
    from .status import State


@dataclass(frozen=True)
class Former:
    """What served before `Handle.adopt`. It keeps its variant's weights in memory.

    Args:
        tuned: the outcome of tuning; None: nothing was tuned.
        active: the variant that served; None: the original.
        revision: what the model was when it was tuned.
        state, detail: as in `Status`.
        is_adopted: whether its plan was adopted, too.
    """

    tuned: Tuned | None
    active: Variant | None
    revision: Revision | None
    state: State
    detail: str
    is_adopted: bool
