"""Requests that begin alike go to one replica of the Ray example, unless it is much busier. No Ray is needed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from examples.ray_serve.affinity import CHARACTERS, TOKENS, beginning, ranked

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 40}
LONG = "word " * CHARACTERS
IDS = list(range(TOKENS))


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [SYSTEM, *({"role": "user", "content": content} for content in contents)], **fields}


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (chat("Why is the sky blue?"), chat("What is rust?"), True),
        (chat("a"), chat("a", "b"), True),  # the next turn of a chat
        (chat("a"), chat("a", model="tiny", temperature=0.5, stream=True), True),
        (chat("a"), chat("a", tools=[{"type": "function"}]), False),  # tools come first in a template
        ({"prompt": LONG + "a"}, {"prompt": LONG + "b"}, True),
        ({"prompt": LONG}, {"prompt": "another " + LONG}, False),
        ({"prompt": [*IDS, 5]}, {"prompt": [*IDS, 6, 7]}, True),
        ({"prompt": [0, *IDS]}, {"prompt": [1, *IDS]}, False),
    ],
    ids=str,
)
def test_prompts_that_begin_alike_have_one_key(one: dict[str, Any], other: dict[str, Any], alike: bool) -> None:
    keys = [beginning(json.dumps(body).encode()) for body in (one, other)]
    assert None not in keys
    assert (keys[0] == keys[1]) == alike


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"prompt": null}',
        b'{"prompt": ""}',
        b'{"prompt": "short"}',
        json.dumps({"prompt": IDS}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "short"}]}).encode(),
    ],
    ids=lambda body: body[:20],
)
def test_what_is_too_short_to_be_kept_or_no_prompt_has_no_key(body: bytes) -> None:
    assert beginning(body) is None


NAMES = [f"replica {n}" for n in range(4)]


def homes(names: list[str]) -> dict[str, str]:
    return {f"{n}": ranked(f"{n}", dict.fromkeys(names, 0), 8)[0] for n in range(400)}


def test_beginnings_are_shared_out_and_stay_when_a_replica_goes() -> None:
    before = homes(NAMES)
    assert before == homes(NAMES)
    assert min(Counter(before.values()).values()) > 60
    after = homes(NAMES[1:])
    assert all(after[key] == home for key, home in before.items() if home != NAMES[0])


def test_a_replica_that_is_much_busier_is_spared() -> None:
    home = ranked("key", dict.fromkeys(NAMES, 0), 8)[0]
    assert ranked("key", dict.fromkeys(NAMES, 0) | {home: 8}, 8)[0] == home
    second = ranked("key", dict.fromkeys(NAMES, 0) | {home: 9}, 8)[0]
    assert second != home
    assert ranked("key", dict.fromkeys(NAMES, 5) | {home: 13}, 8)[0] == home
    assert ranked("key", dict.fromkeys(NAMES, 0) | {home: 9}, 8)[0] == second  # a flood has a second home


def test_a_flood_of_one_beginning_is_spread() -> None:
    busy = dict.fromkeys(NAMES, 0)
    for _ in range(100):
        busy[ranked("key", busy, 8)[0]] += 1
    assert sum(busy.values()) == 100
    assert max(busy.values()) - min(busy.values()) <= 9


def test_without_a_key_the_least_busy_replica_is_asked_first() -> None:
    order = ranked(None, {"a": 3, "b": 1, "c": 2}, 8)
    assert order == ["b", "c", "a"]
    assert {ranked(None, {"a": 0, "b": 0}, 8)[0] for _ in range(64)} == {"a", "b"}
    assert ranked("key", {}, 8) == []
