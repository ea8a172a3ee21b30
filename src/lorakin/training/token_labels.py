"""Token ids and labels of a text, of which some spans are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.training.message_words import short
from lorakin.training.templates import Template

IGNORED = -100
"""The label of a token that is not learned."""
TAIL = 400
"""Characters before a span that may change how a tokenizer cuts the span's first ones; and more."""

Span = tuple[int, int]


class Unverified(DataError):
    """A conversation whose learned part cannot be shown to be its answers."""


def labelled(
    template: Template, full_text: str, spans: Sequence[Span]
) -> tuple[list[int], list[int]]:
    """Returns the token ids of a text, and labels on its spans; the other labels are -100.

    A token that reaches over the edge of a span is cut there.

    Args:
        template: its tokenizer, which cuts the text, and its special tokens.
        full_text: the text that the template wrote.
        spans: where what is learned begins and ends, in order.

    Raises:
        Unverified: the tokenizer cannot cut at an edge.
    """
    tokenizer = template.tokenizer
    encoded = tokenizer(
        full_text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast
    )
    ids: list[int] = list(encoded["input_ids"])
    if tokenizer.is_fast:
        labels = _aligned(template, full_text, ids, encoded["offset_mapping"], spans)
        if labels is not None:
            return ids, labels

    ids, labels, before = [], [], ""
    for start, end, is_learned in _pieces(full_text, spans):
        piece = full_text[start:end]
        if before:
            piece_ids = continued(tokenizer, _last_of(template, before), piece)
        else:
            piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += piece_ids
        labels += piece_ids if is_learned else [IGNORED] * len(piece_ids)
        before = full_text[:end]
    return ids, labels


def _pieces(full_text: str, spans: Sequence[Span]) -> Iterator[tuple[int, int, bool]]:
    """Yields the text in pieces: where each begins and ends, and whether it is learned."""
    end_before = 0
    for start, end in spans:
        yield end_before, start, False
        yield start, end, True
        end_before = end
    yield end_before, len(full_text), False


def _last_of(template: Template, text: str) -> str:
    """Returns the end of a text that decides how the text after it is cut."""
    tail = max(0, len(text) - TAIL)
    special = [token.start() for token in template.specials.finditer(text, tail)]
    return text[special[-1] if special else max(0, text.rfind(" ", 0, tail) + 1) :]


def _aligned(
    template: Template,
    full_text: str,
    ids: list[int],
    offsets: Sequence[Span],
    spans: Sequence[Span],
) -> list[int] | None:
    """Returns labels on the spans.

    None if a token reaches over an edge, or if the text before a span has other tokens by itself.
    """
    labels, n = [IGNORED] * len(ids), 0
    for start, end in spans:
        while n < len(ids) and offsets[n][1] <= start:
            n += 1
        if n < len(ids) and offsets[n][0] < start:
            return None
        if not _same_tokens_alone(template, full_text, ids, offsets, n, start):
            return None
        while n < len(ids) and offsets[n][1] <= end:
            labels[n] = ids[n]
            n += 1
        if n < len(ids) and offsets[n][0] < end:
            return None
    return labels


def _same_tokens_alone(
    template: Template,
    full_text: str,
    ids: list[int],
    offsets: Sequence[Span],
    count: int,
    start: int,
) -> bool:
    """Returns whether the first `count` tokens are those of `full_text[:start]` by itself.

    Only what follows the last special token is cut again: at such a token every text is cut.
    """
    specials = (n for n in range(count - 1, -1, -1) if ids[n] in template.special_ids)
    first = next(specials, None)
    begin = 0 if first is None else offsets[first][0]
    encoded = template.tokenizer(full_text[begin:start], add_special_tokens=False)
    ids_alone: list[int] = encoded["input_ids"]
    return ids_alone == ids[0 if first is None else first : count]


def continued(tokenizer: Any, before: str, text: str) -> list[int]:
    """Returns the tokens of `text` where it follows `before`, which keeps its own tokens.

    Tokenizers differ in what they do at the start of a text: some put a space there. So several
    ways are tried, and the first one counts whose tokens, after those of `before`, stand for the
    same text as both together. A tokenizer that loses characters, such as one of whole words,
    cannot tell: there the text has the tokens that it has by itself.

    Raises:
        Unverified: no way does.
    """

    def ids_of(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    start, together, line = ids_of(before), ids_of(before + text), ids_of("\n")
    decoded = tokenizer.decode(together)
    tries = [together[len(start) :]] if together[: len(start)] == start else []
    tries.append(ids_of(text))
    if (after := ids_of("\n" + text))[: len(line)] == line:
        tries.append(after[len(line) :])
    for ids in tries:
        if tokenizer.decode(start + ids) == decoded:
            return ids
    if decoded.split() != (before + text).split():
        return ids_of(text)
    raise Unverified(f"the tokenizer cannot put {short(text)} after the prompt as text of its own")
