"""The quality gate on damaged and on whole models: how much it catches, and how often it is wrong about whole ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotune.runtime.variant import Variant
from autotune.validate import Verdict
from autotune.validate.divergence import compare_logits
from autotune.validate.exam import Exam
from autotune.validate.quality import judge
from autotune.validate.score import CandidateError, Served
from autotune.validate.texts import Text
from autotune.validate.tiers import SIZES, TIERS
from benchmarks.prove.corruptions import BY_NAME, Edit, InapplicableError, edited, linears

CAUGHT = 0.95  # at least, of the corruptions whose effect is over a tier's limit
FALSE_ALARMS = 0.01  # at most, of whole models judged
ARCHITECTURES = ("llama", "qwen3", "gpt2", "phi3", "gpt-neox")
BATCH = 8


@dataclass(frozen=True)
class Case:
    """One corruption of one model at one tier.

    Args:
        effect: mean KL divergence it really causes, nats, where it shows most; infinite where it is blatant.
        limit: of the tier.
        verdict, reason: of the gate.
    """

    model: str
    corruption: str
    fault: str
    tier: str
    effect: float
    limit: float
    verdict: str
    reason: str

    @property
    def counts(self) -> bool:
        return self.effect > self.limit

    @property
    def caught(self) -> bool:
        return self.verdict in (Verdict.FAIL, Verdict.ERROR)


def tiny(name: str, seed: int = 0) -> Any:
    """A tiny random model with room for long contexts."""
    from tests.models import ARCHITECTURES as KNOWN
    from tests.models import tiny as build

    room = "n_positions" if "n_positions" in KNOWN[name][1] else "max_position_embeddings"
    return build(name, seed=seed, **{room: 1024})


def random_prompts(count: int, low: int, high: int, vocabulary: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@cache
def real(folder: Path) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """A model from disk and natural text for it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from autotune.workload import built_in

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return model, built_in.natural(AutoTokenizer.from_pretrained(folder))


