"""Rows of a data set, whatever their format, as token ids and labels; and the batches made of them."""

from __future__ import annotations

import array
import collections
import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from lorakin.errors import DataError

IGNORED = -100
HOLDOUT_LIMIT = 256
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

Row = Mapping[str, Any]
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt and the answer to it, as plain text; the prompt may be empty."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Format:
    """A layout of columns, and what a row of it says: a conversation, a text, or a label."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], list[Message] | Text | Any]


def _messages(row: Row) -> list[Message]:
    return [_message(m.get("role"), m.get("content")) for m in row["messages"]]


def _sharegpt(row: Row) -> list[Message]:
    return [_message(m.get("from"), m.get("value")) for m in row["conversations"]]


def _alpaca(row: Row) -> list[Message]:
    question = _text(row["instruction"], "instruction")
    if extra := (row.get("input") or "").strip():
        question += "\n\n" + extra
    return [_message("user", question), _message("assistant", _text(row["output"], "output"))]


def _asked(prompt: str, answer: str) -> Callable[[Row], list[Message] | Text]:
    def read(row: Row) -> list[Message] | Text:
        if isinstance(row[prompt], list):
            return [_message(m.get("role"), m.get("content")) for m in (*row[prompt], *row[answer])]
        return Text(_text(row[prompt], prompt), _text(row[answer], answer))

    return read


def _labelled(label: str) -> Callable[[Row], Any]:
    return lambda row: row[label]


def _plain(row: Row) -> Text:
    return Text("", _text(row["text"], "text"))


CLASSIFICATION = "text + label"
FORMATS = (
    Format("messages", ("messages",), _messages),
    Format("sharegpt", ("conversations",), _sharegpt),
    Format("alpaca", ("instruction", "output"), _alpaca),
    *(
        Format("prompt/completion", (prompt, answer), _asked(prompt, answer))
        for prompt, answer in (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))
    ),
    *(
        Format(CLASSIFICATION, (text, label), _labelled(label))
        for text in ("text", "sentence")
        for label in ("label", "labels")
    ),
    Format("plain text", ("text",), _plain),
)
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rows:
    """A data set as it was read, and its format."""

    name: str
    format: Format
    rows: list[dict[str, Any]]
    label_names: list[str] | None = None

    @property
    def is_classification(self) -> bool:
        """Whether each row is a text and its class."""
        return self.format.name == CLASSIFICATION

    def labels(self) -> list[str]:
        """The classes, in order.

        Raises:
            DataError: missing labels, labels that are no classes, or fewer than two classes.
        """
        if self.label_names:
            return self.label_names
        column = self.format.columns[1]
        given = [row[column] for row in self.rows]
        if odd := [v for v in given if not isinstance(v, str | int) and not (isinstance(v, float) and v.is_integer())]:
            raise DataError(f"{self.name}: label {repr(odd[0])[:80]} is no class; expected text or whole numbers")
        values = set(given)
        if len(values) < 2:
            raise DataError(f"{self.name}: all {len(self.rows)} rows have the same label {next(iter(values))!r}")
        if len({isinstance(v, str) for v in values}) > 1:
            raise DataError(f"{self.name}: some labels are text and some are numbers; use one kind")
        return [_label_text(v) for v in sorted(values)]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids and labels of each row that has something to learn from; `dropped` counts the others."""

    examples: list[dict[str, Any]]
    dropped: int


def read_rows(name: str) -> Rows:
    """Read a JSONL, JSON, CSV, TSV or Parquet file, or the training split of a hub data set, and detect its format.

    Raises:
        DataError: nothing there, unreadable, no rows, or columns of no known format.
    """
    path = Path(name).expanduser()
    datasets.disable_progress_bars()
    try:
        if path.suffix.lower() in READERS or path.exists():
            table = _read_file(path)
        else:
            table = datasets.load_dataset(name, split="train")
        rows = table.to_list()
    except DataError:
        raise
    except Exception as error:  # the readers raise whatever their parsers do
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"data {name!r} cannot be read: {reason[0]}") from error
    if not table.num_rows:
        raise DataError(f"data {name!r} has no rows")
    found = next((f for f in FORMATS if set(f.columns) <= set(table.column_names)), None)
    if found is None:
        known = "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in FORMATS)
        raise DataError(
            f"data {name!r} has the columns {', '.join(table.column_names)}, which are no known format; known are: {known}"
        )
    feature = table.features[found.columns[-1]]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Rows(name, found, rows, names)


