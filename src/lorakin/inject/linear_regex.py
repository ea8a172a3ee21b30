"""Regular expressions matched in time that a stranger's pattern cannot stretch.

Python's `re` tries one way after another, and a pattern of a few letters can have more ways than a
lifetime has seconds. Here all ways go forward together: each part of the pattern turns the set of
places where it may begin into the set of places where it can end. The sets are the bits of a
number, so one addition moves them all.

    (a|b)*c   on "abac":   {0} → (a|b)* → {0, 1, 2, 3} → c → {4}

Single letters, classes and anchors are given to `re` itself, one letter at a time, so they mean
what they mean there. What needs ways to be tried in order is refused: references to groups,
conditions on them, possessive and atomic parts. Each match has a budget of steps that grows with
the path and the pattern; PEFT's own patterns, and Unsloth's, take a tenth of it.

Why no library does this: see docs/project/dependencies.md.
"""

from __future__ import annotations

import re
import re._compiler as compiler  # type: ignore[import-not-found]
import re._constants as sre  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterator
from typing import Any

from lorakin.errors import TargetError

LONGEST = 100_000
"""Characters that a pattern may have; one that lists some hundred modules has ten thousand."""


class PatternError(TargetError):
    """A regular expression that is not accepted."""


class NoPatternError(PatternError):
    """A text that is not a regular expression."""


class Pattern:
    """A regular expression, parsed by `re`, whose parts are functions of sets of places."""

    def __init__(self, text: str) -> None:
        """Parses it.

        Raises:
            PatternError: it is not a regular expression, or one that is not accepted.
        """
        if len(text) > LONGEST:
            raise PatternError(
                f"{_shown(text)} is not accepted: it has {len(text):,} characters, at most "
                f"{LONGEST:,} may be"
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
        """Returns whether it matches the whole path.

        Raises:
            PatternError: that takes too many steps.
        """
        if any(word not in path for word in self.needed):
            return False
        match = _Match(path, self.text)
        return bool(self.ends(match, 1) >> len(path) & 1)

    def _sequence(self, tree: Any, flags: int) -> Ends:
        parts = [self._part(operation, content, flags) for operation, content in tree]

        def ends(match: _Match, places: int) -> int:
            for part in parts:
                if not places:
                    break
                places = part(match, places)
            return places

        return ends

    def _part(self, operation: Any, content: Any, flags: int) -> Ends:
        if operation in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return _letters(operation, content, flags)
        if operation is sre.AT:
            return _anchor(operation, content, flags)
        if operation is sre.SUBPATTERN:
            _, added, removed, inner = content
            return self._sequence(inner, (flags | added) & ~removed)
        if operation is sre.BRANCH:
            return _choice([self._sequence(branch, flags) for branch in content[1]])
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return _repeat(content[0], content[1], self._sequence(content[2], flags))
        if operation in (sre.ASSERT, sre.ASSERT_NOT):
            direction, inner = content
            width = inner.getwidth()[0] if direction < 0 else 0
            return _look(
                self._sequence(inner, flags), width, direction < 0, operation is sre.ASSERT
            )
        if operation is sre.FAILURE:
            return lambda match, places: 0
        raise PatternError(
            f"{_shown(self.text)} is not accepted: {str(operation).lower()} can only be matched by "
            "trying one way after another; say it without references to groups, conditions, "
            "possessive or atomic parts"
        )


class _Match:
    """A path that is being matched: what was found of it, and how many steps are left.

    A step tries one part of the pattern in all places.
    """

    def __init__(self, path: str, pattern: str) -> None:
        self.path = path
        self.pattern = pattern
        self.steps = 8 * (len(path) + 1) + 8 * len(pattern)
        self.results: dict[Any, int] = {}

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise PatternError(
                f"{_shown(self.pattern)} is not accepted: matching {_shown(self.path)} takes too "
                "many steps"
            )


Ends = Callable[[_Match, int], int]
"""(match, places where a part may begin) → places where it can end; bit n is the place after n
letters.
"""


def _letters(operation: Any, content: Any, flags: int) -> Ends:
    single = _single(operation, content, flags)

    def ends(match: _Match, places: int) -> int:
        match.step()
        if single not in match.results:
            fits = {letter for letter in set(match.path) if single.match(letter)}
            match.results[single] = sum(
                1 << n for n, letter in enumerate(match.path) if letter in fits
            )
        return (places & match.results[single]) << 1

    return ends


def _anchor(operation: Any, content: Any, flags: int) -> Ends:
    anchor = _single(operation, content, flags)

    def ends(match: _Match, places: int) -> int:
        match.step()
        if anchor not in match.results:
            match.results[anchor] = sum(
                1 << n for n in range(len(match.path) + 1) if anchor.match(match.path, n)
            )
        return places & match.results[anchor]

    return ends


def _single(operation: Any, content: Any, flags: int) -> re.Pattern[str]:
    """Compiles one operation with `re`; it takes one letter or none, and so no time."""
    state = parser.State()
    state.flags = flags
    return compiler.compile(parser.SubPattern(state, [(operation, content)]), flags)  # type: ignore[no-any-return]


def _choice(ways: list[Ends]) -> Ends:
    def ends(match: _Match, places: int) -> int:
        all_ends = 0
        for way in ways:
            match.step()
            all_ends |= way(match, places)
        return all_ends

    return ends


def _repeat(least: int, most: int, once: Ends) -> Ends:
    def ends(match: _Match, places: int) -> int:
        for _ in range(least):
            before, places = places, once(match, places)
            match.step()
            # Further repeats find nothing new.
            if places in (0, before):
                break
        all_ends = new = places
        for _ in range(most - least):
            if not new:
                break
            match.step()
            new = once(match, new) & ~all_ends
            all_ends |= new
        return all_ends

    return ends


def _look(inner: Ends, width: int, behind: bool, wanted: bool) -> Ends:
    """Looks ahead, or behind by a fixed width, and keeps the places where that is as `wanted`."""
    key = object()

    def ends(match: _Match, places: int) -> int:
        match.step()
        looked, seen = match.results.get(key, 0), match.results.get((key, "seen"), 0)
        for n in _numbers(places & ~looked):
            match.step()
            found = inner(match, 1 << n - width) if n >= width else 0
            seen |= (bool(found >> n & 1) if behind else bool(found)) << n
        match.results[key], match.results[key, "seen"] = looked | places, seen
        return places & seen if wanted else places & ~seen

    return ends


def _numbers(places: int) -> Iterator[int]:
    """Yields the bits that are set."""
    while places:
        lowest = places & -places
        yield lowest.bit_length() - 1
        places ^= lowest


def _needed(tree: Any) -> list[str]:
    """Returns words that every matching text contains; most paths lack one of them."""
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
    return [part for part in (*words, word) if part]


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:79]!r}…"
