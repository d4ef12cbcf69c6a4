"""Bodies of requests, as OpenAI names their fields. Every unknown field is an error that names it."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StringConstraints,
    field_validator,
    model_validator,
)

from ..runtime.batching.terms import MOST_WAITING
from .fields import Body, Neutral, Object, Text, encodable, wrong
from .forms import Form

MOST_STOPS = 16  # stop strings of a request; OpenAI allows 4
MOST_CHOICES = 16  # answers to one prompt
MOST_LOGPROBS = 20  # alternatives for each token, OpenAI's limit
MOST_PROMPTS = 64  # prompts of one completion request
MOST_ANSWERS = MOST_WAITING // 2  # to one request; the other half of the queue is for others
MOST_PARTS = 4096  # of all messages of a chat; they are validated in the event loop
MOST_BIASES = 300  # OpenAI's limit; each answer holds them as a tensor
MOST_VARIABLES = 65_536  # characters of a template's variables, as JSON
MOST_TOOLS = 128  # OpenAI's limit
MOST_SEED = 2**63 - 1
COLDEST = 0.01  # logits are divided by the temperature

Token = Annotated[int, Field(ge=0, strict=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS)]
Several = Field(min_length=1, max_length=MOST_PROMPTS)
Prompt = str | Annotated[list[str], Several] | list[Token] | Annotated[list[list[Token]], Several]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
UNSUPPORTED: Neutral = {  # of completions and chats
    "best_of": (1,),
    "metadata": ({},),
    "min_tokens": (0,),
    "service_tier": ("auto", "default"),
    "stop_token_ids": ([],),
    "store": (False,),
}


class StreamOptions(Body):
    include_usage: bool = False
    neutral: ClassVar[Neutral] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}


def listed(value: Any) -> Any:
    """A list of one for a text."""
    if not isinstance(value, str | list):
        raise ValueError(f"expected a text or a list of texts, and it is {value!r:.40}")
    return [value] if isinstance(value, str) else value


def ids(tokens: Any) -> list[int]:
    """Token ids. They are looked at in Python, so that other threads get their turns.

    Raises:
        ValueError: it is no list, or one of them is no token id. It stops at the first fault.
    """
    if not isinstance(tokens, list):
        raise ValueError("expected a list of token ids")
    for number, token in enumerate(tokens):
        if type(token) is not int or token < 0:
            raise ValueError(f"number {number} is {token!r:.40}; expected a token id, an integer from 0")
    return tokens


def prompts(value: Any) -> list[str] | list[list[int]]:
    """The prompts in any of their four forms: a text, token ids, or a list of either.

    Raises:
        ValueError: it has none of them. It stops at the first fault.
    """
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    expected = "expected a text, a list of token ids, or a list of either"
    if not isinstance(value, list) or not value:
        raise ValueError(f"it is {'empty' if value == [] else 'of another type'}; {expected}")
    if len(value) > MOST_PROMPTS:
        raise ValueError(f"there are {len(value)}; a request has at most {MOST_PROMPTS}")
    texts = isinstance(value[0], str)
    for number, each in enumerate(value):
        if texts and isinstance(each, str):
            encodable(each)
        elif texts or not isinstance(each, list):
            raise ValueError(f"number {number} is {each!r:.40}; {expected}")
        else:
            ids(each)
    return value


def few_biases(value: Any) -> Any:
    """A bias that is not too large to be looked at."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"it has {len(value)} tokens; the most are {MOST_BIASES}")
    return value


