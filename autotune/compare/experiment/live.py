"""Experiments on live calls: the layer that they put over a model, the arms that they run, and their status."""

from __future__ import annotations

import dataclasses
import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ExperimentError
from ...model import route, seam
from ...model.revision import Revision
from ...tune import codec
from ...workload import Workload
from .arms import Arm, ArmBuilder
from .given import CONTROL, GivenArm
from .guardrails import Figures, Finding
from .sequential import Moments

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from transformers import PreTrainedModel

    from .setup import Setup
    from .store import Version

log = logging.getLogger("autotune")

ANY_WORK = Workload(((1,) * 128,), 128)  # sizes a candidate's buffers if no workload is given


class LiveState(enum.StrEnum):
    """What a live experiment is doing."""

    RUNNING = "running"
    STOPPED = "stopped"
    FULL = "full"  # a split whose ramp is at its last step
    ROLLED_BACK = "rolled back"
    FAILED = "failed"


@dataclass(frozen=True)
class Standing:
    """One candidate in a live experiment.

    Args:
        name, description: those of the arm.
        verdict, reason: the current verdict; valid at any look.
        requests: number of the candidate's requests that were measured.
        share: share of live requests that it answers; 0 in a shadow.
        findings: a sentence for each guardrail.
        bounds: for each guardrail, a sentence with the number of requests in which a clearly worse candidate is caught.
        errors: messages of the latest failures.
        counts: number of requests by outcome.
    """

    name: str
    description: str
    verdict: str
    reason: str
    requests: int
    share: float
    findings: tuple[str, ...]
    bounds: tuple[str, ...]
    errors: tuple[str, ...] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class LiveStatus:
    """The status of a live experiment.

    Args:
        name, mode: those of the experiment; mode is "shadow" or "split".
        state: what it is doing.
        requests: number of live calls of generate's greedy or sampling loop.
        counts: number of these calls by outcome: sampled, dropped and why, bypassed and why.
        candidates: each candidate's standing.
    """

    name: str
    mode: str
    state: LiveState
    requests: int
    counts: Mapping[str, int]
    candidates: tuple[Standing, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        plain: dict[str, Any] = codec.encode(self)
        return plain

    def lines(self) -> list[str]:
        """Describe the status in lines of text."""
        return describe(self.to_dict())


def describe(body: Mapping[str, Any]) -> list[str]:
    """Describe a stored or current status (`LiveStatus.to_dict`) in lines of text."""
    counts = ", ".join(f"{name} {n}" for name, n in sorted(body["counts"].items()))
    lines = [
        f"{body['name']}: {body['mode']}, {body['state']}, {body['requests']} requests ({counts or 'none counted'})"
    ]
    for arm in body["candidates"]:
        where = f", answers {arm['share']:.0%} of requests" if body["mode"] == "split" else ""
        lines.append(f"{arm['name']} ({arm['description']}): {arm['verdict']}{where}; {arm['reason']}")
        lines += [f"  {text}" for text in (*arm["findings"], *arm["bounds"])]
        lines += [f"  failed: {text}" for text in arm["errors"]]
    return lines


class Layer(ABC):
    """A router on top of a live model that passes on everything; see `route.below`. It runs as a context, too.

    Args:
        experiment: the experiment.
        model: the live model.
        names: names of the candidates that run.

    Raises:
        ExperimentError: there is no such candidate, or it cannot be built or run on the live model's calls.
        UnsupportedModelError: autotune cannot route the live model.
    """

    def __init__(self, experiment: Setup, model: PreTrainedModel, names: Sequence[str]) -> None:
        self._model = model
        self._control_arm, self._arms, self._revision = arms_of(experiment, model, names)

    def change(self) -> str | None:
        """Whether the live model was edited since: it is another control then, and candidates made from it mix both."""
        change = self._revision.changed()
        return None if change is None else f"the model changed ({change})"

    @abstractmethod
    def start(self) -> Self:
        """Begin to route the model's calls."""

    @abstractmethod
    def stop(self) -> None:
        """End, and save the measurements."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self.stop()
        return False

    def sample(self, call: seam.Sampling) -> Any:
        return self.control(call)

    def control(self, call: seam.Sampling) -> Any:
        """Return the answer of the layer below: autotune's handle, another experiment, or the model."""
        return route.below(self._model, self).sample(call)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return route.below(self._model, self).forward(model, args, kwargs)

    def other_loop(self, name: str) -> AbstractContextManager[object]:
        return route.below(self._model, self).other_loop(name)


def arms_of(experiment: Setup, model: PreTrainedModel, names: Sequence[str]) -> tuple[Arm, dict[str, Arm], Revision]:
    """Build the live model's arm, and the candidates' arms by name. Also returns the live model's state before."""
    from ...errors import UnsupportedModelError
    from ...tune.supported import unsupported

    if reason := unsupported(model):
        raise UnsupportedModelError(reason)
    if unknown := [name for name in names if name not in experiment.candidates]:
        raise ExperimentError(f"there is no candidate {unknown[0]!r}; there are {', '.join(experiment.candidates)}")
    bare, revision = route.bare(model), Revision(model)
    work = ANY_WORK if experiment.workload is None else experiment.work(bare, experiment.tokenizer)
    bench = ArmBuilder(bare, experiment.tokenizer, work, log.info)
    built = {name: bench.candidate(experiment.candidates[name]) for name in names}
    for name, arm in built.items():
        if problem := arm.problem or arm.unjudged:
            raise ExperimentError(f"candidate {name!r} cannot answer the live model's calls: {problem}")
    return bench.control(GivenArm(CONTROL, "model", bare)), built, revision


def overall(candidates: Sequence[Standing]) -> tuple[str, str]:
    """The verdict on an experiment, as `verdicts.conclude`: pass if any candidate passes, error if all do."""
    found = {arm.verdict for arm in candidates}
    if "pass" in found:
        verdict = "pass"
    elif found == {"error"}:
        verdict = "error"
    else:
        verdict = "fail" if found and found <= {"fail", "error"} else "inconclusive"
    return verdict, "; ".join(f"{arm.name}: {arm.reason}" for arm in candidates)


class Record:
    """A live experiment's state in its store, which it loads after a restart."""

    def __init__(self, experiment: Setup, mode: str, control: Arm, arms: Mapping[str, Arm], settings: Any) -> None:
        prints = {CONTROL: control.fingerprint, **{name: arm.fingerprint for name, arm in arms.items()}}
        self.store = experiment.store
        self.version: Version = self.store.begin(experiment.name, mode, prints, settings)

    def load(self, arm: str) -> Mapping[str, Any]:
        """Load the state that `save` kept for an arm; empty at the first start."""
        if not self.version.resumed or (found := self.store.verdicts(self.version).get(arm)) is None:
            return {}
        return _kept(found.body)

    def save(
        self,
        status: LiveStatus,
        kept: Mapping[str, Any],
        unless: Callable[[Mapping[str, Any]], bool] = lambda theirs: False,
    ) -> Mapping[str, Any]:
        """Save the status and each arm's state for `load`. A store's error must never fail a live call.

        Args:
            unless: called with the state that another process may have saved for an arm. If it returns True, that
                state stays, and nothing more is saved.

        Returns:
            The state that stays; empty if all was saved, or the store failed.
        """
        try:
            for arm in status.candidates:
                body = {**codec.encode(arm), "kept": codec.encode(kept[arm.name])}
                stays = self.store.conclude(
                    self.version, arm.name, arm.verdict, arm.reason, body, unless=lambda before: unless(_kept(before))
                )
                if stays is not None:
                    return _kept(stays)
            self.store.conclude(self.version, "", *overall(status.candidates), status.to_dict())
        except Exception as error:
            log.warning("experiment %s is not kept: %s: %s", status.name, type(error).__name__, error)
        return {}

    def note(self, kind: str, text: str) -> None:
        """Save and log an event."""
        log.info("%s: %s", kind, text)
        try:
            self.store.note(self.version, kind, text)
        except Exception as error:
            log.warning("an event is not kept: %s: %s", type(error).__name__, error)


def _kept(body: Mapping[str, Any]) -> Mapping[str, Any]:
    kept: Mapping[str, Any] = body.get("kept", {})
    return kept


def read_figures(kept: Mapping[str, Any]) -> dict[str, Moments]:
    """Decode figures that `Record` saved."""
    figures: dict[str, Moments] = codec.decode(Mapping[str, Moments], kept, "figures")
    return figures


def sentences(findings: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(finding.text for finding in findings)


def spread_of(figures: Figures, name: str) -> float:
    """Standard deviation of the values so far; NaN if there are fewer than 20."""
    seen = figures.get(name, Moments())
    return seen.std if seen.n >= 20 else float("nan")
