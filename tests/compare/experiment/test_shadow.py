"""A shadow beside a live tiny model: callers see nothing of it, and it sees what is wrong with a candidate."""

from __future__ import annotations

import itertools
import math
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import autotune
from autotune import cli
from autotune.compare.experiment import Experiment
from autotune.compare.experiment.live import Standing, overall
from autotune.compare.experiment.outcomes import Outcome
from autotune.compare.experiment.replays import ReplayedRequest, Rerun, Turns, replay
from autotune.compare.experiment.verdicts import conclude
from autotune.errors import ExperimentError, MeasurementError
from autotune.model import route
from autotune.runtime.traffic import Traffic
from autotune.runtime.wrapped import serving_variant
from autotune.transforms.static_cache import StaticCache
from autotune.transforms.threads import Threads
from autotune.transforms.weight_only import WeightOnly
from autotune.validate import Verdict
from tests.models import BOS, left_padded, tiny, token_prompts
from tests.surroundings import without_threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

WAIT_S = 60.0
PROMPTS = [torch.tensor([prompt]) for prompt in token_prompts(8)]  # [1, 12] each
EVERYTHING = {"share": 1.0, "budget": 1.0, "deadline_s": 1e9}


class Clock:
    """Seconds that pass by asking, and when told to."""

    def __init__(self) -> None:
        self._ticks = itertools.count(1)
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s + next(self._ticks) * 1e-3


def corrupted() -> PreTrainedModel:
    model = tiny()
    for parameter in model.model.layers[0].mlp.parameters():
        parameter.mul_(1.5)
    return model


def broken(what: Callable[[], None]) -> PreTrainedModel:
    """A candidate whose forward does something first."""
    model = tiny()
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        what()
        return forward(*args, **kwargs)

    model.forward = run
    return model


def fail() -> None:
    raise RuntimeError("no such kernel")


def experiment(folder: Path, **candidates: Any) -> Experiment:
    return Experiment("trial", control=tiny(), candidates=candidates, store=folder / "experiments.sqlite")


def asked(model: Any, count: int = 4, **options: Any) -> list[torch.Tensor]:
    return [model.generate(p, max_new_tokens=6, **options) for p in itertools.islice(itertools.cycle(PROMPTS), count)]