def split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Set apart `share` of the rows, at least one and at most 256, chosen by `seed`; both parts keep the order.

    Raises:
        DataError: there are fewer than two rows.
    """
    count = len(rows.rows)
    if count < 2:
        raise DataError(f"{rows.name}: {count} row is too few to set one apart; give held-out rows with --eval-data")
    held = set(random.Random(seed).sample(range(count), min(max(1, round(share * count)), HOLDOUT_LIMIT, count - 1)))
    train = [row for i, row in enumerate(rows.rows) if i not in held]
    test = [row for i, row in enumerate(rows.rows) if i in held]
    return dataclasses.replace(rows, rows=train), dataclasses.replace(rows, rows=test)


def encode(rows: Rows, tokenizer: Any, max_length: int, loss_on: str = "answer", chat_template: bool = True) -> Encoded:
    """Tokenise rows for a causal language model; labels are -100 where no loss is taken.

    Conversations, and with `chat_template` prompts too, go through the tokenizer's chat template if it has one. The loss
    is on the assistant's turns (each with its end-of-turn token), or with loss_on="all" on every token.

    Raises:
        DataError: a malformed row, conversations without a chat template, or no row with anything to learn from.
    """
    encoded = list(_encode_rows(rows, tokenizer, max_length, loss_on, chat_template))
    examples = [example for example in encoded if _has_answer(example)]
    if not examples:
        raise DataError(
            f"{rows.name}: all labels are masked: none of the {len(rows.rows)} rows has an answer within "
            f"--max-length {max_length} tokens; raise it, or check that the answers are not empty"
        )
    return Encoded(examples, len(encoded) - len(examples))


def with_answers(rows: Rows, tokenizer: Any, max_length: int, loss_on: str = "answer", chat_template: bool = True) -> Rows:
    """The rows that `encode` keeps, those that have something to learn from within `max_length` tokens.

    Raises:
        DataError: a malformed row, or conversations without a chat template.
    """
    encoded = _encode_rows(rows, tokenizer, max_length, loss_on, chat_template)
    return dataclasses.replace(
        rows, rows=[row for row, example in zip(rows.rows, encoded, strict=True) if _has_answer(example)]
    )


def _encode_rows(rows: Rows, tokenizer: Any, max_length: int, loss_on: str, chat_template: bool) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows.rows, 1):
        try:
            ids, labels = encode_one(rows.format.read(row), tokenizer, loss_on, chat_template)
        except Exception as error:  # a chat template raises whatever it likes about a conversation
            raise DataError(f"{rows.name}, row {number}: {error} (format {rows.format.name})") from error
        yield {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _has_answer(example: Row) -> bool:
    return any(label != IGNORED for label in example["labels"][1:])


def encode_labelled(rows: Rows, tokenizer: Any, max_length: int, labels: Sequence[str]) -> Encoded:
    """Tokenise rows for a classifier whose classes are `labels`.

    Raises:
        DataError: a text that is none, or a label that is not among `labels`.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    text, label = rows.format.columns
    examples = []
    for row_number, row in enumerate(rows.rows, 1):
        if not isinstance(row[text], str) or not row[text].strip():
            raise DataError(f"{rows.name}, row {row_number}: {text} is {row[text]!r}, expected text")
        own = rows.label_names[row[label]] if rows.label_names else _label_text(row[label])
        if own not in numbers:
            raise DataError(f"{rows.name}, row {row_number}: label {own!r} is none of {', '.join(labels)}")
        ids = tokenizer(row[text], truncation=True, max_length=max_length)["input_ids"]
        examples.append({"input_ids": ids, "labels": numbers[own]})
    return Encoded(examples, 0)


