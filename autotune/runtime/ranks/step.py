"""A call that all ranks run at the same time, and that may fail on one of them.

The others then wait for it in a collective. What it does not take part in, they never leave. So it takes part in the
rest: it runs the original from the start, alone up to the collective in which the others wait, and with them from there
on. Its part of the answer is wrong, and nobody keeps the answer; but all ranks come to the end of the call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ...model import seam, sharding
from .. import dispatch
from ..attempt import Attempt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..variant import Variant

log = logging.getLogger("autotune")


def sample(variant: Variant, call: seam.Sampling) -> Any:
    """Serve a call of generate's loop. Raises what the variant raises, after the other ranks are at the end of it."""
    attempt = Attempt(call, variant.device)
    finish = partial(attempt.again, seam.Sampling.original, always=True)
    return _finished(variant, lambda: dispatch.sample(variant, attempt.call), finish)


def forward(variant: Variant, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Serve a direct forward call. Raises what the variant raises, after the other ranks are at the end of it."""
    finish = partial(seam.bare_class(model).forward, variant.original, *args, **kwargs)
    return _finished(variant, lambda: dispatch.forward(variant, model, args, kwargs), finish)


def _finished(variant: Variant, run: Callable[[], Any], finish: Callable[[], Any]) -> Any:
    model = variant.original
    before = sharding.collectives(model)
    try:
        return run()
    except Exception:
        with sharding.alone(model, sharding.collectives(model) - before):
            try:
                finish()
            except Exception:  # of the caller's own processors, which raise on every rank
                log.debug("the rest of a failed call raised, too", exc_info=True)
        raise
