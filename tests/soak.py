"""`make soak MINUTES=10`: many callers of one wrapped model, random faults, and every answer compared.

    python -m tests.soak --minutes 10 --callers 16 --seed 1
    python -m tests.soak --minutes 1 --spoil leak      # a negative control; also: answers

A tiny real model is served by a plan that decodes callers together. Callers generate, submit, stream, cancel, come late
and bring streamers and processors that raise. Meanwhile plans are rolled back and committed, decode steps fail, rows
become NaN, and measured steps take their turns. Every answer has to be the plain model's. From the middle of the run
on, memory must not grow.

Exit codes: 0 all answers were right and memory stayed, 1 not so.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest import mock

import torch

import autotune
from autotune.errors import CancelledRequestError, DeadlineError
from autotune.report import Report
from autotune.runtime.batching.engine import Engine
from autotune.runtime.variant import Variant
from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.step_program import StepProgram
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from tests.models import PAD, tiny, token_prompts

ROWS, SLOTS, PROMPTS = 4, 160, 24
MOST_GROWTH = 24 * 2**20  # bytes that memory may grow by in the second half
OPTIONS: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


class GoneError(Exception):
    """Raised by a caller's own streamer or processor."""


@dataclass
class Soak:
    """One run.

    Args:
        callers: threads that ask without a pause.
        seed: of everything that is drawn.
        spoil: "leak" keeps memory, "answers" spoils decode steps: both must be noticed. Empty: neither.
    """

    callers: int = 16
    seed: int = 0
    spoil: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # kind of request -> time of each
    memory: list[int] = field(default_factory=list)  # resident bytes, several a second
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock, self.over = threading.Lock(), threading.Event()
        self.model = self.served()
        plain = tiny("llama")
        prompts = token_prompts(PROMPTS)
        tokens = [6 + 5 * (n % 8) for n in range(PROMPTS)]
        self.work = [
            (prompt, count, self.generated(plain, [prompt], count)[0])
            for prompt, count in zip(prompts, tokens, strict=True)
        ]
        self.batch = [prompt[: min(map(len, prompts[:3]))] for prompt in prompts[:3]]
        self.batch_answer = self.generated(plain, self.batch, 12)

    def served(self) -> Any:
        def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
            chain = [StepProgram("decode", slots=SLOTS), ContinuousBatching("decode", rows=ROWS)]
            variant = Variant(model, traffic, workload).with_transforms(chain)
            plan = plans.Plan(Fingerprint("", "", {}, "", "", "lossless"), variant.transforms)
            return Tuned(variant, plan, Report({}), "put on by hand")

        with mock.patch.object(tuning, "tune", tune):
            return autotune.wrap(tiny("llama"), workload=token_prompts(4), when="blocking", cache=False, watch=0.05)

    @property
    def engine(self) -> Engine:
        found = self.model.autotune._winner.tuned.variant.engine
        assert isinstance(found, Engine)
        return found

    def generated(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[list[int]]:
        ids = torch.tensor([list(prompt) for prompt in prompts])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, **OPTIONS, **options}
        found: list[list[int]] = model.generate(ids, **given).tolist()
        return found

    # Requests

    def call(self, draw: random.Random) -> None:
        prompt, tokens, expected = draw.choice(self.work)
        self.check("generate", self.generated(self.model, [prompt], tokens)[0], expected)

    def call_batch(self, _draw: random.Random) -> None:
        self.check("batch", self.generated(self.model, self.batch, 12), self.batch_answer)

    def stream(self, draw: random.Random) -> None:
        prompt, tokens, expected = draw.choice(self.work)
        request = self.model.autotune.submit(prompt, max_new_tokens=tokens, priority=draw.choice([0, 0, 3]), **OPTIONS)
        self.check("stream", [*prompt, *request], expected)
        self.check("result", request.result(60).tolist(), [expected])

    def stream_to_a_loop(self, draw: random.Random) -> None:
        prompt, tokens, expected = draw.choice(self.work)

        async def ask() -> list[int]:
            async with self.model.autotune.submit(prompt, max_new_tokens=tokens, **OPTIONS) as request:
                return [token async for token in request]

        self.check("async", [*prompt, *asyncio.run(ask())], expected)

    def cancel(self, draw: random.Random) -> None:
        prompt, tokens, expected = draw.choice(self.work)
        with self.model.autotune.submit(prompt, max_new_tokens=tokens, **OPTIONS) as request:
            for _ in range(draw.randrange(4)):
                next(iter(request))
        self.ended("cancel", request, expected)

    def come_late(self, draw: random.Random) -> None:
        prompt, tokens, expected = draw.choice(self.work)
        request = self.model.autotune.submit(prompt, max_new_tokens=tokens, deadline_s=draw.random() / 50, **OPTIONS)
        self.ended("late", request, expected)

    def ended(self, kind: str, request: Any, expected: list[int]) -> None:
        try:
            self.check(kind, request.result(60).tolist(), [expected])
        except (CancelledRequestError, DeadlineError):
            got = list(request.tokens)
            prompt = len(expected) - next(count for _, count, answer in self.work if answer is expected)
            self.check(kind, got, expected[prompt : prompt + len(got)])

    def raise_in_a_streamer(self, draw: random.Random) -> None:
        prompt, tokens, _ = draw.choice(self.work)
        left = draw.randrange(1, tokens)

        class Streamer:
            seen = 0

            def put(self, value: torch.Tensor) -> None:
                self.seen += 1
                if self.seen > left:
                    raise GoneError

            def end(self) -> None: ...

        self.raises("streamer", lambda: self.generated(self.model, [prompt], tokens, streamer=Streamer()))

    def raise_in_a_processor(self, draw: random.Random) -> None:
        prompt, tokens, _ = draw.choice(self.work)
        most = len(prompt) + draw.randrange(tokens)

        def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] >= most:
                raise GoneError
            return scores

        self.raises("processor", lambda: self.generated(self.model, [prompt], tokens, logits_processor=[processor]))

    def raises(self, kind: str, ask: Callable[[], object]) -> None:
        try:
            ask()
        except GoneError:
            self.check(kind, True, True)
        else:
            self.check(kind, "an answer", "the caller's own error")

    def check(self, kind: str, found: object, expected: object) -> None:
        with self.lock:
            self.counts[kind] += 1
            if found != expected and len(self.wrong) < 20:
                self.wrong.append(f"{kind}: {found} instead of {expected}")

    # Faults

    def switch(self, draw: random.Random) -> None:
        self.model.autotune.rollback()
        time.sleep(draw.random() / 20)
        self.model.autotune.commit()

    def fail_a_step(self, _draw: random.Random) -> None:
        self.spoilt(lambda logits: (_ for _ in ()).throw(RuntimeError("no such kernel")))

    def make_a_row_nan(self, draw: random.Random) -> None:
        def nan(logits: torch.Tensor) -> torch.Tensor:
            logits[draw.randrange(len(logits))] = torch.nan
            return logits

        self.spoilt(nan)

    def spoilt(self, change: Callable[[torch.Tensor], Any]) -> None:
        """Change the logits of one coming step of the engine. A plan that failed is committed again."""
        sequences, done = self.engine.sequences, threading.Event()
        step = type(sequences).logits

        def once() -> torch.Tensor:
            del sequences.__dict__["logits"]
            done.set()
            found: torch.Tensor = change(step(sequences))
            return found

        sequences.__dict__["logits"] = once
        done.wait(2)
        time.sleep(0.1)
        self.model.autotune.commit()

    def measure(self, draw: random.Random) -> None:
        with self.model.autotune._tuning._traffic.step():
            time.sleep(draw.random() / 50)

    # The run

    def ask_on(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        kinds = [self.call, self.call_batch, self.stream, self.stream_to_a_loop, self.cancel, self.come_late]
        kinds += [self.raise_in_a_streamer, self.raise_in_a_processor]
        while not self.over.is_set():
            (kind,) = draw.choices(kinds, (30, 4, 40, 6, 6, 6, 4, 4))
            start = time.perf_counter()
            try:
                kind(draw)
            except Exception as error:
                self.check(kind.__name__, f"{type(error).__name__}: {error}", "an answer")
            with self.lock:
                self.seconds.setdefault(kind.__name__, []).append(time.perf_counter() - start)

    def break_on(self) -> None:
        draw = random.Random(f"{self.seed} faults")
        faults = [self.switch, self.fail_a_step, self.make_a_row_nan, self.measure]
        while not self.over.wait(0.2 + draw.random()):
            fault = draw.choice(faults)
            fault(draw)
            self.counts[f"fault: {fault.__name__}"] += 1

    def watch_memory(self, seconds: float) -> None:
        pause_s = min(0.5, seconds / 40)
        while not self.over.wait(pause_s):
            self.memory.append(resident_bytes())
            if self.spoil == "leak":
                self.kept.append(torch.ones(int(4 * MOST_GROWTH * pause_s / seconds / 4)))

    def run(self, seconds: float) -> bool:
        """Run for so long. Returns whether all was well."""
        gc.collect()
        if self.spoil == "answers":
            sequences = self.engine.sequences
            step = sequences.logits
            sequences.__dict__["logits"] = lambda: step().roll(1, -1)
        threads = [threading.Thread(target=self.ask_on, args=(n,)) for n in range(self.callers)]
        threads.append(threading.Thread(target=self.watch_memory, args=(seconds,)))
        if self.spoil != "answers":
            threads.append(threading.Thread(target=self.break_on))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            self.over.set()
            for thread in threads:
                thread.join(120)
        if stuck := [thread.name for thread in threads if thread.is_alive()]:
            self.wrong.append(f"{len(stuck)} threads did not come back")
        return not self.wrong and self.growth() <= MOST_GROWTH

    def growth(self) -> float:
        """Bytes by which memory grew from the middle of the run to its end."""
        part = max(1, len(self.memory) // 8)
        middle = len(self.memory) // 2
        return median(self.memory[-part:]) - median(self.memory[middle : middle + part])

    def show(self) -> None:
        for kind, times in sorted(self.seconds.items()):
            ordered = sorted(times)
            print(
                f"{kind:22} {len(times):7} times, median {1e3 * median(ordered):7.1f} ms, "
                f"99 % {1e3 * ordered[int(0.99 * (len(ordered) - 1))]:8.1f} ms, worst {1e3 * ordered[-1]:8.1f} ms"
            )
        faults = {kind: count for kind, count in self.counts.items() if kind.startswith("fault")}
        print("; ".join(f"{kind} {count}" for kind, count in sorted(faults.items())))
        status = self.model.autotune.status
        print(f"served {status.served}, {dict(status.bypassed)}, {len(self.model.autotune.events)} events")
        print(f"memory: {self.memory[-1] / 1e6:.0f} MB, {self.growth() / 1e6:+.1f} MB in the second half")
        print(f"{sum(self.counts.values())} checks, {len(self.wrong)} wrong", *self.wrong[:5], sep="\n  ")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spoil", choices=("", "leak", "answers"), default="")
    asked = parser.parse_args(arguments)
    soak = Soak(asked.callers, asked.seed, asked.spoil)
    well = soak.run(60 * asked.minutes)
    soak.show()
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
