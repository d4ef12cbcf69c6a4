"""What bodies of requests are made of: fields that may be null, texts, and objects of the client's own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Neutral = Mapping[str, tuple[Any, ...]]  # field -> values that ask for nothing

MOST_NAME = 40  # characters of an unknown field that are compared with the known ones
ALIKE = 0.7  # share of characters that it has in common with one that may be meant
MOST_DEPTH = 32  # levels of an object whose form is the client's own


def wrong(field: str, message: str) -> PydanticCustomError:
    """An error about one field of a body that looks at several.

    Args:
        field: its name.
        message: what was wrong, what was expected and what to do.
    """
    return PydanticCustomError("wrong", "{message}", {"message": _printable(message), "field": _printable(field)})


class Body(BaseModel):
    """An object in which null means left out. Unknown fields are errors that name them.

    Attributes:
        neutral: fields that are known but not supported, with the values that ask for nothing and are therefore taken.
    """

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = _names(cls)
        asked = {}
        for name, value in data.items():
            if name in known:
                if value is not None:
                    asked[name] = value
            elif name not in cls.neutral:
                near = difflib.get_close_matches(name[:MOST_NAME], known, 1, ALIKE)
                raise PydanticCustomError("unknown", "unknown", {"field": _printable(name), "near": "".join(near)})
            elif value is not None and not any(_same(value, each) for each in cls.neutral[name]):
                takes = "".join(f", or send {json.dumps(each)}" for each in cls.neutral[name])
                raise wrong(name, f"this server does not support it; leave it out{takes}")
        return asked


def encodable(text: str) -> str:
    """Return a text that UTF-8 can hold.

    Raises:
        ValueError: it has half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"\\u{ord(text[error.start]):x} is half a surrogate pair and no character; send whole characters"
        ) from None
    return text


def bounded(value: Any) -> Any:
    """Return a JSON value whose depth is within the limit, and whose texts are texts.

    Raises:
        ValueError: it is not.
    """
    inner = [value]
    for _ in range(MOST_DEPTH):
        inner = [each for one in inner for each in _items(one) if isinstance(each, dict | list)]
        if not inner:
            encodable(json.dumps(value, ensure_ascii=False))
            return value
    raise ValueError(f"it is more than {MOST_DEPTH} levels deep, the most")


Text = Annotated[str, AfterValidator(encodable)]
Object = Annotated[dict[str, Any], AfterValidator(bounded)]


@cache
def _names(kind: type[Body]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def _printable(text: str) -> str:
    return text[:300].encode(errors="backslashreplace").decode()
