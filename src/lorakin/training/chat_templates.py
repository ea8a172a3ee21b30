"""Choosing a chat template: the tokenizer's own, one that lorakin knows, a file, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakin.errors import DataError
from lorakin.storage import paths
from lorakin.training.contents import Conversation
from lorakin.training.reading import DataRows
from lorakin.training.templates import ALPACA

TEMPLATES = {"alpaca": ALPACA}
"""Chat templates that `--chat-template` knows by name."""
TEMPLATE = "chat_template.jinja"
"""The file beside an adapter that holds its chat template, if that is not the base's own."""
LONGEST_TEMPLATE = 1 << 20
"""Bytes of the longest template file that is read."""


def use_template(
    tokenizer: Any,
    chosen: bool | str,
    rows: DataRows | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str | None:
    """Sets the chat template with which rows are written.

    Args:
        tokenizer: a transformers tokenizer; its `chat_template` is set.
        chosen: True for its own, False for none, or the name or the file of another.
        rows: the rows; if all are instructions and there is no template, they get Alpaca's.
        arguments: variables of the template, such as enable_thinking: false.

    Returns:
        The template, if it is not the tokenizer's own; else None.

    Raises:
        DataError: no such file; arguments without a template, or that Jinja cannot write.
    """
    own = tokenizer.chat_template
    if isinstance(chosen, str):
        tokenizer.chat_template = template_named(chosen)
    elif not chosen:
        tokenizer.chat_template = None

    if not tokenizer.chat_template and rows is not None and _are_instructions(rows):
        tokenizer.chat_template = ALPACA
    begins = tokenizer("")["input_ids"][:1]
    if tokenizer.chat_template == ALPACA and begins == [tokenizer.bos_token_id]:
        tokenizer.chat_template = "{{- bos_token }}\n" + ALPACA

    if arguments:
        if not tokenizer.chat_template:
            raise DataError(f"--template-arg {next(iter(arguments))}: there is no chat template")
        given = [f"{name} = {_literal(name, value)}" for name, value in arguments.items()]
        sets = "".join(f"{{%- set {one} -%}}\n" for one in given)
        tokenizer.chat_template = sets + tokenizer.get_chat_template(None, None)

    used = tokenizer.chat_template
    return used if used and used != own else None


def _are_instructions(rows: DataRows) -> bool:
    """Returns whether rows hold conversations, each of one instruction and its answer."""
    spoken = [r.content for r in rows.records if isinstance(r.content, Conversation)]
    return bool(spoken) and all(content.is_instruction for content in spoken)


def remembered_template(folder: Path) -> str | None:
    """Returns the chat template of the adapter in `folder`; None if it is the base's own.

    Raises:
        DataError: the template's file cannot be read.
    """
    return _read(folder / TEMPLATE) if (folder / TEMPLATE).is_file() else None


def use_remembered(tokenizer: Any, folder: Path) -> None:
    """Gives the tokenizer the chat template of the adapter in `folder`, if it has its own."""
    if tokenizer is not None and (template := remembered_template(folder)) is not None:
        tokenizer.chat_template = template


def template_named(name: str) -> str:
    """Returns the chat template of that name, or the one in the file of that name.

    >>> template_named("alpaca")[:50]
    "{{- 'Below is an instruction that describes a task"

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    return _read(paths.user_path(name, "--chat-template", DataError))


def _literal(name: str, value: Any) -> str:
    """Returns a value as Jinja writes it."""
    if not name.isidentifier() or not isinstance(value, str | int | float | bool | None):
        raise DataError(
            f"--template-arg {name}={value!r}: expected a name, and true, false, a number or a text"
        )
    return json.dumps(value)


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(
            f"--chat-template {path}: there is no such file; expected {', '.join(TEMPLATES)}, "
            "or a file that holds a template"
        )
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_TEMPLATE + 1)
        if len(content) > LONGEST_TEMPLATE:
            raise DataError(
                f"--chat-template {path} is longer than {LONGEST_TEMPLATE:,} bytes, the limit"
            )
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {path} cannot be read: {error}") from None
