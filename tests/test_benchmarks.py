"""The side-by-side benchmark without its peers: figures, tables, the protocol, and what happens when a runtime dies."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest

from autotune.runtime import kernels
from autotune.workload.texts import TEXTS
from benchmarks import (
    loaded,
    peers,
    quality,
    restart,
    smoke,
    stage,
    table,
    worker,
)
from benchmarks.cores import physical_cores
from benchmarks.measures import (
    Extent,
    Metric,
    Shape,
    Timing,
    metrics,
    prompt,
    shapes,
    steady,
    tokens_per_s,
    tpot_ms,
    ttft_ms,
)
from benchmarks.peers import PEERS, Peer, Setup, Weights
from benchmarks.remote import Remote, WorkerError
from benchmarks.results import Quality, Result, Run, Spread, roofline_share, speedup, spread
from benchmarks.worker import Worker
from tests.models import ONE_QUESTION, tiny, token_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

SETUP = Setup("checkpoint", "model.gguf", "files", 2, 64)
FAKE = Peer("fake", "Fake", "fake", home="other")
LATENCY = Metric("tpot_64", "TPOT at 64", "ms", Shape(1, 64, 3), tpot_ms)
RATE = Metric("rate_4", "4 sequences", "tokens/s", Shape(4, 64, 3), tokens_per_s)

# A runtime of a worker process that answers, raises, dies or hangs, depending on the first token it is sent.
PROGRAM = """
import os, sys, threading, types
from benchmarks import peers, worker
from benchmarks.measures import Timing

class Runtime:
    def generate(self, prompts, new_tokens):
        os.write(1, b"noise from a library\\n")
        print("more of it")
        if prompts[0][0] == 1: raise MemoryError("no room")
        if prompts[0][0] == 2: os.abort()
        if prompts[0][0] == 3: threading.Event().wait()
        if prompts[0][0] == 4: print("bad news", file=sys.stderr, flush=True); os._exit(3)
        return Timing(0.5, float(new_tokens))

