"""Replicas that share a directory: a plan goes to one of them, then to all or none; the canary may be killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import autotune
from autotune.compare.experiment.store import Store
from autotune.errors import PlanError
from autotune.live.status import State
from autotune.live.watch.breaker import Cause
from autotune.machine import cache_dir
from autotune.model.load import load
from autotune.serve import run
from autotune.serve.answering import Answered
from autotune.serve.rollout.decision import CanaryRules, Rollout, RolloutState
from autotune.serve.rollout.folder import Folder, Offer
from autotune.serve.rollout.replica import Replica
from autotune.serve.run import Settings, prepared
from autotune.serve.service import UNSETTLED
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.static_cache import StaticCache
from autotune.tune import plan as plans
from autotune.tune import policy as policies
from autotune.tune import run as tuning
from autotune.tune.plan import Plan
from autotune.validate import Verdict
from tests.live.test_adopt import made_for, verdicts  # noqa: F401 - a fixture
from tests.live.test_wrap import greedy
from tests.models import tiny, tiny_tokenizer, token_prompts
from tests.serve.servers import running, until
from tests.serve.test_rollout import figures

RULES = CanaryRules()
pytestmark = pytest.mark.usefixtures("own_cache", "verdicts")
CANARY = """
import sys, time
from pathlib import Path
from autotune.serve.rollout.decision import Rollout
from autotune.serve.rollout.folder import Folder

folder = Folder(Path(sys.argv[1]))
assert folder.lock.take()
folder.write(Rollout(folder.offered.hash, "another", time.time(), serves=True))
print("serves", flush=True)
sys.stdin.read()
"""


@dataclass
class Peers:
    """One replica over a tiny model, and what it sees of others."""

    model: Any
    folder: Folder
    store: Store
    replica: Replica

    def offered(self, *transforms: Any) -> Plan:
        plan = made_for(self.model, *transforms)
        self.folder.offer(plans.dumps(plan).encode())
        return plan

    def canary_answers(self, answers: int = 1000, tpot: float = 1.0) -> None:
        """This replica answers, and so do the others."""
        rollout = self.folder.rollout
        assert rollout is not None
        assert rollout.serves
        self.folder.publish("another", rollout, figures(seed=1))
        self.replica.tally._figures = figures(answers, tpot=tpot)

    def answers(self, outcome: str) -> None:
        """This replica's model ends an answer that was asked for now."""
        tally = self.replica.tally
        tally.hear(Answered(tally._clock(), outcome, 0.1, 0.01))

    @property
    def published(self) -> tuple[int, int]:
        """Answers that count as those of replicas beside the canary, and how many of them failed."""
        rollout = self.folder.rollout
        assert rollout is not None
        counted = self.folder.control(rollout)["failures"]
        return counted.n, counted.hits

    @property
    def state(self) -> tuple[RolloutState, str]:
        rollout = self.folder.rollout
        assert rollout is not None
        return rollout.state, rollout.reason


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    with peer(tiny("llama")) as found:
        yield found


class peer:
    """A replica of a model, which steps when it is told to."""

    def __init__(self, model: Any) -> None:
        self.model = autotune.wrap(model, workload=token_prompts(4), when="manual", cache=False)

    def __enter__(self) -> Peers:
        folder = Folder.of("a/model")
        assert folder is not None
        store = Store()
        return Peers(self.model, folder, store, Replica(folder, self.model.autotune, RULES, store))

    def __exit__(self, *_: object) -> None:
        self.model.autotune.unwrap()


def test_a_plan_that_holds_goes_to_the_canary_and_then_to_all(peers: Peers) -> None:
    said = greedy(peers.model)
    peers.replica.step()
    assert peers.folder.rollout is None
    plan = peers.offered(LeanLoop())
    peers.replica.step()
    assert peers.replica.is_canary
    assert peers.state == (RolloutState.CANARY, "the canary serves")
    assert peers.model.autotune.plan == plan
    peers.canary_answers(30)
    peers.replica.step()
    assert peers.replica.is_canary
    peers.canary_answers(tpot=0.5)
    peers.replica.step()
    state, reason = peers.state
    assert state is RolloutState.PROMOTED
    assert "within every limit" in reason
    assert greedy(peers.model) == said
    (version,) = peers.store.versions("rollout")
    assert (version.mode, version.status) == ("canary", "done")
    assert [event.kind for event in peers.store.events(version)] == ["begun", "canary", "resumed", "promoted"]
    assert peers.store.verdicts(version)["plan"].verdict == "pass"
    with peer(tiny("llama")) as other:  # another replica takes it, too
        other.replica.step()
        assert other.model.autotune.plan == plan
        assert other.replica.serves == peers.replica.serves is not None
        other.replica.step()


