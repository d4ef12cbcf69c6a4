"""Does the diagnosis choose well? The diagnosed search against trying everything, on a real model.

    make bench-choice
    make bench-choice BENCH_ARGS="--shape 0.36B"
    make bench-choice BENCH_ARGS="--model ./my-model --policy balanced --out out/choice"

Both searches start from the same model, policy, prompts and empty caches. The diagnosed one is what `wrap` runs. The
other ignores diagnosis, predictions and the policy: stage by stage it tries every choice that any built-in policy has,
keeps the best of those that pass, and tries the rest again on top of it until nothing passes. Then the two winners race
each other on held-out prompts. Every candidate says what it promises, and what was timed is compared with that. Prints
Markdown and writes choice.md and choice.json.

Exit codes: 0 the diagnosed choice is within 3 % at no more than half the time, 1 it is not, 2 the race cannot tell.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from autotune import workload
from autotune.cli import demo
from autotune.machine import hardware
from autotune.model.load import load
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.tune import bench, search
from autotune.tune import policy as policies
from autotune.tune.choose import SearchState, expect, make
from autotune.tune.plan import Trial, TrialOutcome
from autotune.tune.policy import Choice, Policy, PolicyStep
from autotune.tune.trying import Trier
from autotune.validate import Speedup, Verdict
from autotune.workload import METRIC_OF, Phase, built_in
from benchmarks import shapes

if TYPE_CHECKING:
    from autotune.machine.hardware import Hardware

WITHIN = 1.03  # the diagnosed choice may be this much slower
HALF = 0.5  # of the time that trying everything takes
NEAR = 0.25  # a prediction that is off by no more counts as right


@dataclass(frozen=True)
class Arm:
    """One search: what it chose, what it tried, and how long it took."""

    variant: Variant
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def tried(self) -> list[Trial]:
        ruled_out = (TrialOutcome.SKIPPED, TrialOutcome.UNAVAILABLE, TrialOutcome.BLOCKED, TrialOutcome.UNREACHED)
        return [t for t in self.trials if t.outcome not in ruled_out]

    def to_dict(self) -> dict[str, Any]:
        return {
            "transforms": [str(t) for t in self.variant.transforms],
            "seconds": self.seconds,
            "tried": len(self.tried),
            "skipped": len(self.trials) - len(self.tried),
            "predictions": audit(self.trials),
            "trials": [
                {
                    "transform": t.candidate,
                    "step": t.step,
                    "phase": t.target,
                    "predicted": t.predicted,
                    "speedup": speedup(t),
                    "outcome": t.outcome.value,
                    "reason": t.reason,
                    "seconds": t.seconds,
                }
                for t in self.trials
            ],
        }


def speedup(trial: Trial) -> float | None:
    """Of the phase the trial was for, against the variant it was tried on."""
    if trial.latency is None:
        return None
    measured: Speedup = getattr(trial.latency, METRIC_OF[trial.target])
    return measured.ratio


def audit(trials: Sequence[Trial]) -> dict[str, int]:
    """How many of the trials that were timed have a prediction, and how many of these measured within 25 % of it."""
    timed = [(t.predicted, ratio) for t in trials if t.predicted and (ratio := speedup(t))]
    return {"timed": len(timed), "near": sum(is_near(*pair) for pair in timed)}


def is_near(predicted: float, measured: float) -> bool:
    return abs(predicted / measured - 1) <= NEAR


def diagnosed(side: bench.LiveBench, notify: Callable[[str], None]) -> Arm:
    """The search as it is."""
    start = time.monotonic()
    found = search.search(side.original, side.policy, side.hardware, side, notify=notify)
    return Arm(found.after.variant, found.trials, time.monotonic() - start)


def everything(side: bench.LiveBench, notify: Callable[[str], None]) -> Arm:
    """Every choice that any built-in policy has for this device, the best first, until nothing more passes."""
    start = time.monotonic()
    trier = Trier(side.policy, side.hardware, side, notify, time.monotonic, math.inf, math.inf)
    variant, trials = side.original, list[Trial]()
    for step in catalogue(side.hardware.device):
        variant = exhaust(trier, step, variant, trials)
    return Arm(variant, tuple(trials), time.monotonic() - start)


def catalogue(device: str) -> list[PolicyStep]:
    """All choices of all built-in policies, one step for each phase and stage, in the order of the stages."""
    steps = [s for path in policies.available().values() for s in policies.check(path).steps]
    grouped: dict[tuple[Stage, Phase], list[Choice]] = {}
    for step in steps:
        if step.devices and device not in step.devices:
            continue
        for choice in step.choices:
            known = grouped.setdefault((make(choice).stage, step.phase), [])
            if choice not in known:
                known.append(choice)
    return [
        PolicyStep(f"everything for {phase}, stage {stage.name.lower()}", phase, tuple(choices))
        for (stage, phase), choices in sorted(grouped.items())
    ]


def exhaust(trier: Trier, step: PolicyStep, variant: Variant, trials: list[Trial]) -> Variant:
    """The best that the choices of one step make of `variant`; adds to `trials`.

    A choice that lost too much quality is not tried again on top of another, which would not give it back.
    """
    choices = [make(choice) for choice in step.choices]
    while True:
        state = SearchState(variant, trier.bench.profile(variant), {})
        accepted: list[tuple[float, Transform, Variant]] = []
        for transform in tuple(choices):
            trial = Trial(transform, step.name, step.phase, TrialOutcome.UNAVAILABLE, "")
            if reason := transform.unavailable(variant, trier.hardware):
                trials.append(replace(trial, reason=reason))
                continue
            predicted = trier.ask(transform, partial(expect, transform, step.phase, state, trier.hardware))
            trial = replace(trial, predicted=predicted)
            trier.notify(f"trying {transform} for {step.phase}")
            trial, candidate = trier.attempt(trial, variant)
            trials.append(trial)
            if trial.outcome is TrialOutcome.ACCEPTED and candidate is not None:
                accepted.append((speedup(trial) or 1.0, transform, candidate))
            elif trial.quality is not None and trial.quality.verdict is Verdict.FAIL:
                choices.remove(transform)
        if not accepted:
            return variant
        _, best, variant = max(accepted, key=lambda found: found[0])
        choices.remove(best)


@contextmanager
def empty_caches() -> Iterator[None]:
    """Nothing that an earlier search compiled is found again."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        names = ("AUTOTUNE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        with mock.patch.dict(os.environ, {name: f"{folder}/{name.lower()}" for name in names}):
            yield


