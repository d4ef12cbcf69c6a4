"""What each of two ranks does in test_together: python -m tests.tune.ranks RANK FOLDER.

FOLDER holds a tiny model. What a rank saw is written to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import autotune
from autotune import transforms
from autotune.errors import AutotuneError, VariantError
from autotune.machine import hardware
from autotune.model import route, sharding
from autotune.runtime.dispatch import serving
from autotune.runtime.ranks import step
from autotune.runtime.ranks.follower import follow
from autotune.runtime.ranks.leader import Leader
from autotune.runtime.ranks.line import Line
from autotune.runtime.ranks.messages import Done
from autotune.runtime.variant import Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.tune import allowance, bench
from autotune.tune import plan as plans
from autotune.tune import policy as policies
from autotune.tune.policy import Choice, Policy, PolicyStep
from autotune.validate import ratios, timing
from autotune.validate.limits import Limits
from autotune.validate.score import CandidateError, Served
from autotune.validate.tiers import SIZES
from tests import models

OLDEST = "5.23"  # release of transformers
RANKS = 2
PLACES = ("apply", "first", "19")  # where a call fails: when it is built, when it is tried alone, when all ranks run it
PATIENCE_S = 60.0  # seconds after which a rank that waits gives up
NEW = 6  # tokens of an answer
BUDGET_S = 60.0
ANY_GAIN = Limits(-0.9, 9.0, 9.0, 9.0, 9.0)  # so that what is no worse is kept, however fast it is


@dataclass(frozen=True)
class Failing(LeanLoop):
    """A loop that raises on one rank.

    Args:
        rank: where.
        place: "apply", "first" (the first step that it makes) or a number of steps.
    """

    rank: int = 1
    place: str = "first"

    name: ClassVar[str] = "failing"
    sharded: ClassVar[bool] = True

    def rehearsed(self) -> Any:
        return None

    def apply(self, variant: Variant) -> None:
        here = distributed.get_rank() == self.rank
        if here and self.place == "apply":
            raise RuntimeError("no room on this rank")
        super().apply(variant)
        if not here or self.place == "apply":
            return
        (module,) = variant.edit("decode")
        mlp = module.model.layers[1].mlp  # between collectives
        forward, left = mlp.forward, [0 if self.place == "first" else int(self.place)]

        def failing(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("no memory on this rank")
            return forward(*args, **kwargs)

        mlp.forward = failing


def policy(*names: str, **params: Any) -> Policy:
    choices = tuple(Choice(name, params, "decode") for name in names)
    steps = (PolicyStep("decode", "decode", choices),)
    return replace(policies.load("lossless"), limits=ANY_GAIN, budget_s=BUDGET_S, steps=steps)


@contextmanager
def line(model: Any) -> Iterator[Line]:
    members = sharding.group(model)
    assert members is not None
    made = Line(members, PATIENCE_S)
    try:
        yield made
    finally:
        made.close()


class Rank:
    def __init__(self, folder: Path) -> None:
        config = DistributedConfig(tp_size=RANKS)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
        self.model.requires_grad_(False)
        self.ids = torch.tensor(models.token_prompts(2))
        self.work = autotune.Workload(tuple(map(tuple, models.token_prompts(40))), new_tokens=NEW)

    def answer(self) -> list[list[int]]:
        found: list[list[int]] = self.model.generate(self.ids, max_new_tokens=NEW, min_new_tokens=NEW).tolist()
        return found

    def original(self) -> Any:
        """The answer before anything is wrapped."""
        return self.answer()

    def each_transform(self) -> dict[str, Any]:
        """The answer, or why there is none, with every transform that claims to work on a part of a layer."""
        here, found = hardware.identify(self.model), {}
        for name, cls in transforms.registry().items():
            phase = "prefill" if name == "prefill_attention" else "decode"
            if cls.sharded and cls is not Failing:
                params = {"attention": {"implementation": "eager"}, "threads": {"count": 2}}.get(name, {})
                transform = transforms.make(name, params, phase)
                with sharding.alone(self.model):
                    reason = transform.unavailable(Variant(self.model), here)
                found[name] = reason or self.with_transform(transform)
        return found

    def with_transform(self, transform: transforms.Transform) -> Any:
        variant = Variant(self.model).with_transform(transform)
        with sharding.alone(self.model):
            assert transform.took_effect(variant) is None
        served: Any = serving(variant)
        return served.generate(self.ids, max_new_tokens=NEW, min_new_tokens=NEW).tolist()

    def declined(self) -> dict[str, str]:
        """What does not go with a sharded model."""
        wrapped: Any = autotune.wrap(self.model)
        found = {"when": wrapped.autotune.status.detail}
        calls: dict[str, Callable[[], Any]] = {
            "submit": lambda: wrapped.autotune.submit([5, 6, 7], max_new_tokens=2),
            "experiment": lambda: autotune.Experiment("e", control=self.model, candidates={"lean": [LeanLoop()]}),
        }
        for name, call in calls.items():
            try:
                call()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        wrapped.autotune.unwrap()
        return found

    def tuned(self) -> dict[str, Any]:
        return self.tune(policy("static_cache", "weight_only"), fails=True)

    def fault_in_a_trial(self) -> dict[str, Any]:
        return self.tune(policy("failing", rank=1, place="30"))

    def tune(self, chosen: Policy, work: Any = None, *, fails: bool = False) -> dict[str, Any]:
        """Tune and answer with what came of it; with `fails`, also once more after the plan has begun to fail."""
        wrapped = autotune.wrap(self.model, policy=chosen, workload=work or self.work, when="manual", cache=False)
        handle = wrapped.autotune
        try:
            handle.tune()
            answers = self.answer()
            trials = {str(t.candidate): [str(t.outcome), t.reason] for t in handle.plan.trials}
            return {
                "plan": plans.dumps(handle.plan),
                "state": str(handle.status.state),
                "served": handle.status.served,
                "trials": trials,
                "answers": answers,
                "failed": self.failed(handle) if fails else [],
            }
        finally:
            handle.unwrap()

    def failed(self, handle: Any) -> list[Any]:
        """What a call raises whose plan fails, and the next answer."""

        def broken(*args: Any) -> None:
            raise RuntimeError("no such kernel")

        handle._winner.tuned.variant.loop = broken
        try:
            return [self.answer(), None]
        except VariantError as error:
            return [str(error), self.answer()]

    def different_tasks(self) -> str:
        prompts = self.work.prompts[distributed.get_rank() :]
        try:
            self.tune(policy("lean_loop"), replace(self.work, prompts=prompts))
        except AutotuneError as error:
            return str(error)
        return ""

    def faults(self) -> dict[str, Any]:
        """What the first rank says of a call that fails on one rank, and the answers of the original after that."""
        found = {}
        for rank in range(RANKS):
            for place in PLACES:
                failing = Failing("decode", rank, place)
                found[f"rank {rank}, {place}"] = [self.call(failing), self.answer()]
        return found

    def call(self, transform: transforms.Transform) -> str:
        """Serve a call, first alone and then together. Returns the error that it ended with on the first rank."""
        original = Variant(route.bare(self.model))
        with line(self.model) as made:
            if not made.leads:
                outcome = follow(original, made, {})
                return str(outcome.value)
            said = ""
            with Leader(made).leading():
                try:
                    variant = original.with_transform(transform)
                    Served(variant, 0).generate(models.token_prompts(2), 16)
                except (CandidateError, RuntimeError) as error:
                    said = str(error)
            made.send(Done(said))
            return said

    def rank_that_ends(self) -> str:
        """What the first rank raises if the other one ends while it searches. Has to come last."""
        start, said = time.monotonic(), ""
        try:
            if distributed.get_rank() == 1:
                step.sample = lambda *args: os._exit(0)
            self.tune(policy("lean_loop"))
        except Exception as error:
            said = type(error).__name__
        return said if time.monotonic() - start < PATIENCE_S / 2 else "late"


def shorten() -> None:
    """Measure and examine less, so that a tune takes seconds, and accept noise: what is timed here is not the point."""
    bench.PROFILE_S, bench.BRIEF_PROFILE_S, bench.GROWTH_S, allowance.RACE_S = 1.0, 0.5, 0.5, 3.0
    ratios.TOO_NOISY = timing.STOLEN = math.inf
    SIZES["quick"] = replace(SIZES["quick"], prompts=8, natural=4, own=4, padded=4, lengths=())


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    shorten()
    registry = transforms.registry()
    transforms.registry = lambda: {**registry, Failing.name: Failing}  # type: ignore[assignment]
    meeting = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=PATIENCE_S), RANKS, rank)
    here, seen = Rank(folder), dict[str, Any]()
    parts: list[Callable[[], Any]] = [
        *(here.original, here.each_transform, here.declined, here.tuned, here.fault_in_a_trial),
        *(here.different_tasks, here.faults, here.rank_that_ends),
    ]
    for part in parts:
        start = time.monotonic()
        seen[part.__name__] = part()
        sys.stdout.write(f"rank {rank}: {part.__name__} took {time.monotonic() - start:.1f} s\n")
        sys.stdout.flush()
        (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
