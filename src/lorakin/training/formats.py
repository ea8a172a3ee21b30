"""The formats of data sets: which columns a row has, and what they say.

A format names the columns that it needs and those that it can use. Other columns are listed before
training (`unused_keys`). A column that would change what the row means is refused.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.training.contents import (
    Content,
    Conversation,
    Labelled,
    PlainText,
    Tagged,
    Values,
    listed,
    short_json,
    text_of,
    unpacked,
)
from lorakin.training.messages import (
    FLAGS,
    SYSTEM,
    TOOLS,
    USED_OF_A_MESSAGE,
    conversation,
    exchanges,
    turns_in,
    with_context,
)
from lorakin.training.preference_formats import (
    ENDED,
    EXTRA,
    PAIRED,
    VERDICTS,
    WHOLE,
    ended,
    is_verdict,
    judged,
    paired,
    verdict_of,
    whole,
)

CLASSIFICATION = "classification"
LANGUAGE, MULTI_LABEL, REGRESSION = "language", "multi-label", "regression"
SEQ2SEQ, TOKEN_CLASSIFICATION = "seq2seq", "token-classification"
DPO, ORPO, KTO, REWARD = "dpo", "orpo", "kto", "reward"
TASKS = (
    LANGUAGE, SEQ2SEQ, CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION, DPO, ORPO,
    KTO, REWARD,
)  # fmt: skip
"""The words of the tasks."""
PREFERENCE, FEEDBACK = "preference", "feedback"
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text", "text_pair"), ("text1", "text2"), ("question", "answer"),
    ("query", "passage"),
)  # fmt: skip
"""Columns of pairs of texts, for classifiers of pairs."""
LABELS = ("label", "labels", "score")
PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
EMPTY: tuple[Any, ...] = (None, [], {}, "")
"""Values that say nothing."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A layout of columns.

    Attributes:
        name: what `--format` calls it.
        columns: the columns that it needs.
        optional: the columns that it can use.
        read: returns what a row says.
        last_is: whether a value of the last column is one of this format.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Values], Content]
    last_is: Callable[[Any], bool] = lambda value: True

    def suited(self, rows: Sequence[Values]) -> int:
        """Returns how many rows have the columns; 0 if most of them have another last value.

        One value that is wrong does not make it another format: reading it names the row.
        """
        last = [row[self.columns[-1]] for row in rows if set(self.columns) <= row.keys()]
        return len(last) if 2 * sum(map(self.last_is, last)) > len(last) else 0


def _messages(row: Values) -> Conversation:
    return conversation(listed(row["messages"], "messages"), row)


def _sharegpt(row: Values) -> Conversation:
    return conversation(listed(row["conversations"], "conversations"), row)


def _alpaca(
    instruction: str, extra: tuple[str, ...], output: str
) -> Callable[[Values], Conversation]:
    def read(row: Values) -> Conversation:
        question = with_context(row, instruction, extra)
        turns = exchanges(row, question, text_of(row[output], output))
        return dataclasses.replace(conversation(turns, row), is_instruction=True)

    return read


def _asked(prompt: str, answer: str) -> Callable[[Values], Conversation | PlainText]:
    def read(row: Values) -> Conversation | PlainText:
        if prompt_turns := turns_in(row[prompt]):
            answer_turns = turns_in(row[answer])
            answer_turns = answer_turns or [{"role": "assistant", "content": row[answer]}]
            both = conversation([*prompt_turns, *answer_turns], row)
            # The messages of the prompt are not learned.
            first = len(both.messages) - len(answer_turns)
            learned = [False] * first + list(both.learned[first:])
            return dataclasses.replace(both, learned=learned)
        question, reply = with_context(row, prompt, ("context",)), text_of(row[answer], answer)
        if any(row.get(key) for key in (*SYSTEM, "history", *TOOLS)):
            return conversation(exchanges(row, question, reply), row)
        return PlainText(question, reply)

    return read


def _called(row: Values) -> Conversation:
    """Returns a question and the calls that answer it."""
    calls = {"role": "assistant", "content": None, "tool_calls": listed(row["answers"], "answers")}
    return conversation([{"role": "user", "content": row["query"]}, calls], row)


def _squad(row: Values) -> PlainText:
    answers = unpacked(row["answers"])
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if not isinstance(texts, list):
        raise DataError(f"answers is {short_json(answers)}, expected a list of texts")
    answer = text_of(texts[0], "answers") if texts else ""
    return PlainText(with_context(row, "question", ("context",)), answer)


