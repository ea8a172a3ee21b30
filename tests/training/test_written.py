"""Written answers against all right ones: sacrebleu itself, and transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sacrebleu
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer

import lorakin as lk
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.sampling import Sampling
from lorakin.training.written import rouge_l, scores

Write = Callable[..., str]


def test_scores_are_sacrebleus() -> None:
    given = ["the cat sat on a mat", "a dog ran home and sat"]
    references = [["the cat sat on the mat", "a cat sat on a mat"], ["a dog ran home"]]
    found = scores(given, references)
    streams = [[references[0][0], references[1][0]], [references[0][1], None]]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(given, streams).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(given, streams).score)
    assert found["exact_match"].value == 0.0
    for metric in found.values():
        assert metric.low is not None and metric.low <= metric.high


def test_rouge_l_is_rouge_scores() -> None:
    given = ["The cat_sat on a mat, twice.", "a dog ran home & sat", ""]
    references = [["the cat sat on the mat", "It's a cat, on a mat!"], ["A dog ran HOME"], ["x"]]
    theirs = RougeScorer(["rougeL"])
    expected = [
        theirs.score_multi(right, one)["rougeL"].fmeasure
        for one, right in zip(given, references, strict=True)
    ]
    assert [rouge_l(one, right) for one, right in zip(given, references, strict=True)] == expected
    found = scores(given, references)["rouge_l"]
    assert found.value == pytest.approx(100 * sum(expected) / 3)
    assert found.low is not None and found.low <= found.value


@pytest.mark.parametrize(
    ("given", "right", "expected"),
    [
        ("Über Äpfel", "über äpfel", 1.0),
        ("кошка спит", "кошка бежит", 0.5),
        ("我喜欢猫", "我喜欢狗", 0.75),
        ("猫が好き", "犬が好き", 0.75),
    ],
)
def test_rouge_l_knows_other_scripts(given: str, right: str, expected: float) -> None:
    assert rouge_l(given, [right]) == pytest.approx(expected)


def test_a_prompt_has_all_answers_of_its_rows(model_dir: str, write_rows: Write) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)

    def written(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        return str(tokenizer.decode(out, skip_special_tokens=True)).strip()

    prompts = ["the cat", "a dog ran"]
    rows = [
        {"prompt": prompts[0], "completion": "sat on a mat"},
        {"prompt": prompts[1], "completion": "home"},
        {"prompt": prompts[0], "completion": written(prompts[0])},
    ]
    found = evaluate_rows(
        model_dir, None, write_rows(rows), dtype="float32", sampling=Sampling(max_new_tokens=6)
    )
    assert found.answers is not None
    assert found.answers.given == [written(row["prompt"]) for row in rows]
    assert found.answers.right == [row["completion"] for row in rows]
    assert found.metrics["exact_match"].value == pytest.approx(
        (1 + (written(prompts[1]) == "home")) / 2
    )


def test_labels_are_not_written(bert_dir: str, write_rows: Write) -> None:
    data = write_rows([{"text": "a", "label": n % 2} for n in range(4)])
    with pytest.raises(lk.DataError):
        evaluate_rows(bert_dir, None, data, sampling=Sampling())


def test_rows_without_a_prompt(model_dir: str, write_rows: Write) -> None:
    data: Any = write_rows([{"text": "the cat sat"}] * 3)
    with pytest.raises(lk.DataError):
        evaluate_rows(model_dir, None, data, dtype="float32", sampling=Sampling())
