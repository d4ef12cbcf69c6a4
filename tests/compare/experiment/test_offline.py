"""Experiments on a real tiny model, on a clock that passes only where a candidate says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune import Experiment, ExperimentError, MeasurementError, WorkloadError
from autotune.compare.experiment import Result
from autotune.compare.experiment.results import read
from autotune.validate import Verdict, tiers
from autotune.validate.tiers import Size
from tests.compare.experiment.scripted import CLOCK, WORK, Corrupt, Cost, costing
from tests.models import tiny

LONG_S = 1e9


@pytest.fixture(scope="module", autouse=True)
def brief() -> Iterator[None]:
    """A short exam, and one thread, as befits a model of two layers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiers.SIZES, "quick", Size(6, natural=4, own=4, padded=4, lengths=()))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    model = tiny()
    candidates = {
        "fast": costing(model, decode_s=0.02, batch_s=0.02),
        "same": costing(model),
        "mixed": costing(model, decode_s=0.02, batch_s=0.04),
        "corrupt": costing(model, corrupt=True, decode_s=0.02, batch_s=0.02),
        "raising": costing(model, fails_at=1),
        "late": costing(model, fails_at=4),
        "refused": [Cost("both"), Unwilling("both")],
        "other": tiny(seed=1),
        "stranger": costing(tiny(vocab_size=200), decode_s=0.02, batch_s=0.02),
    }
    store = tmp_path_factory.mktemp("store") / "kept.sqlite"
    experiment = Experiment("table", control=costing(model), candidates=candidates, workload=WORK, store=store)
    return experiment.run(budget_s=LONG_S, pairs=12, clock=CLOCK)


class Unwilling(Corrupt):
    name = "unwilling"

    def took_effect(self, variant: Any) -> str:
        return "nothing was found"


@pytest.mark.parametrize(
    ("name", "verdict", "words"),
    [
        ("fast", Verdict.PASS, r"x1\.18\d .*gain of 3.0%; quality within tier strict"),
        ("same", Verdict.FAIL, "latency: no gain of 3.0%"),
        ("mixed", Verdict.FAIL, r"latency: .*b4/p14/n4"),
        ("corrupt", Verdict.FAIL, r"quality: .*over"),
        ("raising", Verdict.ERROR, "no kernel image"),
        ("late", Verdict.ERROR, "no kernel image"),
        ("refused", Verdict.ERROR, r"unwilling@both had no effect: nothing was found"),
        ("other", Verdict.FAIL, "quality: .*over"),
        (
            "stranger",
            Verdict.PASS,
            r"quality not compared: it has another tokenizer \(a vocabulary of 200, the control's 256\)",
        ),
    ],
)
def test_verdicts(result: Result, name: str, verdict: Verdict, words: str) -> None:
    outcome = next(o for o in result.outcomes if o.name == name)
    assert outcome.verdict is verdict, outcome.reason
    assert re.search(words, outcome.reason), outcome.reason


def test_the_whole_passes_when_some_candidate_does(result: Result) -> None:
    assert result.verdict is Verdict.PASS
    assert result.reason == ("pass: fast, stranger; fail: same, mixed, corrupt, other; error: raising, late, refused")
    assert result.noise == pytest.approx(0.0, abs=1e-9)
    assert result.outcomes[0].name == "control"


def test_every_bucket_is_told(result: Result) -> None:
    mixed = next(o for o in result.outcomes if o.name == "mixed")
    assert [(c.bucket, c.verdict) for c in mixed.cells] == [("b1/p14/n4", "pass"), ("b4/p14/n4", "fail")]
    small, large = mixed.cells
    assert (small.tpot.ratio, large.tpot.ratio) == pytest.approx((1.5, 0.75))
    assert small.control_tokens_per_s == pytest.approx(4 / 0.19)
    assert large.tokens_per_s == pytest.approx(16 / 0.22)


def test_a_stranger_is_compared_by_latency_alone(result: Result) -> None:
    stranger = next(o for o in result.outcomes if o.name == "stranger")
    assert stranger.quality is None
    assert any("both models are in memory" in note for note in stranger.notes)


def test_memory(result: Result) -> None:
    by = {o.name: o for o in result.outcomes}
    assert by["fast"].stored_bytes == by["control"].stored_bytes
    assert by["corrupt"].stored_bytes > by["control"].stored_bytes
    assert by["fast"].peak_bytes > by["fast"].stored_bytes


