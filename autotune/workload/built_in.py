"""The built-in texts as prompts, for callers who have none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NATURAL_TOKENS = 96  # tokens used of each built-in text when a workload has too few prompts


def chats(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The texts as token ids: user messages for a chat model, plain text for any other."""
    from .texts import TEXTS

    return [chat(tokenizer, text) for text in TEXTS]


def chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one user message, or of plain text if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids
    said = [{"role": "user", "content": text}]
    rendered: Any = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
    return list(rendered["input_ids"])


def natural(tokenizer: PreTrainedTokenizerBase | None) -> tuple[tuple[int, ...], ...]:
    """The beginnings of the texts as token ids, without a chat template; none without a tokenizer."""
    if tokenizer is None:
        return ()
    from .texts import TEXTS

    return tuple(tuple(tokenizer(text)["input_ids"][:NATURAL_TOKENS]) for text in TEXTS)
