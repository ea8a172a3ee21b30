"""Regular expressions over the paths of modules, matched in time that a stranger's pattern cannot stretch.

Python's `re` tries one way after another, and there are patterns of a few letters with more ways than a lifetime has seconds.
Here all ways go forward together: of a set of places in the text, each part of the pattern makes the set of places where it
can end. The sets are the bits of a number, so one addition moves them all.

    (a|b)*c   on "abac":   {0} → (a|b)* → {0, 1, 2, 3} → c → {4}

Single letters, classes and anchors are asked of `re` itself, one letter at a time, so they mean what they mean there. What
can only be had by trying ways in order is refused: references to groups, conditions on them, possessive and atomic parts.
Every match has a budget of steps, some for each letter of the path and of the pattern (PEFT's own patterns, and Unsloth's, take
a tenth of it); a pattern that needs more is refused too.
"""

from __future__ import annotations

import functools
import re
import re._compiler as compiler  # type: ignore[import-not-found]
import re._constants as sre  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from lorakin.errors import TargetError

LONGEST = 100_000
"""Characters of a pattern: that of a list of some hundred modules has ten thousand."""
MOST = 1_000
"""Patterns of one setting that are more than a module's path; paths may be as many as there are modules."""
PLAIN = re.compile(r"\^?((?:[\w-]|\\[^\w\s])*)", re.ASCII)
"""A path, or the end of one, perhaps with its dots escaped."""
N = TypeVar("N")


class PatternError(TargetError):
    """A regular expression that is not taken."""


class NoPatternError(PatternError):
    """What is no regular expression."""


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern matches the whole path, as `re.fullmatch` would say.

    Raises:
        PatternError: it is no regular expression, or one that is not taken.
    """
    return _compiled(pattern).matches(path)


def check(pattern: str) -> None:
    """See that the pattern is a regular expression that is taken.

    Raises:
        PatternError: it is not.
    """
    _compiled(pattern)


def check_all(option: str, keys: Iterable[str]) -> None:
    """See that all keys of `rank_pattern` or `alpha_pattern` are regular expressions that are taken, and not too many.

    Raises:
        PatternError: they are not.
    """
    wide = [key for key in keys if not PLAIN.fullmatch(key)]
    if len(wide) > MOST:
        raise PatternError(
            f"{option} has {len(wide):,} patterns that are no modules' paths; at most {MOST:,} are taken"
        )
    for key in wide:
        check(key)


class Values(Generic[N]):
    """`rank_pattern` or `alpha_pattern`: values by pattern.

    A path has that of the first key K, in order, for which `(.*\\.)?(K)$` matches it. This is PEFT's rule, so that the
    patterns mean the same there. Keys that are paths, or ends of paths, are looked up and not tried.
    """

    def __init__(self, values: Mapping[str, N]) -> None:
        self.whole: dict[str, tuple[int, N]] = {}
        self.ends: dict[str, tuple[int, N]] = {}
        self.wide: list[tuple[int, str, N]] = []
        for order, (key, value) in enumerate(values.items()):
            if plain := PLAIN.fullmatch(key):
                table = self.whole if plain[0].startswith("^") else self.ends
                table.setdefault(plain[1].replace("\\", ""), (order, value))
            else:
                self.wide.append((order, key, value))

    def of(self, path: str, default: N | None) -> N | None:
        """The value for a path.

        Raises:
            PatternError: a key is no regular expression, or one that is not taken.
        """
        found = [self.ends[end] for end in ends_of(path) if end in self.ends]
        found += [self.whole[path]] if path in self.whole else []
        first, value = min(
            found,
            key=lambda one: one[0],
            default=(len(self.wide) + len(self.ends) + len(self.whole), default),
        )
        return next(
            (own for order, key, own in self.wide if order < first and _reaches(key, path)), value
        )


def resolve(pattern_values: Mapping[str, N], path: str, default: N | None) -> N | None:
    """The value for one path; see `Values`."""
    return Values(pattern_values).of(path, default)


class Paths:
    """Paths to be selected by keys of `rank_pattern` or `alpha_pattern`."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = dict.fromkeys(paths)
        self.ends = {end for path in self.paths for end in ends_of(path)}

    def any_by(self, key: str) -> bool:
        """Whether the key selects one of them.

        Raises:
            PatternError: it is no regular expression, or one that is not taken.
        """
        if plain := PLAIN.fullmatch(key):
            return plain[1].replace("\\", "") in (self.paths if key.startswith("^") else self.ends)
        return any(_reaches(key, path) for path in self.paths)


def ends_of(path: str) -> list[str]:
    """A path and what is left of it after each of its dots."""
    parts = path.split(".")
    return [".".join(parts[n:]) for n in range(len(parts))]


def _reaches(key: str, path: str) -> bool:
    check(key)  # by itself, so that it can be put between others
    return matches(rf"(?:.*\.)?(?:{key})$", path)


