"""Judge whether a candidate is as good as the original, by its logits, through the path that will serve."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..model.configured import until_end
from . import Quality, Verdict
from .divergence import compare_logits, find_defect
from .exam import Exam, Progress
from .score import BypassedError, CandidateError, OutputError, Served
from .statistics import cluster_means
from .tally import CONFIDENCE, Tally, summarise
from .texts import Text
from .tiers import TIERS, Tier

if TYPE_CHECKING:
    from ..runtime.variant import Variant

__all__ = ["Exam", "compare_logits", "decide", "judge"]

log = logging.getLogger("autotune")

# Bytes of an FP32 number. In narrower types, rounding makes a decoding step differ from a full forward by more than the
# lossless tier allows, so that tier compares step with step.
FULL_BYTES = 4
EARLY_PROMPTS = 4  # prompts scored before a candidate may fail early
# Factor on the limit of the mean KLD. A stratum above the product fails the candidate early. At the end, a stratum with
# few prompts fails only above it.
EARLY_FACTOR = 3.0
LENGTH_RATIO = (0.9, 1.1)  # allowed length of free-running output / length of the original's
REPETITION = 0.25  # allowed share of repeated 4-grams, above the original's share
FREE_TEXTS = 4  # texts after which the variant generates freely


def judge(exam: Exam, variant: Variant, tier: str, progress: Progress | None = None) -> Quality:
    """Judge a variant against the original, cheap checks first. A failure may end the exam early; a pass never does.

    Args:
        exam: texts and reference, from `Exam.prepare`.
        variant: the candidate; it is run, never edited.
        tier: name of a quality tier.
        progress: called with a step's name and the share done.

    Returns:
        The verdict. A candidate that raises gets ERROR with its message; only KeyboardInterrupt and the like propagate.

    Raises:
        ValueError: no such tier.
    """
    if tier not in TIERS:
        raise ValueError(f"no quality tier {tier!r}: choose one of {', '.join(TIERS)}")
    limits, tally, report = TIERS[tier].for_size(exam.size), Tally(), progress or (lambda step, share: None)
    if exam.problem:
        return Quality(tier, Verdict.INCONCLUSIVE, exam.problem, examined=False)
    try:
        _score(exam, variant, limits, tally, report)
        require_alike(exam, write_free(exam, variant, report), limits)
    except OutputError as failure:
        return _explained(summarise(tally, limits.name, exam.tie_nats), Verdict.FAIL, str(failure))
    except CandidateError as error:
        return _explained(summarise(tally, limits.name, exam.tie_nats), Verdict.ERROR, str(error))
    return decide(tally, limits, exam)


def _score(exam: Exam, variant: Variant, limits: Tier, tally: Tally, progress: Progress) -> None:
    """Collect every token's metrics, in an order that exposes a broken candidate early."""
    served = Served(variant, exam.pad_token_id, fall_back=False)
    tally.left = served.left
    reads = variant.modules["prefill"] is not variant.original
    stepped = limits.name == "lossless" and exam.original.dtype.itemsize < FULL_BYTES
    singles = [(t,) for t in exam.texts]
    order = [
        *singles[:EARLY_PROMPTS],
        *exam.batches[:1],
        *((t,) for t in exam.long),
        *singles[EARLY_PROMPTS:],
        *exam.batches[1:],
    ]
    for k, group in enumerate(order):
        progress("comparing with the original", k / (len(order) + FREE_TEXTS))
        for stratum, logits in answers(exam, served, group, reads):
            alike = stepped and stratum != "prefill"
            dtype = exam.original.dtype if stratum == "prefill" else None
            _add(tally, exam.reference(group, stepped=alike), logits, group, stratum, dtype)
        if k >= EARLY_PROMPTS - 1:
            _fail_early(tally, limits, exam)


