"""A Modelfile for Ollama: where the files are, how a conversation is written, where an answer ends.

The template is found by rendering the tokenizer's chat template with placeholders for the messages.
The text between two placeholders may depend only on the role, on whether the question is the first
or the last, and on whether there is a system prompt. It is written in Go's template language, and
compared with the tokenizer's rendering of other conversations. If the two differ, no template is
written, with a warning.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from typing import Any

from lorakin.errors import DataError, LorakinWarning
from lorakin.training.endings import end_of_turn, end_of_turn_text
from lorakin.training.templates import Template

SYSTEM = "SYSTEMMARK"
USER = ("FIRSTMARK", "SECONDMARK", "THIRDMARK")
ASSISTANT = ("ANSWERMARK", "REPLYMARK")
TRIED = ("Be brief: 1, 2.", ("What is 2+2?", "In words?\n\nPlease.", "Why?"), ("4", "Four."))
"""A system prompt, questions and answers, on which a template that was found is tried."""
NO_TEMPLATE = (
    "lorakin cannot write its chat template for Ollama, so the Modelfile passes prompts on "
    "unchanged, without turns: the model will not answer as it was trained. Put the right TEMPLATE "
    "into the Modelfile"
)

SystemWrapping = tuple[str, str]
"""The text before a system prompt, and the text between it and the question after it."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """The text that a chat template writes before each message.

    Attributes:
        first: before the first question, without a system prompt.
        answer: before an answer.
        later: before a later question.
        generation_prompt: after the last question, before the answer to be generated.
        system: around a system prompt, in place of `first`.
        system_later: around a system prompt before a last question that is not the first, where
            some templates write it.
        has_system_slot: whether the template has a place for a system prompt; if not, it is written
            before the first question.

    >>> turns = Turns("<user>", "<model>", "<user>", "<model>", ("<system>", "<user>"))
    >>> turns.render("Be brief.", ["Hello", "Why?"], ["Hi"])
    '<system>Be brief.<user>Hello<model>Hi<user>Why?<model>'
    """

    first: str
    answer: str
    later: str
    generation_prompt: str
    system: SystemWrapping
    system_later: SystemWrapping | None = None
    has_system_slot: bool = True

    def go_template(self) -> str:
        """Returns the template in Go's language, over Ollama's `.Messages` and `.System`.

        `.System` holds all system messages together.
        """
        if self.system_later is None:
            first = _choice("$.System", self.system, self.first)
            later = _literal(self.later)
        else:
            first = _choice("and $.System $last", self.system, self.first)
            later = _choice("and $.System $last", self.system_later, self.later)
        return (
            "{{ $first := true }}{{ range $i, $m := .Messages }}{{ $last := eq (len (slice "
            "$.Messages $i)) 1 }}"
            '{{ if eq .Role "user" }}'
            f"{{{{ if $first }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}{{{{ $first = false }}}}"
            f"{{{{ .Content }}}}{{{{ if $last }}}}{_literal(self.generation_prompt)}{{{{ end }}}}"
            '{{ else if and (eq .Role "assistant") (not $first) }}'
            f"{_literal(self.answer)}{{{{ .Content }}}}"
            "{{ end }}{{ end }}"
        )

    def render(self, system: str | None, questions: Sequence[str], answers: Sequence[str]) -> str:
        """Returns what `go_template` gives for a conversation that ends with a question."""
        text = ""
        system_index = 0 if self.system_later is None else len(questions) - 1
        for index, question in enumerate(questions):
            wrapping = self.system if index == 0 else self.system_later
            if system and index == system_index and wrapping is not None:
                text += wrapping[0] + system + wrapping[1]
            else:
                text += self.later if index else self.first
            text += question
            if index < len(answers):
                text += self.answer + answers[index]
        return text + self.generation_prompt


def turns_of(tokenizer: Any) -> Turns | None:
    """Returns how the tokenizer's chat template writes conversations.

    None if it has none, or one that cannot be written so.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    plain = _pieces(_rendered(tokenizer, None, USER, ASSISTANT), _order(USER, ASSISTANT))
    if plain is None:
        return None
    first, answer, later, second_answer, second_later, generation_prompt = plain
    if (answer, later) != (second_answer, second_later):
        return None
    turns = Turns(first, answer, later, generation_prompt, (first, "\n\n"), has_system_slot=False)
    turns = _with_system(tokenizer, turns) or turns
    for system in (None, TRIED[0]) if turns.has_system_slot else (None,):
        for count in (1, 2, 3):
            messages = TRIED[1][:count], TRIED[2][: count - 1]
            if turns.render(system, *messages) != _rendered(tokenizer, system, *messages):
                return None
    return _without_bos(turns, tokenizer)


def _with_system(tokenizer: Any, turns: Turns) -> Turns | None:
    """Returns the turns with the template's place for a system prompt.

    None if it has none, or refuses a system prompt.
    """
    alone = _pieces(_rendered(tokenizer, SYSTEM, USER[:1], ()), [SYSTEM, USER[0]])
    if alone is None:
        return None
    order = _order(USER, ASSISTANT)
    leading = _pieces(_rendered(tokenizer, SYSTEM, USER, ASSISTANT), [SYSTEM, *order])
    if leading is not None:
        return dataclasses.replace(turns, system=(alone[0], alone[1]), has_system_slot=True)
    trailing = _pieces(
        _rendered(tokenizer, SYSTEM, USER, ASSISTANT), [*order[:-1], SYSTEM, order[-1]]
    )
    if trailing is None:
        return None
    return dataclasses.replace(
        turns,
        system=(alone[0], alone[1]),
        system_later=(trailing[-3], trailing[-2]),
        has_system_slot=True,
    )


