"""`autotune experiment run|status|report`, and the file it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune import ExperimentError
from autotune.cli import main
from autotune.compare.experiment import Experiment, Store, results, sheet
from autotune.compare.experiment.results import Outcome, Result
from autotune.validate import Verdict, tiers
from autotune.validate.tiers import Size
from tests.models import tiny, tiny_tokenizer

TOML = """
control = "model"
workload = "prompts.jsonl"
new_tokens = 4
tier = "strict"
pairs = 2

[candidates]
same = []
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    prompts = [{"prompt": f"Say something about number {k}"} for k in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


@pytest.fixture
def brief() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiers.SIZES, "quick", Size(6, natural=4, own=4, padded=4, lengths=()))
        yield
    torch.set_num_threads(threads)


def written(folder: Path, text: str = TOML, name: str = "ab.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def result(verdict: str) -> Result:
    candidate = Outcome("a", "what a is", "f", Verdict(verdict), "because")
    control = Outcome("control", "the model", "f", Verdict.PASS, "")
    return Result("ab", 1, Verdict(verdict), f"{verdict}: a", "strict", "end_to_end", 0.01, (control, candidate))


@pytest.mark.usefixtures("brief")
def test_run_status_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "kept.sqlite")
    code = main(["experiment", "run", str(written(folder)), "--store", store])
    said = capsys.readouterr().out
    assert "Experiment ab, version 1" in said
    assert main(["experiment", "status", "--store", store]) == 0
    assert "ab" in capsys.readouterr().out
    assert main(["experiment", "status", "ab", "--store", store]) == 0
    assert "begun" in capsys.readouterr().out
    assert main(["experiment", "report", "ab", "--store", store, "--json"]) == code
    kept = results.read(json.loads(capsys.readouterr().out))
    assert kept.outcomes[1].name == "same"
    assert kept.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)  # an A/A candidate never passes


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 1), ("inconclusive", 2), ("error", 3)])
@pytest.mark.parametrize("form", [[], ["--json"], ["--markdown"]])
def test_exit_codes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verdict: str,
    code: int,
    form: list[str],
) -> None:
    monkeypatch.setattr(Experiment, "run", lambda self, **options: result(verdict))
    path, file = written(folder), tmp_path / "kept.sqlite"
    assert main(["experiment", "run", str(path), "--store", str(file)]) == code
    store = Store(file)
    version = store.begin("ab", "offline", {"control": "f", "a": "f"}, {})
    store.conclude(version, "", verdict, "because", result(verdict).to_dict())
    store.close()
    capsys.readouterr()
    assert main(["experiment", "report", "ab", "--store", str(file), *form]) == code
    assert verdict in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["shadow", "split"])
def test_what_was_live_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    file = tmp_path / "kept.sqlite"
    store = Store(file)
    version = store.begin("live", mode, {"control": "f", "a": "f"}, {})
    store.note(version, "rolled back", "too many errors")
    store.conclude(version, "a", "fail", "it was slower", {})
    store.conclude(version, "", "fail", "all fail", {})
    store.close()
    assert main(["experiment", "report", "live", "--store", str(file)]) == 1
    said = capsys.readouterr().out
    assert "it was slower" in said
    assert "too many errors" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "gone.toml"], "gone.toml: cannot be read as TOML"),
        (["run", "gone.toml", "--chart", "c.exe"], "c.exe cannot be drawn; expected a file that ends in .svg"),
        (["report", "ab", "--store", "gone.sqlite"], "there is no file gone.sqlite with experiments"),
        (["report", "aa"], "there is no experiment 'aa'"),
    ],
)
def test_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", *arguments]) == 4
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("tier =", "teir ="), "ab.toml: unknown key 'teir', did you mean 'tier'?"),
        (('tier = "strict"', "tier = 3"), "ab.toml: tier is 3; expected str"),
        (("pairs = 2", "pairs = true"), "ab.toml: pairs is True; expected int"),
        (("pairs = 2", "pairs = 0"), "budget_s and pairs must be above 0"),
        (("pairs = 2", "limits = { min_gian = 0.1 }"), "[limits]: unknown key 'min_gian', did you mean 'min_gain'?"),
        (("pairs = 2", "limits = { min_gain = 'x' }"), "[limits]: min_gain is 'x'; expected a number"),
        (("pairs = 2", "limits = { min_gain = -5 }"), "[limits]: min_gain is -5; expected a number above -1"),
        (("pairs = 2", "limits = { min_gain = nan }"), "[limits]: min_gain is nan; expected a number above -1"),
        (("pairs = 2", "batch_sizes = [99999999999]"), "batch_sizes holds 99999999999; expected whole numbers"),
        (("pairs = 2", "batch_sizes = ['x']"), "batch_sizes holds 'x'; expected whole numbers"),
        (('control = "model"', ""), "ab.toml: control is missing"),
        (("same = []", "same = 3"), "candidate 'same' is 3; expected a policy, a path, or"),
        (("same = []", "same = [{ bits = 8 }]"), "candidate 'same': {'bits': 8} names no transform"),
        (("same = []", 'same = { transform = "thread" }'), "candidate 'same': no transform 'thread', did you mean"),
        (("same = []", "same = ["), "ab.toml: cannot be read as TOML"),
    ],
)
def test_what_is_wrong_with_a_file(folder: Path, change: tuple[str, str], words: str) -> None:
    with pytest.raises(ExperimentError) as raised:
        sheet.load(written(folder, TOML.replace(*change)))
    assert words in str(raised.value)


def test_what_a_file_says(folder: Path) -> None:
    text = 'name = "mine"\nbudget_s = 9\nbatch_sizes = [1, 2]\n' + TOML + 'int8 = { transform = "weight_only" }\n'
    found = sheet.load(written(folder, text + 'plain = "lossless"\nother = "model"\n'))
    given: dict[str, Any] = dict(found.given)
    assert (found.name, dict(found.timing)) == ("mine", {"budget_s": 9, "pairs": 2})
    assert given["control"] == given["candidates"]["other"] == str(folder / "model")
    assert given["workload"] == str(folder / "prompts.jsonl")
    assert given["candidates"]["same"] == []
    assert given["candidates"]["plain"] == "lossless"
    assert [t.name for t in given["candidates"]["int8"]] == ["weight_only"]


def test_the_examples_file_is_valid() -> None:
    found = sheet.load(Path(__file__).parents[3] / "examples" / "ab_experiment.toml")
    assert set(found.given["candidates"]) == {"int8", "int4"}
