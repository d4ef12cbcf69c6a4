"""Next-token distributions in a small form: the likeliest tokens, and a fair sample of all others.

The KL divergence from such a distribution is the sum of one over the kept tokens and "any other", and one among the
others (chain rule of relative entropy; Cover and Thomas, Elements of Information Theory, 2006, theorem 2.5.3):

    KL(p || q) = sum over kept v of p_v log(p_v / q_v)  +  P log(P / Q)  +  P KL(p/P || q/Q among the others)

P and Q are the masses of the others. The first two terms are exact, and their sum is a lower bound. The third is
estimated from `TAIL` tokens drawn from p/P when the baseline was recorded, as the mean of r - 1 - log r with
r = (q/Q) / (p/P). Its expectation is the divergence, no draw is negative, and all are zero if the distributions agree
(Schulman, Approximating KL Divergence, 2020). Draws are stratified and independent. So with N positions and
|log r| <= d among the others, the error of the mean divergence is larger than

    max P * (e^d - 1 - d) * sqrt(log(2 / alpha) / (2 N TAIL))

with probability at most alpha (Hoeffding, JASA 1963). With half of the mass beyond the kept tokens, d = 1 and the 512
positions of a quick exam, that is 0.004 nats at alpha = 0.01. With a twentieth of the mass, as in language models, it
is 0.0004. The bounds that the gates use are bootstrapped from these same values, so they include that noise.

Measured on SmolLM2-135M-Instruct with matrices rounded to INT8, 256 tokens: 0.003365 nats, compared with 0.003372 over
the whole vocabulary and 0.003058 from the first two terms alone; the others have 4.8 % of the mass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from ...validate.divergence import WORST_NATS, Divergence

TOP = 256  # tokens kept per position; they have 95 % or more of a language model's mass
TAIL = 32  # tokens drawn from the rest
CHUNK_ROWS = 64  # positions processed at once, which limits temporary memory for large vocabularies


@dataclass(frozen=True)
class Compact:
    """Next-token distributions of T positions.

    Args:
        top_ids: [T, K] int32, likeliest first.
        top_logp: [T, K] float32, their log-probabilities.
        tail_ids: [T, M] int32, drawn from the others; M is 0 if there are none.
        tail_logp: [T, M] float32, their log-probabilities.
        tail_mass: [T] float32, probability of all others together.
        target_logp: [T] float32, log-probability of the token that follows in the text.
    """

    top_ids: torch.Tensor
    top_logp: torch.Tensor
    tail_ids: torch.Tensor
    tail_logp: torch.Tensor
    tail_mass: torch.Tensor
    target_logp: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor, seed: int = 0) -> Compact:
        """Compress logits [T, V], which are followed by the tokens `targets` [T]."""
        draw = torch.Generator().manual_seed(seed)
        steps = range(0, len(targets), CHUNK_ROWS)
        return cls.joined([cls._of(logits[k : k + CHUNK_ROWS], targets[k : k + CHUNK_ROWS], draw) for k in steps])

    @classmethod
    def _of(cls, logits: torch.Tensor, targets: torch.Tensor, draw: torch.Generator) -> Compact:
        logp = logits.cpu().double().log_softmax(-1)  # [T, V]
        kept = min(TOP, logp.shape[1])
        drawn = TAIL if kept < logp.shape[1] else 0
        top_logp, top_ids = logp.topk(kept)
        tail = logp.exp().scatter(-1, top_ids, 0.0).cumsum(-1)  # [T, V]
        mass = tail[:, -1:]
        first = torch.arange(drawn, dtype=torch.float64, device="cpu")
        within = torch.rand(len(logp), drawn, generator=draw, dtype=torch.float64, device="cpu")
        strata = (first + within) / max(1, drawn)
        tail_ids = torch.searchsorted(tail, (strata * mass).minimum(mass * (1 - 1e-12)), right=True)
        tail_ids = tail_ids.clamp_max(logp.shape[1] - 1)
        return cls(
            top_ids.int(),
            top_logp.float(),
            tail_ids.int(),
            logp.gather(-1, tail_ids).float(),
            mass.squeeze(-1).float(),
            logp.gather(-1, targets.cpu()[:, None]).squeeze(-1).float(),
        )

    @classmethod
    def joined(cls, parts: Sequence[Compact]) -> Compact:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def split(self, counts: Sequence[int]) -> Iterator[Compact]:
        """Undo `joined`: yield parts of `counts` positions."""
        parts = [tensor.split_with_sizes(list(counts)) for tensor in self.tensors().values()]
        yield from (Compact(*part) for part in zip(*parts, strict=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __len__(self) -> int:
        return len(self.target_logp)

    def dense(self, vocabulary: int, ruled_out: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities [T, V] with equally likely others: enough to detect defects and the likeliest tokens.

        Args:
            vocabulary: V.
            ruled_out: [T, V] tokens to treat as impossible unless they were kept. The divergence accounts for the mass
                that the recorded model gave them.
        """
        others = (self.tail_mass / max(1, vocabulary - self.top_ids.shape[1])).clamp_min(1e-30).log()
        dense = others[:, None].expand(-1, vocabulary).contiguous()
        if ruled_out is not None:
            dense.masked_fill_(ruled_out, -torch.inf)
        return dense.scatter_(-1, self.top_ids.long(), self.top_logp)

    def compare(self, logits: torch.Tensor, targets: torch.Tensor) -> Divergence:
        """Divergence of logits [T, V] from these distributions; `targets` [T] are the tokens that follow.

        If the new top token was not kept, its gap is at least that of the last kept token, which is returned instead.
        """
        ends = [min(k + CHUNK_ROWS, len(self)) - k for k in range(0, len(self), CHUNK_ROWS)]
        parts = zip(self.split(ends), logits.split_with_sizes(ends), targets.split_with_sizes(ends), strict=True)
        columns = torch.cat([mine._compare(logits, following) for mine, logits, following in parts], dim=1)
        kld, top_gap, delta_logp, delta_p, top_p = columns.numpy()
        return Divergence(kld=kld, top_gap=top_gap, delta_logp=delta_logp, delta_p=delta_p, top_p=top_p)

    def _compare(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logq = logits.cpu().double().log_softmax(-1).clamp_min(-WORST_NATS)  # [T, V]
        top = self.top_ids.long()
        logp, here = self.top_logp.double(), logq.gather(-1, top)  # [T, K]
        kept = (logp.exp() * (logp - here)).nan_to_num(0.0).sum(-1)  # ruled out by both: 0 * (-inf + inf)
        others = logq.exp().scatter(-1, top, 0.0).sum(-1).clamp_min(1e-300).log()  # log Q [T]
        mass = self.tail_mass.double()
        lumped = torch.where(mass > 0, mass * (mass.clamp_min(1e-300).log() - others), 0.0)
        kld = (kept + lumped + mass * self._among_others(logq, others)).clamp(0.0, WORST_NATS)

        best = logq.argmax(-1, keepdim=True)
        found = top == best
        best_logp = torch.where(found.any(-1), (logp.masked_fill(~found, 0.0)).sum(-1), logp[:, -1])
        gap = (logp[:, 0] - best_logp).clamp(0.0, WORST_NATS)
        true_p = self.target_logp.double().clamp_min(-WORST_NATS)
        true_q = logq.gather(-1, targets.cpu()[:, None]).squeeze(-1)
        return torch.stack([kld, gap, true_q - true_p, true_q.exp() - true_p.exp(), logp[:, 0].exp()])

    def _among_others(self, logq: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The divergence among the tokens that were not kept [T]; see the module's docstring."""
        if not self.tail_ids.shape[1]:
            return torch.zeros(len(self), dtype=torch.float64, device="cpu")
        q = logq.gather(-1, self.tail_ids.long()) - others[:, None]
        p = self.tail_logp.double() - self.tail_mass.double().clamp_min(1e-300).log()[:, None]
        log_r = (q - p).clamp(-WORST_NATS, 50.0)
        return (log_r.exp() - 1 - log_r).mean(-1)
