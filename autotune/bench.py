"""The search's measuring side on a real model: one workload, split into prompts to tune on and prompts to confirm on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from . import profile as profiling
from .diagnose import Diagnosis, diagnose
from .hardware import Hardware
from .policy import Limits, Policy
from .profile import Profile
from .validate import Latency, Quality, latency, quality
from .variant import Variant
from .workload import PHASES, Bucket, Phase, Workload

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

PROMPTS_PER_SIDE = 16  # the least that a quick exam needs; see validate.quality
TEXT_TOKENS = 96  # of each text that stands in where the workload has too few prompts
METRICS = {"prefill": "ttft", "decode": "tpot"}


class LiveBench:
    """Measures variants of one model through the path that serves.

    Args:
        original: the variant without transforms.
        workload: what to measure with; half of its prompts are held out for `confirm`.
        texts: token ids of natural text that fill up too few prompts for the quality exam.
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
    ) -> None:
        self.original, self.policy, self.hardware, self.notify = original, policy, hardware, notify
        self.workload = workload
        self.tuning, self.held_out = workload.split(0.5)
        half = len(texts) // 2
        self._texts = (texts[:half], texts[half:])
        self._thorough = True

    def profile(self, variant: Variant) -> Profile:
        """The original with batch and context scaling; what was just accepted without, which takes seconds."""
        scaling = not variant.transforms
        return profiling.measure(
            variant, self.tuning, self.hardware, budget_s=20 if scaling else 6, scaling=scaling, progress=self.notify
        )

    def profile_final(self, variant: Variant) -> Profile:
        return profiling.measure(variant, self.tuning, self.hardware, budget_s=12, scaling=True, progress=self.notify)

    def diagnose(self, profile: Profile) -> Mapping[Phase, Diagnosis]:
        return {phase: diagnose(profile.phases[phase], self.hardware) for phase in PHASES}

    def memory_ratio(self, variant: Variant) -> float:
        own = _bytes(self.original.original)
        return _bytes(self.original.original, *variant.modules.values()) / own

    def glance(self, incumbent: Variant, candidate: Variant, phase: Phase) -> float:
        bucket = self.buckets[0]
        times = [
            latency.time_once(variant, bucket, self.tuning.prompts)[METRICS[phase]]
            for variant in (candidate, candidate, incumbent, incumbent)
        ]
        return min(times[2:]) / min(times[:2])

    def judge(self, variant: Variant, tier: str) -> Quality:
        return quality.judge(self.exam, variant, tier)

    def race(self, incumbent: Variant, candidate: Variant, phase: Phase) -> Latency:
        return self._compare(incumbent, candidate, METRICS[phase], self.policy.limits, self.tuning, pairs=25)

    def confirm(self, variant: Variant, tier: str) -> tuple[Quality, Latency | None]:
        """The winner once more, on prompts it was not chosen on and with fresh timing (against the winner's curse)."""
        exam = self._exam(self.held_out, self._texts[1])
        verdict = quality.judge(exam, variant, tier)
        if verdict.verdict != "pass":
            return verdict, None
        return verdict, self._compare(
            self.original, variant, "end_to_end", self.policy.limits, self.held_out, pairs=40, seed=1
        )

    def reverify(self, variant: Variant, tier: str) -> tuple[Quality, Latency | None]:
        """A plan from disk, re-verified in seconds: same gates, fewer pairs."""
        verdict = quality.judge(self.exam, variant, tier)
        if verdict.verdict != "pass":
            return verdict, None
        return verdict, self._compare(
            self.original, variant, "end_to_end", self.policy.limits, self.held_out, pairs=12, seed=2
        )

    @cached_property
    def exam(self) -> quality.Exam:
        return self._exam(self.tuning, self._texts[0])

    @cached_property
    def noise(self) -> float:
        """What this host shows when the original races itself."""
        self.notify("timing the original against itself")
        return latency.noise_floor(self.original, self.buckets[:1], self.tuning.prompts)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.workload.buckets()

    def _compare(
        self,
        reference: Variant,
        candidate: Variant,
        objective: str,
        limits: Limits,
        work: Workload,
        pairs: int,
        seed: int = 0,
    ) -> Latency:
        return latency.compare(
            reference,
            candidate,
            self.buckets,
            work.prompts,
            objective=objective,
            limits=limits,
            noise=self.noise,
            max_pairs=pairs,
            seed=seed,
        )

    def _exam(self, work: Workload, texts: tuple[tuple[int, ...], ...]) -> quality.Exam:
        self.notify("collecting the original's answers to judge against")
        missing = max(0, PROMPTS_PER_SIDE - len(set(work.prompts)))
        return quality.Exam.prepare(self.original.original, (*work.prompts, *texts[:missing]), size="quick")


def natural_texts(tokenizer: PreTrainedTokenizerBase | None) -> tuple[tuple[int, ...], ...]:
    """The built-in texts as token ids; none without a tokenizer."""
    if tokenizer is None:
        return ()
    from .texts import TEXTS

    return tuple(tuple(tokenizer(text)["input_ids"][:TEXT_TOKENS]) for text in TEXTS)


def _bytes(*modules: nn.Module) -> int:
    """Bytes of all distinct storages held by the modules."""
    tensors = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
