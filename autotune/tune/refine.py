"""Finds the layers that a scheme ruins, from measured divergences, and leaves them in higher precision.

A scheme that fails the quality gate as a whole often fails because of a few layers. Parts of the layers are exchanged
alone: first each kind of layer, then halves of the parts that matter. The layers that cause the most divergence for the
bytes they save stay wider, as few of them as possible. The result is a proposal, which has to pass the gate like any
other candidate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import Protocol

from ..model.linear_layers import is_named
from ..runtime.variant import Transform
from ..transforms.linears import LinearTransform

SPLIT_SHARE = 0.1  # share of the divergence below which a part is not worth splitting
MOST_MEASURED = 40  # most parts that are measured; each takes one forward over a few prompts
LEAST_SHARE = 1e-3  # share of the divergence below which a part is never left wider
LEAST_ROOM = 0.02  # share of the weights; if fewer may stay wide, the search for them is not worth its time


class Probe(Protocol):
    """Everything the refinement of one transform has to measure."""

    @property
    def layers(self) -> Mapping[str, int]:
        """Layer -> bytes of its weight in the original."""

    @property
    def wider(self) -> Transform | None:
        """The transform for layers that are left wider; None: they stay as they were."""

    @property
    def wider_form(self) -> str:
        """The form of wider layers in words: "at 8 bits"."""

    def divergence(self, names: Collection[str]) -> float:
        """Mean KL divergence from the original, nats per token, with only these layers exchanged."""

    def shortfall(self, wide: str) -> str | None:
        """Why quality on a few prompts is not within the tier with these layers left wider, or None."""

    def widened(self, wide: str) -> Transform:
        """The transform with these layers left wider."""


@dataclass(frozen=True)
class Promises:
    """Best-case speed-ups that decide about a refinement.

    Args:
        narrow: speed-up with every layer narrow.
        wide: speed-up with every layer left wider.
        least: least speed-up that makes a refined transform worth a trial.
    """

    narrow: float
    wide: float
    least: float

    def mixed(self, share: float) -> float:
        """Speed-up with this share of the weights' bytes left wider."""
        return 1 / ((1 - share) / self.narrow + share / self.wide)

    @property
    def room(self) -> float:
        """The largest share that may be left wider, where `mixed` equals `least`."""
        if self.wide >= self.least:
            return 1.0
        return (1 / self.least - 1 / self.narrow) / (1 / self.wide - 1 / self.narrow)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are kept or exchanged together.

    Args:
        layers: their names.
        share: share of the bytes of all layers that could be exchanged.
        nats: mean KL divergence that they cause alone, nats per token.
    """

    layers: tuple[str, ...]
    share: float
    nats: float


@dataclass(frozen=True)
class Proposal:
    """A refined transform, the best-case speed-up it still promises, and why these layers are left wider."""

    transform: Transform
    predicted: float
    reason: str


@dataclass(frozen=True)
class Refinement:
    """What to try instead of a transform that failed, the narrowest first, and the finding in a sentence."""

    proposals: tuple[Proposal, ...]
    finding: str


def narrowest(transform: Transform, probe: Callable[[Transform], Probe | None]) -> Probe | None:
    """The probe of a transform whose sensitive layers get the narrowest wider form that keeps the tier for all layers.

    If none does, they get the widest. A mix of two forms that both lose too much is not looked for.

    Args:
        probe: makes the probe of a transform; None if it cannot leave out layers.
    """

    def keeps_tier(form: LinearTransform) -> bool:
        whole = None if form.wider is None else probe(form.wider)
        return whole is not None and whole.shortfall("") is None

    if not isinstance(transform, LinearTransform):
        return probe(transform)
    *narrower, widest = transform.widenings
    return probe(next(filter(keeps_tier, narrower), widest))


def refine(probe: Probe, promises: Promises, spent: Callable[[], bool]) -> Refinement:
    """Find the layers to leave wider.

    Args:
        probe: measures the layers.
        promises: decide how many layers may be left wider.
        spent: returns whether the time is up; then the measurements so far decide.
    """
    if (room := promises.room) < LEAST_ROOM:
        finding = f"with more than {max(room, 0.0):.1%} of its weights {probe.wider_form} it promises less than others"
        return Refinement((), finding)
    total = probe.divergence(tuple(probe.layers))
    parts = rank(probe, spent)
    causes = [part for part in parts[:-1] if part.nats > LEAST_SHARE * total]  # with all wider, it is another transform
    sums = list(accumulate(part.share for part in causes))
    reach = sum(share <= room for share in sums)
    worst = f"{spell(parts[0].layers, probe.layers)} alone causes {parts[0].nats:.2g} of {total:.2g} nat"
    if not reach:
        return Refinement((), f"{worst}, but holds {parts[0].share:.0%} of the weights, {room:.0%} may stay wider")
    wide = [spell([name for part in parts[:k] for name in part.layers], probe.layers) for k in range(reach + 1)]
    if missing := probe.shortfall(wide[reach]):
        kept = f"with {wide[reach]} {probe.wider_form}, {sums[reach - 1]:.0%} of the weights,"
        return Refinement((), f"{worst}; even {kept} {missing}")
    least = fewest(reach, lambda k: not spent() and probe.shortfall(wide[k]) is None)
    tries = dict.fromkeys((least, -(-(least + reach) // 2), reach))  # the gate may be stricter than the probe
    proposals = (
        Proposal(
            probe.widened(wide[k]),
            promises.mixed(sums[k - 1]),
            explain(parts[:k], wide[k], total, probe.wider_form),
        )
        for k in tries
    )
    return Refinement(tuple(proposals), worst)


def rank(probe: Probe, spent: Callable[[], bool]) -> tuple[LayerGroup, ...]:
    """Divide all layers into parts, ordered by divergence per byte, the largest first."""
    whole = sum(probe.layers.values())

    def measure(layers: tuple[str, ...]) -> LayerGroup:
        return LayerGroup(layers, sum(probe.layers[name] for name in layers) / whole, probe.divergence(layers))

    parts = [measure(layers) for layers in kinds(probe.layers)]
    while len(parts) + 1 < MOST_MEASURED and not spent():
        worst = max((part for part in parts if len(part.layers) > 1), key=lambda part: part.nats, default=None)
        if worst is None or worst.nats <= SPLIT_SHARE * sum(part.nats for part in parts):
            break
        half = len(worst.layers) // 2
        parts.remove(worst)
        parts += [measure(worst.layers[:half]), measure(worst.layers[half:])]
    return tuple(sorted(parts, key=lambda part: part.nats / part.share, reverse=True))


def kinds(names: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Group names that differ only in their numbers: the same layer of every block."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return tuple(map(tuple, found.values()))


def fewest(most: int, passes: Callable[[int], bool]) -> int:
    """The least number from 1 to `most` that passes.

    Assumes that `most` passes, and that every number above one that passes also passes.
    """
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def spell(chosen: Collection[str], names: Collection[str]) -> str:
    """The shortest list of name parts, as `is_named` reads them, that stands for `chosen` and no others of `names`."""
    left, others, parts = set(chosen), set(names) - set(chosen), []
    runs = {
        ".".join(words[first:last])
        for words in (name.split(".") for name in chosen)
        for first, last in combinations(range(len(words) + 1), 2)
        if not words[first].isdigit()
    }
    fitting = sorted(run for run in runs if not any(is_named(name, run) for name in others))
    while left:
        best = max(fitting, key=lambda run: (sum(is_named(name, run) for name in left), -len(run)))
        parts.append(best)
        left = {name for name in left if not is_named(name, best)}
    return ",".join(parts)


def explain(parts: Collection[LayerGroup], wide: str, total: float, form: str) -> str:
    """Explain in a sentence why these parts stay wider."""
    nats = [f"{part.nats:.2g}" for part in parts]
    if len(parts) > 3:
        nats = [f"{sum(part.nats for part in parts):.2g} one by one"]
    share, names = sum(part.share for part in parts), wide.replace(",", ", ")
    alone = f"alone {'it causes' if len(parts) == 1 else 'they cause'} {' + '.join(nats)} of {total:.2g} nat"
    return f"kept {names} {form}, {share:.0%} of the weights: {alone}"
