"""Each sampling option over HTTP does what the same option of `generate` does, with the engine and without it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from transformers import LogitsProcessorList

from autotune.live.handle import Handle
from tests.models import EOS, PAD, VOCABULARY, tiny
from tests.serve.engines import (
    PROMPTS,
    ROWS,
    Client,
    ask,
    counted,
    needs_kernels,
    post,
    text,
    together,
    waiting,
)
from tests.serve.servers import Running, running, until

NEW = 48
PROMPT = PROMPTS[0]
WARM = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
SEED = 11


@pytest.fixture(scope="module", params=["plain", pytest.param("together", marks=needs_kernels)])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with (together if request.param == "together" else running)() as found:
        yield found


def penalised(presence: float = 0.0, frequency: float = 0.0) -> dict[str, Any]:
    """OpenAI's penalties, which `generate` lacks, by their definition."""

    def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = ids[0, len(PROMPT) :].tolist()
        changed = scores.clone()
        for token in set(answer):
            changed[0, token] -= presence + frequency * answer.count(token)
        return changed

    return {"logits_processor": LogitsProcessorList([change])}


def biased(bias: dict[int, float]) -> dict[str, Any]:
    return {"sequence_bias": {(token,): value for token, value in bias.items()}}


COLD, GREEDY = {"temperature": 0.0}, {"do_sample": False}
# option over HTTP, and in `generate`
SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 2.0}, {"temperature": 2.0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 3}, {"top_k": 3}),
    ({"min_p": 0.3}, {"min_p": 0.3}),
    (COLD, GREEDY),
]
SCORES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 3.0}, {"repetition_penalty": 3.0}),
    ({"presence_penalty": 2.0}, penalised(presence=2.0)),
    ({"frequency_penalty": 2.0}, penalised(frequency=2.0)),
    ({"presence_penalty": -2.0, "frequency_penalty": 1.0}, penalised(-2.0, 1.0)),
    ({"logit_bias": {"70": 4.0, "80": 4.0}}, biased({70: 4.0, 80: 4.0})),
]


@pytest.fixture(scope="module")
def warm(server: Running) -> str:
    """The answer with nothing but a seed and a temperature of 1."""
    return drawn(server, {})


def drawn(server: Running, options: dict[str, Any], seed: int = SEED) -> str:
    """What a submitted request answers with options of `generate`."""
    asked = {"eos_token_id": [VOCABULARY], "pad_token_id": PAD, "max_new_tokens": NEW, **WARM, **options}
    if not asked["do_sample"]:
        asked = {name: value for name, value in asked.items() if name not in ("temperature", "top_k", "top_p")}
    ids = server.model.autotune.submit(PROMPT, seed=seed, **asked).result(60)[0, len(PROMPT) :]
    return decoded(server, ids.tolist())


def decoded(server: Running, ids: list[int]) -> str:
    return str(server.served.prompts.tokenizer.decode(ids, skip_special_tokens=True))


def served(server: Running, **options: Any) -> str:
    return text(post(server, PROMPT, NEW, **{"temperature": 1.0, "seed": SEED, **options}))