def encode_one(
    content: list[Message] | Text, tokenizer: Any, loss_on: str = "answer", chat_template: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation or text."""
    if isinstance(content, Text) and content.prompt and chat_template and tokenizer.chat_template:
        content = [_message("user", content.prompt), _message("assistant", content.answer)]
    if isinstance(content, Text):
        ids, labels = _encode_text(content, tokenizer)
    else:
        ids, labels = _encode_conversation(content, tokenizer)
    return ids, (list(ids) if loss_on == "all" else labels)


def prompt_ids(prompt: str, tokenizer: Any, chat_template: bool = True) -> list[int]:
    """The tokens that `encode_one` would put before the answer to `prompt`."""
    if chat_template and tokenizer.chat_template:
        return _render([_message("user", prompt)], tokenizer, answer_next=True)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


@dataclasses.dataclass(frozen=True)
class AnswerCollator:
    """Batches of unequal examples, padded on the right, whose logits are asked for only where a label is.

    With `logits_to_keep` a batch holds the positions that predict a labelled token in some row, and labels of shape
    (rows, 1 + positions): a column of -100, then the label of each position. A causal model's loss shifts labels by
    one, so whoever counts labels skips that first column; `answer_loss` does too. Without it, labels are shaped like
    the ids.
    """

    pad: int
    logits_to_keep: bool = True

    def __call__(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), width), self.pad)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.tensor(example["input_ids"])
            labels[row, :length] = torch.tensor(example["labels"])
            mask[row, :length] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.logits_to_keep:
            following = labels[:, 1:]
            keep = (following != IGNORED).any(0).nonzero().flatten()
            batch["labels"] = torch.cat([labels.new_full((len(examples), 1), IGNORED), following[:, keep]], 1)
            batch["logits_to_keep"] = keep
        return batch


def digest(*parts: Sequence[Row]) -> int:
    """A number of 48 bits that other rows, or the same in another order, do not have."""
    found = hashlib.sha256()
    for part in parts:
        for row in part:
            labels = row["labels"] if isinstance(row["labels"], list) else [row["labels"]]
            found.update(array.array("q", [len(row["input_ids"]), *row["input_ids"], *labels]).tobytes())
        found.update(b"|")
    return int(found.hexdigest()[:12], 16)


def stratified_sample(examples: Sequence[Row], share: float, seed: int) -> list[Row]:
    """About `share` of the examples, at least one of each class where they have classes, in random order."""
    classes: dict[int | None, list[Row]] = {}
    for example in examples:
        classes.setdefault(example["labels"] if isinstance(example["labels"], int) else None, []).append(example)
    chance = random.Random(seed)
    chosen = [row for rows in classes.values() for row in chance.sample(rows, max(1, round(share * len(rows))))]
    chance.shuffle(chosen)
    return chosen


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy per labelled token, in float32: of a batch of `AnswerCollator`, over `num_items_in_batch` if given."""
    following = labels[:, 1:].to(outputs.logits.device)
    logits = outputs.logits[:, : following.shape[1]].float()
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


def _encode_text(content: Text, tokenizer: Any) -> tuple[list[int], list[int]]:
    prompt = prompt_ids(content.prompt, tokenizer, chat_template=False)
    answer = tokenizer(content.answer, add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not answer:
        return prompt, [IGNORED] * len(prompt)
    if not content.prompt:
        return prompt + answer + end, prompt + answer + end
    return prompt + answer + end, [IGNORED] * len(prompt) + answer + end


def _encode_conversation(messages: list[Message], tokenizer: Any) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise DataError("conversations need a tokenizer with a chat template; use an instruct model, or prompt and completion")
    ids = _render(messages, tokenizer) if messages else []
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if not number or message["role"] != "assistant" or not message["content"].strip():
            continue  # an answer to nothing is no answer: a first turn of the assistant is context
        start = _common(_render(messages[:number], tokenizer, answer_next=True), ids)
        end = _common(_render(messages[: number + 1], tokenizer), ids)
        turn = ids[start:end]
        if tokenizer.eos_token_id in turn:  # what a template puts after the end of the turn is not the model's to say
            turn = turn[: len(turn) - turn[::-1].index(tokenizer.eos_token_id)]
        labels[start : start + len(turn)] = turn
    return ids, labels


def _render(messages: list[Message], tokenizer: Any, answer_next: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=answer_next, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


def _common(prefix: list[int], ids: list[int]) -> int:
    """How many leading tokens the two share."""
    return next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids)))


def _message(role: Any, content: Any) -> Message:
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _text(content, f"the {role}'s content")}


def _text(value: Any, what: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a column of numbers, as CSV readers see one
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text"), what) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{what} is {value!r}, expected text")
    return value


def _label_text(value: Any) -> str:
    return value if isinstance(value, str) else str(int(value))


def _read_file(path: Path) -> datasets.Dataset:
    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"data {str(path)!r}: expected a file ending in {', '.join(READERS)}, or a hub data set")
    if path.stat().st_size == 0:
        raise DataError(f"data {str(path)!r} is empty")
    options = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    return datasets.load_dataset(reader, data_files=str(path), split="train", **options)


def summary(rows: Rows) -> str:
    """One line about the rows: how many, of which format, and the classes with their counts."""
    line = f"{len(rows.rows):,} rows, format {rows.format.name}"
    if rows.is_classification:
        column = rows.format.columns[1]
        counts = collections.Counter(row[column] for row in rows.rows)
        line += ": " + ", ".join(f"{value!r} × {count:,}" for value, count in sorted(counts.items(), key=lambda kv: -kv[1])[:8])
    return line
