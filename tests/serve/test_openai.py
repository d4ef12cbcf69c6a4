"""The server through OpenAI's own client, and against generate with the same arguments."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from autotune.serve.detokenise import UNFINISHED
from tests.models import token_prompts
from tests.serve.servers import Running, running, until

PROMPT = token_prompts(1, length=12)[0]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def generated(server: Running, prompt: list[int], new: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.random.fork_rng():
        out = server.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
    return out[0, len(prompt) :].tolist()


def text_of(server: Running, ids: list[int]) -> str:
    return server.served.prompts.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_completion_is_what_generate_gives(server: Running, client: Any) -> None:
    for prompt in token_prompts(4, length=9):
        got = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
        ids = generated(server, prompt, 20, do_sample=False)
        assert got.choices[0].text == text_of(server, ids)
        assert got.choices[0].finish_reason == ("stop" if ids[-1] == 2 else "length")
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (9, len(ids))


def test_a_chat_goes_through_the_models_template(server: Running, client: Any) -> None:
    got = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hé"}]}],
        max_completion_tokens=12,
        temperature=0,
    )
    prompt = server.served.prompts.tokenizer("[system]be[user]hé>", add_special_tokens=False)["input_ids"]
    assert got.choices[0].message.content == text_of(server, generated(server, prompt, 12, do_sample=False))
    assert got.choices[0].message.role == "assistant"
    assert got.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_has_the_whole_answer_in_order(server: Running, client: Any, usage: bool) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "go"}], "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    parts = list(client.chat.completions.create(**asked, stream=True, **options))
    assert parts[0].choices[0].delta.role == "assistant"
    deltas = [p.choices[0] for p in parts if p.choices]
    assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
    assert [d.finish_reason for d in deltas][-1] == whole.choices[0].finish_reason
    assert {d.finish_reason for d in deltas[:-1]} == {None}
    assert bool([p for p in parts if not p.choices]) == usage
    if usage:
        assert parts[-1].usage == whole.usage
    assert len({p.id for p in parts}) == 1


def test_a_chat_streams_several_answers_as_they_are_whole(client: Any) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "go"}], "max_tokens": 12, "n": 3}
    asked |= {"temperature": 1.0, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices
    parts = [part for chunk in client.chat.completions.create(**asked, stream=True) for part in chunk.choices]
    assert [part.delta.role for part in parts] == ["assistant"] * 3 + [None] * (len(parts) - 3)
    for choice in whole:
        own = [part for part in parts if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        chances = [chance for part in own if part.logprobs for chance in part.logprobs.content]
        assert chances == choice.logprobs.content
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_completions_stream_several_answers_as_they_are_whole(client: Any) -> None:
    asked = {"model": "tiny", "prompt": token_prompts(2, length=8), "max_tokens": 9, "n": 2}
    asked |= {"temperature": 1.0, "seed": 7, "logprobs": 2}
    whole = client.completions.create(**asked).choices
    parts = [part for chunk in client.completions.create(**asked, stream=True) for part in chunk.choices]
    assert len(whole) == 4
    for choice in whole:
        own = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert (
                UNFINISHED in token or token in choice.text[offset : offset + len(token) + 4]
            )  # behind half characters
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            found = [each for part in own for each in getattr(part.logprobs, name)]
            assert found == getattr(choice.logprobs, name)
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_a_stream_ends_as_servers_of_events_do(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    assert all(json.loads(line[6:])["object"] == "text_completion" for line in lines[:-1])


def test_sampling_depends_on_the_seed_alone(client: Any) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 1.5}
    one, same, other = (
        client.completions.create(**asked, seed=seed, extra_body={"ignore_eos": True}).choices[0].text
        for seed in (7, 7, 8)
    )
    assert one == same
    assert one != other
    several = client.completions.create(**asked, seed=7, n=3, extra_body={"ignore_eos": True})
    assert several.choices[0].text == one
    assert len({choice.text for choice in several.choices}) == 3
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.prompt_tokens == len(PROMPT)
    assert several.usage.completion_tokens == 36


def test_several_prompts_are_several_choices(server: Running, client: Any) -> None:
    prompts = token_prompts(3, length=8)
    got = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0)
    expected = [text_of(server, generated(server, prompt, 6, do_sample=False)) for prompt in prompts]
    assert [choice.text for choice in got.choices] == expected


def test_log_probabilities_are_the_models_own(server: Running, client: Any) -> None:
    got = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3, presence_penalty=1.5
    )
    chances = got.choices[0].logprobs
    assert len(chances.token_logprobs) == got.usage.completion_tokens
    assert all(len(each) <= 3 for each in chances.top_logprobs)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        right = server.model(ids).logits[0, -1].float().log_softmax(-1)
    assert max(chances.top_logprobs[0].values()) == pytest.approx(right.max().item(), abs=1e-4)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    first = chat.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 2
    assert first.top_logprobs[0].logprob >= first.top_logprobs[1].logprob
    assert first.logprob == pytest.approx(first.top_logprobs[0].logprob)


@pytest.mark.parametrize("logit", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_probability_is_still_json(
    stream: bool, logit: float, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a token that cannot come, or of a model that computes NaN."""
    forward = server.model.lm_head.forward

    def masked(*args: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(*args).clone()
        logits[..., 1:] = logit
        return logits

    monkeypatch.setattr(server.model.lm_head, "forward", masked)
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "logprobs": 4, "ignore_eos": True, "stream": stream}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    whole = [line.removeprefix("data: ") for line in answer.text.splitlines() if line and not line.endswith("[DONE]")]
    chances = [json.loads(each, parse_constant=pytest.fail)["choices"][0]["logprobs"] for each in whole]
    assert min(chances[0]["top_logprobs"][0].values()) == -9999.0


