"""Messages, tool calls and tools, as data sets write them, in the form that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.training.contents import Conversation, Values, listed, short_json, text_of, unpacked

CALLING = ("function_call", "tool_call")
"""Roles whose content is a call, as JSON."""
ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "ai": "assistant", **dict.fromkeys(CALLING, "assistant"),
    "system": "system", "developer": "developer",
    "tool": "tool", "ipython": "tool", "function": "tool", "observation": "tool",
    "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
"""A role in the data → the role that templates know."""
FLAGS = ("train", "training", "weight", "loss_weight")
"""Keys of a row that say whether it is learned."""
MESSAGE_FLAGS = (*FLAGS, "loss")
"""Keys of a message that say so. A row's `loss` is a figure that somebody measured."""
SAYS = {**dict.fromkeys(("0", "false"), False), **dict.fromkeys(("1", "true"), True)}
"""A flag's value, in lower case → its meaning."""
USED_OF_A_MESSAGE = {
    "role", "from", "content", "value", "tool_calls", "tool_call_id", "name", "reasoning_content",
    "reasoning", "thinking", "function_call", "tools", *MESSAGE_FLAGS,
}  # fmt: skip
"""Keys of a message that are read."""
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
"""Columns for the system's message and for the tools."""


def conversation(turns: Sequence[Any], row: Values) -> Conversation:
    """Returns the conversation of these messages, with the row's system message and tools.

    >>> conversation([{"from": "human", "value": "Hi"}], {}).messages
    [{'role': 'user', 'content': 'Hi'}]

    Raises:
        DataError: a message without a known role or content, or two system messages.
    """
    if wrong := [turn for turn in turns if not isinstance(turn, Mapping)]:
        raise DataError(f"a message is {short_json(wrong[0])}, expected a role and content")
    turns = [turn for turn in turns if not _says_no_system(turn)]
    messages: list[dict[str, Any]] = []
    learned: list[bool | None] = []
    if system := next((text_of(row[key], key) for key in SYSTEM if row.get(key)), "").strip():
        if turns and either(turns[0], "role", "from") == "system":
            raise DataError("there is a system column and a system message; keep one of them")
        messages.append({"role": "system", "content": system})
        learned.append(None)
    for turn in turns:
        messages.append(_message(turn))
        learned.append(flag(turn, MESSAGE_FLAGS, "a message's "))
    given = [row.get(key) for key in TOOLS] + [turn.get("tools") for turn in turns[:1]]
    return Conversation(messages, learned, _tools(next((tools for tools in given if tools), None)))


def turns_in(value: Any) -> list[Any] | None:
    """Returns the messages in a column: a list, one alone, or JSON text; None if it has none."""
    turns = [value] if isinstance(value, Mapping) else unpacked(value)
    if not isinstance(turns, list) or not turns:
        return None
    if not all(isinstance(turn, Mapping) for turn in turns):
        return None
    roles = [either(turn, "role", "from") for turn in turns]
    are_known = all(isinstance(role, str) and role.lower() in ROLES for role in roles)
    # JSON text without known roles is itself the text to answer.
    if isinstance(value, str) and not are_known:
        return None
    return turns if all(role is not None for role in roles) else None


def either(turn: Mapping[str, Any], *keys: str) -> Any:
    """Returns the value of the first of these keys that is there and not None."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def with_context(row: Values, question: str, extra: tuple[str, ...]) -> str:
    """Returns a question and, after it, the other columns that belong to it."""
    parts = [text_of(row[question], question)]
    parts += [text_of(row[key], key) for key in extra if row.get(key) is not None]
    return "\n\n".join([parts[0], *(part for part in parts[1:] if part.strip())])


def exchanges(row: Values, question: str, reply: str) -> list[dict[str, Any]]:
    """Returns the messages of the row's earlier exchanges, if it has any, and of this one."""
    history = row.get("history")
    pairs = listed(history, "history") if history else []
    if wrong := [pair for pair in pairs if not isinstance(pair, list | tuple) or len(pair) != 2]:
        raise DataError(
            f"history holds {short_json(wrong[0])}, expected pairs of a question and its answer"
        )
    return [
        {"role": role, "content": content}
        for pair in [*pairs, (question, reply)]
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def flag(
    given: Mapping[str, Any], keys: tuple[str, ...], whose: str, way_out: str = ""
) -> bool | None:
    """Returns what the first of these keys says: True, False, or None if none says anything.

    Args:
        given: a row or a message.
        keys: its flags.
        whose: whose flags they are, for an error.
        way_out: what else the user can do, for an error.

    Raises:
        DataError: a value other than 0, 1, true and false.
    """
    for key in keys:
        value = given.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, int | float) and value in (0, 1):
            return bool(value)
        if (meaning := SAYS.get(str(value).lower())) is None:
            raise DataError(
                f"{whose}{key} is {short_json(value)}; only 0 and 1 are taken, "
                f"for not learned and learned{way_out}"
            )
        return meaning
    return None


def is_left_out(row: Values) -> bool:
    """Returns whether the row itself says that it is not to be learned.

    >>> is_left_out({"prompt": "a", "completion": "b", "weight": 0})
    True
    """
    way_out = "; to leave the column aside, name those that matter with --columns"
    return flag(row, FLAGS, "the row's ", way_out) is False


def _says_no_system(turn: Mapping[str, Any]) -> bool:
    """Returns whether a message is an empty one from the system."""
    return either(turn, "role", "from") == "system" and not either(turn, "content", "value")


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    word, content = either(turn, "role", "from"), either(turn, "content", "value")
    role = ROLES.get(word.lower()) if isinstance(word, str) else None
    if role is None:
        raise DataError(f"unknown role {short_json(word)}; known are {', '.join(ROLES)}")
    calls = _calls(turn.get("tool_calls"))
    if turn.get("function_call"):
        calls.append(_call(unpacked(turn["function_call"]), "function_call"))
    if str(word).lower() in CALLING:
        given = unpacked(content)
        calls = [_call(call, str(word)) for call in (given if isinstance(given, list) else [given])]
        content = None
    if content is None and not calls:
        raise DataError(f"the {word}'s content is null, expected text")

    message: dict[str, Any] = {"role": role}
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
    given = unpacked(given)
    return [_call(call, "tool_calls") for call in listed(given, "tool_calls")] if given else []


def _call(call: Any, what: str) -> dict[str, Any]:
    """Returns a call as templates take it, with its arguments as an object, not as JSON text."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise DataError(f"{what} is {short_json(call)}, expected a name and arguments")
    arguments = unpacked(either(inner, "arguments", "parameters") or {})
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"{what}: the arguments of {inner['name']} are {short_json(arguments)}, "
            "expected a JSON object"
        )
    for_template: dict[str, Any] = {
        "type": "function",
        "function": {"name": inner["name"], "arguments": dict(arguments)},
    }
    return {"id": call["id"], **for_template} if isinstance(call.get("id"), str) else for_template


def _tools(given: Any) -> list[Any] | None:
    tools = unpacked(given)
    if not tools:
        return None
    schemas = [unpacked(tool) for tool in listed(tools, "tools")]
    if wrong := [schema for schema in schemas if not isinstance(schema, Mapping)]:
        raise DataError(f"tools holds {short_json(wrong[0])}, expected JSON schemas of functions")
    return [
        dict(schema) if "function" in schema else {"type": "function", "function": dict(schema)}
        for schema in schemas
    ]
