"""The built-in texts as prompts, for whoever has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NATURAL_TOKENS = 96  # used of each text that stands in where a workload has too few prompts


def chats(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The texts as token ids: as a user would send them to a chat model, as they are to any other."""
    from .texts import TEXTS

    return [chat(tokenizer, text) for text in TEXTS]


def chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one user message, or of plain text where the tokenizer knows no chat."""
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids
    said = [{"role": "user", "content": text}]
    rendered: Any = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
    return list(rendered["input_ids"])


def natural(tokenizer: PreTrainedTokenizerBase | None) -> tuple[tuple[int, ...], ...]:
    """The beginnings of the texts as token ids, outside of any chat; none without a tokenizer."""
    if tokenizer is None:
        return ()
    from .texts import TEXTS

    return tuple(tuple(tokenizer(text)["input_ids"][:NATURAL_TOKENS]) for text in TEXTS)
