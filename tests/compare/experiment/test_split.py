"""A share of live traffic on a candidate: stable keys, guarded steps, roll-backs that stay."""

from __future__ import annotations

import itertools
import math
import re
import threading
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import autotune
from autotune.compare.experiment import Experiment, Guardrail, ramp
from autotune.compare.experiment.guardrails import STANDARD
from autotune.compare.experiment.ramp import Ramp, RampProgress, RampState
from autotune.compare.experiment.sequential import Moments, requests_to_see_rate
from autotune.errors import ExperimentError, StateError
from autotune.model import route
from autotune.validate import Verdict
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

SHARES = (0.01, 0.1, 0.5, 1.0)
ERRORS = STANDARD[0]
PROMPTS = [torch.tensor([prompt]) for prompt in token_prompts(8)]  # [1, 12] each
HALF = {"ramp": (0.5, 1.0), "guardrails": (ERRORS,), "step_requests": 10}


# The rules, on scripted figures


@pytest.mark.parametrize("salt", ["one", "two"])
@pytest.mark.parametrize("share", SHARES)
def test_keys_go_to_the_candidate_in_proportion(salt: str, share: float) -> None:
    places = [ramp.place(salt, f"user-{n}") for n in range(20_000)]
    assert np.mean([p < share for p in places]) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2e4))


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.1), (0.1, 0.5), (0.5, 1.0)])
def test_raising_the_share_only_moves_keys_to_the_candidate(low: float, high: float) -> None:
    places = [ramp.place("salt", f"user-{n}") for n in range(2000)]
    before, after = ({n for n, p in enumerate(places) if p < share} for share in (low, high))
    assert before < after


@pytest.mark.parametrize(
    ("salt", "key", "expected"),
    [("trial", "user-42", 0.578), ("trial", b"user-42", 0.578), ("other", "user-42", 0.178)],
)
def test_a_key_has_its_place_for_good(salt: str, key: str | bytes, expected: float) -> None:
    assert ramp.place(salt, key) == pytest.approx(expected, abs=0.0005)


def test_salts_are_independent() -> None:
    both = [(ramp.place("a", str(n)) < 0.5, ramp.place("b", str(n)) < 0.5) for n in range(10_000)]
    assert np.mean([a and b for a, b in both]) == pytest.approx(0.25, abs=0.02)


def drawn(errors: float = 0.0, slower: float = 0.0) -> Any:
    """Values of one answer: failures at a rate, log times with a spread of 30 %."""

    def draw(rng: np.random.Generator) -> dict[str, float]:
        failed = float(rng.random() < errors)
        return {"errors": failed, "ttft": rng.normal(slower, 0.3), "tpot": rng.normal(slower, 0.3)}

    return draw


def climb(rules: Ramp, candidate: Any, seed: int, requests: int) -> list[RampProgress]:
    """Every state on the way, request by request, with everybody else's requests to the control."""
    rng, progress, seen = np.random.default_rng(seed), RampProgress(), list[RampProgress]()
    control = drawn()
    for _ in range(requests):
        share = rules.share(progress)
        others = 0 if share >= 1 else min(20, round((1 - share) / share))
        for _ in range(others):
            progress = ramp.observed(progress, "control", control(rng))
        progress = rules.advance(ramp.observed(progress, "candidate", candidate(rng)))
        seen.append(progress)
        if progress.state == "rolled back":
            break
    return seen


def test_a_candidate_as_good_climbs_to_the_top() -> None:
    seen = climb(Ramp(SHARES, STANDARD), drawn(), seed=0, requests=8000)
    assert [seen[n].step for n in (0, -1)] == [0, 3]
    assert seen[-1].state == "full"
    for before, after in pairwise(seen):
        assert after.step in (before.step, before.step + 1)
        if after.step > before.step:  # and not before it was shown
            assert before.requests + 1 >= 50


