"""Values as a field's type, where YAML or a user may write them as another one."""

from __future__ import annotations

import math
import types
import typing
from typing import Annotated, Any


def plain(kind: Any) -> Any:
    """Returns a type without its checks and without None.

    >>> plain(Annotated[float, "above 0"] | None)
    <class 'float'>
    """
    if typing.get_origin(kind) is Annotated:
        return plain(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [one for one in typing.get_args(kind) if one is not type(None)]
        return plain(options[0]) if len(options) == 1 else kind
    return kind


def as_number(value: Any) -> Any:
    """Returns a text that is a number as that number: YAML reads 2e-4 as text.

    >>> as_number("2e-4"), as_number("None"), as_number("cosine")
    (0.0002, None, 'cosine')
    """
    if value == "None":
        return None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def as_kind(kind: Any, value: Any) -> Any:
    """Returns `value` as a field's type, where YAML or a user may write it as another one."""
    kind = plain(kind)
    origin = typing.get_origin(kind)
    if value is None:
        return None
    if origin is list:  # one name need not be a list, and a token's id is a name too
        of = plain(typing.get_args(kind)[0])
        items = value if isinstance(value, list | tuple) else [value]
        if of is not str:
            return [as_kind(of, item) for item in items]
        return [str(item) if isinstance(item, int) else item for item in items]
    if origin is dict and isinstance(value, dict):
        of = typing.get_args(kind)[1]
        return {
            str(key): as_number(item) if of is Any else as_kind(of, item)
            for key, item in value.items()
        }
    if kind is str and isinstance(value, int | float):
        return str(value)
    if kind in (int, float) and isinstance(value, str):
        value = as_number(value)
    if kind is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    return value
