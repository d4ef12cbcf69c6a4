"""Checks a model against a baseline: guards, quality, latency, memory, labelled tasks, and where it differs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AutotuneError, BaselineError, MeasurementError
from ...model import route
from ...model.linear_layers import stored_bytes
from ...runtime.variant import Variant
from ...runtime.wrapped import tuned_on
from ...tune import codec, fingerprint
from ...tune.run import name_of
from ...validate import Quality, Verdict, latency
from ...validate.limits import Limits
from ...validate.quality import gates
from ...validate.texts import LONGEST_CONTEXT
from ...validate.tiers import TIERS
from ...validate.timing import Clock
from ...workload import METRICS, prompts
from . import harness, pace, subject, tasks
from .baseline import Baseline, LatencySamples
from .examine import Examined, RecordedExam, examine, judge, judge_free, require_steps
from .folder import load
from .localise import Decode, Localised, layer_shifts, localise
from .recording import buckets
from .result import CheckResult, Metric
from .tasks import Flips, Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...tune.plan import Plan

log = logging.getLogger("autotune")

MAX_SLOWDOWN = 0.05  # default fraction by which a median time may grow
MAX_GROWTH = 0.05  # fraction by which the weights' memory may grow
NO_GAIN = -1e-9  # the least gain is below 0, so that none is asked for where no slowdown is allowed
PAIRED_BUDGET_S = 60.0  # most seconds to time both models in pairs


def run(
    model: PreTrainedModel | Variant,
    baseline: str | Path | Baseline,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: Plan | None = None,
    tier: str = "strict",
    max_slowdown: float | None = None,
    measure_latency: bool | None = None,
    against: PreTrainedModel | None = None,
    workload: Any = None,
    tuning_prompts: Any = None,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] | None = None,
) -> CheckResult:
    """Report for each metric what changed since a baseline was recorded, and where.

    Args:
        model: a causal LM in eval mode, wrapped or not, or a variant. It is run, never edited.
        baseline: the baseline's folder, or the value that `load` returned.
        tokenizer: used to refuse another tokenizer, to score tasks given as text, and to show prompts.
        plan: applied to the model first; it is checked through the path that serves. A variant takes none.
        tier: quality tier, "lossless", "strict", "relaxed" or "aggressive".
        max_slowdown: fraction by which a median may grow, beyond the noise; default 0.05.
        measure_latency: whether to check latency. Default: if it was recorded, or `max_slowdown` or `against` is given.
        against: the recorded model. If given, both models are timed here in interleaved pairs, so the baseline may come
            from another machine.
        workload: prompts that must equal the recorded ones, or None to use the recorded ones.
        tuning_prompts: prompts that the plan or model was tuned or calibrated on; recorded prompts among them are
            flagged. Those of a wrapped model are known.
        clock: returns monotonic seconds.
        progress: called with a sentence for each step; default: the "autotune" logger.

    Raises:
        BaselineError: there is no baseline, or it cannot be compared with this model; latency was asked for, but not
            recorded; or `against` is not the recorded model.
        MeasurementError: the baseline is incomplete or was changed.
        UnsupportedModelError: the model is not a causal LM in eval mode.
        PlanError: the plan was made for another model.
        ValueError: there is no such tier, the slowdown is negative, a plan comes with a variant, or `against` without
            latency.
    """
    if tier not in TIERS:
        raise ValueError(f"no quality tier {tier!r}: choose one of {', '.join(TIERS)}")
    slowdown = MAX_SLOWDOWN if max_slowdown is None else max_slowdown
    if not slowdown >= 0:
        raise ValueError(f"max_slowdown is {max_slowdown}; expected a fraction of 0 or more")
    if against is not None and measure_latency is False:
        raise ValueError("against is timed, which measure_latency=False leaves out; leave out one of them")
    if plan is not None and isinstance(model, Variant):
        raise ValueError("a variant has its transforms already; give the model that the plan is to be applied to")
    notify = progress or log.info
    base = baseline if isinstance(baseline, Baseline) else load(baseline)
    variant = model if isinstance(model, Variant) else subject.serving(model, plan)
    asked = None if workload is None else prompts.parse(workload, tokenizer)
    subject.require_comparable(base, variant.original, tokenizer, asked)
    measure_latency = require_answers(
        base, tier, max_slowdown=max_slowdown, measure_latency=measure_latency, against=against is not None
    )
    rival = None if against is None else _rival(base, against)
    exam = RecordedExam.of(base, variant, tier)
    found = examine(exam, variant, notify)
    quality = judge(exam, found, tier)
    metrics = _quality_metrics(base, exam, found, quality, tier)
    where = _where(base, exam, variant, found, quality, tokenizer, metrics)
    if found.error is None and measure_latency:
        metrics += _latency_metrics(base, variant, rival, slowdown, clock, notify)
    metrics.append(_memory_metric(base, variant))
    task_metrics, flips = _task_metrics(base, variant, tokenizer, notify)
    known = () if isinstance(model, Variant) else tuned_on(model)
    seen = known if tuning_prompts is None else (*known, *prompts.parse(tuning_prompts, tokenizer))
    here = subject.environment(variant.original)
    return CheckResult(
        metrics=(*metrics, *task_metrics, *_leakage(base, seen)),
        quality=quality,
        tier=tier,
        model=name_of(variant.original) + "".join(f" + {transform}" for transform in variant.transforms),
        baseline=f"{base.subject.name} of {base.created}",
        localised=where,
        flips=flips,
        environment={"recorded": codec.encode(base.environment), "here": codec.encode(here)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def require_answers(
    base: Baseline, tier: str, *, max_slowdown: float | None, measure_latency: bool | None, against: bool
) -> bool:
    """Whether latency is to be checked; that the baseline has what a check needs, before a model is loaded for it.

    Args:
        against: whether the recorded model is there to be timed.
        base, tier, max_slowdown, measure_latency: as for `run`.

    Raises:
        BaselineError: latency was asked for, but not recorded, or the tier needs steps that were not recorded.
    """
    if measure_latency is None:
        measure_latency = bool(base.pace) or max_slowdown is not None or against
    if measure_latency and not against and not base.pace:
        raise BaselineError(
            "latency cannot be checked, because it was not recorded: record the baseline again with latency, or give "
            "the recorded model to time against (--against, against=)"
        )
    require_steps(base, tier)
    return measure_latency


def _quality_metrics(base: Baseline, exam: RecordedExam, found: Examined, quality: Quality, tier: str) -> list[Metric]:
    metrics = [Metric("quality", quality.verdict, quality.reason)]
    if quality.tokens:
        metrics += [
            Metric(what, *_within(point, bound, limit), value=point, bound=bound, limit=limit)
            for what, point, bound, limit in gates(quality, TIERS[tier], exam)
        ]
    was = base.subject.dtype
    if found.dtype:
        same = Verdict.PASS if found.dtype == was else Verdict.FAIL
        metrics.append(Metric("dtype", same, f"logits are {found.dtype}, recorded were {was}"))
    if found.error is None:
        verdict, reason = judge_free(exam, found, tier)
        wrote, own = sum(map(len, found.wrote)), sum(len(t.own) for t in exam.texts[: len(found.wrote)])
        metrics.append(Metric("output tokens", verdict, reason, value=float(wrote), recorded=float(own)))
    return metrics


def _within(point: float, bound: float, limit: float) -> tuple[Verdict, str]:
    """Judge as `validate.quality.decide` does: the estimate may fail, but only the bound may pass."""
    if not point <= limit:
        return Verdict.FAIL, f"{point:.4g} is over {limit:.4g}"
    if not bound <= limit:
        return Verdict.INCONCLUSIVE, f"{point:.4g} may be as high as {bound:.4g}, over {limit:.4g}: need more prompts"
    return Verdict.PASS, f"{point:.4g}, at most {bound:.4g}, is within {limit:.4g}"


def _where(
    base: Baseline,
    exam: RecordedExam,
    variant: Variant,
    found: Examined,
    quality: Quality,
    tokenizer: PreTrainedTokenizerBase | None,
    metrics: Sequence[Metric],
) -> Localised | None:
    if all(metric.verdict is Verdict.PASS for metric in metrics):
        return None
    decode: Decode | None = None
    if tokenizer is not None:
        decode = lambda ids: str(tokenizer.decode(list(ids)))  # noqa: E731
    return localise(exam, found, layer_shifts(base, variant), quality.certainty, decode)


def _latency_metrics(
    base: Baseline,
    variant: Variant,
    rival: Variant | None,
    max_slowdown: float,
    clock: Clock,
    notify: Callable[[str], None],
) -> list[Metric]:
    if rival is not None:
        return [_race(base, variant, rival, max_slowdown, clock, notify)]
    was, here = base.environment.machine(), subject.environment(variant.original).machine()
    if was != here:
        reason = f"recorded on another machine ({was}; this one is {here}): --against measures both here"
        return [Metric("latency", Verdict.INCONCLUSIVE, reason)]
    shapes = [each.bucket for each in base.pace]
    try:
        now = pace.measure(variant, shapes, base.questions.prompts, clock=clock, notify=notify)
    except MeasurementError as error:
        return [Metric("latency", Verdict.ERROR, str(error))]
    return [
        _pace_metric(then, mine, metric, max_slowdown)
        for then, mine in zip(base.pace, now, strict=True)
        for metric in METRICS
    ]


def _pace_metric(then: LatencySamples, now: LatencySamples, metric: str, max_slowdown: float) -> Metric:
    verdict, reason, change = pace.decide(then, now, metric, max_slowdown)
    name = f"latency {metric} {then.bucket.label}"
    if change is None:
        return Metric(name, verdict, reason, limit=max_slowdown)
    return Metric(name, verdict, reason, value=change.point, bound=change.high, limit=max_slowdown)


def _rival(base: Baseline, against: PreTrainedModel) -> Variant:
    """The variant that serves the recorded model, to be timed.

    Raises:
        BaselineError: it is another model.
    """
    rival = subject.serving(against)
    if fingerprint.of_model(route.bare(against)) != base.subject.fingerprint:
        raise BaselineError("the model to measure against is not the one recorded: other weights or configuration")
    return rival


def _race(
    base: Baseline,
    variant: Variant,
    rival: Variant,
    max_slowdown: float,
    clock: Clock,
    notify: Callable[[str], None],
) -> Metric:
    """Time the recorded model and this one in interleaved pairs."""
    notify("timing both models in pairs")
    shapes = [each.bucket for each in base.pace] or list(buckets(_recorded_work(base)))
    limits = Limits(
        min_gain=min(1 / (1 + max_slowdown) - 1, NO_GAIN),
        max_ttft_increase=max_slowdown,
        max_tpot_increase=max_slowdown,
        max_p90_increase=2 * max_slowdown,
    )
    found = latency.compare(
        rival,
        variant,
        shapes,
        base.questions.prompts,
        objective="end_to_end",
        limits=limits,
        noise=None,
        clock=clock,
        budget_s=PAIRED_BUDGET_S,
    )
    low, point = found.end_to_end.low, found.end_to_end.ratio
    slower, worst = (1 / x - 1 if x > 0 else math.nan for x in (point, low))
    reason = f"both models in interleaved pairs here: {found.reason}"
    return Metric("latency (paired)", found.verdict, reason, value=slower, bound=worst, limit=max_slowdown)


def _recorded_work(base: Baseline) -> Any:
    from ...workload import Workload

    return Workload(base.questions.prompts)


def _memory_metric(base: Baseline, variant: Variant) -> Metric:
    was, now = base.subject.weights_bytes, stored_bytes(*variant.modules.values())
    limit = was * (1 + MAX_GROWTH)
    verdict = Verdict.PASS if now <= limit else Verdict.FAIL
    reason = f"weights that serve take {now / 1e6:.1f} MB, recorded were {was / 1e6:.1f} MB"
    return Metric("memory", verdict, reason, value=float(now), limit=limit, recorded=float(was))


def _task_metrics(
    base: Baseline, variant: Variant, tokenizer: PreTrainedTokenizerBase | None, notify: Callable[[str], None]
) -> tuple[list[Metric], dict[str, Flips]]:
    metrics, found = [], {}
    for suite in base.suites:
        notify(f"answering {suite.name}")
        try:
            right = _right(suite, variant, tokenizer, base.questions.pad_token_id)
        except AutotuneError as error:
            missing = suite.name.startswith(harness.PREFIX) and harness.unavailable()
            verdict = Verdict.INCONCLUSIVE if missing else Verdict.ERROR
            metrics.append(Metric(suite.name, verdict, f"unavailable: {error}" if missing else str(error)))
            continue
        for name, positions in _parts(suite).items():
            was, now = ([each[k] for k in positions] for each in (suite.right, right))
            flips = tasks.compare(Suite(name, (), tuple(suite.ids[k] for k in positions), tuple(was)), now)
            before, after = (sum(each) / max(1, len(each)) for each in (was, now))
            metrics.append(Metric(name, flips.verdict, flips.reason, value=after, recorded=before))
            found[name] = flips
    return metrics, found


def _parts(suite: Suite) -> dict[str, tuple[int, ...]]:
    """Name -> positions of the outcomes that are compared together."""
    return (
        harness.by_filter(suite)
        if suite.name.startswith(harness.PREFIX)
        else {suite.name: tuple(range(len(suite.ids)))}
    )


def _right(suite: Suite, variant: Variant, tokenizer: PreTrainedTokenizerBase | None, pad: int) -> tuple[bool, ...]:
    if not suite.name.startswith(harness.PREFIX):
        if tokenizer is None and any(task.text for task in suite.tasks):
            raise MeasurementError("the tasks' answers are text, which needs a tokenizer: pass tokenizer=...")
        return tasks.answer(variant, suite.tasks, tokenizer, pad)
    now = harness.answer(variant, suite.name.removeprefix(harness.PREFIX), tokenizer)
    right = dict(zip(now.ids, now.right, strict=True))
    if right.keys() != set(suite.ids):
        raise MeasurementError(f"{suite.name} has other samples now than those recorded: record the baseline again")
    return tuple(right[name] for name in suite.ids)


def _leakage(base: Baseline, seen: Sequence[Sequence[int]]) -> list[Metric]:
    """Flag evaluation prompts that the model was tuned or calibrated on, because they make its figures too good."""
    if not seen:
        return []
    tuned = {tuple(ids)[:LONGEST_CONTEXT] for ids in seen}
    leaked = sum(ids[:LONGEST_CONTEXT] in tuned for ids in base.questions.prompts)
    total = len(base.questions.prompts)
    if not leaked:
        return [Metric("leakage", Verdict.PASS, f"none of the {total} prompts was tuned on")]
    reason = f"{leaked} of the {total} prompts were tuned on, which flatters the figures: record with other prompts"
    return [Metric("leakage", Verdict.INCONCLUSIVE, reason, value=leaked / total, limit=0.0)]