@pytest.mark.parametrize(("over_http", "options"), SAMPLING + SCORES, ids=lambda value: ",".join(value))
def test_an_option_does_what_it_does_in_generate(
    server: Running, warm: str, over_http: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = drawn(server, options)
    assert expected != warm, "the option has no effect that could be seen"
    assert served(server, **over_http) == expected


@pytest.mark.parametrize(("over_http", "options"), SCORES, ids=lambda value: ",".join(value))
def test_an_option_does_it_to_the_likeliest_tokens_too(
    server: Running, over_http: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = drawn(server, options | GREEDY)
    assert expected != drawn(server, GREEDY), "the option has no effect that could be seen"
    assert served(server, **over_http | COLD) == expected


def test_options_that_say_nothing_change_nothing(server: Running, warm: str) -> None:
    assert served(server) == warm
    assert served(server, top_k=-1, top_p=1, min_p=0, repetition_penalty=1, logit_bias={"70": 0}) == warm


def test_a_seed_is_generates_and_its_absence_is_none(server: Running, warm: str) -> None:
    assert served(server, seed=SEED + 1) == drawn(server, {}, SEED + 1) != warm
    assert len({served(server, seed=None) for _ in range(3)}) == 3


def test_answers_to_one_prompt_are_those_of_the_seeds_that_follow(server: Running) -> None:
    body = ask(PROMPT, NEW, temperature=1.0, seed=SEED, n=3)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        extra = {"ignore_eos": body.pop("ignore_eos")}
        got = client.completions.create(model="tiny", **body, extra_body=extra)
    assert [choice.text for choice in got.choices] == [drawn(server, {}, SEED + number) for number in range(3)]
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(PROMPT), 3 * NEW)


@pytest.mark.parametrize("several", [False, True], ids=["one string", "the first of several"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_ends_before_its_stop_string(server: Running, warm: str, stream: bool, several: bool) -> None:
    at = next(
        at
        for at in range(4, len(warm) - 2)
        if warm.index(warm[at : at + 2]) == at and "\ufffd" not in warm[at : at + 2]
    )
    stop = warm[at : at + 2]
    options = {"temperature": 1.0, "seed": SEED, "stop": ["never said", stop, warm[-2:]] if several else stop}
    if stream:
        assert Client(server, PROMPT, NEW, **options).rest() == warm[:at]
        return
    answer = post(server, PROMPT, NEW, **options)
    assert text(answer) == warm[:at]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert 0 < answer.json()["usage"]["completion_tokens"] < NEW


@pytest.mark.parametrize(("asked", "tokens"), [(None, 16), (1, 1), (NEW, NEW)])
def test_an_answer_has_as_many_tokens_as_it_may(server: Running, asked: int | None, tokens: int) -> None:
    answer = post(server, PROMPT, asked)
    assert answer.json()["usage"]["completion_tokens"] == tokens
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert text(answer) == drawn(server, {"do_sample": False, "max_new_tokens": tokens})


def test_a_model_that_returns_dictionaries_is_served() -> None:
    model = tiny("llama")
    model.generation_config.return_dict_in_generate = True
    with running(model) as server:
        assert post(server, PROMPT, 3).json()["usage"]["completion_tokens"] == 3


def test_an_answer_without_a_limit_ends_with_the_context(server: Running) -> None:
    most = server.served.prompts.context
    prompt = [5 + n % 200 for n in range(most - 5)]
    assert post(server, prompt, None).json()["usage"]["completion_tokens"] == 5
    answer = post(server, prompt, 6)
    assert answer.status_code == 400
    assert f"max_tokens is 6, but the prompt has {most - 5} tokens" in answer.json()["error"]["message"]


def test_the_end_token_ends_an_answer_unless_it_is_to_be_ignored(server: Running) -> None:
    asked = {"logit_bias": {str(EOS): 100}}
    ended = post(server, PROMPT, NEW, **asked, ignore_eos=False).json()
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", 1)
    assert post(server, PROMPT, NEW, **asked).json()["usage"]["completion_tokens"] == NEW


def test_a_queue_is_measured_without_a_look_at_the_weights(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = ROWS if server.model.autotune.active else ROWS - 1
    with counted(server) as turns:
        for prompt in PROMPTS[:ROWS]:
            turns.client(prompt, 1)
        turns.settle()
        until(lambda: server.model.autotune.waiting == waits)
        assert server.model.autotune.status.waiting == waits
        monkeypatch.delattr(Handle, "status")
        monkeypatch.setattr(server.served.answers, "most_waiting", waits)
        assert post(server, PROMPT, 1).status_code == 429
        monkeypatch.setattr(server.served.answers, "most_waiting", waits + 1)
        last = turns.client(PROMPT, 1)
        until(lambda: server.model.autotune.waiting == waits + 1)
        turns.open()
        last.rest()


def test_urgent_requests_are_answered_first_and_others_as_they_came(server: Running) -> None:
    order, batches = list[int](), bool(server.model.autotune.active)

    def in_queue() -> int:  # where they are chosen from
        return waiting(server) if batches else server.model.autotune.status.waiting

    def one(number: int, priority: int) -> None:
        text(post(server, PROMPTS[ROWS + number], 1, priority=priority))  # one that nobody has computed
        order.append(number)

    with counted(server) as turns:
        rows = [turns.client(PROMPTS[n], 200, priority=10) for n in range(ROWS)]  # nobody takes their rows
        turns.settle()
        until(lambda: in_queue() == (ROWS if batches else ROWS - 1))
        turns.take(ROWS)
        turns.settle()
        waits = in_queue()
        assert waits == (0 if batches else ROWS - 1)
        others = []
        for number, priority in enumerate([0, 0, 10, -10, 10]):
            others.append(threading.Thread(target=one, args=(number, priority)))
            others[-1].start()
            until(lambda: in_queue() == waits + number + 1)  # noqa: B023
        leaving = rows[:1] if batches else rows
        for client in leaving:
            client.close()
        until(lambda: server.served.answers.running == ROWS - len(leaving) + len(others))
        until(lambda: in_queue() == len(others))
        if not batches:
            turns.take()  # the forward that was under way
            turns.settle()
        for number in range(len(others)):
            turns.take()
            until(lambda: len(order) == number + 1)  # noqa: B023
        for thread in others:
            thread.join()
    assert order == [2, 4, 0, 1, 3]
