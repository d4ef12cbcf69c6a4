"""Several tokens per step: they are guessed first, then checked together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..diagnose import ceilings
from ..errors import ChoiceError, TransformError
from ..machine import device as devices
from ..model.configured import text_config
from ..model.seam import Sampling
from ..runtime.speculation import speculate
from ..runtime.speculation.drafts import DraftModel, Proposer
from ..runtime.speculation.pace import evenly, pays
from ..runtime.variant import Stage, Transform, Variant
from . import require
from .static_cache import slotless, use_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.cache.pool import CachePool
    from ..runtime.speculation.strides import MultiTokenStep
    from ..runtime.steps.graphs import GraphSteps
    from ..workload import Phase

SHORTEST = 256  # slots that the shortest graph reads, unless the plain step's graphs define it
TIMED_RUNS = 3  # runs of each kind of step; the fastest counts, because the host disturbed it least
MOST = 32  # largest number of guesses per step; caches clear at most 64 slots that discarded steps wrote


@dataclass(frozen=True)
class Speculation(Transform):
    """Guess tokens and check them in one step of the decode module; see `autotune.runtime.speculation.speculate`.

    It serves one sequence at a time; larger batches are decoded token by token. Where nothing is guessed, the plain
    step runs, recorded or compiled if it was. The decode module itself checks the guesses. This check is captured as a
    graph if the plain step is, compiled if that is, and timed against the plain step when the transform is applied. The
    number of guesses follows from that time and from the share of right guesses, so text that cannot be guessed costs
    almost nothing.

    Args:
        draft: "prompt" guesses what followed the same tokens earlier in prompt and answer; "model" lets the model given
            as `autotune.wrap(..., draft=)` guess.
        tokens: largest number of guesses per step; seven and the token before them fill the rows of a matrix
            instruction.
    """

    draft: str = "prompt"
    tokens: int = 7

    name: ClassVar[str] = "speculation"
    stage: ClassVar[Stage] = Stage.SPECULATION
    summary: ClassVar[str] = "tokens guessed by prompt look-up or a draft model, checked several at a time"
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.draft, ("prompt", "model"), "speculation: draft")
        if not 1 <= self.tokens <= MOST:
            raise ChoiceError(f"speculation: tokens must be 1 to {MOST}, not {self.tokens}")
        if self.phase != "decode":
            raise ChoiceError("speculation: phase must be 'decode'; all tokens of a prompt are known")

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if variant.speculation is not None:
            return "decode guesses ahead already"
        if variant.kv is not None:
            return f"guesses are checked over slots, and the KV cache is {variant.kv}"
        if 1 not in variant.batch_sizes:
            return f"it serves single sequences; the workload has batches of {', '.join(map(str, variant.batch_sizes))}"
        if self.draft == "model" and variant.draft is None:
            return "no draft model was given; pass one with the same vocabulary: autotune.wrap(model, draft=...)"
        return variant.state.unseen("a guess that is wrong") or slotless(variant)

    def rehearsed(self) -> Transform:
        return self

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        """Best case: every guess is right, and a step with K guesses takes as long as one without.

        Both steps read the weights once, but the step with guesses computes K + 1 tokens. If computing takes longer,
        K + 1 tokens take the time of their FLOPs. Source: Leviathan et al. 2023, with an acceptance of 1 and free
        guesses.
        """
        phase, tokens = profile.phases["decode"], self.tokens + 1
        computing_s = tokens * phase.flops / profile.batch / ceilings.attainable_peak(phase, hardware)
        return {"decode": tokens * phase.seconds / max(phase.seconds, computing_s)}

    def apply(self, variant: Variant) -> None:
        from ..runtime.cache.pool import CachePool

        if self.draft == "model" and variant.draft is None:
            raise TransformError("no draft model was given; pass it to autotune.wrap(model, draft=...)")
        use_slots(variant)
        pool = variant.caches
        assert pool is not None  # noqa: S101 - use_slots made it; for the type checker
        draft = None
        if self.draft == "model" and variant.draft is not None:
            caches = CachePool(text_config(variant.draft), pool.slots, lasting=pool.lasting)
            draft = _guessing(variant, caches, self.tokens + 1), caches
        variant.speculation = speculate.SpeculationSetup(self.tokens, _checking(variant, self.tokens + 1), draft)
        variant.speculation.costs = measure_costs(variant)

    def took_effect(self, variant: Variant) -> str | None:
        speculation = variant.speculation
        if speculation is None:
            return "decode guesses nothing"
        if not pays(speculation.costs):
            return (
                f"even right guesses would not pay: a step that checks {speculation.tokens} of them takes "
                f"{speculation.costs[-1]:.1f}x as long as a plain one"
            )
        return None


def _checking(variant: Variant, tokens: int) -> MultiTokenStep:
    """The decode module's steps of up to `tokens` tokens, recorded or captured as the plain step is."""
    from ..runtime.batching.rows import sizes
    from ..runtime.cache.rows import RowCache
    from ..runtime.speculation.strides import MultiTokenStep
    from ..runtime.steps.program import StepPrograms

    step, pool, model, prompt = variant.step, variant.caches, variant.modules["decode"], variant.example(1)
    assert pool is not None  # noqa: S101 - the caller made it; for the type checker
    if isinstance(step, StepPrograms):
        for rows in sizes(tokens)[1:]:
            step.prepare_several(partial(RowCache, prompt, pool.slots, rows, pool.dtype))
        return MultiTokenStep(model, recorded=step)
    if (reads := _lengths(variant)) is None:
        return MultiTokenStep(model)
    return MultiTokenStep(model, several=_captured(variant, model, pool, prompt, reads, tokens))


