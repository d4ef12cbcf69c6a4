"""API keys: where they come from, and which can be used at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import SettingsError

VARIABLE = "AUTOTUNE_API_KEY"  # of the environment: other users of the machine do not see it among its processes
KEY = re.compile(r"[!-~]+")  # what a header can carry unchanged: visible ASCII characters


def checked(keys: Iterable[str], source: str) -> tuple[str, ...]:
    """Return the keys if each can be sent in a header.

    Args:
        keys: any of which opens every route.
        source: where they come from, for the message, which never quotes a key.

    Raises:
        SettingsError: a key is empty, or has other characters than visible ASCII ones.
    """
    found = tuple(keys)
    for key in found:
        if not key:
            raise SettingsError(f"the API key of {source} is empty (an unset variable?); give a key, or leave it out")
        if not KEY.fullmatch(key):
            raise SettingsError(
                f"the API key of {source} has characters that a header cannot carry; expected visible ASCII "
                "characters without spaces"
            )
    return found


def given(arguments: Iterable[str], file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys that a server was given; none: no key is asked for.

    Args:
        arguments: of the command line.
        file: a key a line; empty lines are skipped.
        environment: whose variable `AUTOTUNE_API_KEY` counts where arguments and file are not given.

    Raises:
        SettingsError: a key cannot be used, or the file cannot be read or holds none.
    """
    keys = checked(arguments, "--api-key")
    if file is not None:
        keys += _of_file(file)
    if keys or VARIABLE not in environment:
        return keys
    return checked([environment[VARIABLE]], f"${VARIABLE}")


def _of_file(file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise SettingsError(f"--api-key-file {file} cannot be read: {error}") from error
    if not any(lines):
        raise SettingsError(f"--api-key-file {file} holds no key; expected one a line")
    return checked((line for line in lines if line), f"--api-key-file {file}")
