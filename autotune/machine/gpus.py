"""GPU architectures by compute capability, which kernels and steps of policies require.

Source: NVIDIA, "CUDA GPUs, compute capability". 8.6 and 8.7 are Ampere, too; 10.x is Blackwell for data centres, 12.x
for desktops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hardware import Hardware

Capability = tuple[int, int]  # major, minor

# architecture -> its first and last capability
NAMES: Mapping[str, tuple[Capability, Capability]] = {
    "volta": ((7, 0), (7, 4)),
    "turing": ((7, 5), (7, 9)),
    "ampere": ((8, 0), (8, 8)),
    "ada": ((8, 9), (8, 9)),
    "hopper": ((9, 0), (9, 9)),
    "blackwell": ((10, 0), (12, 9)),
}


def capability(hardware: Hardware) -> Capability | None:
    """The compute capability of a CUDA device, or None for another device or an unknown capability."""
    if hardware.device != "cuda":
        return None
    return parse(hardware.capability)


def parse(text: str) -> Capability | None:
    """Parse "9.0" into (9, 0); None if it is not a compute capability."""
    found = re.fullmatch(r"(\d{1,2})\.(\d)", text.strip())
    return (int(found[1]), int(found[2])) if found else None


def name(of: Capability) -> str:
    """The name and number, as "hopper (9.0)", or the number alone if no architecture has it."""
    number = f"{of[0]}.{of[1]}"
    named = next((name for name, (first, last) in NAMES.items() if first <= of <= last), None)
    return f"{named} ({number})" if named else number


def too_old(hardware: Hardware, least: Capability | None, what: str) -> str | None:
    """Why a CUDA device is too old for something, or None. Always None on other devices, which have other needs.

    Args:
        hardware: the machine.
        least: the lowest compute capability that suffices; None: any.
        what: what needs it, as the subject of the sentence.
    """
    found = capability(hardware)
    if least is None or found is None or found >= least:
        return None
    return f"{what} needs compute capability {least[0]}.{least[1]} or later; this GPU is {name(found)}"
