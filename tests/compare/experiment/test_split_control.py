"""Calls of a split that are the control's to answer: the candidate failed, cannot answer, or does not fit any more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch

import autotune
from autotune.compare.experiment.sequential import requests_to_see_rate
from autotune.errors import CancelledRequestError, DeadlineError, QueueFullError, StateError
from autotune.transforms.weight_only import WeightOnly
from tests.compare.experiment.live_models import ERRORS, PROMPTS, Seen, answer, broken, experiment, other
from tests.models import tiny
from tests.test_inputs import wrapped

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


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
        assert live.share == 0.0


REQUEST_ERRORS = [CancelledRequestError, DeadlineError, QueueFullError]


@pytest.mark.parametrize("kind", REQUEST_ERRORS)
def test_a_request_that_is_not_to_be_served_is_not_the_candidates_failure(
    llama: PreTrainedModel, tmp_path: Path, kind: type[Exception]
) -> None:
    with experiment(tmp_path, other=broken(3, kind)).split(llama, ramp=(1.0,), guardrails=(ERRORS,)) as live:
        with pytest.raises(kind):
            answer(llama, PROMPTS[0])
        assert live.status.candidates[0].errors == ()
        assert live.status.counts == {"refused, late or cancelled": 1}


def no_user(call: Any) -> str:
    raise KeyError("user")


@pytest.mark.parametrize("key", [no_user, lambda call: 42])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_key_that_cannot_be_made_costs_no_answer(
    llama: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: Any, share: float
) -> None:
    expected = answer(llama, PROMPTS[0])
    with experiment(tmp_path, other=other()).split(llama, key=key, ramp=(share,)) as live:
        for _ in range(2):
            assert torch.equal(answer(llama, PROMPTS[0]), expected)
        assert live.status.counts == {"no key could be made": 2}
    assert len([r for r in caplog.records if "no key could be made" in r.getMessage()]) == 1


def reloaded(model: PreTrainedModel) -> AbstractContextManager[object]:
    model.load_state_dict(tiny(seed=9).state_dict())
    return nullcontext()


def scaled(model: PreTrainedModel) -> AbstractContextManager[object]:
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    return nullcontext()


def hooked(model: PreTrainedModel) -> AbstractContextManager[object]:
    model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    return nullcontext()


def autocast(model: PreTrainedModel) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


EDITS: dict[Callable[[PreTrainedModel], AbstractContextManager[object]], str] = {
    reloaded: "the model changed (tensor model.embed_tokens.weight was written to or converted)",
    scaled: "the model changed (tensor model.layers.0.mlp.up_proj.weight was written to or converted)",
    hooked: "the model changed (there is a forward hook on model.layers.0)",
    autocast: "autocast",
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_a_candidate_does_not_answer_for_a_model_that_it_was_not_made_from(
    llama: PreTrainedModel, tmp_path: Path, wrapped: bool, edit: Callable[[PreTrainedModel], Any]
) -> None:
    if wrapped:
        autotune.wrap(llama, when="manual", cache=False)
    fresh = tiny()
    with edit(fresh):
        expected = answer(fresh, PROMPTS[0])
    with experiment(tmp_path, int8=[WeightOnly("both", bits=8)]).split(llama, ramp=(1.0,)) as live:
        answer(llama, PROMPTS[0])
        with edit(llama):
            assert torch.equal(answer(llama, PROMPTS[0]), expected)
        assert live.status.counts == {"candidate": 1, f"bypassed: {EDITS[edit]}": 1}


@pytest.mark.parametrize("place", [False, "parked"])
def test_the_original_stays_where_it_is_while_an_experiment_runs(tmp_path: Path, place: Any) -> None:
    """A candidate's twin shares the original's weights, and computes with them at any time."""
    model = wrapped([WeightOnly("both", bits=8)])
    with experiment(tmp_path, int4=[WeightOnly("both", bits=4)]).split(
        model, ramp=(1.0,), guardrails=(ERRORS,)
    ) as live:
        with pytest.raises(StateError, match="an experiment runs on the model"):
            model.autotune.commit(keep_original=place)
        answer(model, PROMPTS[0])
        assert (model.autotune.status.original, live.status.counts) == ("resident", {"candidate": 1})


def test_tuning_measures_nothing_beside_a_candidate(tmp_path: Path) -> None:
    model, inside = autotune.wrap(tiny(), when="manual", cache=False), list[bool]()
    traffic = model.autotune._tuning._traffic

    def look(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.append(traffic.is_inside())
        return scores

    with experiment(tmp_path, other=other()).split(model, ramp=(1.0,), guardrails=(ERRORS,)) as live:
        answer(model, PROMPTS[0], logits_processor=[look])
        assert live.status.counts == {"candidate": 1}
    assert set(inside) == {True}


def test_another_model_answers_whatever_is_done_to_the_control(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = other()
    expected = answer(candidate, PROMPTS[0])
    with experiment(tmp_path, other=candidate).split(llama, ramp=(1.0,)):
        scaled(llama)
        assert torch.equal(answer(llama, PROMPTS[0]), expected)


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
