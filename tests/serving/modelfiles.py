"""Ollama's reading of a Modelfile, written from its documentation: instructions, quotes, and Go
templates over messages.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

WORDS = ("FROM", "ADAPTER", "TEMPLATE", "SYSTEM", "PARAMETER", "LICENSE", "MESSAGE")


def parse(text: str) -> list[tuple[str, str]]:
    """Instructions and their values, in order. A value ends with its line, unless it began with
    quotes that are still open.
    """
    found, lines = [], iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, _, value = line.strip().partition(" ")
        assert word.upper() in WORDS, line
        if word == "PARAMETER":
            name, _, value = value.partition(" ")
            word = f"PARAMETER {name}"
        while (taken := _unquoted(value)) is None:
            value += "\n" + next(lines)
        found.append((word, taken))
    return found


def _unquoted(value: str) -> str | None:
    """The text without its quotes, which know no escapes; None while it is open."""
    value = value.strip()
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = value.endswith(quotes) and len(value) >= 2 * len(quotes)
            return value[len(quotes) : len(value) - len(quotes)] if closed else None
    return value


def shown(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Ollama makes of a conversation with a template that ranges over messages; system
    messages stand in `.System` too.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    data = {
        "System": system,
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
        "Prompt": messages[-1]["content"],
        "Response": "",
    }
    return "".join(GoTemplate(template).run(data))


TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\(|\)|:=|=|,|\$?[\w.]+|\$')


class GoTemplate:
    """As much of Go's text/template as chat templates use: if, else if, range, variables, and a few
    functions.
    """

    def __init__(self, text: str) -> None:
        self.parts = list(self._lexed(text))

    @staticmethod
    def _lexed(text: str) -> Iterator[tuple[bool, str]]:
        """Texts and actions. An action ends at the first }} outside of quotes."""
        while (start := text.find("{{")) >= 0:
            assert not re.match(r"\{\{-|\{\{\{", text[start:]), (
                "neither trimming nor a third brace is meant here"
            )
            yield False, text[:start]
            action = re.match(r'\{\{((?:"(?:\\.|[^"\\])*"|[^"])*?)\}\}', text[start:], re.DOTALL)
            assert action, text[start : start + 40]
            yield True, action[1].strip()
            text = text[start + len(action[0]) :]
        yield False, text

    def run(self, data: Any) -> Iterator[str]:
        yield from self._block(0, len(self.parts), data, {"$": data})

    def _block(self, at: int, end: int, dot: Any, names: dict[str, Any]) -> Iterator[str]:
        while at < end:
            is_action, text = self.parts[at]
            if not is_action:
                yield text
            elif text.startswith(("if ", "range ")):
                stops = self._stops(at)
                if text.startswith("if "):
                    yield from self._if(stops, dot, names)
                else:
                    yield from self._range(text, stops, dot, names)
                at = stops[-1]
            elif assigned := re.match(r"(\$\w+)\s*:?=\s*(.*)", text):
                names[assigned[1]] = self._value(assigned[2], dot, names)
            else:
                yield str(self._value(text, dot, names))
            at += 1

    def _stops(self, at: int) -> list[int]:
        """The places of an action, its elses and its end."""
        depth, found = 0, [at]
        for place in range(at + 1, len(self.parts)):
            is_action, text = self.parts[place]
            if is_action and text.startswith(("if ", "range ")):
                depth += 1
            elif is_action and depth == 0 and text.startswith("else"):
                found.append(place)
            elif is_action and text == "end":
                if depth == 0:
                    return [*found, place]
                depth -= 1
        raise AssertionError("no end")

    def _if(self, stops: list[int], dot: Any, names: dict[str, Any]) -> Iterator[str]:
        for start, end in itertools.pairwise(stops):
            condition = self.parts[start][1].removeprefix("else").strip().removeprefix("if").strip()
            if not condition or self._value(condition, dot, names):
                yield from self._block(start + 1, end, dot, names)
                return

    def _range(self, text: str, stops: list[int], dot: Any, names: dict[str, Any]) -> Iterator[str]:
        found = re.fullmatch(r"range (\$\w+), (\$\w+) := (.*)", text)
        assert found
        for number, item in enumerate(self._value(found[3], dot, names)):
            names[found[1]], names[found[2]] = number, item
            yield from self._block(stops[0] + 1, stops[1], item, names)

    def _value(self, text: str, dot: Any, names: dict[str, Any]) -> Any:
        words = TOKEN.findall(text)
        value, rest = self._call(words, dot, names)
        assert not rest, text
        return value

    def _call(self, words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
        function = (
            words[0]
            if words and words[0] in ("eq", "ne", "len", "slice", "and", "or", "not")
            else None
        )
        if function:
            words = words[1:]
        given = []
        while words and words[0] != ")":
            value, words = self._operand(words, dot, names)
            given.append(value)
        if function is None:
            assert len(given) == 1
            return given[0], words
        functions: dict[str, Any] = {
            "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "not": lambda a: not a,
            "len": len, "slice": lambda a, n: a[n:],
            "and": lambda *all_: next((a for a in all_ if not a), all_[-1]),
            "or": lambda *all_: next((a for a in all_ if a), all_[-1]),
        }  # fmt: skip
        return functions[function](*given), words

    def _operand(self, words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
        word, *rest = words
        if word == "(":
            value, rest = self._call(rest, dot, names)
            assert rest[0] == ")"
            return value, rest[1:]
        if word.startswith('"'):
            return json.loads(word), rest
        if word.isdecimal() or word in ("true", "false"):
            return json.loads(word), rest
        name, *fields = word.split(".")
        value = names[name] if name else dot
        for field in fields:
            value = value[field]
        return value, rest
