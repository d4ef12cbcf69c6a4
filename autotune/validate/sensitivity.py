"""Measure how much of a scheme's divergence each layer causes: exchange some layers and read texts with them."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from ..model import configured, seam
from ..runtime.variant import Variant
from ..transforms.linears import LinearTransform, joined
from .divergence import compare_logits
from .exam import Exam, Progress
from .quality import EARLY_FACTOR, beyond, exceeds
from .tally import Tally, summarise
from .texts import Text
from .tiers import TIERS

TOKENS = 96  # tokens used of each of the exam's texts
CONTEXT = 32  # tokens of these that the prefill module reads; the decode module reads the rest in one forward
FEW = 0.5  # share of the usual tokens, TOKENS of each text, below which bounds are too wide to refuse a transform
COMPARED = 4  # texts on which layers are compared; the tier is checked on all
READ_BYTES = 80 * 2**20  # most bytes of FP32 logits per forward; a large vocabulary allows fewer texts at a time


class LayerProbe:
    """Measures the divergence of variants that exchange some of the layers a transform would exchange.

    Prefill and decode run through their own modules, as in serving, but decode reads all its tokens in one forward.

    Args:
        exam: supplies the texts and the original that is the reference.
        incumbent: the variant that the transform would be applied to.
        transform: the transform that failed.
        tier: name of the quality tier it failed.
        progress: called with a step's name and the share done, each time texts are read.
    """

    def __init__(
        self,
        exam: Exam,
        incumbent: Variant,
        transform: LinearTransform,
        tier: str,
        progress: Progress = lambda step, share: None,
    ) -> None:
        self.exam = exam
        self.progress = progress
        self.incumbent = incumbent
        self.transform = transform
        self.tier = TIERS[tier]
        self.wider = transform.wider
        self.wider_form = transform.wider_form
        found = transform.layers(incumbent.modules[transform.phases[-1]])
        self.layers = {name: int(layer.weight.nbytes) for name, layer in found.items()}
        self.texts, width = longest(exam.texts)
        self.has_few_tokens = len(self.texts) * width < FEW * len(exam.texts) * TOKENS
        self.context = min(CONTEXT, width // 2)
        ends = [(text.context + text.scored)[-width:] for text in self.texts]
        ids = torch.tensor(ends, dtype=torch.int64, device=exam.original.device)  # [texts, width]
        vocabulary = configured.vocabulary(exam.original)
        self.together = max(1, min(COMPARED, READ_BYTES // (4 * width * vocabulary)))
        self.batches = [ids[k : k + self.together] for k in range(0, len(ids), self.together)]

    def divergence(self, names: Collection[str]) -> float:
        """Return the mean KL divergence from the original, in nats per token, with only these layers exchanged."""
        others = ",".join(name for name in self.layers if name not in names)
        tally = self._tally(replace(self.transform, skip=joined(self.transform.skip, others)), texts=COMPARED)
        nats = float(tally.column("kld").mean())
        return math.inf if math.isnan(nats) else nats

    def shortfall(self, wide: str) -> str | None:
        """Say why the transform, with these layers left wider, is outside the tier on the exam's texts; or None.

        Few tokens leave the bounds wide. Then only an estimate outside the tier counts, as the gate scores more tokens.
        """
        limit = self.tier.kld_limit(self.exam.noise_kld)
        tally = self._tally(self.widened(wide), texts=len(self.texts), enough=EARLY_FACTOR * limit)
        found = summarise(tally, self.tier.name, self.exam.tie_nats)
        return (exceeds if self.has_few_tokens else beyond)(found, self.tier, self.exam)

    def widened(self, wide: str) -> LinearTransform:
        return self.transform.widened(wide)

    def _kept(self, number: int) -> torch.Tensor:
        """Return the original's logits [B, T, V] for a batch, in half precision as the exam keeps them."""
        ids = self.batches[number]
        shape = len(ids), ids.shape[1] - 1
        ask = functools.partial(self._reference, ids)
        return self.exam.read_at_once(number, shape, ask)

    def _reference(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._read(self.exam.reader, ids)
        logits -= logits.amax(-1, keepdim=True)  # puts likely tokens near zero, where half precision is finest
        return logits.half()

    def _tally(self, transform: LinearTransform, texts: int, enough: float = math.inf) -> Tally:
        """Return every token's metrics under a transform, applied to the incumbent's modules without compiling.

        Args:
            texts: how many of the exam's texts are read, in whole batches.
            enough: mean KL divergence in nats above which no further batch is read.
        """
        variant = Variant(self.incumbent.original)
        variant.modules = dict(self.incumbent.modules)
        transform.apply(variant)
        # if the original does prefill, the context's tokens are equal by definition and would only dilute the mean
        first = self.context if variant.modules["prefill"] is variant.original else 0
        if (reading := self.exam.reading) is not None:  # the other layers must multiply as those of the reference do
            for twin in variant.edit("both"):
                reading.exchange_in(twin)
        tally = Tally()
        batches = self.batches[: -(-texts // self.together)]
        for k, ids in enumerate(batches):
            self.progress("reading texts", k / len(batches))
            reference = self._kept(k)
            for row, (targets, got) in enumerate(zip(ids[:, 1:], self._read(variant, ids), strict=True)):
                text = self.texts[k * self.together + row]
                tally.add(compare_logits(reference[row, first:], got[first:], targets[first:]), text, "read")
            if not tally.column("kld").mean() <= enough:
                break
        return tally

    @torch.no_grad()
    def _read(self, variant: Variant, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, width - 1, V]: the context's from the prefill module, the rest from the decode module."""
        with self.exam.reading_threads(), self.incumbent.turn():
            with variant.running("prefill") as module:
                read = module(input_ids=ids[:, : self.context], use_cache=True)
            cache = seam.cache_in(read)
            with variant.running("decode") as module:
                if cache is None or not seam.counts_tokens(cache):  # its state takes one token at a time
                    return seam.logits(module(input_ids=ids[:, :-1], use_cache=False)).float()
                rest = module(input_ids=ids[:, self.context : -1], **seam.over(variant.original, cache))
        return torch.cat([seam.logits(read), seam.logits(rest)], dim=1).float()


def longest(texts: Sequence[Text]) -> tuple[list[Text], int]:
    """Choose the texts that give the most tokens if each is cut to the shortest of them, `TOKENS` at most. Pure.

    Returns:
        The texts in their order, and the tokens of each.
    """
    lengths = [min(TOKENS, len(text.context) + len(text.scored)) for text in texts]
    width = max(set(lengths), key=lambda width: (width * sum(length >= width for length in lengths), -width))
    return [text for text, length in zip(texts, lengths, strict=True) if length >= width], width
