"""Rows that share a sequence are read, and learned, as if each stood alone."""

from __future__ import annotations

import inspect
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from rich.console import Console

import lorakin as lk
from conftest import tiny_gpt2, tiny_gpt_oss, tiny_llama, tiny_mixtral
from lorakin.training import packing, run_directory
from lorakin.training import train as training
from lorakin.training.batches import AnswerCollator, Row, answer_loss
from lorakin.training.encoding import encode, pieces
from lorakin.training.epoch import EpochFigures
from lorakin.training.preview import preview, recipe_for
from lorakin.training.reading import read_rows
from lorakin.training.recipe import Recipe
from lorakin.training.token_labels import IGNORED
from training.saved import tensors

Write = Callable[..., str]
WORDS = "the a cat dog bird sat ran flew on over".split()


def tokenised(count: int, longest: int = 12, seed: int = 0) -> list[Row]:
    """Rows of random tokens, of which the last third is learned."""
    chance = random.Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        ids = [chance.randrange(3, 60) for _ in range(chance.randrange(2, longest + 1))]
        first = len(ids) - len(ids) // 3 - 1
        rows.append({"input_ids": ids, "labels": [IGNORED] * first + ids[first:]})
    return rows


def collate(model: Any) -> AnswerCollator:
    return AnswerCollator(0, "logits_to_keep" in inspect.signature(model.forward).parameters)


