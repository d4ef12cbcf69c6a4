"""C++ operators for decoding with narrow weights on a CPU, compiled at first use and cached.

    available()              None once the operators are loaded, otherwise a sentence that says why not
    HalfLinear               FP16 or BF16 weights, FP32 arithmetic
    Int8Linear, Int6Linear, Int4Linear
                             quantised weights in groups; inputs of 16 bits on AVX2 and VNNI, else FP32
    RoundedLinear            the same weights with inputs of 8 bits
    Bf16Linear               BF16 products for many tokens over the weights of any of these, or of an `nn.Linear`
    PackedTable              rows of a packed table, looked up one by one
    attend_one               one query over a preallocated key-value cache; reads only its filled slots
    attend_many              many queries, each over an unbroken span of keys

Read in this order: modules, pack (the layout), compensated, arena, build, then linear.cpp and attention.cpp.
"""

from __future__ import annotations

from torch import Tensor

from autotune.errors import Blocker
from autotune.machine import forking
from autotune.runtime.kernels.bf16 import Bf16Linear
from autotune.runtime.kernels.embedding import PackedTable
from autotune.runtime.kernels.modules import (
    GroupedLinear,
    HalfLinear,
    Int4Linear,
    Int6Linear,
    Int8Linear,
    PackedLinear,
    QuantisedLinear,
    RoundedLinear,
)

__all__ = [
    "Bf16Linear",
    "GroupedLinear",
    "HalfLinear",
    "Int4Linear",
    "Int6Linear",
    "Int8Linear",
    "PackedLinear",
    "PackedTable",
    "QuantisedLinear",
    "RoundedLinear",
    "attend_many",
    "attend_one",
    "available",
    "free_kept",
    "least_digits",
    "no_bf16_unit",
    "no_byte_unit",
]

_lock = forking.lock()
_outcome: list[Blocker | None] = []  # empty until the first call, then why the operators are missing, or None


def available() -> str | None:
    """Load the operators. If this machine has not built them yet, build them first (about half a minute).

    Returns:
        None if they are loaded, otherwise a sentence that says why not, a `Blocker`. The process keeps the answer.
    """
    from autotune.runtime.kernels import build, shapes

    with _lock:
        if not _outcome:
            try:
                build.load()
                shapes.register()
                _outcome.append(None)
            except build.BuildError as reason:
                _outcome.append(Blocker(reason))
        return _outcome[0]


def least_digits() -> tuple[int, ...]:
    """In how many bytes an input must be rounded at least to be multiplied in integers with 8, 6 and 4 bits.

    0: the operators, as they were built, do not multiply those in integers. The operators must be loaded (`available`).
    """
    import torch

    return tuple(torch.ops.autotune.least_digits(bits) for bits in (8, 6, 4))


def free_kept() -> int:
    """Free the memory that operators for prompts keep from call to call, in this thread and those that compute with it.

    Returns:
        Bytes; 0 if the operators are not loaded.
    """
    import torch

    return int(torch.ops.autotune.free_kept()) if _outcome == [None] else 0


def no_bf16_unit() -> str | None:
    """Why `Bf16Linear` cannot run on this processor, or None; the operators must be loaded (`available`)."""
    import torch

    if torch.ops.autotune.bf16_unit():
        return None
    return "this processor cannot multiply BF16: it has neither AMX nor AVX512-BF16"


def no_byte_unit(bits: int = 4) -> str | None:
    """Why `RoundedLinear` cannot run on this processor over weights of 4, 6 or 8 bits, or None.

    The operators must be loaded (`available`).
    """
    import torch

    if torch.ops.autotune.least_digits(bits) == 1:
        return None
    return f"this processor cannot multiply INT{bits} weights by bytes: it has no AVX512-VNNI{' or AVX2' * (bits == 4)}"


def attend_one(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute attention of one new token over a preallocated cache. Query heads share key heads in groups (GQA).

    Args:
        q: [B, H, 1, D].
        keys, values: [B, Hk, slots, D] in FP32, FP16 or BF16, Hk a divisor of H, contiguous in D.
        length: one INT64, the number of filled slots (None: all slots). Later slots are not read, and neither are those
            after the last one that the mask admits. It is a tensor, so that a compiled graph stays valid as it grows.
        mask: [B or 1, H or 1, 1, slots or more than length], boolean (True: attend) or FP32 to add.
        scale: factor of the scores, usually D ** -0.5.

    Returns:
        [B, 1, H, D] in q's dtype, the layout of transformers' attention interface; zeros if the mask admits nothing.

    Raises:
        RuntimeError: the shapes do not match, or length exceeds the slots.
    """
    import torch

    return torch.ops.autotune.attend_one(q, keys, values, length, mask, scale)  # type: ignore[no-any-return]


def attend_many(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor | None, scale: float, parts: int = 0) -> Tensor:
    """Compute attention of a prompt's tokens. Query heads share key heads in groups (GQA).

    Args:
        q: [B, H, Q, D].
        keys, values: [B, Hk, T, D], Hk a divisor of H; values may have another D.
        spans: INT32 [B or 1, Q, 2], the first key that a query sees and the one after its last; None: causal, Q = T.
        scale: factor of the scores, usually D ** -0.5.
        parts: BF16 numbers that an FP32 number is split into for the two products: 1, 2, or 0 for products in FP32.

    Returns:
        [B, Q, H, D] in q's dtype; zeros for a query that sees nothing.

    Raises:
        RuntimeError: the shapes do not match, a span exceeds the keys, or the processor cannot multiply BF16.
    """
    import torch

    return torch.ops.autotune.attend_many(q, keys, values, spans, scale, parts)  # type: ignore[no-any-return]
