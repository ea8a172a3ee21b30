"""Where an answer ends: the end of text, and what closes an assistant's turn in the tokenizer's chat template.

A model that was trained on turns says the end of a turn, not the end of text: `<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`.
Whatever generates must stop at both.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from lorakin.errors import DataError
from lorakin.training.templates import Template

ANSWER, NEXT = "ANSWERMARK", "NEXTMARK"
"""In the place of an answer and of the question after it: words that no template has."""
SHORTEST = 4
"""Letters of a text that ends a turn: a full stop ends sentences, too."""


def stops(tokenizer: Any, settings: Any = None, chat_template: bool = True) -> list[int]:
    """The ids at which an answer ends: those of a generation config, the end of text, the end of a turn.

    Args:
        tokenizer: of the model; None if it has none.
        settings: the model's GenerationConfig, if it has one.
        chat_template: whether prompts are put into the chat template, so that answers are turns.
    """
    said = getattr(settings, "eos_token_id", None)
    ids = list(said) if isinstance(said, list | tuple) else [said]
    if tokenizer is not None:
        ids.append(tokenizer.eos_token_id)
        ids += end_of_turn(tokenizer) if chat_template else []
    return list(dict.fromkeys(number for number in ids if type(number) is int and number >= 0))


def end_of_turn(tokenizer: Any) -> list[int]:
    """The id of the token that closes an assistant's turn in the chat template; none if there is no such token.

    A conversation is rendered that ends with the answer, and one that goes on. The special tokens that follow the answer in
    both close it, and the last of them is its end (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`). If the two have none in common,
    it is the first after a last answer (GPT-OSS's `<|return|>`), and if nothing follows that, the first before the next
    turn (GLM's `<|user|>`).
    """
    last, going_on = (_leading_tokens(text, tokenizer) for text in closings(tokenizer))
    common = [
        a
        for a, _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(last, going_on, strict=False)
        )
    ]
    return common[-1:] or last[:1] or going_on[:1]


def end_of_turn_text(tokenizer: Any) -> str | None:
    """What closes a turn where that is no token of its own, but text: a template of other tokens than the tokenizer has."""
    last, going_on = closings(tokenizer)
    if not last.strip() or end_of_turn(tokenizer):
        return None
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, going_on, strict=False))
    text = "".join(letter for letter, _ in pairs).strip()
    return text if len(text) >= SHORTEST else None


def closings(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes after an answer that is the last turn, and after one that is not; perhaps nothing.

    Raises:
        Unbounded: it does not end, or fills the memory.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return "", ""
    template = Template(tokenizer)
    asked = [{"role": "user", "content": "QUESTIONMARK"}, {"role": "assistant", "content": ANSWER}]
    last = going_on = ""
    with contextlib.suppress(DataError):  # it takes no such conversation
        last = template.text(asked).rpartition(ANSWER)[2]
        going_on = template.text([*asked, {"role": "user", "content": NEXT}]).rpartition(ANSWER)[2]
    return last, going_on.partition(NEXT)[0] if NEXT in going_on else ""


def _leading_tokens(text: str, tokenizer: Any) -> list[int]:
    """The special tokens that a text begins with, blanks between them left out."""
    known = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    if tokenizer.eos_token_id is not None:
        known.setdefault(str(tokenizer.eos_token), tokenizer.eos_token_id)
    found = []
    while text := text.lstrip():
        name = max(
            (token for token in known if token.strip() and text.startswith(token)),
            key=len,
            default=None,
        )
        if name is None:
            break
        found.append(known[name])
        text = text[len(name) :]
    return found
