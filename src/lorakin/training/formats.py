"""What a row says, whatever its columns are called: a conversation, a text, or a text with its class.

A format names the columns that it needs and those that it can use. Whatever else a row holds is listed
before training (`unused_keys`), and a column that would change what the row means is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lorakin.errors import DataError

Values = Mapping[str, Any]
"""A row's columns by name."""

CLASSIFICATION = "classification"
CALLING = ("function_call", "tool_call")
"""Roles whose content is a call, as JSON."""
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant", **dict.fromkeys(CALLING, "assistant"), "system": "system",
    "developer": "developer", "tool": "tool", "ipython": "tool", "function": "tool", "observation": "tool",
    "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
FLAGS = ("train", "training", "weight", "loss_weight")
"""Keys of a row that say whether it is learned."""
MESSAGE_FLAGS = (*FLAGS, "loss")
"""The same of a message; a row's `loss` is a figure that somebody measured."""
SAYS = {**dict.fromkeys(("0", "false"), False), **dict.fromkeys(("1", "true"), True)}
"""What a flag may say, in lower case."""
USED_OF_A_MESSAGE = {
    "role", "from", "content", "value", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning",
    "thinking", "function_call", "tools", *MESSAGE_FLAGS,
}  # fmt: skip
PAIRS = (
    "question", "question1", "question2", "sentence1", "sentence2", "premise", "hypothesis", "text_pair", "text1", "text2",
)  # fmt: skip
"""A second text of what is to be classified."""
PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Number(float):
    """A JSON number that is written as the file writes it: 1.10 stays "1.10"."""

    def __new__(cls, literal: str) -> Number:
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    literal: str

    def __str__(self) -> str:
        return self.literal

    __repr__ = __str__


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates take, and the tools that they may call.

    Attributes:
        messages: each with a role and content, perhaps with `tool_calls`, `reasoning_content`, `name`.
        learned: for each message whether it is to be learned; None leaves it to `--loss-on`.
        tools: JSON schemas of functions, or None.
        is_instruction: whether it stands for one instruction and its answer, as an Alpaca row does.
    """

    messages: list[dict[str, Any]]
    learned: list[bool | None]
    tools: list[Any] | None = None
    is_instruction: bool = False


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A prompt and the answer to it, as plain text; the prompt may be empty."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text and its class, as it stands in the data."""

    text: str
    label: Any


Content = Conversation | PlainText | Labelled


@dataclasses.dataclass(frozen=True)
class Format:
    """A layout of columns: those it needs, those it can use, and what a row of it says."""

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Values], Content]


def _messages(row: Values) -> Conversation:
    return _conversation(_listed(row["messages"], "messages"), row)


def _sharegpt(row: Values) -> Conversation:
    return _conversation(_listed(row["conversations"], "conversations"), row)


def _alpaca(
    instruction: str, extra: tuple[str, ...], output: str
) -> Callable[[Values], Conversation]:
    def read(row: Values) -> Conversation:
        turns = _exchanges(
            row, _with_context(row, instruction, extra), text_of(row[output], output)
        )
        return dataclasses.replace(_conversation(turns, row), is_instruction=True)

    return read


def _asked(prompt: str, answer: str) -> Callable[[Values], Conversation | PlainText]:
    def read(row: Values) -> Conversation | PlainText:
        if asked := _turns(row[prompt]):
            said = _turns(row[answer]) or [{"role": "assistant", "content": row[answer]}]
            found = _conversation([*asked, *said], row)
            before = len(found.messages) - len(
                said
            )  # what stands in the prompt is asked, not answered
            learned = [False if at < before else flag for at, flag in enumerate(found.learned)]
            return dataclasses.replace(found, learned=learned)
        question, reply = _with_context(row, prompt, ("context",)), text_of(row[answer], answer)
        if any(row.get(key) for key in (*SYSTEM, "history", *TOOLS)):
            return _conversation(_exchanges(row, question, reply), row)
        return PlainText(question, reply)

    return read


def _called(row: Values) -> Conversation:
    """A question and the calls that answer it."""
    calls = {"role": "assistant", "content": None, "tool_calls": _listed(row["answers"], "answers")}
    return _conversation([{"role": "user", "content": row["query"]}, calls], row)


def _squad(row: Values) -> PlainText:
    answers = _unpacked(row["answers"])
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if not isinstance(texts, list):
        raise DataError(f"answers is {_shown(answers)}, expected a list of texts")
    return PlainText(
        _with_context(row, "question", ("context",)), text_of(texts[0], "answers") if texts else ""
    )


