"""Forms that an answer may be held to: `response_format`."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .fields import Body, Object, Text


class PlainText(Body):
    type: Literal["text"]
    definition: ClassVar[str] = ""


class JsonObject(Body):
    type: Literal["json_object"]
    definition: ClassVar[str] = ""


class NamedSchema(Body):
    """OpenAI's wrapping of a JSON schema. Only the schema counts: an answer always keeps to it."""

    schema_: Object = Field(alias="schema")
    name: Text | None = None
    description: Text | None = None
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
    regex: Annotated[Text, Field(min_length=1)]

    @property
    def definition(self) -> str:
        return self.regex


class Lark(Body):
    """A grammar in llguidance's variant of Lark, from the rule `start`."""

    type: Literal["grammar"]
    grammar: Annotated[Text, Field(min_length=1)]

    @property
    def definition(self) -> str:
        return self.grammar


Form = Annotated[PlainText | JsonObject | JsonSchema | Regex | Lark, Field(discriminator="type")]
