"""A Modelfile for Ollama: where the files are, how a conversation is written, where an answer ends.

The template is found by rendering the tokenizer's own chat template with marks in place of what is
said. What stands between two marks may depend only on who speaks, on whether it is the first or the
last question, and on whether there is a system prompt. That is written in Go's template language,
and compared with the tokenizer's rendering of other conversations. If the two differ, no template
is written, with a warning.
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
"""What a template that was found is tried with: a system prompt, questions, answers."""
NO_TEMPLATE = (
    "its chat template is not one that can be written for Ollama here, so the Modelfile hands on "
    "prompts as they are, without turns: the model will not answer as it was trained. Put the "
    "right TEMPLATE into the Modelfile"
)

Place = tuple[str, str]
"""What stands before a system prompt, and between it and the question behind it."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """What stands before each thing that is said.

    Attributes:
        first: before the first question, without a system prompt.
        answer: before an answer.
        later: before a later question.
        opening: after the last question: what opens the answer that is to come.
        system: around a system prompt, in the first question's place.
        system_later: the same before a later question that is the last: some templates put it
            there.
        is_told: the template has a place for a system prompt; if not, it is put before the first
            question.

    >>> turns = Turns("<user>", "<model>", "<user>", "<model>", ("<system>", "<user>"))
    >>> turns.render("Be brief.", ["Hello", "Why?"], ["Hi"])
    '<system>Be brief.<user>Hello<model>Hi<user>Why?<model>'
    """

    first: str
    answer: str
    later: str
    opening: str
    system: Place
    system_later: Place | None = None
    is_told: bool = True

    def go_template(self) -> str:
        """Returns it in Go's template language, over Ollama's `.Messages` and `.System`.

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
            f"{{{{ .Content }}}}{{{{ if $last }}}}{_literal(self.opening)}{{{{ end }}}}"
            '{{ else if and (eq .Role "assistant") (not $first) }}'
            f"{_literal(self.answer)}{{{{ .Content }}}}"
            "{{ end }}{{ end }}"
        )

    def render(self, system: str | None, questions: Sequence[str], answers: Sequence[str]) -> str:
        """Returns what `go_template` gives for a conversation that ends with a question."""
        text = ""
        for number, question in enumerate(questions):
            place = self.system if number == 0 else self.system_later
            is_here = number == 0 if self.system_later is None else number == len(questions) - 1
            if system and is_here and place is not None:
                text += place[0] + system + place[1]
            else:
                text += self.later if number else self.first
            text += question
            if number < len(answers):
                text += self.answer + answers[number]
        return text + self.opening


def turns_of(tokenizer: Any) -> Turns | None:
    """Returns how the tokenizer's chat template writes conversations.

    None if it has none, or one that cannot be written so.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    plain = _pieces(_rendered(tokenizer, None, USER, ASSISTANT), _order(USER, ASSISTANT))
    if plain is None:
        return None
    first, answer, later, again, later_again, opening = plain
    if (answer, later) != (again, later_again):
        return None
    found = Turns(first, answer, later, opening, (first, "\n\n"), is_told=False)
    found = _with_system(tokenizer, found) or found
    for system in (None, TRIED[0]) if found.is_told else (None,):
        for count in (1, 2, 3):
            said = TRIED[1][:count], TRIED[2][: count - 1]
            if found.render(system, *said) != _rendered(tokenizer, system, *said):
                return None
    return _without_bos(found, tokenizer)


def _with_system(tokenizer: Any, found: Turns) -> Turns | None:
    """Returns the same with the template's place for a system prompt.

    None if it has none, or refuses a system prompt.
    """
    alone = _pieces(_rendered(tokenizer, SYSTEM, USER[:1], ()), [SYSTEM, USER[0]])
    if alone is None:
        return None
    order = _order(USER, ASSISTANT)
    leading = _pieces(_rendered(tokenizer, SYSTEM, USER, ASSISTANT), [SYSTEM, *order])
    if leading is not None:
        return dataclasses.replace(found, system=(alone[0], alone[1]), is_told=True)
    trailing = _pieces(
        _rendered(tokenizer, SYSTEM, USER, ASSISTANT), [*order[:-1], SYSTEM, order[-1]]
    )
    if trailing is None:
        return None
    return dataclasses.replace(
        found, system=(alone[0], alone[1]), system_later=(trailing[-3], trailing[-2]), is_told=True
    )


def _without_bos(found: Turns, tokenizer: Any) -> Turns:
    """Removes the BOS token at the beginning if the tokenizer adds one: llama.cpp will add it."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return found
    token = str(tokenizer.bos_token)
    system = (found.system[0].removeprefix(token), found.system[1])
    return dataclasses.replace(found, first=found.first.removeprefix(token), system=system)


