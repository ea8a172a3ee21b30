"""A Modelfile for Ollama: where the files are, how turns are written, and where an answer ends.

The template is found by rendering the tokenizer's own chat template with marks in the place of the turns. So it is right for
every template that puts turns one after another, and one that does not is left out, with a word in its place.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

MARKS = {"system": "\u2460SYSTEM\u2460", "user": "\u2460USER\u2460", "assistant": "\u2460ASSISTANT\u2460"}


@dataclasses.dataclass(frozen=True)
class Turns:
    """What stands around each turn, what opens an answer, and the system prompt that a conversation without one gets."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    opening: str
    closing: str
    first: str
    default_system: str | None

    def go_template(self) -> str:
        """In the template language that Ollama has from Go, for one exchange."""
        system = (
            "" if self.system is None else f"{{{{ if .System }}}}{self.system[0]}{{{{ .System }}}}{self.system[1]}{{{{ end }}}}"
        )
        user = f"{{{{ if .Prompt }}}}{self.user[0]}{{{{ .Prompt }}}}{self.user[1]}{{{{ end }}}}"
        return f"{self.first}{system}{user}{self.opening}{{{{ .Response }}}}{self.closing}"

    def render(self, prompt: str, system: str | None = None) -> str:
        """What `go_template` gives for a prompt that is to be answered."""
        said = "" if self.system is None or not system else f"{self.system[0]}{system}{self.system[1]}"
        return f"{self.first}{said}{self.user[0]}{prompt}{self.user[1]}{self.opening}"


def turns_of(tokenizer: Any) -> Turns | None:
    """How the tokenizer's chat template writes turns; None if it has none, or one that is not turn after turn."""
    if not tokenizer.chat_template:
        return None
    asked = _rendered(tokenizer, "user", opened=True)
    again = _rendered(tokenizer, "user", "assistant", "user")
    answered = _rendered(tokenizer, "user", "assistant")
    full = _rendered(tokenizer, "system", "user", opened=True)
    before, _, between = asked.partition(MARKS["user"])
    closing = answered.partition(MARKS["assistant"])[2]
    lead = again.partition(MARKS["assistant"])[2].partition(MARKS["user"])[0].removeprefix(closing)
    ending = closing if closing and between.startswith(closing) else ""  # turns of one template end alike
    system, default, first = None, None, before.removesuffix(lead)
    if MARKS["system"] in full:
        start, _, middle = full.partition(MARKS["system"])
        system = (start, middle.partition(MARKS["user"])[0].removesuffix(lead))
        if first and first.startswith(system[0]) and first.endswith(system[1]):
            default, first = first.removeprefix(system[0]).removesuffix(system[1]), ""
        else:  # what opens every conversation, such as a BOS token
            system, first = (system[0].removeprefix(first), system[1]), first
    found = Turns(system, (lead, ending), between.removeprefix(ending), closing, first, default)
    told = found.render(MARKS["user"], MARKS["system"] if system else default)
    if found.render(MARKS["user"], default) != asked or told != (full if system else asked):
        return None
    added = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    bos = tokenizer.bos_token if added else ""  # llama.cpp adds it too, so it is not written twice
    return dataclasses.replace(
        found,
        first=first.removeprefix(bos),
        system=None if system is None else (system[0].removeprefix(bos), system[1]),
        user=(lead.removeprefix(bos), ending),
    )


def modelfile(source: str, adapter: str | None, tokenizer: Any) -> str:
    """The Modelfile's text, for the model and perhaps the adapter in these files beside it."""
    lines = [f"FROM {source}", *([f"ADAPTER {adapter}"] if adapter else [])]
    turns = turns_of(tokenizer)
    if turns is None:
        lines.append("# the model has no chat template of turns, so Ollama writes prompts as they are")
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    stops = dict.fromkeys([tokenizer.eos_token, (turns.closing.strip() if turns else None)])
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop]
    return "\n".join(lines) + "\n"


def _turn(before: str, after: str, name: str) -> str:
    return f"{{{{ if .{name} }}}}{before}{{{{ .{name} }}}}{after}{{{{ end }}}}"


def _rendered(tokenizer: Any, *roles: str, opened: bool = False) -> str:
    """The template's text for these turns; nothing if it refuses them, as many do with a system turn."""
    messages = [{"role": role, "content": MARKS[role]} for role in roles]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except Exception:  # a chat template raises whatever it likes about a conversation
        return ""
    return text