def verdict(race: Speedup | None, time_share: float) -> tuple[int, str]:
    """Exit code and sentence.

    Args:
        race: time of the diagnosed choice / time of the exhaustive one, end to end; None where they are the same.
        time_share: seconds of the diagnosed search / seconds of the exhaustive one.
    """
    took = f"the search took {time_share:.0%} of the time"
    if race is None:
        return int(time_share > HALF), f"both searches chose the same plan; {took}"
    gap = (
        f"the exhaustive choice is {race.ratio:.3f}x as fast (95 % interval {race.low:.3f} to {race.high:.3f}); {took}"
    )
    if race.ratio > WITHIN or time_share > HALF:
        return int(race.low > WITHIN or time_share > HALF) or 2, gap
    return 0, gap


def markdown(result: dict[str, Any]) -> str:
    one, all_ = result["diagnosed"], result["everything"]
    lines = [
        f"# Choice: {result['model']}, policy {result['policy']}",
        "",
        f"{result['hardware']}, {result['threads']} threads; {result['workload']}. {result['verdict']}",
        "",
        "| | diagnosed | everything |",
        "|---|---|---|",
        f"| candidates tried | {one['tried']} | {all_['tried']} |",
        f"| seconds | {one['seconds']:.0f} | {all_['seconds']:.0f} |",
        f"| chosen | {' + '.join(one['transforms']) or 'the original'} "
        f"| {' + '.join(all_['transforms']) or 'the original'} |",
        f"| timed within {NEAR:.0%} of what was predicted | {_audited(one)} | {_audited(all_)} |",
        "",
    ]
    for name, arm in (("Diagnosed", one), ("Everything", all_)):
        lines += [
            f"## {name}",
            "",
            "Predicted is the best that the roofline allows.",
            "",
            "| candidate | for | predicted | measured | outcome | seconds |",
            "|---|---|---|---|---|---|",
        ]
        for t in arm["trials"]:
            predicted, measured = (f"{t[k]:.2f}x" if t[k] else "-" for k in ("predicted", "speedup"))
            outcome = f"{t['outcome']}: {t['reason']}".replace("|", "/")
            lines.append(
                f"| {t['transform']} | {t['phase']} | {predicted} | {measured} | {outcome} | {t['seconds']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _audited(arm: dict[str, Any]) -> str:
    return "{near} of {timed}".format(**arm["predictions"])


def compare(model: Any, tokenizer: Any, policy: Policy, prompts: Any, notify: Callable[[str], None]) -> dict[str, Any]:
    """Both searches and the race between their winners."""
    work = workload.read(prompts, tokenizer=tokenizer, model=model)
    machine: Hardware = hardware.probe(model.device.type)
    texts = built_in.natural(tokenizer)
    arms: dict[str, Arm] = {}
    for name, run in (("diagnosed", diagnosed), ("everything", everything)):
        with empty_caches():
            original = Variant(model, workload=work)
            side = bench.LiveBench(original, work, policy, machine, texts=texts, notify=notify)
            arms[name] = run(side, lambda line, name=name: notify(f"{name}: {line}"))  # type: ignore[misc]
    one, all_ = arms["diagnosed"], arms["everything"]
    race = None
    if set(one.variant.transforms) != set(all_.variant.transforms):
        notify("racing the two winners on held-out prompts")
        race = side.races.compare(one.variant, all_.variant, "end_to_end", side.held_out, pairs=60, seed=3).end_to_end
    code, sentence = verdict(race, one.seconds / all_.seconds)
    return {
        "model": model.config._name_or_path.rstrip("/").rpartition("/")[2] or type(model).__name__,
        "policy": policy.name,
        "hardware": f"{machine.name} ({machine.capability})",
        "threads": machine.threads,
        "workload": f"{len(work.prompts)} prompts, {work.new_tokens} new tokens",
        "verdict": sentence,
        "exit_code": code,
        "time_share": one.seconds / all_.seconds,
        "speed_ratio": race and {"ratio": race.ratio, "low": race.low, "high": race.high, "pairs": race.pairs},
        "diagnosed": one.to_dict(),
        "everything": all_.to_dict(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory, GGUF file or hub name; default: the demo's model")
    parser.add_argument(
        "--shape", choices=shapes.SHAPES, help="random weights in this shape (shapes.py) instead, in FP32"
    )
    parser.add_argument("--prompts", type=Path, help="a prompt a line, or .jsonl; default: the demo's prompts")
    parser.add_argument("--policy", default="balanced", help="name of a policy or a .toml file")
    parser.add_argument("--out", type=Path, default=Path("out/choice"), help="where choice.md and choice.json go")
    options = parser.parse_args()
    start = time.monotonic()

    def notify(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    model, tokenizer = load(options.model or demo.model_file())
    if options.shape:  # the prompts' token ids are numbers like others
        shape = shapes.SHAPES[options.shape]
        model = shapes.build(shape, torch.float32)
        model.config._name_or_path = f"random weights in the shape of {shape.model}"
    if tokenizer is None:
        parser.error(f"{options.model} has no tokenizer, and the prompts are text")
    prompts = options.prompts or built_in.chats(tokenizer)
    result = compare(model, tokenizer, policies.load(options.policy), prompts, notify)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "choice.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "choice.md").write_text(markdown(result))
    print(markdown(result))
    return int(result["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