BAD: dict[str, tuple[Any, str]] = {
    "always fails": (drawn(errors=1.0), "errors"),
    "fails at times": (drawn(errors=0.12), "errors"),
    "slower": (drawn(slower=math.log(1.2)), "t"),
    "much slower": (drawn(slower=math.log(2.0)), "t"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_worse_candidate_is_rolled_back(name: str) -> None:
    candidate, why = BAD[name]
    seen = climb(Ramp((0.5, 1.0), STANDARD), candidate, seed=1, requests=5000)
    assert seen[-1].state == "rolled back"
    assert seen[-1].step == 0
    assert seen[-1].reason.startswith(f"over the limit: {why}")


def test_it_is_rolled_back_within_the_stated_number_of_requests() -> None:
    rules = Ramp((0.5, 1.0), (ERRORS,))
    stated = requests_to_see_rate(0.12, ERRORS.limit, rules.alpha)
    assert f"a rate of 12% is caught within {stated} requests" in rules.bounds(RampProgress())[0]
    took = [len(climb(rules, drawn(errors=0.12), seed, requests=2000)) for seed in range(40)]
    assert sum(n > stated for n in took) <= 5  # at most 5 %, and the simulation's own error
    assert len(climb(rules, drawn(errors=1.0), 0, 100)) == requests_to_see_rate(1.0, ERRORS.limit, rules.alpha)


def test_it_is_rolled_back_within_the_stated_number_of_all_requests() -> None:
    """The control's figures are those of the step before, and do not grow."""
    rules = Ramp((0.5, 1.0), (Guardrail("ttft", "ratio", 0.1),))
    rng = np.random.default_rng(6)
    took = []
    for _ in range(40):
        before = Moments()
        for value in rng.normal(0.0, 0.2, 600):
            before = before.add(float(value))
        progress = begun = RampProgress(step=1, control={"ttft": before})
        while progress.state != "rolled back" and progress.requests < 5000:
            progress = rules.advance(
                ramp.observed(progress, "candidate", {"ttft": float(rng.normal(math.log(1.2), 0.2))})
            )
        took.append(progress.requests)
    stated = int(re.findall(r"within (\d+) requests", rules.bounds(begun)[0])[0])
    assert sum(n > stated for n in took) <= 5  # at most 5 %, and the simulation's own error


def test_a_candidate_within_the_limits_is_hardly_ever_rolled_back() -> None:
    rules = Ramp((0.5, 1.0), (ERRORS,))
    fallen = sum(climb(rules, drawn(errors=0.01), seed, 200)[-1].state == "rolled back" for seed in range(40))
    assert fallen <= 40 * ramp.ALPHA


def test_backing_off() -> None:
    rules = Ramp(SHARES, (ERRORS,), step_requests=10)
    fallen = replace(RampProgress(), state=RampState.ROLLED_BACK, rollbacks=2, step=3, requests=9)
    assert rules.share(fallen) == 0.0
    assert rules.advance(fallen) is fallen
    again = ramp.resumed(fallen)
    assert (rules.share(again), rules.needed(again), again.requests) == (0.01, 40, 0)
    assert rules.verdict(fallen)[0] is Verdict.FAIL
    assert rules.verdict(again)[0] is Verdict.INCONCLUSIVE
    assert rules.verdict(replace(again, state=RampState.FULL))[0] is Verdict.PASS


@pytest.mark.parametrize("shares", [(), (0.5, 0.1), (0.0, 1.0), (0.5, 1.5), (0.5, 0.5)])
def test_shares_that_do_not_rise_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ExperimentError, match="expected shares that rise"):
        Ramp(shares, (ERRORS,))


# On a live tiny model


def other() -> PreTrainedModel:
    return tiny(seed=9)


def broken(after_tokens: int = 0, kind: type[Exception] = RuntimeError) -> PreTrainedModel:
    """A candidate that raises at its n-th forward."""
    model, calls = other(), [0]
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after_tokens:
            raise kind("no such kernel")
        return forward(*args, **kwargs)

    model.forward = run
    return model


def experiment(folder: Path, **candidates: Any) -> Experiment:
    return Experiment("trial", control=tiny(), candidates=candidates, store=folder / "experiments.sqlite")


def answer(model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    result: torch.Tensor = model.generate(prompt, max_new_tokens=6, **options)
    return result


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
                expected = ours if live.arm_of(user) == "control" else theirs
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


@pytest.mark.parametrize("how", ["raises at once", "raises later", "nan"])
def test_a_failure_that_the_caller_has_not_seen_is_served_by_the_control(
    llama: PreTrainedModel, tmp_path: Path, how: str
) -> None:
    if how == "nan":
        candidate = other()
        candidate.model.norm.weight.fill_(float("nan"))
    else:
        candidate = broken(0 if how == "raises at once" else 3)
    expected = [answer(llama, prompt) for prompt in PROMPTS]
    with experiment(tmp_path, bad=candidate).split(llama, ramp=(1.0,), guardrails=(ERRORS,)) as live:
        assert all(torch.equal(answer(llama, p), e) for p, e in zip(PROMPTS, expected, strict=True))
        status = live.status
        failures = status.counts["failed, the control answered"]
        stated = requests_to_see_rate(1.0, ERRORS.limit, live.ramp.alpha)
        assert status.state == "rolled back"
        assert status.candidates[0].share == 0.0
        assert status.candidates[0].verdict == "fail"
        assert ("NaN logits" if how == "nan" else "no such kernel") in status.candidates[0].errors[0]
        assert failures == stated
        assert live.arm_of("anybody") == "control"


class Seen:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_stream_is_the_arms_own(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = other()
    expected = answer(candidate, PROMPTS[0])
    with experiment(tmp_path, other=candidate).split(llama, ramp=(1.0,)):
        seen = Seen()
        assert torch.equal(answer(llama, PROMPTS[0], streamer=seen), expected)
    assert seen.tokens == expected[0].tolist()
    assert seen.ended


def test_a_stream_that_breaks_is_continued_by_the_control(llama: PreTrainedModel, tmp_path: Path) -> None:
    with experiment(tmp_path, bad=broken(3)).split(llama, ramp=(1.0,), guardrails=(ERRORS,)) as live:
        seen = Seen()
        result = answer(llama, PROMPTS[0], streamer=seen)
        assert seen.tokens == result[0].tolist()
        assert torch.equal(result[:, : 12 + 3], answer(broken(1000), PROMPTS[0])[:, : 12 + 3])  # what was out stands
        assert live.status.counts == {"failed, the control answered": 1}
        seen = Seen()
        ours = answer(tiny(), PROMPTS[0])
        assert torch.equal(answer(llama, PROMPTS[0], streamer=seen), ours)  # nothing was out yet
        assert seen.tokens == ours[0].tolist()


def test_what_the_callers_own_streamer_raises_is_not_the_candidates_failure(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    class Gone(Seen):
        def put(self, value: torch.Tensor) -> None:
            raise ConnectionError("the client hung up")

    with experiment(tmp_path, other=other()).split(llama, ramp=(1.0,)) as live:
        with pytest.raises(ConnectionError):
            answer(llama, PROMPTS[0], streamer=Gone())
        assert live.status.candidates[0].errors == ()


def test_a_rollback_stays_over_a_restart_until_told_otherwise(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = other()
    with experiment(tmp_path, other=candidate).split(llama, **HALF) as live:
        with pytest.raises(StateError, match="nothing to resume"):
            live.resume()
        live.rollback("somebody complained")
    with experiment(tmp_path, other=candidate).split(llama, **HALF) as live:
        assert live.share == 0.0
        assert live.status.candidates[0].reason == "somebody complained"
        live.resume()
        assert live.share == 0.5
    trial = experiment(tmp_path, other=candidate)
    with trial.split(llama, **HALF) as live:
        assert live.status.state == "running"
        assert live.ramp.needed(live._progress) == 20
        kinds = [event.kind for event in trial.store.events(live._record.version)]
    assert [kind for kind in kinds if kind in ("rolled back", "resumed")] == [
        "rolled back",
        "resumed",
        "resumed",
        "resumed",
    ]


def test_figures_survive_a_restart(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = other()
    for total in (8, 16):
        with experiment(tmp_path, other=candidate).split(llama, ramp=(0.5, 1.0)) as live:
            for n in range(8):
                with live.key(f"user-{n}"):
                    answer(llama, PROMPTS[n])
            seen = live._progress
            assert seen.control["errors"].n + seen.candidate["errors"].n == total


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


BYPASSED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "static cache": ({"cache_implementation": "static"}, {"bypassed: cache_implementation='static'": 1}),
    "embeddings": (
        {"inputs_embeds": torch.linspace(-1, 1, 12 * 64).reshape(1, 12, 64)},
        {"bypassed: argument inputs_embeds": 1},
    ),
    "beams": ({"num_beams": 2}, {}),
}


@pytest.mark.parametrize("name", BYPASSED)
def test_what_the_candidate_cannot_answer_is_the_controls(llama: PreTrainedModel, tmp_path: Path, name: str) -> None:
    options, counts = BYPASSED[name]
    expected = answer(llama, PROMPTS[0], **options)
    with experiment(tmp_path, other=other()).split(llama, ramp=(1.0,)) as live:
        assert torch.equal(answer(llama, PROMPTS[0], **options), expected)
        assert live.status.counts == counts


def test_what_the_candidate_cannot_answer_does_not_measure_the_control(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Such calls may be short, and none of them would be timed on the candidate's side."""
    options, _ = BYPASSED["static cache"]
    with experiment(tmp_path, other=other()).split(llama, ramp=(0.5, 1.0)) as live:
        for number in range(20):
            with live.key(str(number)):
                answer(llama, PROMPTS[0], **options)
        assert set(live.status.counts) == {"bypassed: cache_implementation='static'"}
        assert 0 < sum(live.status.counts.values()) < 20


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
    assert trial.split(llama, candidate="two").arm_of("x") in ("control", "two")