def equal(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def test_an_equal_candidate_agrees_in_every_token(llama: PreTrainedModel, tmp_path: Path) -> None:
    expected = asked(llama)
    with experiment(tmp_path, same=tiny()).shadow(llama, clock=Clock(), **EVERYTHING) as shadow:
        assert equal(asked(llama), expected)
        assert shadow.wait(WAIT_S)
        standing = shadow.status.candidates[0]
    assert standing.requests == 4
    assert standing.counts == {"same tokens": 4}
    assert standing.verdict == "inconclusive"
    assert "kld +0" in standing.findings[2]
    assert not route.is_routed(llama)


@pytest.mark.parametrize("wrapped", [False, True])
def test_corrupted_weights_are_found_and_nobody_notices(llama: PreTrainedModel, tmp_path: Path, wrapped: bool) -> None:
    expected = asked(llama, 12)
    if wrapped:
        autotune.wrap(llama, when="manual", cache=False)
    trial = experiment(tmp_path, corrupted=corrupted(), same=[Threads("decode", 1)])
    with trial.shadow(llama, **EVERYTHING) as shadow:
        served = []
        for answer in range(12):
            served += [llama.generate(PROMPTS[answer % 8], max_new_tokens=6)]
            assert shadow.wait(WAIT_S)
        found = {arm.name: arm for arm in shadow.status.candidates}
    assert equal(served, expected)
    assert found["corrupted"].verdict == "fail"
    assert "divergent" in found["corrupted"].reason
    assert found["corrupted"].counts["diverged"] >= 8
    assert found["same"].verdict == "inconclusive"
    assert wrapped == hasattr(llama, "autotune")


@pytest.mark.parametrize("candidate", [[WeightOnly("both", bits=8)], "another model"], ids=["made from it", "another"])
def test_an_edit_of_the_live_model_is_not_held_against_a_candidate(
    llama: PreTrainedModel, tmp_path: Path, candidate: Any
) -> None:
    candidate = tiny(seed=9) if isinstance(candidate, str) else candidate
    with experiment(tmp_path, same=candidate).shadow(llama, **EVERYTHING) as shadow:
        llama.load_state_dict(tiny(seed=9).state_dict())
        asked(llama, 2)
        assert shadow.wait(WAIT_S)
        reason = "the model changed (tensor model.embed_tokens.weight was written to or converted)"
        assert shadow.status.counts == {"sampled": 2, f"dropped: {reason}": 2}
        assert shadow.status.candidates[0].requests == 0


def test_an_edit_in_the_middle_of_a_replay_is_not_held_against_a_candidate(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    def edit() -> None:
        llama.model.norm.weight.mul_(1.5)

    trial = experiment(tmp_path, same=[Threads("decode", 1)], other=broken(edit))
    with trial.shadow(llama, **EVERYTHING) as shadow:
        asked(llama, 1)
        assert shadow.wait(WAIT_S)
        assert [arm.requests for arm in shadow.status.candidates] == [1, 0]


def test_what_autocast_computed_is_not_replayed(llama: PreTrainedModel, tmp_path: Path) -> None:
    with experiment(tmp_path, same=[Threads("decode", 1)]).shadow(llama, **EVERYTHING) as shadow:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            asked(llama, 1)
        assert shadow.wait(WAIT_S)
        assert shadow.status.counts == {"sampled": 1, "dropped: autocast": 1}


def test_candidates_are_made_for_the_workload_of_the_experiment(llama: PreTrainedModel, tmp_path: Path) -> None:
    prompts = [prompt[0].tolist() for prompt in PROMPTS]
    trial = Experiment(
        "trial",
        control=tiny(),
        candidates={"same": [Threads("decode", 1)]},
        store=tmp_path / "experiments.sqlite",
        workload=prompts,
        new_tokens=7,
        batch_sizes=(1, 3),
    )
    variant = trial.shadow(llama)._arms["same"].variant
    assert variant is not None
    assert variant.workload is not None
    assert (variant.workload.new_tokens, variant.workload.batch_sizes) == (7, (1, 3))


def test_a_candidate_that_raises_never_reaches_the_caller(llama: PreTrainedModel, tmp_path: Path) -> None:
    expected = asked(llama, 8)
    with experiment(tmp_path, broken=broken(fail)).shadow(llama, **EVERYTHING) as shadow:
        assert equal(asked(llama, 8), expected)
        assert shadow.wait(WAIT_S)
        standing = shadow.status.candidates[0]
    assert standing.verdict == "fail"
    assert standing.reason.startswith("over the limit: errors +100.0%")
    assert standing.errors[0].endswith("RuntimeError: no such kernel")


def test_what_a_candidate_leaves_to_the_control_says_nothing_about_it(llama: PreTrainedModel, tmp_path: Path) -> None:
    """As a prompt that is longer than its slots."""
    short = [StaticCache("decode", slots=16)]  # prompts have 12 tokens, answers 6
    with experiment(tmp_path, short=short).shadow(llama, **EVERYTHING) as shadow:
        asked(llama, 3)
        llama.generate(PROMPTS[0][:, :8], max_new_tokens=6)
        assert shadow.wait(WAIT_S)
        standing = shadow.status.candidates[0]
    left = {what: n for what, n in standing.counts.items() if what.startswith("left to the control: ")}
    assert list(left.values()) == [3]
    assert "16" in next(iter(left))
    assert (standing.requests, standing.errors) == (1, ())


@pytest.mark.parametrize("first", [False, True])
def test_what_neither_arm_can_replay_is_not_held_against_the_candidate(llama: PreTrainedModel, first: bool) -> None:
    turns = Turns(Traffic(), math.inf)
    ids = PROMPTS[0]
    request = ReplayedRequest(ids, None, ids[:, :6], (), 0, 0.0)
    control, candidate = (Rerun(serving_variant(broken(fail)), turns, 0) for _ in range(2))
    with pytest.raises(MeasurementError, match=r"the control cannot replay this: .*no such kernel"):
        replay(control, candidate, request, turns, candidate_first=first)


def test_nan_is_a_failure(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = tiny()
    candidate.model.norm.weight.fill_(float("nan"))
    with experiment(tmp_path, nan=candidate).shadow(llama, **EVERYTHING) as shadow:
        asked(llama, 1)
        assert shadow.wait(WAIT_S)
        assert shadow.status.candidates[0].errors[0].startswith("NaN logits at token 0")


def test_a_candidate_that_hangs_holds_up_nobody_and_the_queue_overflows(llama: PreTrainedModel, tmp_path: Path) -> None:
    expected = asked(llama, 5)
    reached, release = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        assert release.wait(WAIT_S)

    with experiment(tmp_path, hung=broken(hang)).shadow(llama, queue=2, **EVERYTHING) as shadow:
        try:
            first = asked(llama, 1)
            assert reached.wait(WAIT_S)
            assert equal(first + asked(llama, 4), [expected[0], *expected[:4]])  # 2 wait, 2 are dropped
            assert shadow.status.counts == {"sampled": 5, "dropped: queue full": 2}
        finally:
            release.set()
        assert shadow.wait(WAIT_S)
    assert shadow.status.state == "stopped"


LATE: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "deadline": ({"deadline_s": 50.0}, {"sampled": 2, "dropped: deadline": 2}),
    "budget": ({"budget_s": 10.0}, {"sampled": 2, "dropped: budget": 1}),
}


@pytest.mark.parametrize("name", LATE)
def test_a_slow_candidate_is_cut_short(llama: PreTrainedModel, tmp_path: Path, name: str) -> None:
    options, counts = LATE[name]
    clock = Clock()

    def dawdle() -> None:
        clock.now_s += 60.0

    trial = experiment(tmp_path, slow=broken(dawdle))
    with trial.shadow(llama, clock=clock, **(EVERYTHING | options)) as shadow:
        for _ in range(2):
            asked(llama, 1)
            assert shadow.wait(WAIT_S)
        assert shadow.status.counts == counts


def test_a_replay_waits_for_live_requests(llama: PreTrainedModel, tmp_path: Path) -> None:
    """One that comes in the middle of a replay is served at once, and the replay goes on after it."""
    inside, go_on, order = threading.Event(), threading.Event(), list[str]()

    def mark() -> None:
        order.append("replay")
        inside.set()
        assert go_on.wait(WAIT_S)

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            order.append("live")
            if order.count("live") == 2:  # the prompt, and the first token: in flight now
                go_on.set()

        def end(self) -> None: ...

    with experiment(tmp_path, slow=broken(mark)).shadow(llama, **EVERYTHING) as shadow:
        asked(llama, 1)
        assert inside.wait(WAIT_S)
        llama.generate(PROMPTS[1], max_new_tokens=6, streamer=Streamer())
        assert shadow.wait(WAIT_S)
    live = [n for n, what in enumerate(order) if what == "live"]
    assert live == list(range(1, 8))  # after the token under way, and in one piece
    assert order.count("replay") > 1


def test_sampled_answers_and_random_numbers_are_the_same(llama: PreTrainedModel, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected, state = asked(llama, 4, do_sample=True, temperature=0.8), torch.get_rng_state()
    with experiment(tmp_path, other=corrupted()).shadow(llama, **EVERYTHING) as shadow:
        torch.manual_seed(7)
        served = []
        for n in range(4):
            served.append(llama.generate(PROMPTS[n], max_new_tokens=6, do_sample=True, temperature=0.8))
            assert shadow.wait(WAIT_S)
        assert shadow.status.candidates[0].requests == 4
    assert equal(served, expected)
    assert torch.equal(torch.get_rng_state(), state)


CALLS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "padded batch": ({**left_padded(), "max_new_tokens": 5}, {"sampled": 1}),
    "as a dictionary": (
        {"input_ids": PROMPTS[0], "max_new_tokens": 5, "return_dict_in_generate": True},
        {"sampled": 1},
    ),
    "beams": ({"input_ids": PROMPTS[0], "max_new_tokens": 5, "num_beams": 2}, {}),
    "one token": ({"input_ids": torch.tensor([[BOS]]), "max_new_tokens": 1}, {"sampled": 1}),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_every_kind(llama: PreTrainedModel, tmp_path: Path, name: str) -> None:
    call, counts = CALLS[name]
    expected: Any = llama.generate(**call)
    with experiment(tmp_path, same=tiny()).shadow(llama, **EVERYTHING) as shadow:
        served: Any = llama.generate(**call)
        assert shadow.wait(WAIT_S)
        assert shadow.status.counts == counts
        assert shadow.status.candidates[0].errors == ()
    assert torch.equal(getattr(served, "sequences", served), getattr(expected, "sequences", expected))


def test_the_controls_exceptions_are_its_own(llama: PreTrainedModel, tmp_path: Path) -> None:
    def refuse(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("the caller's")

    with experiment(tmp_path, same=tiny()).shadow(llama, **EVERYTHING) as shadow:
        with pytest.raises(KeyError, match="the caller's"):
            llama.generate(PROMPTS[0], max_new_tokens=3, logits_processor=[refuse])
        assert shadow.status.requests == 0


ORDERS = ["shadow first", "handle first", "two shadows, the first first", "two shadows, the last first"]


@pytest.mark.parametrize("order", ORDERS)
def test_unwinding_in_any_order(llama: PreTrainedModel, tmp_path: Path, order: str) -> None:
    plain, expected = type(llama), asked(llama, 1)
    keys = set(llama.__dict__)
    autotune.wrap(llama, when="manual", cache=False)
    shadow = experiment(tmp_path, same=tiny()).shadow(llama, **EVERYTHING).start()
    another = experiment(tmp_path, same=tiny()).shadow(llama, **EVERYTHING).start()
    steps = {
        "shadow first": (another.stop, shadow.stop, lambda: llama.autotune.unwrap()),
        "handle first": (lambda: llama.autotune.unwrap(), another.stop, shadow.stop),
        "two shadows, the first first": (shadow.stop, lambda: llama.autotune.unwrap(), another.stop),
        "two shadows, the last first": (another.stop, lambda: llama.autotune.unwrap(), shadow.stop),
    }[order]
    for step in steps:
        assert equal(asked(llama, 1), expected)
        step()
    assert type(llama) is plain
    assert set(llama.__dict__) == keys
    assert equal(asked(llama, 1), expected)
    shadow.stop()  # again, which changes nothing


def test_a_shadow_that_gets_no_thread_can_start_later(llama: PreTrainedModel, tmp_path: Path) -> None:
    shadow = experiment(tmp_path, same=tiny()).shadow(llama, **EVERYTHING)
    with pytest.MonkeyPatch.context() as full:
        without_threads(full)
        with pytest.raises(ExperimentError, match="can't start new thread"):
            shadow.start()
    assert shadow.status.state == "stopped"
    with shadow:
        asked(llama, 1)
        assert shadow.wait(WAIT_S)
        assert shadow.status.candidates[0].requests == 1


def test_what_was_seen_survives_a_restart(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = corrupted()
    for expected in (3, 6):
        trial = experiment(tmp_path, corrupted=candidate)
        with trial.shadow(llama, **EVERYTHING) as shadow:
            asked(llama, 3)
            assert shadow.wait(WAIT_S)
            assert shadow.status.candidates[0].requests == expected
        trial.store.close()


def test_the_status_is_plain_and_in_words(llama: PreTrainedModel, tmp_path: Path) -> None:
    with experiment(tmp_path, same=tiny()).shadow(llama, **EVERYTHING) as shadow:
        asked(llama, 1)
        assert shadow.wait(WAIT_S)
        said = "\n".join(shadow.status.lines())
    assert "trial: shadow, running, 1 requests (sampled 1)" in said
    assert "errors: a rate of 12% is caught within " in said


@pytest.mark.parametrize(
    "options", [{"share": 0.0}, {"share": 1.1}, {"queue": 0}, {"budget": 0.0}, {"deadline_s": 0.0}]
)
def test_nonsense_is_refused(llama: PreTrainedModel, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match="expected shares above 0"):
        experiment(tmp_path, same=tiny()).shadow(llama, **options)


def test_the_command_line_shows_it(
    llama: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with experiment(tmp_path, other=tiny()).shadow(llama, **EVERYTHING) as shadow:
        asked(llama, 2)
        assert shadow.wait(WAIT_S)
        assert cli.main(["experiment", "status", "trial", "--store", str(tmp_path / "experiments.sqlite")]) == 0
    said = capsys.readouterr().out
    assert "trial: shadow, running, 2 requests (sampled 2)" in said
    assert "inconclusive; open: errors +0.0%" in said


def test_a_candidate_with_another_vocabulary_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="another tokenizer"):
        experiment(tmp_path, other=tiny(vocab_size=128)).shadow(llama)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ((), "inconclusive"),
        (("fail", "pass"), "pass"),
        (("fail", "fail"), "fail"),
        (("error", "error"), "error"),
        (("fail", "error"), "fail"),  # as offline: none can pass any more
        (("fail", "inconclusive", "error"), "inconclusive"),
    ],
)
def test_the_verdict_of_all_candidates_is_that_of_an_experiment_offline(
    verdicts: tuple[str, ...], expected: str
) -> None:
    standing = [Standing(f"c{k}", "", verdict, "", 0, 0.0, (), ()) for k, verdict in enumerate(verdicts)]
    assert overall(standing)[0] == expected
    if verdicts:
        outcomes = [Outcome(arm.name, "", "", Verdict(arm.verdict), "") for arm in standing]
        assert conclude(outcomes)[0] == expected