module = sys.modules["benchmarks.peers.fake"] = types.ModuleType("fake")
module.create = lambda setup: Runtime()
worker.PEERS = (peers.Peer("fake", "Fake", "fake"),)
sys.argv = ["worker", "fake"]
worker.main()
"""


class Fake:
    """A runtime that takes as long a token as it is told to, by its own account, or fails."""

    def __init__(self, broken: str = "", token_s: float = 0.001) -> None:
        self.broken = broken
        self.token_s = token_s
        self.seen = list[list[list[int]]]()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        if self.broken == "batches" and len(prompts) > 1:
            raise RuntimeError("one sequence at a time")
        self.seen.append([list(p) for p in prompts])
        return Timing(self.token_s, self.token_s * new_tokens)

    def logits(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        return {}

    def weights(self) -> Weights:
        return Weights(2000, 1000)

    def notes(self) -> list[str]:
        return ["a note"]


def result(name: str, label: str = "", **samples: list[float | None]) -> Result:
    return Result(name, label or name, samples=dict(samples))


def a_run(*results: Result, reference: str = "eager") -> Run:
    machine = {"name": "CPU", "capability": "AVX2"}
    return Run("2026-01-01", "model", machine, 2, 3, reference, list(results))


# Figures


@pytest.mark.parametrize(
    ("read", "timing", "shape", "expected"),
    [
        (ttft_ms, Timing(0.25, 0.25), Shape(1, 32, 1), 250.0),
        (ttft_ms, Timing(None, 0.3), Shape(4, 32, 1), 300.0),
        (tpot_ms, Timing(1.0, 1.32), Shape(1, 64, 33), 10.0),
        (tokens_per_s, Timing(None, 2.0), Shape(16, 64, 33), 264.0),
    ],
)
def test_figures_of_a_timing(read: Any, timing: Timing, shape: Shape, expected: float) -> None:
    assert read(timing, shape) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ended", "callers", "each", "expected"),
    [
        ([3.0, 4.0, 5.0, 25.0], 1, 2, 10.0),  # neither the first answer nor the last one counts
        ([1.0, 9.0, 2.0, 4.0, 3.0, 2.0], 2, 1, 20.0),  # in whatever order they were told: 2 answers in 1 s
        ([1.0, 1.0, 3.0, 3.0, 5.0, 5.0, 5.0, 9.0], 2, 2, 10.0),  # both of a pair together: 4 answers in 4 s
    ],
)
def test_steady_callers_are_timed_while_all_of_them_ask(
    ended: list[float], callers: int, each: int, expected: float
) -> None:
    assert steady(ended, callers, each, new_tokens=10) == pytest.approx(expected)


@pytest.mark.parametrize(("extent", "rounds"), [("quick", 100), ("usual", 100), ("long", 40)])
def test_no_two_prompts_of_a_run_begin_alike(extent: Extent, rounds: int) -> None:
    text = list(range(6163))
    sent = sum(s.batch * s.repeats for s in shapes(metrics(extent)))
    numbers = [*range(rounds * sent), *range(stage.UNTIMED, len(text))]
    assert rounds * sent < stage.UNTIMED
    assert len({prompt(text, n, 8)[0] for n in numbers}) == len(numbers)


def test_a_prompt_continues_at_the_beginning_of_the_text() -> None:
    assert prompt([1, 2, 3], 0, 7) == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("extent", get_args(Extent))
def test_every_request_is_sent_once_however_many_figures_it_gives(extent: Extent) -> None:
    measured = metrics(extent)
    assert len({m.name for m in measured}) == len(measured)
    assert len(shapes(measured)) < len(measured)


@pytest.mark.parametrize(
    ("reference", "candidate", "metric", "expected"),
    [
        ([30.0, 40.0, 50.0], [10.0, 10.0, 10.0], LATENCY, Spread(4.0, 3.0, 5.0)),
        ([100.0, 200.0, 100.0], [200.0, 400.0, 250.0], RATE, Spread(2.0, 2.0, 2.5)),
        ([30.0, None, 50.0], [10.0, 1.0, None], LATENCY, Spread(3.0, 3.0, 3.0)),  # a failure leaves its round out
        ([None], [10.0], LATENCY, None),
    ],
)
def test_speedups_are_paired_by_round(reference: Any, candidate: Any, metric: Metric, expected: Spread | None) -> None:
    one, two = result("a", **{metric.name: reference}), result("b", **{metric.name: candidate})
    assert speedup(one, two, metric) == expected
    assert speedup(None, two, metric) is None


def test_spread_of_nothing() -> None:
    assert spread([None, None]) is None


def test_share_of_the_roofline_is_of_the_bandwidth_beside_it() -> None:
    fast = result("a", tpot_64=[10.0, None, 40.0])
    fast.bandwidths["tpot_64"] = [10e9, 20e9, 5e9]
    assert roofline_share(fast, LATENCY) is None  # its bytes are unknown
    fast.read_bytes = 100_000_000
    assert roofline_share(fast, LATENCY) == pytest.approx(Spread(0.75, 0.5, 1.0))
    assert a_run(fast).bandwidth == Spread(10e9, 5e9, 20e9)


# Tables


@pytest.fixture
def mixed() -> Run:
    eager = result("eager", "Eager", tpot_64=[40.0, 40.0], rate_4=[50.0, 50.0])
    fast = result("autotune-strict", "Ours", tpot_64=[10.0, 8.0], rate_4=[None, None])
    fast.bandwidths["tpot_64"], fast.read_bytes = [20e9, 10e9], 40_000_000
    fast.failures["rate_4"] = "RuntimeError: one at a time"
    fast.quality = {"prefill": Quality(0.0001, 0.999, 90), "decode": Quality(0.002, 0.98, 80)}
    gone = Result("llama.cpp-q8_0", "Llama", missing="ModuleNotFoundError: No module named 'llama_cpp'")
    return a_run(eager, fast, gone)


def section(report: str, title: str) -> str:
    return next(part for part in report.split("\n## ") if part.startswith(title))


def test_a_missing_peer_is_named_with_its_reason_and_nowhere_else(mixed: Run) -> None:
    report = table.markdown(mixed, (LATENCY, RATE), {"autotune-strict": ("eager", "llama.cpp-q8_0")})
    assert "Llama: ModuleNotFoundError: No module named 'llama_cpp'" in section(report, "Missing")
    assert report.count("Llama") == 1


def test_a_request_that_failed_is_a_dash_and_a_note(mixed: Run) -> None:
    report = table.markdown(mixed, (LATENCY, RATE), {})
    assert "| Ours | 9.00 (8.00-10.0) | - |" in section(report, "Speed")
    assert "| Ours | 4.50x (4.00-5.00) | - |" in section(report, "Times as fast as Eager")
    assert "Ours, 4 sequences: RuntimeError: one at a time" in section(report, "Notes")


def test_rivals_are_compared_only_where_both_ran(mixed: Run) -> None:
    rivals = {"autotune-strict": ("eager", "llama.cpp-q8_0")}
    assert "Ours : Eager" in section(table.markdown(mixed, (LATENCY,), rivals), "One to one")
    assert "One to one" not in table.markdown(mixed, (LATENCY,), {"autotune-strict": ("llama.cpp-q8_0",)})


def test_quality_is_that_of_the_worse_path(mixed: Run) -> None:
    costs = section(table.markdown(mixed, (LATENCY,), {}), "Quality")
    assert "| Ours | 0.00200 | 98.0% | 35.0 % (20.0-50.0) |" in costs
    assert "| Eager | reference | reference | - |" in costs


def test_a_table_without_its_reference_has_no_ratios(mixed: Run) -> None:
    mixed.results[0].missing = "killed"
    assert "Times as fast" not in table.markdown(mixed, (LATENCY,), {})


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert table.grid(["a|b"], [["1|2"]]).splitlines()[-1] == "| 1/2 |"


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.50"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (1234.5, "1234")]
)
def test_three_significant_digits(value: float, shown: str) -> None:
    assert table.number(value) == shown


def test_a_run_is_json(mixed: Run) -> None:
    assert json.loads(json.dumps(asdict(mixed)))["results"][1]["quality"]["decode"]["tokens"] == 80


# The protocol


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    runtime, module = Fake(), ModuleType("fake")
    module.create = lambda setup: runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.peers.fake", module)
    return runtime


def replies(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    said: list[str] = []
    worker.serve(Worker(FAKE), io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), said.append)
    return [json.loads(line) for line in said]


def test_a_worker_answers_line_by_line(fake: Fake) -> None:
    load = {"do": "load", "setup": asdict(SETUP)}
    ask = {"do": "generate", "prompts": [[5, 6]], "new_tokens": 3}
    prepared, loaded, generated, told = replies(
        {"do": "prepare", "setup": asdict(SETUP)}, load, ask, {"do": "describe"}
    )
    assert prepared == loaded == {"value": None}
    assert Timing(**generated["value"]) == Timing(0.001, 0.003)
    assert told["value"]["weights"] == {"stored": 2000, "read": 1000}
    assert told["value"]["notes"] == ["a note"]
    assert fake.seen == [[[5, 6]]]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"do": "generate", "prompts": [[1]], "new_tokens": 1}, "RuntimeError: nothing was loaded yet"),
        ({"do": "dance"}, "AttributeError"),
    ],
)
def test_what_a_worker_cannot_do_is_a_sentence(fake: Fake, request_: dict[str, Any], error: str) -> None:
    assert replies(request_)[0]["error"].startswith(error)


def test_a_peer_that_is_not_installed_is_an_error_with_its_name() -> None:
    missing = Worker(Peer("x", "X", "no_such_peer")).answer({"do": "load", "setup": asdict(SETUP)})
    assert "no_such_peer" in missing["error"]


def test_an_interpreter_that_is_not_there_leaves_its_runtime_out(tmp_path: Path) -> None:
    homes: dict[Any, str] = {"vllm": str(tmp_path / "no" / "python")}
    troupe = stage.Stage(SETUP, [], tmp_path, homes, lambda line: None)
    troupe.admit(Peer("x", "X", "fake", home="vllm"), cold=False)
    assert "no/python cannot be started: No such file" in str(troupe.results["x"].missing)
    assert not troupe.remotes


@pytest.fixture
def remote(tmp_path: Path) -> Any:
    process = Remote([sys.executable, "-c", PROGRAM], tmp_path / "log", {})
    process.ask({"do": "load", "setup": asdict(SETUP)}, 60)
    yield process
    process.stop()


def generate(first: int) -> dict[str, Any]:
    return {"do": "generate", "prompts": [[first]], "new_tokens": 7}


def test_what_libraries_print_does_not_reach_the_protocol(remote: Remote) -> None:
    assert remote.ask(generate(0), 60) == {"first_s": 0.5, "total_s": 7.0}
    assert b"noise from a library" in remote.log.read_bytes()


@pytest.mark.parametrize(
    ("first", "timeout_s", "reason", "alive"),
    [
        (1, 60, "MemoryError: no room", True),
        (2, 60, "died of SIGABRT", False),
        (3, 0.2, "no answer to 'generate'", False),
        (4, 60, "exit code 3: bad news", False),
    ],
)
def test_failures_of_a_worker_say_what_happened(
    remote: Remote, first: int, timeout_s: float, reason: str, alive: bool
) -> None:
    with pytest.raises(WorkerError, match=reason):
        remote.ask(generate(first), timeout_s)
    assert remote.alive is alive


# The stage


class InProcess:
    """A worker without a process; it dies at the n-th request for tokens."""

    def __init__(self, runtime: Fake, dies_at: int = 10**9) -> None:
        self.worker = Worker(FAKE)
        self.alive = True
        self.left = dies_at
        self.worker.runtime = runtime

    def ask(self, request: dict[str, Any], timeout_s: float) -> Any:
        if request["do"] in ("prepare", "load"):
            return None
        self.left -= request["do"] == "generate"
        if self.left < 0:
            self.alive = False
            raise WorkerError("its process died of SIGSEGV")
        answer = self.worker.answer(request)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def stop(self) -> None:
        self.alive = False


class Troupe(stage.Stage):
    """A stage whose workers are made by the test."""

    def __init__(self, folder: Path, makers: dict[str, Any]) -> None:
        super().__init__(SETUP, list(range(6163)), folder, dict.fromkeys(("torch", "other"), ""), lambda line: None)
        self.makers = makers
        self.spawned = list[str]()

    def _spawn(self, peer: Peer) -> Any:
        self.spawned.append(peer.name)
        self.caches(peer).mkdir(parents=True, exist_ok=True)
        return self.makers[peer.name]()


def test_every_runtime_gets_the_same_prompts_in_every_round(tmp_path: Path) -> None:
    fakes = {name: Fake() for name in ("a", "b")}
    troupe = Troupe(tmp_path, {name: lambda name=name: InProcess(fakes[name]) for name in fakes})
    for name in fakes:
        troupe.admit(Peer(name, name, "fake"), cold=False)
    readings = itertools.count(10)
    troupe.play((LATENCY, RATE), rounds=2, bandwidth=lambda: 1e9 * next(readings))
    assert fakes["a"].seen == fakes["b"].seen
    beside = [each for r in troupe.results.values() for found in r.bandwidths.values() for each in found]
    assert sorted(beside) == [1e9 * (10.5 + 2 * visit) for visit in range(8)]  # before and after each of 8 visits
    assert troupe.results["a"].samples == {"tpot_64": [pytest.approx(1.0)] * 2, "rate_4": [pytest.approx(4000.0)] * 2}
    timed = [tuple(p) for prompts in fakes["a"].seen for p in prompts if len(p) == 64]
    assert len(set(timed)) == 1 + 2 * (1 + 4)  # the one of the start, which both starts share, and the timed ones


def test_cold_starts_happen_once_unless_asked_for(tmp_path: Path) -> None:
    peer, makers = Peer("a", "A", "fake"), {"a": lambda: InProcess(Fake())}
    for cold, starts in ((False, 3), (False, 2), (True, 3)):  # prepared, started cold and warm
        troupe = Troupe(tmp_path, makers)
        troupe.admit(peer, cold)
        assert len(troupe.spawned) == starts
        assert troupe.results["a"].cold_s is not None


def test_other_work_and_other_sources_have_caches_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    troupe, peer = Troupe(tmp_path, {}), Peer("a", "A", "fake")
    found = {troupe.caches(peer)}
    troupe.setup = replace(SETUP, threads=3)
    found.add(troupe.caches(peer))
    monkeypatch.setattr(stage, "sources", lambda: b"changed")
    found.add(troupe.caches(peer))
    assert len(found) == 3
    assert troupe.caches(peer) in found


def test_a_runtime_that_does_not_start_is_missing_and_the_others_go_on(tmp_path: Path) -> None:
    makers = {"bad": lambda: InProcess(Fake(), dies_at=0), "good": lambda: InProcess(Fake())}
    troupe = Troupe(tmp_path, makers)
    for name in makers:
        troupe.admit(Peer(name, name, "fake"), cold=False)
    troupe.warm_up((LATENCY,))
    troupe.play((LATENCY,), rounds=1, bandwidth=lambda: 10e9)
    assert "SIGSEGV" in troupe.results["bad"].missing
    assert troupe.results["good"].samples["tpot_64"] == [pytest.approx(1.0)]


def test_a_request_that_a_runtime_refuses_is_asked_once(tmp_path: Path) -> None:
    refusing = Fake(broken="batches")
    troupe = Troupe(tmp_path, {"a": lambda: InProcess(refusing)})
    troupe.admit(Peer("a", "A", "fake"), cold=False)
    troupe.warm_up((LATENCY, RATE))
    troupe.play((LATENCY, RATE), rounds=2, bandwidth=lambda: 10e9)
    assert troupe.results["a"].samples == {"tpot_64": [pytest.approx(1.0)] * 2, "rate_4": [None, None]}
    assert "one sequence at a time" in troupe.results["a"].failures["rate_4"]


@pytest.mark.parametrize(("name", "rounds"), [("slow", 1), (peers.REFERENCE, 3)])
def test_slow_requests_are_timed_once_but_for_the_reference(tmp_path: Path, name: str, rounds: int) -> None:
    troupe = Troupe(tmp_path, {name: lambda: InProcess(Fake(token_s=stage.SLOW_S))})
    troupe.admit(Peer(name, name, "fake"), cold=False)
    troupe.play((LATENCY,), rounds=3, bandwidth=lambda: 10e9)
    assert sum(value is not None for value in troupe.results[name].samples["tpot_64"]) == rounds


def test_a_runtime_that_dies_keeps_the_figures_it_has(tmp_path: Path) -> None:
    made = [InProcess(Fake()), InProcess(Fake()), InProcess(Fake(), dies_at=1 + 2)]  # start, then one visit
    troupe = Troupe(tmp_path, {"a": lambda: made.pop(0)})
    troupe.admit(Peer("a", "A", "fake"), cold=False)
    troupe.play((LATENCY,), rounds=3, bandwidth=lambda: 10e9)
    troupe.describe()
    assert troupe.results["a"].samples["tpot_64"] == [pytest.approx(1.0), None, None]
    assert "SIGSEGV" in troupe.results["a"].failures["tpot_64"]
    assert not troupe.remotes


# Quality


def test_logits_are_aligned_at_the_end_of_the_text() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    ids = list(range(10))
    same = quality.summary([quality.diverge(rows, rows, ids), quality.diverge(rows, rows[4:], ids)])
    assert same.mean_kld == pytest.approx(0.0, abs=1e-6)
    assert (same.same_top, same.tokens) == (1.0, 9 + 5)
    assert quality.summary([quality.diverge(rows, rows[:5], ids)]).mean_kld > 0.1


def test_held_out_texts_are_not_those_that_are_tuned_on() -> None:
    texts = quality.paragraphs()
    assert len(texts) >= 16
    assert not {t[:40] for t in texts} & {t[:40] for t in TEXTS}


def test_decoding_and_prefill_of_one_model_give_the_same_logits() -> None:
    from benchmarks.peers.tuned import LEAD, Tuned

    runtime, ids = Tuned(tiny("llama")), token_prompts(1, 20)[0]
    rows = runtime.logits(ids)
    assert len(rows["decode"]) == len(ids) - LEAD
    np.testing.assert_allclose(rows["decode"], rows["prefill"][-len(rows["decode"]) :], atol=1e-4)


def test_a_transformers_runtime_answers_in_full_and_knows_its_bytes() -> None:
    from benchmarks.peers.hugging_face import HuggingFace

    model = tiny("llama")
    runtime = HuggingFace(model)
    single, batch = runtime.generate(token_prompts(1), 5), runtime.generate(token_prompts(3), 5)
    assert single.first_s is not None
    assert batch.first_s is None
    stored = sum(p.numel() for p in model.parameters()) * 4
    assert runtime.weights().read == pytest.approx(stored, rel=0.01)  # tied: the embedding is what lm_head reads


@pytest.mark.slow
def test_autotune_is_a_runtime_like_any_other(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from benchmarks.peers import tuned

    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "quick.toml").write_text(ONE_QUESTION)
    prompts = token_prompts(32, 16)
    setup = replace(SETUP, checkpoint=str(tmp_path / "model"), workload=prompts, new_tokens=8)
    runtime = tuned.create(setup, policy=str(tmp_path / "quick.toml"))
    assert runtime.generate(prompts[:1], 5).first_s is not None
    assert set(runtime.logits(prompts[0])) == {"prefill", "decode"}
    assert runtime.weights().read
    assert "original" in runtime.notes()[0] or "threads" in runtime.notes()[0]


# The list, and the machine


def test_the_list_of_peers_is_sound() -> None:
    names = [peer.name for peer in PEERS]
    assert len(set(names)) == len(names)
    assert peers.REFERENCE in names
    for peer in PEERS:
        assert set(peer.rivals) <= set(names)
        assert (quality.TEXTS.parent / "peers" / f"{peer.module}.py").is_file()


def test_choosing_peers_keeps_the_reference() -> None:
    assert [p.name for p in peers.chosen(["llama.cpp-q8_0"])] == ["eager", "llama.cpp-q8_0"]
    assert peers.chosen() == PEERS
    with pytest.raises(KeyError, match="no runtime is called lama"):
        peers.chosen(["lama"])


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("", 2)])
def test_threads_are_physical_cores_within_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for cpu in range(4):  # two cores of two threads
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{cpu % 2}\n")
    (tmp_path / "quota").write_text(quota)
    assert physical_cores(tmp_path, tmp_path / "quota") == cores


@pytest.mark.parametrize(("value", "over"), [(41, False), (40, False), (42, True)])
def test_a_count_is_over_its_ceiling_or_not(value: float, over: bool) -> None:
    assert smoke.Count("recorded step", "barriers", value, 41).over is over


def test_every_plan_that_is_counted_has_ceilings() -> None:
    assert smoke.CEILINGS.keys() == smoke.PLANS.keys()


BEFORE = loaded.Round({(loaded.OURS, False): 10.0, (loaded.THEIRS, False): 60.0}, 0.01)
ROUNDS = [
    replace(BEFORE, ms=BEFORE.ms | {(loaded.OURS, True): 15.0, (loaded.THEIRS, True): 600.0}),
    replace(BEFORE, ms=BEFORE.ms | {(loaded.OURS, True): 20.0, (loaded.THEIRS, True): 300.0}),
    replace(BEFORE, ms=BEFORE.ms | {(loaded.OURS, True): 30.0, (loaded.THEIRS, True): 120.0}, elsewhere=None),
]


def test_what_a_busy_machine_costs_is_a_ratio_within_a_round() -> None:
    assert loaded.rows(ROUNDS) == [
        ("recorded INT8 step, ms", "10.00 [10.00, 10.00]", "20.00 [15.00, 30.00]", "2.00x [1.50, 3.00]"),
        ("transformers, ms", "60.00 [60.00, 60.00]", "300.00 [120.00, 600.00]", "5.00x [2.00, 10.00]"),
        ("times as fast", "6.00x [6.00, 6.00]", "15.00x [4.00, 40.00]", ""),
    ]
    assert loaded.others(ROUNDS) == "1% of the CPU time went elsewhere"
    assert loaded.others(ROUNDS[2:]) == "nobody says what others took"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system does not say what a process is at")
def test_the_load_runs_while_it_is_on_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "SETTLE_S", 0.0)
    load = loaded.Load(1, pinned=True)
    (process,) = load._processes

    def becomes(stopped: bool) -> bool:
        """Whether it is stopped, or runs, within a minute: a signal takes its time."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if (state == "T") == stopped:
                return True
            time.sleep(0.01)
        return False

    try:
        for running in (False, True, False):
            with load.on(running):
                assert becomes(stopped=not running)
        assert becomes(stopped=True)
    finally:
        load.end()
    assert process.poll() is not None