def _without_bos(turns: Turns, tokenizer: Any) -> Turns:
    """Removes the BOS token at the beginning if the tokenizer adds one: llama.cpp will add it."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return turns
    token = str(tokenizer.bos_token)
    system = (turns.system[0].removeprefix(token), turns.system[1])
    return dataclasses.replace(turns, first=turns.first.removeprefix(token), system=system)


def modelfile(source: str, adapter: str | None, tokenizer: Any) -> str:
    """Returns the text of a Modelfile for a model, and perhaps an adapter, in files next to it.

    Names and the tokenizer cannot inject instructions. If the template cannot be written, there is
    a warning.
    """
    lines = [
        *_file("FROM", source, "./base.gguf"),
        *(_file("ADAPTER", adapter, "./adapter.gguf") if adapter else []),
    ]
    turns = turns_of(tokenizer)
    if turns is not None:
        if not turns.has_system_slot:
            lines.append(
                "# the model's chat template takes no system prompt: one is put before the first "
                "question"
            )
        if Template(tokenizer).prints_the_day:
            lines.append(
                "# the model's chat template prints the date: here that is the date on which this "
                "file was written"
            )
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    elif getattr(tokenizer, "chat_template", None):
        warnings.warn(f"{source}: {NO_TEMPLATE}", LorakinWarning, stacklevel=2)
        lines += [
            "# WARNING: lorakin cannot write this model's chat template. Put the right one here:",
            "# this one has no turns",
        ]
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        lines += [
            "# the model has no chat template, so prompts are passed on unchanged",
            'TEMPLATE """{{ .Prompt }}"""',
        ]
    for stop in _stops(tokenizer):
        lines += _quoted("PARAMETER stop ", stop)
    return "\n".join(lines) + "\n"


def _stops(tokenizer: Any) -> list[str]:
    """Returns the texts that end an answer."""
    ends = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    return [
        str(stop)
        for stop in dict.fromkeys([tokenizer.eos_token, *ends, end_of_turn_text(tokenizer)])
        if stop
    ]


def _file(instruction: str, name: str, instead: str) -> list[str]:
    """Returns an instruction that names a file.

    A name that a Modelfile cannot hold is replaced by `instead`.
    """
    if name.isprintable() and '"' not in name and name == name.strip():
        has_space = any(letter.isspace() for letter in name)
        return [f'{instruction} "{name}"' if has_space else f"{instruction} {name}"]
    return [
        "# a Modelfile cannot hold the file's name: copy the file here under this one",
        f"{instruction} {instead}",
    ]


def _quoted(instruction: str, text: str) -> list[str]:
    """Returns an instruction with a text in quotes, in which Ollama knows no escapes."""
    if '"' not in text and text.isprintable():
        return [f'{instruction}"{text}"']
    if '"' not in text and not any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
        return [f'{instruction}"""{text}"""']
    return ["# one more text ends an answer, which a Modelfile cannot hold"]


def _choice(condition: str, wrapping: SystemWrapping, otherwise: str) -> str:
    before, after = map(_literal, wrapping)
    return (
        f"{{{{ if {condition} }}}}{before}{{{{ $.System }}}}{after}"
        f"{{{{ else }}}}{_literal(otherwise)}{{{{ end }}}}"
    )


def _literal(text: str) -> str:
    """Returns a text for a Go template in a Modelfile.

    Where it could be read as something else, it becomes a Go string.
    """
    needs_quotes = "{{" in text or "}}" in text or text.endswith("{") or '"' in text
    needs_quotes |= any(ord(letter) < 32 and letter not in "\n\t" for letter in text)
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if needs_quotes else text


def _order(questions: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Returns questions and answers in the order of the conversation."""
    messages = []
    for index, question in enumerate(questions):
        messages += [question, *answers[index : index + 1]]
    return messages


def _pieces(text: str, placeholders: Sequence[str]) -> list[str] | None:
    """Returns the text before, between and after the placeholders.

    None unless each placeholder occurs once, in this order.
    """
    if any(text.count(placeholder) != 1 for placeholder in placeholders):
        return None
    if SYSTEM in text and SYSTEM not in placeholders:
        return None
    pieces = []
    for placeholder in placeholders:
        piece, separator, text = text.partition(placeholder)
        if not separator:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _rendered(
    tokenizer: Any, system: str | None, questions: Sequence[str], answers: Sequence[str]
) -> str:
    """Returns the template's text for a conversation whose last question is to be answered.

    "" if the template refuses it.
    """
    messages = [{"role": "system", "content": system}] if system else []
    for index, text in enumerate(_order(questions, answers)):
        messages.append({"role": "assistant" if index % 2 else "user", "content": text})
    try:
        return Template(tokenizer).text(messages, answer_next=True)
    except DataError:
        return ""
