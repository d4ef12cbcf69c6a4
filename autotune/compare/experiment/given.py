"""Classifies and checks what a caller gives for an arm, without running anything."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import AutotuneError, ExperimentError, nearest
from ...machine.cache_dir import expanded
from ...model import route
from ...runtime.variant import Transform, Variant
from ...tune import policy as policies
from ...tune.plan import Plan
from ...tune.policy import Policy

CONTROL = "control"  # the control's name among the arms
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
EXPECTED = (
    "expected a Variant, a transform or a list of them, a Plan or its .json file, the name of a policy or its .toml"
    " file, or another model, loaded or the path of its checkpoint"
)

Kind = Literal["variant", "transforms", "plan", "policy", "model", "checkpoint"]


@dataclass(frozen=True)
class GivenArm:
    """The value that a caller gave for an arm, with its kind.

    Args:
        value: Variant, tuple of transforms, Plan, Policy, model or path of a checkpoint, depending on `kind`.
    """

    name: str
    kind: Kind
    value: Any


def checked_name(name: str) -> str:
    """Check an experiment's or an arm's name, and return it.

    Raises:
        ExperimentError: the name is not allowed.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ExperimentError(f'the name {name!r} cannot be used; expected up to 64 letters, digits, ".", "_" or "-"')
    return name


def parse(control: Any, candidates: Mapping[str, Any]) -> tuple[GivenArm, dict[str, GivenArm]]:
    """Classify and check the control and the candidates, without running anything.

    Raises:
        ExperimentError: names the arm, what was wrong with it, and what to do.
    """
    if not isinstance(candidates, Mapping) or not candidates:
        raise ExperimentError('there are no candidates; expected candidates={"name": ...} with one or more of them')
    if CONTROL in candidates:
        raise ExperimentError(f"a candidate is called {CONTROL!r}, which is the control's name; give it another name")
    given = {checked_name(name): classify(f"candidate {name!r}", name, value) for name, value in candidates.items()}
    if control is None:
        made = next((g.value.original for g in given.values() if g.kind == "variant"), None)
        if made is None:
            raise ExperimentError("there is no control; expected control=model, the model as it is")
        return GivenArm(CONTROL, "model", made), given
    first = classify(CONTROL, CONTROL, control)
    if first.kind not in ("variant", "model", "checkpoint"):
        raise ExperimentError(
            f"the control is a {first.kind}, which has no model of its own; pass the model as control, or "
            "plan.apply(model) where it should be a plan's variant of it"
        )
    return first, given


def classify(where: str, name: str, value: Any) -> GivenArm:
    """Find the kind of the value given for an arm.

    Raises:
        ExperimentError: the value cannot be compared.
    """
    from torch import nn

    if isinstance(value, (str, os.PathLike)):
        return _named(where, name, os.fspath(value))
    if isinstance(value, Transform):
        return GivenArm(name, "transforms", (value,))
    if isinstance(value, (list, tuple)) and all(isinstance(item, Transform) for item in value):
        return GivenArm(name, "transforms", tuple(value))
    for kind, cls in (("variant", Variant), ("plan", Plan), ("policy", Policy)):
        if isinstance(value, cls):
            return GivenArm(name, kind, value)  # type: ignore[arg-type]  # one of Kind
    if isinstance(value, nn.Module):
        from ...tune.supported import unsupported

        if reason := unsupported(value):
            raise ExperimentError(f"{where}: {reason}")
        bare: Any = route.bare(value) if route.is_routed(value) else value  # type: ignore[arg-type]  # as checked
        return GivenArm(name, "model", bare)
    raise ExperimentError(f"{where} is of type {type(value).__name__}; {EXPECTED}")


def _named(where: str, name: str, text: str) -> GivenArm:
    """Classify text by its spelling: a plan's file, a policy or a checkpoint."""
    from ...model import load

    path = expanded(text)
    try:
        if path.suffix == ".json":
            return GivenArm(name, "plan", Plan.load(path))
        if path.suffix == ".toml" or (text in policies.available() and not path.is_dir()):
            return GivenArm(name, "policy", policies.load(text))
        if path.is_dir() or path.suffix == ".gguf" or os.sep in text:
            return GivenArm(name, "checkpoint", load.locate(text))
    except OSError as error:
        raise ExperimentError(f"{where}: {path} cannot be read: {error.strerror}") from error
    except AutotuneError as error:
        raise ExperimentError(f"{where}: {error}") from error
    known = policies.available()
    raise ExperimentError(
        f"{where}: there is no policy {text!r}{nearest(text, known)}; available: {', '.join(known)} "
        "(a checkpoint is named by its path)"
    )
