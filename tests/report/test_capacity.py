"""How many users a replica holds: costs from a record, and a simulation whose answers can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.report import capacity
from autotune.report.capacity import ReplicaCosts, Usage, costs_of, most_users, simulate
from autotune.runtime.batching import engine, joined

COSTS = ReplicaCosts({32: 0.032, 128: 0.128}, {1: 0.010, 4: 0.016, 16: 0.040})


def record(steps: dict[str, float], accepted: bool = True) -> dict[str, Any]:
    """A report's record with milliseconds of steps by the answers that they decode."""
    reads = {"128": 262.0, "32": 70.0}  # of new prompts
    return {"callers": {"accepted": accepted, "rows": 16, "reads_ms": reads, "steps_ms": steps}}


STEPS = {"16": 40.0, "1": 10.0, "4": 16.0}
UNREAD, UNSTEPPED = record(STEPS), record({})  # written by earlier versions
UNREAD["callers"]["reads_ms"] = {}
READ_THRICE = record(STEPS)  # a line goes through two
READ_THRICE["callers"]["reads_ms"]["64"] = 130.0


def test_costs_are_those_that_were_measured() -> None:
    found = costs_of(record(STEPS))
    assert [found.read_s(tokens) for tokens in (1, 32, 80, 128)] == pytest.approx([0.008, 0.070, 0.166, 0.262])
    assert (list(found.steps_s), list(found.steps_s.values())) == ([1, 4, 16], pytest.approx([0.01, 0.016, 0.04]))
    assert (found.rows, found.step_s(10)) == (16, pytest.approx(0.028))


def test_another_machine_is_so_many_times_as_fast() -> None:
    found = COSTS.sped_up(4.0, 2.0)
    assert (found.read_s(64), found.step_s(4)) == (pytest.approx(0.016), pytest.approx(0.008))


def test_a_plan_that_serves_one_at_a_time_has_one_row() -> None:
    assert costs_of(record(STEPS, accepted=False)).rows == 1


@pytest.mark.parametrize(
    "told",
    [{}, {"callers": None}, {"callers": {"points": []}}, UNREAD, READ_THRICE, UNSTEPPED],
)
def test_a_report_without_callers_says_what_to_do(told: dict[str, Any]) -> None:
    with pytest.raises(capacity.CapacityError, match="--policy throughput"):
        costs_of(told)


def test_one_user_waits_for_nobody() -> None:
    """200 tokens are read in 0.2 s, 49 further ones come every 10 ms."""
    found = simulate(COSTS, Usage(200, 50), 1)
    assert found.ttft_s == pytest.approx([0.2] * len(found.ttft_s))
    assert found.tpot_s == pytest.approx([0.01] * len(found.tpot_s))
    assert found.tokens_per_s == pytest.approx(50 / (0.2 + 49 * 0.01))


@pytest.mark.parametrize("users", [4, 16])
def test_users_without_a_pause_get_what_the_engine_makes(users: int) -> None:
    """A round reads every prompt once, and takes as many steps as an answer has tokens."""
    found = simulate(COSTS, Usage(100, 200), users)
    round_s = users * COSTS.read_s(100) + 200 * COSTS.step_s(users)
    assert found.tokens_per_s == pytest.approx(users * 200 / round_s, rel=0.1)


READS = ReplicaCosts({32: 0.132, 128: 0.228}, {1: 0.010, 16: 0.010})  # 0.1 s, and 1 ms a token


@pytest.mark.parametrize(
    ("tokens", "users", "first_s"),
    [
        (540, 1, [0.64]),
        (544, 1, [0.612 + 0.132]),
        (64, 8, [0.612] * 8),
        (64, 10, [0.612] * 8 + [0.612 + 0.01 + 0.228] * 2),
        (159, 3, [0.577] * 3),
        (160, 2, [0.26, 0.26 + 0.01 + 0.228 + 0.01 + 0.132]),  # no longer a short one
        (31, 2, [0.131, 0.131 + 0.01 + 0.131]),  # kernels for few rows sum in another order
    ],
)
def test_what_is_read_at_once(tokens: int, users: int, first_s: list[float]) -> None:
    simulated = capacity._Engine(READS, Usage(tokens, 50))
    answers = [capacity._Answer(0.0, tokens, 50, user=user) for user in range(users)]
    simulated.waiting.extend(answers)
    while simulated.waiting:
        simulated.turn()
    assert [answer.first_s for answer in answers] == pytest.approx(first_s)


def test_the_simulated_engine_reads_as_the_real_one_does() -> None:
    assert (capacity.CHUNK, capacity.CHUNKS_AT_REST) == (engine.CHUNK, engine.CHUNKS_AT_REST)
    assert capacity.SHORTEST == joined.SHORTEST


def test_more_users_than_rows_wait_for_one() -> None:
    few, many = (simulate(COSTS, Usage(10, 100), users) for users in (16, 64))
    assert many.tokens_per_s == pytest.approx(few.tokens_per_s, rel=0.1)
    assert many.percentile("ttft_s", 50) > 2.5 * 100 * COSTS.step_s(16)
    assert many.percentile("tpot_s", 50) < 1.5 * few.percentile("tpot_s", 50)


def test_users_who_pause_load_a_replica_less() -> None:
    busy, calm = (simulate(COSTS, Usage(100, 50, pause), 8) for pause in (0.0, 20.0))
    assert calm.percentile("tpot_s", 50) < 0.7 * busy.percentile("tpot_s", 50)
    assert calm.tokens_per_s == pytest.approx(8 * 50 / (20 + 0.1 + 0.5), rel=0.25)


@pytest.mark.parametrize(
    ("new_tokens", "ttft_s", "tpot_s", "least", "most"),
    [
        (100, 60.0, 0.0105, 1, 1),
        (100, 60.0, 0.035, 8, 10),
        (100, 0.05, 1.0, 0, 0),
        (10, 600.0, 600.0, 64, capacity.MOST_USERS),
    ],
)
def test_the_most_users_are_bound_by_what_is_asked_for(
    new_tokens: int, ttft_s: float, tpot_s: float, least: int, most: int
) -> None:
    assert least <= most_users(COSTS, Usage(100, new_tokens), ttft_s, tpot_s) <= most


def test_no_more_users_are_promised_than_were_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "holds", lambda found, ttft_s, tpot_s: True)
    monkeypatch.setattr(capacity, "simulate", lambda costs, usage, users: users)
    assert most_users(COSTS, Usage(100, 100), 1.0, 1.0) == capacity.MOST_USERS
    monkeypatch.setattr(capacity, "holds", lambda found, ttft_s, tpot_s: found <= 3000)
    assert most_users(COSTS, Usage(100, 100), 1.0, 1.0) == 3000
