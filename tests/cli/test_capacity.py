"""`autotune plan-capacity` as its user runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune import workload
from autotune.cli import main
from autotune.machine import hardware
from autotune.tune import fingerprint, policy, run, store
from autotune.workload import built_in
from tests.models import tiny, tiny_tokenizer
from tests.report.test_capacity import STEPS, record
from tests.report.test_report import ORIGINAL
from tests.runtime.test_program import needs_kernels
from tests.tune.test_tune import KEPT

SLOWER = {"change": "shorter prompts", "speedups": {"ttft": 0.5}, "because": "it is", "assumes": "nothing"}
FASTER = {"change": "ACME T9", "speedups": {"ttft": 4.0, "tpot": 2.0}, "because": "9 TB/s", "assumes": "the same share"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    from autotune.tune.record import report_of

    given = record(STEPS)
    told: dict[str, Any] = report_of(ORIGINAL).to_dict()
    told |= {"callers": given["callers"], "advice": [SLOWER, FASTER]}
    told["callers"] |= {
        "reason": "decoded together",
        "differing": 0,
        "gap_ms": None,
        "long_prompt": 0,
    }
    figures = {"tokens_per_s": 80.0, "ttft_ms": 9.0, "tpot_ms": 9.0, "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
    told["callers"] |= {
        "new_tokens": 24,
        "alone_tokens_per_s": 40.0,
        "points": [{"callers": n} | figures for n in (1, 4, 16)],
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps(told))
    return path


LOAD = ("--users", "40", "--ttft", "5000", "--tpot", "60", "--prompt-tokens", "100", "--new-tokens", "50")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (
            LOAD,
            ("replicas for 40 users", "99 of 100 answers", "ask for 50 tokens", "10.0 for 1, 16.0 for 4, 40.0 for 16"),
        ),
        (
            ("--users", "4", "--ttft", "5000", "--machine", "acme"),
            ("on ACME T9, predicted from", "5.0 for 1, 8.0 for 4, 20.0 for 16", "read 4.00x as fast", "the same share"),
        ),
    ],
    ids=["here", "another machine"],
)
def test_replicas_users_and_assumptions_are_told(
    asked: tuple[str, ...], wanted: tuple[str, ...], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan-capacity", str(file), *asked]) == 0
    told = capsys.readouterr().out
    assert all(each in told for each in wanted)


def test_what_no_replica_can_do_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-capacity", str(file), "--users", "4", "--tpot", "5"]) == 1
    assert "No replica is fast enough: one user alone would wait" in capsys.readouterr().out


@needs_kernels
@pytest.mark.usefixtures("own_cache")
def test_of_a_model_the_plan_that_is_kept_counts(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny("llama", max_position_embeddings=4096), tiny_tokenizer()
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "tiny")
    work = workload.read(built_in.chats(tokenizer), tokenizer=tokenizer, model=model)
    identity = fingerprint.of(model, hardware.identify(model), work, policy.load("throughput"))
    store.save(replace(KEPT, fingerprint=identity, transforms=(), summary=json.loads(file.read_text())))
    monkeypatch.setattr(run, "_searched", lambda *_: pytest.fail("it is tuned again"))
    assert main(["plan-capacity", str(tmp_path / "tiny"), *LOAD]) == 0
    assert "10.0 for 1, 16.0 for 4, 40.0 for 16" in capsys.readouterr().out


def test_a_report_that_does_not_say_it_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from autotune.tune.record import report_of

    (tmp_path / "report.json").write_text(report_of(ORIGINAL).to_json())
    assert main(["plan-capacity", str(tmp_path / "report.json"), "--users", "4"]) == 4
    assert "--policy throughput" in capsys.readouterr().err


def test_a_machine_without_figures_is_an_error(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-capacity", str(file), "--users", "4", "--machine", "T8"]) == 4
    assert "these other machines: ACME T9; 'T8' is not one of them" in capsys.readouterr().err
