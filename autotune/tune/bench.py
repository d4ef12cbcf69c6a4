"""Measures variants of a real model for the search. Some prompts are for tuning; the rest are held out to confirm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import profile as profiling
from ..diagnose.costs import Profile
from ..diagnose.diagnosis import Diagnosis, diagnose
from ..errors import first_line
from ..machine import busy
from ..machine import device as devices
from ..machine.hardware import Hardware
from ..model import sharding
from ..model.linear_layers import stored_bytes
from ..runtime.ranks.leading import LEADER
from ..runtime.variant import Transform, Variant
from ..transforms.linears import LinearTransform
from ..validate import Latency, Quality, Verdict, quality
from ..validate.latency import EARLY_LOOKS, WARMUP_TOKENS
from ..validate.score import CandidateError, Served
from ..validate.sensitivity import LayerProbe
from ..validate.timing import request, time_request
from ..workload import METRIC_OF, PHASES, Bucket, Phase, Target, Workload
from . import probation
from .allowance import Allowance
from .budget import least
from .choose import tier_for
from .exams import Exams, Texts
from .plan import Confirmation
from .policy import Policy
from .races import Races

if TYPE_CHECKING:
    from .fingerprint import Fingerprint
    from .references import References

FREE_BYTES = "free_bytes"  # the question to the ranks of a sharded model about their devices' free memory
GLANCE_TOKENS = 5  # new tokens of a request that gives a first impression
PROFILE_S, BRIEF_PROFILE_S, GROWTH_S = 10.0, 6.0, 14.0  # seconds to profile the original, a variant, and growth


class LiveBench:
    """Measures variants of one model through the path that serves.

    Args:
        original: the variant without transforms.
        workload: what to measure with; half of its prompts are held out for `confirm`.
        texts: token ids of natural texts, added to the quality exam if there are too few prompts.
        references: the original's answers from earlier runs, or None to compute them.
        cached_as: whose packed weights and recorded steps the cache keeps for plans; None to keep none.

    Attributes:
        allowance: the budget; it has no end until a deadline is set.
    """

    def __init__(
        self,
        original: Variant,
        workload: Workload,
        policy: Policy,
        hardware: Hardware,
        *,
        texts: Texts = (),
        notify: Callable[[str], None],
        references: References | None = None,
        cached_as: Fingerprint | None = None,
    ) -> None:
        self.original = original
        self.policy = policy
        self.hardware = hardware
        self.notify = notify
        self.workload = workload
        self.cached_as = cached_as
        self.device = devices.of(original.original)
        self.allowance = Allowance(least(policy.budget_s), notify)
        self.exams = Exams(original, workload, texts, self.allowance, references)
        self.races = Races(original, workload, self.exams.tuning.prompts, policy, self.allowance)
        self.tuning, self.held_out = self.exams.tuning, self.exams.held_out
        self.pad = self.exams.pad

    @property
    def deadline(self) -> float:
        """The value of time.monotonic after which optional measurements are skipped."""
        return self.allowance.deadline

    @property
    def race_s(self) -> float:
        """Least seconds of a race, from the original's profile."""
        return self.allowance.race_s

    @property
    def tie_nats(self) -> float:
        """Two tokens whose log-probabilities differ by no more are as good as each other; measured by the exam."""
        return self.exams.to_choose.tie_nats

    def begin(self, budget_s: float, deadline: float) -> None:
        self.allowance.begin(budget_s, deadline)

    def profile(self, variant: Variant) -> Profile:
        """Profile a variant. On a GPU, also measure how the original grows with the context, for decode's diagnosis."""
        scaling = self.device.asynchronous and not variant.transforms
        budget_s = PROFILE_S + GROWTH_S if scaling else BRIEF_PROFILE_S if variant.transforms else PROFILE_S
        meter = busy.Meter()
        found = profiling.measure(
            variant, self.tuning, self.hardware, budget_s=budget_s, scaling=scaling, progress=self.notify
        )
        if not variant.transforms:
            prefill_s, decode_s = (found.phases[phase].seconds for phase in PHASES)
            new_tokens = min(self.races.buckets[0].new_tokens, WARMUP_TOKENS)
            self.allowance.request_s = prefill_s + (new_tokens - 1) * decode_s
            self.exams.read_s = prefill_s / (found.batch * found.prompt_tokens)
            if not self.device.asynchronous:
                self.exams.read_beside_others(meter.elsewhere() or 0.0)
        return found

    def grow(self, profile: Profile, variant: Variant) -> Profile:
        """Add larger batches and longer contexts to a profile, for the report, if the budget allows."""
        left_s = min(GROWTH_S, self.allowance.left_s)
        if profile.batch_scaling or left_s <= 0:
            return profile
        found = profiling.grow(profile, variant, self.tuning, budget_s=left_s, progress=self.notify)
        self.free_memory()
        return found

    def diagnose(self, profile: Profile) -> Mapping[Phase, Diagnosis]:
        return {phase: diagnose(profile.phases[phase], self.hardware, profile.memory) for phase in PHASES}

    def memory_ratio(self, variant: Variant) -> float:
        own = stored_bytes(self.original.original)
        return stored_bytes(self.original.original, *variant.modules.values()) / own

    def first_speedup(self, incumbent: Variant, candidate: Variant, phase: Phase) -> float:
        bucket = self.races.buckets[0]
        prompts = request(bucket, self.tuning.prompts, 0)

        def seconds(variant: Variant) -> float:
            served = Served(variant, self.pad)
            new_tokens, clock = min(bucket.new_tokens, GLANCE_TOKENS), variant.clock
            runs = [time_request(served, prompts, new_tokens, clock) for _ in range(2)]
            return min(run.ttft_s if phase == "prefill" else run.tpot_s for run in runs)

        return seconds(incumbent) / seconds(candidate)

    def answer(self, variant: Variant) -> None:
        """Let a variant answer a short request of the workload.

        Raises:
            CandidateError: the variant raised.
        """
        bucket = self.races.buckets[0]
        Served(variant, self.pad).generate(
            request(bucket, self.tuning.prompts, 0), min(bucket.new_tokens, GLANCE_TOKENS)
        )

    def risk(self, transform: Transform, make: Callable[[], Variant], most_s: float) -> str | None:
        if not probation.is_possible(self.hardware.device) or sharding.ranks(self.original.original) > 1:
            return None  # a fork of one rank has no part in collectives; each rank runs a candidate alone first
        self.notify(f"trying {transform} in a child process first")
        return probation.death_of(lambda: self.answer(make()), most_s, self.original.turn)

    def judge(self, variant: Variant, tier: str) -> Quality:
        exam, doing = self.exams.to_choose, self.allowance.in_time("comparing answers with the original's")
        with self.allowance.timed("judgement"):
            return quality.judge(exam, variant, tier, doing)

    def probe(self, incumbent: Variant, transform: Transform, tier: str) -> LayerProbe | None:
        """The probe of a transform that exchanges single layers: measures their divergence. None for others."""
        if not isinstance(transform, LinearTransform):
            return None
        doing = self.allowance.in_time(f"reading the exam's texts with {transform}")
        return LayerProbe(self.exams.to_choose, incumbent, transform, tier, doing)

    def race(self, incumbent: Variant, candidate: Variant, target: Target) -> Latency:
        with self.allowance.timed("race"):
            return self.races.compare(
                incumbent, candidate, METRIC_OF[target], self.tuning, pairs=25, kept_s=self.race_s
            )

    def compare_briefly(self, reference: Variant, candidate: Variant, target: Target) -> Latency:
        """Measure a speed-up with few pairs, for the report only; nothing is decided by it."""
        limits = replace(self.policy.limits, min_gain=-1.0)
        return self.races.compare(reference, candidate, METRIC_OF[target], self.tuning, EARLY_LOOKS[1], limits=limits)

    def least_s(self, profile: Profile) -> float:
        """Least seconds to judge, time and confirm a candidate.

        Counts only the original's part: two exams and two races, one of them on held-out prompts.
        """
        return 2 * (self.exams.least_s(profile, self.hardware) + self.race_s)

    def free_bytes(self) -> float:
        own = self.device.memory().free
        leader = LEADER.get()
        return own if leader is None else float(min(leader.ask(FREE_BYTES, own)))

    def describe_error(self, error: Exception) -> str:
        failure = self.device.failure(error)
        if failure == "dead":
            raise self.device.mark_dead(error) from error
        return f"out of memory: {first_line(error, typed=False)}" if failure == "memory" else first_line(error)

    def free_memory(self) -> None:
        self.device.trim()

    def confirm(self, variant: Variant, *, brief: bool = True) -> Confirmation:
        """Judge and time a variant again, on prompts it was not chosen on.

        Args:
            brief: whether a short check, as of a kept plan, is allowed when the rest of the budget is less than
                choosing the variant took.

        Raises:
            BudgetSpentError: the budget ended.
        """
        if (failure := self.stress(variant)) is not None:
            return Confirmation(failure)
        if brief and (shortage := self.allowance.shortage) is not None:
            self.notify(f"confirming in brief: {shortage}")
            return Confirmation(None, *self._spot(variant, 1, self.races.buckets), brief=True)
        doing = self.allowance.in_time("comparing answers to held-out prompts with the original's")
        verdict = quality.judge(self.exams.to_confirm, variant, tier_for(variant, self.policy), doing)
        if verdict.verdict is not Verdict.PASS:
            return Confirmation(None, verdict)
        found = self.races.compare(self.original, variant, "end_to_end", self.held_out, pairs=40, seed=1)
        return Confirmation(None, verdict, found)

    def stress(self, variant: Variant) -> str | None:
        """Run the workload's largest request, which would run out of memory first. Returns its failure, or None."""
        longest, batch = max(self.workload.prompts, key=len), max(self.workload.batch_sizes)
        try:
            Served(variant, self.pad).generate([longest] * batch, self.workload.new_tokens)
        except CandidateError as error:
            failure = str(error)
        else:
            return None
        self.free_memory()
        shape = f"{batch} x {len(longest)} tokens and {self.workload.new_tokens} new ones"
        return f"the workload's largest request ({shape}) failed: {failure}"

    def reverify(self, variant: Variant) -> tuple[Quality, Latency | None]:
        """Check in seconds a plan from disk that was proven before for this same model and machine.

        A few prompts and requests are enough to detect what broke since. The noise floor is not measured again: whether
        the gain exceeds it was decided then, on long requests and at rest. Now calls may be served meanwhile.
        """
        return self._spot(variant, 2, self.races.short, noise=0.0)

    def prove(self, variant: Variant) -> tuple[Quality, Latency | None]:
        """Check a plan of another machine, or made otherwise, as a whole: nothing was ever decided here.

        Raises:
            CandidateError: the workload's largest request failed.
        """
        if (failure := self.stress(variant)) is not None:
            raise CandidateError(failure)
        verdict, latency = self._spot(variant, 2, self.races.buckets)
        fast = latency is not None and latency.verdict is Verdict.PASS
        if not fast or verdict.verdict is not Verdict.INCONCLUSIVE:
            return verdict, latency
        doing = self.allowance.in_time("comparing answers to held-out prompts with the original's")
        verdict = quality.judge(self.exams.held(), variant, tier_for(variant, self.policy), doing)
        return verdict, latency if verdict.verdict is Verdict.PASS else None

    def _spot(
        self, variant: Variant, seed: int, buckets: tuple[Bucket, ...], noise: float | None = None
    ) -> tuple[Quality, Latency | None]:
        """Judge a variant on a few held-out prompts, enough to detect what is broken, and time a few requests."""
        verdict = quality.judge(self.exams.brief(), variant, tier_for(variant, self.policy))
        if verdict.verdict not in (Verdict.PASS, Verdict.INCONCLUSIVE):
            return verdict, None
        return verdict, self.races.compare(
            self.original, variant, "end_to_end", self.held_out, 8, seed, buckets, noise=noise
        )
