"""A model that is sharded over two ranks: what can be tuned there, and that no rank waits for ever. See ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from autotune.runtime import kernels
from tests import models
from tests.tune import ranks

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version(ranks.OLDEST),
    reason=f"models are sharded otherwise before transformers {ranks.OLDEST}",
)
ROOT = Path(__file__).parents[2]
TIME_S = 200  # seconds after which the ranks are killed
FAULTS = [f"rank {rank}, {place}" for rank in range(ranks.RANKS) for place in ranks.PLACES]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    kernels.available()  # so that the ranks find them compiled
    folder = tmp_path_factory.mktemp("ranks")
    models.tiny("llama").save_pretrained(folder)
    processes = [_start(rank, folder) for rank in range(ranks.RANKS)]
    end = time.monotonic() + TIME_S
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"a rank did not end within {TIME_S} s\n{_said(folder)}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    files = [folder / f"{rank}.json" for rank in range(ranks.RANKS)]
    assert all(file.exists() for file in files), _said(folder)
    found = [json.loads(file.read_text()) for file in files]
    assert "rank_that_ends" in found[0], _said(folder)
    return found


def _start(rank: int, folder: Path) -> subprocess.Popen[bytes]:
    world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks.RANKS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.tune.ranks", str(rank), str(folder)]
    with (folder / f"{rank}.txt").open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | world, stdout=file, stderr=file)


def _said(folder: Path) -> str:
    return "\n".join((folder / f"{rank}.txt").read_text(errors="replace") for rank in range(ranks.RANKS))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The answer of one process."""
    model: Any = models.tiny("llama")
    ids = torch.tensor(models.token_prompts(2))
    found: list[list[int]] = model.generate(ids, max_new_tokens=ranks.NEW, min_new_tokens=ranks.NEW).tolist()
    return found


def test_answers_are_those_of_one_process(seen: list[dict[str, Any]], expected: list[list[int]]) -> None:
    for rank in seen:
        assert rank["original"] == expected
        assert rank["tuned"]["answers"] == expected
        assert rank["tuned"]["served"] == 1


def test_a_plan_that_fails_is_not_hidden_from_the_caller(seen: list[dict[str, Any]], expected: list[list[int]]) -> None:
    for rank in seen:
        said, next_answer = rank["tuned"]["failed"]
        assert "no such kernel; other ranks may be in the middle of this call" in said
        assert next_answer == expected


def test_what_claims_to_work_on_a_part_of_a_layer_does(seen: list[dict[str, Any]], expected: list[list[int]]) -> None:
    missing = {name for name, answer in seen[0]["each_transform"].items() if answer != expected}
    assert all(isinstance(seen[0]["each_transform"][name], str) for name in missing), "other tokens"
    assert {"attention", "lean_loop", "static_cache"}.isdisjoint(missing)
    assert len(seen[0]["each_transform"]) >= 7
    assert seen[0]["each_transform"] == seen[1]["each_transform"]


def test_ranks_agree_on_the_plan(seen: list[dict[str, Any]]) -> None:
    one, other = (rank["tuned"] for rank in seen)
    assert one["plan"] == other["plan"]
    assert (one["state"], other["state"]) == ("tuned", "tuned")
    assert one["trials"] == other["trials"]
    outcomes = {name.partition("(")[0]: outcome for name, (outcome, _) in one["trials"].items()}
    assert outcomes == {"static_cache": "accepted", "weight_only": "unavailable"}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("when", "tuning starts with .tune() on every rank"),
        ("submit", "StateError: requests cannot be submitted"),
        ("experiment", "only wrap(model) tunes it, on all ranks together"),
        ("weight_only", "sharded over 2 ranks (tensor parallel), which wait for each other"),
    ],
)
def test_the_rest_is_declined_with_the_reason(seen: list[dict[str, Any]], what: str, says: str) -> None:
    for rank in seen:
        reasons = {name.partition("(")[0]: reason for name, (_, reason) in rank["tuned"]["trials"].items()}
        assert says in (rank["declined"] | reasons)[what]


@pytest.mark.fault("C56")
def test_a_fault_on_one_rank_is_a_failed_trial_on_both(seen: list[dict[str, Any]], expected: list[list[int]]) -> None:
    for rank in seen:
        ((outcome, reason),) = rank["fault_in_a_trial"]["trials"].values()
        assert outcome == "error"
        assert "rank 1 failed: decode failed: RuntimeError: no memory on this rank" in reason
        assert rank["fault_in_a_trial"]["answers"] == expected
    assert seen[0]["fault_in_a_trial"]["plan"] == seen[1]["fault_in_a_trial"]["plan"]


@pytest.mark.fault("C56")
@pytest.mark.parametrize("fault", FAULTS)
def test_no_rank_waits_for_one_that_fails(seen: list[dict[str, Any]], expected: list[list[int]], fault: str) -> None:
    for rank in seen:
        said, answer_afterwards = rank["faults"][fault]
        assert said.startswith("rank 1 failed: ") == fault.startswith("rank 1")
        assert "on this rank" in said
        assert answer_afterwards == expected


@pytest.mark.fault("C56")
def test_ranks_with_different_tasks_are_refused(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "different workloads or policies" in rank["different_tasks"]


@pytest.mark.fault("C56")
def test_a_rank_that_ends_is_not_waited_for(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["rank_that_ends"] not in ("", "late")
