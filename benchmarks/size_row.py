"""One row of sizes.py in a process of its own: build a model, tune it, time it beside the original, let that one go.

Requests come in as JSON lines and answers go out as JSON lines, as in worker.py.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import autotune
from autotune.diagnose.work import stored_weights
from autotune.machine import hardware
from autotune.tune import policy
from benchmarks import shapes
from benchmarks.measures import STEPS, Shape, tpot_ms, ttft_ms
from benchmarks.peers import Weights
from benchmarks.peers.tuned import Tuned
from benchmarks.worker import first_line, memory, serve

PROMPT_TOKENS = 64
LENGTHS = (56, 60, 64, 68, 72)  # tokens of the prompts that are tuned for
PROMPTS = 40
NEW_TOKENS = 32
TIMED = Shape(1, PROMPT_TOKENS, STEPS + 1)
FEWEST_ROUNDS = 2  # however long they take
EVERY_S = 0.2  # between two looks at the memory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Stage:
    """What tuning was doing: since when, seconds from its start, and the most that was resident meanwhile."""

    name: str
    start_s: float
    peak_bytes: int = 0


@dataclass
class Watcher:
    """Looks at the process's memory while the block runs, and books the most under what was going on.

    Args:
        look: resident bytes now; None where the system does not tell.
    """

    look: Callable[[], int | None] = lambda: memory().get("rss_bytes")
    stages: list[Stage] = field(default_factory=lambda: [Stage("beginning", 0.0)])

    def __enter__(self) -> Watcher:
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def note(self, name: str) -> None:
        """What begins now, or goes on."""
        if name != self.stages[-1].name:
            self.measure()
            self.stages.append(Stage(str(name), time.monotonic() - self._start))

    def measure(self) -> None:
        stage = self.stages[-1]
        stage.peak_bytes = max(stage.peak_bytes, self.look() or 0)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.measure()
        self.measure()


class RowWorker:
    """Answers the requests for one row, in this order: load, tune, time, release."""

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{"value": ...}, or {"error": sentence} for whatever is raised."""
        arguments = dict(request)
        try:
            return {"value": getattr(self, "do_" + arguments.pop("do"))(**arguments)}
        except Exception as error:  # a row that fails is shown with its reason
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {first_line(error)}"}

    def do_load(self, shape: str, dtype: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        before = memory().get("rss_bytes")
        self.runtime = Tuned(shapes.build((shapes.SHAPES | shapes.TINY)[shape], DTYPES[dtype]))
        self.chance = random.Random(0)
        return {
            "model_bytes": stored_weights(self.runtime.model),
            "process_bytes": before,
            "loaded_bytes": memory().get("rss_bytes"),
        }

    def do_tune(self, budget_s: float, policy_name: str) -> dict[str, Any]:
        reset = forget_peak()
        prompts = tuple(self.prompt(LENGTHS[k % len(LENGTHS)]) for k in range(PROMPTS))
        start = time.monotonic()
        with Watcher() as watcher:
            autotune.wrap(
                self.runtime.model,
                policy=replace(policy.load(policy_name), budget_s=budget_s),
                workload=autotune.Workload(prompts, NEW_TOKENS),
                when="blocking",
                cache=False,
                watch=0.0,  # nothing is scored again between timed requests
                progress=watcher.note,
            )
        seconds = time.monotonic() - start
        now = memory()
        record = json.loads(self.handle.report().to_json())
        machine = hardware.probe(self.runtime.model)
        return {
            "tune_s": seconds,
            "peak_bytes": now.get("peak_bytes"),
            "peak_is_of_tuning": reset,
            "tuned_bytes": now.get("rss_bytes"),
            "promised_bytes": record["memory"]["after"]["weights_bytes"],
            "state": self.handle.status.state,
            "verdict": record["verdict"],
            "plan": list(record["transforms"]),
            "trials": [[trial["candidate"], trial["outcome"], trial["reason"]] for trial in record["trials"]],
            "stages": [[stage.name, stage.start_s, stage.peak_bytes] for stage in watcher.stages],
            "bandwidth_bytes_per_s": machine.bandwidth_bytes_per_s,
            "machine": {"name": machine.name, "capability": machine.capability, "versions": dict(machine.versions)},
        }

    def do_time(self, rounds: int, most_s: float) -> dict[str, Any]:
        """TTFT and TPOT of the original and of the plan in turns, and the bytes of weights that each reads a token.

        No round begins after `most_s` seconds, once there are FEWEST_ROUNDS.
        """
        plan = self.handle.status.state == "tuned"
        sides = {"original": self.handle.rollback} | ({"plan": self.handle.commit} if plan else {})
        samples: dict[str, dict[str, list[float]]] = {side: {"ttft": [], "tpot": []} for side in sides}
        read: dict[str, int | None] = {}
        for side, switch in sides.items():
            switch()
            self.runtime.generate([self.prompt(PROMPT_TOKENS)], 2)
            read[side] = self.weights(side).read
        start = time.monotonic()
        for turn in range(rounds):
            if turn >= FEWEST_ROUNDS and time.monotonic() - start > most_s:
                break
            prompt = self.prompt(PROMPT_TOKENS)
            for side in self.chance.sample(sorted(sides), len(sides)):
                sides[side]()
                timing = self.runtime.generate([prompt], TIMED.new_tokens)
                samples[side]["ttft"].append(ttft_ms(timing, TIMED))
                samples[side]["tpot"].append(tpot_ms(timing, TIMED))
        return {"samples": samples, "read_bytes": read, "notes": self.runtime.notes() if plan else []}

    def do_release(self) -> dict[str, Any]:
        """Let go of the original: what is resident then, and what was promised."""
        self.handle.commit(keep_original=False)
        promised = json.loads(self.handle.report().to_json())["bytes_after_release"]
        return {"released_bytes": memory().get("rss_bytes"), "released_promised_bytes": promised}

    @property
    def handle(self) -> autotune.Handle:
        found: autotune.Handle = self.runtime.model.autotune
        return found

    def weights(self, side: str) -> Weights:
        return self.runtime.weights() if side == "plan" else super(Tuned, self.runtime).weights()

    def prompt(self, tokens: int) -> tuple[int, ...]:
        vocabulary = self.runtime.model.config.vocab_size
        return tuple(self.chance.randrange(vocabulary) for _ in range(tokens))


def forget_peak() -> bool:
    """Have the system count this process's peak memory from now on; whether it does."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(RowWorker(), sys.stdin, lambda line: print(line, file=answers, flush=True))


if __name__ == "__main__":
    main()
