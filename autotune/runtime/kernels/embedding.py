"""An embedding over a packed table."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autotune.runtime.kernels.modules import PackedLinear


class PackedTable(nn.Module):
    """An embedding that looks rows up in the weights of a packed linear layer. The operators must be loaded.

    Args:
        table: the layer [num_embeddings, embedding_dim] whose rows are looked up, and whose weights are shared; lm_head
            if the two are tied.
        dtype: dtype of the rows that it returns.
    """

    weight: Tensor  # in the layer's layout
    scales: Tensor | None
    zeros: Tensor | None

    def __init__(self, table: PackedLinear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.num_embeddings = table.out_features
        self.embedding_dim = table.in_features
        for name in ("weight", "scales", "zeros"):
            self.register_buffer(name, getattr(table, name, None))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows [..., embedding_dim] of integer ids [...]."""
        rows: Tensor = torch.ops.autotune.packed_rows(
            ids, self.weight, self.scales, self.zeros, self.num_embeddings, self.embedding_dim
        )
        return rows if self.dtype is torch.float32 else rows.to(self.dtype)

    def widened(self) -> PackedTable:
        """An embedding over the same memory that returns the rows in FP32."""
        wide = copy.copy(self)
        wide.dtype = torch.float32
        return wide

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