def _labelled(text: str, label: str) -> Callable[[Values], Labelled]:
    def read(row: Values) -> Labelled:
        if not isinstance(row[text], str) or not row[text].strip():
            raise DataError(f"{text} is {_shown(row[text])}, expected text")
        return Labelled(row[text], row[label])

    return read


def _plain(row: Values) -> PlainText:
    return PlainText("", text_of(row["text"], "text"))


SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
ASKED = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"), ("input", "output"),
)  # fmt: skip
FORMATS = (
    Format("messages", ("messages",), (*TOOLS, *SYSTEM), _messages),
    Format("sharegpt", ("conversations",), (*TOOLS, *SYSTEM), _sharegpt),
    Format("alpaca", ("instruction", "output"), ("input", *SYSTEM, "history"), _alpaca("instruction", ("input",), "output")),
    Format(
        "alpaca", ("instruction", "response"), ("context", "input", *SYSTEM, "history"),
        _alpaca("instruction", ("input", "context"), "response"),
    ),
    *(
        Format("prompt/completion", columns, ("context", *SYSTEM, "history", *TOOLS), _asked(*columns))
        for columns in ASKED
    ),
    Format("prompt/completion", ("query", "answers"), (*SYSTEM, *TOOLS), _called),
    Format("squad", ("question", "answers"), ("context",), _squad),
    *(
        Format(CLASSIFICATION, (text, label), (), _labelled(text, label))
        for text in ("text", "sentence")
        for label in ("label", "labels")
    ),
    Format("text", ("text",), (), _plain),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(found.name for found in FORMATS))


def detected(rows: Sequence[Values], name: str, chosen: str | None) -> Format:
    """The format whose columns the most rows have; the first of these, in the order of `FORMATS`.

    Args:
        rows: the rows.
        name: what to call the data in an error.
        chosen: the format that the user named, or None.

    Raises:
        DataError: the rows have the columns of no format, or not those of the one that was named.
    """
    keys = [row.keys() for row in rows]
    known = [found for found in FORMATS if chosen in (None, found.name)]
    counts = [sum(set(found.columns) <= row for row in keys) for found in known]
    if not max(counts):
        there = list(dict.fromkeys(str(key) for row in keys for key in row))
        columns = ", ".join(there)
        wanted = "; ".join(f"{found.name} ({', '.join(found.columns)})" for found in known)
        lone = next(iter(keys[0])) if len(keys[0]) == 1 else ""
        hint = next(
            (f"; is the file separated by {mark!r}?" for mark in ";\t|" if mark in lone), ""
        )
        plain = {key.strip().lower(): key for key in there}
        if fit := next(
            (found.columns for found in known if set(found.columns) <= set(plain)), None
        ):
            hint = f"; here that is --columns {','.join(f'{column}={plain[column]}' for column in fit)}"
        raise DataError(
            f"data {name!r} has the columns {columns}, which are no known format; known are: {wanted}. Say which columns "
            f"are meant with --columns, such as --columns prompt=question,completion=reply{hint}"
        )
    return known[counts.index(max(counts))]


def read(layout: Format, row: Values, mapped: bool) -> Content:
    """What a row says.

    Args:
        layout: its format.
        row: its columns.
        mapped: whether the user said which columns are meant, so that others do not matter.

    Raises:
        DataError: a column that is missing or of a wrong type, or one that changes what the row means.
    """
    if absent := [column for column in layout.columns if row.get(column) is None]:
        if layout.name == CLASSIFICATION and absent == [layout.columns[1]] and absent[0] in row:
            raise DataError(f"{absent[0]} is null, so the row has no class; remove such rows")
        raise DataError(f"{absent[0]} is {'null' if absent[0] in row else 'missing'}")
    if not mapped:
        _check_meaning(layout, row)
    return layout.read(row)


def is_left_out(row: Values) -> bool:
    """Whether the row itself says that nothing of it is to be learned, as with `weight: 0`."""
    return (
        _flag(
            row,
            FLAGS,
            "the row's ",
            "; to leave the column aside, name those that matter with --columns",
        )
        is False
    )


