"""What is to be proven, cut into pieces that run beside each other, and what their answers come to."""

from __future__ import annotations

import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from autotune.validate import Verdict
from benchmarks.prove import clocks, quality
from benchmarks.prove.clocks import Sizes
from benchmarks.prove.corruptions import CORRUPTIONS
from benchmarks.prove.machines import MACHINES
from benchmarks.prove.quality import Case
from benchmarks.prove.rates import Rate

Answer = list[Any]

# On a real model decoding a token takes long, so that one of each kind is judged there; the tiny ones get them all.
ON_A_REAL_MODEL = (
    "scales x1.02 in one layer",
    "scales x1.1 in one layer",
    "noise of 3 % on all weights",
    "one layer rounded to 4 bits",
    "zeroed head",
    "comma and full stop swapped in lm_head",
    "dropped layer",
    "NaN on one token",
    "infinite row",
    "constant token",
    "instant EOS",
    "wrong dtype",
    "logits x1.3",
    "logits of the step before",
    "wrong at batch > 1",
    "RoPE off by one under padding",
    "stale cache on the second prompt",
    "wrong beyond a block of 256",
    "cache error that grows with context",
    "cache rounded to 4 bits",
)


@dataclass(frozen=True)
class Job:
    """One call for a worker; `group` says what its answer is part of."""

    group: tuple[str, ...]
    do: Callable[..., Answer]
    arguments: tuple[Any, ...]

    def __call__(self) -> Answer:
        return self.do(*self.arguments)


@dataclass
class Answers:
    """What came back, by group."""

    by_group: dict[tuple[str, ...], Answer] = field(default_factory=lambda: defaultdict(list))
    left_out: int = 0  # jobs that there was no time for

    def add(self, job: Job, answer: Answer) -> None:
        self.by_group[job.group] += answer


def run(jobs: list[Job], workers: int, limit_s: float | None = None) -> Answers:
    """Every job's answer; in this process where there is one worker.

    Args:
        limit_s: after that no further job is begun, and what was not is left out of every figure.
    """
    answers = Answers()
    if workers <= 1:
        end = time.monotonic() + (math.inf if limit_s is None else limit_s)
        for done, job in enumerate(jobs):
            if time.monotonic() >= end:
                answers.left_out = len(jobs) - done
                break
            answers.add(job, job())
        return answers
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=settle) as pool:
        waiting = {pool.submit(job): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(waiting, limit_s), 1):
                answers.add(waiting[future], future.result())
                if sys.stderr.isatty() or done % 50 == 0:
                    print(f"\r{done} of {len(jobs)}", end="", file=sys.stderr, flush=True)
        except TimeoutError:
            for future in waiting:
                future.cancel()
            answers.left_out = sum(future.cancelled() for future in waiting)
    return answers


def settle() -> None:
    torch.set_num_threads(1)  # the processes share the cores


def jobs(model: Path | None, quick: bool) -> list[Job]:
    """Everything to run."""
    found: list[Job] = []
    if model is not None:
        real = ON_A_REAL_MODEL[4:7] if quick else ON_A_REAL_MODEL
        found += [Job(("quality",), quality.examine_real, (model, (name,))) for name in real]
        found += [Job(("whole",), quality.false_alarms_real, (model, (seed,))) for seed in range(0 if quick else 3)]
    tiny = quality.ARCHITECTURES[:1] if quick else quality.ARCHITECTURES
    chosen = [corruption.name for corruption in CORRUPTIONS[:: 6 if quick else 1]]
    for name in tiny:
        parts = [chosen[k : k + 6] for k in range(0, len(chosen), 6)]
        found += [Job(("quality",), quality.examine_tiny, (name, part, 3 if quick else 8)) for part in parts]
    for name in tiny:
        seeds = range(1) if quick else range(24)
        found += [Job(("whole",), quality.false_alarms, (name, (seed,))) for seed in seeds]
    found += latency_jobs(clocks.QUICK if quick else Sizes())
    random.Random(0).shuffle(found)  # so that a run that is cut short has some of everything
    return found


