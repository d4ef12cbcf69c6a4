"""The options of a wrapped model, as `wrap` got them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tune.plan import Plan
    from ..tune.policy import Policy

When = Literal["background", "blocking", "manual"]
KeepOriginal = bool | Literal["parked"]


def require_place(keep_original: object) -> None:
    """Raise ValueError unless it is a `KeepOriginal`: what is only like one (1, "park") must release no weights."""
    if not (isinstance(keep_original, bool) or keep_original == "parked"):
        raise ValueError(f"keep_original must be True, False or 'parked', not {keep_original!r}")


@dataclass(frozen=True)
class Options:
    """The arguments of `wrap` that apply as long as the model is wrapped; `wrap` describes them.

    Raises:
        ValueError: an argument has a value that it does not accept.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase | None = None
    draft: PreTrainedModel | None = None
    when: When = "background"
    observe: int = 3
    cache: bool = True
    keep_original: KeepOriginal = True
    watch: float = 0.01
    progress: Callable[[str], None] | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        if self.when not in ("background", "blocking", "manual"):
            raise ValueError(f"when must be 'background', 'blocking' or 'manual', not {self.when!r}")
        require_place(self.keep_original)
        if not 0 <= self.watch <= 1:
            raise ValueError(f"watch must be a share from 0 to 1, not {self.watch}")
        if self.observe < 1:
            raise ValueError(f"observe must be at least 1, not {self.observe}")
