"""Rows of every format as token ids and labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import lorakin as lk
from lorakin.training.chat_templates import use_template
from lorakin.training.encoding import encode, prompt_ids
from lorakin.training.reading import DataRows, read_rows, split, summary
from lorakin.training.tasks import task_for
from lorakin.training.token_labels import IGNORED

Write = Callable[..., str]

SAME = {
    "messages": {
        "messages": [
            {"role": "user", "content": "what sat"},
            {"role": "assistant", "content": "the cat sat"},
        ],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "what sat"},
            {"from": "gpt", "value": "the cat sat"},
        ]
    },
    "alpaca": {"instruction": "what sat", "input": "", "output": "the cat sat"},
    "prompt/completion": {"prompt": "what sat", "completion": "the cat sat"},
}
EXPECTED = "<|user|> what sat <|end|> <|assistant|>", "the cat sat <|end|>"


def parts(ids: list[int], labels: list[int], tokenizer: Any) -> tuple[str, str]:
    """The text without a loss and the text with one."""
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    masked = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    learned = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    return tokenizer.decode(masked), tokenizer.decode(learned)


@pytest.mark.parametrize("name", SAME)
def test_formats_that_say_the_same_are_trained_the_same(
    name: str, write_rows: Write, tokenizer: Any
) -> None:
    rows = read_rows(write_rows([SAME[name]]))
    assert rows.formats[0] == name
    example = encode(rows, tokenizer, 100).examples[0]
    assert parts(example["input_ids"], example["labels"], tokenizer) == EXPECTED


@pytest.mark.parametrize(
    "columns", [("prompt", "response"), ("question", "answer"), ("input", "output")]
)
def test_other_names_of_prompt_and_completion(
    columns: tuple[str, str], write_rows: Write, tokenizer: Any
) -> None:
    rows = read_rows(write_rows([{columns[0]: "what sat", columns[1]: "the cat sat"}]))
    example = encode(rows, tokenizer, 100).examples[0]
    assert parts(example["input_ids"], example["labels"], tokenizer) == EXPECTED


def test_conversational_prompt_and_completion(write_rows: Write, tokenizer: Any) -> None:
    row = {
        "prompt": [{"role": "user", "content": "what sat"}],
        "completion": [{"role": "assistant", "content": "the cat sat"}],
    }
    example = encode(read_rows(write_rows([row])), tokenizer, 100).examples[0]
    assert parts(example["input_ids"], example["labels"], tokenizer) == EXPECTED


def test_alpacas_input_follows_the_instruction(write_rows: Write, tokenizer: Any) -> None:
    row = {"instruction": "what sat", "input": "on the mat", "output": "the cat"}
    example = encode(read_rows(write_rows([row])), tokenizer, 100).examples[0]
    assert (
        tokenizer.decode(example["input_ids"])
        == "<|user|> what sat on the mat <|end|> <|assistant|> the cat <|end|>"
    )


def test_the_loss_is_on_every_turn_of_the_assistant(write_rows: Write, tokenizer: Any) -> None:
    turns = [
        ("system", "good cat"),
        ("user", "what sat"),
        ("assistant", "the cat"),
        ("user", "what ran"),
        ("assistant", "the dog"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example = encode(read_rows(write_rows([row])), tokenizer, 100).examples[0]
    assert parts(example["input_ids"], example["labels"], tokenizer) == (
        "<|system|> good cat <|end|> <|user|> what sat <|end|> <|assistant|> <|user|> what ran "
        "<|end|> <|assistant|>",
        "the cat <|end|> the dog <|end|>",
    )


def test_what_follows_the_end_of_a_turn_is_not_learned(write_rows: Write, tokenizer: Any) -> None:
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = tokenizer.chat_template.replace(
        "<|end|> {% endfor %}", "<|end|> yes {% endfor %}"
    )
    example = encode(read_rows(write_rows([SAME["alpaca"]])), chatty, 100).examples[0]
    assert parts(example["input_ids"], example["labels"], chatty)[1] == EXPECTED[1]
    assert example["labels"][-1] == IGNORED


def test_without_a_chat_template(write_rows: Write, tokenizer: Any) -> None:
    rows = read_rows(write_rows([SAME["prompt/completion"]]))
    import copy

    plain = copy.deepcopy(tokenizer)
    use_template(plain, False)
    example = encode(rows, plain, 100).examples[0]
    assert parts(example["input_ids"], example["labels"], tokenizer) == (
        "what sat",
        "the cat sat <|end|>",
    )
    assert (
        prompt_ids("what sat", tokenizer, chat_template=False) == tokenizer("what sat")["input_ids"]
    )
    assert tokenizer.decode(prompt_ids("what sat", tokenizer)) == EXPECTED[0], (
        "generation prompts as training did"
    )
    with pytest.raises(lk.DataError, match="row 1"):
        encode(read_rows(write_rows([SAME["messages"]])), plain, 100)


def test_plain_text_and_the_loss_on_everything(write_rows: Write, tokenizer: Any) -> None:
    rows = read_rows(write_rows([{"text": "the cat sat"}]))
    assert rows.formats[0] == "text"
    example = encode(rows, tokenizer, 100).examples[0]
    assert tokenizer.decode(example["labels"]) == "the cat sat <|end|>"
    example = encode(
        read_rows(write_rows([SAME["alpaca"]])), tokenizer, 100, loss_on="all"
    ).examples[0]
    assert example["labels"] == example["input_ids"]


def test_rows_that_are_cut_before_their_answer_are_dropped_and_counted(
    write_rows: Write, tokenizer: Any
) -> None:
    rows = [
        SAME["alpaca"],
        {"instruction": "the cat " * 20, "input": "", "output": "yes"},
        {"instruction": "who", "input": "", "output": ""},
    ]
    encoded = encode(read_rows(write_rows(rows)), tokenizer, 12)
    assert (len(encoded.examples), encoded.dropped) == (1, 2)
    with pytest.raises(
        lk.DataError,
        match="--max-length",
    ):
        encode(read_rows(write_rows(rows)), tokenizer, 3)


def test_files_of_every_kind(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"what {i}", "completion": "the cat"} for i in range(4)]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    table.to_csv(tmp_path / "a.csv")
    table.to_csv(tmp_path / "a.tsv", sep="\t")
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"):
        assert [dict(r.values) for r in read_rows(str(tmp_path / name)).records] == rows, name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("{", "cannot"),
        (
            '{"colour": "red"}',
            "messages",
        ),
    ],
)
def test_files_that_hold_no_data(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(lk.DataError, match=message):
        read_rows(str(tmp_path / "bad.jsonl"))


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"text": "\xe9"}\n'.encode("latin-1"))
    with pytest.raises(lk.DataError, match="utf-8"):
        read_rows(str(tmp_path / "latin.jsonl"))


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(lk.DataError):
        read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "rows.doc").write_text("hello")
    with pytest.raises(lk.DataError):
        read_rows(str(tmp_path / "rows.doc"))
    with pytest.raises(lk.DataError, match="org/nothing"):
        read_rows("org/nothing")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "row 2",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "row 2",
        ),
        ({"messages": None}, "row 2"),
    ],
)
def test_a_malformed_row_is_named(
    row: dict[str, Any], message: str, write_rows: Write, tokenizer: Any
) -> None:
    with pytest.raises(lk.DataError, match=message):
        read_rows(write_rows([SAME["messages"], row]))


def test_numbers_and_parts_are_text(write_rows: Write, tokenizer: Any) -> None:
    example = encode(read_rows(write_rows([{"prompt": "one", "completion": 2}])), tokenizer, 100)
    assert len(example.examples) == 1
    parted = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what sat"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "the cat sat"}]},
        ]
    }
    example = encode(read_rows(write_rows([parted])), tokenizer, 100)
    assert (
        parts(example.examples[0]["input_ids"], example.examples[0]["labels"], tokenizer)
        == EXPECTED
    )


def test_odd_conversations(write_rows: Write, tokenizer: Any) -> None:
    first = [
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "who"},
        {"role": "assistant", "content": "the cat"},
    ]
    encoded = encode(read_rows(write_rows([{"messages": first}, {"messages": []}])), tokenizer, 100)
    assert encoded.dropped == 1
    assert (
        parts(encoded.examples[0]["input_ids"], encoded.examples[0]["labels"], tokenizer)[1]
        == "the cat <|end|>"
    )
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(lk.DataError, match="row 1"):
        encode(read_rows(write_rows([SAME["messages"]])), strict, 100)


def test_splitting_is_by_seed_and_disjoint(write_rows: Write) -> None:
    rows = read_rows(write_rows([{"text": str(i)} for i in range(50)]))
    train, held = split(rows, 0.1, seed=3)
    assert (len(train), len(held)) == (45, 5)
    assert {r.values["text"] for r in (*train.records, *held.records)} == {
        str(i) for i in range(50)
    }
    assert split(rows, 0.1, seed=3)[1] == held
    assert split(rows, 0.1, seed=4)[1] != held
    assert len(split(DataRows("many", rows.records * 100), 0.5, 0)[1]) == 256
    assert len(split(DataRows("two", rows.records[:2]), 0.9, 0)[0]) == 1
    with pytest.raises(lk.DataError):
        split(DataRows("one", rows.records[:1]), 0.5, 0)


def test_labels(write_rows: Write, tokenizer: Any) -> None:
    rows = read_rows(
        write_rows([{"text": "good cat", "label": "yes"}, {"text": "bad dog", "label": "no"}])
    )
    assert rows.is_classification
    assert rows.labels() == ["no", "yes"]
    assert summary(rows).startswith("2 rows, format classification: 'yes' × 1")
    encoded = task_for(rows).encode(rows, tokenizer, 100)
    assert [example["labels"] for example in encoded.examples] == [1, 0]
    numbers = read_rows(write_rows([{"sentence": "a", "label": 10}, {"sentence": "b", "label": 2}]))
    assert numbers.labels() == ["2", "10"], "numbers in their order"
    with pytest.raises(lk.DataError, match="yes"):
        task_for(rows, ["a", "b"]).encode(rows, tokenizer, 100)
    for labels, message in (
        (["a", "b", {"c": 1}], "label {'c': 1}"),
        ([1, 1], "all 2 rows have the same label '1'"),
        ([None, 1], "row 1: label is null, so the row has no class"),
    ):
        with pytest.raises(lk.DataError, match=message):
            read_rows(write_rows([{"text": "a", "label": label} for label in labels])).labels()
    with pytest.raises(lk.DataError, match="row 1"):
        read_rows(write_rows([{"text": "", "label": 1}, {"text": "a", "label": 0}]))


def test_class_labels_of_a_data_set_keep_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    datasets.Dataset.from_list(
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}], features=features
    ).to_parquet(tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert rows.labels() == ["neg", "pos"]
