"""Checks that releases that autotune was not tested with still work as its routing expects.

A tiny random model of the user's class generates with its calls routed and unrouted, in every way in which a plan
serves. The tokens have to be the same. That takes a fraction of a second. The result is saved for each set of versions,
model class and configuration.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import AutotuneError
from ..machine import cache_dir, outside, versions
from ..machine.hardware import library_versions
from ..model import route, seam, shrink
from ..runtime.dispatch import serving
from ..runtime.variant import Variant

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

log = logging.getLogger("autotune")

MOST_S = 2.0  # seconds of computing after which the check stops; it usually takes 0.25 s
NEW_TOKENS = 4  # tokens generated for each comparison
LONGEST_RESULT = 1 << 16  # bytes of the largest saved result that is read
_found: dict[str, str | None] = {}  # key -> difference that this process found


class DifferenceError(AutotuneError):
    """A routed call behaved differently from an unrouted one."""


def problem(model: PreTrainedModel) -> str | None:
    """Why a model's calls cannot be routed with the installed versions, in a sentence; None if they can.

    Nothing is run if all installed versions were tested.
    """
    others = versions.untested()
    if not others:
        return None
    key = _key(model)
    if key not in _found:
        _found[key] = _kept(key, lambda: difference(model))
    found = _found[key]
    return None if found is None else _sentence(others, found)


def _sentence(others: dict[str, str], found: str) -> str:
    installed = " and ".join(f"{name} {version}" for name, version in others.items())
    tested = "; ".join(f"{name} {versions.known(name)}" for name in others)
    return (
        f"autotune was not tested with {installed}, and does not work with it: {found}. The model is left as it is. "
        f"Known to work: {tested}; install one of these, or a newer autotune"
    )


def difference(model: PreTrainedModel, clock: Callable[[], float] = time.thread_time) -> str | None:
    """What differs between routed and unrouted calls of a tiny model like `model`, or None.

    Args:
        clock: seconds of this thread's computing, so that other work on the machine has no influence.
    """
    from .. import transforms  # noqa: F401 - imported before the clock runs

    end = clock() + MOST_S
    tiny = shrink.shrunk(model)
    own = tiny is not None and _generates(tiny)
    judged: PreTrainedModel = tiny if tiny is not None and own else shrink.llama()
    name = type(judged).__name__
    try:
        for step in _steps(judged):
            if clock() >= end:
                return f"on a tiny {name}, checking whether routed calls are right did not end within {MOST_S:.0f} s"
            step()
    except DifferenceError as found:
        return f"on a tiny {name}, {found}"
    except Exception as error:  # another release may raise anything
        outside.pass_on(error)
        first = " ".join(str(error).split())
        log.debug("the check of untested versions failed", exc_info=True)
        return f"on a tiny {name}, a routed call raises {type(error).__name__}: {first[:200]}"
    return None


def _generates(tiny: PreTrainedModel) -> bool:
    """Whether a shrunk model works unrouted."""
    try:
        _answers(tiny)
    except Exception as error:  # it was shrunk to something that its class does not support
        outside.pass_on(error)
        return False
    return True


def _steps(tiny: PreTrainedModel) -> Iterator[Callable[[], None]]:
    """Yield the comparisons, the basic ones first."""
    from ..transforms.lean_loop import LeanLoop
    from ..transforms.static_cache import StaticCache, no_slots

    if not seam.routable(type(tiny)):
        raise DifferenceError(f"there is no decoding loop named {seam.LOOP!r} to route")
    expected = _answers(tiny)
    seen = _Seen()

    def compare(what: str, served: PreTrainedModel) -> Callable[[], None]:
        def step() -> None:
            for mine, theirs in zip(_answers(served), expected, strict=True):
                if not torch.equal(mine, theirs):
                    raise DifferenceError(f"{what} gives other tokens than the unrouted model")

        return step

    yield compare("a routed call", route.routed(tiny, seen))
    if not seen.calls:
        raise DifferenceError("generate does not go through the loop that is routed")
    if reason := next((r for call in seen.calls if (r := call.unusual()) is not None), None):
        raise DifferenceError(f"generate passes something unknown to its loop: {reason}")
    if not seen.forwards:
        raise DifferenceError("generate does not go through the model's forward")
    twins = Variant(tiny)
    twins.edit("prefill"), twins.edit("decode")
    yield compare("a plan in generate's own loop", route.routed(tiny, _OnFront(twins)))
    if seam.cannot_step(tiny) is None:
        yield compare("the lean loop", serving(Variant(tiny).with_transform(LeanLoop())))
    if no_slots(tiny) is None:
        yield compare("the lean loop over slots", serving(Variant(tiny).with_transform(StaticCache(slots=64))))


def _answers(model: Any) -> list[torch.Tensor]:
    """A model's answers to a padded batch and to a direct forward, as tokens."""
    ids = torch.arange(3, 3 + 18, dtype=torch.int64, device="cpu").view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        batch = route.greedy(model, pad_token_id=0).generate(ids, attention_mask=mask, **how)  # type: ignore[operator]
        read = seam.logits(model(input_ids=ids[:1]))
    return [seam.sequences(batch), read.argmax(-1)]


class _Seen(route.Plain):
    """A router that serves with the original and records the calls."""

    def __init__(self) -> None:
        self.calls: list[seam.Sampling] = []
        self.forwards = 0

    def sample(self, call: seam.Sampling) -> Any:
        self.calls.append(call)
        return super().sample(call)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.forwards += 1
        return super().forward(model, args, kwargs)


class _OnFront(_Seen):
    """A router that serves like a plan without its own loop: generate's loop over the variant's modules."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant

    def sample(self, call: seam.Sampling) -> Any:
        return call.run_on(self.variant.front)


def _key(model: PreTrainedModel) -> str:
    cls = seam.bare_class(model)
    text = json.dumps(
        [sorted(library_versions().items()), cls.__module__, cls.__qualname__, model.config.to_dict()], default=str
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _kept(key: str, find: Callable[[], str | None]) -> str | None:
    """Return the result that an earlier process saved, or else call `find` and save its result."""
    folder = cache_dir.cache("checks")
    path: Path | None = folder and folder / f"{key}.json"
    if path is not None:
        try:
            held = json.loads(cache_dir.read(path, LONGEST_RESULT))["difference"]
            if held is None or isinstance(held, str):
                return held
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the kept check %s is ignored: %s", path, error)
    found = find()
    if path is not None:
        try:
            cache_dir.write(path, [json.dumps({"difference": found}).encode()])
        except OSError as error:
            cache_dir.warn_once(f"the check of the installed versions is not kept: {path.parent}: {error.strerror}")
    return found
