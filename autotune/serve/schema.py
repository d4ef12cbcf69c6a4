"""Bodies of requests, as OpenAI names their fields. Every unknown field is an error that names it."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_STOPS = 16  # stop strings of a request; OpenAI allows 4
MOST_CHOICES = 16  # answers to one prompt
MOST_LOGPROBS = 20  # alternatives for each token, OpenAI's limit
MOST_PROMPTS = 64  # prompts of one completion request
MOST_TOOLS = 128  # OpenAI's limit
MOST_SEED = 2**63 - 1
COLDEST = 0.01  # logits are divided by the temperature

Token = Annotated[int, Field(ge=0, strict=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    include_usage: bool = False


class PlainText(Body):
    type: Literal["text"]
    definition: ClassVar[str] = ""


class JsonObject(Body):
    type: Literal["json_object"]
    definition: ClassVar[str] = ""


class NamedSchema(Body):
    """OpenAI's wrapping of a JSON schema. Only the schema counts: an answer always keeps to it."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchema(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def definition(self) -> str:
        return json.dumps(self.json_schema.schema_, ensure_ascii=False)


class Regex(Body):
    """The whole answer matches a regular expression, in the syntax of Rust's regex crate."""

    type: Literal["regex"]
    regex: Annotated[str, StringConstraints(min_length=1)]

    @property
    def definition(self) -> str:
        return self.regex


class Lark(Body):
    """A grammar in llguidance's variant of Lark, from the rule `start`."""

    type: Literal["grammar"]
    grammar: Annotated[str, StringConstraints(min_length=1)]

    @property
    def definition(self) -> str:
        return self.grammar


Form = Annotated[PlainText | JsonObject | JsonSchema | Regex | Lark, Field(discriminator="type")]


class Generation(Body):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
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
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    ignore_eos: bool = False
    response_format: Form | None = None
    priority: int = Field(0, ge=-10, le=10)
    user: str | None = None

    @field_validator("temperature")
    @classmethod
    def _divides(cls, temperature: float | None) -> float | None:
        if temperature and temperature < COLDEST:
            raise ValueError(f"expected 0, for the likeliest token, or at least {COLDEST}")
        return temperature

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Generation):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] = False

    @property
    def alternatives(self) -> int | None:
        """Alternatives asked for at each token; None: no log-probabilities at all."""
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing; only an assistant's message with tool_calls has none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are an assistant's; this message is of the role {self.role}")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # arguments that are required or of a named tool always keep to the schema


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def alternatives(self) -> int | None:
        """Alternatives asked for at each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or messages through the model's template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Token]
