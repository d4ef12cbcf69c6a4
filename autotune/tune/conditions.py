"""Parses conditions of a policy's steps on numbers: "hopper", ">= 8.0, < 9.0", ">= 3e9"."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import nearest
from ..machine import gpus

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_BOUND = re.compile(r"(>=|<=|>|<)\s*([\w.+-]+)")


@dataclass(frozen=True)
class Range:
    """Values between bounds.

    Args:
        text: the range as it was written.
        bounds: pairs of operator and number; an admitted value satisfies all of them.
    """

    text: str
    bounds: tuple[tuple[str, Any], ...]

    def admits(self, value: Any) -> bool:
        return all(OPERATORS[sign](value, bound) for sign, bound in self.bounds)

    def __str__(self) -> str:
        return self.text


def of_numbers(text: str) -> Range:
    """Parse a range of numbers: ">= 3e9", or ">= 1e9, < 3e9".

    Raises:
        ValueError: the text is not a range, or no number is in it.
    """
    return _range(text, _number, "a number such as 3e9")


def of_capabilities(text: str) -> Range:
    """Parse a range of compute capabilities: a name ("hopper"), a number ("9.0"), or bounds (">= 8.0, < 9.0").

    Raises:
        ValueError: the text is not a range; the message names the nearest spelling.
    """
    if (named := gpus.NAMES.get(text.strip().lower())) is not None:
        return Range(text, ((">=", named[0]), ("<=", named[1])))
    if (exact := gpus.parse(text)) is not None:
        return Range(text, ((">=", exact), ("<=", exact)))
    if not text.lstrip().startswith((">", "<")):
        hint = nearest(text, gpus.NAMES)
        names = ", ".join(gpus.NAMES)
        raise ValueError(f"unknown architecture {text!r}{hint}; known: {names}, a capability (9.0) or bounds (>= 8.0)")
    return _range(text, gpus.parse, "a compute capability such as 8.0")


def _range(text: str, parse: Callable[[str], Any], expected: str) -> Range:
    bounds = []
    for part in text.split(","):
        found = _BOUND.fullmatch(part.strip())
        value = parse(found[2]) if found else None
        if found is None or value is None:
            raise ValueError(f"{part.strip()!r} is not a bound; expected >=, >, <= or < and {expected}")
        bounds.append((found[1], value))
    lower = [(value, sign) for sign, value in bounds if sign in (">", ">=")]
    upper = [(value, sign) for sign, value in bounds if sign in ("<", "<=")]
    for low, at_least in lower:
        for high, at_most in upper:
            if low > high or (low == high and (at_least, at_most) != (">=", "<=")):
                raise ValueError(f"nothing is within {text!r}")
    return Range(text, tuple(bounds))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