def test_what_no_arm_beats(result: Result) -> None:
    assert "fast" in {point.name for point in result.pareto()}
    assert not {"mixed", "same", "raising", "corrupt"} & {point.name for point in result.pareto()}


def test_it_reads_back(result: Result) -> None:
    assert read(json.loads(result.to_json())).to_json() == result.to_json()
    with pytest.raises(ExperimentError, match="cannot be read"):
        read({"name": "x"})


@pytest.mark.parametrize("form", ["to_markdown", "__str__"])
def test_it_is_shown(result: Result, form: str) -> None:
    text = " ".join(getattr(result, form)().split())
    for words in ("Experiment table, version 1: pass", "mixed", "b4/p14/n4", "no kernel image", "1.19x"):
        assert words in text


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_chart(result: Result, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    written = result.chart(tmp_path / f"chart.{ending}").read_bytes()
    assert (b"<svg" in written) if ending == "svg" else written.startswith(b"\x89PNG")
    with pytest.raises(ExperimentError, match=r"expected a file that ends in \.svg"):
        result.chart(tmp_path / "chart.doc")


def experiment(store: Path, model: Any, **changes: Any) -> Experiment:
    given = {"decode_s": 0.02, "batch_s": 0.02} | changes
    return Experiment(
        "again", control=costing(model), candidates={"a": costing(model, **given)}, workload=WORK, store=store
    )


def test_an_interrupted_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    model, path, said = tiny(), tmp_path / "kept.sqlite", list[str]()

    def interrupt(step: str) -> None:
        if "round 4" in step:
            raise KeyboardInterrupt

    first = experiment(path, model)
    with pytest.raises(KeyboardInterrupt):
        first.run(budget_s=LONG_S, pairs=12, clock=CLOCK, progress=interrupt)
    first.store.close()  # another process
    again = experiment(path, model)
    result = again.run(budget_s=LONG_S, pairs=12, clock=CLOCK, progress=said.append)
    assert (result.version, result.verdict) == (1, "pass")
    assert any("resumed" in step for step in said)
    assert not any(step.endswith(("round 1", "round 2", "round 3")) or "judging" in step for step in said)
    assert any(step.endswith("round 4") for step in said)
    assert result.outcomes[1].latency is not None
    assert result.outcomes[1].latency.end_to_end.pairs == 8  # three before, five since

    changed = experiment(path, model, decode_s=0.021)
    assert changed.run(budget_s=LONG_S, pairs=2, clock=CLOCK, progress=said.append).version == 2
    assert "version 2: begun anew after version 1: a changed" in said


def test_prompts_are_kept_as_hashes(tmp_path: Path) -> None:
    model = tiny()
    experiment(tmp_path / "kept.sqlite", model).run(budget_s=LONG_S, pairs=1, clock=CLOCK)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert json.dumps(list(WORK.prompts[0])[:3])[1:-1].encode() not in kept


def test_too_few_pairs_show_nothing(tmp_path: Path) -> None:
    result = experiment(tmp_path / "kept.sqlite", tiny()).run(budget_s=LONG_S, pairs=5, clock=CLOCK)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "not clear for so few pairs (p = 0.031, Holm at 0.025)" in result.outcomes[1].reason


def test_time_that_is_used_up_is_told(tmp_path: Path) -> None:
    result = experiment(tmp_path / "kept.sqlite", tiny()).run(budget_s=1.0, pairs=12, clock=CLOCK)
    assert any("stopped after 1 of 12 rounds" in warning for warning in result.warnings)


def test_a_control_that_fails_ends_it(tmp_path: Path) -> None:
    model = tiny()
    broken = Experiment(
        "broken",
        control=costing(model, fails_at=4),
        candidates={"a": costing(model)},
        workload=WORK,
        store=tmp_path / "kept.sqlite",
    )
    with pytest.raises(MeasurementError, match=r"the control itself failed: .*no kernel image"):
        broken.run(budget_s=LONG_S, pairs=12, clock=CLOCK)


def test_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="there is no workload"):
        Experiment("x", control=tiny(), candidates={"a": []}, store=tmp_path / "kept.sqlite").run()