class Pattern:
    """A regular expression as the tree that `re` makes of it."""

    def __init__(self, text: str) -> None:
        """Read it.

        Raises:
            PatternError: it is none, or one that is not taken.
        """
        if len(text) > LONGEST:
            raise PatternError(
                f"{_shown(text)} is not taken: it has {len(text):,} characters, at most {LONGEST:,} may be"
            )
        self.text = text
        try:
            tree = parser.parse(text)
            self.flags = tree.state.flags
            self.needed = _needed(tree)
            self.ends = self._sequence(tree, self.flags)
        except (re.error, RecursionError, OverflowError) as error:
            raise NoPatternError(f"{_shown(text)} is not a regular expression ({error})") from None

    def matches(self, path: str) -> bool:
        """Whether it matches the whole of a path.

        Raises:
            PatternError: that takes too many steps.
        """
        if any(word not in path for word in self.needed):
            return False
        at = _Text(path, self.text)
        return bool(self.ends(at, 1) >> len(path) & 1)

    def _sequence(self, tree: Any, flags: int) -> Ends:
        parts = [self._part(operation, content, flags, tree) for operation, content in tree]

        def ends(at: _Text, places: int) -> int:
            for part in parts:
                if not places:
                    break
                places = part(at, places)
            return places

        return ends

    def _part(self, operation: Any, content: Any, flags: int, tree: Any) -> Ends:
        if operation in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return _letters(operation, content, flags, tree)
        if operation is sre.AT:
            return _anchor(operation, content, flags, tree)
        if operation is sre.SUBPATTERN:
            _, added, removed, inner = content
            return self._sequence(inner, (flags | added) & ~removed)
        if operation is sre.BRANCH:
            return _choice([self._sequence(one, flags) for one in content[1]])
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return _repeat(content[0], content[1], self._sequence(content[2], flags))
        if operation in (sre.ASSERT, sre.ASSERT_NOT):
            direction, inner = content
            width = inner.getwidth()[0] if direction < 0 else 0
            return _look(
                self._sequence(inner, flags), width, direction < 0, operation is sre.ASSERT
            )
        if operation is sre.FAILURE:
            return lambda at, places: 0
        raise PatternError(
            f"{_shown(self.text)} is not taken: {str(operation).lower()} can only be matched by trying one way after another; "
            "say it without references to groups, conditions, possessive or atomic parts"
        )


class _Text:
    """A path that is being matched: what is known of it, and the steps that are left. A step tries one part everywhere."""

    def __init__(self, path: str, pattern: str) -> None:
        self.path = path
        self.pattern = pattern
        self.steps = 8 * (len(path) + 1) + 8 * len(pattern)
        self.known: dict[Any, int] = {}

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise PatternError(
                f"{_shown(self.pattern)} is not taken: matching {_shown(self.path)} takes too long"
            )


Ends = Callable[[_Text, int], int]
"""Text, places where to begin → places where it can end; a place is a bit, that of 2ⁿ after n letters."""


def _letters(operation: Any, content: Any, flags: int, tree: Any) -> Ends:
    single = _alone(operation, content, flags, tree)

    def ends(at: _Text, places: int) -> int:
        at.step()
        if single not in at.known:
            fits = {letter for letter in set(at.path) if single.match(letter)}
            at.known[single] = sum(1 << n for n, letter in enumerate(at.path) if letter in fits)
        return (places & at.known[single]) << 1

    return ends


def _anchor(operation: Any, content: Any, flags: int, tree: Any) -> Ends:
    anchor = _alone(operation, content, flags, tree)

    def ends(at: _Text, places: int) -> int:
        at.step()
        if anchor not in at.known:
            at.known[anchor] = sum(
                1 << n for n in range(len(at.path) + 1) if anchor.match(at.path, n)
            )
        return places & at.known[anchor]

    return ends


def _alone(operation: Any, content: Any, flags: int, tree: Any) -> re.Pattern[str]:
    """One operation as a pattern of `re`, which takes one letter, or none, and so no time."""
    state = parser.State()
    state.flags = flags
    return compiler.compile(parser.SubPattern(state, [(operation, content)]), flags)  # type: ignore[no-any-return]


def _choice(ways: list[Ends]) -> Ends:
    def ends(at: _Text, places: int) -> int:
        found = 0
        for way in ways:
            at.step()
            found |= way(at, places)
        return found

    return ends


def _repeat(least: int, most: int, once: Ends) -> Ends:
    def ends(at: _Text, places: int) -> int:
        for _ in range(least):
            before, places = places, once(at, places)
            at.step()
            if places in (0, before):  # no more comes of further ones
                break
        found = new = places
        for _ in range(most - least):
            if not new:
                break
            at.step()
            new = once(at, new) & ~found
            found |= new
        return found

    return ends


def _look(inner: Ends, width: int, behind: bool, wanted: bool) -> Ends:
    """Ahead, or behind by a width that is fixed: the places where what is there matches, or does not."""
    own = object()

    def ends(at: _Text, places: int) -> int:
        at.step()
        looked, seen = at.known.get(own, 0), at.known.get((own, "seen"), 0)
        for n in _numbers(places & ~looked):
            at.step()
            found = inner(at, 1 << n - width) if n >= width else 0
            seen |= (bool(found >> n & 1) if behind else bool(found)) << n
        at.known[own], at.known[own, "seen"] = looked | places, seen
        return places & seen if wanted else places & ~seen

    return ends


def _numbers(places: int) -> Iterator[int]:
    """The bits that are set."""
    while places:
        lowest = places & -places
        yield lowest.bit_length() - 1
        places ^= lowest


def _needed(tree: Any) -> list[str]:
    """Words that stand in every text that matches: most paths lack one, and need no more be looked at."""
    if tree.state.flags & re.IGNORECASE:
        return []
    words, word = [], ""
    for operation, content in tree:
        if operation is sre.LITERAL:
            word += chr(content)
            continue
        words.append(word)
        word = ""
        if operation is sre.SUBPATTERN and not content[1]:
            words += _needed(content[3])
        elif operation in (sre.MAX_REPEAT, sre.MIN_REPEAT) and content[0]:
            words += _needed(content[2])
    return [one for one in (*words, word) if one]


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Pattern:
    return Pattern(pattern)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:79]!r}…"
