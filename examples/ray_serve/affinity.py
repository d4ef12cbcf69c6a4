"""Which replica a request goes to: requests that begin alike to one, unless it is much busier. Pure.

A replica keeps the keys and values of prompts' beginnings, in parts of 128 tokens. A request gains from them only where
the request before it went. So its beginning decides: the replicas are ranked by a hash of it and of their names
(rendezvous hashing: Thaler and Ravishankar, IEEE/ACM Transactions on Networking 1998). A replica that comes or goes
moves only its own share of the beginnings, and routers agree without talking to each other.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

TOKENS = 128  # of a beginning: the part of a prompt that a replica keeps
CHARACTERS = 4 * TOKENS  # about as many tokens of English; a shorter text is not kept, so it need not be found


def beginning(body: bytes) -> str | None:
    """Return what the prompt of a completion or chat begins with, hashed; None if it is too short to be kept.

    Args:
        body: JSON, as a client sent it. Anything else has no beginning.
    """
    try:
        found = json.loads(body, parse_int=_integer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    prompt = found.get("messages", found.get("prompt"))
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        first: Any = prompt[:TOKENS] if len(prompt) > TOKENS else None
    else:
        text = prompt if isinstance(prompt, str) else json.dumps([found.get("tools"), prompt])
        first = text[:CHARACTERS] if len(text) > CHARACTERS else None
    return None if first is None else _hash(json.dumps(first))


def _integer(text: str) -> int:
    """Read an integer. While the scanner calls Python, other threads get their turns; by itself it holds the GIL."""
    return int(text)


def ranked(key: str | None, busy: Mapping[str, int], spare: int) -> list[str]:
    """Return the replicas for a request, the best one first.

    Args:
        key: of the request's beginning; None: the least busy replica is the best.
        busy: replica -> number of its requests.
        spare: by how many requests the beginning's own replica may be busier than the least busy one.
    """
    by_load = sorted(random.sample(sorted(busy), len(busy)), key=lambda name: busy[name])  # ties at random
    if key is None or not busy:
        return by_load
    most = busy[by_load[0]] + spare
    home = max((name for name in busy if busy[name] <= most), key=lambda name: _hash(f"{key} {name}"))
    return [home, *(name for name in by_load if name != home)]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
