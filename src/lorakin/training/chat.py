"""A conversation with a model and its adapters: its history, its commands, and what is kept."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lorakin.errors import DataError, OutputError, SettingError
from lorakin.storage import files, paths
from lorakin.training.contents import Conversation, PlainText
from lorakin.training.generate import Request, answers, check_generates, generated, request_for
from lorakin.training.kept_cache import KeptCache
from lorakin.training.limits import check_prompt
from lorakin.training.prompts import Prompt
from lorakin.training.sampling import Sampling
from lorakin.training.speakers import BASE, Speaker, with_system
from lorakin.training.streaming import Streamer

Message = dict[str, str]
COMMAND = re.compile(r"/(?P<word>[a-z]+)(\s+(?P<rest>.*))?", re.DOTALL)
"""A line that is a command; `/usr/bin` is none."""


class Chat:
    """A conversation.

    Attributes:
        speakers: by name, the base and its adapters.
        speaker: who answers now.
        system: the system's message, or None.
        messages: what was said, without the system's message.
        has_ended: whether the user ended it.

    Args:
        speakers: from `load_speakers`, the base first.
        sampling: how tokens are chosen.
        system: the system's message.
        show: prints a piece of an answer.
        note: tells the user something that is no answer.

    Raises:
        ModelError: the model does not write text.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        sampling: Sampling,
        system: str | None,
        show: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        check_generates(speakers[0].loaded)
        self.speakers = {speaker.name: speaker for speaker in speakers}
        self.adapters = [speaker for speaker in speakers if speaker.adapter is not None]
        self.base = self.speakers[BASE]
        self.speaker = (self.adapters or [self.base])[0]
        self.sampling, self.system = sampling, system
        self.show, self.note = show, note
        self.messages: list[Message] = []
        self.has_ended = False
        self._last_adapter = self.speaker
        self._noted: set[str] = set()
        self._kept = KeptCache()
        if system is not None:
            self.set_system(system)

    def say(self, line: str) -> None:
        """Does what a line says: a command, or words to answer.

        Raises:
            SettingError: an unknown command, or one that cannot be done.
            LorakinError: the words cannot be answered; the conversation is as it was.
        """
        command = COMMAND.fullmatch(line.strip())
        if command is None:
            if line.strip():
                self.ask(line.strip())
            return
        if command["word"] not in COMMANDS:
            raise SettingError(f"there is no command /{command['word']}; /help lists them")
        COMMANDS[command["word"]][0](self, (command["rest"] or "").strip())

    def ask(self, text: str) -> None:
        """Answers, and adds the question and the answer to the conversation."""
        question: Message = {"role": "user", "content": text}
        request = self._request(self.speaker, [*self.messages, question])
        streamer = Streamer(self.speaker.tokenizer, self.speaker.stops(self.sampling), self.show)
        with Interruption() as interruption:
            reply = generated([request], self.sampling, streamer, [interruption], self._kept)[0]
        if interruption.is_asked:
            self.note("(stopped)")
        if reply:
            self.messages += [question, {"role": "assistant", "content": reply}]
        else:
            self.note("(no answer)")

    def _request(self, speaker: Speaker, messages: Sequence[Message]) -> Request:
        ids = speaker.ids(self._asked(speaker, messages))
        check_prompt(ids, speaker.loaded)
        return request_for(speaker, ids, self.sampling, len(messages) // 2)

    def _asked(self, speaker: Speaker, messages: Sequence[Message]) -> Conversation | PlainText:
        """Returns what a speaker is asked: all, or without a chat template the last words."""
        if speaker.encoder.template is not None:
            return with_system(Conversation(list(messages), [None] * len(messages)), self.system)
        if speaker.name not in self._noted:
            self._noted.add(speaker.name)
            self.note(
                f"{speaker.name} has no chat template: it continues each text by itself, without "
                "what was said before"
            )
        return PlainText(messages[-1]["content"], "")

    def switch_base(self, _: str = "") -> None:
        """Switches the adapter off, or on again."""
        if not self.adapters:
            raise SettingError("there is no adapter to switch off; this is the base")
        self._answer_as(self._last_adapter if self.speaker is self.base else self.base)

    def choose_adapter(self, name: str) -> None:
        """Lets another adapter answer.

        Raises:
            SettingError: there is none of that name.
        """
        names = [speaker.name for speaker in self.adapters]
        if name not in names:
            known = f"there are {', '.join(names)}" if names else "there is none; see --adapter"
            wrong = f"there is no adapter {name!r}" if name else "/adapter needs a name"
            raise SettingError(f"{wrong}; {known}")
        self._answer_as(self.speakers[name])

    def _answer_as(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self._last_adapter = self._last_adapter if speaker is self.base else speaker
        self.note(f"{speaker.name} answers now")

    def compare(self, _: str = "") -> None:
        """Shows everyone's answer to the last question; the conversation stays as it is."""
        if not self.messages:
            raise SettingError("nothing was asked yet, so there is nothing to compare")
        asked = [
            (Prompt(len(self.messages) // 2 - 1, "the chat", {}, self._last(speaker)), speaker)
            for speaker in self.speakers.values()
        ]
        said = {
            request.speaker.name: text
            for batch in answers(asked, self.sampling, len(asked))
            for request, text in batch
        }
        for name in self.speakers:
            self.note(f"── {name} ──")
            self.show(f"{said[name]}\n")

    def _last(self, speaker: Speaker) -> Conversation | PlainText:
        return self._asked(speaker, self.messages[:-1])

    def reset(self, _: str = "") -> None:
        """Begins again; the system's message and the adapter stay."""
        self.messages = []
        self.note("begun again")

    def set_system(self, text: str) -> None:
        """Sets the system's message from now on; an empty text takes it away.

        Raises:
            SettingError: there is no chat template to write it.
        """
        if text and all(speaker.encoder.template is None for speaker in self.speakers.values()):
            raise SettingError(
                f"{self.base.loaded.name} has no chat template, which a system message needs"
            )
        self.system = text or None

    def save(self, name: str) -> None:
        """Adds the conversation to a JSONL file, as a row that `lorakin train` reads.

        Raises:
            SettingError: no file, or nothing to save.
            OutputError: it cannot be written.
        """
        if not name:
            raise SettingError("/save needs a file, such as /save chats.jsonl")
        if not self.messages:
            raise SettingError("nothing was said yet, so there is nothing to save")
        path = paths.user_path(name, "/save", OutputError)
        if path.suffix != ".jsonl":
            raise SettingError(f"/save {name}: the file's name must end in .jsonl")
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        rows: list[dict[str, Any]] = [{"messages": [*system, *self.messages]}]
        if self.speaker.encoder.template is None:
            pairs = zip(self.messages[::2], self.messages[1::2], strict=True)
            rows = [{"prompt": q["content"], "completion": a["content"]} for q, a in pairs]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _append(path, lines.encode("utf-8", "backslashreplace"))
        self.note(f"added to {path}")

    def help(self, _: str = "") -> None:
        """Lists the commands."""
        for word, (_done, argument, text) in COMMANDS.items():
            self.note(f"{f'/{word} {argument}'.strip():<16} {text}")
        self.note("Ctrl-C           stops an answer\nCtrl-D           ends the chat")

    def quit(self, _: str = "") -> None:
        """Ends the conversation."""
        self.has_ended = True


COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str, str]] = {
    "base": (Chat.switch_base, "", "switch the adapter off, or on again"),
    "adapter": (Chat.choose_adapter, "NAME", "let another adapter answer"),
    "compare": (Chat.compare, "", "show everyone's answer to the last question"),
    "system": (Chat.set_system, "TEXT", "set the system's message; without TEXT, take it away"),
    "reset": (Chat.reset, "", "begin again"),
    "save": (Chat.save, "FILE.jsonl", "add the conversation to a file that lorakin train reads"),
    "help": (Chat.help, "", "list the commands"),
    "quit": (Chat.quit, "", "end the chat"),
}
"""A command's word → what it does, its argument, and its help."""


class Interruption(transformers.StoppingCriteria):
    """Within its context, Ctrl-C ends the answer after the next token instead of the program.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> Interruption:
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Returns (batch,): whether the rows are done."""
        return torch.full((len(input_ids),), self.is_asked, device=input_ids.device)


def _append(path: Path, lines: bytes) -> None:
    """Adds lines to a file, in one write.

    Raises:
        OutputError: it cannot be written.
        DataError: the file does not end with a whole line.
    """
    try:
        before = files.read_limited(path, 1 << 30, OutputError) if path.exists() else b""
        if before and not before.endswith(b"\n"):
            raise DataError(f"{path} does not end with a whole line, so nothing was added")
        with files.open_for_append(path) as file:
            file.write(lines)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
