"""What a request asks the model to go on from, as token ids, and how long the answer may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .refusal import Refusal
from .tools import ToolUse, conversation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .schema import ChatBody, CompletionBody, Message

DEFAULT_TOKENS = 16  # of a completion that does not say, as OpenAI's


class Prompts:
    """Turns texts and chats into token ids, and checks them against the model's context.

    Args:
        tokenizer: the model's.
        vocabulary: number of tokens that the model knows.
        context: most tokens of prompt and answer together.
        longest: most tokens of a prompt; None: as many as the context holds.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, context: int, longest: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context
        self.longest = min(longest or context, context)

    def of_completion(self, body: CompletionBody) -> list[list[int]]:
        """The prompts of a completion request."""
        given: Any = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        parts = [given] if isinstance(given[0], int) else given
        return [self._checked(self.encode(part) if isinstance(part, str) else list(part), "prompt") for part in parts]

    @property
    def template(self) -> str:
        """The model's chat template; of several, the one for tools.

        Raises:
            Refusal: it has none.
        """
        found = getattr(self.tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("tool_use") or found.get("default")
        if not found:
            raise Refusal(400, "this model has no chat template; use /v1/completions", "messages")
        return str(found)

    def of_chat(self, body: ChatBody, use: ToolUse | None = None) -> list[int]:
        """A chat through the model's own template, with the beginning of its answer.

        Args:
            use: the tools that it may call.
        """
        return self._checked(self.templated(body.messages, body.chat_template_kwargs or {}, use), "messages")

    def templated(self, messages: Sequence[Message], more: dict[str, Any], use: ToolUse | None = None) -> list[int]:
        said = conversation(messages, use, self.template)
        if use is not None and use.style.told:
            more = {"tools": use.signatures, **more}
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **more)
        except Exception as error:  # templates raise what they like, and arguments reach them
            raise Refusal(400, f"the model's chat template refuses these messages: {error}", "messages") from error
        return self.encode(text, special=False)  # the template writes them

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def check_known(self, ids: Sequence[int], param: str) -> None:
        """Raise Refusal for the first id that is not a token."""
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise Refusal(400, f"{param} has token {wrong}; the model knows 0 to {self.vocabulary - 1}", param)

    def room(self, prompt: Sequence[int], asked: int | None, *, chat: bool) -> int:
        """Tokens that the answer may have.

        Raises:
            Refusal: more were asked for than fit into the context.
        """
        left = self.context - len(prompt)
        if asked is not None and asked > left:
            raise Refusal(
                400,
                f"max_tokens is {asked}, but the prompt has {len(prompt)} tokens and the model's context "
                f"{self.context}, which leaves {left}",
                "max_tokens",
                "context_length_exceeded",
            )
        return asked or (left if chat else min(DEFAULT_TOKENS, left))

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise Refusal(400, f"{param} is empty; expected one token or more", param)
        if len(ids) >= self.context or len(ids) > self.longest:
            most = min(self.longest, self.context - 1)
            raise Refusal(
                400,
                f"the prompt has {len(ids)} tokens; the most are {most} (the model's context is {self.context})",
                param,
                "context_length_exceeded",
            )
        self.check_known(ids, param)
        return ids
