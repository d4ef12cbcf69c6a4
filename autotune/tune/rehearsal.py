"""Tries a transform on a tiny random model of the user's class, before it is tried on the real model.

Architectures differ in what they keep between tokens: special caches and masks, or positions under other names. It is
not practical to know them all. Instead, a shrunk model of the user's class answers a few requests with and without the
transform. The transform is refused if it raises or gives other tokens. A try takes a tenth of a second and is made once
per process. Problems that a tiny model does not show are left to the quality gate.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..errors import AutotuneError, Blocker, MeasurementError, TransformError
from ..machine import outside, versions
from ..model import route, seam, shrink
from ..runtime.dispatch import serving
from ..runtime.variant import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..machine.hardware import Hardware
    from ..runtime.variant import Transform

log = logging.getLogger("autotune")

NEW_TOKENS = 8  # tokens generated for each request
TIE_NATS = 0.05  # gap between the two best tokens, nats, below which either may come first
LENGTHS = ((10,), (24,), (12, 5, 9))  # prompt lengths of each request; the longer ones exceed a small window
Answer = tuple[torch.Tensor, torch.Tensor]  # tokens [B, N], log-probabilities [B, N, V]
_found: dict[str, str | None] = {}
_models: dict[str, tuple[PreTrainedModel, list[Answer]] | None] = {}  # key -> tiny model and its unrouted answers


def obstacle(model: PreTrainedModel, transform: Transform, hardware: Hardware) -> str | None:
    """Why a transform does not work for a model's class, or None if it works or cannot be tried.

    With releases that autotune was not tested with, the release may be the cause. The reason is then a `Blocker`.
    """
    rehearsed = transform.rehearsed()
    if rehearsed is None:
        return None
    key = _key(model)
    if (found := f"{rehearsed} {key}") not in _found:
        if key not in _models:
            _models[key] = _cast(model)
        cast = _models[key]
        reason = None if cast is None else _difference(*cast, rehearsed, hardware)
        untested = ", ".join(f"{library} {version}" for library, version in versions.untested().items())
        _found[found] = Blocker(f"{reason}; {untested} was not tested") if reason and untested else reason
    return _found[found]


def _cast(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Answer]] | None:
    try:
        tiny = shrink.shrunk(model)
        if tiny is None:
            return None
        plain = route.greedy(tiny, pad_token_id=0)
        expected = [_answer(plain, lengths) for lengths in LENGTHS]
        again = [_answer(plain, lengths) for lengths in LENGTHS]
        differ = any(map(_first_difference, expected, again))
    except Exception as error:  # it was shrunk to something that its class does not support
        outside.pass_on(error)
        log.debug("a tiny %s cannot rehearse", type(model).__name__, exc_info=True)
        return None
    return None if differ else (tiny, expected)


def _difference(tiny: PreTrainedModel, expected: list[Answer], transform: Transform, hardware: Hardware) -> str | None:
    name, plain = type(tiny).__name__, Variant(tiny)
    try:
        if (reason := transform.unavailable(plain, hardware)) is not None:
            log.debug("a tiny %s does not rehearse %s: %s", name, transform, reason)
            return None
        variant = plain.with_transform(transform)
        if (missing := transform.took_effect(variant)) is not None:
            return f"on a tiny {name} it has no effect: {missing}"
        served = route.greedy(serving(variant), pad_token_id=0)
        for lengths, answer in zip(LENGTHS, expected, strict=True):
            got = _answer(served, lengths)
            if transform.lossless and _first_difference(answer, got):
                return f"a tiny {name} gives other tokens with it"
    except MeasurementError as bypassed:
        log.debug("a tiny %s does not rehearse: %s", name, bypassed)
        return None
    except TransformError as refusal:
        return str(refusal)
    except AutotuneError as failure:
        return f"a tiny {name} fails with it: {failure}"
    except Exception as error:
        outside.pass_on(error)
        return f"a tiny {name} raises {type(error).__name__} with it: {' '.join(str(error).split())[:200]}"
    return None


def _answer(model: Any, lengths: tuple[int, ...]) -> Answer:
    """A model's answer to random, left-padded prompts of these lengths."""
    draw = torch.Generator(device="cpu").manual_seed(len(lengths))
    shape = len(lengths), max(lengths)
    ids = torch.randint(3, shrink.VOCABULARY, shape, generator=draw, dtype=torch.int64, device="cpu")
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : shape[1] - length] = 0
    with torch.no_grad():
        out = model.generate(
            ids * mask,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[:, shape[1] :], torch.stack(out.logits, 1).log_softmax(-1)


def _first_difference(expected: Answer, got: Answer) -> bool:
    """Whether the first difference of greedy tokens is not at a near-tie. After a near-tie any token may follow."""
    top = expected[1].topk(2).values  # [B, N, 2]
    for row, margins in enumerate((top[..., 0] - top[..., 1]).tolist()):
        different = (expected[0][row] != got[0][row]).nonzero()
        if len(different) and margins[int(different[0])] > TIE_NATS:
            return True
    return False


def _key(model: PreTrainedModel) -> str:
    cls = seam.bare_class(model)
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return f"{cls.__module__}.{cls.__qualname__} {seam.attention_of(model)} {seam.experts(model)} {config}"
