"""Who goes first: terms as a table, and a queue under floods on a made-up clock."""

from __future__ import annotations

import random

import pytest

from autotune.errors import CancelledRequestError, DeadlineError
from autotune.runtime.batching.terms import AHEAD_S, RequestTerms


@pytest.mark.parametrize(
    ("terms", "now_s", "tokens", "error", "said"),
    [
        (RequestTerms(arrived_s=10), 1e9, 0, None, ""),
        (RequestTerms(deadline_s=5, arrived_s=10), 14.9, 3, None, ""),
        (RequestTerms(deadline_s=5, arrived_s=10), 15, 0, DeadlineError, "deadline of 5 s passed before its first"),
        (RequestTerms(deadline_s=0.25, arrived_s=10), 15, 3, DeadlineError, "of 0.25 s passed after 3 new tokens"),
        (RequestTerms(deadline_s=5, arrived_s=10, cancelled=True), 15, 3, CancelledRequestError, "was cancelled"),
    ],
)
def test_violated(terms: RequestTerms, now_s: float, tokens: int, error: type[Exception] | None, said: str) -> None:
    found = terms.violated(now_s, tokens)
    assert type(found) is (type(None) if error is None else error)
    assert said in str(found)


@pytest.mark.parametrize("flood", ["short", "long", "urgent", "mixed"])
def test_nobody_starves(flood: str) -> None:
    """5000 requests over 8 rows, more than can be served at once. No request waits for much that came after it.

    A request may be overtaken by one that came later only if that one is more urgent, and came at most so many seconds
    later as its priority is higher.
    """
    draw, now, rows, waiting = random.Random(flood), 0.0, 8, list[RequestTerms]()
    kinds = {"short": [(0, 4)], "long": [(0, 90)], "urgent": [(3, 12)], "mixed": [(0, 4), (0, 90), (3, 12), (-2, 30)]}
    arrivals = list[tuple[float, int, int]]()
    for n in range(5000):
        priority, tokens = draw.choice(kinds[flood]) if n % 50 else (0, 20)  # one in fifty is ordinary
        arrivals.append((arrivals[-1][0] + draw.expovariate(4) if arrivals else 0.0, priority, tokens))
    running, left, begun = list[tuple[float, int]](), dict[int, int](), list[RequestTerms]()
    arrivals.reverse()
    while arrivals or waiting or running:
        while arrivals and arrivals[-1][0] <= now:
            at, priority, tokens = arrivals.pop()
            terms = RequestTerms(priority=priority, arrived_s=at)
            left[id(terms)] = tokens
            waiting.append(terms)
        while waiting and len(running) < rows:
            first = min(waiting, key=lambda each: each.order)
            waiting.remove(first)
            begun.append(first)
            running.append((first.arrived_s, left.pop(id(first))))
        if not running:
            now = arrivals[-1][0]
            continue
        now += 0.05  # a step
        running = [(at, tokens - 1) for at, tokens in running if tokens > 1]
    assert len(begun) == 5000
    last_of = dict[int, float]()  # priority -> arrival of the latest that has begun
    for terms in begun:
        for priority, arrived_s in last_of.items():
            assert arrived_s - terms.arrived_s <= AHEAD_S * max(0, priority - terms.priority) + 1e-9
        last_of[terms.priority] = max(terms.arrived_s, last_of.get(terms.priority, 0.0))
