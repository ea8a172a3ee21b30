"""Regular expressions over the paths of modules, as users write them in settings and files.

`linear_regex.py` matches them, in time that a stranger's pattern cannot stretch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from lorakin.inject.linear_regex import Pattern, PatternError

MOST_PATTERNS = 1_000
"""How many patterns one setting may have, beside paths."""
PLAIN_PATH = re.compile(r"\^?((?:[\w-]|\\[^\w\s])*)", re.ASCII)
"""Matches a path, or the end of one, perhaps with its dots escaped."""
N = TypeVar("N")


def matches(pattern: str, path: str) -> bool:
    r"""Returns whether the pattern matches the whole path, as `re.fullmatch` does.

    Raises:
        PatternError: it is not a regular expression, or one that is not accepted.

    >>> matches(r".*\.(q|v)_proj", "layers.0.v_proj"), matches("(a|a)*b", "a" * 1000)
    (True, False)
    """
    return _compiled(pattern).matches(path)


def check(pattern: str) -> None:
    """Checks that the pattern is a regular expression that is accepted.

    Raises:
        PatternError: it is not.

    >>> check("q_proj|v_proj")
    """
    _compiled(pattern)


def check_all(option: str, keys: Iterable[str]) -> None:
    """Checks all keys of `rank_pattern` or `alpha_pattern`, the setting that `option` names.

    Raises:
        PatternError: a key is not accepted, or there are too many.
    """
    wide = [key for key in keys if not PLAIN_PATH.fullmatch(key)]
    if len(wide) > MOST_PATTERNS:
        raise PatternError(
            f"{option} has {len(wide):,} patterns that are not modules' paths; at most "
            f"{MOST_PATTERNS:,} are accepted"
        )
    for key in wide:
        check(key)


class PatternValues(Generic[N]):
    r"""The values of `rank_pattern` or `alpha_pattern`, by pattern.

    A path has the value of the first key K for which `(.*\.)?(K)$` matches it. This is PEFT's rule,
    so that the patterns mean the same there. Keys that are paths, or ends of paths, are looked up.

    >>> PatternValues({"q_proj": 4, r"layers\.[01]\..*": 8}).of("layers.0.v_proj", default=2)
    8
    """

    def __init__(self, values: Mapping[str, N]) -> None:
        self.whole: dict[str, tuple[int, N]] = {}
        self.ends: dict[str, tuple[int, N]] = {}
        self.wide: list[tuple[int, str, N]] = []
        for order, (key, value) in enumerate(values.items()):
            if plain := PLAIN_PATH.fullmatch(key):
                table = self.whole if plain[0].startswith("^") else self.ends
                table.setdefault(plain[1].replace("\\", ""), (order, value))
            else:
                self.wide.append((order, key, value))

    def of(self, path: str, default: N | None) -> N | None:
        """Returns the value for a path.

        Raises:
            PatternError: a key is not a regular expression, or one that is not accepted.
        """
        by_path = [self.ends[end] for end in ends_of(path) if end in self.ends]
        by_path += [self.whole[path]] if path in self.whole else []
        after_all = len(self.wide) + len(self.ends) + len(self.whole)
        first, value = min(by_path, key=lambda entry: entry[0], default=(after_all, default))
        for order, key, value_of_pattern in self.wide:
            if order < first and _selects(key, path):
                return value_of_pattern
        return value


def resolve(pattern_values: Mapping[str, N], path: str, default: N | None) -> N | None:
    """Returns the value for one path; see `PatternValues`.

    >>> resolve({"q_proj": 4}, "layers.0.q_proj", 8), resolve({"q_proj": 4}, "layers.0.v_proj", 8)
    (4, 8)
    """
    return PatternValues(pattern_values).of(path, default)


class PathIndex:
    """Paths among which keys of `rank_pattern` or `alpha_pattern` select.

    >>> index = PathIndex(["layers.0.q_proj"])
    >>> index.selects_any("q_proj"), index.selects_any("proj")
    (True, False)
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = dict.fromkeys(paths)
        self.ends = {end for path in self.paths for end in ends_of(path)}

    def selects_any(self, key: str) -> bool:
        """Returns whether the key selects one of the paths.

        Raises:
            PatternError: it is not a regular expression, or one that is not accepted.
        """
        if plain := PLAIN_PATH.fullmatch(key):
            return plain[1].replace("\\", "") in (self.paths if key.startswith("^") else self.ends)
        return any(_selects(key, path) for path in self.paths)


def ends_of(path: str) -> list[str]:
    """Returns a path and what is left of it after each of its dots.

    >>> ends_of("model.layers.0")
    ['model.layers.0', 'layers.0', '0']
    """
    parts = path.split(".")
    return [".".join(parts[n:]) for n in range(len(parts))]


def _selects(key: str, path: str) -> bool:
    # It must be a pattern by itself before it is put into another.
    check(key)
    return matches(rf"(?:.*\.)?(?:{key})$", path)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Pattern:
    return Pattern(pattern)


def is_inside(path: str, roots: Iterable[str]) -> bool:
    """Returns whether a path is one of `roots` or lies in one of them."""
    return any(path == root or path.startswith(root + ".") for root in roots)
