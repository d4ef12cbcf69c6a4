"""Tokens to text, piece by piece: nothing is shown that a later token could change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are not yet a character


class Detokeniser:
    """The text of a growing answer.

    A token's text may depend on those before it (spaces, bytes of one character), so each step decodes the last few
    tokens twice, with and without the new one, and shows the difference once it ends with a whole character. The
    window is that of Text Generation Inference's `decode_token`.

    Args:
        tokenizer: decodes ids; special tokens are not shown.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids = list[int]()
        self._from = 0  # where the window begins
        self._shown = 0  # tokens whose text was shown

    def add(self, token: int) -> str:
        """The text that this token completes; empty if it is part of a character, or special."""
        self._ids.append(token)
        before, after = self._text(self._shown), self._text(len(self._ids))
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def rest(self) -> str:
        """The text of bytes that never became a whole character."""
        before, after = self._text(self._shown), self._text(len(self._ids))
        self._from = self._shown = len(self._ids)
        return after[len(before) :]

    def _text(self, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[self._from : end], skip_special_tokens=True)
        return text


class Stops:
    """Ends a text before the first of some strings, which are never shown, nor their beginnings.

    Args:
        strings: the stop strings.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    def add(self, piece: str) -> str:
        """What can be shown now. Nothing more is shown once a stop string was found."""
        if self.found is not None:
            return ""
        self._held += piece
        ends = [(at, string) for string in self._strings if (at := self._held.find(string)) >= 0]
        if ends:
            at, self.found = min(ends)
            shown, self._held = self._held[:at], ""
            return shown
        kept = doubtful(self._held, self._strings)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def rest(self) -> str:
        """What was held back, when no more comes."""
        shown, self._held = self._held, ""
        return shown


def doubtful(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of a text that may be the beginning of one of some strings."""
    longest = max(map(len, strings), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in strings)), 0)
