"""The command `lorakin chat`: a conversation on the terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorakin.cli.answering import (
    Adapters,
    MaxNewTokens,
    NoChatTemplate,
    Seed,
    Stop,
    System,
    Temperature,
    TopP,
)
from lorakin.cli.options import Dtype, Model, OtherBase, examples
from lorakin.cli.recipe_options import recipe_options
from lorakin.cli.verbosity import messages_on
from lorakin.errors import DataError, LorakinError
from lorakin.terminal import labelled, visible

if TYPE_CHECKING:
    from lorakin.training.chat import Chat

EXAMPLES = examples(
    "lorakin chat --model smollm2 --adapter adapter",
    "lorakin chat --model smollm2 --adapter french --adapter legal --system 'Be brief.'",
    "printf 'Who are you?\\n/base\\nWho are you?\\n' | lorakin chat -m smollm2 -a adapter",
)


@recipe_options("quantize")
def command(
    model: Model,
    adapter: Adapters = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    no_chat_template: NoChatTemplate = False,
    dtype: Dtype = "auto",
    *,
    other_base: OtherBase = False,
    **flags: Any,
) -> None:
    """Talk with a model and its adapters.

    Answers are printed while they come. /help lists what can be done: switch the adapter off and
    on (/base), choose another (/adapter), compare them, save the conversation. Ctrl-C stops an
    answer, Ctrl-D ends the chat. Through a pipe each line is said in turn; answers go to stdout,
    everything else to stderr.
    """
    from lorakin.training.chat import Chat
    from lorakin.training.sampling import Sampling
    from lorakin.training.speakers import load_speakers
    from lorakin.training.streaming import show_on_stdout

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop or [])
    speakers = load_speakers(
        model, adapter or [], base=True, chat_template=not no_chat_template, dtype=dtype,
        other_base=other_base, quantize=flags.get("quantize"),
    )  # fmt: skip
    notes = messages_on(True)
    chat = Chat(
        speakers, sampling, system, show_on_stdout, lambda text: notes.print(text, style="dim")
    )
    others = f" (also: {', '.join(n for n in chat.speakers if n != chat.speaker.name)})"
    chat.note(
        f"{model}: {chat.speaker.name} answers{others if len(speakers) > 1 else ''}; /help lists "
        "the commands, Ctrl-D ends"
    )
    for line in _typed(chat) if sys.stdin.isatty() else _piped():
        try:
            chat.say(line)
        except LorakinError as error:
            if not sys.stdin.isatty():
                raise
            notes.for_warnings.print(labelled("error: ", error, "bold red"))
        if chat.has_ended:
            return


def _typed(chat: Chat) -> Iterator[str]:
    """Yields the lines that are typed, with the keys of readline where it is there."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    while True:
        try:
            yield input(f"{visible(chat.speaker.name)}> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            chat.note("Ctrl-D ends the chat")


def _piped() -> Iterator[str]:
    """Yields the lines of stdin.

    Raises:
        DataError: they are not valid UTF-8.
    """
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), 1):
        try:
            yield line.decode("utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError:
            raise DataError(
                f"line {number} on stdin is not valid UTF-8; convert it first"
            ) from None
