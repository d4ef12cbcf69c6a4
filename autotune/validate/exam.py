"""The exam of a candidate: texts, and the original's logits for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from ..errors import MeasurementError, TransformError
from ..machine import intraop
from ..model import configured, sharding
from ..model.linear_layers import obstacle
from ..runtime.variant import Variant
from ..transforms.flat_linears import FlatLinears
from ..transforms.linears import LinearTransform
from ..transforms.wide_arithmetic import WideArithmetic, emulated
from . import texts
from .answers import MOST_NOISE, Answers, Shape, odd_logits, odd_noise, odd_texts
from .divergence import compare_logits
from .score import CandidateError, Served, Tokens
from .shelf import Shelf
from .texts import Text
from .tiers import NEAR_TIE_NATS, SIZES, Size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.traffic import Traffic

UNBOUNDED = 1 << 20  # tokens of a context where the configuration names none
AT_ONCE = "at-once."  # prefix of the names under which `sensitivity` keeps the original's logits

Progress = Callable[[str, float], None]  # called with the step's name and the share done (0 to 1)


@dataclass
class Exam:
    """Texts, and the original's logits for them, which are computed once and used for every candidate.

    Attributes:
        size: how much is read.
        texts: scored one by one at batch 1.
        batches: scored together, left-padded.
        long: scored after a long context.
        noise_kld: mean KL of the original's stepped decoding from its own full forward, nats.
        tie_nats: a flip of the top token within this margin counts as a tie.
        traffic: the queue in which the original's answers wait behind live requests, or None.
        problem: why nothing can be judged with this exam, or None.
        prompts: the chosen prompts, cut to the length that is read.
        seed: of the choice of prompts.
        threads: with which the original reads; None: the calling thread's number.
    """

    original: PreTrainedModel
    size: Size
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    texts: tuple[Text, ...] = ()
    batches: tuple[tuple[Text, ...], ...] = ()
    long: tuple[Text, ...] = ()
    noise_kld: float = 0.0
    tie_nats: float = NEAR_TIE_NATS
    problem: str | None = None
    traffic: Traffic | None = None
    prompts: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    threads: int | None = None
    _kept: Shelf = field(default_factory=Shelf)  # logits; those without room here are computed for each candidate
    _noise: tuple[float, ...] | None = None  # (noise_kld, tie_nats) as measured on this exam, not on another
    _taken: int = 0  # number of answers that came from an earlier run

    @classmethod
    def prepare(
        cls,
        original: PreTrainedModel,
        prompts: Sequence[Tokens],
        *,
        size: Literal["brief", "quick", "standard", "thorough"] = "quick",
        pad_token_id: int,
        seed: int = 0,
        progress: Progress | None = None,
        traffic: Traffic | None = None,
        like: Exam | None = None,
        kept: Keeper | None = None,
        threads: int | None = None,
    ) -> Exam:
        """Choose texts and let the original continue them. Its logits are computed when they are first needed.

        Args:
            original: the model as it is, in eval mode.
            prompts: token ids; duplicates count once.
            size: "brief" (4 prompts, to re-verify), "quick" (16), "standard" (64) or "thorough" (128).
            pad_token_id: for left padding.
            seed: chooses the prompts when there are more than needed.
            progress: called with a step's name and the share done.
            traffic: the queue in which the original's answers wait behind live requests; None: they may overlap.
            like: another exam of the same original; its noise is used instead of a new measurement.
            kept: may restore the original's answers from an earlier run; missing answers are computed as usual.
            threads: with which the original reads texts; None: as many as the calling thread has.

        Raises:
            MeasurementError: the original raised.
        """
        report = progress or (lambda step, share: None)
        ends = configured.end_ids(original.generation_config)
        exam = cls(original, SIZES[size], pad_token_id, ends, traffic=traffic, seed=seed, threads=threads)
        exam.prompts = exam._choose(prompts)
        if exam.problem:
            return exam
        report("continuing the prompts", 0.0)
        if kept is None or not kept.restore(exam):
            exam._write(exam._continue(texts.heads(exam.prompts, exam.size)))
        if like is not None:
            exam.noise_kld = like.noise_kld
            exam.tie_nats = like.tie_nats
            exam.problem = exam.problem or like.problem
        elif exam._noise is not None:
            exam.noise_kld, exam.tie_nats = exam._noise
        else:
            report("measuring the original's own noise", 0.5)
            exam._measure_noise()
        report("exam ready", 1.0)
        return exam

    def plain(self) -> Variant:
        """The original as a variant."""
        return Variant(self.original, self.traffic)

    @cached_property
    def reader(self) -> Variant:
        """The original for long inputs: equal except for rounding, with faster arithmetic if it is available."""
        if (reading := reads_with(self.original)) is None:
            return self.plain()
        try:
            return self.plain().with_transform(reading)
        except TransformError:
            return self.plain()

    @property
    def reading(self) -> LinearTransform | None:
        """The transform that exchanges the reader's layers; None if they are the original's."""
        return next((each for each in self.reader.transforms if isinstance(each, LinearTransform)), None)

    def groups(self) -> tuple[tuple[Text, ...], ...]:
        """Return all groups of texts that are scored together: single texts, padded batches, long texts."""
        return (*((t,) for t in self.texts), *self.batches, *((t,) for t in self.long))

    def reference(self, group: tuple[Text, ...], *, stepped: bool = False) -> torch.Tensor:
        """Return the original's logits [B, T, V] for the scored tokens of a group, in half precision.

        They are rounded even if there is no room to keep them, so that a candidate's figures do not depend on which
        candidates were judged before.

        Args:
            stepped: compute them in one decoding step per token, as candidates are judged. Otherwise one full forward
                computes them, which is equal except for rounding and takes a fraction of the time.

        Raises:
            MeasurementError: the original raised.
        """
        name = _name(group, stepped)
        if (found := self._kept.get(name)) is not None:
            return found.to(self.original.device)
        try:
            logits = self._ask(group, stepped)
        except CandidateError as error:  # the original is not a candidate, so the error's type must change
            raise MeasurementError(f"the original cannot be judged against: {error}") from None
        logits = logits.float()
        logits -= logits.amax(-1, keepdim=True)  # puts likely tokens near zero, where half precision is finest
        rounded = logits.half()
        self._kept.put(name, rounded)
        return rounded

    def read_at_once(self, number: int, shape: tuple[int, int], ask: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the original's logits [B, T, V] for a batch of `sensitivity`, rounded as in `reference`.

        Args:
            number: of the batch.
            shape: the expected [B, T].
            ask: computes the original's logits if they are not kept; the result may be written to.
        """
        name = f"{AT_ONCE}{number}"
        found = self._kept.get(name)
        if found is None or found.shape[:2] != shape:
            self._kept.drop(name)
            self._kept.put(name, found := ask())
        return found.to(self.original.device)

    def answers(self) -> Answers | None:
        """Return the original's answers so far; None if there are none since `take`, or if the exam has a problem."""
        if self.problem or not self.texts or len(self._kept) + bool(self._noise) == self._taken:
            return None
        shapes = self._shapes()
        for name in list(self._kept):
            if odd_logits(name, self._kept[name], shapes):
                self._kept.drop(name)
        return Answers(tuple(t.own for t in self.texts), self._noise, self._kept)

    def take(self, known: Answers) -> None:
        """Prepare the exam from the original's answers in an earlier run.

        Raises:
            ValueError: the answers do not fit this exam; its texts must be made again.
        """
        width, shapes = configured.vocabulary(self.original), dict[str, Shape]()
        odd = odd_texts(known.own, len(self.prompts), self.size.own, self.eos_token_ids, width)
        if odd is None:
            self._write(known.own)
            odd, self.problem, shapes = self.problem, None, self._shapes()
        odd = odd or odd_noise(known.noise)
        found = (odd_logits(name, logits, shapes) for name, logits in known.logits.items())
        if odd := odd or next(filter(None, found), None):
            raise ValueError(odd)
        self._kept = Shelf.of(known.logits)
        self._noise = known.noise
        self._taken = len(known.logits) + bool(known.noise)

    def _shapes(self) -> dict[str, Shape]:
        """Shapes [B, T, V] of all logits that may be kept, by name. None is a size that only `sensitivity` knows."""
        width = configured.vocabulary(self.original)
        asked = {(g, stepped): (len(g), len(g[0].scored), width) for g in self.groups() for stepped in (False, True)}
        at_once: dict[str, Shape] = {f"{AT_ONCE}{k}": (None, None, width) for k in range(len(self.texts))}
        return at_once | {_name(*what): shape for what, shape in asked.items()}

    def _ask(self, group: tuple[Text, ...], stepped: bool) -> torch.Tensor:
        """Compute the original's logits [B, T, V], not yet rounded."""
        unroutable = "forward" in vars(self.original)  # an instance's forward bypasses the route
        if stepped or (len(group) > 1 and (unroutable or sharding.ranks(self.original) > 1)):
            return self.step(Served(self.plain(), self.pad_token_id), group)
        served = Served(self.reader, self.pad_token_id)
        with self.reading_threads():
            if len(group) == 1:
                return self.read(served, group[0])[None]
            return served.read_together([(*t.context, *t.scored)[:-1] for t in group], last=len(group[0].scored))

    def reading_threads(self) -> AbstractContextManager[None]:
        """Within it, the calling thread computes with the threads with which the original reads."""
        return nullcontext() if self.threads is None else intraop.computing_with(self.threads)

    def step(self, served: Served, group: Sequence[Text]) -> torch.Tensor:
        """Return logits [B, T, V] of the scored tokens, one decoding step each."""
        return served.step([t.context for t in group], [t.scored for t in group])

    def read(self, served: Served, text: Text) -> torch.Tensor:
        """Return logits [T, V] of the scored tokens from one full forward."""
        ids = text.context + text.scored
        return served.read(ids[:-1], last=len(text.scored))

    def _choose(self, prompts: Sequence[Tokens]) -> tuple[tuple[int, ...], ...]:
        if self.original.training:
            self.problem = "the original is in training mode, so it does not even reproduce itself: call eval()"
            return ()
        limit = min(texts.LONGEST_CONTEXT, (configured.context(self.original) or UNBOUNDED) - self.size.own)
        try:
            return texts.choose(prompts, self.size, limit, self.seed)
        except ValueError as error:
            self.problem = str(error)
            return ()

    def _write(self, own: Sequence[tuple[int, ...]]) -> None:
        self.texts = texts.singles(self.prompts, own, self.size)
        self.batches = texts.padded(self.prompts, self.size)
        self.long = texts.long(self.prompts, self.size, configured.context(self.original) or UNBOUNDED)
        self.problem = texts.shortage(self.texts, self.size) or self.problem

    def _continue(self, heads: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the original's greedy continuations, up to and including the end-of-sequence token."""
        served = Served(self.reader, self.pad_token_id, self.eos_token_ids)
        own: list[tuple[int, ...]] = []
        for k in range(0, len(heads), 2 * texts.PADDED_BATCH):
            part = heads[k : k + 2 * texts.PADDED_BATCH]
            with self.reading_threads():
                out = served.generate(part, self.size.own)[:, max(map(len, part)) :]
            own += [configured.until_end(row, self.eos_token_ids) for row in out.tolist()]
        return own

    def _measure_noise(self) -> None:
        served = Served(self.plain(), self.pad_token_id)
        klds, shifts = [], []
        for text in self.texts[: texts.NOISE_TEXTS]:
            reference, again = self.reference((text,))[0].float(), self.step(served, (text,))[0]
            if not bool(torch.isfinite(reference).any(-1).all()) or bool(torch.isnan(reference).any()):
                self.problem = "the original itself gives NaN or infinite logits: nothing can be compared with it"
                return
            targets = torch.tensor(text.scored, dtype=torch.int64, device=again.device)
            klds.append(compare_logits(reference, again, targets).kld)
            top = reference.argmax(-1, keepdim=True)
            shift = (reference.log_softmax(-1) - again.log_softmax(-1)).gather(-1, top)
            shifts.append(shift.abs().flatten().cpu().double().numpy())
        self.noise_kld = float(np.mean(np.concatenate(klds)))
        self.tie_nats = max(NEAR_TIE_NATS, 3 * float(np.quantile(np.concatenate(shifts), 0.99)))
        self._noise = (self.noise_kld, self.tie_nats)
        if self.noise_kld > MOST_NOISE:
            self.problem = (
                f"the original decoding step by step is {self.noise_kld:.2g} nats from its own full forward. It does"
                " not reproduce itself (dropout, sampling inside, a broken cache): nothing can be compared with it"
            )


def reads_with(model: PreTrainedModel) -> LinearTransform | None:
    """Return the transform with which exams read a 16-bit model on a CPU; None: they read the model as it is.

    It computes the same except for rounding.
    """
    if model.device.type != "cpu" or "forward" in vars(model) or obstacle(model) is not None:
        return None
    if emulated(model.dtype):
        return WideArithmetic()
    return FlatLinears() if model.dtype == torch.bfloat16 else None


def _name(group: tuple[Text, ...], stepped: bool) -> str:
    """Name a group's logits by a hash of its tokens, so that other texts get another name."""
    tokens = json.dumps([[text.context, text.scored] for text in group])
    return f"{hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()}.{'stepped' if stepped else 'read'}"


class Keeper(Protocol):
    """Keeps answers between runs. `autotune.tune.references` implements it on disk."""

    def restore(self, exam: Exam) -> bool:
        """Pass the answers of an earlier run to `Exam.take`. Return False if there are none or they do not fit."""
