"""The library releases that autotune was tested with, and which installed releases are not among them."""

from __future__ import annotations

from collections.abc import Mapping

from .hardware import library_versions

# Minor releases with which all tests, or the suite of `make test-matrix`, passed. A patch release counts as its minor.
TESTED: Mapping[str, tuple[str, ...]] = {
    "transformers": ("4.57", "5.0", "5.5", "5.10", *(f"5.{minor}" for minor in range(17, 25))),
    "torch": ("2.13", "2.14"),
    "accelerate": ("1.14", "1.15"),
}


def minor(version: str) -> str:
    """Shorten a version to its first two numbers: "5.24.0" -> "5.24"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def untested(installed: Mapping[str, str] | None = None) -> dict[str, str]:
    """The libraries whose installed version is not in the tested table, with that version.

    Args:
        installed: library -> version; default: what is installed here.
    """
    found = library_versions() if installed is None else installed
    return {name: found[name] for name in TESTED if name in found and minor(found[name]) not in TESTED[name]}


def known(name: str) -> str:
    """The tested releases of a library in words: "5.0, 5.5 and 5.17 to 5.24"."""
    runs: list[list[str]] = []
    for release in TESTED[name]:
        major, number = map(int, release.split("."))
        last = tuple(map(int, runs[-1][-1].split("."))) if runs else None
        if last == (major, number - 1):
            runs[-1].append(release)
        else:
            runs.append([release])
    said = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
