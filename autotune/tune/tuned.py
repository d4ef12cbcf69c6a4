"""The outcome of tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..report import Report
    from ..runtime.variant import Variant
    from .plan import Plan


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning.

    Args:
        variant: the variant that should serve; without transforms it is the original.
        verdict: one sentence with the numbers that decided, or with what could not be tried.
        doubt: why the outcome "keep the original" is not saved as a plan, or None if the outcome is saved.
        noisy: whether noise or a busy machine may have hidden a gain.
    """

    variant: Variant
    plan: Plan
    report: Report
    verdict: str
    doubt: str | None = None
    noisy: bool = False