def modelfile(source: str, adapter: str | None, tokenizer: Any) -> str:
    """Returns the text of a Modelfile for a model, and perhaps an adapter, in files beside it.

    Nothing in the names or the tokenizer can become an instruction of its own. A template that
    cannot be written is warned of.
    """
    lines = [
        *_file("FROM", source, "./base.gguf"),
        *(_file("ADAPTER", adapter, "./adapter.gguf") if adapter else []),
    ]
    turns = turns_of(tokenizer)
    if turns is not None:
        if not turns.is_told:
            lines.append(
                "# the model's chat template takes no system prompt: one is put before the first "
                "question"
            )
        if Template(tokenizer).prints_the_day:
            lines.append(
                "# the model's chat template prints the date: here it is the day on which this "
                "file was written"
            )
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    elif getattr(tokenizer, "chat_template", None):
        warnings.warn(f"{source}: {NO_TEMPLATE}", LorakinWarning, stacklevel=2)
        lines += [
            "# WARNING: no TEMPLATE is known for this model's chat template. Write the right one "
            "here: this one",
            "# has no turns",
        ]
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        lines += [
            "# the model has no chat template, so prompts are handed on as they are",
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


def _file(word: str, name: str, instead: str) -> list[str]:
    """Returns an instruction that names a file; a name that could not stand there is replaced."""
    if name.isprintable() and '"' not in name and name == name.strip():
        return [
            f'{word} "{name}"' if any(letter.isspace() for letter in name) else f"{word} {name}"
        ]
    return [
        "# the file's own name cannot stand in a Modelfile: copy it here under this one",
        f"{word} {instead}",
    ]


def _quoted(word: str, text: str) -> list[str]:
    """Returns an instruction with a text in quotes, in which Ollama knows no escapes."""
    if '"' not in text and text.isprintable():
        return [f'{word}"{text}"']
    if '"' not in text and not any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
        return [f'{word}"""{text}"""']
    return ["# one more text ends an answer, which cannot stand in a Modelfile"]


def _choice(condition: str, place: Place, otherwise: str) -> str:
    return (
        f"{{{{ if {condition} }}}}{_literal(place[0])}{{{{ $.System }}}}{_literal(place[1])}"
        f"{{{{ else }}}}{_literal(otherwise)}{{{{ end }}}}"
    )


def _literal(text: str) -> str:
    """Returns a text for a Go template in a Modelfile.

    Where it could be read as something else, it becomes a Go string.
    """
    odd = "{{" in text or "}}" in text or text.endswith("{") or '"' in text
    odd = odd or any(ord(letter) < 32 and letter not in "\n\t" for letter in text)
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if odd else text


def _order(questions: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Returns the conversation's parts as they follow each other."""
    said = []
    for number, question in enumerate(questions):
        said += [question, *answers[number : number + 1]]
    return said


def _pieces(text: str, marks: Sequence[str]) -> list[str] | None:
    """Returns what stands before, between and behind the marks.

    None unless each mark stands there once, in this order.
    """
    if any(text.count(mark) != 1 for mark in marks) or (SYSTEM in text and SYSTEM not in marks):
        return None
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
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
    for number, text in enumerate(_order(questions, answers)):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    try:
        return Template(tokenizer).text(messages, answer_next=True)
    except DataError:
        return ""
