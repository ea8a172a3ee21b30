"""How members check their settings: dataclass fields become plain values, or are refused."""

from __future__ import annotations

import difflib
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeGuard

from lorakin.errors import SettingError
from lorakin.family.pair import Shape

LARGEST_FLOAT32 = 3.4e38
"""The largest number of float32, in which adapters are computed."""


def require(condition: bool, message: str) -> None:
    """Raises `SettingError(message)` unless `condition` holds."""
    if not condition:
        raise SettingError(message)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns a hint at the one of `words` that is most like `word`; "" if none is.

    >>> did_you_mean("lorra", ["lora", "dora"])
    " (did you mean 'lora'?)"
    """
    similar = difflib.get_close_matches(word.lower(), list(words), n=1)
    return f" (did you mean {similar[0]!r}?)" if similar else ""


def is_finite_number(value: object) -> TypeGuard[float]:
    """Returns whether `value` is an int or float, and not a bool, NaN or infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def to_whole_number(settings: object, name: str, at_least: int, optional: bool = False) -> None:
    """Makes the field `name` a plain int; None stays if it is `optional`.

    Raises:
        SettingError: it is not a whole number ≥ `at_least`.
    """
    value = getattr(settings, name)
    if optional and value is None:
        return
    try:
        plain = operator.index(value)
    except TypeError:
        plain = at_least - 1
    require(
        plain >= at_least and not isinstance(value, bool),
        f"{name} must be a whole number ≥ {at_least}, not {value!r}",
    )
    object.__setattr__(settings, name, plain)


def to_number(
    settings: object,
    name: str,
    fits: Callable[[float], bool],
    expected: str,
    optional: bool = False,
) -> None:
    """Makes the field `name` a plain float that `fits`; None stays if it is `optional`.

    Raises:
        SettingError: it does not fit; the message says what was `expected`.
    """
    value = getattr(settings, name)
    if optional and value is None:
        return
    try:
        plain = float("nan") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        plain = float("nan")
    require(fits(plain), f"{name} must be {expected}, not {value!r}")
    object.__setattr__(settings, name, plain)


def check_pair_settings(settings: object, optional: bool = False) -> None:
    """Checks `alpha`, `dropout` and, if it has that field, `rslora`.

    Raises:
        SettingError: one is outside its range.
    """
    to_number(
        settings,
        "alpha",
        lambda alpha: 0 < alpha <= LARGEST_FLOAT32,
        "a positive number that float32 holds",
        optional,
    )
    to_number(settings, "dropout", lambda dropout: 0 <= dropout < 1, "a number in [0, 1)", optional)
    rslora = getattr(settings, "rslora", None)
    require(
        rslora is None or isinstance(rslora, bool), f"rslora must be True or False, not {rslora!r}"
    )


def check_storable(word: str, settings: Mapping[str, object]) -> None:
    """Checks that files, which hold settings as JSON, can hold these of the member `word`.

    Raises:
        SettingError: one cannot be written as JSON.
    """
    for name, value in settings.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise SettingError(
                f"{word} has the setting {name} = {value!r}, which no file can hold; a setting is "
                "a finite number, a string, True, False or None, or a tuple or dict of these"
            ) from None


def one_of(settings: object, name: str, words: Sequence[str]) -> None:
    """Checks that the field `name` is one of `words`.

    Raises:
        SettingError: it is not.
    """
    value = getattr(settings, name)
    require(value in words, f"{name} must be {' or '.join(map(repr, words))}, not {value!r}")


def check_rank(rank: int, shape: Shape, path: str, largest: int) -> None:
    """Checks that a rank is at least 1 and at most `largest` on the module at `path`.

    Raises:
        SettingError: it is not.
    """
    require(rank >= 1, f"rank {rank} of {path} is not at least 1")
    require(
        rank <= largest,
        f"rank {rank} is too high for {path}: its weight is {shape.outputs} × {shape.inputs}, so "
        f"the rank can be at most {largest}. Lower the rank, give this module its own with "
        "rank_pattern, leave it out with exclude, or give all such modules the largest rank they "
        "can have with rank_above='clamp' (--rank-above clamp)",
    )