@dataclass(frozen=True)
class Reference:
    """Much more text than an exam reads, to know what a corruption really does.

    Every part is decoded in batches of equal or of ragged lengths, or after a long context. The first batch of a part
    is read first, so that what shows from the second on counts with its weight in the others.
    """

    exam: Exam
    parts: dict[str, tuple[tuple[Text, ...], ...]]

    @classmethod
    def make(cls, model: Any, prompts: Sequence[Sequence[int]], steps: int, batches: int) -> Reference:
        joined = [token for prompt in prompts for token in prompt]
        starts = count(step=61)

        def take(lengths: Sequence[int]) -> tuple[Text, ...]:
            found = []
            for length in lengths:
                at = (start := next(starts)) % max(1, len(joined) - length - steps)
                end = at + length
                found.append(Text(start, tuple(joined[at:end]), tuple(joined[end : end + steps]), ()))
            return tuple(found)

        even = tuple(take([40 + 6 * k] * BATCH) for k in range(batches))
        ragged = tuple(take([12 + (7 * j + 5 * k) % 60 for j in range(BATCH)]) for k in range(max(1, batches // 2)))
        long = tuple(take([length] * 2) for length in (240, 470))
        exam = Exam(model, SIZES["quick"], pad_token_id=0, eos_token_ids=())
        return cls(exam, {"even": even, "padded": ragged, "long": long})

    def effect(self, variant: Variant) -> float:
        """Mean KL divergence in the part where it is greatest, nats; infinite where it raises or is not a number."""
        means = []
        served = Served(variant, 0, fall_back=False)
        for groups in self.parts.values():
            try:
                found = [kld for group in groups for kld in self._klds(served, group)]
            except CandidateError as error:
                if "InapplicableError" in str(error):  # found out only when it ran
                    raise InapplicableError(str(error)) from error
                return math.inf
            means.append(float(np.mean(found)))
        return max(means)

    def _klds(self, served: Served, group: tuple[Text, ...]) -> Iterator[float]:
        reference, logits = self.exam.reference(group), self.exam.step(served, group)
        for row, text in enumerate(group):
            targets = torch.tensor(text.scored)
            yield from compare_logits(reference[row], logits[row], targets).kld.tolist()


def examine(label: str, exam: Exam, reference: Reference, names: Sequence[str]) -> list[Case]:
    """The corruptions of these names at every tier that their effect comes near."""
    cases = []
    for corruption in map(BY_NAME.__getitem__, names):
        try:
            variant = edited(exam.original, corruption.how)
            effect = math.inf if corruption.blatant else reference.effect(variant)
        except InapplicableError:
            continue
        for tier in TIERS.values():
            limit = tier.kld_limit(exam.noise_kld)
            if effect <= limit / 2:  # far below: nothing to catch
                continue
            found = judge(exam, edited(exam.original, corruption.how), tier.name)  # damage may count its calls
            given = (label, corruption.name, corruption.fault, tier.name, effect, limit)
            cases.append(Case(*given, str(found.verdict), found.reason))
    return cases


def examine_tiny(name: str, names: Sequence[str], batches: int = 8) -> list[Case]:
    """`examine` on a tiny random model of an architecture."""
    return examine(name, *_tiny_exam(name, batches), names)


def examine_real(folder: Path, names: Sequence[str]) -> list[Case]:
    """`examine` on a model from disk, with natural text."""
    return examine(folder.name, *_real_exam(folder), names)


@cache
def _tiny_exam(name: str, batches: int) -> tuple[Exam, Reference]:
    model = tiny(name)
    vocabulary = model.config.vocab_size
    reference = Reference.make(model, random_prompts(80, 40, 90, vocabulary, seed=11), steps=32, batches=batches)
    return _sound(Exam.prepare(model, random_prompts(24, 40, 90, vocabulary, seed=1), pad_token_id=0)), reference


@cache
def _real_exam(folder: Path) -> tuple[Exam, Reference]:
    model, texts = real(folder)
    half = len(texts) // 2
    reference = Reference.make(model, texts[half:], steps=24, batches=4)
    return _sound(Exam.prepare(model, [text[:96] for text in texts[:half]], pad_token_id=0)), reference


def _sound(exam: Exam) -> Exam:
    if exam.problem:
        raise RuntimeError(exam.problem)
    return exam


# Nothing is wrong with these


def resummed(module: Any) -> None:
    """Every product of a linear layer summed in two halves: the same numbers added in another order."""
    for _, linear in linears(module):
        if isinstance(linear, torch.nn.Linear):
            linear.forward = _in_halves(linear)  # type: ignore[method-assign]


def _in_halves(linear: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        half = linear.in_features // 2
        out = x[..., :half] @ linear.weight[:, :half].T + x[..., half:] @ linear.weight[:, half:].T
        return out if linear.bias is None else out + linear.bias

    return forward


def whole(model: Any) -> dict[str, Variant]:
    """Variants that change nothing but the order of summation."""
    from autotune.transforms.static_cache import StaticCache
    from autotune.transforms.threads import Threads

    twin, threads = Edit("both"), Threads("decode", count=2)
    return {
        "a twin": Variant(model).with_transform(twin),
        "sums in another order": edited(model, resummed, "both"),
        "another number of threads": Variant(model).with_transforms([twin, threads]),
        "slots and a lean loop": Variant(model).with_transform(StaticCache(slots=1024)),
    }


def false_alarms(name: str, seeds: Sequence[int]) -> list[tuple[str, str, str]]:
    """(what, verdict, reason) of whole models, each seed another model and other prompts, at the lossless tier.

    That is the strictest: what passes it is within every other.
    """
    found = []
    for seed in seeds:
        model = tiny(name, seed=100 + seed)
        prompts = random_prompts(24, 40, 90, model.config.vocab_size, seed=1000 + seed)
        exam = Exam.prepare(model, prompts, pad_token_id=0, seed=seed)
        for what, variant in whole(model).items():
            verdict = judge(exam, variant, "lossless")
            found.append((f"{name}, {what}", str(verdict.verdict), verdict.reason))
    return found


def false_alarms_real(folder: Path, seeds: Sequence[int]) -> list[tuple[str, str, str]]:
    model, texts = real(folder)
    found = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(texts))
        exam = Exam.prepare(model, [texts[k][:64] for k in order[:20]], pad_token_id=0, seed=seed)
        for what, variant in whole(model).items():
            if what != "a twin":
                verdict = judge(exam, variant, "lossless")
                found.append((f"{folder.name}, {what}", str(verdict.verdict), verdict.reason))
    return found
