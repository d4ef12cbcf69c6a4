"""Candidates whose time passes on a made-up clock, and whose answers are made worse on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from autotune.runtime.variant import Stage, Transform, Variant
from autotune.workload import Workload
from tests.models import token_prompts

PREFILL_S = 0.1
WORK = Workload(tuple(map(tuple, token_prompts(6, 14))), new_tokens=4, batch_sizes=(1, 4))


class Clock:
    """Seconds that only pass where a `Cost` says so."""

    def __init__(self) -> None:
        self.now_s = 1.0

    def __call__(self) -> float:
        return self.now_s


CLOCK = Clock()


@dataclass(frozen=True)
class Cost(Transform):
    """A phase takes made-up time on `CLOCK`.

    Args:
        decode_s, batch_s: of a token at batch 1, and at larger batches.
        fails_at: batch size at which it raises; 0: never.
    """

    decode_s: float = 0.03
    batch_s: float = 0.03
    fails_at: int = 0

    name: ClassVar[str] = "cost"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "a test's cost"

    def apply(self, variant: Variant) -> None:
        (prefill,), (decode,) = variant.edit("prefill"), variant.edit("decode")

        def decode_s(batch: int) -> float:
            if batch == self.fails_at:
                raise RuntimeError("no kernel image")
            return self.decode_s if batch == 1 else self.batch_s

        charge(prefill, lambda batch: PREFILL_S)
        charge(decode, decode_s)

    def took_effect(self, variant: Variant) -> None: ...


@dataclass(frozen=True)
class Corrupt(Transform):
    """Half of lm_head's rows belong to other tokens."""

    name: ClassVar[str] = "corrupt"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "a test's corruption"

    def apply(self, variant: Variant) -> None:
        for twin in variant.edit("both"):
            head: Any = twin.get_output_embeddings()
            weight = head.weight.detach().clone()
            weight[: len(weight) // 2] = weight[: len(weight) // 2].flip(0)
            head.weight = torch.nn.Parameter(weight, requires_grad=False)

    def took_effect(self, variant: Variant) -> str | None:
        return None


def charge(module: Any, takes_s: Any) -> None:
    inner = module.forward

    def forward(input_ids: Any, **kwargs: Any) -> Any:
        CLOCK.now_s += takes_s(input_ids.shape[0])
        return inner(input_ids=input_ids, **kwargs)

    module.forward = forward


def costing(model: Any, *, corrupt: bool = False, **cost: Any) -> Variant:
    """The model on the made-up clock."""
    variant = Variant(model, None, WORK)
    return variant.with_transforms((*([Corrupt("both")] if corrupt else []), Cost("both", **cost)))
