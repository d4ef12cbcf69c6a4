"""A quick load on a server: how long its clients wait, by their number or by the rate at which they come."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

WORDS = ("tide", "moon", "yeast", "rust", "chess", "fugue", "heap", "salt", "river", "glass", "north", "paper")
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """What is asked.

    Args:
        url: the server, without a path.
        model: its name there.
        words: of a prompt, drawn anew for each request; about a token each.
        tokens: new tokens of each answer.
        key: API key, or None.
        temperature: 0: the likeliest token each time.
        top_p: tokens are drawn from the likeliest ones that have so much of the probability together.
        seed: of prompts and arrivals.
    """

    url: str
    model: str
    words: int = 64
    tokens: int = 32
    key: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def body(self, draw: random.Random) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": " ".join(draw.choices(WORDS, k=self.words)),
            "max_tokens": self.tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Waited:
    """How long one client waited.

    Args:
        first_s: for the first token.
        gaps_s: between two events of its stream.
        tokens: of its answer.
        error: why it got none, or None.
    """

    first_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        label: how many clients, or how many a second.
        waited: of each request.
        seconds: from the first request to the last answer.
    """

    label: str
    waited: Sequence[Waited]
    seconds: float

    @property
    def cells(self) -> list[str]:
        good = [each for each in self.waited if each.error is None]
        firsts, gaps = [each.first_s for each in good], [gap for each in good for gap in each.gaps_s]
        errors = Counter(each.error for each in self.waited if each.error is not None)
        return [
            self.label,
            str(len(self.waited)),
            *(f"{1e3 * percentile(firsts, p):.0f}" for p in (50, 99)),
            *(f"{1e3 * percentile(gaps, p):.1f}" for p in (50, 99)),
            f"{sum(each.tokens for each in good) / self.seconds:.0f}",
            ", ".join(f"{count} {what}" for what, count in errors.items()) or "0",
        ]


HEADER = ("clients", "requests", "TTFT p50, ms", "p99", "between tokens p50, ms", "p99", "tokens/s", "errors")


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile of some values; 0 of none."""
    return float(np.percentile(values, percent)) if values else 0.0


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


async def model_of(url: str, key: str | None) -> str:
    """The name of the model that a server serves.

    Raises:
        httpx.HTTPError: it does not answer, or refuses.
    """
    async with _client(key) as client:
        answer = await client.get(f"{url}/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])


def refusal(answer: httpx.Response) -> str:
    """The status of an error, with what the server says about it if it says so as OpenAI's do."""
    try:
        return f"HTTP {answer.status_code}: {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"


async def steady(load: Load, clients: int, each: int) -> Row:
    """So many clients that ask one request after the other (a closed loop)."""

    async def ask(client: httpx.AsyncClient, number: int) -> list[Waited]:
        draw = random.Random(f"{load.seed} {clients} {number}")  # noqa: S311 - prompts
        return [await request(client, load, draw) for _ in range(each)]

    return await _timed(load, f"{clients}", lambda client: [ask(client, number) for number in range(clients)])


async def arriving(load: Load, rate: float, seconds: float) -> Row:
    """Clients that come at random times, so many a second, whether or not others have their answers (an open loop)."""
    draw = random.Random(f"{load.seed} {rate}")  # noqa: S311 - arrivals
    times, now = list[float](), draw.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += draw.expovariate(rate)

    async def ask(client: httpx.AsyncClient, at: float, seed: str) -> list[Waited]:
        await asyncio.sleep(at)
        return [await request(client, load, random.Random(seed))]  # noqa: S311 - a prompt

    return await _timed(
        load, f"{rate:g} a second", lambda client: [ask(client, at, f"{load.seed} {at}") for at in times or [0.0]]
    )


async def request(client: httpx.AsyncClient, load: Load, draw: random.Random) -> Waited:
    """One streamed request."""
    began = time.monotonic()
    moments, tokens = list[float](), 0
    try:
        async with client.stream("POST", f"{load.url}/v1/completions", json=load.body(draw)) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                return Waited(error=f"HTTP {answer.status_code}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Waited(error="broken off")
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                elif event["choices"]:
                    moments.append(time.monotonic())
    except httpx.HTTPError as error:
        return Waited(error=type(error).__name__)
    gaps = tuple(b - a for a, b in pairwise(moments))
    return Waited(moments[0] - began if moments else 0.0, gaps, tokens)


async def _timed(
    load: Load, label: str, asked: Callable[[httpx.AsyncClient], Sequence[Awaitable[list[Waited]]]]
) -> Row:
    async with _client(load.key) as client:
        began = time.monotonic()
        found = await asyncio.gather(*asked(client))
        return Row(label, [each for part in found for each in part], time.monotonic() - began)


def _client(key: str | None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(limits=limits, headers=headers, timeout=TIMEOUT_S)
