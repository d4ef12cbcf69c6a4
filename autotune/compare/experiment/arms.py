"""Arms: the things that an experiment compares, built into variants that can be run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ... import workload
from ...errors import DeviceError, ExperimentError, PlanError, TransformError, in_words
from ...machine import outside
from ...model import configured
from ...report import numbers as n
from ...runtime.variant import Transform, Variant
from ...tune.plan import Plan
from ...tune.policy import Policy
from ...workload import Workload
from .given import CONTROL, GivenArm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Args:
        name: "control", or the candidate's name.
        description: the arm in words.
        variant: the variant that runs; None if it could not be built.
        fingerprint: hash of what it computes; observations of different fingerprints are never mixed.
        problem: why it cannot be run, or None.
        unjudged: why its quality cannot be compared with the control's (another tokenizer), or None.
        notes: facts that a reader should know, such as how much memory both models take.
    """

    name: str
    description: str
    variant: Variant | None
    fingerprint: str
    problem: str | None = None
    unjudged: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ArmBuilder:
    """Builds arms.

    Args:
        model: the control's model, unrouted.
        tokenizer: its tokenizer, or None.
        work: the workload that the variants are made for.
        notify: called with a sentence for each step.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    work: Workload
    notify: Callable[[str], None]

    def control(self, given: GivenArm) -> Arm:
        """Build the control's arm."""
        variant = given.value if given.kind == "variant" else Variant(self.model, None, self.work)
        return Arm(CONTROL, describe(variant), variant, fingerprint(variant))

    def candidate(self, given: GivenArm) -> Arm:
        """Build a candidate's arm. An error of the candidate becomes the arm's `problem`.

        Raises:
            DeviceError: the device is dead for this process.
        """
        self.notify(f"building {given.name}")
        try:
            return self._built(given)
        except DeviceError:
            raise
        except Exception as error:
            outside.pass_on(error)
            why = in_words(error)
            return Arm(given.name, given.kind, None, f"{given.kind} that could not be built", problem=why)

    def _built(self, given: GivenArm) -> Arm:
        match given.kind:
            case "variant" if not is_same(given.value.original, self.model):
                return self._other(given.name, given.value, None)
            case "variant":
                return _arm(given.name, given.value)
            case "transforms":
                return _arm(given.name, self._with(given.value))
            case "plan":
                return _arm(given.name, self._planned(given.value))
            case "policy":
                return self._tuned(given.name, given.value)
            case "model":
                return self._other(given.name, Variant(given.value, None, self.work), None)
            case "checkpoint":
                return self._loaded(given.name, given.value)

    def _with(self, transforms: tuple[Transform, ...]) -> Variant:
        variant = Variant(self.model, None, self.work).with_transforms(transforms)
        for transform in variant.transforms:
            if missing := transform.took_effect(variant):
                raise TransformError(f"{transform} had no effect: {missing}")
        return variant

    def _planned(self, plan: Plan) -> Variant:
        from ...tune import fingerprint as fingerprints

        if (found := fingerprints.of_model(self.model)) != plan.fingerprint.model:
            raise PlanError(f"the plan was made for model {plan.fingerprint.model}, the control is {found}")
        return self._with(plan.transforms)

    def _tuned(self, name: str, policy: Policy) -> Arm:
        from ...tune.run import tune

        tuned = tune(self.model, self.work, policy, tokenizer=self.tokenizer, notify=self.notify)
        about = f"policy {policy.name}: {describe(tuned.variant)}"
        return Arm(name, about, tuned.variant, fingerprint(tuned.variant), notes=(tuned.verdict,))

    def _loaded(self, name: str, path: Path) -> Arm:
        from ...machine import device as devices
        from ...model import load

        needs, free = _weights_bytes(path), devices.of(self.model).memory().free
        if needs > free:
            raise ExperimentError(
                f"both models must be in memory at once: {path} takes {n.scaled(needs, 'B')}, "
                f"{n.scaled(free, 'B')} are free on {self.model.device}"
            )
        model, tokenizer = load.load(path, device=self.model.device)
        return self._other(name, Variant(model, None, self.work), tokenizer)

    def _other(self, name: str, variant: Variant, tokenizer: PreTrainedTokenizerBase | None) -> Arm:
        """Build an arm of another model than the control's."""
        from ...model.linear_layers import stored_bytes

        model = variant.original
        if model.device != self.model.device:
            raise ExperimentError(f"its model is on {model.device}, the control's on {self.model.device}: move it")
        unjudged = self._stranger(model, tokenizer)
        fit_prompts(self.work, model)  # raises if its context is too short
        sizes = (n.scaled(stored_bytes(m), "B") for m in (self.model, model))
        notes = [f"both models are in memory: {' and '.join(sizes)} of weights"]
        if unjudged is None and (tokenizer is None or self.tokenizer is None):
            notes.append("taken to have the control's tokenizer, since the vocabularies are equally large")
        if unjudged is not None:
            notes.append("times are per token of its own tokenizer, which is not the same amount of text")
        return replace(_arm(name, variant), unjudged=unjudged, notes=tuple(notes))

    def _stranger(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
        """Why a model's quality cannot be compared with the control's token by token, or None."""
        sizes = [configured.vocabulary(m) for m in (model, self.model)]
        if sizes[0] != sizes[1]:
            return f"it has another tokenizer (a vocabulary of {sizes[0]}, the control's {sizes[1]})"
        if tokenizer is None or self.tokenizer is None:
            return None
        same: bool = tokenizer.get_vocab() == self.tokenizer.get_vocab()
        return None if same else "it has another tokenizer (an equally large vocabulary of other tokens)"


def fit_prompts(work: Workload, model: PreTrainedModel) -> Workload:
    """Map the prompts to ids that a model with a smaller vocabulary knows. The shapes stay, which is enough to time it.

    Raises:
        WorkloadError: the model's context is too short.
    """
    size = configured.vocabulary(model)
    return workload.read(
        replace(work, prompts=tuple(tuple(t % size for t in prompt) for prompt in work.prompts)), model=model
    )


def is_same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two objects are the same model. An unrouted model is another object with the same modules."""
    return model.__dict__["_modules"] is other.__dict__["_modules"]


def describe(variant: Variant) -> str:
    """Describe a variant in words."""
    from ...tune.run import name_of

    made = " + ".join(map(str, variant.transforms)) or "as it is"
    return f"{Path(name_of(variant.original)).name}, {made}"


def fingerprint(variant: Variant) -> str:
    """Hash a variant's model and its transforms, or its modules if they were changed without transforms."""
    from ...tune import codec
    from ...tune import fingerprint as fingerprints

    parts = [fingerprints.of_model(variant.original)]
    if not variant.transforms and any(m is not variant.original for m in variant.modules.values()):
        parts += [fingerprints.of_model(module) for module in variant.modules.values()]
    for transform in variant.transforms:
        try:
            parts.append(json.dumps(codec.encode(transform), sort_keys=True))
        except PlanError:  # its parameters are not plain values
            parts.append(str(transform))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _arm(name: str, variant: Variant) -> Arm:
    return Arm(name, describe(variant), variant, fingerprint(variant))


def _weights_bytes(path: Path) -> int:
    """Bytes of a checkpoint's stored weights; 0 for a name on the hub, whose files are not here yet."""
    if path.is_file():
        return path.stat().st_size
    return next((size for p in WEIGHT_FILES if (size := sum(f.stat().st_size for f in path.glob(p)))), 0)
