"""What a model's configuration says of its texts: the vocabulary, the context, and how a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..workload import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# keys of a configuration that say nothing of what is computed: the class, the tensors and the libraries' versions do
TRANSIENT = frozenset(
    {
        *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"),
        "_experts_implementation_internal",  # on a GPU, generate exchanges it while it decodes
    }
)


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the part that reads and writes text."""
    return model.config.get_text_config(decoder=True)


def vocabulary(model: PreTrainedModel) -> int:
    """Width of the model's logits."""
    return int(text_config(model).vocab_size)


def context(model: PreTrainedModel) -> int | None:
    """Tokens that the model was made for; None if its configuration does not say, or says that there is no limit."""
    return context_of(text_config(model))


def end_ids(config: Any) -> tuple[int, ...]:
    """The end-of-sequence ids of generation settings or a tokenizer; none if there are none."""
    ends = None if config is None else config.eos_token_id
    return () if ends is None else (int(ends),) if isinstance(ends, int) else tuple(ends)


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Return `tokens` up to and including the first end-of-sequence token."""
    found = [k for k, token in enumerate(tokens) if token in ends]
    return tuple(tokens[: found[0] + 1] if found else tokens)
