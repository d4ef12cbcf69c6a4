"""Faults that were mended once (issue 11, letters A to E), each brought back by a patch. The fuzzer has to find them.

    python -m tests.fuzz --reverts [NAME ...]

prints for each how many examples and seconds it took, and what was seen of it first.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from autotune.errors import VariantError
from autotune.live import serving
from autotune.live.watch import watch
from autotune.machine import device, outside
from autotune.model import modes, revision, route, seam
from autotune.runtime import attempt, dispatch, variant
from autotune.runtime.cache import slots as cache

EXAMPLES = 15  # in a round
Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Revert:
    """A fault.

    Args:
        letter: of the issue.
        was: what was wrong, in words.
        patches: what brings it back.
    """

    letter: str
    was: str
    patches: tuple[Patch, ...]


def patch(owner: Any, name: str, value: Any) -> Patch:
    return lambda: mock.patch.object(owner, name, value)


def ignored(*_: Any, **__: Any) -> None:
    """Do nothing."""


# A: fallback with a clean state


def over_the_same_cache(self: Any, model: Any) -> Any:
    return replace(self, model=model)


def blamed_forward(self: Any, plan: Any, args: Any, kwargs: Any, original: Any) -> Any:
    try:
        result = dispatch.forward(plan, self._model, args, kwargs)
    except Exception as error:
        raise VariantError(f"forward failed: {error}") from error
    self.served += 1
    return result


def told_again(real: Any) -> Any:
    def init(self: Any, an_attempt: Any, unseen: int = 0) -> None:
        real(self, an_attempt)

    return init


def chosen_again(self: Any, answer: Any) -> Any:
    """Without being led through what the caller has seen."""
    self._device.set_random_state(self._random)
    return answer(self._given.with_fresh_cache(self._given.model))


def unready_raised(real: Any) -> Any:
    def recover(self: Any, fault: Any, theirs: Any, original: Any, call: Any = None) -> Any:
        if fault.unready and theirs is None:
            raise VariantError(fault.reason)
        return real(self, fault, theirs, original, call)

    return recover


# B: whatever changes what the model computes


def tensors_only(self: Any) -> str | None:
    """As snapshots of tensors did it."""
    versions, places = self._marks()
    same = versions == self._versions and places == self._places
    return None if same and not self._model.training else "a tensor"


def sticky(real: Any) -> Any:
    def changed(self: Any) -> str | None:
        self._found = self._found or real(self)
        return self._found

    return changed


# C: the modes of the process


@contextmanager
def leaking(self: Any, phase: Any) -> Iterator[Any]:
    torch.set_num_threads(self.threads.get(phase, torch.get_num_threads()))
    try:
        yield self.modules[phase]
    except Exception as error:
        raise VariantError(str(error)) from error


def room_of_any_dtype(keys: torch.Tensor, rows: int, slots: int, *_: Any) -> torch.Tensor:
    return torch.zeros(rows, keys.shape[1], slots, keys.shape[3])


class _NoMode:
    """torch without inference_mode(False)."""

    def __getattr__(self, name: str) -> Any:
        return nullcontext if name == "inference_mode" else getattr(torch, name)


# E: once, not twice


def called_again(self: Any, model: Any, args: Any, kwargs: Any) -> Any:
    """The original by calling the module, hooks and all."""
    with self._traffic.request():
        plan = self._fresh()
        if plan is None or self.watch.open() or not dispatch.serves_forward(args, kwargs):
            return route.bare(model)(*args, **kwargs)
        return self._serve_forward(plan, args, kwargs, lambda: route.bare(model)(*args, **kwargs))


def copied_whole(model: Any) -> Any:
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


REVERTS: dict[str, Revert] = {
    "cache": Revert(
        "A",
        "the original answers over the cache that the plan half filled",
        (patch(seam.Sampling, "with_fresh_cache", over_the_same_cache),),
    ),
    "random numbers": Revert(
        "A",
        "the original draws from where the plan stopped drawing",
        (patch(device.Device, "set_random_state", ignored),),
    ),
    "stream": Revert(
        "A",
        "streamed tokens are shown again",
        (patch(attempt._Streamer, "__init__", told_again(attempt._Streamer.__init__)),),
    ),
    "asked again": Revert(
        "A",
        "processors and criteria are asked twice for the same token",
        (patch(attempt.Attempt, "again", chosen_again),),
    ),
    "blame": Revert(
        "A",
        "an exception of a caller's object is taken for the plan's failure",
        (patch(attempt.Attempt, "outsiders", ignored),),
    ),
    "forward": Revert(
        "A",
        "a failure in forward reaches the caller as VariantError",
        (patch(serving.Serving, "_serve_forward", blamed_forward),),
    ),
    "batch": Revert(
        "A",
        "a batch that cannot be prepared for ends in an error of ours",
        (patch(serving.Serving, "_recover", unready_raised(serving.Serving._recover)),),
    ),
    "breaker": Revert("A", "a plan that fails is tried at every call", (patch(watch.Watch, "failed", ignored),)),
    "hooks": Revert("B", "hooks are ignored", (patch(revision.Revision, "changed", revision.Revision.differs),)),
    "everything but tensors": Revert(
        "B",
        "forwards, attributes, classes and modules are ignored",
        (patch(revision.Revision, "differs", tensors_only),),
    ),
    "classes": Revert(
        "B", "exchanged classes are ignored", (patch(revision.Revision, "_same_classes", lambda self: True),)
    ),
    "adapters": Revert(
        "B",
        "which adapter is active, and its scale, are ignored",
        (patch(revision, "_inside", lambda value, depth: iter(())), patch(revision, "_held", lambda n, m: iter(()))),
    ),
    "configuration": Revert(
        "B", "the model's own attributes are ignored", (patch(revision.Revision, "_attributes", lambda self: {}),)
    ),
    "writes": Revert(
        "B",
        "writes into tensors are ignored",
        (patch(revision.Revision, "_marks", lambda self: ([], [])), patch(revision, "_probes", lambda samples: [])),
    ),
    "writes without a mark": Revert(
        "B",
        "writes through .data and by fused optimizers are ignored",
        (patch(revision, "_probes", lambda samples: []),),
    ),
    "no way back": Revert(
        "B",
        "a change that was undone leaves the plan stale",
        (patch(revision.Revision, "changed", sticky(revision.Revision.changed)),),
    ),
    "default dtype": Revert(
        "C", "slots are made in the process's default dtype", (patch(cache, "_room", room_of_any_dtype),)
    ),
    "inference mode": Revert(
        "C", "slots first made in inference mode cannot be written outside", (patch(cache, "torch", _NoMode()),)
    ),
    "autocast": Revert("C", "plans serve under autocast and torch.func", (patch(modes, "unserved", ignored),)),
    "threads": Revert("C", "a plan's number of threads stays", (patch(variant.Variant, "running", leaking),)),
    "alarm": Revert(
        "D",
        "an alarm of the caller's is taken for the plan's failure",
        (patch(outside, "delivered", ignored),),
    ),
    "hooks twice": Revert("E", "hooks on the model act twice", (patch(serving.Serving, "forward", called_again),)),
    "copies": Revert(
        "E",
        "users' objects are copied with the model: locks raise, methods count elsewhere",
        (patch(variant, "fork", copied_whole),),
    ),
}


@dataclass(frozen=True)
class Found:
    """Args:
    examples: until it was found; None: it was not.
    seconds: spent.
    how: what was seen.
    """

    examples: int | None
    seconds: float
    how: str


def find(revert: Revert, minutes: float, seed: int) -> Found:
    """Fuzz with a fault until it is found."""
    from tests.fuzz.__main__ import round_of
    from tests.fuzz.pair import COUNTS

    start, before = time.monotonic(), COUNTS["examples"]
    with ExitStack() as stack:
        for each in revert.patches:
            stack.enter_context(each())
        while time.monotonic() - start < 60 * minutes:
            if (finding := round_of(seed, EXAMPLES, shrink=False)) is not None:
                return Found(COUNTS["examples"] - before, time.monotonic() - start, finding.splitlines()[-1])
            seed += 1
    return Found(None, time.monotonic() - start, "")


def main(names: list[str], minutes: float, seed: int) -> int:
    print("| fault brought back | letter | examples | s | seen first |\n|---|---|---|---|---|", flush=True)
    missed = 0
    for name in names or REVERTS:
        found = find(REVERTS[name], minutes, seed)
        missed += found.examples is None
        examples = "not found" if found.examples is None else str(found.examples)
        how = found.how.split("mode=")[-1][:160].replace("|", "/")
        print(
            f"| {name}: {REVERTS[name].was} | {REVERTS[name].letter} | {examples} | {found.seconds:.0f} | {how} |",
            flush=True,
        )
    return 1 if missed else 0
