"""Gives the recorded exam to a model. Collects all answers, even bad ones, so that the fault can be located."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import BaselineError
from ...runtime.variant import Variant
from ...validate import Quality, Verdict
from ...validate.divergence import Divergence, find_defect
from ...validate.exam import Exam
from ...validate.quality import answers, decide, require_alike, write_free
from ...validate.score import CandidateError, OutputError, Served
from ...validate.tally import Tally, summarise
from ...validate.texts import Text
from ...validate.tiers import SIZES, TIERS
from .baseline import Baseline
from .compact import Compact

NARROW = ("bfloat16", "float16")  # dtypes of logits that are narrower than `validate.quality.FULL_BYTES`


@dataclass
class RecordedExam(Exam):
    """An exam whose original model is no longer available: its answers are read from a baseline.

    `original` is the model under check, which determines the device and the dtype.

    Attributes:
        compacts: group -> the recorded distributions of its scored tokens.
        stepped: the same from decoding step by step, if steps are to be compared with steps; else empty.
        vocabulary: width of the logits.
    """

    compacts: dict[tuple[Text, ...], Compact] = field(default_factory=dict)
    stepped: dict[tuple[Text, ...], Compact] = field(default_factory=dict)
    vocabulary: int = 0

    @classmethod
    def of(cls, baseline: Baseline, variant: Variant, tier: str) -> RecordedExam:
        """The exam of a tier. As in `validate.quality`, only "lossless" compares steps with steps, in 16-bit types.

        That the tier's steps were recorded is for `require_steps` to say, before anything is loaded.
        """
        is_stepped = tier == "lossless" and bool(baseline.stepped)
        asked = baseline.questions
        return cls(
            variant.original,
            SIZES[asked.size],
            asked.pad_token_id,
            asked.eos_token_ids,
            asked.texts,
            asked.batches,
            asked.long,
            asked.noise_kld,
            asked.tie_nats,
            compacts=dict(zip(asked.groups, baseline.answers, strict=True)),
            stepped=dict(zip(asked.groups, baseline.stepped, strict=True)) if is_stepped else {},
            vocabulary=baseline.subject.vocabulary,
        )

    def reference(
        self, group: tuple[Text, ...], ruled_out: torch.Tensor | None = None, *, stepped: bool = False
    ) -> torch.Tensor:
        """Log-probabilities [B, T, V] with tokens that were not kept equally likely: for guards, not for divergences.

        Args:
            group: a group of the exam's texts.
            ruled_out: [B, T, V] tokens that the candidate rules out, as models with padded vocabularies do.
            stepped: ignored, because the guards do not need it.
        """
        flat = None if ruled_out is None else ruled_out.flatten(0, 1).cpu()
        dense = self.compacts[group].dense(self.vocabulary, flat)
        return dense.reshape(len(group), -1, self.vocabulary).to(self.original.device)


def require_steps(baseline: Baseline, tier: str) -> None:
    """Raise BaselineError if a tier compares steps with steps, as "lossless" does in 16-bit types, and there are none.

    An FP32 baseline has none: a 16-bit model beside it is compared with its full forwards.
    """
    if tier == "lossless" and baseline.subject.dtype in NARROW and not baseline.stepped:
        raise BaselineError(
            "tier lossless compares decoding steps of a 16-bit model with recorded steps, which an earlier version did "
            "not record: record the baseline again, or choose tier strict"
        )


@dataclass(frozen=True)
class Scored:
    """One text's decoded answers: divergence and the candidate's top tokens [T]."""

    text: Text
    divergence: Divergence
    top: NDArray[np.int64]


@dataclass
class Examined:
    """Everything a model answered.

    Attributes:
        tally: divergences of all tokens.
        scored: single texts decoded step by step.
        defects: obvious defects, in words.
        wrote: free-running output for the first texts, without the prompts.
        dtype: dtype of the logits of a direct forward, such as "float32"; empty if none was read.
        error: why the rest of the exam could not be given, or None.
    """

    tally: Tally = field(default_factory=Tally)
    scored: list[Scored] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    wrote: list[tuple[int, ...]] = field(default_factory=list)
    dtype: str = ""
    error: str | None = None


def examine(exam: RecordedExam, variant: Variant, notify: Callable[[str], None] = lambda step: None) -> Examined:
    """Give the whole exam. It ends if the candidate raises, but goes on if the candidate gives nonsense."""
    found, served = Examined(), Served(variant, exam.pad_token_id, fall_back=False)
    found.tally.left, groups = served.left, exam.groups()
    try:
        for k, group in enumerate(groups):
            notify(f"comparing with the baseline, {k} of {len(groups)}")
            _ask(exam, served, group, found)
        found.wrote = write_free(exam, variant)
    except CandidateError as error:
        found.error = str(error)
    return found


def _ask(exam: RecordedExam, served: Served, group: tuple[Text, ...], found: Examined) -> None:
    try:
        for stratum, logits in answers(exam, served, group, reads=True):
            if stratum == "prefill":
                found.dtype = str(logits.dtype).removeprefix("torch.")
            where = f"{stratum}, prompt {group[0].prompt}" + (f" to {group[-1].prompt}" if len(group) > 1 else "")
            if defect := _defect(exam, group, logits):
                found.defects.append(f"{defect} ({where})")
                continue
            _add(exam, group, stratum, logits, found)
    except OutputError as failure:
        found.defects.append(str(failure))


def _defect(exam: RecordedExam, group: tuple[Text, ...], logits: torch.Tensor) -> str | None:
    """An obvious defect in logits [B, T, V], in words, or None."""
    if logits.shape[-1] != exam.vocabulary:
        return f"logits over {logits.shape[-1]} tokens, expected {exam.vocabulary}"
    return find_defect(exam.reference(group, logits == -torch.inf), logits)


def _add(exam: RecordedExam, group: tuple[Text, ...], stratum: str, logits: torch.Tensor, found: Examined) -> None:
    """Compare logits [B, T, V] of a group, sequence by sequence."""
    steps, recorded = logits.shape[1], exam.compacts[group]
    if stratum != "prefill":
        recorded = exam.stepped.get(group, recorded)
    for text, mine, row in zip(group, recorded.split([steps] * len(group)), logits, strict=True):
        divergence = mine.compare(row, torch.tensor(text.scored, dtype=torch.int64, device="cpu"))
        found.tally.add(divergence, text, stratum)
        if stratum.endswith("-prompt"):
            found.scored.append(Scored(text, divergence, row.argmax(-1).cpu().numpy()))


def judge(exam: RecordedExam, found: Examined, tier: str) -> Quality:
    """The verdict of `validate.quality` on the collected answers. A defect fails, regardless of the figures. Pure."""
    figures = summarise(found.tally, tier, exam.tie_nats)
    if found.error is not None:
        return replace(figures, verdict=Verdict.ERROR, reason=found.error)
    if found.defects:
        more = f", and {len(found.defects) - 1} more" if len(found.defects) > 1 else ""
        return replace(figures, verdict=Verdict.FAIL, reason=found.defects[0] + more)
    return decide(found.tally, TIERS[tier], exam)


def judge_free(exam: RecordedExam, found: Examined, tier: str) -> tuple[Verdict, str]:
    """Whether free-running output stops, repeats itself and (if lossless) reads like the recorded model's. Pure."""
    if not found.wrote:
        return Verdict.INCONCLUSIVE, "nothing was written freely"
    try:
        require_alike(exam, found.wrote, TIERS[tier])
    except OutputError as failure:
        return Verdict.FAIL, str(failure)
    return Verdict.PASS, "as long as the recorded output, without more repetition"
