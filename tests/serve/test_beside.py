"""Clients who share an engine: each gets what it would get alone, and none holds up, cuts off or outlives another.

Most of these are complaints of the users of other servers. Turns are counted, not timed.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from autotune.model import route
from autotune.runtime.batching.prefill import Prefill
from autotune.runtime.batching.prefixes import Prefixes
from tests.serve.engines import (
    PROMPTS,
    ROWS,
    WAIT_S,
    Client,
    counted,
    engine_of,
    needs_kernels,
    post,
    text,
    together,
    used,
    waiting,
)
from tests.serve.servers import Running, until

pytestmark = needs_kernels
LONG = [5 + n % 200 for n in range(2000)]
NEW = 40
WAITING = "waiting for a row"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with together() as found:
        yield found


@pytest.fixture(scope="module")
def alone(server: Running) -> list[str]:
    """The answer to each prompt with nothing beside it."""
    return [text(post(server, prompt, NEW)) for prompt in PROMPTS]


def test_an_answer_of_the_engine_is_what_the_original_generates(server: Running) -> None:
    model, tokenizer = route.bare(server.model), server.served.prompts.tokenizer
    clients = [Client(server, prompt, NEW, ignore_eos=False) for prompt in PROMPTS]
    for prompt, client in zip(PROMPTS, clients, strict=True):
        ids = torch.tensor([prompt])
        (found,) = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert client.rest() == tokenizer.decode(found[len(prompt) :], skip_special_tokens=True)


def running(server: Running) -> int:
    return server.served.answers.running


def test_a_newcomer_gets_its_first_token_in_the_next_turn_while_long_answers_run(server: Running) -> None:
    with counted(server) as turns:
        long = [turns.client(prompt, 500) for prompt in PROMPTS[: ROWS - 1]]
        turns.gather(len(long))
        newcomer = turns.client(PROMPTS[-1], 5)
        until(lambda: waiting(server) == 1)
        turns.take()
        assert len(newcomer.read()) == 1
        assert running(server) == ROWS
        turns.take(10)  # and the others go on
        assert [len(client.read(10)) for client in long] == [10] * len(long)


def test_a_stream_gets_a_token_between_any_two_parts_of_a_long_prompt(server: Running) -> None:
    engine = engine_of(server)
    parts = math.ceil(len(LONG) / engine.prefixes.part)
    assert parts == 16
    with counted(server) as turns:
        stream = turns.client(PROMPTS[0], 500)
        turns.take()
        stream.read(2)  # the first turn has the prompt and a step
        newcomer = turns.client([7, *LONG[1:]], 1)  # which no earlier prompt begins like
        until(lambda: waiting(server) == 1)
        for _ in range(parts - 1):
            turns.take()
            stream.read()
            assert engine._prompt is not None, "more than one part of the prompt was computed in one turn"
        turns.take()
        newcomer.read()
        assert len(stream.read()) == 1


def test_a_prompt_of_2000_tokens_beside_streams_loses_nothing(server: Running, alone: list[str]) -> None:
    expected = text(post(server, LONG, NEW))
    streams = [Client(server, prompt, NEW) for prompt in PROMPTS[: ROWS - 1]]
    found = [post(server, LONG, NEW), post(server, LONG, NEW)]
    assert [text(each) for each in found] == [expected] * 2
    assert [each.json()["usage"]["prompt_tokens"] for each in found] == [2000] * 2
    assert [stream.rest() for stream in streams] == alone[: ROWS - 1]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("when", ["decoding", "reading its prompt", WAITING])
def test_a_client_that_goes_ends_its_own_answer_alone(
    server: Running, alone: list[str], when: str, stream: bool
) -> None:
    beside = ROWS if when == WAITING else ROWS - 1
    with counted(server) as turns:
        others = [turns.client(prompt, NEW) for prompt in PROMPTS[:beside]]
        turns.gather(beside)
        leaving = turns.client([9, *LONG[1:]] if when == "reading its prompt" else PROMPTS[-1], 250, stream=stream)
        until(lambda: waiting(server) == 1)
        if when != WAITING:
            turns.take(3)
        if when == "decoding" and stream:
            leaving.read(2)
        leaving.close()
        until(lambda: running(server) == beside)
        steps = engine_of(server).counts["tokens"]
        turns.take(2)  # in the first of them it has left
        until(lambda: engine_of(server).counts["tokens"] >= steps + beside)
        assert used(server) == beside
        assert (waiting(server), engine_of(server)._prompt) == (0, None)
        turns.open()
        assert [client.rest() for client in others] == alone[:beside]


def test_answers_do_not_depend_on_what_else_runs(server: Running, alone: list[str]) -> None:
    several = [n % len(PROMPTS) for n in range(3 * len(PROMPTS))]
    clients = [Client(server, PROMPTS[n], NEW, stream=bool(n % 2)) for n in several]
    assert [client.rest() for client in clients] == [alone[n] for n in several]


def test_a_seed_draws_the_same_beside_others_and_no_seed_draws_anew(server: Running) -> None:
    warm = {"temperature": 1.5}
    expected = text(post(server, PROMPTS[0], NEW, seed=5, **warm))
    asked: list[tuple[int, int | None]] = [(0, 5), (1, None), (0, 6), (0, 5), (0, None), (0, None), (1, 5), (0, 5)]
    clients = [Client(server, PROMPTS[n], NEW, seed=seed, **warm) for n, seed in asked]
    found = [client.rest() for client in clients]
    assert [found[n] == expected for n in range(len(asked))] == [one == (0, 5) for one in asked]
    assert found[4] != found[5]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 5}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("length", [9, 128, 300])
def test_four_answers_to_a_prompt_are_the_lonely_ones_and_its_tokens_are_computed_once(
    server: Running, length: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = engine_of(server), LONG[:length]
    monkeypatch.setattr(engine, "merges", False)  # a forward for each part

    def ask(n: int, seed: dict[str, int]) -> list[Any]:
        monkeypatch.setattr(engine, "prefixes", Prefixes(engine.prefixes.part))
        found = post(server, asked, NEW, n=n, logprobs=1, **options | seed).raise_for_status().json()
        return [(choice["text"], choice["logprobs"]) for choice in found["choices"]]

    seeds: list[dict[str, int]] = [{"seed": options["seed"] + number} if options else {} for number in range(4)]
    lonely = [ask(1, seed)[0] for seed in seeds]
    before = engine.counts["prefills"]
    assert ask(4, seeds[0]) == lonely
    assert engine.counts["prefills"] - before == math.ceil(length / engine.prefixes.part)
    assert engine.prefixes.tokens_found == 3 * length


@pytest.mark.parametrize(("room", "answered"), [(None, 72), (16, 16)], ids=["all wait", "16 may wait"])
def test_a_burst_of_72_is_answered_or_refused(
    server: Running, alone: list[str], room: int | None, answered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room is not None:
        monkeypatch.setattr(engine_of(server), "most_waiting", room)
    burst = [n % len(PROMPTS) for n in range(72)]
    with counted(server) as turns:
        clients = [turns.client(PROMPTS[n], NEW, stream=bool(n % 2)) for n in burst]
        until(lambda: sum(client.has_answer for client in clients) == 72 - answered)  # refused
        until(lambda: waiting(server) == running(server) == answered)
        ready = httpx.get(f"{server.url}/readyz", timeout=WAIT_S)
        assert (ready.status_code, ready.json()["waiting"]) == (200, answered)  # a full queue is no illness
        turns.open()
        found = Counter(client.answer.status for client in clients)
        assert found == Counter({200: answered, 429: 72 - answered}) - Counter()
        for n, client in zip(burst, clients, strict=True):
            if client.answer.status == 200:
                assert client.rest() == alone[n]
            else:
                assert 1 <= int(client.answer.headers["Retry-After"]) <= 60  # by the queue and its pace
    assert [Client(server, PROMPTS[n], NEW).rest() for n in range(ROWS)] == alone[:ROWS]  # it serves on


def test_probes_and_figures_answer_while_a_prompt_is_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, advance = threading.Event(), threading.Event(), Prefill.advance

    def held(self: Prefill, variant: Any, most: int) -> Any:
        begun.set()
        assert go_on.wait(WAIT_S)
        return advance(self, variant, most)

    monkeypatch.setattr(Prefill, "advance", held)
    client = Client(server, LONG, 1)
    assert begun.wait(WAIT_S)
    try:
        for route in ("livez", "readyz", "health", "metrics", "v1/models"):
            assert httpx.get(f"{server.url}/{route}", timeout=WAIT_S).status_code == 200
        small = {"prompt": "x"}
        assert httpx.post(f"{server.url}/tokenize", json=small, timeout=WAIT_S).json()["count"] == 1
    finally:
        go_on.set()
    client.rest()
    assert len(client.tokens) == 1


def test_a_stream_that_runs_when_the_end_is_asked_for_is_whole(alone: list[str]) -> None:
    with together() as server, counted(server) as turns:
        clients = [turns.client(prompt, NEW, stream=bool(n)) for n, prompt in enumerate(PROMPTS[: ROWS + 1])]
        turns.gather(ROWS + 1)
        server.server.handle_exit(15, None)  # one still waits for a row
        assert refuses(server)
        turns.open()
        assert [client.rest() for client in clients] == alone[: ROWS + 1]
        assert all(client.last == ["[DONE]"] for client in clients[1:])


def refuses(server: Running) -> bool:
    try:
        return post(server, PROMPTS[0], 1).status_code == 503
    except httpx.TransportError:
        return True


def test_a_form_that_is_wrong_is_refused_and_hurts_nobody(server: Running, alone: list[str]) -> None:
    wrong: list[dict[str, Any]] = [
        {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}},
        {"type": "regex", "regex": "("},
        {"type": "grammar", "grammar": "start: nowhere"},
    ]
    with counted(server) as turns:
        streams = [turns.client(prompt, NEW) for prompt in PROMPTS[:ROWS]]
        until(lambda: running(server) == ROWS)
        turns.take(2)
        for form in wrong:
            answer = post(server, PROMPTS[0], NEW, response_format=form, ignore_eos=False)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == "response_format"
        turns.open()
        assert [client.rest() for client in streams] == alone[:ROWS]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_characters_of_several_tokens_come_whole(server: Running, stream: bool) -> None:
    said = "漢日本 ❤ 𝌆 é"
    form = {"type": "regex", "regex": said}
    beside = [Client(server, prompt, NEW) for prompt in PROMPTS[:2]]
    asked = Client(server, PROMPTS[2], 60, stream=stream, response_format=form, ignore_eos=False, temperature=1)
    assert asked.rest() == said
    for client in beside:
        client.rest()


@pytest.mark.parametrize("asked", [True, False])
def test_usage_comes_once_at_the_end_if_it_is_asked_for(server: Running, asked: bool) -> None:
    client = Client(server, PROMPTS[0], NEW, stream_options={"include_usage": asked})
    client.rest()
    usage = {"prompt_tokens": len(PROMPTS[0]), "completion_tokens": NEW, "total_tokens": len(PROMPTS[0]) + NEW}
    *before, done = client.last
    assert done == "[DONE]"
    assert [(each["choices"], each["usage"]) for each in before] == ([([], usage)] if asked else [])


def test_an_answer_that_breaks_off_says_so_in_its_stream(server: Running, alone: list[str]) -> None:
    with counted(server) as turns:
        late, other = turns.client(PROMPTS[0], NEW), turns.client(PROMPTS[1], NEW)
        turns.gather(2)
        late.read()
        (request,) = [each for each in engine_of(server).sequences.requests() if each.tokens > len(PROMPTS[0])][:1]
        request.terms.deadline_s = 1e-9
        turns.open()
        texts = [late.rest(), other.rest()]
        clients = [late, other]
    broken = [client for client in clients if client.last != ["[DONE]"]]
    assert len(broken) == 1
    error, done = broken[0].last
    assert (error["error"]["type"], error["error"]["code"], done) == ("timeout_error", "deadline", "[DONE]")
    assert 0 < len(broken[0].tokens) < NEW
    at = clients.index(broken[0])
    assert alone[at].startswith(texts[at])
    assert texts[1 - at] == alone[1 - at]


def test_a_step_that_fails_is_answered_by_the_original_and_no_token_comes_twice(alone: list[str]) -> None:
    with together() as server, counted(server) as turns:
        clients = [turns.client(prompt, NEW, stream=bool(n)) for n, prompt in enumerate(PROMPTS[:ROWS])]
        turns.gather(ROWS)
        clients[1].read()
        sequences = engine_of(server).sequences

        def failing() -> None:
            raise RuntimeError("no such kernel")

        sequences.logits = failing  # type: ignore[method-assign, assignment]
        turns.open()
        with pytest.warns(RuntimeWarning, match="no such kernel"):
            assert [client.rest() for client in clients] == alone[:ROWS]
        assert [len(client.tokens) for client in clients[1:]] == [NEW] * (ROWS - 1)


FIGURES = {
    "prompt_tokens_total": 2 * len(PROMPTS[0]),
    "generation_tokens_total": 2 * NEW,
    "time_to_first_token_seconds_count": 2,
    "inter_token_latency_seconds_count": 2 * (NEW - 1),
    "request_time_per_output_token_seconds_count": 2,
    "e2e_request_latency_seconds_count": 2,
    "request_prompt_tokens_sum": 2 * len(PROMPTS[0]),
    "request_generation_tokens_sum": 2 * NEW,
    "request_success_total": 2,
}


def figures(server: Running) -> Counter[str]:
    """The figures of /metrics; those of one name together."""
    found = Counter[str]()
    for line in httpx.get(f"{server.url}/metrics", timeout=WAIT_S).text.splitlines():
        if line.startswith("autotune:"):
            name, value = line.removeprefix("autotune:").rsplit(" ", 1)
            found[name.split("{")[0]] += float(value)  # type: ignore[assignment]
    return found


def test_who_runs_and_who_waits_is_told_apart(server: Running) -> None:
    with counted(server) as turns:
        clients = [turns.client(prompt, NEW) for prompt in PROMPTS[: ROWS + 2]]
        turns.gather(len(clients))
        now = figures(server)
        assert (now["num_requests_running"], now["num_requests_waiting"]) == (ROWS, 2)
        turns.open()
        for client in clients:
            client.rest()
    now = figures(server)
    assert (now["num_requests_running"], now["num_requests_waiting"]) == (0, 0)


def test_figures_have_vllms_names_and_count_what_came(server: Running) -> None:
    before = figures(server)
    for stream in (True, False):
        Client(server, PROMPTS[0], NEW, stream=stream).rest()
    after = figures(server)
    assert {name: after[name] - before[name] for name in FIGURES} == FIGURES
