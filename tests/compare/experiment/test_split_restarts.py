"""A split over restarts, and in several processes: roll-backs that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from autotune.compare.experiment import Experiment
from autotune.compare.experiment.split import SAVE_EVERY, Split
from autotune.errors import StateError
from tests.compare.experiment.live_models import ERRORS, HALF, PROMPTS, answer, broken, experiment, other
from tests.models import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


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


def offline(trial: Experiment, model: PreTrainedModel) -> None:
    trial.store.begin(trial.name, "offline", {"control": "c"}, {})


def shadowed(trial: Experiment, model: PreTrainedModel) -> None:
    with trial.shadow(model):
        pass


def with_other_steps(trial: Experiment, model: PreTrainedModel) -> None:
    with trial.split(model, **HALF | {"ramp": (0.1, 1.0)}):
        pass


@pytest.mark.parametrize("use", [offline, shadowed, with_other_steps])
def test_a_rollback_stays_whatever_else_the_experiment_is_used_for(
    llama: PreTrainedModel, tmp_path: Path, use: Callable[[Experiment, PreTrainedModel], None]
) -> None:
    candidate = other()
    with experiment(tmp_path, other=candidate).split(llama, **HALF) as live:
        live.rollback("it lies")
    use(experiment(tmp_path, other=candidate), llama)
    with experiment(tmp_path, other=candidate).split(llama, **HALF) as live:
        assert (live.share, live.status.state) == (0.0, "rolled back")
        assert live.status.candidates[0].reason == "it lies"


def two_workers(folder: Path) -> tuple[Split, Split]:
    """The same split as two processes run it, each with a model of its own."""
    one, two = (experiment(folder, other=other()).split(tiny(), **HALF).start() for _ in range(2))
    return one, two


def restarted(folder: Path) -> float:
    with experiment(folder, other=other()).split(tiny(), **HALF) as live:
        return live.share


def test_a_rollback_in_one_process_stops_the_others(tmp_path: Path) -> None:
    one, two = two_workers(tmp_path)
    one.rollback("it lies")
    for n in range(4 * SAVE_EVERY):  # about half are the candidate's
        with two.key(str(n)):
            answer(two._model, PROMPTS[0])
    assert (two.share, two.status.candidates[0].reason) == (0.0, "it lies")
    one.stop()
    two.stop()
    assert restarted(tmp_path) == 0.0


def test_a_guardrail_s_rollback_comes_after_a_resumption_that_was_not_heard_of(tmp_path: Path) -> None:
    rails = {"ramp": (1.0,), "guardrails": (ERRORS,)}
    one, two = (experiment(tmp_path, bad=broken()).split(tiny(), **rails).start() for _ in range(2))
    one.rollback("it lies")
    one.resume()
    for _ in range(40):
        answer(two._model, PROMPTS[0])
    assert two.share == 0.0
    assert two.status.state == "rolled back"
    two.stop()
    one.stop()
    with experiment(tmp_path, bad=broken()).split(tiny(), **rails) as live:
        assert live.share == 0.0


def test_a_rollback_stays_though_another_thread_hears_of_a_resumption_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = two_workers(tmp_path)
    one.rollback("it lies")
    one.resume()
    note = two._record.note

    def noted(kind: str, text: str) -> None:
        note(kind, text)
        if kind == "rolled back":
            two._save()  # as at the end of another request

    monkeypatch.setattr(two._record, "note", noted)
    two.rollback("it still does")
    assert two.share == 0.0
    one.stop()
    two.stop()
    assert restarted(tmp_path) == 0.0


def test_the_later_of_a_rollback_and_a_resumption_counts_whichever_process_it_was_in(tmp_path: Path) -> None:
    one, two = two_workers(tmp_path)
    one.rollback("it lies")
    one.resume()
    two.rollback("it still does")
    one.stop()
    assert one.share == 0.0
    two.stop()
    assert restarted(tmp_path) == 0.0
    one, two = two_workers(tmp_path)
    two.resume()
    one.stop()  # which did not hear of it
    two.stop()
    assert restarted(tmp_path) == 0.5


def test_figures_survive_a_restart(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidate = other()
    for total in (8, 16):
        with experiment(tmp_path, other=candidate).split(llama, ramp=(0.5, 1.0)) as live:
            for n in range(8):
                with live.key(f"user-{n}"):
                    answer(llama, PROMPTS[n])
            seen = live._progress
            assert seen.control["errors"].n + seen.candidate["errors"].n == total
