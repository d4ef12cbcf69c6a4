"""A plan: the transforms that won, their measured gain, and the exact model, machine and libraries it is valid for."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..machine.cache_dir import expanded
from ..model import route
from ..runtime.variant import Transform, Variant
from ..validate import Latency, Quality, Verdict
from ..workload import Target
from . import codec
from .fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SCHEMA = 1  # raised whenever the meaning of a stored field changes; other schemas are a miss


class TrialOutcome(enum.StrEnum):
    """The outcome of a candidate. `verdict.UNTRIED` and `verdict.UNWANTED` list the outcomes of untried candidates."""

    ACCEPTED = "accepted"  # no worse, and faster
    REJECTED = "rejected"  # clearly worse, not faster, or over a limit
    INCONCLUSIVE = "inconclusive"  # measured, but the figures do not decide
    ERROR = "error"  # it raised
    BLOCKED = "blocked"  # called for, but something other than its figures kept it from being tried or judged
    UNREACHED = "unreached"  # the budget was spent before its turn
    SKIPPED = "skipped"  # not called for: another bottleneck or device, or the roofline promises too little
    UNAVAILABLE = "unavailable"  # not for this model or machine, needs a missing package, or is in use already


@dataclass(frozen=True)
class Trial:
    """One candidate and its outcome.

    Args:
        transform: the candidate, or the first of several transforms that are tried together.
        step: name of the policy step.
        target: phase that the candidate should speed up, or "both".
        outcome: its outcome.
        reason: why, in one sentence with numbers.
        predicted: best-case speed-up of the target phase from the roofline.
        quality: compared with the original; None if it was not judged.
        latency: compared with the variant accepted before; None if it was not timed.
        seconds: time spent on the candidate, including compilation.
        compile_s: part of `seconds` spent on applying and compiling.
        others: the other transforms that are tried together with `transform`.
        instead_of: transforms of the variant accepted before that it replaces.
    """

    transform: Transform
    step: str
    target: Target
    outcome: TrialOutcome
    reason: str
    predicted: float | None = None
    quality: Quality | None = None
    latency: Latency | None = None
    seconds: float = 0.0
    compile_s: float = 0.0
    others: tuple[Transform, ...] = ()
    instead_of: tuple[Transform, ...] = ()

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """All transforms that the candidate adds."""
        return (self.transform, *self.others)

    @property
    def candidate(self) -> str:
        """The candidate in words."""
        names = " + ".join(map(str, self.transforms))
        return f"{names} instead of {' + '.join(map(str, self.instead_of))}" if self.instead_of else names


@dataclass(frozen=True)
class Confirmation:
    """The second look at a variant, on prompts that it was not chosen on (against the winner's curse).

    Args:
        failure: the failure of the workload's largest request, or None.
        quality: compared with the original; None if it was not judged.
        latency: compared with the original; None if it was not timed.
        brief: whether its quality was judged on a few prompts only, which detects only a broken variant.
    """

    failure: str | None = None
    quality: Quality | None = None
    latency: Latency | None = None
    brief: bool = False

    @property
    def holds(self) -> bool:
        return self.latency is not None and self.latency.verdict is Verdict.PASS

    @property
    def is_disproof(self) -> bool:
        """Whether the variant was proven worse or not faster, rather than left open by noise or too little text."""
        if self.latency is not None:
            return self.latency.verdict is Verdict.FAIL and not self.latency.drowned
        return self.quality is not None and self.quality.verdict is Verdict.FAIL

    @property
    def reason(self) -> str:
        """What decided, as a clause that follows "on held-out prompts"."""
        if self.failure is not None:
            return self.failure
        found = self.latency or self.quality
        return found.reason if found else "nothing could be measured"


@dataclass(frozen=True)
class Plan:
    """Transforms in order of application, with the figures that justified them. An empty plan keeps the original."""

    fingerprint: Fingerprint
    transforms: tuple[Transform, ...]
    quality: Quality | None = None  # the whole plan against the original, on held-out prompts
    latency: Latency | None = None  # the whole plan against the original, on held-out prompts
    trials: tuple[Trial, ...] = ()  # everything that was considered, accepted or not
    created: str = ""  # ISO 8601, UTC
    summary: Mapping[str, Any] = field(default_factory=dict)  # the report's dictionary at the time

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Read a plan from a file, as `autotune tune` and `save` write it.

        Raises:
            PlanError: the file cannot be read, or is no plan.
        """
        file = expanded(file)
        try:
            return loads(file.read_bytes())
        except OSError as error:
            raise PlanError(f"{file} cannot be read: {error.strerror}") from error
        except PlanError as error:
            raise PlanError(f"{file}: {error}") from error

    def save(self, file: str | Path) -> None:
        """Write the plan to a file as JSON, in place of what is there."""
        expanded(file).write_text(dumps(self), encoding="utf-8")

    def apply(self, model: PreTrainedModel, *, check: bool = True) -> Variant:
        """Build this plan's variant of `model`. The model itself is not changed.

        Args:
            model: the model to run, routed or not.
            check: whether to refuse a model whose configuration or weights differ from those the plan was made for.

        Raises:
            PlanError: the plan was made for another model.
            TransformError: a transform refuses.
        """
        from . import fingerprint

        original = route.bare(model) if route.is_routed(model) else model
        if check:
            try:
                self.require(fingerprint.of_model(original))
            except PlanError as error:
                raise PlanError(f"{error}, or pass check=False to apply the plan all the same") from None
        return Variant(original).with_transforms(self.transforms)

    def require(self, model: str) -> None:
        """Raise PlanError if the plan was made for another model than that with this fingerprint."""
        if model != self.fingerprint.model:
            raise PlanError(
                f"the plan was made for model {self.fingerprint.model}, this one is {model} (other weights or another "
                "configuration); tune this model"
            )


def to_dict(plan: Plan) -> dict[str, Any]:
    """Convert a plan to plain JSON values. Numbers that are not finite become null."""
    return {"schema": SCHEMA, **codec.encode(plan)}


def from_dict(data: Mapping[str, Any]) -> Plan:
    """Rebuild the plan that `to_dict` converted. Builds only values and registered transforms, and runs nothing.

    Raises:
        PlanError: a wrong schema, unknown or missing keys, wrong types, an unknown transform.
    """
    body = dict(data)
    schema = body.pop("schema", None)
    if schema != SCHEMA:
        raise PlanError(f"the plan's schema is {schema!r}; this version of autotune reads {SCHEMA}: tune again")
    plan: Plan = codec.decode(Plan, body, "plan")
    return plan


def dumps(plan: Plan) -> str:
    """Convert a plan to JSON text."""
    return codec.dumps(to_dict(plan))


def loads(text: str | bytes) -> Plan:
    """Read a plan from JSON text.

    Raises:
        PlanError: the text is not strict JSON, or not a plan.
    """
    data = codec.loads(text)
    if not isinstance(data, dict):
        raise PlanError(f"a plan is a JSON object; found a {type(data).__name__}")
    return from_dict(data)