def _labelled(label: str, *texts: str) -> Callable[[Values], Labelled]:
    def read(row: Values) -> Labelled:
        for text in texts:
            if not isinstance(row[text], str) or not row[text].strip():
                raise DataError(f"{text} is {short_json(row[text])}, expected text")
        first, second = row[texts[0]], row[texts[1]] if len(texts) > 1 else None
        return Labelled(first, row[label], second)

    return read


def _tagged(words: str, tags: str) -> Callable[[Values], Tagged]:
    def read(row: Values) -> Tagged:
        of_words, of_tags = listed(row[words], words), listed(row[tags], tags)
        if not of_words or not all(isinstance(word, str) for word in of_words):
            raise DataError(f"{words} is {short_json(row[words])}, expected a list of words")
        if len(of_words) != len(of_tags):
            raise DataError(
                f"{words} has {len(of_words)} words and {tags} {len(of_tags)} tags; each word "
                "needs one"
            )
        return Tagged(of_words, of_tags)

    return read


def _plain(row: Values) -> PlainText:
    return PlainText("", text_of(row["text"], "text"))


ALPACAS = (
    (("instruction", "output"), ("input",)),
    (("instruction", "response"), ("input", "context")),
)
ASKED = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"),
    ("query", "response"), ("input", "output"),
)  # fmt: skip
ASKED_TOO = ("context", *SYSTEM, "history", *TOOLS)
_JUDGED = (
    *((pair, ASKED_TOO, _asked(*pair)) for pair in ASKED[:2]),
    *((pair, (*extra, *SYSTEM, "history"), _alpaca(pair[0], extra, pair[1]))
      for pair, extra in ALPACAS[:1]),
    (("messages",), (*TOOLS, *SYSTEM), _messages),
    (("conversations",), (*TOOLS, *SYSTEM), _sharegpt),
)  # fmt: skip
FORMATS = (
    *(Format(PREFERENCE, columns, EXTRA, paired(*columns)) for columns in PAIRED),
    *(Format(PREFERENCE, columns, EXTRA[2:], whole(*columns)) for columns in WHOLE),
    *(Format(PREFERENCE, columns, EXTRA[2:], ended(*columns)) for columns in ENDED),
    *(
        Format(FEEDBACK, (*columns, verdict), extra, judged(read, verdict), is_verdict)
        for columns, extra, read in _JUDGED
        for verdict in VERDICTS
    ),
    *(
        Format(CLASSIFICATION, (*pair, label), (), _labelled(label, *pair))
        for pair in PAIRS
        for label in LABELS
    ),
    Format("messages", ("messages",), (*TOOLS, *SYSTEM), _messages),
    Format("sharegpt", ("conversations",), (*TOOLS, *SYSTEM), _sharegpt),
    *(
        Format("alpaca", pair, (*extra, *SYSTEM, "history"), _alpaca(pair[0], extra, pair[1]))
        for pair, extra in ALPACAS
    ),
    *(Format("prompt/completion", pair, ASKED_TOO, _asked(*pair)) for pair in ASKED),
    Format("prompt/completion", ("query", "answers"), (*SYSTEM, *TOOLS), _called),
    Format("squad", ("question", "answers"), ("context",), _squad),
    *(
        Format(CLASSIFICATION, (text, label), (), _labelled(label, text))
        for text in ("text", "sentence")
        for label in LABELS[:2]
    ),
    *(
        Format(TOKEN_CLASSIFICATION, (words, tags), (), _tagged(words, tags))
        for words in ("tokens", "words")
        for tags in ("ner_tags", "pos_tags", "tags", "labels")
    ),
    Format("text", ("text",), (), _plain),
)
"""All formats. Where a row has the columns of several, the first of them is meant."""
NAMES = tuple(dict.fromkeys(layout.name for layout in FORMATS))


def detected(rows: Sequence[Values], name: str, chosen: str | None) -> Format:
    """Returns the format whose columns the most rows have.

    >>> detected([{"prompt": "2 + 2", "completion": "4"}], "sums.jsonl", None).name
    'prompt/completion'

    Args:
        rows: the rows.
        name: what an error calls the data.
        chosen: the format that the user named, or None.

    Raises:
        DataError: the rows have the columns of no format, or not those of the chosen one.
    """
    layouts = [layout for layout in FORMATS if chosen in (None, layout.name)]
    counts = [layout.suited(rows) for layout in layouts]
    if not max(counts):
        raise _unknown([row.keys() for row in rows], layouts, name)
    return layouts[counts.index(max(counts))]