def unused_keys(layout: Format, rows: Iterable[Values]) -> dict[str, int]:
    """Columns, and keys of messages, that are not read → in how many rows they say something."""
    used = {*layout.columns, *layout.optional, *FLAGS}
    found: collections.Counter[str] = collections.Counter()
    for row in rows:
        found.update(key for key in row if key not in used and row[key] not in (None, [], {}, ""))
        for column in ("messages", "conversations", "prompt", "completion"):
            turns = row.get(column) if column in used else None
            if isinstance(turns, list):
                said = {
                    key
                    for turn in turns
                    if isinstance(turn, Mapping)
                    for key, value in turn.items()
                    if value is not None
                }
                found.update(f"{column}[].{key}" for key in said - USED_OF_A_MESSAGE)
    return dict(found)


def text_of(value: Any, what: str) -> str:
    """A value as the text that it is, in the file's own characters.

    Raises:
        DataError: it is no text, number or date.
    """
    if isinstance(value, bool):
        raise DataError(f"{what} is {_shown(value)}, expected text")
    if isinstance(value, int | float | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    if _is_parts(value):
        return "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{what} is {_shown(value)}, expected text")
    return value


def label_text(value: Any) -> str:
    """A class's name: text as it is, a whole number without a fraction, True and False."""
    return (
        value if isinstance(value, str) else str(value if isinstance(value, bool) else int(value))
    )


def _is_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and "type" in part for part in value)
    )


def _part(part: Mapping[str, Any], what: str) -> str:
    if part["type"] != "text":
        raise DataError(
            f"{what} holds a part of type {_shown(part['type'])}; only text can be trained on"
        )
    return text_of(part.get("text", part.get("value")), what)


def _conversation(turns: Sequence[Any], row: Values) -> Conversation:
    messages: list[dict[str, Any]] = []
    learned: list[bool | None] = []
    if odd := [turn for turn in turns if not isinstance(turn, Mapping)]:
        raise DataError(f"a message is {_shown(odd[0])}, expected a role and content")
    turns = [turn for turn in turns if not _says_no_system(turn)]
    if system := next((text_of(row[key], key) for key in SYSTEM if row.get(key)), "").strip():
        if turns and _either(turns[0], "role", "from") == "system":
            raise DataError("there is a system column and a system message; keep one of them")
        messages.append({"role": "system", "content": system})
        learned.append(None)
    for turn in turns:
        messages.append(_message(turn))
        learned.append(_flag(turn, MESSAGE_FLAGS, "a message's "))
    given = [row.get(key) for key in TOOLS] + [turn.get("tools") for turn in turns[:1]]
    return Conversation(messages, learned, _tools(next((tools for tools in given if tools), None)))


def _either(turn: Mapping[str, Any], *keys: str) -> Any:
    """The first of these keys that says something."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _says_no_system(turn: Mapping[str, Any]) -> bool:
    return _either(turn, "role", "from") == "system" and not _either(turn, "content", "value")


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    word, content = _either(turn, "role", "from"), _either(turn, "content", "value")
    role = ROLES.get(word.lower()) if isinstance(word, str) else None
    if role is None:
        raise DataError(f"unknown role {_shown(word)}; known are {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role}
    calls = _calls(turn.get("tool_calls"))
    if turn.get("function_call"):
        calls.append(_call(_unpacked(turn["function_call"]), "function_call"))
    if str(word).lower() in CALLING:
        said = _unpacked(content)
        calls, content = (
            [_call(call, str(word)) for call in (said if isinstance(said, list) else [said])],
            None,
        )
    if content is None and not calls:
        raise DataError(f"the {word}'s content is null, expected text")
    message["content"] = "" if content is None else text_of(content, f"the {word}'s content")
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = text_of(turn[key], key)
    thoughts = [
        turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key)
    ]
    if thoughts:
        message["reasoning_content"] = text_of(thoughts[0], "reasoning_content")
    return message


def _calls(given: Any) -> list[dict[str, Any]]:
    given = _unpacked(given)
    return [_call(call, "tool_calls") for call in _listed(given, "tool_calls")] if given else []


def _call(call: Any, what: str) -> dict[str, Any]:
    """A call in the form that chat templates take, its arguments as an object rather than as JSON text."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{what} is {_shown(call)}, expected a name and arguments")
    arguments = _unpacked(_either(inner, "arguments", "parameters") or {})
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"{what}: the arguments of {inner['name']} are {_shown(arguments)}, expected a JSON object"
        )
    found: dict[str, Any] = {
        "type": "function",
        "function": {"name": inner["name"], "arguments": dict(arguments)},
    }
    return {"id": call["id"], **found} if isinstance(call.get("id"), str) else found


