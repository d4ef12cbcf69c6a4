"""What a request asks the model to go on from, as token ids, and how long the answer may be."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from .detokenise import decoded
from .refusal import Refusal
from .tools import ToolUse, conversation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .schema import ChatBody, CompletionBody, Message, Templated

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
        self.most = min(longest or context, context - 1)  # tokens of a prompt: one more must fit

    def of_completion(self, body: CompletionBody) -> list[list[int]]:
        """The prompts of a completion request."""
        return [
            self._checked(self.encode(each, "prompt") if isinstance(each, str) else each, "prompt")
            for each in body.prompt
        ]

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
        return self._checked(self.templated(body.messages, body, use), "messages")

    def templated(self, messages: Sequence[Message], by: Templated, use: ToolUse | None = None) -> list[int]:
        """Messages through the model's own template, with the beginning of an answer.

        Args:
            by: has the template's variables.
            use: the tools that the answer may call.

        Raises:
            Refusal: the template does not take them, or what it writes is too long.
        """
        variables = self._variables(by.chat_template_kwargs)
        if use is not None and use.style.told:
            variables["tools"] = use.signatures
        said = conversation(messages, use, self.template)
        text = self._rendered(said, variables)
        named = [number for number, each in enumerate(messages) if each.name is not None and each.role != "tool"]
        if named and text == self._rendered([{**each, "name": None} for each in said], variables):
            param = f"messages.{named[0]}.name"
            raise Refusal(400, f"{param}: this model's chat template writes no names; leave it out", param)
        return self.encode(text, "messages", special=False)  # the template writes them

    def encode(self, text: str, param: str, special: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            param: the field that it comes from.
            special: whether the tokenizer adds its special tokens.

        Raises:
            Refusal: it cannot fit into the context.
        """
        if len(text) > self.most * self._widest:
            raise Refusal(
                400,
                f"{param} has {len(text)} characters; a prompt has at most {self.most} tokens (the model's context is "
                f"{self.context}) of {self._widest} characters or fewer, so it cannot fit",
                param,
                "context_length_exceeded",
            )
        return [int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def decode(self, ids: Sequence[int], param: str) -> str:
        """The text of some tokens.

        Args:
            param: the field that they come from.

        Raises:
            Refusal: they are more than the context holds, or one is no token.
        """
        if len(ids) > self.context:
            raise Refusal(
                400,
                f"{param} has {len(ids)} tokens; the most are {self.context}, the model's context; send them in parts",
                param,
                "context_length_exceeded",
            )
        self.check_known(ids, param)
        return decoded(self.tokenizer, ids)

    def check_known(self, ids: Sequence[int], param: str) -> None:
        """Raise Refusal for the first id that is not a token."""
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise Refusal(400, f"{param} has token {wrong}; the model knows 0 to {self.vocabulary - 1}", param)

    def room(self, prompt: Sequence[int], asked: int | None, *, chat: bool, param: str = "max_tokens") -> int:
        """Tokens that the answer may have.

        Args:
            prompt: token ids.
            asked: most that the request wants; None: it does not say.
            chat: whether an answer that does not say may fill the context.
            param: the field that says it.

        Raises:
            Refusal: more were asked for than fit into the context.
        """
        left = self.context - len(prompt)
        if asked is not None and asked > left:
            raise Refusal(
                400,
                f"{param} is {asked}, but the prompt has {len(prompt)} tokens and the model's context "
                f"{self.context}, which leaves {left}",
                param,
                "context_length_exceeded",
            )
        return asked or (left if chat else min(DEFAULT_TOKENS, left))

    @cached_property
    def _widest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _rendered(self, said: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:  # templates raise what they like
            raise Refusal(400, f"the model's chat template refuses these messages: {error}", "messages") from error
        return text

    def _variables(self, given: dict[str, Any]) -> dict[str, Any]:
        """Variables of the template, none of which is an argument of the method that renders it.

        Raises:
            Refusal: one is, or the template does not know it.
        """
        if not given:
            return {}
        rendering = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "conversations", "messages"}
        known = {value for _, kind, value in Environment(autoescape=True).lex(self.template) if kind == "name"}
        for name in given:
            param = f"chat_template_kwargs.{name}"
            if name in rendering:
                raise Refusal(400, f"{param} is the server's to set, not a variable of the template", param)
            if name not in known:
                raise Refusal(400, f"{param}: the model's chat template has no such variable; leave it out", param)
        return dict(given)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise Refusal(400, f"{param} is empty; expected one token or more", param)
        if len(ids) > self.most:
            raise Refusal(
                400,
                f"the prompt has {len(ids)} tokens; the most are {self.most} (the model's context is {self.context})",
                param,
                "context_length_exceeded",
            )
        self.check_known(ids, param)
        return ids
