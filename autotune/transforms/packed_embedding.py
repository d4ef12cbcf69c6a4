"""Token embeddings looked up in packed weights, so that no separate table is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import TransformError
from ..model import linear_layers
from ..runtime import kernels
from ..runtime.variant import Stage, Transform
from .linears import FLOATING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from ..diagnose.costs import Profile
    from ..machine.hardware import Hardware
    from ..runtime.variant import Variant
    from ..workload import Phase


@dataclass(frozen=True)
class PackedEmbedding(Transform):
    """Exchange the embedding's table for lm_head's packed weights if the two are tied, else for an INT8 table.

    This saves memory, not time.
    """

    name: ClassVar[str] = "packed_embedding"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    summary: ClassVar[str] = "token embedding looked up in lm_head's packed weights, or in INT8 of its own"

    def unavailable(self, variant: Variant, hardware: Hardware) -> str | None:
        if hardware.device != "cpu":
            return f"it runs on cpu, not on {hardware.device}"
        if (reason := linear_layers.obstacle(variant.original)) is not None:
            return reason
        return self._obstacle(variant) or kernels.available()  # checked last, because it may compile

    def predict(self, profile: Profile, hardware: Hardware) -> Mapping[Phase, float]:
        return dict.fromkeys(self.phases, 1.0)  # in every format, a token reads only a row or two of the table

    def apply(self, variant: Variant) -> None:
        if reason := self._obstacle(variant) or kernels.available():
            raise TransformError(f"{self}: {reason}")
        made: dict[int, nn.Module] = {}  # by table, so that modules that share a table still do
        for twin in variant.edit(self.phase):
            names = linear_layers.embeddings(twin)
            embedding = next(iter(names.values()))
            head = shared(twin, variant.original)
            table = embedding.weight if head is None else head.weight
            if id(table) not in made:
                made[id(table)] = packed_rows(head or quantised(embedding), embedding)
            for name in names:
                twin.set_submodule(name, made[id(table)])

    def took_effect(self, variant: Variant) -> str | None:
        for phase in self.phases:
            if not linear_layers.count(variant.modules[phase], kernels.PackedTable):
                return f"{phase} has no PackedTable"
        return None

    def _obstacle(self, variant: Variant) -> str | None:
        found = {phase: obstacle(variant.modules[phase], variant.original) for phase in self.phases}
        return next((f"{phase}: {reason}" for phase, reason in found.items() if reason is not None), None)


def obstacle(module: PreTrainedModel, original: PreTrainedModel) -> str | None:
    """Why a phase's embedding cannot be packed, or why packing would save nothing; None if it pays."""
    if linear_layers.count(module, kernels.PackedTable):
        return "the embedding is packed already"
    table = next(iter(linear_layers.embeddings(module).values()), None)
    if table is None:
        return "the model's embedding does more than look rows up, or its weight is read elsewhere"
    if table.weight.dtype not in FLOATING:
        return f"it replaces a table in {' or '.join(map(str, FLOATING))}; this is {table.weight.dtype}"
    if tied(original) and shared(module, original) is None:
        return "lm_head shares the embedding's table and is not packed: the table would stay"
    return None


def tied(original: PreTrainedModel) -> bool:
    """Whether embedding and lm_head share one table."""
    head = original.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None and head.weight is original.get_input_embeddings().weight


def shared(module: PreTrainedModel, original: PreTrainedModel) -> kernels.PackedLinear | None:
    """The packed lm_head if it is tied to the embedding, else None."""
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head if tied(original) and isinstance(head, kernels.PackedLinear) else None


def packed_rows(table: kernels.PackedLinear, embedding: nn.Embedding) -> nn.Module:
    """A module that looks rows up in `table` and returns them in the dtype of `embedding`."""
    return kernels.PackedTable(table, embedding.weight.dtype).train(embedding.training)


def quantised(embedding: nn.Embedding) -> kernels.PackedLinear:
    """The embedding's table as INT8."""
    try:
        return kernels.Int8Linear.from_weight(embedding.weight)
    except ValueError as error:  # the format cannot hold these weights
        raise TransformError(f"the embedding cannot be packed: {error}") from error
