"""Finds where a model differs from its baseline: layers, prompts, tokens, and how sure the recorded model was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...runtime.variant import Variant
from ...validate import ConfidenceBin
from ...validate.exam import Exam
from .baseline import Baseline
from .examine import Examined, Scored
from .layers import PROMPTS, Shift, fingerprint, first_jump, shifts

log = logging.getLogger("autotune")

WORST = 5  # prompts and layers that are shown
SHOWN = 60  # last characters of a prompt that are shown
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class PromptShift:
    """A prompt's mean divergence, nats per token, and the end of its text if there is a tokenizer."""

    prompt: int
    mean_kld: float
    tokens: int
    text: str = ""


@dataclass(frozen=True)
class TokenShift:
    """The first token that greedy decoding chooses differently.

    Args:
        prompt: the prompt whose continuation it is in.
        position: position in the continuation, from 0.
        expected, found: token ids.
        gap_nats: the recorded model's log-probability of its top token minus that of `found`.
        expected_text, found_text: the tokens as text, if there is a tokenizer.
    """

    prompt: int
    position: int
    expected: int
    found: int
    gap_nats: float
    expected_text: str = ""
    found_text: str = ""


@dataclass(frozen=True)
class Localised:
    """Where the difference is.

    Args:
        summary: the findings in a sentence.
        first_layer: where the difference begins, or None if every layer agrees.
        layers: deviation of every stage, in the order of computing.
        prompts: the five prompts that differ most.
        token: the first token that greedy decoding chooses differently, or None.
        certainty: divergence by the recorded model's top probability: below 0.5, up to 0.9, above.
    """

    summary: str
    first_layer: str | None
    layers: tuple[Shift, ...]
    prompts: tuple[PromptShift, ...]
    token: TokenShift | None
    certainty: tuple[ConfidenceBin, ...]

    @property
    def worst_layers(self) -> tuple[Shift, ...]:
        """The layers that add most to the deviation of their input."""
        before = (0.0, *(shift.deviation for shift in self.layers[:-1]))
        pairs = sorted(zip(self.layers, before, strict=True), key=lambda pair: pair[1] - pair[0].deviation)
        return tuple(shift for shift, _ in pairs[:WORST] if shift.deviation > 0)


def layer_shifts(baseline: Baseline, variant: Variant) -> tuple[Shift, ...]:
    """Deviations of the phase whose layers deviate more. A phase that cannot be read directly is left out."""
    found: list[tuple[Shift, ...]] = [()]
    for module in {id(m): m for m in variant.modules.values()}.values():
        try:
            found.append(shifts(baseline.layers, fingerprint(module, baseline.questions.read[:PROMPTS])))
        except Exception as error:  # the model's defect may break this, too; it is not needed for the verdict
            log.debug("layers cannot be compared: %s: %s", type(error).__name__, error)
    return max(found, key=lambda each: max((shift.deviation for shift in each), default=-1.0))


def localise(
    exam: Exam,
    examined: Examined,
    layers: tuple[Shift, ...],
    certainty: tuple[ConfidenceBin, ...],
    decode: Decode | None,
) -> Localised:
    """Derive the findings from the collected answers. Pure."""
    prompts = worst_prompts(examined, exam, decode)
    token = first_token(examined.scored, exam.tie_nats, decode)
    first = first_jump(layers)
    return Localised(_summary(layers, first, prompts, token), first, layers, prompts, token, certainty)


def worst_prompts(examined: Examined, exam: Exam, decode: Decode | None) -> tuple[PromptShift, ...]:
    kld, prompts = examined.tally.column("kld"), examined.tally.prompts()
    texts = {text.prompt: text for text in (*exam.long, *exam.texts)}
    found = []
    for prompt in sorted(set(prompts.tolist())):
        mine = kld[prompts == prompt]
        ids = texts[prompt].context + texts[prompt].natural if prompt in texts else ()
        text = decode(ids)[-SHOWN:] if decode else ""
        found.append(PromptShift(prompt, float(mine.mean()), len(mine), text))
    return tuple(sorted(found, key=lambda shift: -shift.mean_kld)[:WORST])


def first_token(scored: Sequence[Scored], tie_nats: float, decode: Decode | None) -> TokenShift | None:
    """The earliest changed token in the recorded model's continuations; one at a near-tie only if there is no other."""
    found: list[tuple[bool, int, int, TokenShift]] = []
    for each in scored:
        start = len(each.text.natural)
        for k, expected in enumerate(each.text.own):
            mine, gap = int(each.top[start + k]), float(each.divergence.top_gap[start + k])
            if mine != expected:
                said = (decode([expected]), decode([mine])) if decode else ("", "")
                shift = TokenShift(each.text.prompt, k, expected, mine, gap, *said)
                found.append((gap <= tie_nats, k, each.text.prompt, shift))
                break  # later tokens follow another text
    return min(found, key=lambda item: item[:3])[3] if found else None


def _summary(
    layers: Sequence[Shift], first: str | None, prompts: Sequence[PromptShift], token: TokenShift | None
) -> str:
    parts = []
    if first is not None:
        deviation = next(shift.deviation for shift in layers if shift.name == first)
        parts.append(f"it begins at {first}, whose output deviates by {deviation:.2g} of its norm")
    elif layers:
        parts.append("every layer agrees in a direct forward: look at decoding (cache, loop, compiled step)")
    if prompts:
        worst = prompts[0]
        text = f" (... {worst.text!r})" if worst.text else ""
        parts.append(f"prompt {worst.prompt} differs most, {worst.mean_kld:.2g} nats a token{text}")
    if token is not None:
        named = (token.found_text or token.found, token.expected_text or token.expected)
        parts.append(
            f"greedy decoding first differs at token {token.position} of prompt {token.prompt}: {named[0]!r} instead of"
            f" {named[1]!r}, which was {token.gap_nats:.2g} nats likelier"
        )
    return "; ".join(parts)
