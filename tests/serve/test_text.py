"""Tokens become text without half characters, and stop strings are never shown, wherever they are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.serve.detokenise import UNFINISHED, Detokeniser, Stops
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
KNOWN = st.lists(st.integers(4, len(TOKENIZER) - 1), max_size=40)


def pieces(ids: list[int]) -> list[str]:
    text = Detokeniser(TOKENIZER)
    return [*map(text.add, ids), text.rest()]


@given(KNOWN)
def test_the_pieces_are_the_text(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_no_piece_has_half_a_character(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    shown = TOKENIZER.decode(ids, skip_special_tokens=True)
    for piece in pieces(ids)[:-1]:
        assert not piece.endswith(UNFINISHED) or UNFINISHED in shown


def test_special_tokens_are_not_shown() -> None:
    ids = TOKENIZER("ab")["input_ids"]
    assert pieces([1, *ids[:1], 2, *ids[1:]]) == ["", "a", "", "b", ""]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_end_the_text_wherever_it_is_cut(text: str, strings: list[str], data: st.DataObject) -> None:
    stops, shown, rest = Stops(strings), "", text
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        shown, rest = shown + stops.add(rest[:cut]), rest[cut:]
    shown += stops.rest()
    assert (stops.found is not None) == any(s in text for s in strings)
    if stops.found is None:
        assert shown == text
    else:
        assert text.startswith(shown + stops.found)
        assert not any(s in shown for s in strings)


@pytest.mark.parametrize(
    ("strings", "parts", "shown"),
    [
        (["END"], ["a E", "N", "x"], ["a ", "", "ENx"]),
        (["END"], ["a EN", "D b"], ["a ", ""]),
        (["b", "ab"], ["xab"], ["x"]),
        ([], ["a", "b"], ["a", "b"]),
    ],
)
def test_what_may_become_a_stop_string_waits(strings: list[str], parts: list[str], shown: list[str]) -> None:
    stops = Stops(strings)
    assert [stops.add(part) for part in parts] == shown