def latency_jobs(sizes: Sizes) -> list[Job]:
    found = []
    for machine in MACHINES:
        found += [Job(("commit", machine), clocks.false_commits, (machine, c)) for c in clocks.chunks(sizes.seeds)]
        found += [Job(("bias", machine), clocks.estimates, (machine, 1.05, c)) for c in clocks.chunks(sizes.bias)]
    found += [Job(("family",), _family, (k,)) for k in range(sizes.families)]
    for gain in (1.05, 1 / 1.05):
        found += [Job(("power", f"{gain:.3f}"), clocks.seen, (gain, c)) for c in clocks.chunks(sizes.power)]
    return found


def _family(family: int) -> Answer:
    return [clocks.family_commits(family)]


@dataclass(frozen=True)
class Figure:
    """One figure and what it should be.

    Args:
        share: `count` of `total`, or None for one that is no share.
        target: in words.
        met: whether it is.
    """

    name: str
    rate: Rate | None
    value: float
    target: str
    met: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "target": self.target,
            "met": self.met,
            "rate": None if self.rate is None else self.rate.to_dict(),
        }


def at_most(name: str, rate: Rate, limit: float) -> Figure:
    return Figure(name, rate, rate.share, f"at most {limit:.0%}", rate.share <= limit)


def at_least(name: str, rate: Rate, limit: float) -> Figure:
    return Figure(name, rate, rate.share, f"at least {limit:.0%}", rate.share >= limit)


def figures(answers: Mapping[tuple[str, ...], Answer]) -> list[Figure]:
    """Every figure that was measured, with its target."""
    found = []
    cases: list[Case] = answers.get(("quality",), [])
    for tier in dict.fromkeys(c.tier for c in cases):
        counted = [c for c in cases if c.tier == tier and c.counts]
        rate = Rate(sum(c.caught for c in counted), len(counted))
        found.append(at_least(f"corruptions caught at tier {tier}", rate, quality.CAUGHT))
    judged = answers.get(("whole",), [])
    alarms = Rate(sum(v in (Verdict.FAIL, Verdict.ERROR) for _, v, _ in judged), len(judged))
    found.append(at_most("whole models called damaged", alarms, quality.FALSE_ALARMS))
    for machine in MACHINES:
        verdicts = answers.get(("commit", machine), [])
        rate = clocks.summarise_commits(verdicts)
        found.append(at_most(f"false commits, {machine}", rate, clocks.FALSE_COMMITS))
    families = answers.get(("family",), [])
    found.append(
        at_most("30 null candidates, any confirmed", Rate(sum(families), len(families)), clocks.FAMILY_COMMITS)
    )
    faster, slower = answers.get(("power", "1.050"), []), answers.get(("power", "0.952"), [])
    found.append(at_least("5 % faster is seen", Rate(faster.count("pass"), len(faster)), clocks.POWER))
    found.append(at_least("5 % slower is seen", Rate(slower.count("fail"), len(slower)), clocks.POWER))
    for machine in MACHINES:
        error = clocks.bias(answers.get(("bias", machine), [math.nan]), 1.05)
        target = f"within {clocks.BIAS:.0%}"
        found.append(Figure(f"bias of a gain of 5 %, {machine}", None, error, target, abs(error) <= clocks.BIAS))
    return [figure for figure in found if not math.isnan(figure.value)]  # the others were not measured


def misses(answers: Mapping[tuple[str, ...], Answer]) -> list[Case]:
    """Corruptions over their tier's limit that were not failed."""
    return [c for c in answers.get(("quality",), []) if c.counts and not c.caught]


def alarms(answers: Mapping[tuple[str, ...], Answer]) -> list[tuple[str, str, str]]:
    """Whole models that did not pass."""
    return [a for a in answers.get(("whole",), []) if a[1] != Verdict.PASS]


def plain(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For JSON, where nothing is infinite."""
    return [{k: (None if v == math.inf else v) for k, v in asdict(c).items()} for c in cases]
