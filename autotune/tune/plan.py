"""A plan: the transforms that won, what they won, and for exactly which model, machine and libraries."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..model import route
from ..runtime.variant import Transform
from ..validate import Latency, Quality, Verdict
from ..workload import Target
from . import codec
from .fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.variant import Variant

SCHEMA = 1  # raised whenever the meaning of a stored field changes; other schemas are a miss


class Outcome(enum.StrEnum):
    """What became of a candidate. Whether it was tried is a question apart: `verdict.UNTRIED`, `verdict.UNWANTED`."""

    ACCEPTED = "accepted"  # no worse, and faster
    REJECTED = "rejected"  # surely worse, not faster, or over a limit
    INCONCLUSIVE = "inconclusive"  # measured, and the figures do not decide
    ERROR = "error"  # it raised
    BLOCKED = "blocked"  # called for, and something other than its figures kept it from being tried or judged
    UNREACHED = "unreached"  # the budget was spent before its turn
    SKIPPED = "skipped"  # not called for: another bottleneck or device, or the roofline promises too little
    UNAVAILABLE = "unavailable"  # not for this model or machine, needs a package that is not there, or is in use


@dataclass(frozen=True)
class Trial:
    """One candidate and what became of it.

    Args:
        transform: the candidate, or the first of several that are tried at once.
        step: name of the policy step.
        target: what it should speed up.
        outcome: what became of it.
        reason: one sentence with numbers.
        predicted: best-case speed-up of the target phase from the roofline.
        quality: against the original; None when it did not come to that.
        latency: against the variant accepted before; None when it did not come to that.
        seconds: time spent on it, compilation included.
        compile_s: share of that spent applying and compiling.
        others: those that are tried at once with it.
        instead_of: transforms of the variant accepted before that are left out for it.
    """

    transform: Transform
    step: str
    target: Target
    outcome: Outcome
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
        """All that it adds."""
        return (self.transform, *self.others)

    @property
    def candidate(self) -> str:
        """What was tried, in words."""
        names = " + ".join(map(str, self.transforms))
        return f"{names} instead of {' + '.join(map(str, self.instead_of))}" if self.instead_of else names


@dataclass(frozen=True)
class Confirmation:
    """The second look at a variant, on prompts that it was not chosen on (against the winner's curse).

    Args:
        failure: what went wrong with the workload's largest request, or None.
        quality: against the original; None when it did not come to that.
        latency: against the original; None when it did not come to that.
        brief: whether its quality was looked at on a few prompts alone, which can turn down what is broken and no more.
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
        """Whether it turned the variant down on its merits, not for noise or too little text."""
        if self.latency is not None:
            return self.latency.verdict is Verdict.FAIL and not self.latency.drowned
        return self.quality is not None and self.quality.verdict is Verdict.FAIL

    @property
    def reason(self) -> str:
        """What decided, in a sentence that follows "on held-out prompts"."""
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

    def apply(self, model: PreTrainedModel, *, check: bool = True) -> Variant:
        """The variant that this plan makes of `model`; the model itself is not touched.

        Args:
            model: the model to run, routed or not.
            check: refuse a model whose configuration or weights are not those that the plan was made for.

        Raises:
            PlanError: the plan was made for another model.
            TransformError: a transform refuses.
        """
        from ..runtime import variant
        from . import fingerprint

        original = route.bare(model) if route.is_routed(model) else model
        if check and (found := fingerprint.of_model(original)) != self.fingerprint.model:
            raise PlanError(
                f"the plan was made for model {self.fingerprint.model}, this one is {found} (other weights or another "
                "configuration); tune this model, or pass check=False to apply the plan all the same"
            )
        return variant.build(original, self.transforms)


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values; numbers that are not finite become null."""
    return {"schema": SCHEMA, **codec.encode(plan)}


def from_dict(data: Mapping[str, Any]) -> Plan:
    """The plan of `to_dict`. Builds values and registered transforms, runs nothing.

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
    """The plan as JSON text."""
    return codec.dumps(to_dict(plan))


def loads(text: str | bytes) -> Plan:
    """The plan in JSON text.

    Raises:
        PlanError: it is not strict JSON, or not a plan.
    """
    data = codec.loads(text)
    if not isinstance(data, dict):
        raise PlanError(f"a plan is a JSON object; found a {type(data).__name__}")
    return from_dict(data)