def _tools(given: Any) -> list[Any] | None:
    tools = _unpacked(given)
    if not tools:
        return None
    found = [_unpacked(tool) for tool in _listed(tools, "tools")]
    if odd := [tool for tool in found if not isinstance(tool, Mapping)]:
        raise DataError(f"tools holds {_shown(odd[0])}, expected JSON schemas of functions")
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in found
    ]


def _with_context(row: Values, question: str, extra: tuple[str, ...]) -> str:
    parts = [text_of(row[question], question)]
    parts += [text_of(row[key], key) for key in extra if row.get(key) is not None]
    return "\n\n".join([parts[0], *(part for part in parts[1:] if part.strip())])


def _pairs(history: Any) -> list[Sequence[Any]]:
    pairs = _listed(_unpacked(history), "history") if history else []
    if odd := [pair for pair in pairs if not isinstance(pair, list | tuple) or len(pair) != 2]:
        raise DataError(
            f"history holds {_shown(odd[0])}, expected pairs of a question and its answer"
        )
    return pairs


def _exchanges(row: Values, question: str, reply: str) -> list[dict[str, Any]]:
    """The messages of earlier exchanges, if the row has any, and of this one."""
    pairs = [*_pairs(row.get("history")), (question, reply)]
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def _turns(value: Any) -> list[Any] | None:
    """The messages that a column holds, as a list, one alone, or a list as JSON text; None if it holds none."""
    found = [value] if isinstance(value, Mapping) else _unpacked(value)
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(turn, Mapping) for turn in found)
    ):
        return None
    words = [_either(turn, "role", "from") for turn in found]
    if isinstance(value, str) and not all(
        isinstance(word, str) and word.lower() in ROLES for word in words
    ):
        return None  # JSON that is a text to answer
    return found if all(word is not None for word in words) else None


def _listed(value: Any, what: str) -> list[Any]:
    value = _unpacked(value)
    if not isinstance(value, list):
        raise DataError(f"{what} is {_shown(value)}, expected a list")
    return value


def _unpacked(value: Any) -> Any:
    """A list or an object that was written as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, parse_float=Number)
        except (ValueError, RecursionError):
            return value
    return value


def _flag(
    given: Mapping[str, Any], keys: tuple[str, ...], whose: str, way_out: str = ""
) -> bool | None:
    """True, False, or None where nothing is said; 0 and 1 count as such, as numbers or as text."""
    for key in keys:
        value = given.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, int | float) and value in (0, 1):
            return bool(value)
        if (said := SAYS.get(str(value).lower())) is None:
            raise DataError(
                f"{whose}{key} is {_shown(value)}; only 0 and 1 are taken, for not learned and learned{way_out}"
            )
        return said
    return None


def _check_meaning(layout: Format, row: Values) -> None:
    """Refuse what would make the row another than it is read as."""
    said = {key for key, value in row.items() if value not in (None, [], {}, "")} - {
        *layout.columns,
        *layout.optional,
    }
    way_out = f"; if it does not matter, name the columns that do: --columns {','.join(f'{c}={c}' for c in layout.columns)}"
    if pair := [key for key in PREFERENCES if key in said]:
        asked = (
            f", or --columns prompt={layout.columns[0]},completion=chosen"
            if "chosen" in said
            else ""
        )
        raise DataError(
            f"{pair[0]} makes it a preference (DPO) row, and train takes answers to imitate{way_out}{asked}"
        )
    if media := [key for key in MEDIA if key in said]:
        raise DataError(
            f"{media[0]} is {_shown(row[media[0]])}, and only text can be trained on{way_out}"
        )
    if (
        "label" in said
        and SAYS.get(str(row["label"]).lower()) is False
        and layout.name != CLASSIFICATION
    ):
        raise DataError(
            f"label {_shown(row['label'])} marks an answer not to imitate (KTO); remove such rows{way_out}"
        )
    if layout.name == CLASSIFICATION and (pair := [key for key in PAIRS if key in said]):
        raise DataError(
            f"{pair[0]} stands beside {layout.columns[0]}, and pairs of texts cannot be classified yet{way_out}"
        )


def _shown(value: Any) -> str:
    """A value for a message, at most 80 characters of it."""
    text = (
        json.dumps(value, ensure_ascii=False, default=str)
        if not isinstance(value, Number)
        else value.literal
    )
    return text if len(text) <= 80 else text[:79] + "…"
