"""Format numbers for people. All other code keeps SI units and fractions."""

from __future__ import annotations

from math import isfinite
from typing import TypeGuard

MISSING = "-"


def known(value: float | None) -> TypeGuard[float]:
    """Return whether there is a figure to show."""
    return value is not None and isfinite(value)


def significant(value: float, digits: int = 3) -> str:
    """Format with `digits` significant digits, never in scientific notation: 0.0123, 1.23, 12.3, 1234."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    leading_zeros = (
        0 if whole else len(f"{abs(value):.12f}".split(".")[1]) - len(f"{abs(value):.12f}".split(".")[1].lstrip("0"))
    )
    return f"{value:.{max(0, digits - whole + leading_zeros)}f}"


def milliseconds(ms: float | None) -> str:
    """Format milliseconds without the unit, for columns with the unit in the heading: 9.87, 123, 0.012."""
    return significant(ms) if known(ms) else MISSING


def duration(seconds: float | None) -> str:
    """Format a duration: 0.4 s, 42 s, 5 min, 5 min 10 s, 1 h 2 min."""
    if not known(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    large, small, names = (
        (whole // 60, whole % 60, ("min", "s")) if whole < 3600 else (whole // 3600, whole % 3600 // 60, ("h", "min"))
    )
    return f"{large} {names[0]} {small} {names[1]}" if small else f"{large} {names[0]}"


def scaled(value: float | None, unit: str) -> str:
    """Format with a decimal prefix: 538 MB, 34.0 GB/s, 420 GFLOP/s."""
    if not known(value):
        return MISSING
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{significant(value / power)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def count(value: float | None) -> str:
    """Format a number of parameters or tokens: 135 M, 7.24 B, 812."""
    if not known(value):
        return MISSING
    for power, suffix in ((1e9, " B"), (1e6, " M"), (1e4, "")):
        if abs(value) >= power:
            return f"{significant(value / power)}{suffix}" if suffix else f"{value:,.0f}"
    return f"{value:.0f}"


def ratio(value: float | None) -> str:
    """Format a speed-up: 2.51x, 12.5x."""
    if not known(value):
        return MISSING
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def interval(low: float | None, high: float | None) -> str:
    """Format an interval of speed-ups: 2.40-2.63x; empty if there is no interval."""
    return f"{ratio(low)[:-1]}-{ratio(high)}" if known(low) and known(high) else ""


def percent(fraction: float | None, digits: int = 0) -> str:
    """Format a fraction in percent: 45 %."""
    return f"{100 * fraction:.{digits}f} %" if known(fraction) else MISSING


def change(before: float | None, after: float | None) -> str:
    """Format the change from one figure to another: -44 %."""
    if not known(before) or not known(after) or before <= 0:
        return MISSING
    relative = round(100 * (after / before - 1))
    return f"{relative:+d} %" if relative else "0 %"


def divergence(nats: float | None) -> str:
    """Format a KL divergence with two significant digits: 0.0017."""
    if not known(nats):
        return MISSING
    return significant(nats, 2) if abs(nats) >= 1e-5 else f"{nats:.0e}" if nats else "0"
