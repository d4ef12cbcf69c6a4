"""Tune a model for a workload: replay a known plan or search for one, confirm it, save it and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from ..errors import AutotuneError, Blocker, PlanError
from ..machine import busy, hardware
from ..machine.quiet import quiet
from ..model import modes, placement, sharding
from ..model.revision import hooked
from ..runtime.ranks.leading import LEADER
from ..runtime.traffic import Traffic
from ..runtime.variant import Variant
from ..validate import Latency
from ..workload import Workload, built_in
from . import callers, contributions, fingerprint, search_lock, store, together
from .bench import LiveBench
from .budget import longest
from .findings import Findings
from .fingerprint import Fingerprint
from .plan import Confirmation, Plan
from .policy import Policy
from .record import report_of
from .references import References
from .replay import apply_and_verify, keep, optional, replay
from .search import Found, search
from .tuned import Tuned
from .verdict import Conclusion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("autotune")


@quiet()
def tune(
    model: PreTrainedModel,
    workload: Workload,
    policy: Policy,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft: PreTrainedModel | None = None,
    cache: bool = True,
    plan: Plan | None = None,
    traffic: Traffic | None = None,
    notify: Callable[[str], None] = log.info,
    serve: Callable[[Variant], None] = lambda variant: None,
) -> Tuned:
    """Find, prove and save the variant of `model` that serves `workload` best under `policy`.

    If the model's layers are sharded over ranks, all ranks call it, and get the same plan (`together`).

    Args:
        model: unrouted, in eval mode. It stays bit-identical.
        tokenizer: encodes natural text to judge quality on if the workload has few prompts.
        draft: a smaller model that may guess tokens.
        cache: whether to read and write plans, and the original's answers, in the user's cache directory.
        plan: verified before anything is searched for, in place of a kept one. It may come from another machine; one
            that keeps the original then counts as none.
        traffic: lets live requests through between measured steps.
        notify: called with a sentence for each step.
        serve: called with each proven variant while tuning goes on. For a kept plan, which an earlier run proved, it is
            called before the plan is verified again, and with the original if that fails.

    Raises:
        PlanError: `plan` was made for another model.
        AutotuneError: a needed measurement failed, or a transform wrote into the original.
    """
    if sharding.ranks(model) > 1 and LEADER.get() is None:
        alone = partial(tune, model, workload, policy, tokenizer=tokenizer, cache=cache, plan=plan, notify=notify)
        return together.tune(model, workload, policy, alone)
    start, meter = time.monotonic(), busy.Meter()
    here = hardware.identify(model)
    identity = fingerprint.of(model, here, workload, policy, draft)
    if plan is not None:
        plan.require(identity.model)
        if not plan.transforms and plan.fingerprint != identity:
            made_for = "another machine, version, workload or policy"
            notify(f"the plan that was given keeps the original, for {made_for}: it is not used")
            plan = None
    original = Variant(model, traffic, workload, draft)
    kept = References(identity) if cache and modes.unserved() is None else None  # autocast changes the answers
    texts, cached_as = built_in.natural(tokenizer), identity if cache else None
    bench = LiveBench(
        original, workload, policy, here, texts=texts, notify=notify, references=kept, cached_as=cached_as
    )
    obstacle = obstacle_of(original)
    known = None if obstacle is not None else plan or (store.find(identity) if cache else None)
    if known is not None:
        notify(f"re-verifying the plan {'that was given' if plan else 'kept from an earlier run'}")
        if (tuned := replay(known, bench, start, serve, meter, proven=known.fingerprint == identity)) is not None:
            return tuned
    with search_lock.turn(identity if cache and obstacle is None else None) as mine:
        rest = (traffic or Traffic()).rest
        most_s = search_lock.PATIENCE * longest(policy.budget_s, here.device)
        found = search_lock.awaited(mine, identity, most_s, notify, rest, known)
        if found is not None and (tuned := replay(found, bench, time.monotonic(), serve, busy.Meter())) is not None:
            return tuned
        return _searched(bench, identity, obstacle, cache, notify, serve)


@quiet()
def verified(
    model: PreTrainedModel,
    workload: Workload,
    policy: Policy,
    plan: Plan,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft: PreTrainedModel | None = None,
    traffic: Traffic | None = None,
    notify: Callable[[str], None] = log.info,
) -> Tuned:
    """Prove a plan on this machine, by quality and latency against the original. Nothing is searched for or saved.

    Args:
        plan: of another run, perhaps on another machine.
        model, workload, policy, tokenizer, draft, traffic, notify: as for `tune`.

    Raises:
        PlanError: the plan was made for another model, or does not hold here; the message says why.
    """
    if sharding.ranks(model) > 1:
        raise PlanError("the model is sharded over several ranks, which take a plan together: tune it with that plan")
    plan.require(fingerprint.of_model(model))
    original = Variant(model, traffic, workload, draft)
    if (obstacle := obstacle_of(original)) is not None:
        raise PlanError(f"no plan can serve: {obstacle}")
    here, texts = hardware.identify(model), built_in.natural(tokenizer)
    bench = LiveBench(original, workload, policy, here, texts=texts, notify=notify)
    notify("verifying another plan")
    return apply_and_verify(plan, bench, time.monotonic(), None, busy.Meter())


def _searched(
    bench: LiveBench,
    identity: Fingerprint,
    obstacle: str | None,
    cache: bool,
    notify: Callable[[str], None],
    serve: Callable[[Variant], None],
) -> Tuned:
    """Search, prove and save; the arguments are those of `tune`."""
    start, meter = time.monotonic(), busy.Meter()
    original, policy, model = bench.original, bench.policy, bench.original.original
    notify("measuring the hardware")
    machine = bench.hardware = hardware.probe(model, again=True, turn=original.turn)  # a replay needs no peaks
    found = search(original, policy, machine, bench, notify=notify, start=start, obstacle=obstacle, kept=serve)
    tuned = conclude(found, bench, identity, start, meter)
    if fingerprint.of_model(model) != identity.model:
        culprits = ", ".join(sorted({t.name for trial in found.trials if trial.compile_s for t in trial.transforms}))
        raise AutotuneError(
            f"the model's weights changed during tuning: another thread or one of the transforms tried ({culprits}) "
            "wrote into them; nothing was committed; reload the model"
        )
    if tuned.doubt is not None:
        notify(f"{tuned.verdict}. This is not kept as a plan: {tuned.doubt}")
    elif cache:
        store.save(tuned.plan)
        keep(tuned, bench)
    with optional("the original's answers"):
        bench.exams.keep_references()
    return tuned


def obstacle_of(original: Variant) -> str | None:
    """Why no transform can be tried on a model, or None."""
    if (where := hooked(original.original)) is not None:
        return Blocker(f"there is a forward hook on {where}, which no plan would call: remove it, and tune again")
    if (reason := placement.strange(original.original)) is not None:
        return Blocker(reason)
    if placement.is_patched(original.original):  # a patch leads back to the routed model, or past every transform
        patched = "the model's forward was replaced on the object, which no plan would call"
        return Blocker(f"{patched}: undo that, and tune again")
    return None


def conclude(found: Found, bench: LiveBench, identity: Fingerprint, start: float, meter: busy.Meter) -> Tuned:
    """Turn the result of a search into a variant, a plan and a report."""
    winner, shown = found.after.variant, found.confirmation or Confirmation()
    transforms, quality, latency = winner.transforms or found.refuted, shown.quality, shown.latency
    elsewhere = meter.elsewhere()
    conclusion = Conclusion(found.trials, transforms, shown.failure, quality, latency, elsewhere)
    kept = conclusion.is_committed
    variant, sharing, verdict = winner if kept else bench.original, None, conclusion.verdict
    if kept:  # before what is only shown, which takes the rest of the budget
        variant, sharing = callers.measure(winner, bench)
    before, after = found.before.profile, found.after.profile if kept else None
    if after is not None:
        bench.notify("measuring how the original and the winner grow")
        before, after = bench.grow(before, bench.original), bench.grow(after, winner)
    contributed = contributions.measure(winner, bench) if kept else ()
    if sharing is not None:
        verdict = f"{verdict}; {sharing.reason}"
    seconds = time.monotonic() - start
    findings = Findings(
        model=name_of(bench.original.original),
        parameters=bench.original.original.num_parameters(),
        hardware=bench.hardware,
        workload=describe(bench.workload),
        before=before,
        diagnoses_before=found.before.diagnoses,
        verdict=verdict,
        doubt=conclusion.doubt,
        after=after,
        diagnoses_after=bench.diagnose(after) if after else {},
        transforms=variant.transforms,
        contributions=contributed,
        sharing=sharing,
        trials=found.trials,
        quality=quality,
        latency=latency,
        policy=bench.policy.name,
        tier=bench.policy.tier,
        objective=bench.policy.objective,
        budget_s=found.budget_s,
        seconds=seconds,
        elsewhere=elsewhere,
        break_even_tokens=break_even(found, latency, seconds) if kept else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    report = report_of(findings)
    plan = Plan(identity, variant.transforms, quality, latency, found.trials, findings.created, report.record)
    return Tuned(variant, plan, report, verdict, conclusion.doubt, conclusion.is_noisy)


def break_even(found: Found, latency: Latency | None, seconds: float) -> float | None:
    """Number of tokens to generate until the time saved equals the time spent on tuning."""
    if latency is None or not latency.tpot.ratio > 1:
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