@pytest.mark.slow
def test_decode_beside_another_process_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    if kernels.available() is not None:
        pytest.skip("there is no recorded step without the kernels")
    assert loaded.main(["--layers", "1", "--rounds", "1", "--tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert "1 rounds; median [lowest, highest]. While the load was stopped nobody says what others took." in out
    assert [line.split(" | ")[0] for line in out.splitlines()[-3:]] == [
        "| recorded INT8 step, ms",
        "| transformers, ms",
        "| times as fast",
    ]
    assert "round 1 of 1" in err


def test_restarts_show_what_did_not_happen_in_every_life() -> None:
    lives = [
        {"loading": 2.0, "wrap returned": 0.5, "first answer": 1.0, "by the plan": 3.0, "verified": 20.0},
        {"loading": 4.0, "wrap returned": 0.7, "first answer": 1.5, "state": "original"},
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in restart.table(lives).splitlines()[2:]]
    assert rows == [
        ["loading", "3.00", "2.00", "4.00", "2"],
        ["wrap returned", "0.60", "0.50", "0.70", "2"],
        ["first answer", "1.25", "1.00", "1.50", "2"],
        ["by the plan", "3.00", "3.00", "3.00", "1"],
        ["verified", "20.0", "20.0", "20.0", "1"],
    ]
    assert "-" in restart.table([{"loading": 1.0}]).splitlines()[-1]
