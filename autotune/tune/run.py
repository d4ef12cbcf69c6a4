"""Tuning, from a model and a workload to a verdict: replay a known plan or search for one, confirm, keep, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..errors import AutotuneError, Blocker, PlanError, TransformError
from ..machine import busy, hardware, outside
from ..model import modes, placement
from ..model.revision import hooked
from ..report import Report, read
from ..runtime.traffic import Traffic
from ..runtime.variant import Variant
from ..validate import Latency, Verdict
from ..workload import Workload, built_in
from . import contributions, fingerprint, store
from .bench import LiveBench
from .findings import Findings
from .fingerprint import Fingerprint
from .plan import Confirmation, Plan
from .policy import Policy
from .record import report_of, reverified
from .references import References
from .search import Found, search
from .verdict import Conclusion, doubts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("autotune")


@dataclass(frozen=True)
class Tuned:
    """What tuning came to.

    Args:
        variant: what should serve; without transforms it is the original.
        verdict: one sentence with the numbers that decided, or with what could not be tried.
        doubt: why "keep the original" is not kept as a plan, or None where the outcome is.
        noisy: whether noise or a busy machine may have hidden a gain.
    """

    variant: Variant
    plan: Plan
    report: Report
    verdict: str
    doubt: str | None = None
    noisy: bool = False


def tune(
    model: PreTrainedModel,
    workload: Workload,
    policy: Policy,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft: PreTrainedModel | None = None,
    cache: bool = True,
    traffic: Traffic | None = None,
    notify: Callable[[str], None] = log.info,
    serve: Callable[[Variant], None] = lambda variant: None,
) -> Tuned:
    """Find, prove and keep the variant of `model` that serves `workload` best under `policy`.

    Args:
        model: unrouted, in eval mode. It is left bit-identical.
        tokenizer: fills up a workload of few prompts with natural text to judge quality on.
        draft: a smaller model that may guess tokens.
        cache: read and write plans, and what the original said, in the user's cache directory.
        traffic: lets live requests through between measured steps.
        notify: told each step in a sentence.
        serve: given each variant that is proven, while tuning goes on. A kept plan's, which an earlier run proved, is
            given before it is verified again, and the original where that fails.

    Raises:
        AutotuneError: something that is needed could not be measured, or a transform wrote into the original.
    """
    start, meter = time.monotonic(), busy.Meter()
    here = hardware.identify(model)
    identity = fingerprint.of(model, here, workload, policy, draft)
    original = Variant(model, traffic, workload, draft)
    texts = built_in.natural(tokenizer)
    kept = References(identity) if cache and modes.unserved() is None else None  # under autocast it says something else
    bench = LiveBench(original, workload, policy, here, texts=texts, notify=notify, references=kept)
    obstacle = obstacle_of(original)
    if cache and obstacle is None and (known := store.find(identity)) is not None:
        notify("re-verifying the plan kept from an earlier run")
        if (tuned := replay(known, bench, start, serve, meter)) is not None:
            return tuned
    notify("measuring the hardware")
    machine = bench.hardware = hardware.probe(model, again=True)  # a kept plan, above, needs no peaks
    deadline = start + policy.budget_s
    bench.deadline = deadline
    found = search(original, policy, machine, bench, notify=notify, deadline=deadline, obstacle=obstacle, kept=serve)
    tuned = conclude(found, bench, identity, start, meter)
    if fingerprint.of_model(model) != identity.model:
        culprits = ", ".join(sorted({t.name for trial in found.trials if trial.compile_s for t in trial.transforms}))
        raise AutotuneError(
            f"the model's weights changed during tuning: another thread or one of the transforms tried ({culprits}) "
            "wrote into them; nothing was committed; reload the model"
        )
    bench.keep_references()
    if tuned.doubt is not None:
        notify(f"{tuned.verdict}. This is not kept as a plan: {tuned.doubt}")
    elif cache:
        store.save(tuned.plan)
    return tuned


def obstacle_of(original: Variant) -> str | None:
    """Why nothing can be tried on a model, or None."""
    if (where := hooked(original.original)) is not None:
        return Blocker(f"there is a forward hook on {where}, which no plan would call: remove it, and tune again")
    if (reason := placement.strange(original.original)) is not None:
        return Blocker(reason)
    if placement.is_patched(original.original):  # it leads back to the routed model, or past every transform
        patched = "the model's forward was replaced on the object, which no plan would call"
        return Blocker(f"{patched}: undo that, and tune again")
    return None


def conclude(found: Found, bench: LiveBench, identity: Fingerprint, start: float, meter: busy.Meter) -> Tuned:
    """What the search came to as a plan and a report."""
    winner, shown = found.after.variant, found.confirmation or Confirmation()
    transforms, quality, latency = winner.transforms or found.refuted, shown.quality, shown.latency
    elsewhere = meter.elsewhere()
    conclusion = Conclusion(found.trials, transforms, shown.failure, quality, latency, elsewhere)
    kept = conclusion.is_committed
    variant = winner if kept else bench.original
    before, after = found.before.profile, found.after.profile if kept else None
    if after is not None:
        bench.notify("measuring how the original and the winner grow")
        before, after = bench.grow(before, bench.original), bench.grow(after, winner)
    contributed = contributions.measure(winner, bench) if kept else ()
    seconds = time.monotonic() - start
    findings = Findings(
        model=name_of(bench.original.original),
        parameters=bench.original.original.num_parameters(),
        hardware=bench.hardware,
        workload=describe(bench.workload),
        before=before,
        diagnoses_before=found.before.diagnoses,
        verdict=conclusion.verdict,
        doubt=conclusion.doubt,
        after=after,
        diagnoses_after=bench.diagnose(after) if after else {},
        transforms=variant.transforms,
        contributions=contributed,
        trials=found.trials,
        quality=quality,
        latency=latency,
        policy=bench.policy.name,
        tier=bench.policy.tier,
        objective=bench.policy.objective,
        budget_s=bench.policy.budget_s,
        seconds=seconds,
        elsewhere=elsewhere,
        break_even_tokens=break_even(found, latency, seconds) if kept else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    report = report_of(findings)
    plan = Plan(identity, variant.transforms, quality, latency, found.trials, findings.created, report.record)
    return Tuned(variant, plan, report, conclusion.verdict, conclusion.doubt, conclusion.is_noisy)


def replay(
    plan: Plan, bench: LiveBench, start: float, serve: Callable[[Variant], None], meter: busy.Meter
) -> Tuned | None:
    """A plan from disk is a hint: applied and re-verified, or ignored.

    It serves as soon as it answers: it was proven on this very model and machine.
    """
    try:
        report = read(plan.summary)
    except PlanError as error:
        log.warning("the kept plan is not used (%s); searching anew", error)
        return None
    if not plan.transforms and (doubt := doubts(plan.trials)):  # by an earlier version, which kept every outcome
        log.info("the kept plan is not used (%s); searching anew", doubt)
        return None
    if not plan.transforms:
        seconds = time.monotonic() - start
        verdict = "kept the original, as the earlier search for this model, machine and workload concluded"
        return Tuned(bench.original, plan, reverified(report, verdict=verdict, seconds=seconds), verdict)
    try:
        variant = restored(plan, bench)
        serve(variant)
        quality, latency = bench.reverify(variant)
    except Exception as error:  # whatever is wrong with an old plan, a fresh search is the answer
        outside.pass_on(error)
        serve(bench.original)
        log.warning("the kept plan could not be replayed (%s: %s); searching anew", type(error).__name__, error)
        return None
    if latency is None or latency.verdict is not Verdict.PASS:
        serve(bench.original)
        reason = quality.reason if latency is None else latency.reason
        log.warning("the kept plan did not hold (%s); searching anew", reason)
        return None
    seconds = time.monotonic() - start
    verdict = (
        f"replayed and re-verified on short requests: {latency.reason}; a spot check of quality found mean KLD "
        f"{quality.mean_kld:.2g}, same top token {quality.same_top:.1%} on {quality.tokens} tokens"
    )
    again = reverified(report, verdict=verdict, seconds=seconds, elsewhere=meter.elsewhere())
    return Tuned(variant, plan, again, verdict)


def restored(plan: Plan, bench: LiveBench) -> Variant:
    """The variant of a plan from disk, once it has answered a request of the workload.

    Raises:
        TransformError: a transform of it cannot be had any more, or did nothing.
        CandidateError: it cannot answer.
    """
    variant = bench.original
    for transform in plan.transforms:
        if reason := transform.unavailable(variant, bench.hardware):
            raise TransformError(f"{transform}: {reason}")
        variant = variant.with_transform(transform)
        if missing := transform.took_effect(variant):
            raise TransformError(f"{transform} had no effect: {missing}")
    bench.answer(variant)
    return variant


def break_even(found: Found, latency: Latency | None, seconds: float) -> float | None:
    """Tokens to generate until the time spent on tuning is won back."""
    if latency is None or latency.tpot.ratio <= 1:
        return None
    saved_s = found.before.profile.phases["decode"].seconds * (1 - 1 / latency.tpot.ratio)
    return seconds / saved_s


def name_of(model: PreTrainedModel) -> str:
    return model.config._name_or_path or type(model).__name__


def describe(workload: Workload) -> str:
    bucket = workload.buckets()[0]
    batches = ", ".join(map(str, workload.batch_sizes))
    prompts = f"{len(workload.prompts)} prompts of about {bucket.prompt_tokens} tokens"
    return f"{prompts}, {workload.new_tokens} new tokens, batch {batches}"
