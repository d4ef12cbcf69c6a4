"""What the layers of a model read while it reads texts that it wrote itself.

Such texts are nobody's: no exam holds them, no plan has to store them, and every process that has the model can write
them again (Williams et al. 2024, arXiv:2410.17170, calibrate quantisation with them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model import configured, route

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, LENGTH = 48, 64  # texts and their tokens
WARMTH = 0.7  # temperature of the draw; at 1, a small model soon writes what no text looks like


class _EndError(Exception):
    """Every layer has read."""


class _Draw:
    """A logits processor with which greedy decoding draws from the distribution: it adds Gumbel noise to the scores.

    The process's own generator of random numbers, from which a caller may be drawing, stays as it is.
    """

    def __init__(self, chance: torch.Generator) -> None:
        self.chance = chance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape, device="cpu", dtype=torch.float32).exponential_(generator=self.chance)
        return scores.float() / WARMTH - noise.to(scores.device).log()


@torch.no_grad()
def written(model: PreTrainedModel) -> Tensor:
    """Let a model write texts [ROWS, LENGTH], or shorter ones if its context is. They are the same at every call."""
    chance = torch.Generator("cpu").manual_seed(0)
    length = min(LENGTH, configured.context(model) or LENGTH)
    vocabulary = configured.vocabulary(model)
    first = torch.randint(vocabulary, (ROWS, 1), generator=chance, device="cpu", dtype=torch.int64).to(model.device)
    writer: Any = route.greedy(route.bare(model), pad_token_id=0)
    written: Tensor = writer.generate(
        first,
        attention_mask=torch.ones_like(first),
        max_new_tokens=length - 1,
        logits_processor=[_Draw(chance)],
    )
    return written


@torch.no_grad()
def read(
    model: PreTrainedModel, ids: Tensor, layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]
) -> None:
    """Let a model read texts once, and pass on what some of its layers read.

    Args:
        model: a twin; it is as before afterwards.
        ids: [R, T].
        layers: name -> layer of the model.
        take: called with a layer's name and its input [R, T, K], once for each layer that reads anything.
    """
    waiting, head = dict(layers), model.get_output_embeddings()  # type: ignore[no-untyped-call]

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
            if waiting.pop(name, None) is not None and given:
                take(name, given[0])

        return note

    def stop(layer: nn.Module, given: tuple[Any, ...]) -> None:
        raise _EndError  # nothing reads after it, and logits of all places would take more memory than the model

    hooks = [layer.register_forward_pre_hook(noting(name)) for name, layer in layers.items()]
    if head is not None:
        hooks.append(head.register_forward_pre_hook(stop))
    try:
        reader: Any = model
        reader(input_ids=ids, use_cache=False)
    except _EndError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