def test_a_promoted_plan_that_does_not_hold_here_is_verified_again_later(
    peers: Peers,
    verdicts: list[Verdict],  # noqa: F811
) -> None:
    now = 0.0
    peers.replica._clock = lambda: now
    plan = made_for(peers.model, LeanLoop())
    peers.folder.promote(Offer.of(plans.dumps(plan).encode()))
    verdicts[:] = [Verdict.FAIL, Verdict.PASS]
    peers.replica.step()
    assert peers.model.autotune.plan is None
    now = RULES.again_s - 1
    peers.replica.step()
    assert verdicts == [Verdict.PASS]
    assert peers.model.autotune.plan is None
    now = RULES.again_s
    peers.replica.step()
    assert peers.model.autotune.plan == plan


def test_a_replica_that_starts_later_begins_with_the_promoted_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_searched", lambda *_: pytest.fail("it is tuned"))
    tiny("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    plan = made_for(load(tmp_path / "tiny")[0], LeanLoop())
    folder, offer = Folder.of("tiny"), Offer.of(plans.dumps(plan).encode())
    assert folder is not None
    folder.promote(offer)
    folder.lock.close()
    served = prepared(Settings(str(tmp_path / "tiny"), policy=policies.load("throughput"), rollout=RULES))
    assert served.rollout is not None
    assert served.answers.tell == served.rollout.tally.hear
    until(lambda: served.model.autotune.status.state not in UNSETTLED)
    assert served.model.autotune.status.transforms == (str(LeanLoop()),)
    assert served.rollout.serves == offer.hash
    served.rollout.stop()
    served.model.autotune.unwrap()


def test_a_promoted_plan_of_another_model_is_not_used(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    peers.folder.promote(Offer.of(plans.dumps(made_for(tiny("gpt2"), LeanLoop())).encode()))
    assert run._promoted(peers.folder, tiny("llama")) is None
    assert "the promoted plan is not used: the plan was made for model" in caplog.text


def test_a_plan_that_is_slower_in_service_is_rolled_back(peers: Peers) -> None:
    first = peers.offered(StaticCache())
    peers.replica.step()
    peers.canary_answers()
    peers.replica.step()
    said = greedy(peers.model)
    peers.offered(LeanLoop())
    peers.replica.step()
    assert peers.model.autotune.status.transforms == (str(LeanLoop()),)
    peers.canary_answers(tpot=2.0)
    peers.replica.step()
    state, reason = peers.state
    assert state is RolloutState.ROLLED_BACK
    assert "over the limit: tpot" in reason
    assert peers.model.autotune.plan == first
    assert greedy(peers.model) == said
    version = peers.store.versions("rollout")[0]
    assert version.status == "rolled back"
    assert peers.store.verdicts(version)[""].verdict == "fail"
    peers.replica.step()  # the same plan is not tried again by itself
    assert not peers.replica.is_canary
    assert peers.model.autotune.plan == first
    peers.offered(LeanLoop())  # but if it is offered again
    peers.replica.step()
    assert peers.replica.is_canary


def test_a_plan_that_does_not_hold_never_serves(peers: Peers, verdicts: list[Verdict]) -> None:  # noqa: F811
    verdicts[:] = [Verdict.FAIL]
    peers.offered(LeanLoop())
    peers.replica.step()
    state, reason = peers.state
    assert (state, peers.replica.is_canary) == (RolloutState.ROLLED_BACK, False)
    assert "the canary did not take the plan: it did not hold" in reason
    assert peers.model.autotune.status.state is State.WAITING
    peers.folder.offer(plans.dumps(made_for(tiny("gpt2"), LeanLoop())).encode())
    peers.replica.step()
    assert "made for model" in peers.state[1]


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda model: model.autotune._serving.watch.failed("NaN logits"), "NaN logits"),
        (lambda model: model.autotune.rollback(), "rolled back"),
    ],
)
def test_a_plan_that_serves_no_more_is_rolled_back(peers: Peers, harm: Callable[[Any], None], reason: str) -> None:
    peers.offered(LeanLoop())
    peers.replica.step()
    peers.canary_answers()
    harm(peers.model)
    peers.replica.step()
    assert peers.state[0] is RolloutState.ROLLED_BACK
    assert reason in peers.state[1]
    assert peers.model.autotune.status.state is State.WAITING


def test_a_plan_that_rests_because_it_seemed_slow_is_judged_by_its_figures(peers: Peers) -> None:
    peers.offered(LeanLoop())
    peers.replica.step()
    peers.canary_answers(30)
    peers.model.autotune._serving.watch.failed("tokens take longer", Cause.LATENCY)
    assert not peers.model.autotune.status.transforms
    peers.replica.step()
    assert peers.state[0] is RolloutState.CANARY


