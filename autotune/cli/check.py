"""`check record` and `check run`: record a baseline, and check a model against it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeasurementError, UnsupportedModelError, WorkloadError
from ..report.progress import shown
from .arguments import plan_of
from .screen import screen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..compare.check import CheckResult
    from ..runtime.variant import Variant

Notify = Callable[[str], None]


def record(args: Namespace) -> int:
    """Record a baseline."""
    from ..compare.check import record as keep
    from ..compare.check.folder import require_free

    require_free(args.out, args.force)
    with shown(None) as progress:
        model, tokenizer = _load(args.model, args, progress.update)
        baseline = keep(
            model,
            args.out,
            tokenizer=tokenizer,
            prompts=args.prompts,
            size=args.size,
            labelled=args.tasks,
            lm_eval=args.lm_eval,
            latency=not args.no_latency,
            force=args.force,
            progress=progress.update,
        )
    tokens = sum(len(text.scored) for group in baseline.questions.groups for text in group)
    right = [f"{sum(suite.right)} of {len(suite.right)} {suite.name} right" for suite in baseline.suites]
    said = (f"{len(baseline.questions.texts)} prompts, {tokens} tokens", *right)
    screen().print(f"Recorded {baseline.subject.name} in {args.out}: {', '.join(said)}", soft_wrap=True)
    return 0


def run(args: Namespace) -> int:
    """Check a model against a baseline. Returns the verdict's exit code."""
    from ..compare.check import load as load_baseline
    from ..compare.check import run as check
    from ..compare.check.checking import require_answers

    measure_latency, against = False if args.no_latency else None, args.against is not None
    base = load_baseline(args.baseline)  # fails before minutes of loading
    require_answers(base, args.tier, max_slowdown=args.max_slowdown, measure_latency=measure_latency, against=against)
    plan = plan_of(args.plan)
    with shown(None) as progress:
        model, tokenizer = _load(args.model, args, progress.update)
        tuning = _tuning_prompts(args, tokenizer)
        subject: PreTrainedModel | Variant = model
        if args.policy is not None:
            subject = _tuned(model, tokenizer, args.policy, tuning, progress.update)
        rival = _load(args.against, args, progress.update)[0] if against else None
        result = check(
            subject,
            base,
            tokenizer=tokenizer,
            plan=plan,
            tier=args.tier,
            max_slowdown=args.max_slowdown,
            measure_latency=measure_latency,
            against=rival,
            workload=args.prompts,
            tuning_prompts=tuning,
            progress=progress.update,
        )
    draw(result)
    files = ((args.json, result.to_json), (args.junit, result.to_junit), (args.markdown, result.to_markdown))
    for file, render in files:
        if file is not None:
            _write(file, render())
    return result.exit_code


def draw(result: CheckResult) -> None:
    """Print the verdict, its metrics, and where the model differs."""
    from ..compare.check.render import number
    from .show import _print, _table

    table = _table("metric", "verdict", "recorded", "now", "limit", "reason")
    for m in result.metrics:
        table.add_row(m.name, m.verdict.value, number(m.recorded), number(m.value), number(m.limit), m.reason)
    _print(table)
    found = result.localised
    if found is not None and found.worst_layers:
        layers = _table("layer", "deviation of its output")
        for shift in found.worst_layers:
            layers.add_row(shift.name, number(shift.deviation))
        _print(layers)
    screen().print(f"{result.verdict.value.upper()}: {result.reason}", style="bold", soft_wrap=True)


def _load(name: str, args: Namespace, notify: Notify) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    import torch

    from ..model.load import load

    for file in (args.prompts, getattr(args, "tasks", None), getattr(args, "tuned_on", None)):
        if file is not None and not file.is_file():
            raise WorkloadError(f"there is no file {file}")
    if args.threads:
        torch.set_num_threads(args.threads)
    notify(f"loading {name}")
    return load(name)


def _tuning_prompts(args: Namespace, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The prompts that the user named.

    For a policy without named prompts: the half of the built-in texts that baselines are not recorded on.
    """
    if args.tuned_on is not None or args.policy is None:
        return args.tuned_on
    if tokenizer is None:
        raise WorkloadError("the model has no tokenizer: name prompts to tune on as token ids, --tuned-on FILE.jsonl")
    from ..workload import built_in

    found = built_in.chats(tokenizer)
    return found[: len(found) // 2]


def _tuned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    policy: str,
    prompts: Any,
    notify: Notify,
) -> Variant:
    """Tune the model with a policy. `tune` gets no tokenizer, because it would add built-in texts to the prompts."""
    from .. import workload
    from ..tune import policy as policies
    from ..tune.run import tune
    from ..tune.supported import unsupported
    from ..tune.verdict import is_fruitless

    chosen = policies.load(policy)
    if reason := unsupported(model):
        raise UnsupportedModelError(reason)
    work = workload.read(prompts, tokenizer=tokenizer, model=model)
    tuned = tune(model, work, chosen, notify=notify)
    if is_fruitless(tuned.plan.trials):  # else the original would be checked under the policy's name
        raise MeasurementError(tuned.verdict)
    return tuned.variant


def _write(file: Path, text: str) -> None:
    """Write a file; a new one only its owner can read, because a report quotes prompts."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise MeasurementError(f"{file} cannot be written: {error.strerror}") from error
