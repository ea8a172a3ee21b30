"""Where an answer ends: at the end of text, and at what closes an assistant's turn.

A model that was trained on turns ends a turn, not the text: `<|im_end|>`, `<|eot_id|>`,
`<end_of_turn>`. Whatever generates must stop at both.
"""

from __future__ import annotations

import itertools
from typing import Any

from lorakin.training.templates import AGAIN, REPLIED, Template

SHORTEST = 4
"""Letters of the shortest text that ends a turn: a full stop ends sentences, too."""


def stop_ids(
    tokenizer: Any, settings: Any = None, chat_template: bool | Template = True
) -> list[int]:
    """Returns the ids at which an answer ends.

    They are those of a generation config, the end of text, and the end of a turn.

    Args:
        tokenizer: the model's; None if it has none.
        settings: the model's GenerationConfig, if it has one.
        chat_template: whether prompts are put into the chat template, so that answers are turns;
            or that template.
    """
    eos = getattr(settings, "eos_token_id", None)
    ids = list(eos) if isinstance(eos, list | tuple) else [eos]
    if tokenizer is not None:
        ids.append(tokenizer.eos_token_id)
        if chat_template:
            ids += end_of_turn(chat_template if isinstance(chat_template, Template) else tokenizer)
    return list(dict.fromkeys(number for number in ids if type(number) is int and number >= 0))


def end_of_turn(tokenizer_or_template: Any) -> list[int]:
    """Returns the id of the token that closes an assistant's turn; none if no token does.

    The special tokens that follow the answer both at the end of a conversation and within one close
    it, and the last of them is its end (`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`). If the two have
    none in common, it is the first after a last answer (GPT-OSS's `<|return|>`). If nothing follows
    that, it is the first before the next turn (GLM's `<|user|>`).

    Args:
        tokenizer_or_template: a tokenizer, or its `Template`.
    """
    if (template := _template(tokenizer_or_template)) is None:
        return []
    last, inner = (_leading_tokens(text, template.tokenizer) for text in closings(template))
    common = [a for a, b in itertools.takewhile(_same, zip(last, inner, strict=False))]
    return common[-1:] or last[:1] or inner[:1]


def end_of_turn_text(tokenizer_or_template: Any) -> str | None:
    """Returns the text that closes a turn, where no token does; None otherwise.

    That is so with a template that was made for other tokens than the tokenizer has.

    Args:
        tokenizer_or_template: a tokenizer, or its `Template`.
    """
    if (template := _template(tokenizer_or_template)) is None:
        return None
    last, inner = closings(template)
    if not last.strip() or end_of_turn(template):
        return None
    pairs = itertools.takewhile(_same, zip(last, inner, strict=False))
    text = "".join(letter for letter, _ in pairs).strip()
    return text if len(text) >= SHORTEST else None


def closings(template: Template) -> tuple[str, str]:
    """Returns what the template writes after an answer that is the last turn, and after another.

    Raises:
        Unbounded: the template does not end, or fills the memory.
    """
    answered, again = template.probe(2), template.probe(3)
    if answered is None:
        return "", ""
    inner = (again or "").rpartition(REPLIED)[2]
    return answered.rpartition(REPLIED)[2], inner.partition(AGAIN)[0] if AGAIN in inner else ""


def _template(of: Any) -> Template | None:
    if isinstance(of, Template):
        return of
    return Template(of) if getattr(of, "chat_template", None) else None


def _same(pair: tuple[Any, Any]) -> bool:
    return bool(pair[0] == pair[1])


def _leading_tokens(text: str, tokenizer: Any) -> list[int]:
    """Returns the special tokens that a text begins with; blanks between them do not count."""
    id_of = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    if tokenizer.eos_token_id is not None:
        id_of.setdefault(str(tokenizer.eos_token), tokenizer.eos_token_id)
    leading = []
    while text := text.lstrip():
        candidates = [token for token in id_of if token.strip() and text.startswith(token)]
        if not candidates:
            break
        longest = max(candidates, key=len)
        leading.append(id_of[longest])
        text = text[len(longest) :]
    return leading
