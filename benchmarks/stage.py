"""Workers on a stage: started one after the other, asked in turn, and never two at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measures import Metric, Shape, Timing, prompt, shapes
from benchmarks.peers import REFERENCE, Home, Peer, Setup
from benchmarks.remote import ROOT, Remote, WorkerError
from benchmarks.results import Result

READY_S, REQUEST_S = 1800.0, 300.0  # when a worker that does not answer is given up
SLOW_S = 15.0  # a request that takes so long is timed in one round only: the others would take minutes
FIRST, WAKE = Shape(1, 64, 2), Shape(1, 8, 2)  # the request that ends the time to ready; one that ends a sleep
WARM_TOKENS = 4  # new tokens in the untimed round
UNTIMED = 3000  # prompts from this number on are in no timed request: a hundred rounds have fewer, of a long run forty

Ask = Callable[[Mapping[str, Any], float], Any]


def _asking(request: Mapping[str, Any]) -> Callable[[Ask], Any]:
    return lambda ask: ask(request, READY_S)


class Stage:
    """All workers of a run.

    Args:
        setup: what every runtime is given.
        text: token ids that prompts are cut from.
        folder: for caches and logs.
        python: interpreter of each home of runtimes.
        notify: told what happens, a sentence at a time.
    """

    def __init__(
        self,
        setup: Setup,
        text: Sequence[int],
        folder: Path,
        python: Mapping[Home, str],
        notify: Callable[[str], None],
    ) -> None:
        self.setup = setup
        self.text = text
        self.folder = folder
        self.python = python
        self.notify = notify
        self.remotes: dict[str, Remote] = {}
        self.results: dict[str, Result] = {}
        self.tired: set[tuple[str, Shape]] = set()  # whom not to ask again, and for what
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def admit(self, peer: Peer, cold: bool) -> None:
        """Start a runtime: once with empty caches where that is not known yet or asked for, then to stay.

        A runtime that does not start is noted as missing.
        """
        result = self.results[peer.name] = Result(peer.name, peer.label)
        caches = self.caches(peer)
        try:
            self._prepare(peer)
            if cold or not (caches / "cold.json").exists():
                shutil.rmtree(caches, ignore_errors=True)
                self.notify(f"{peer.label}: cold start")
                remote, seconds = self._start(peer)
                remote.stop()
                (caches / "cold.json").write_text(json.dumps({"seconds": seconds}))
            self.notify(f"{peer.label}: warm start")
            result.cold_s = json.loads((caches / "cold.json").read_text())["seconds"]
            self.remotes[peer.name], result.warm_s = self._start(peer)
            result.rss_bytes = self.remotes[peer.name].ask({"do": "memory"}, REQUEST_S).get("rss_bytes")
        except WorkerError as error:
            result.missing = str(error)
            self.notify(f"{peer.label} is missing: {error}")

    def _prepare(self, peer: Peer) -> None:
        remote = self._spawn(peer)
        try:
            remote.ask({"do": "prepare", "setup": asdict(self.setup)}, READY_S)
        finally:
            remote.stop()

    def _start(self, peer: Peer) -> tuple[Remote, float]:
        """A worker that has answered once, and the seconds from its birth to that answer."""
        begin = time.perf_counter()
        remote = self._spawn(peer)
        try:
            remote.ask({"do": "load", "setup": asdict(self.setup)}, READY_S)
            remote.ask(self.request(FIRST, UNTIMED), READY_S)
        except BaseException:
            remote.stop()
            raise
        return remote, time.perf_counter() - begin

    def caches(self, peer: Peer) -> Path:
        """The directory for what this runtime keeps: another one for other work, and for other sources of autotune."""
        key = hashlib.sha256(json.dumps(asdict(self.setup)).encode() + sources())
        return self.folder / "caches" / peer.name / key.hexdigest()[:12]

    def _spawn(self, peer: Peer) -> Remote:
        caches = self.caches(peer)
        caches.mkdir(parents=True, exist_ok=True)
        environment = {
            "OMP_NUM_THREADS": str(self.setup.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "AUTOTUNE_CACHE_DIR": str(caches / "autotune"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }
        command = [self.python[peer.home], "-m", "benchmarks.worker", peer.name]
        return Remote(command, self.folder / "logs" / f"{peer.name}.log", environment)

    def request(self, shape: Shape, number: int, new_tokens: int = 0) -> dict[str, Any]:
        """A request of this shape; prompts are numbered from `number` on."""
        prompts = [prompt(self.text, number + row, shape.prompt_tokens) for row in range(shape.batch)]
        return {"do": "generate", "prompts": prompts, "new_tokens": new_tokens or shape.new_tokens}

    def warm_up(self, metrics: Sequence[Metric]) -> None:
        """One untimed request of every shape; what a runtime cannot do is noted and not asked again."""
        for name in list(self.remotes):
            self.notify(f"{self.results[name].label}: warming up")
            for i, shape in enumerate(shapes(metrics)):
                request = self.request(shape, UNTIMED + 100 * i, min(shape.new_tokens, WARM_TOKENS))
                self._try(name, shape, metrics, _asking(request))

    def play(self, metrics: Sequence[Metric], rounds: int, bandwidth: Callable[[], float], seed: int = 0) -> None:
        """Time every shape in every runtime, round by round, in an order drawn anew each time.

        Args:
            bandwidth: measures the memory's read bandwidth, bytes/s. On a virtual machine it may double from one minute
                to the next, so it is measured before and after each request.
        """
        chance, number = random.Random(seed), 0
        for result in self.results.values():
            result.samples = {metric.name: [] for metric in metrics}
            result.bandwidths = {metric.name: [] for metric in metrics}
        for turn in range(rounds):
            self.notify(f"round {turn + 1} of {rounds}")
            for shape in shapes(metrics):
                for name in chance.sample(sorted(self.results), len(self.results)):
                    before = bandwidth()
                    timings = self._visit(name, shape, metrics, number)
                    beside = (before + bandwidth()) / 2
                    if name != REFERENCE and any(timing.total_s > SLOW_S for timing in timings):
                        self.tired.add((name, shape))
                    for metric in (metric for metric in metrics if metric.shape == shape):
                        values = sorted(metric.read(timing, shape) for timing in timings)
                        self.results[name].samples[metric.name].append(values[len(values) // 2] if values else None)
                        self.results[name].bandwidths[metric.name].append(beside)
                number += shape.batch * shape.repeats

    def _visit(self, name: str, shape: Shape, metrics: Sequence[Metric], number: int) -> list[Timing]:
        """The timings of one shape in one runtime, every runtime with the same prompts; none where it fails."""

        def measure(ask: Ask) -> list[Timing]:
            ask(self.request(WAKE, UNTIMED + number), REQUEST_S)
            requests = [self.request(shape, number + k * shape.batch) for k in range(shape.repeats)]
            return [Timing(**ask(request, REQUEST_S)) for request in requests]

        return self._try(name, shape, metrics, measure) or []

    def _try(self, name: str, shape: Shape, metrics: Sequence[Metric], act: Callable[[Ask], Any]) -> Any:
        """What `act` returns; None where the runtime is gone, tired of this shape or failed at it, which is noted."""
        affected = [metric.name for metric in metrics if metric.shape == shape]
        failures = self.results[name].failures
        if name not in self.remotes or (name, shape) in self.tired or any(metric in failures for metric in affected):
            return None
        try:
            return act(self.remotes[name].ask)
        except WorkerError as error:
            failures.update(dict.fromkeys(affected, str(error)))
            self.notify(f"{name} failed: {error}")
            if not self.remotes[name].alive:
                self.remotes.pop(name).stop()
            return None

    def describe(self) -> None:
        """Note memory, weights and remarks of everyone who is still there."""
        for name, remote in self.remotes.items():
            with suppress(WorkerError):
                told = remote.ask({"do": "describe"}, REQUEST_S)
                result = self.results[name]
                result.peak_bytes = told.get("peak_bytes")
                result.stored_bytes = told["weights"]["stored"]
                result.read_bytes = told["weights"]["read"]
                result.notes += told["notes"]

    def close(self) -> None:
        for remote in self.remotes.values():
            remote.stop()


@functools.cache
def sources() -> bytes:
    """A digest of autotune's own files."""
    files = sorted(file for file in (ROOT / "autotune").rglob("*") if file.suffix in (".py", ".cpp", ".h", ".toml"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()
