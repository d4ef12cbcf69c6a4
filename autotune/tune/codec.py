"""Converts frozen dataclasses to JSON and back, strictly.

JSON that is read is checked against the annotations. Only values, enums and registered transforms are built from it. A
number that is not finite is written as null, because JSON has none. Where a float is expected, null is read as NaN,
which here means "not measured".
"""

from __future__ import annotations

import enum
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NoReturn

from .. import transforms
from ..errors import ChoiceError, PlanError
from ..runtime.variant import Transform

MAX_DEPTH = 16
MAX_INT = 2**63
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # would garble a terminal or fail to encode


def dumps(value: Any) -> str:
    """JSON text of a dataclass."""
    return json.dumps(encode(value), allow_nan=False, indent=1)


def loads(text: str | bytes) -> Any:
    """Parse JSON into plain values. Duplicate keys, NaN, huge numbers, unprintable text and deep nesting are refused.

    Raises:
        PlanError: the text is not strict JSON; the message gives the reason.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_real
        )
    except RecursionError as error:
        raise PlanError("it is nested too deeply") from error
    except ValueError as error:  # json's and UTF-8's errors; PlanError from the hooks is one as well
        raise PlanError(f"it is not strict JSON: {error}") from error
    _check_plain(value, "it", MAX_DEPTH)
    return value


def encode(value: Any) -> Any:
    """Convert a dataclass, transform, enum, mapping, sequence or scalar to plain JSON values.

    Raises:
        PlanError: the value holds something else.
    """
    if isinstance(value, Transform):
        return {"name": value.name, "phase": value.phase, "params": encode(value.params)}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, enum.StrEnum):
        return value.value
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", value)  # reasons may be compilers' messages with colour codes
    if value is None or isinstance(value, int):
        return value
    raise PlanError(
        f"a {type(value).__name__} cannot be stored as JSON; expected numbers, text, lists, mappings or values"
    )


def decode(kind: Any, value: Any, where: str) -> Any:
    """The inverse of `encode` for an annotation. A dataclass may have `from_earlier`, which converts older JSON of it.

    Args:
        kind: dataclass, Transform, enum, Literal of text, scalar, X | None, tuple[X, ...] or a mapping of str to X.
        value: plain JSON values.
        where: name of the value, for messages.

    Raises:
        PlanError: the value does not fit the annotation.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only X | None is used
        return None if value is None else decode(inner[0], value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        return tuple(decode(inner[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        table = _expect(dict, value, where)
        return {key: decode(inner[1], item, f"{where}.{key}") for key, item in table.items()}
    if origin is typing.Literal:
        return _one_of(inner, value, where)
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind is float:
        return math.nan if value is None else float(_expect((int, float), value, where))
    if kind is Transform:
        return _transform(value, where)
    if issubclass(kind, enum.StrEnum):
        return kind(_one_of(tuple(kind), value, where))
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    return _expect(kind, value, where)


def _one_of(texts: tuple[str, ...], value: Any, where: str) -> str:
    if (text := _expect(str, value, where)) not in texts:
        raise PlanError(f"{where} is {text!r}; expected one of {', '.join(texts)}")
    return str(text)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    table = _expect(dict, value, where)
    if (from_earlier := getattr(kind, "from_earlier", None)) is not None:
        try:
            table = from_earlier(table)
        except (LookupError, TypeError, AttributeError) as error:
            raise PlanError(
                f"{where} is not what an earlier version wrote ({type(error).__name__}: {error})"
            ) from error
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(table.keys() - known.keys()):
        raise PlanError(f"{where} has the unknown key {unknown[0]!r}")
    if missing := sorted(name for name, f in known.items() if name not in table and _is_required(f)):
        raise PlanError(f"{where} has no {missing[0]!r}")
    hints = _hints(kind)
    return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in table.items()})


def _is_required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _transform(value: Any, where: str) -> Transform:
    table = _expect(dict, value, where)
    if table.keys() != {"name", "phase", "params"}:
        raise PlanError(f"{where} has the keys {sorted(table)}; expected name, phase and params")
    name, phase = _expect(str, table["name"], f"{where}.name"), _expect(str, table["phase"], f"{where}.phase")
    try:
        return transforms.make(name, _expect(dict, table["params"], f"{where}.params"), phase)
    except ChoiceError as error:
        raise PlanError(f"{where}: {error}") from error


def _expect(kind: Any, value: Any, where: str) -> Any:
    """Return `value` if its type is exactly `kind` or one of `kind`. A bool is not accepted as a number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise PlanError(f"{where} is of type {type(value).__name__}; expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def _check_plain(value: Any, where: str, depth: int) -> None:
    if depth == 0:
        raise PlanError(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str) and UNPRINTABLE.search(value):
        raise PlanError(f"{where} has unprintable characters")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, "a key", depth)
            _check_plain(item, key, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, where, depth - 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    number = int(digits) if len(digits) < 20 else MAX_INT
    if abs(number) >= MAX_INT:
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number