def hybrid(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with attention and state-space layers: these see what came before."""
    torch.manual_seed(0)
    config = transformers.JambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=2, attn_layer_period=2,
        attn_layer_offset=1, use_mamba_kernels=False, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def of_config(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, pad_token_id=0, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def opt() -> Any:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return of_config("OPT", num_hidden_layers=2, num_attention_heads=4, **sizes)


# the model


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_that_keep_rows_apart(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make().to(dtype)
    packing.check(model, collate(model), "it")


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_both_kinds_of_attention(kernel: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(kernel)
    packing.check(model, collate(model), "it")


@pytest.mark.parametrize(
    "make",
    [
        hybrid,
        lambda: hybrid(torch.bfloat16),
        opt,
        tiny_gpt_oss,
        lambda: of_config("Mamba", hidden_size=32, num_hidden_layers=2),
        lambda: of_config("Bloom", hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["hybrid", "hybrid in bfloat16", "positions of its own", "a leak", "Mamba", "ALiBi"],
)
def test_models_that_do_not_are_refused(make: Callable[[], Any]) -> None:
    model = make()
    with pytest.raises(lk.SettingError, match="--packing"):
        packing.check(model, collate(model), "it")


def test_the_check_leaves_no_trace() -> None:
    model = tiny_llama()
    packing.check(model, collate(model), "it")
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_loss_of_packed_rows_is_that_of_the_rows(make: Callable[[], Any]) -> None:
    """And so are its gradients; the rows' own loss is transformers'."""
    model, rows = make(), tokenised(23)
    model.config.use_cache = False
    sequences = packing.packed(rows, 20, seed=1)
    assert len(sequences) < 12
    sums, gradients = [], []
    labelled = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    for examples in (rows, sequences):
        batch = collate(model)(examples)
        labels = batch.pop("labels")
        assert int((labels[:, 1:] != IGNORED).sum()) == labelled
        model.zero_grad()
        loss = answer_loss(model(**batch), labels)
        loss.backward()
        sums.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    whole = AnswerCollator(0, logits_to_keep=False)(rows)
    torch.testing.assert_close(sums[1], model(**whole).loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


# the sequences


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_in_one_sequence(seed: int) -> None:
    rows = tokenised(200, longest=30, seed=seed)
    sequences = packing.packed(rows, 32, seed)
    assert all(len(sequence["input_ids"]) <= 32 for sequence in sequences)
    found = []
    for sequence in sequences:
        starts = [at for at, position in enumerate(sequence["position_ids"]) if position == 0]
        ends = [*starts[1:], len(sequence["input_ids"])]
        found += [tuple(sequence["input_ids"][a:b]) for a, b in zip(starts, ends, strict=True)]
        assert all(sequence["labels"][at] == IGNORED for at in starts)
    assert sorted(found) == sorted(tuple(row["input_ids"]) for row in rows)


@pytest.mark.peer
def test_as_tight_as_trls_packing() -> None:
    from trl.data_utils import pack_dataset

    rows = tokenised(500, longest=60, seed=4)
    theirs = pack_dataset(datasets.Dataset.from_list([dict(row) for row in rows]), 64, "bfd")
    assert len(packing.packed(rows, 64, 0)) == len(theirs)


@pytest.mark.parametrize("length", [2, 3, 7, 50])
def test_a_long_text_is_learned_to_its_last_token(length: int) -> None:
    ids = list(range(5, 28))
    parts = pieces({"input_ids": ids, "labels": ids}, length)
    assert all(2 <= len(part["input_ids"]) <= length for part in parts)
    learned = [token for part in parts for token in part["labels"][1:]]
    assert learned == ids[1:]


def test_texts_are_split_and_answers_are_cut(tokenizer: Any, write_rows: Write) -> None:
    text = " ".join(WORDS * 3)
    rows = read_rows(write_rows([{"text": text}, {"text": "the cat"}], "texts.jsonl"))
    encoded = encode(rows, tokenizer, 8, split=True)
    assert encoded.cut == 0
    assert sum(len(e["labels"]) - 1 for e in encoded.examples) == 30 + 2
    ends = [example["input_ids"][-1] for example in encoded.examples]
    assert ends.count(tokenizer.eos_token_id) == 2
    assert len(encoded.where) == len(encoded.examples)
    asked = read_rows(write_rows([{"prompt": "the", "completion": text}], "asked.jsonl"))
    encoded = encode(asked, tokenizer, 8, split=True)
    assert (len(encoded.examples), encoded.cut) == (1, 1)


# whole runs


@pytest.fixture
def recipe(model_dir: str, write_rows: Write, tmp_path: Path) -> Recipe:
    rows = [
        {"prompt": f"the {WORDS[n % 10]}", "completion": " ".join(WORDS[: 1 + n % 10])}
        for n in range(40)
    ]
    held_out = write_rows(rows[:6], "held.jsonl")
    data = [write_rows(rows, "many.jsonl"), write_rows(rows[:9], "few.jsonl")]
    return Recipe(
        model_dir, data, str(tmp_path / "out"), eval_data=held_out, rank=4, lr=1e-2, steps=3,
        dtype="float32", batch_size=64, max_length=24, packing=True,
    )  # fmt: skip


def run(recipe: Recipe, resume: bool = False) -> tuple[training.Result, str]:
    shown = io.StringIO()
    prepared = training.prepare(recipe, Console(file=shown, width=200), resume)
    return training.train(prepared), shown.getvalue()


def losses(out: str) -> list[float]:
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize(
    "settings", [{}, {"fuse": True}, {"gradient_checkpointing": True}], ids=str
)
def test_a_packed_run_is_the_run_of_its_rows(
    settings: dict[str, Any], recipe: Recipe, tmp_path: Path
) -> None:
    """A batch holds the whole epoch here, so both take the same steps."""
    recipe.fuse = settings.get("fuse", False)
    recipe.gradient_checkpointing = settings.get("gradient_checkpointing", False)
    result, shown = run(recipe)
    packed_losses = losses(recipe.out)
    assert "49 rows are packed into" in shown
    recipe.out, recipe.packing = str(tmp_path / "plain"), False
    plain, _ = run(recipe)
    assert packed_losses == pytest.approx(losses(recipe.out), rel=1e-5)
    assert result.after.loss == pytest.approx(plain.after.loss, rel=1e-4)


def test_packing_is_resumed_to_the_bit(recipe: Recipe) -> None:
    recipe.batch_size, recipe.steps, recipe.save_every, recipe.dropout = 2, 9, 7, 0.1
    recipe.data_weights, recipe.loss_on = [1.0, 1.0], "all"
    run(recipe)
    whole, half = tensors(Path(recipe.out)), Path(f"{recipe.out}-half")
    shutil.copytree(recipe.out, half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-9")
    run(run_directory.resumed_recipe(None, {"out": str(half)}), resume=True)
    assert all(torch.equal(whole[key], tensor) for key, tensor in tensors(half).items())


def test_texts_longer_than_a_sequence_are_trained_on(recipe: Recipe, write_rows: Write) -> None:
    texts = [{"text": " ".join(WORDS * n)} for n in range(1, 9)]
    recipe.data, recipe.eval_data = [write_rows(texts, "texts.jsonl")], None
    result, shown = run(recipe)
    assert "are cut" not in shown and "rows are packed into" in shown
    assert result.before.count == sum(
        1
        for part in training.prepare(
            Recipe(**{**vars(recipe), "out": f"{recipe.out}-2"}), Console(file=io.StringIO())
        ).held_out.examples
        for _ in part["labels"][1:]
    )


def test_only_answers_in_words_are_packed(bert_dir: str, write_rows: Write) -> None:
    data = write_rows([{"text": "the cat", "label": n % 2} for n in range(10)])
    with pytest.raises(lk.SettingError, match="classification"):
        preview(recipe_for(bert_dir, [data], packing=True))
    with pytest.raises(lk.SettingError, match="--group-by-length"):
        recipe_for(bert_dir, [data], packing=True, group_by_length=True)


def test_the_preview_counts_sequences(recipe: Recipe) -> None:
    options = {"eval_data": recipe.eval_data, "max_length": 24, "batch_size": 4}
    found = preview(recipe_for(recipe.model, recipe.data, packing=True, **options)).epoch
    assert (found.rows, found.sequences) == (49, found.sequences) and found.sequences < 25
    assert isinstance(found, EpochFigures) and found.padding < found.padding_mixed
