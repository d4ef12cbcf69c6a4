"""Tokens to text, piece by piece: nothing is shown that a later token could change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are not yet a character


MARKS = ("<tool_call>", "</tool_call>")  # of a call: shown, even if a tokenizer counts them among its special tokens
CONTEXT = 4  # tokens before a token that decide how it is written
LONGEST = 16  # tokens that may wait to become a character; one has four bytes at most


def hidden_ids(tokenizer: Any) -> frozenset[int]:
    """The special tokens of a tokenizer, which are no part of a text, but for the marks of calls."""
    added = {token: str(each.content) for token, each in tokenizer.added_tokens_decoder.items() if each.special}
    named = dict.fromkeys(tokenizer.all_special_ids, "")
    return frozenset(token for token, text in (named | added).items() if text not in MARKS)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, all of it: cleaning up spaces would change text that was shown before."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Detokeniser:
    """The text of a growing answer.

    A token's text may depend on those before it (spaces, bytes of one character), so each step decodes the last few
    tokens twice, with and without the new one, and shows the difference once it ends with a whole character. The
    window is that of Text Generation Inference's `decode_token`.

    Args:
        tokenizer: decodes ids.
        hidden: ids that are not shown; None: `hidden_ids`.
        before: the tokens that the answer continues. Some tokenizers write no space at the beginning of a text.
    """

    def __init__(self, tokenizer: Any, hidden: frozenset[int] | None = None, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden_ids(tokenizer) if hidden is None else hidden
        self._ids = [token for token in before[-CONTEXT:] if token not in self._hidden]
        if decoded(tokenizer, self._ids).endswith(UNFINISHED):  # the answer does not end the prompt's last character
            self._ids.clear()
        self._from = 0  # where the window begins
        self._shown = len(self._ids)  # tokens whose text was shown

    def add(self, token: int) -> str:
        """The text that this token completes; empty if it is part of a character, or special."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        before, after = self._text(self._shown), self._text(len(self._ids))
        if after.endswith(UNFINISHED):
            return self._overdue(before, after)
        if len(after) <= len(before):  # it writes nothing
            self._shown = len(self._ids)
            self._from = max(self._from, self._shown - CONTEXT)
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def _overdue(self, before: str, after: str) -> str:
        """The text of all but the last of many tokens that have not become a character."""
        total = len(self._ids)
        for end in range(total - 4, total - 8, -1) if total - self._shown > LONGEST else ():
            if after.startswith(part := self._text(end)):  # else it cuts a character
                self._from, self._shown = self._shown, end
                return part[len(before) :]
        return ""

    def rest(self) -> str:
        """The text of bytes that never became a whole character."""
        before, after = self._text(self._shown), self._text(len(self._ids))
        self._from = self._shown = len(self._ids)
        return after[len(before) :]

    def _text(self, end: int) -> str:
        return decoded(self._tokenizer, self._ids[self._from : end])


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


class AnswerText:
    """The text of a growing answer, up to the first stop string.

    Args:
        detokeniser: turns its tokens into text.
        stops: end it.

    Attributes:
        length: number of its characters so far, also of those that are held back.
    """

    def __init__(self, detokeniser: Detokeniser, stops: Stops) -> None:
        self._detokeniser = detokeniser
        self._stops = stops
        self.length = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._stops.found is not None

    def add(self, token: int) -> str:
        """What can be shown after one more token."""
        text = self._detokeniser.add(token)
        self.length += len(text)
        return self._stops.add(text)

    def rest(self) -> str:
        """What was held back, when no more comes."""
        return self._stops.add(self._detokeniser.rest()) + self._stops.rest()


def doubtful(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of a text that may be the beginning of one of some strings."""
    longest = max(map(len, strings), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(string.startswith(text[-n:]) for string in strings)), 0)
