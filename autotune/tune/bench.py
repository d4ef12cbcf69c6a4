"""Measures variants of a real model for the search. Some prompts are for tuning; the rest are held out to confirm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import torch

from .. import profile as profiling
from ..diagnose.costs import Profile
from ..diagnose.diagnosis import Diagnosis, diagnose
from ..errors import BudgetSpentError, first_line
from ..machine import busy, intraop
from ..machine import device as devices
from ..machine.hardware import Hardware
from ..model import sharding
from ..model.linear_layers import stored_bytes
from ..profile.survey import cache_bytes
from ..report.progress import Doing
from ..runtime.ranks.leading import LEADER
from ..runtime.variant import Transform, Variant
from ..transforms.linears import LinearTransform
from ..validate import Latency, Quality, Verdict, latency, quality
from ..validate.exam import Exam, reads_with
from ..validate.latency import EARLY_LOOKS, STEADY_REQUESTS, WARMUP_TOKENS
from ..validate.limits import Limits
from ..validate.ratios import FEWEST_PAIRS, own_noise
from ..validate.score import CandidateError, Served
from ..validate.sensitivity import LayerProbe
from ..validate.texts import effort
from ..validate.tiers import SIZES
from ..validate.timing import request, time_request
from ..workload import METRIC_OF, PHASES, Bucket, Metric, Phase, Target, Workload
from . import probation
from .choose import tier_for
from .plan import Confirmation
from .policy import Policy

if TYPE_CHECKING:
    from .references import References

FREE_BYTES = "free_bytes"  # the question to the ranks of a sharded model about their devices' free memory
PROMPTS_PER_SIDE = 16  # least prompts that a quick exam needs; see validate.quality
GLANCE_TOKENS = 5  # new tokens of a request that gives a first impression
SPOT_TOKENS = 8  # new tokens of a request that times a kept plan again, or the machine's noise
PROFILE_S, BRIEF_PROFILE_S, GROWTH_S = 10.0, 6.0, 14.0  # seconds to profile the original, a variant, and growth
GRACE, GRACE_S = 0.08, 12.0  # overrun for work under way: share of the budget, seconds; the larger counts
MUCH_ELSEWHERE = 0.25  # share of the CPU time from which on it is worth timing whether fewer threads read faster
RACE_S, LEAST_RACE_S = 60.0, 5.0  # seconds of a race if all pairs are needed, and the least if little budget is left
RACE_SHARE = 0.25  # of the budget that is left: what a race may take beyond RACE_S, if its answer is not clear


class LiveBench:
    """Measures variants of one model through the path that serves.

    Args:
        original: the variant without transforms.
        workload: what to measure with; half of its prompts are held out for `confirm`.
        texts: token ids of natural texts, added to the quality exam if there are too few prompts.
        references: the original's answers from earlier runs, or None to compute them.
    """

    def __init__(
        self,
        original: Variant,
        workload: Workload,
        policy: Policy,
        hardware: Hardware,
        *,
        texts: tuple[tuple[int, ...], ...] = (),
        notify: Callable[[str], None],
        references: References | None = None,
    ) -> None:
        self.original = original
        self.policy = policy
        self.hardware = hardware
        self.notify = notify
        self.workload = workload
        self.device = devices.of(original.original)
        self.references = references
        self.tuning, self.held_out = workload.split(0.5)
        half = len(texts) // 2
        self._texts = (texts[:half], texts[half:])
        self.clock = original.traffic.clock if original.traffic else time.perf_counter
        self.pad = original.original.generation_config.pad_token_id or 0
        self._request_s = 0.0  # seconds of the original's shortest timed request
        self._read_s = 0.0  # seconds in which the original reads a token
        self._reading_threads: int | None = None  # with which it reads; None: as many as the calling thread has
        self._took = dict[str, float]()  # kind of work -> seconds of the latest
        self.deadline = math.inf  # value of time.monotonic after which optional measurements are skipped

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
            self._request_s = prefill_s + (min(self.buckets[0].new_tokens, WARMUP_TOKENS) - 1) * decode_s
            self._read_s = prefill_s / found.prompt_tokens
            if not self.device.asynchronous:
                self._read_beside_others(meter.elsewhere() or 0.0)
        return found

    def _read_beside_others(self, elsewhere: float) -> None:
        """If others took much of the CPU time, find out whether the original reads faster without the cores they take.

        A team of threads waits for the one whose core was taken, in every layer: beside a process that took one of two
        cores, 64 tokens of a model of 0.5B in FP32 took 1.4 s with two threads and 0.7 s with one.
        """
        threads = torch.get_num_threads()
        fewer = max(1, round(threads * (1 - elsewhere)))
        if elsewhere < MUCH_ELSEWHERE or fewer == threads:
            return
        self.notify("timing reading with fewer threads, as others take much of the CPU time")
        prompt, served = self.tuning.prompts[0], Served(self.original, self.pad)
        took_s = dict[int, float]()
        for count in (fewer, threads, fewer, threads):
            start = time.perf_counter()
            with intraop.computing_with(count):
                served.read(prompt, last=1)
            took_s[count] = min(took_s.get(count, math.inf), time.perf_counter() - start)
        if took_s[fewer] < took_s[threads]:
            self._reading_threads, self._read_s = fewer, took_s[fewer] / len(prompt)

    def grow(self, profile: Profile, variant: Variant) -> Profile:
        """Add larger batches and longer contexts to a profile, for the report, if the budget allows."""
        left_s = min(GROWTH_S, self.deadline - time.monotonic())
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
        bucket = self.buckets[0]
        prompts = request(bucket, self.tuning.prompts, 0)

        def seconds(variant: Variant) -> float:
            served = Served(variant, self.pad)
            runs = [time_request(served, prompts, min(bucket.new_tokens, GLANCE_TOKENS)) for _ in range(2)]
            return min(run.ttft_s if phase == "prefill" else run.tpot_s for run in runs)

        return seconds(incumbent) / seconds(candidate)

    def answer(self, variant: Variant) -> None:
        """Let a variant answer a short request of the workload.

        Raises:
            CandidateError: the variant raised.
        """
        bucket = self.buckets[0]
        Served(variant, self.pad).generate(
            request(bucket, self.tuning.prompts, 0), min(bucket.new_tokens, GLANCE_TOKENS)
        )

    def risk(self, transform: Transform, make: Callable[[], Variant], most_s: float) -> str | None:
        if not probation.is_possible(self.hardware.device) or sharding.ranks(self.original.original) > 1:
            return None  # a fork of one rank has no part in collectives; each rank runs a candidate alone first
        self.notify(f"trying {transform} in a child process first")
        return probation.death_of(lambda: self.answer(make()), most_s, self.original.turn)

    def judge(self, variant: Variant, tier: str) -> Quality:
        exam = self.exam
        with self._timed("judgement"):
            return quality.judge(exam, variant, tier, self._in_time("comparing answers with the original's"))

    def probe(self, incumbent: Variant, transform: Transform, tier: str) -> LayerProbe | None:
        """The probe of a transform that exchanges single layers: measures their divergence. None for others."""
        if not isinstance(transform, LinearTransform):
            return None
        doing = self._in_time(f"reading the exam's texts with {transform}")
        return LayerProbe(self.exam, incumbent, transform, tier, doing)

    def race(self, incumbent: Variant, candidate: Variant, target: Target) -> Latency:
        with self._timed("race"):
            return self._compare(incumbent, candidate, METRIC_OF[target], self.tuning, pairs=25, kept_s=self.race_s)

    def compare_briefly(self, reference: Variant, candidate: Variant, target: Target) -> Latency:
        """Measure a speed-up with few pairs, for the report only; nothing is decided by it."""
        limits = replace(self.policy.limits, min_gain=-1.0)
        return self._compare(reference, candidate, METRIC_OF[target], self.tuning, EARLY_LOOKS[1], limits=limits)

    def least_s(self, profile: Profile) -> float:
        """Least seconds to judge, time and confirm a candidate.

        Counts only the original's part: two exams and two races, one of them on held-out prompts.
        """
        read_s = self._read_s
        if (reading := reads_with(self.original.original)) is not None:
            read_s /= max(1.0, reading.speedup(profile.phases["prefill"], self.hardware))
        exam_s = effort(SIZES["quick"], profile.prompt_tokens).seconds(read_s, profile.phases["decode"].seconds)
        return 2 * (exam_s + self.race_s)

    @property
    def race_s(self) -> float:
        """Least seconds of a race: the original's part of warm-up and of the fewest pairs, over few tokens."""
        return (STEADY_REQUESTS + FEWEST_PAIRS) * self._request_s

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
        left_s, needed_s = self.deadline - time.monotonic(), sum(self._took.values())
        if brief and needed_s > left_s + self._grace_s:
            self.notify(f"confirming in brief: in full takes about {needed_s:.0f} s, {max(left_s, 0):.0f} s are left")
            return Confirmation(None, *self._spot(variant, 1, self.buckets), brief=True)
        doing = self._in_time("comparing answers to held-out prompts with the original's")
        verdict = quality.judge(self.held_out_exam, variant, tier_for(variant, self.policy), doing)
        if verdict.verdict is not Verdict.PASS:
            return Confirmation(None, verdict)
        found = self._compare(self.original, variant, "end_to_end", self.held_out, pairs=40, seed=1)
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
        self.noise = 0.0
        return self._spot(variant, 2, self._short)

    def _spot(self, variant: Variant, seed: int, buckets: tuple[Bucket, ...]) -> tuple[Quality, Latency | None]:
        """Judge a variant on a few held-out prompts, enough to detect what is broken, and time a few requests."""
        exam = self._exam(self.held_out, self._texts[1], "brief")
        verdict = quality.judge(exam, variant, tier_for(variant, self.policy))
        if verdict.verdict not in (Verdict.PASS, Verdict.INCONCLUSIVE):
            return verdict, None
        return verdict, self._compare(self.original, variant, "end_to_end", self.held_out, 8, seed, buckets)

    @cached_property
    def exam(self) -> Exam:
        with self._timed("exam"):
            return self._exam(self.tuning, self._texts[0])

    def keep_references(self) -> None:
        """Save the original's answers to the exams that were used, for the next run."""
        for name in ("exam", "held_out_exam"):
            if self.references is not None and name in self.__dict__:
                self.references.save(self.__dict__[name])

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._took[what] = time.monotonic() - start

    @cached_property
    def held_out_exam(self) -> Exam:
        return self._exam(self.held_out, self._texts[1], like=self.exam)

    @cached_property
    def noise(self) -> float:
        """The noise floor of this host: the result of timing the original against itself."""
        doing = self._doing("timing the original against itself")
        return latency.noise_floor(self.original, self._short, self.tuning.prompts, clock=self.clock, progress=doing)

    def _doing(self, what: str) -> Callable[[str, float], None]:
        return lambda step, share: self.notify(Doing(what, share))

    def _in_time(self, what: str) -> Callable[[str, float], None]:
        """A progress callback that stops the work when a race after it could not end within the budget and its grace.

        It raises BudgetSpentError.
        """
        doing = self._doing(what)

        def tell(step: str, share: float) -> None:
            if time.monotonic() > self.deadline + max(0.0, self._grace_s - self.race_s):
                budget = f"the budget of {self.policy.budget_s:.0f} s"
                raise BudgetSpentError(f"{budget} was spent with {share:.0%} done of {what}")
            doing(step, share)

        return tell

    @property
    def _grace_s(self) -> float:
        return max(GRACE_S, GRACE * self.policy.budget_s)

    @property
    def _short(self) -> tuple[Bucket, ...]:
        """The first bucket with short answers, for timings that do not depend on the answers' length."""
        return tuple(replace(b, new_tokens=min(b.new_tokens, SPOT_TOKENS)) for b in self.buckets[:1])

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.workload.buckets()

    def _compare(
        self,
        reference: Variant,
        candidate: Variant,
        objective: Metric,
        work: Workload,
        pairs: int,
        seed: int = 0,
        buckets: tuple[Bucket, ...] = (),
        limits: Limits | None = None,
        kept_s: float = 0.0,
    ) -> Latency:
        """Time two variants in pairs. `kept_s` seconds of the budget are left to what follows."""
        limits = limits or self._limits(reference, candidate)
        left_s = self.deadline - time.monotonic()
        most_s = max(RACE_S, RACE_SHARE * min(left_s, self.policy.budget_s))
        race = partial(
            latency.compare,
            reference,
            candidate,
            buckets or self.buckets,
            work.prompts,
            objective=objective,
            limits=limits,
            clock=self.clock,
            max_pairs=pairs,
            budget_s=max(LEAST_RACE_S, min(most_s, left_s - kept_s)),
            seed=seed,
            progress=self._doing("timing requests in pairs"),
        )
        if "noise" not in self.__dict__:  # measuring noise takes long, and it matters only for small gains
            found = race(noise=0.0)
            if found.verdict is not Verdict.PASS or limits.min_gain < 0:
                return found
            own: float = own_noise(found, objective)
            if getattr(found, objective).low >= 1 + 2 * own:
                return replace(found, noise=own)
            if time.monotonic() > self.deadline:
                reason = "the gain is small, and the budget was spent before this machine's noise was measured"
                return replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason)
        return race(noise=self.noise)

    def _limits(self, reference: Variant, candidate: Variant) -> Limits:
        """The policy's limits. If memory is the objective, a variant that needs less of it need not gain time."""
        limits = self.policy.limits
        if self.policy.objective == "memory" and own_memory(candidate) < own_memory(reference):
            return replace(limits, min_gain=-1.0)
        return limits

    def _exam(
        self,
        work: Workload,
        texts: tuple[tuple[int, ...], ...],
        size: Literal["brief", "quick"] = "quick",
        like: Exam | None = None,
    ) -> Exam:
        missing = max(0, PROMPTS_PER_SIDE - len(set(work.prompts)))
        prompts = (*work.prompts, *texts[:missing])
        # not timed, so requests may overlap, unless the model keeps state that would change another request's answer
        traffic = self.original.traffic if self.original.state.modules else None
        return Exam.prepare(
            self.original.original,
            prompts,
            size=size,
            pad_token_id=self.pad,
            traffic=traffic,
            like=like,
            kept=self.references if size == "quick" else None,  # a kept plan is verified against fresh answers
            progress=self._in_time("collecting the original's answers to judge against"),
            threads=self._reading_threads,
        )


def own_memory(variant: Variant) -> int:
    """Bytes of the serving weights, which remain when the original is released, and of a full KV cache."""
    held = cache_bytes(variant, max(variant.batch_sizes), variant.context_tokens)
    return stored_bytes(*variant.modules.values()) + held
