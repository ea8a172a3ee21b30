"""Sequence-to-sequence and token classification: the same run by transformers alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers

import lorakin as lk
from lorakin.serving.export import export
from lorakin.serving.job import ExportRequest
from lorakin.terminal import Terminal
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.generate import answer, generated, request_for
from lorakin.training.metrics import mean_interval
from lorakin.training.prepare import prepare
from lorakin.training.reading import read_rows
from lorakin.training.recipe import Recipe
from lorakin.training.sampling import Sampling
from lorakin.training.speakers import Speaker
from lorakin.training.tasks import task_for
from lorakin.training.train import train
from lorakin.training.with_adapter import load_with_adapter
from training.twins import losses_by_transformers, losses_of

Write = Callable[..., str]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "home"]


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("t5")
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prompts(count: int = 18) -> list[dict[str, str]]:
    chance = np.random.default_rng(0)
    return [
        {
            "prompt": " ".join(chance.choice(WORDS, chance.integers(2, 6))),
            "completion": " ".join(chance.choice(WORDS, chance.integers(1, 4))),
        }
        for _ in range(count)
    ]


def tagged(count: int = 18) -> list[dict[str, Any]]:
    chance = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        words = list(chance.choice(WORDS, chance.integers(2, 6)))
        rows.append(
            {"tokens": words, "ner_tags": ["ANIMAL" if w in ("cat", "dog") else "O" for w in words]}
        )
    return rows


@pytest.mark.parametrize("kind", ["seq2seq", "prompts", "chats", "texts"])
def test_answers_to_one_prompt_are_drawn_together(
    kind: str, t5_dir: str, model_dir: str, write_rows: Write
) -> None:
    known = ("the", "cat", "sat", "on", "a", "mat")
    pairs = [(a, b) for a in itertools.product(known, repeat=2) for b in ("sat", "a cat")][:60]
    rows: list[dict[str, Any]] = [
        {"prompt": " ".join(asked), "completion": answer} for asked, answer in pairs
    ]
    if kind == "chats":
        rows = [
            {
                "messages": [
                    {"role": "system", "content": "on a mat"},
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in rows
        ]
    if kind == "texts":
        rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows]
    found = evaluate_rows(t5_dir if kind == "seq2seq" else model_dir, None, write_rows(rows))
    assert found.answers is not None and found.loss_interval is not None
    groups = [] if kind == "texts" else [at // 2 for at in range(60)]
    assert found.answers.groups == groups
    expected = mean_interval(found.answers.losses, found.answers.counts, groups)
    assert found.loss_interval == pytest.approx(expected)


@pytest.mark.parametrize("task", ["seq2seq", "token-classification"])
def test_training_is_that_of_transformers(
    task: str, t5_dir: str, bert_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    model_dir = t5_dir if task == "seq2seq" else bert_dir
    data = write_rows(prompts() if task == "seq2seq" else tagged())
    recipe = Recipe(
        model=model_dir, data=data, eval_data=data, out=str(tmp_path / "a"), rank=4, lr=1e-2,
        steps=6, batch_size=6, warmup=0.0, schedule="constant", save_every=0, dtype="float32",
    )  # fmt: skip
    run = prepare(recipe, Terminal(quiet=True))
    assert run.task.word == task
    train(run)

    twin = prepare(Recipe(**{**vars(recipe), "out": str(tmp_path / "b")}), Terminal(quiet=True))
    tokenizer, model = twin.loaded.tokenizer, twin.loaded.model
    collator: Any = transformers.DataCollatorForTokenClassification(tokenizer)
    if task == "seq2seq":
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
    theirs = losses_by_transformers(twin, collator, tmp_path / "c")
    assert losses_of(tmp_path / "a") == pytest.approx(theirs, rel=1e-5)


def test_a_t5_is_evaluated_from_disk(t5_dir: str, write_rows: Write, tmp_path: Path) -> None:
    rows = prompts()
    data = write_rows(rows)
    out = str(tmp_path / "a")
    recipe = Recipe(
        model=t5_dir, data=data, eval_data=data, out=out, rank=4, lr=1e-2, steps=8, dtype="float32"
    )
    run = prepare(recipe, Terminal(quiet=True))
    result = train(run)
    again = evaluate_rows(t5_dir, out, data, dtype="float32")
    assert again.loss == pytest.approx(result.after.loss, rel=1e-5)
    assert again.perplexity == pytest.approx(np.exp(again.loss))

    model, tokenizer = run.loaded.model, run.loaded.tokenizer
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
            target = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
            total += len(target) * model(input_ids=ids, labels=torch.tensor([target])).loss.item()
            count += len(target)
    assert again.loss == pytest.approx(total / count, rel=1e-5)
    assert again.count == count


def test_tags_are_evaluated_word_by_word(bert_dir: str, write_rows: Write, tmp_path: Path) -> None:
    rows = tagged()
    data, out = write_rows(rows), str(tmp_path / "a")
    recipe = Recipe(model=bert_dir, data=data, eval_data=data, out=out, rank=4, lr=1e-2, steps=20)
    run = prepare(recipe, Terminal(quiet=True))
    assert run.recipe.labels == ["ANIMAL", "O"]
    train(run)
    again = evaluate_rows(bert_dir, out, data)

    model, tokenizer = run.loaded.model, run.loaded.tokenizer
    right, given = [], []
    with torch.no_grad():
        for row in rows:
            batch = tokenizer([row["tokens"]], is_split_into_words=True, return_tensors="pt")
            words = batch.word_ids(0)
            answers = model(**batch).logits[0].argmax(-1).tolist()
            firsts = [words.index(n) for n in range(len(row["tokens"]))]
            right += row["ner_tags"]
            given += [model.config.id2label[answers[n]] for n in firsts]
    values = {name: metric.value for name, metric in again.metrics.items()}
    assert values == pytest.approx(
        {
            "macro_f1": sklearn.metrics.f1_score(right, given, average="macro"),
            "accuracy": sklearn.metrics.accuracy_score(right, given),
        }
    )
    assert again.count == len(right)


def test_a_word_of_several_tokens_is_learned_at_its_first() -> None:
    packaged = transformers.AutoTokenizer.from_pretrained(packaged_minilm())
    rows = read_rows_of([{"words": ["unbelievably", "good"], "tags": [7, 3]}])
    task = task_for(rows, ["3", "7"])
    example = task.encode(rows, packaged, 100).examples[0]
    learned = [label for label in example["labels"] if label != -100]
    assert learned == [1, 0]
    assert len(example["input_ids"]) > 4
    assert next(n for n, label in enumerate(example["labels"]) if label != -100) == 1


def packaged_minilm() -> str:
    from lorakin.training.model_sources import source_of

    return source_of("minilm")


def read_rows_of(rows: list[dict[str, Any]]) -> Any:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(file.name)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"tokens": ["a", "b"], "ner_tags": [1]}] * 3, {}),
        ([{"tokens": "a b", "ner_tags": [1, 2]}] * 3, {}),
        ([{"tokens": ["a"], "ner_tags": [1.5]}] * 3, {}),
        ([{"prompt": "a", "completion": "b"}] * 3, {"task": "seq2seq"}),
        ([{"prompt": "a", "completion": "b"}] * 3, {"task": "token-classification"}),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(
    rows: list[dict[str, Any]], options: dict[str, str], bert_dir: str, write_rows: Write,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(lk.DataError):
        prepare(
            Recipe(model=bert_dir, data=write_rows(rows), out=str(out), steps=1, **options),
            Terminal(quiet=True),
        )
    assert not out.exists() or not list(out.iterdir())


def test_a_t5_generates_what_transformers_does(
    t5_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    """With its adapter, in batches of unequal prompts, and merged."""
    rows = prompts()
    out = str(tmp_path / "a")
    data = write_rows(rows)
    recipe = Recipe(
        model=t5_dir, data=data, eval_data=data, out=out, rank=4, lr=2e-2, steps=40, dtype="float32"
    )
    train(prepare(recipe, Terminal(quiet=True)))
    loaded = load_with_adapter(t5_dir, out, "float32")
    model, tokenizer = loaded.model.eval(), loaded.tokenizer

    def by_transformers(prompt: str, model: Any) -> str:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        return str(tokenizer.decode(made[0], skip_special_tokens=True))

    asked = [row["prompt"] for row in rows]
    expected = [by_transformers(prompt, model) for prompt in asked]
    assert len(set(expected)) > 1
    assert [answer(loaded, prompt, max_new_tokens=8) for prompt in asked] == expected
    speaker = Speaker.of(loaded)
    sampling = Sampling(max_new_tokens=8)
    requests = [request_for(speaker, speaker.prompt(prompt), sampling) for prompt in asked]
    assert generated(requests, sampling) == expected

    export(ExportRequest(out, "merged", str(tmp_path / "merged"), t5_dir))
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    assert [by_transformers(prompt, merged) for prompt in asked] == expected
