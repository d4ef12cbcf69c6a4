"""Tokens become text without half characters, and stop strings are never shown, wherever they are cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from autotune.serve.detokenise import UNFINISHED, AnswerText, Detokeniser, Stops
from autotune.serve.pieces import Pieces
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


def words(*known: str, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, whose spaces are written with a mark, and which writes none at a text's beginning."""
    vocabulary = {word: number for number, word in enumerate(("<unk>", *known))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **options)


def test_no_space_is_cleaned_up_after_it_was_shown() -> None:
    tokenizer = words("is", "▁n", "'t", "▁'", "▁foo", clean_up_tokenization_spaces=True)
    for ids, text in (([1, 2, 3], "is n't"), ([1, 4, 5], "is ' foo")):
        shown = Detokeniser(tokenizer)
        assert "".join([*map(shown.add, ids), shown.rest()]) == text


def test_an_answer_that_continues_a_prompt_keeps_its_space() -> None:
    tokenizer = words("Hello", "▁world")
    assert Detokeniser(tokenizer).add(2) == "world"
    assert Detokeniser(tokenizer, before=[1, 1]).add(2) == " world"


def test_marks_of_calls_are_shown_though_they_are_special() -> None:
    tokenizer = tiny_tokenizer()
    marks = [AddedToken(mark, special=True) for mark in ("<tool_call>", "</tool_call>", "<think>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    ids = tokenizer("<think><tool_call>{}</tool_call>", add_special_tokens=False)["input_ids"]
    shown = Detokeniser(tokenizer)
    assert "".join([*map(shown.add, ids), shown.rest()]) == "<tool_call>{}</tool_call>"


@pytest.mark.parametrize("token", [2, TOKENIZER("\u20ac", add_special_tokens=False)["input_ids"][-1]])
def test_what_becomes_no_text_costs_no_more_with_time(token: int) -> None:
    """The end, said again and again, and a half of a character."""
    decoded = list[int]()

    class Counting:
        added_tokens_decoder, all_special_ids = TOKENIZER.added_tokens_decoder, TOKENIZER.all_special_ids

        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(len(ids))
            return str(TOKENIZER.decode(ids, **options))

    text = Detokeniser(Counting())
    said = "".join(text.add(token) for _ in range(500))
    assert max(decoded, default=0) < 50
    assert said + text.rest() == TOKENIZER.decode(500 * [token], skip_special_tokens=True)


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


@pytest.mark.parametrize(
    ("text", "room", "ends", "shown", "reason"),
    [
        ("axyz", 9, (), ["a", None, None, "xyz"], None),
        ("axyb", 9, (), ["a", None, None, ""], "stop"),
        ("axy", 3, (), ["a", None, "xy"], "length"),
        ("axyz", 9, ("y",), ["a", None, "x"], "stop"),
        ("axyb", 4, (), ["a", None, None, ""], "stop"),
        ("\u20acx", 3, (), [None, None, "\u20ac"], "length"),
        ("\u20ac", 2, (), [None, "\ufffd"], "length"),
    ],
)
def test_an_answer_ends_by_a_stop_string_its_end_or_its_length(
    text: str, room: int, ends: tuple[str, ...], shown: list[str | None], reason: str | None
) -> None:
    """The stop string is "xyb"."""
    ids, last = [TOKENIZER(each, add_special_tokens=False)["input_ids"] for each in (text, "".join(ends))]
    made = Pieces(AnswerText(Detokeniser(TOKENIZER), Stops(["xyb"])), last, room, None)
    found = [made.add(token) for token, _ in zip(ids, shown, strict=False)]
    assert [piece and piece.text for piece in found] == shown
    assert made.reason == reason
    assert all(piece is None or piece.reason is None for piece in found[:-1])
    assert found[-1] is not None
    assert (found[-1].reason, found[-1].tokens) == (reason, len(shown))
    if reason is None:
        assert (made.rest().text, made.reason) == ("", "stop")
