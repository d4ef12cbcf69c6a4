"""Per-token metrics of an exam collected so far, and their summary."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import ConfidenceBin, Quality, Verdict
from .divergence import Divergence
from .statistics import cluster_means
from .texts import Text

CONFIDENCE = 0.95  # confidence level of every bound, one-sided
SURE = (0.0, 0.5, 0.9, 1.0)  # edges of the bins by the original's top probability: open, likely, settled tokens


@dataclass
class Tally:
    """Per-token metrics collected so far.

    Attributes:
        parts: metrics [T], prompt numbers [T] and the stratum of each text.
        natural: [T] of each text, True for the prompt's own tokens.
        left: number of groups left to the original, by reason.
    """

    parts: list[tuple[Divergence, NDArray[np.int64], str]] = field(default_factory=list)
    natural: list[NDArray[np.bool_]] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def add(self, found: Divergence, text: Text, stratum: str) -> None:
        count = len(found.kld)
        self.parts.append((found, np.full(count, text.prompt, dtype=np.int64), stratum))
        self.natural.append(np.arange(count) < len(text.natural))

    def column(self, name: str, stratum: str | None = None) -> NDArray[np.float64]:
        """Return one metric over all tokens, or over those of one stratum."""
        chosen = [getattr(f, name) for f, _, s in self.parts if stratum in (None, s)]
        return np.concatenate(chosen) if chosen else np.empty(0)

    def prompts(self, stratum: str | None = None) -> NDArray[np.int64]:
        chosen = [p for _, p, s in self.parts if stratum in (None, s)]
        return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)

    def strata(self) -> dict[str, float]:
        """Return the mean KLD by stratum, and for natural text and the original's own text."""
        names = list(dict.fromkeys(s for _, _, s in self.parts))
        means = {name: float(self.column("kld", name).mean()) for name in names}
        kld, natural = self.column("kld"), np.concatenate([np.empty(0, dtype=np.bool_), *self.natural])
        parts = (("natural", kld[natural]), ("own", kld[~natural]))
        return means | {name: float(part.mean()) for name, part in parts if len(part)}

    def certainty(self, tie_nats: float) -> tuple[ConfidenceBin, ...]:
        """Return the divergence by how sure the original was.

        A divergence matters less where many tokens are likely than where one is certain.
        """
        kld, top_p = self.column("kld"), self.column("top_p")
        same = self.column("top_gap") <= tie_nats
        found = []
        for low, high in itertools.pairwise(SURE):
            chosen = (top_p >= low) & ((top_p < high) | (high == SURE[-1]))
            if chosen.any():
                p50, p90, p99, most = (float(q) for q in np.quantile(kld[chosen], (0.5, 0.9, 0.99, 1.0)))
                share = float(same[chosen].mean())
                found.append(ConfidenceBin(low, high, int(chosen.sum()), p50, p90, p99, most, share))
        return tuple(found)


def summarise(tally: Tally, tier: str, tie_nats: float) -> Quality:
    """Return the figures of all tokens so far, without a verdict.

    Args:
        tally: the metrics collected so far.
        tier: name of the tier, for the record.
        tie_nats: a changed top token within this margin of the reference counts as the same.
    """
    if not tally.parts:
        return Quality(tier, Verdict.INCONCLUSIVE, "nothing was scored")
    kld, prompts = tally.column("kld"), tally.prompts()
    nll = -tally.column("delta_logp")
    same = (tally.column("top_gap") <= tie_nats).astype(np.float64)
    shift = tally.column("delta_p")
    return Quality(
        tier=tier,
        verdict=Verdict.INCONCLUSIVE,
        reason="not judged yet",
        mean_kld=float(kld.mean()),
        mean_kld_high=float(np.quantile(cluster_means(kld, prompts), CONFIDENCE)),
        p99_kld=float(np.quantile(kld, 0.99)),
        max_kld=float(kld.max()),
        same_top=float(same.mean()),
        same_top_low=float(np.quantile(cluster_means(same, prompts), 1 - CONFIDENCE)),
        ppl_ratio=_exp(float(nll.mean())),
        ppl_ratio_high=_exp(float(np.quantile(cluster_means(nll, prompts), CONFIDENCE))),
        delta_p_rms=float(np.sqrt(np.mean(shift**2))),
        tokens=len(kld),
        prompts=len(set(prompts.tolist())),
        strata=tally.strata(),
        certainty=tally.certainty(tie_nats),
    )


def _exp(nats: float) -> float:
    """Return exp(nats), with `nats` cut where it would overflow."""
    return float(np.exp(min(nats, 700.0)))
