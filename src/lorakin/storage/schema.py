"""Checks the content of a file from outside against types, and says where it does not fit.

    checked(dict[str, Finite], content)    # numbers by name
    checked(Row, content)    # a dataclass: these fields, no others, all that have no default

The types are None, bool, int, float, str, Any, Literal, unions, list, tuple, dict, dataclasses, and
`Annotated[kind, Check(…)]`. A bool is not a number, an int is a float, and integers are below 2⁶³.
(No validation library is used, since the core needs only torch and safetensors.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union

LONGEST = 80
"""The most characters of a value that a message repeats."""


class SchemaError(ValueError):
    """A value that does not fit; the message says where it is, what it is and what was expected."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition besides the type: in words, and as a function of a value of the type."""

    what: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Check("a whole number ≥ 0", lambda value: value >= 0)]
AtLeastOne = Annotated[int, Check("a whole number ≥ 1", lambda value: value >= 1)]
NotNegative = Annotated[float, Check("a number ≥ 0", lambda value: value >= 0)]
Finite = Annotated[float, Check("a finite number", math.isfinite)]
Positive = Annotated[float, Check("a finite number above 0", lambda value: 0 < value < math.inf)]


def checked(kind: Any, value: Any, where: str = "") -> Any:
    """Returns `value` as the type `kind`, with dataclasses built from dicts, tuples from lists.

    >>> checked(tuple[int, float], [1, 2.5])
    (1, 2.5)
    >>> checked(list[int], [1, "two"], "ids")
    Traceback (most recent call last):
        ...
    lorakin.storage.schema.SchemaError: ids[1] is 'two', expected a whole number

    `where` is the value's path in the file, for messages.

    Raises:
        SchemaError: it is of another type somewhere inside.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value_in_type = checked(inner[0], value, where)
        for check in inner[1:]:
            if isinstance(check, Check) and not check.holds(value_in_type):
                raise _error(value, check.what, where)
        return value_in_type
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where)
    if origin is Literal:
        if not any(type(value) is type(option) and value == option for option in inner):
            raise _error(value, in_words(kind), where)
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    if origin is list:
        _require(isinstance(value, list | tuple), value, kind, where)
        return [checked(inner[0], item, f"{where}[{n}]") for n, item in enumerate(value)]
    if origin is tuple:
        _require(isinstance(value, list | tuple) and len(value) == len(inner), value, kind, where)
        return tuple(
            checked(item_kind, item, f"{where}[{n}]")
            for n, (item_kind, item) in enumerate(zip(inner, value, strict=True))
        )
    if origin in (dict, Mapping):
        _require(isinstance(value, Mapping), value, kind, where)
        keys = [checked(inner[0], key, f"a key of {where or 'it'}") for key in value]
        return {key: checked(inner[1], value[key], _in(where, key)) for key in keys}
    _require(_is_plain(kind, value), value, kind, where)
    return value


def first_problem(fields: Mapping[str, Any], kinds: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the first of some fields; None if all fit.

    `kinds`: field → the type that it must have if it is there and not null.
    """
    for field, kind in kinds.items():
        if fields.get(field) is not None:
            try:
                checked(kind, fields[field], field)
            except SchemaError as error:
                return str(error)
    return None


def _is_plain(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if kind in (None, type(None)):
        return value is None
    if kind in (int, float):
        # NaN and infinities are floats.
        is_integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return is_integer or (kind is float and isinstance(value, float))
    return isinstance(value, kind)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return checked(kind, value, where)
        except SchemaError as error:
            problems.append((str(error), kind))
    # Of these the type fits, but not the content.
    nested = [text for text, _ in problems if where and text.startswith((f"{where}.", f"{where}["))]
    if nested:
        raise SchemaError(nested[0])
    raise _error(value, " or ".join(in_words(kind) for _, kind in problems), where)


def _record(kind: Any, value: Any, where: str) -> Any:
    fields, required = _fields(kind)
    _require(isinstance(value, Mapping), value, kind, where)
    if unknown := [key for key in value if key not in fields]:
        raise SchemaError(f"{_in(where, unknown[0])} is unknown; known are {', '.join(fields)}")
    if lacking := [name for name in required if name not in value]:
        raise SchemaError(f"{_in(where, lacking[0])} is missing")
    return kind(**{key: checked(fields[key], item, _in(where, key)) for key, item in value.items()})


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the types of a dataclass's fields, and the names of those without a default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    missing = dataclasses.MISSING
    required = [
        name
        for name, field in fields.items()
        if field.default is missing and field.default_factory is missing
    ]
    return {name: hints[name] for name in fields}, required


def in_words(kind: Any) -> str:
    """Returns what a value must be, for a message.

    >>> in_words(list[str] | None)
    'a list of text or null'
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return next(
            (check.what for check in inner[1:] if isinstance(check, Check)), in_words(inner[0])
        )
    if origin in (Union, types.UnionType):
        return " or ".join(map(in_words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is list:
        return f"a list of {in_words(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return "an object"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        None: "null",
        type(None): "null",
    }
    return words.get(kind, "something else")


def short_repr(value: Any) -> str:
    """Returns the beginning of a value's repr, for a message."""
    if isinstance(value, str | bytes):
        value = value[: LONGEST + 1]
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a whole number of more than 63 bits"
    text = (
        f"a {type(value).__name__} of {len(value):,}"
        if isinstance(value, list | dict) and len(value) > 8
        else repr(value)
    )
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _require(holds: bool, value: Any, kind: Any, where: str) -> None:
    if not holds:
        raise _error(value, in_words(kind), where)


def _error(value: Any, expected: str, where: str) -> SchemaError:
    return SchemaError(f"{where or 'it'} is {short_repr(value)}, expected {expected}")


def _in(where: str, key: Any) -> str:
    name = short_repr(key).strip("'") if isinstance(key, str) else short_repr(key)
    return f"{where}.{name}" if where else name