def answers(exam: Exam, served: Served, group: tuple[Text, ...], reads: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a variant's logits [B, T, V] for a group of texts, each with the name of its stratum.

    Args:
        exam: the exam that the texts belong to.
        served: the variant.
        group: some of the exam's texts.
        reads: whether single texts are read in one direct forward ("prefill") before they are stepped.

    Raises:
        CandidateError: the variant raised; OutputError if its output is broken.
    """
    if reads and len(group) == 1:
        yield "prefill", exam.read(served, group[0])[None]
    stratum = _stratum(exam, group)
    try:
        logits = exam.step(served, group)
    except BypassedError as why:  # the original serves this group, so nothing is learned about the variant
        log.debug("%s of the exam is left to the original: %s", stratum, why)
        served.left[str(why)] += 1
    else:
        yield stratum, logits


def _stratum(exam: Exam, group: Sequence[Text]) -> str:
    """Name the stratum of a group. The first prompt is separate: a stale cache shows only from the second one on."""
    if len(group) > 1:
        return "padded-batch"
    if group[0] in exam.long:
        return "long"
    return "first-prompt" if group[0] is exam.texts[0] else "second-prompt"


def _add(
    tally: Tally,
    reference: torch.Tensor,
    candidate: torch.Tensor,
    group: Sequence[Text],
    stratum: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Compare logits [B, T, V] of a group and keep the metrics."""
    where = f"{stratum}, prompt {group[0].prompt}" + (f" to {group[-1].prompt}" if len(group) > 1 else "")
    if dtype is not None and candidate.dtype != dtype:
        raise OutputError(f"logits of type {candidate.dtype}, expected {dtype} ({where})")
    if defect := find_defect(reference, candidate):
        raise OutputError(f"{defect} ({where})")
    for row, text in enumerate(group):
        targets = torch.tensor(text.scored, dtype=torch.int64, device=candidate.device)
        tally.add(compare_logits(reference[row], candidate[row], targets), text, stratum)


def _fail_early(tally: Tally, limits: Tier, exam: Exam) -> None:
    """Raise OutputError if more text could hardly change the answer. Name the stratum unless all are over the limit."""
    strata, limit = tally.strata(), limits.kld_limit(exam.noise_kld)
    if not strata or max(strata.values()) <= EARLY_FACTOR * limit:
        return
    worst = max(strata, key=lambda name: strata[name])
    mean, where = strata[worst], f" of stratum {worst}"
    if min(strata.values()) > limit:
        mean, where = float(tally.column("kld").mean()), ""
    raise OutputError(f"mean KLD {mean:.3g}{where} is over the limit {limit:g} of tier {limits.name}, by far")


def write_free(exam: Exam, variant: Variant, progress: Progress | None = None) -> list[tuple[int, ...]]:
    """Let a variant generate freely after the first texts, up to and including the end-of-sequence token.

    Args:
        progress: called with a step's name and the share of the whole exam that is done.

    Raises:
        CandidateError: the variant raised.
    """
    served = Served(variant, exam.pad_token_id, exam.eos_token_ids)
    wrote, scored = [], len(exam.groups())
    for k, text in enumerate(exam.texts[:FREE_TEXTS]):
        if progress:
            progress("generating freely", (scored + k) / (scored + FREE_TEXTS))
        prompt = text.context + text.natural
        out = served.generate([prompt], exam.size.own)[0, len(prompt) :].tolist()
        wrote.append(until_end(out, exam.eos_token_ids))
    return wrote


def require_alike(exam: Exam, wrote: Sequence[Sequence[int]], limits: Tier) -> None:
    """Require that free-running output stops, repeats and (lossless) reads as the original's does.

    Raises:
        OutputError: the output has another length, repeats itself, or (lossless) differs where the original was sure.
    """
    texts = exam.texts[:FREE_TEXTS]
    if limits.name == "lossless":
        for text, mine in zip(texts, wrote, strict=True):
            _require_greedy(exam, text, mine)
    expected = [text.own for text in texts]
    differing = sum(len(mine) != len(own) for mine, own in zip(wrote, expected, strict=True))
    ratio = sum(map(len, wrote)) / sum(map(len, expected))
    if differing > 1 and not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:  # one flip at a near-tie is no evidence
        raise OutputError(f"free-running output is {ratio:.2f} times as long as the original's, expected 0.9 to 1.1")
    loops = repetition(wrote) - repetition(expected)
    if loops > REPETITION:
        raise OutputError(f"free-running output repeats itself: {loops:.0%} more repeated 4-grams than the original")


def _require_greedy(exam: Exam, text: Text, mine: Sequence[int]) -> None:
    """Require the same text up to the first near-tie, which is what lossless means (vLLM's check_logprobs_close)."""
    if (first := parted(mine, text.own)) is None:
        return
    row = exam.reference((text,))[0, len(text.natural) + first].float().log_softmax(-1)
    gap = float(row.max() - row[mine[first]])
    if gap > exam.tie_nats:
        raise OutputError(
            f"greedy output differs at token {first} of prompt {text.prompt}, where the original is {gap:.2g} nats sure"
        )


def parted(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The number of tokens after which two texts have different ones; None if they have none."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def repetition(texts: Sequence[Sequence[int]]) -> float:
    """Share of 4-grams that occurred before in the same text."""
    total = repeated = 0
    for text in texts:
        grams = [tuple(text[k : k + 4]) for k in range(len(text) - 3)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def decide(tally: Tally, limits: Tier, exam: Exam) -> Quality:
    """Give the verdict on a whole exam. Pure."""
    found = summarise(tally, limits.name, exam.tie_nats)
    answered = len(set(tally.prompts("first-prompt")) | set(tally.prompts("second-prompt")))
    if answered < exam.size.prompts:
        why = ", ".join(reason for reason, _ in tally.left.most_common())
        reason = f"it leaves {exam.size.prompts - answered} of {exam.size.prompts} prompts to the original: {why}"
        return replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason, examined=False)
    if over := exceeds(found, limits, exam):
        return _explained(found, Verdict.FAIL, over)
    if weak := _weak_stratum(tally, limits.kld_limit(exam.noise_kld)):
        return _explained(found, Verdict.FAIL, f"{weak} of tier {limits.name}")
    for what, point, bound, limit in gates(found, limits, exam):
        if not bound <= limit:
            more = _more_prompts(found.prompts, point, bound, limit)
            reason = f"{what} may be as high as {bound:.4g}, over {limit:.4g}: need {more} more prompts"
            return _explained(found, Verdict.INCONCLUSIVE, reason)
    return _explained(found, Verdict.PASS, f"within tier {limits.name}")


def exceeds(found: Quality, limits: Tier, exam: Exam) -> str | None:
    """Say which point estimate is over its limit, without regard to how much was scored; None if none is."""
    for what, point, _, limit in gates(found, limits, exam):
        if not point <= limit:
            return f"{what} {point:.4g} is over {limit:.4g} of tier {limits.name}"
    return None


def beyond(found: Quality, limits: Tier, exam: Exam) -> str | None:
    """Say which bound is over its limit, without regard to how much was scored; None if none is."""
    for what, _, bound, limit in gates(found, limits, exam):
        if not bound <= limit:
            return f"{what} may be as high as {bound:.4g}, over {limit:.4g} of tier {limits.name}"
    return None


def gates(found: Quality, limits: Tier, exam: Exam) -> list[tuple[str, float, float, float]]:
    """Return (name, point estimate, bound, limit) of each gate.

    Each limit is a maximum, so the share of same top tokens enters as its complement.
    """
    return [
        ("mean KLD", found.mean_kld, found.mean_kld_high, limits.kld_limit(exam.noise_kld)),
        ("p99 KLD", found.p99_kld, found.p99_kld, limits.p99_kld),
        ("share of changed top tokens", 1 - found.same_top, 1 - found.same_top_low, 1 - limits.same_top),
        ("perplexity ratio", found.ppl_ratio, found.ppl_ratio_high, limits.ppl_limit(exam.noise_kld, found.tokens)),
    ]


def _explained(found: Quality, verdict: Verdict, reason: str) -> Quality:
    """Return `found` with its verdict, and with the figures added to the reason."""
    if found.tokens:
        reason += (
            f" (mean KLD {found.mean_kld:.2g}, same top token {found.same_top:.1%}, perplexity x{found.ppl_ratio:.4f},"
            f" on {found.tokens} tokens of {found.prompts} prompts)"
        )
    return replace(found, verdict=verdict, reason=reason)


def _weak_stratum(tally: Tally, limit: float) -> str | None:
    """Describe the first stratum that is clearly over the limit; None if none is."""
    for name in dict.fromkeys(s for _, _, s in tally.parts):
        kld, prompts = tally.column("kld", name), tally.prompts(name)
        clear = len(set(prompts)) >= EARLY_PROMPTS
        low = float(np.quantile(cluster_means(kld, prompts), 1 - CONFIDENCE)) if clear else kld.mean() / EARLY_FACTOR
        if low > limit:
            return f"mean KLD {kld.mean():.3g} of stratum {name} is over {limit:g}"
    return None


def _more_prompts(prompts: int, point: float, bound: float, limit: float) -> int:
    """Prompts to add until the bound meets the limit, if its distance shrinks with the root of the prompts' number."""
    if limit <= point:
        return prompts
    return max(1, int(np.ceil(prompts * ((bound - point) / (limit - point)) ** 2)) - prompts)
