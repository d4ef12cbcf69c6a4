"""The exams of a tune: on prompts to choose by, and on those held out to confirm. And how the original reads them."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from ..diagnose.costs import Profile
from ..machine import intraop
from ..machine.hardware import Hardware
from ..runtime.variant import Variant
from ..validate.exam import Exam, reads_with
from ..validate.score import Served
from ..validate.texts import LONGEST_CONTEXT, effort
from ..validate.tiers import SIZES
from ..workload import Workload
from .allowance import Allowance

if TYPE_CHECKING:
    from .references import References

Texts = tuple[tuple[int, ...], ...]

PROMPTS_PER_SIDE = 16  # least prompts that a quick exam needs; see validate.quality
MUCH_ELSEWHERE = 0.25  # share of the CPU time from which on it is worth timing whether fewer threads read faster


class Exams:
    """Exams of one model.

    Args:
        original: the variant without transforms.
        workload: its prompts are read; half of them are held out.
        texts: token ids of natural texts, added if there are too few prompts.
        allowance: they end with the budget.
        references: the original's answers from earlier runs, or None to compute them.

    Attributes:
        tuning, held_out: the two halves of the workload.
        read_s: seconds in which the original reads a token; 0 until it is known.
        threads: with which it reads; None: as many as the calling thread has.
    """

    def __init__(
        self, original: Variant, workload: Workload, texts: Texts, allowance: Allowance, references: References | None
    ) -> None:
        self.original = original
        self.allowance = allowance
        self.references = references
        self.tuning, self.held_out = workload.split(0.5)
        half = len(texts) // 2
        self._texts = (texts[:half], texts[half:])
        self.pad = original.original.generation_config.pad_token_id or 0
        self.read_s = 0.0
        self.threads: int | None = None

    @cached_property
    def to_choose(self) -> Exam:
        with self.allowance.timed("exam"):
            return self.prepare(self.tuning, self._texts[0])

    @cached_property
    def to_confirm(self) -> Exam:
        return self.prepare(self.held_out, self._texts[1], like=self.to_choose)

    def brief(self) -> Exam:
        """A new exam of a few held-out prompts, enough to detect what is broken."""
        return self.prepare(self.held_out, self._texts[1], "brief")

    def held(self) -> Exam:
        """A new exam of the held-out prompts, large enough to decide."""
        return self.prepare(self.held_out, self._texts[1])

    def keep_references(self) -> None:
        """Save the original's answers to the exams that were used, for the next run."""
        for name in ("to_choose", "to_confirm"):
            if self.references is not None and name in self.__dict__:
                self.references.save(self.__dict__[name])

    def least_s(self, profile: Profile, hardware: Hardware) -> float:
        """Least seconds of a quick exam: the original's part."""
        read_s = self.read_s
        if (reading := reads_with(self.original.original)) is not None:
            read_s /= max(1.0, reading.speedup(profile.phases["prefill"], hardware))
        return effort(SIZES["quick"], profile.prompt_tokens).seconds(read_s, profile.phases["decode"].seconds)

    def read_beside_others(self, elsewhere: float) -> None:
        """If others took much of the CPU time, find out whether the original reads faster without the cores they take.

        A team of threads waits for the one whose core was taken, in every layer: beside a process that took one of two
        cores, 64 tokens of a model of 0.5B in FP32 took 1.4 s with two threads and 0.7 s with one.

        Args:
            elsewhere: the share of the CPU time that others took.
        """
        threads = torch.get_num_threads()
        fewer = max(1, round(threads * (1 - elsewhere)))
        if elsewhere < MUCH_ELSEWHERE or fewer == threads:
            return
        self.allowance.notify("timing reading with fewer threads, as others take much of the CPU time")
        prompt, served = self.tuning.prompts[0], Served(self.original, self.pad)
        clock, took_s = self.original.clock, dict[int, float]()
        for count in (fewer, threads, fewer, threads):
            start = clock()
            with intraop.computing_with(count):
                served.read(prompt, last=1)
            took_s[count] = min(took_s.get(count, math.inf), clock() - start)
        if took_s[fewer] < took_s[threads]:
            self.threads, self.read_s = fewer, took_s[fewer] / len(prompt)

    def prepare(
        self, work: Workload, texts: Texts, size: Literal["brief", "quick"] = "quick", like: Exam | None = None
    ) -> Exam:
        """Prepare an exam on a workload's prompts, with texts if they are too few."""
        prompts = filled_up(work.prompts, texts)
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
            progress=self.allowance.in_time("collecting the original's answers to judge against"),
            threads=self.threads,
        )


def filled_up(prompts: Texts, texts: Texts) -> Texts:
    """The prompts, and texts if they are too few for a quick exam, which reads their beginnings."""
    read = {prompt[:LONGEST_CONTEXT] for prompt in prompts if len(prompt) >= 2}
    missing = max(0, PROMPTS_PER_SIDE - len(read))
    return (*prompts, *texts[:missing])
