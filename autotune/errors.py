"""Everything autotune raises on purpose, and errors in words.

    AutotuneError
    ├── UnsupportedModelError   the model cannot be tuned: not a causal LM, on meta tensors, in training mode, ...
    ├── WorkloadError           prompts that are empty, too long, not token ids, or need a tokenizer
    ├── PolicyError             a policy that is unknown or malformed; names file, step and nearest spelling
    ├── PlanError               a plan file that is corrupt, foreign or refused
    ├── BaselineError           a recorded baseline that is foreign, of a later schema, or not of this model's kind
    ├── ExperimentError         an experiment's arms, file or store cannot be used; names the nearest spelling
    ├── SettingsError           a server's options cannot be used: an empty key, options that exclude each other
    ├── TransformError          a transform cannot do what it was asked to (expected: the candidate is set aside)
    │   └── ChoiceError         no such transform, parameter, value or phase; names the nearest spelling
    ├── VariantError            a variant's own module or kernel failed while it ran (the original takes over)
    │   └── UnreadyError        the slots or the recorded step for a batch of that size could not be made
    ├── RequestError            a request was not served, though nothing is wrong with the plan
    │   ├── QueueFullError      more requests wait to be decoded than may
    │   ├── DeadlineError       the request's deadline passed before it was finished
    │   └── CancelledRequestError   the caller has cancelled the request
    ├── MeasurementError        a number that was needed could not be measured
    │   └── BudgetSpentError    the budget ended while a candidate was judged (it counts as not tried)
    ├── PackageError            an optional package is missing; names the line that installs it
    ├── DeviceError             the device cannot do this, or is dead for this process (nothing is retried on it)
    └── StateError              the handle cannot do this now (commit without a plan, rollback without the original)

Modules have subclasses of their own, for what only their callers tell apart. Messages say what was wrong, what was
expected and what to do. Any other exception that escapes is a bug.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

LIBRARIES = frozenset({"autotune", "transformers", "torch"})  # packages whose frames `warn` skips


class AutotuneError(Exception):
    """Root of autotune's own errors."""


class UnsupportedModelError(AutotuneError):
    """The model cannot be tuned as it is."""


class WorkloadError(AutotuneError, ValueError):
    """The prompts given as a workload cannot be used."""


class PolicyError(AutotuneError, ValueError):
    """A policy is unknown or malformed."""


class PlanError(AutotuneError, ValueError):
    """A plan is corrupt, foreign to this model or machine, or refused."""


class BaselineError(AutotuneError, ValueError):
    """A recorded baseline is foreign, of another schema, or cannot be compared with this model."""


class ExperimentError(AutotuneError, ValueError):
    """An experiment's arms or file are malformed, or its store cannot be used."""


class SettingsError(AutotuneError, ValueError):
    """The options of a server cannot be used, or exclude each other."""


class TransformError(AutotuneError):
    """A transform cannot be applied to this variant."""


class ChoiceError(TransformError, ValueError):
    """A transform, parameter, value or phase does not exist."""


class VariantError(AutotuneError):
    """A variant's own module or kernel failed while it ran."""


class UnreadyError(VariantError):
    """The slots or the recorded step that a variant needs for a batch of that size could not be made."""


class RequestError(AutotuneError, RuntimeError):
    """A request was not served, though nothing is wrong with the plan."""


class QueueFullError(RequestError):
    """More requests wait to be decoded than may."""


class DeadlineError(RequestError, TimeoutError):
    """The deadline of a request passed before it was finished."""


class CancelledRequestError(RequestError):
    """The caller has cancelled the request."""


class MeasurementError(AutotuneError):
    """A number that was needed could not be measured."""


class BudgetSpentError(MeasurementError):
    """The budget of a tuning ended while a candidate was being judged."""


class PackageError(AutotuneError, ImportError):
    """An optional package that the operation needs is not installed."""


class DeviceError(AutotuneError, RuntimeError):
    """The device cannot do what was asked, or failed permanently in this process."""


class StateError(AutotuneError, RuntimeError):
    """The operation is not possible in the present state."""


def in_words(error: BaseException, own: type[AutotuneError] = AutotuneError) -> str:
    """Describe an error: autotune's own errors by their message alone, others by type and message.

    Args:
        own: class of autotune's errors whose message is enough.
    """
    return str(error) if isinstance(error, own) else f"{type(error).__name__}: {error}"


def first_line(error: BaseException, *, typed: bool = True) -> str:
    """Return the first line of an error's message, since compilers and drivers write pages; its type if it has none.

    Args:
        typed: whether the type precedes the message.
    """
    said = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *said] if typed or not said else said)


def warn(problem: str) -> None:
    """Issue a RuntimeWarning that points to the user's line, however many library calls are in between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"autotune: {problem}", RuntimeWarning, stacklevel=level)


class Blocker(str):
    """A reason of `Transform.unavailable` that the user can fix and may want to fix.

    A plain reason comes from the model, the machine or the installed packages: nothing is wrong. A blocker prevents
    something that should work here: a compiler is missing or failed, or autotune does not know how a model is called.
    A search never skips a blocker silently.
    """

    __slots__ = ()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean '...'?" with the most similar known word, or "" if none is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
