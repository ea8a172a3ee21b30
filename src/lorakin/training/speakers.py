"""Who answers: a base model, or one of the adapters in it, each with its own chat template."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import PurePath
from typing import Any

from lorakin.errors import DataError, SettingError
from lorakin.switching import activate, adapters
from lorakin.training.base_class import is_seq2seq
from lorakin.training.contents import Conversation, PlainText, text_of
from lorakin.training.encoding import Encoder
from lorakin.training.endings import end_of_turn_text, stop_ids
from lorakin.training.limits import position_count
from lorakin.training.models import Loaded, load_tokenizer
from lorakin.training.sampling import Sampling
from lorakin.training.with_adapter import add_adapter, load_with_adapter

BASE = "base"
"""The name under which the base's answers are shown."""
FIRST = "default"
"""The first adapter's name in the model."""


@dataclasses.dataclass(frozen=True, eq=False)
class Speaker:
    """A model that answers under a name.

    Attributes:
        name: what the user knows it as.
        loaded: the model, which other speakers may share, and this one's tokenizer.
        adapter: the adapter's name in the model; None for the base alone.
        switches: whether the adapter is made the active one; else the model is used as it is.
    """

    name: str
    loaded: Loaded
    adapter: str | None = None
    switches: bool = True

    @classmethod
    def of(cls, loaded: Loaded, *, chat_template: bool = True) -> Speaker:
        """Returns the speaker of a model as it is, whatever is active in it."""
        return cls(loaded.name, _with_template(loaded, chat_template), switches=False)

    @property
    def model(self) -> Any:
        """The model."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with this speaker's chat template."""
        return self.loaded.tokenizer

    @cached_property
    def encoder(self) -> Encoder:
        """Makes tokens of prompts, as training does."""
        return Encoder(self.tokenizer)

    @cached_property
    def positions(self) -> int | None:
        """How many tokens the prompt and the answer may have together; None if any."""
        return position_count(self.model)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids at which an answer ends."""
        settings, template = self.model.generation_config, self.encoder.template
        return tuple(stop_ids(self.tokenizer, settings, template or False))

    @cached_property
    def turn_end(self) -> str | None:
        """The text that ends a turn, where no token does."""
        return end_of_turn_text(self.encoder.template)

    def stops(self, sampling: Sampling) -> tuple[str, ...]:
        """Returns the texts that end an answer."""
        return (*sampling.stop, *([self.turn_end] if self.turn_end else []))

    def prompt(self, text: str, system: str | None = None) -> list[int]:
        """Returns the tokens of a prompt: in the chat template, if there is one.

        Raises:
            DataError: a system message without a chat template.
        """
        if system is None and not is_seq2seq(self.model.config):
            return self.encoder.prompt(text)
        return self.ids(with_system(PlainText(text, ""), system))

    def ids(self, content: Conversation | PlainText) -> list[int]:
        """Returns the tokens that training puts before the answer to this content.

        Raises:
            DataError: a conversation without a chat template.
        """
        if is_seq2seq(self.model.config):
            ids: list[int] = self.tokenizer(text_for_encoder(content))["input_ids"]
            return ids
        if isinstance(content, PlainText):
            if self.encoder.takes_template(content.prompt):
                return self.encoder.prompt(content.prompt)
            return self.encoder.opened(content.prompt)
        if self.encoder.template is None:
            raise DataError(
                f"{self.loaded.name} has no chat template, which a conversation or a system "
                "message needs; use an instruct model, or an adapter that was trained with "
                "--chat-template"
            )
        return self.encoder.template.prompt(content.messages, content.tools)

    def activate(self) -> None:
        """Makes this speaker's adapter the only active one in the model."""
        if self.switches and adapters(self.model):
            activate(self.model, [] if self.adapter is None else self.adapter)


def text_for_encoder(content: Conversation | PlainText) -> str:
    """Returns what the encoder of a model such as T5 reads.

    Raises:
        DataError: it is more than one prompt.
    """
    if isinstance(content, PlainText):
        return content.prompt
    if [message["role"] for message in content.messages] != ["user"]:
        raise DataError("an encoder reads one prompt, and this is a conversation")
    return text_of(content.messages[0]["content"], "content")


def with_system(content: Conversation | PlainText, system: str | None) -> Conversation | PlainText:
    """Returns a prompt with a system message, unless it has one of its own.

    >>> with_system(PlainText("Hi", ""), "Be short.").messages
    [{'role': 'system', 'content': 'Be short.'}, {'role': 'user', 'content': 'Hi'}]
    """
    if system is None:
        return content
    if isinstance(content, PlainText):
        content = Conversation([{"role": "user", "content": content.prompt}], [None])
    if any(message["role"] in ("system", "developer") for message in content.messages):
        return content
    first = {"role": "system", "content": system}
    messages, learned = [first, *content.messages], [None, *content.learned]
    return dataclasses.replace(content, messages=messages, learned=learned)


def load_speakers(
    model: str,
    given: Sequence[str],
    *,
    base: bool = False,
    chat_template: bool = True,
    dtype: str = "auto",
    other_base: bool = False,
    quantize: str | None = None,
) -> list[Speaker]:
    """Loads a base model once, with all these adapters in it.

    Args:
        model: a base model, as for `load_model`.
        given: adapters' directories or hub ids; none means the base alone.
        base: whether the base answers too, as the first speaker.
        chat_template: whether prompts go into the chat template, if there is one.
        dtype, quantize: as for `load_model`.
        other_base: as for `load_with_adapter`.

    Raises:
        SettingError: an adapter that is given twice.
        LorakinError: the model or an adapter cannot be used.
    """
    names = names_of(given)
    first = given[0] if given else None
    loaded = load_with_adapter(model, first, dtype, other_base=other_base, quantize=quantize)
    of_adapters = [(FIRST, loaded)] if given else []
    for number, adapter in enumerate(given[1:], 1):
        name = f"{FIRST}_{number}"
        of_adapters.append((name, add_adapter(loaded, adapter, name, other_base=other_base)))

    speakers = [
        Speaker(name, _with_template(of_adapter, chat_template), in_model)
        for name, (in_model, of_adapter) in zip(names, of_adapters, strict=True)
    ]
    if base or not given:
        # The first adapter's template may have taken the place of the base's own.
        own = dataclasses.replace(loaded, tokenizer=load_tokenizer(model)) if given else loaded
        speakers.insert(0, Speaker(BASE, _with_template(own, chat_template)))
    return speakers


def names_of(given: Sequence[str]) -> list[str]:
    """Returns the names under which adapters are shown: the last part of each path.

    >>> names_of(["runs/french", "runs/legal/"]), names_of(["a/last", "b/last"])
    (['french', 'legal'], ['a/last', 'b/last'])

    Raises:
        SettingError: an adapter that is given twice.
    """
    if twice := [adapter for adapter in given if given.count(adapter) > 1]:
        raise SettingError(f"--adapter {twice[0]} is given twice")
    short = [PurePath(adapter).name or adapter for adapter in given]
    taken = [*short, BASE]
    return [
        name if taken.count(name) == 1 else adapter
        for name, adapter in zip(short, given, strict=True)
    ]


def _with_template(loaded: Loaded, chat_template: bool) -> Loaded:
    if chat_template or loaded.tokenizer.chat_template is None:
        return loaded
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.chat_template = None
    return dataclasses.replace(loaded, tokenizer=tokenizer)