def test_an_answer_that_generate_ends_by_itself_has_a_reason(server: Running, client: Any) -> None:
    server.model.generation_config.max_time = 1e-9
    try:
        got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    finally:
        server.model.generation_config.max_time = None
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens < 20


def test_a_bias_and_a_penalty_change_what_is_said(client: Any) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    forced = client.completions.create(**asked, logit_bias={"70": 100})
    assert len(set(forced.choices[0].logprobs.tokens)) == 1
    varied = client.completions.create(**asked, logit_bias={"70": 30}, frequency_penalty=2, presence_penalty=2)
    repeated = client.completions.create(**asked, logit_bias={"70": 30})
    assert len(set(repeated.choices[0].logprobs.tokens)) <= len(set(varied.choices[0].logprobs.tokens))


def test_a_stop_string_ends_the_answer_and_is_not_shown(server: Running, client: Any) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 1.0, "seed": 3}
    whole = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
    stop = next(c for c in whole[3:] if c != "\ufffd" and c not in whole[:3])
    cut = client.completions.create(**asked, stop=[stop], extra_body={"ignore_eos": True})
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 30
    until(lambda: server.served.answers.running == 0)


@pytest.mark.parametrize(
    ("change", "said", "param"),
    [
        ({"prompt": PROMPT, "foo": 1}, "unknown field foo", "foo"),
        ({"prompt": []}, "prompt", None),
        ({"prompt": ""}, "prompt is empty", "prompt"),
        ({}, "Field required", "prompt"),
        ({"prompt": [999]}, "token 999; the model knows 0 to 255", "prompt"),
        ({"prompt": [5] * 300}, "the prompt has 300 tokens; the most are 255", "prompt"),
        ({"prompt": [5] * 100, "max_tokens": 200}, "max_tokens is 200, but the prompt has 100 tokens", "max_tokens"),
        ({"prompt": PROMPT, "max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
        ({"prompt": PROMPT, "temperature": -1}, "greater than or equal to 0", "temperature"),
        ({"prompt": PROMPT, "temperature": 3}, "less than or equal to 2", "temperature"),
        ({"prompt": PROMPT, "temperature": 1e-9}, "or at least 0.01", "temperature"),
        ({"prompt": PROMPT, "repetition_penalty": 1e-9}, "greater than or equal to 0.01", "repetition_penalty"),
        ({"prompt": PROMPT, "n": 0}, "greater than or equal to 1", "n"),
        ({"prompt": PROMPT, "logit_bias": {"x": 1}}, "logit_bias names 'x'", "logit_bias"),
        ({"prompt": PROMPT, "logit_bias": {"900": 1}}, "tokens are 0 to 255", "logit_bias"),
        ({"prompt": PROMPT, "logit_bias": {"9" * 5000: 1}}, "tokens are 0 to 255", "logit_bias"),
        ({"prompt": PROMPT, "stop": [""]}, "at least 1 character", None),
        ({"prompt": PROMPT, "model": "gpt-9"}, "this server has 'tiny'", "model"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(server: Running, change: dict[str, Any], said: str, param: Any) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json=change)
    assert answer.status_code == (404 if "model" in change else 400)
    error = answer.json()["error"]
    assert said in error["message"]
    if param:
        assert error["param"] == param


def test_a_limit_is_blamed_on_the_name_that_it_was_sent_under(server: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": [{"role": "user", "content": "x"}], name: 999}
        error = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == name
        assert f"{name} is 999" in error["message"]


def test_clients_get_their_own_classes_of_errors(server: Running, client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown field"):
        client.completions.create(model="tiny", prompt="x", extra_body={"best": 3})
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 400
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


def test_texts_and_tokens_there_and_back(server: Running) -> None:
    there = httpx.post(f"{server.url}/tokenize", json={"prompt": "héllo"}).json()
    assert there["count"] == len(there["tokens"]) == 6
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": there["tokens"]}).json()["prompt"] == "héllo"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert httpx.post(f"{server.url}/tokenize", json=chat).json()["count"] == len("[user]x>")
    assert httpx.post(f"{server.url}/tokenize", json={}).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [300]}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_many_asynchronous_clients_get_their_own_answers(server: Running, stream: bool) -> None:
    prompts = token_prompts(12, length=10)

    async def ask(client: openai.AsyncOpenAI, prompt: list[int]) -> str:
        asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 10, "temperature": 0}
        got: Any = await client.completions.create(**asked, stream=stream)
        return "".join([part.choices[0].text async for part in got]) if stream else got.choices[0].text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    expected = [text_of(server, generated(server, prompt, 10, do_sample=False)) for prompt in prompts]
    assert asyncio.run(ask_all()) == expected
