"""A share of live traffic on a candidate: stable keys, and guardrails that roll it back."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import autotune
from autotune.compare.experiment import Guardrail, ramp
from autotune.errors import ExperimentError
from autotune.model import route
from tests.compare.experiment.live_models import ERRORS, HALF, PROMPTS, Seen, answer, experiment, other
from tests.models import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_answer_is_one_arms_and_a_key_keeps_its_arm(
    llama: PreTrainedModel, tmp_path: Path, wrapped: bool
) -> None:
    plain, candidate = type(llama), other()
    ours, theirs = answer(llama, PROMPTS[0]), answer(candidate, PROMPTS[0])
    assert not torch.equal(ours, theirs)
    if wrapped:
        autotune.wrap(llama, when="manual", cache=False)
    with experiment(tmp_path, other=candidate).split(llama, **HALF | {"step_requests": 1000}) as live:
        for user in [f"user-{n}" for n in range(12)] * 2:
            with live.key(user):
                expected = theirs if ramp.place(live.name, user) < live.share else ours
                assert torch.equal(answer(llama, PROMPTS[0]), expected)
        counts = live.status.counts
        assert counts["control"] > 0
        assert counts["candidate"] > 0
        assert counts["control"] + counts["candidate"] == 24
    if wrapped:
        llama.autotune.unwrap()
    assert type(llama) is plain
    assert torch.equal(answer(llama, PROMPTS[0]), ours)


KEYS: dict[str, Any] = {
    "prompt": None,
    "function": lambda call: str(call.input_ids.sum().item()),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_calls(llama: PreTrainedModel, tmp_path: Path, name: str) -> None:
    trial = experiment(tmp_path, other=other())
    with trial.split(llama, key=KEYS[name], **HALF | {"step_requests": 1000}) as live:
        first = [answer(llama, prompt) for prompt in PROMPTS]
        again = [answer(llama, prompt) for prompt in PROMPTS]
        assert {"control", "candidate"} <= live.status.counts.keys()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_eight_threads_at_once(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = other()
    expected = [(answer(llama, p), answer(candidate, p)) for p in PROMPTS]
    wrong, served = list[int](), list[int]()

    def work(offset: int) -> None:
        for n in range(6):
            k = (offset + n) % len(PROMPTS)
            with live.key(f"user-{offset}-{n}"):
                got = answer(llama, PROMPTS[k])
            served.append(k)
            if not any(torch.equal(got, arm) for arm in expected[k]):
                wrong.append(k)

    with experiment(tmp_path, other=candidate).split(llama, **HALF) as live:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert live.status.requests == 48
    assert len(served) == 48
    assert wrong == []


def test_a_requests_seed_draws_the_candidates_tokens(llama: PreTrainedModel, tmp_path: Path) -> None:
    autotune.wrap(llama, when="manual", cache=False)

    def submitted(seed: int) -> torch.Tensor:
        result: torch.Tensor = llama.autotune.submit(PROMPTS[0], seed=seed, do_sample=True, max_new_tokens=6).result(60)
        return result

    with experiment(tmp_path, other=other()).split(llama, ramp=(1.0,)) as live:
        first = submitted(7)
        assert torch.equal(first, submitted(7))
        assert not torch.equal(first, submitted(8))
        assert live.status.counts == {"candidate": 3}


@pytest.mark.parametrize("key", [42, b"user", None])
def test_a_key_that_is_no_text_is_refused(llama: PreTrainedModel, tmp_path: Path, key: Any) -> None:
    live = experiment(tmp_path, other=other()).split(llama)
    with pytest.raises(ExperimentError, match=r"expected text"), live.key(key):
        pass


def test_a_stream_is_the_arms_own(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = other()
    expected = answer(candidate, PROMPTS[0])
    with experiment(tmp_path, other=candidate).split(llama, ramp=(1.0,)):
        seen = Seen()
        assert torch.equal(answer(llama, PROMPTS[0], streamer=seen), expected)
    assert seen.tokens == expected[0].tolist()
    assert seen.ended


def test_a_slower_candidate_is_rolled_back_on_a_live_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    ticks, slept_s = itertools.count(), [0.0]
    candidate = other()
    forward = candidate.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        slept_s[0] += 0.001
        return forward(*args, **kwargs)

    candidate.forward = slow

    def clock() -> float:
        return next(ticks) * 0.001 + slept_s[0]  # what the control takes: 1 ms a token

    trial = experiment(tmp_path, slow=candidate)
    with trial.split(llama, ramp=(0.5, 1.0), clock=clock) as live:
        requests = 0
        while live.share and requests < 100:
            with live.key(f"user-{requests}"):
                llama.generate(PROMPTS[0], max_new_tokens=2)
            requests += 1
        standing = live.status.candidates[0]
    assert standing.reason == (
        f"over the limit: ttft +100.0% [+100.0%, +100.0%], limit +10.0%, {standing.requests} requests; "
        f"tpot +100.0% [+100.0%, +100.0%], limit +10.0%, {standing.requests} requests"
    )
    assert 20 <= standing.requests < 40


def test_a_metric_of_ones_own_rolls_back(llama: PreTrainedModel, tmp_path: Path) -> None:
    def ends_early(prompt: torch.Tensor, new: torch.Tensor) -> bool:
        return new.shape[1] < 3

    candidate = other()
    candidate.lm_head.weight = torch.nn.Parameter(torch.zeros_like(candidate.lm_head.weight), requires_grad=False)
    short = Guardrail("short", "rate", 0.1, ends_early)
    useless = Guardrail("useless", "mean", 1.0, lambda prompt, new: {}["nothing"])
    answers: Any = lambda prompt, new: prompt[0] == 0  # noqa: E731 - of every token, not one
    no_number = Guardrail("no number", "rate", 0.1, answers)
    rails = (ERRORS, short, useless, no_number)
    with experiment(tmp_path, short=candidate).split(llama, ramp=(0.5, 1.0), guardrails=rails) as live:
        candidate.generation_config.eos_token_id = 0
        for n in range(40):
            with live.key(str(n)):
                llama.generate(PROMPTS[n % 8], max_new_tokens=3, eos_token_id=0)
        assert live.status.counts["useless could not be measured"] > 0
        assert live.status.counts["no number could not be measured"] > 0
        assert live.status.state == "rolled back"
        assert live.status.candidates[0].reason.startswith("over the limit: short")


def test_a_split_and_a_shadow_at_once(llama: PreTrainedModel, tmp_path: Path) -> None:
    plain, expected = type(llama), answer(llama, PROMPTS[0])
    shadow = experiment(tmp_path / "a", same=tiny()).shadow(llama, share=1.0, budget=1.0).start()
    live = experiment(tmp_path / "b", other=other()).split(llama, ramp=(1.0,)).start()
    assert not torch.equal(answer(llama, PROMPTS[0]), expected)
    assert shadow.status.requests == 0  # it watches what the split leaves to the control
    live.rollback()
    assert torch.equal(answer(llama, PROMPTS[0]), expected)
    assert shadow.wait(60)
    assert shadow.status.requests == 1
    shadow.stop()
    live.stop()
    assert type(llama) is plain
    assert not route.is_routed(llama)


def test_the_status_is_in_words(llama: PreTrainedModel, tmp_path: Path) -> None:
    with experiment(tmp_path, other=other()).split(llama) as live:
        answer(llama, PROMPTS[0])
        said = "\n".join(live.status.lines())
    assert "trial: split, running, 1 requests (control 1)" in said
    assert "answers 1% of requests; 0 of at least 50 requests at 1%" in said
    assert "tpot: +20% is caught within " in said


def test_one_of_several_candidates_has_to_be_chosen(llama: PreTrainedModel, tmp_path: Path) -> None:
    trial = experiment(tmp_path, one=other(), two=other())
    with pytest.raises(ExperimentError, match="choose candidate= from one, two"):
        trial.split(llama)
    with pytest.raises(ExperimentError, match="no candidate 'three'"):
        trial.split(llama, candidate="three")
    assert trial.split(llama, candidate="two").status.candidates[0].name == "two"