def _guessing(variant: Variant, caches: CachePool, tokens: int) -> MultiTokenStep:
    """The draft model's steps of one and of up to `tokens` tokens, captured if the plain step of the model is."""
    from ..runtime.speculation.strides import MultiTokenStep

    model = variant.draft
    assert model is not None  # noqa: S101 - the caller checked; for the type checker
    if (reads := _lengths(variant)) is None:
        return MultiTokenStep(model)
    prompt = Variant(model, variant.traffic).example(1)
    one, several = (_captured(variant, model, caches, prompt, reads, count) for count in (1, tokens))
    return MultiTokenStep(model, one, several)


def _lengths(variant: Variant) -> tuple[int, ...] | None:
    """The numbers of slots that graphs read; None if the plain step is not captured."""
    from ..runtime.steps.captures import lengths
    from ..runtime.steps.graphs import GraphSteps
    from ..runtime.steps.inductor_graphs import InductorGraphStep

    if isinstance(variant.step, GraphSteps):
        return variant.step.lengths
    if variant.caches is None or not isinstance(variant.step, InductorGraphStep):
        return None
    return lengths(variant.caches.slots, SHORTEST)


def _captured(
    variant: Variant, model: PreTrainedModel, caches: CachePool, prompt: Any, reads: tuple[int, ...], tokens: int
) -> GraphSteps:
    """Graphs of `tokens` tokens of one sequence, over the module that the plain step's graphs were captured from.

    Args:
        prompt: keys and values of one token, as of `Variant.example`.
        reads: the numbers of slots that graphs read.
    """
    from ..runtime.cache.slots import SlotCache
    from ..runtime.steps.captures import capture_all
    from ..runtime.steps.graphs import GraphSteps

    plain = variant.step.inner if isinstance(variant.step, GraphSteps) else None
    inner = plain if plain is not None and plain.module is model else None
    steps = GraphSteps(model, devices.of(variant.original), (1,), reads, inner, tokens)
    with variant.running("decode"):
        if inner is not None:
            for read in steps.lengths:
                inner.prepare(SlotCache(prompt, caches.slots, 1, caches.dtype).first(read), tokens)
        capture_all(steps, caches, {1: prompt}, min(variant.context_tokens, caches.slots), variant.turn)
    return steps


def measure_costs(variant: Variant) -> tuple[float, ...]:
    """Measure the times of steps with 0, 1, 2, ... guesses, including the guessing, in units of a plain step.

    Steps run at the start of an empty sequence. They differ in weights and arithmetic, which do not depend on the
    sequence. Where a step takes a fixed number of tokens, fewer take as long. Otherwise only the step with the most
    guesses is measured, and each guess takes its share.

    Args:
        variant: with `caches` and `speculation`.
    """
    from ..runtime.cache import slot_forward

    speculation, pool = variant.speculation, variant.caches
    assert speculation is not None and pool is not None  # noqa: S101, PT018 - the caller made them; for the type checker
    original = variant.original
    device, most = devices.of(original), speculation.tokens
    tokens = torch.zeros(1, most + 1, dtype=torch.int64, device=original.device)
    positions = torch.arange(1, most + 2, dtype=torch.int64, device=original.device)[None]
    with torch.no_grad(), ExitStack() as lent, variant.running("decode") as module:
        held = lent.enter_context(pool.lend(variant.example(1), None))
        step = variant.step.fitting(held) if variant.step is not None else None
        guesser: Proposer | None = None
        if speculation.draft is not None:
            one = {"position_ids": positions[:, :1] * 0}
            guesser = DraftModel(*speculation.draft, Sampling(original, tokens[:, :1], {}, one), [0], lent)

        def plain() -> None:
            if step is None:
                slot_forward.step(module, tokens[:, :1], positions[:, :1], held)
            else:
                step(tokens[:, :1], positions[:, :1], held)

        def checking(guesses: int) -> None:
            if guesser is not None:
                guesser.append(0)
                guesser.guess(guesses)
            speculation.stride.steps(tokens[:, : guesses + 1], positions[:, : guesses + 1], held)

        def seconds(work: Callable[[], None]) -> float:
            return min(device.seconds(work) for _ in range(TIMED_RUNS + 1))  # the first run warms up

        plain_s = seconds(plain)
        widths = [speculation.stride.width(guesses + 1, held) for guesses in range(1, most + 1)]
        if guesser is not None or None in widths:
            return evenly(most, seconds(partial(checking, most)) / plain_s)
        took_s = {width: seconds(partial(checking, min(width - 1, most))) for width in filter(None, set(widths))}
    return (1.0, *(took_s[width] / plain_s for width in filter(None, widths)))