class Generation(Body):
    """What completions and chats have in common. `user` and the two fields after it are labels that change nothing."""

    model: Text | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: Annotated[Stops, BeforeValidator(listed, json_schema_input_type=Stop | Stops)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)  # 0 and -1: no limit
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, allow_inf_nan=False)
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(few_biases)] | None = None
    ignore_eos: bool = False
    response_format: Form | None = None
    priority: int = Field(0, ge=-10, le=10)
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    neutral: ClassVar[Neutral] = UNSUPPORTED

    @field_validator("temperature")
    @classmethod
    def _divides(cls, temperature: float | None) -> float | None:
        if temperature and temperature < COLDEST:
            raise ValueError(f"expected 0, for the likeliest token, or at least {COLDEST}")
        return temperature

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "this answer is no stream; send stream: true, or leave it out")
        return self

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Generation):
    """`POST /v1/completions`."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(prompts, json_schema_input_type=Prompt)]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    neutral: ClassVar[Neutral] = {**UNSUPPORTED, "echo": (False,), "suffix": ("",)}

    @model_validator(mode="after")
    def _few(self) -> Self:
        if (answers := len(self.prompt) * self.n) > MOST_ANSWERS:
            raise wrong(
                "n",
                f"{len(self.prompt)} prompts with {self.n} answers each are {answers} answers; a request has at most "
                f"{MOST_ANSWERS}. Send several requests",
            )
        return self

    @property
    def alternatives(self) -> int | None:
        """Alternatives asked for at each token; None: no log-probabilities at all."""
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: Text
    neutral: ClassVar[Neutral] = {"image_url": (), "input_audio": (), "file": (), "refusal": ()}


class CalledFunction(Body):
    name: Text
    arguments: Text


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


def parts(value: Any) -> Any:
    """The parts of a message's content."""
    if not isinstance(value, str | list):
        raise ValueError("expected a text or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Body):
    """One message of a chat. Fields that OpenAI's client adds to its own answers may be empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[list[TextPart], Field(min_length=1, fail_fast=True)],
            BeforeValidator(parts, json_schema_input_type=str | list[TextPart]),
        ]
        | None
    ) = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Text | None = None
    neutral: ClassVar[Neutral] = {"annotations": ([],), "audio": (), "function_call": (), "refusal": ()}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise wrong("content", "content is missing; only an assistant's message with tool_calls has none")
        if self.tool_calls and self.role != "assistant":
            raise wrong("tool_calls", f"they are an assistant's; this message is of the role {self.role}")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text for part in self.content or ())


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None  # arguments that are required or of a named tool always keep to the schema


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Text


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


def few_variables(value: dict[str, Any]) -> dict[str, Any]:
    """Variables of a template that are not too large to be rendered.

    Raises:
        ValueError: they are.
    """
    if (size := len(json.dumps(value))) > MOST_VARIABLES:
        raise ValueError(f"they have {size} characters; the most are {MOST_VARIABLES}")
    return value


class Templated(Body):
    """What decides, with its messages, what a chat's template writes."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: Annotated[Object, AfterValidator(few_variables)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _calls(self) -> Self:
        if "parallel_tool_calls" in self.model_fields_set and not self.tools:
            raise wrong("parallel_tool_calls", "there are no tools to call; send tools, or leave it out")
        return self


def few_parts(value: Any) -> Any:
    """Messages that are not too many to be looked at."""
    contents = [each.get("content") for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    count = sum(len(each) if isinstance(each, list) else 1 for each in contents)
    if count > MOST_PARTS:
        raise ValueError(f"they have {count} parts; the most are {MOST_PARTS}")
    return value


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(few_parts)]


class ChatBody(Generation, Templated):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    neutral: ClassVar[Neutral] = {
        **UNSUPPORTED,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "there are no log-probabilities; send logprobs: true, or leave it out")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise wrong("max_tokens", "max_completion_tokens means the same and is another number; send one of them")
        form = self.response_format
        if self.tools and self.tool_choice != "none" and form is not None and form.type != "text":
            raise wrong("response_format", "it and tools exclude each other; use tool_choice none")
        return self

    @property
    def alternatives(self) -> int | None:
        """Alternatives asked for at each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(Templated):
    """`POST /tokenize`: a text, or messages through the model's template."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "expected either prompt or messages")
        others = {"add_special_tokens"} if self.prompt is None else set(Templated.model_fields)
        for name in sorted(others & self.model_fields_set):
            raise wrong(name, f"it does not go with {'messages' if self.prompt is None else 'prompt'}; leave it out")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: Text | None = None
    tokens: Annotated[list[int], PlainValidator(ids, json_schema_input_type=list[Token])]