@pytest.mark.parametrize("by", ["itself", "another"])
def test_a_promotion_that_could_not_be_written_down_is_one(
    peers: Peers, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = peers.offered(LeanLoop())
    peers.replica.step()
    peers.canary_answers(tpot=0.5)
    with monkeypatch.context() as full:

        def write(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(Folder, "write", write)
        with pytest.raises(OSError, match="No space"):
            peers.replica.step()
    peers.folder.lock.give()
    if by == "itself":
        peers.replica.step()
    else:
        Replica(peers.folder, peers.model.autotune, RULES, None)._bury()
    assert peers.folder.promoted is not None
    assert peers.folder.promoted.plan() == plan
    assert peers.state[0] is RolloutState.PROMOTED


@contextmanager
def canary(peers: Peers) -> Iterator[subprocess.Popen[str]]:
    """Another process that serves with the plan on offer, until it is killed."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", CANARY, str(peers.folder.path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serves\n"
        yield process
        process.kill()


def test_a_canary_that_is_killed_is_a_roll_back(peers: Peers) -> None:
    peers.offered(LeanLoop())
    with canary(peers):
        peers.replica.step()
        peers.answers("stop")
        peers.replica.step()
        assert peers.state[0] is RolloutState.CANARY
        assert peers.published == (1, 0)
    peers.replica.step()
    assert peers.state == (RolloutState.ROLLED_BACK, "the canary's process ended")
    assert peers.model.autotune.status.state is State.WAITING
    assert peers.store.versions("rollout")[0].status == "rolled back"


def test_answers_beside_a_search_do_not_count(peers: Peers) -> None:
    """The replica is tuned anew in the middle of a rollout, and its answers fail meanwhile."""
    serving = peers.model.autotune._serving
    peers.offered(LeanLoop())
    with canary(peers):
        peers.replica.step()
        peers.answers("stop")
        peers.replica.step()
        serving.become(State.TUNING, "again")
        peers.answers("error")  # before it is seen that it tunes
        peers.replica.step()
        peers.answers("error")
        peers.replica.step()
        assert peers.published == (1, 0)
        serving.become(State.ORIGINAL, "kept the original")
        peers.replica.step()
        peers.answers("stop")
        peers.replica.step()
        assert peers.published == (1, 0)


def test_figures_of_others_are_put_together(peers: Peers) -> None:
    rollout = Rollout("plan", "canary", 1.0)
    assert peers.folder.control(rollout) == {}
    for name, answers in (("a", 10), ("b", 20), ("canary", 40)):
        peers.folder.publish(name, rollout, figures(answers))
    peers.folder.publish("of an earlier rollout", Rollout("plan", "canary", 0.0), figures(80))
    (peers.folder.path / "figures-damaged.json").write_text("{")
    (peers.folder.path / "figures-strange.json").write_text(f'{{"rollout": "{rollout.key}", "figures": 5}}')
    assert peers.folder.control(rollout)["failures"].n == 30


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"schema": 1}'])
def test_what_is_no_plan_is_refused(peers: Peers, text: bytes) -> None:
    with pytest.raises(PlanError):
        peers.folder.offer(text)
    cache_dir.write(peers.folder.path / "plan.json", [text])  # put there by hand
    peers.replica.step()
    assert peers.state[0] is RolloutState.ROLLED_BACK
    assert not peers.replica.is_canary


def test_an_operator_offers_a_plan_over_http(peers: Peers) -> None:
    import httpx

    with running() as server, httpx.Client(base_url=server.url) as client:
        path, text = "/autotune/rollout", plans.dumps(made_for(peers.model, LeanLoop())).encode()
        kind = {"Content-Type": "application/json"}
        assert client.post(path, content=text, headers=kind).status_code == 409
        server.served.rollout = peers.replica
        assert client.get(path).json()["rollout"] is None
        assert client.post(path, content=b"{}", headers=kind).status_code == 400
        assert client.post(path, content=text).status_code == 415
        answer = client.post(path, content=text, headers=kind)
        assert (answer.status_code, answer.json()["offered"]) == (202, Offer.of(text).hash)
        peers.replica.step()
        assert client.get(path).json()["is_canary"]


@pytest.mark.parametrize(("model", "folder"), [("a/model", "a-model"), ("..", "model"), (".hidden", "hidden")])
def test_every_model_has_a_folder_among_the_rollouts(
    model: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    found = Folder.of(model)
    assert found is not None
    assert found.path == tmp_path / "cache" / "rollouts" / folder
    found.lock.close()


def test_a_folder_of_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "rollouts" / "model").mkdir(parents=True, mode=0o700)
    for path in (tmp_path / "cache", tmp_path / "cache" / "rollouts"):
        path.chmod(0o700)
    (tmp_path / "cache" / "rollouts" / "model").chmod(0o777)
    assert Folder.of("model") is None
