"""The difference between two sets of next-token logits, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK_BYTES = 8 * 2**20  # of FP32 logits compared at once; comparing takes about six times as much for a moment
WORST_NATS = 1e4  # nats at which a divergence is cut, so that broken logits still give finite statistics


@dataclass(frozen=True)
class Divergence:
    """Per-token metrics, each [T] float64.

    Args:
        kld: KL(reference || candidate) in nats.
        top_gap: the reference's log-probability of its own top token minus that of the candidate's, in nats; 0: equal.
        delta_logp: log-probability of the true token, candidate minus reference.
        delta_p: probability of the true token, candidate minus reference.
        top_p: the reference's probability of its own top token, which says how sure it was.
    """

    kld: NDArray[np.float64]
    top_gap: NDArray[np.float64]
    delta_logp: NDArray[np.float64]
    delta_p: NDArray[np.float64]
    top_p: NDArray[np.float64]


def compare_logits(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Compare two sets of logits for the same positions.

    Args:
        reference, candidate: [T, V] logits in any float dtype; computed in float32.
        targets: [T] int64, the true next tokens.
    """
    rows = max(1, CHUNK_BYTES // (4 * reference.shape[-1]))
    parts = [
        _compare(reference[k : k + rows], candidate[k : k + rows], targets[k : k + rows])
        for k in range(0, len(targets), rows)
    ]
    columns = torch.cat(parts, dim=1).double().cpu().numpy()
    return Divergence(*columns)


def _compare(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(reference.float(), dim=-1)  # [T, V]
    log_q = torch.log_softmax(candidate.float(), dim=-1).clamp_min(-WORST_NATS)
    p = log_p.exp()
    # tokens that the original rules out (-inf) count as 0; without this they would give 0 * inf = NaN
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    kld = terms.sum(-1).clamp(0.0, WORST_NATS)
    top = log_q.argmax(-1, keepdim=True)
    best = log_p.amax(-1)
    gap = best - log_p.gather(-1, top).squeeze(-1)
    true_p = log_p.gather(-1, targets[:, None]).squeeze(-1).clamp_min(-WORST_NATS)
    true_q = log_q.gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack([kld, gap.clamp_max(WORST_NATS), true_q - true_p, true_q.exp() - true_p.exp(), best.exp()])


def find_defect(reference: torch.Tensor, candidate: torch.Tensor) -> str | None:
    """Describe what is plainly broken in `candidate`; None if nothing is.

    Args:
        reference, candidate: [B, T, V] logits.
    """
    if candidate.shape != reference.shape:
        return f"logits of shape {list(candidate.shape)}, expected {list(reference.shape)}"
    if not candidate.is_floating_point():
        return f"logits of type {candidate.dtype}, expected floating point"
    for row, (own, others) in enumerate(zip(candidate, reference, strict=True)):  # one by one: they may be large
        broken = ~torch.isfinite(own) & torch.isfinite(others)
        if bool(broken.any()):
            token = int(torch.nonzero(broken)[0, 0])
            kind = "NaN" if bool(torch.isnan(own[token]).any()) else "infinite"
            count = int(broken[token].sum())
            return f"{kind} logits at token {token} of sequence {row} ({count} of {broken.shape[-1]})"
    flat = (candidate.amax(-1) == candidate.amin(-1)) & (reference.amax(-1) != reference.amin(-1))
    if bool(flat.any()):
        row, token = torch.nonzero(flat)[0].tolist()
        return f"all logits equal at token {token} of sequence {row}"
    return None