def _unknown(keys: Sequence[Iterable[str]], layouts: Sequence[Format], name: str) -> DataError:
    """Returns the error for rows of no known format, with the likeliest way out."""
    columns = list(dict.fromkeys(str(key) for row in keys for key in row))
    by_name: dict[str, list[str]] = {}
    for layout in layouts:
        by_name.setdefault(layout.name, []).append(", ".join(layout.columns))
    described = "; ".join(f"{name} ({' or '.join(ways[:4])})" for name, ways in by_name.items())
    first = list(keys[0])
    lone = first[0] if len(first) == 1 else ""
    hint = next((f"; is the file separated by {mark!r}?" for mark in ";\t|" if mark in lone), "")
    plain = {key.strip().lower(): key for key in columns}
    if fit := next((f.columns for f in layouts if set(f.columns) <= set(plain)), None):
        meant = ",".join(f"{column}={plain[column]}" for column in fit)
        hint = f"; here that is --columns {meant}"
    nearly = (f for f in layouts if len(f.columns) > 2 and len({*f.columns} - {*plain}) == 1)
    if fit is None and (near := next(nearly, None)):
        (lacking,) = {*near.columns} - {*plain}
        return DataError(
            f"data {name!r} has the columns {', '.join(columns)}; for format {near.name} "
            f"({', '.join(near.columns)}) {lacking} is missing: say with --columns which it is"
        )
    return DataError(
        f"data {name!r} has the columns {', '.join(columns)}, which are not a known format; "
        f"known are: {described}. Say which columns are meant with --columns, "
        f"such as --columns prompt=question,completion=reply{hint}"
    )


def read(layout: Format, row: Values, mapped: bool) -> Content:
    """Returns what a row says.

    Args:
        layout: the row's format.
        row: its columns.
        mapped: whether the user said which columns are meant, so that others do not matter.

    Raises:
        DataError: a column that is missing, of a wrong type, or that changes the row's meaning.
    """
    if absent := [column for column in layout.columns if row.get(column) is None]:
        if layout.name == CLASSIFICATION and absent == [layout.columns[-1]] and absent[0] in row:
            raise DataError(f"{absent[0]} is null, so the row has no class; remove such rows")
        raise DataError(f"{absent[0]} is {'null' if absent[0] in row else 'missing'}")
    if not mapped:
        _check_meaning(layout, row)
    return layout.read(row)


def unused_keys(layout: Format, rows: Iterable[Values]) -> dict[str, int]:
    """Returns the columns, and keys of messages, that are not read → how many rows have them."""
    used = {*layout.columns, *layout.optional, *FLAGS}
    counts: collections.Counter[str] = collections.Counter()
    for row in rows:
        counts.update(key for key in row if key not in used and row[key] not in EMPTY)
        for column in ("messages", "conversations", "prompt", "completion", "chosen", "rejected"):
            turns = row.get(column) if column in used else None
            if isinstance(turns, list):
                messages = [turn for turn in turns if isinstance(turn, Mapping)]
                keys = {k for message in messages for k, v in message.items() if v is not None}
                counts.update(f"{column}[].{key}" for key in keys - USED_OF_A_MESSAGE)
    return dict(counts)


def _check_meaning(layout: Format, row: Values) -> None:
    """Refuses columns that would make the row mean something else than what is read."""
    read_columns = {*layout.columns, *layout.optional}
    others = {key for key, value in row.items() if value not in EMPTY} - read_columns
    meant = ",".join(f"{column}={column}" for column in layout.columns)
    way_out = f"; if it does not matter, name the columns that do: --columns {meant}"
    if layout.name != PREFERENCE and (pair := [key for key in PREFERENCES if key in others]):
        chosen = f", or --columns prompt={layout.columns[0]},completion=chosen"
        raise DataError(
            f"{pair[0]} makes it a row of preferences, which this one is not as a whole"
            f"{way_out}{chosen if 'chosen' in others else ''}"
        )
    if media := [key for key in MEDIA if key in others]:
        raise DataError(
            f"{media[0]} is {short_json(row[media[0]])}, and only text can be trained on{way_out}"
        )
    if layout.name == CLASSIFICATION:
        seconds = {column for pair in PAIRS for column in pair} | {"context"}
        if pair := sorted(seconds & others):
            raise DataError(
                f"{pair[0]} stands beside {' and '.join(layout.columns[:-1])}; to classify pairs "
                f"of texts, name both: --columns text1={layout.columns[0]},text2={pair[0]},"
                f"label={layout.columns[-1]}{way_out}"
            )
    elif "label" in others and verdict_of(row["label"]) is False:
        raise DataError(
            f"label {short_json(row['label'])} marks an answer not to imitate (KTO); "
            f"remove such rows{way_out}"
        )
