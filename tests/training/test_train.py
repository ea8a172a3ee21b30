"""Whole runs on tiny models: what is left on disk, resuming to the bit, and stopping in time."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor

import lorakin as lk
from lorakin.serving.export import export
from lorakin.serving.job import ExportRequest
from lorakin.training import checkpoint_manifest, prepare, run_directory, run_trainer
from lorakin.training import train as training
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.generate import answer
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import read_recipe
from lorakin.training.tasks import language
from lorakin.training.with_adapter import load_with_adapter
from training.saved import tensors

Write = Callable[..., str]


def merge(model: str, adapter: str, out: str) -> int:
    return export(ExportRequest(adapter, "merged", out, model)).size


@pytest.fixture
def recipe(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Write, tmp_path: Path
) -> Recipe:
    data = write_rows(chat_rows, "train.jsonl")
    return Recipe(
        model=model_dir,
        data=data,
        eval_data=data,
        out=str(tmp_path / "out"),
        rank=8,
        lr=2e-2,
        steps=20,
        dtype="float32",
    )


def run(recipe: Recipe, resume: bool = False) -> tuple[training.Result, str, training.PreparedRun]:
    text = io.StringIO()
    console = Console(file=text, width=200)
    prepared = training.prepare(recipe, console, resume)
    return training.train(prepared), text.getvalue(), prepared


@pytest.mark.usefixtures("pictures")
def test_a_run_learns_and_leaves_everything(recipe: Recipe) -> None:
    result, shown, prepared = run(recipe)
    assert result.after.loss < 0.5 * result.before.loss
    assert result.after.perplexity < result.before.perplexity
    out = result.out
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "lorakin.json",
        "recipe.yaml",
        "metrics.jsonl",
        "loss.png",
    } <= {p.name for p in out.iterdir()}
    card = (out / "README.md").read_text()
    assert (
        f"loss {result.before.loss:.3f}" in card
        and f"loss {result.after.loss:.3f}" in card
        and "20 steps" in card
    )
    assert result.adapter_bytes > 0
    assert result.trainable_parameters == sum(t.numel() for t in tensors(out).values())
    for expected in (
        "format prompt/completion",
        "⟦ the ",
        "<|assistant|>",
        "14 modules",
        "step 20/20",
        "tok/s",
        "GiB",
        "lr ",
    ):
        assert expected in shown, expected
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 21))
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"} <= set(
        metrics[1]
    )
    assert metrics[0]["eval_loss"] == pytest.approx(result.before.loss)
    assert metrics[-1]["eval_loss"] == pytest.approx(result.after.loss)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    again = evaluate_rows(recipe.model, str(out), recipe.data, dtype="float32")
    assert again.loss == pytest.approx(result.after.loss, rel=1e-5), "evaluate says what train said"
    said = answer(prepared.loaded, "what did the cat sat")
    assert re.fullmatch("the (cat|dog|bird) (sat|ran|flew) on the (mat|tree)", said), said


def test_the_effective_recipe_runs_again_to_the_same_adapter(
    recipe: Recipe, tmp_path: Path
) -> None:
    recipe.lr, recipe.dtype, recipe.steps = None, "auto", 3
    run(recipe)
    saved = read_recipe(Path(recipe.out) / "recipe.yaml", {})
    assert saved.lr == lk.LoRA.learning_rate
    assert saved.dtype in ("float32", "bfloat16")
    saved.out = str(tmp_path / "twin")
    run(saved)
    first, second = tensors(Path(recipe.out)), tensors(tmp_path / "twin")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_biases_are_trained_and_resumed(recipe: Recipe, tokenizer: Any, tmp_path: Path) -> None:
    from conftest import tiny_llama

    recipe.model, recipe.targets, recipe.bias = str(tmp_path / "biased"), ["q_proj"], "all"
    tiny_llama(attention_bias=True, pad_token_id=0, eos_token_id=1).save_pretrained(recipe.model)
    tokenizer.save_pretrained(recipe.model)
    recipe.save_every, recipe.steps = 2, 4
    _, shown, _ = run(recipe)
    assert "8 biases" in shown
    whole, half = tensors(Path(recipe.out)), tmp_path / "half"
    for key in ("q_proj.base_layer", "v_proj"):
        assert whole[f"base_model.model.model.layers.0.self_attn.{key}.bias"].any()
    shutil.copytree(recipe.out, half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-4")
    run(run_directory.resumed_recipe(None, {"out": str(half)}), resume=True)
    assert tensors(half).keys() == whole.keys() and all(
        torch.equal(t, whole[key]) for key, t in tensors(half).items()
    )


def test_resuming_in_the_middle_of_a_later_epoch(recipe: Recipe, tmp_path: Path) -> None:
    """36 rows in batches of 8 are 5 steps an epoch; step 8 lies inside the second."""
    recipe.save_every, recipe.steps = 8, 12
    run(recipe)
    whole, half = tensors(Path(recipe.out)), tmp_path / "half"
    shutil.copytree(recipe.out, half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-12")
    run(run_directory.resumed_recipe(None, {"out": str(half)}), resume=True)
    assert all(torch.equal(whole[key], t) for key, t in tensors(half).items())


def test_resuming_with_other_rows(recipe: Recipe) -> None:
    recipe.save_every, recipe.steps = 2, 4
    run(recipe)
    file = Path(recipe.data[0])
    rows = file.read_text().splitlines()
    shutil.rmtree(Path(recipe.out) / "checkpoints" / "checkpoint-4")
    before = tensors(Path(recipe.out))
    for changed in (rows[::-1], rows[:-1], [*rows[:-1], rows[0]]):
        file.write_text("\n".join(changed) + "\n")
        with pytest.raises(
            lk.DataError,
            match=r"train\.jsonl",
        ):
            run(run_directory.resumed_recipe(None, {"out": recipe.out}), resume=True)
    file.write_text("\n".join(rows) + "\n")
    run(run_directory.resumed_recipe(None, {"out": recipe.out}), resume=True)
    assert all(torch.equal(before[key], t) for key, t in tensors(Path(recipe.out)).items())


def test_a_blow_up_in_the_last_step_is_no_success(recipe: Recipe) -> None:
    recipe.lr, recipe.steps, recipe.warmup, recipe.max_grad_norm = 1e30, 1, 0.0, 1e30
    with pytest.raises(lk.DivergedError):
        run(recipe)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_gives_the_bits_of_the_whole_run(
    recipe: Recipe, tmp_path: Path, dropout: float
) -> None:
    recipe.dropout, recipe.save_every, recipe.steps, recipe.accumulate = dropout, 3, 9, 2
    run(recipe)
    whole = tensors(Path(recipe.out))
    half = tmp_path / "half"
    shutil.copytree(recipe.out, half)
    for name in (
        "adapter_model.safetensors",
        "loss.png",
    ):  # as if it had been killed after step 6, in the middle of a save
        (half / name).unlink()
    (half / "checkpoints" / "checkpoint-9" / "trainer_state.json").unlink()
    checkpoint_manifest.unseal(half / "checkpoints" / "checkpoint-9")
    lines = (half / "metrics.jsonl").read_text().splitlines()
    (half / "metrics.jsonl").write_text("\n".join(lines[:9]) + '\n{"step": 9, "lo')
    resumed = run_directory.resumed_recipe(None, {"out": str(half), "steps": 9})
    result, _, _ = run(resumed, resume=True)
    assert all(torch.equal(whole[key], t) for key, t in tensors(half).items())
    assert result.before.loss == pytest.approx(json.loads(lines[0])["eval_loss"])
    steps = [json.loads(line)["step"] for line in (half / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, *range(1, 10), 9], "no step twice"
    with pytest.raises(lk.SettingError):
        run_directory.resumed_recipe(None, {"out": str(half), "rank": 4})


def test_resuming_without_a_run(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(lk.OutputError, match=r"recipe\.yaml"):
        run(recipe, resume=True)


def test_an_output_directory_in_use_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(
        lk.OutputError,
        match="--resume",
    ):
        run(recipe)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    recipe.out = str(tmp_path / "out" / "mine.txt")
    with pytest.raises(lk.OutputError):
        run(recipe)
    recipe.out = str(tmp_path / "out" / "mine.txt" / "below")
    with pytest.raises(lk.OutputError, match=r"mine\.txt"):
        run(recipe)


def test_divergence_stops_the_run_and_keeps_the_last_good_adapter(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the fifth step is made NaN; the adapter after step 3, whose forward gave the last
    finite loss, is kept.
    """
    real = language.answer_loss
    seen: list[list[Tensor]] = []
    holder: list[lk.Adapter] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if outputs.logits.requires_grad:
            seen.append([p.detach().clone() for p in holder[0].parameters()])
        value = real(outputs, labels, num_items_in_batch)
        return value * float("nan") if len(seen) == 5 else value

    monkeypatch.setattr(language, "answer_loss", loss)
    prepared = training.prepare(recipe, Console(file=io.StringIO()))
    holder.append(prepared.adapter)
    with pytest.raises(lk.DivergedError, match="--lr") as caught:
        training.train(prepared)
    assert caught.value.step == 5
    assert caught.value.exit_code == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.model)
    kept = lk.load(model, recipe.out)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), seen[3], strict=True))


def test_divergence_at_the_first_step_keeps_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        language,
        "answer_loss",
        lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * float("nan"),
    )
    with pytest.raises(lk.DivergedError, match="step 1"):
        run(recipe)
    assert not (Path(recipe.out) / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:rank_above")
def test_ranks_above_a_weights_side_are_clamped_if_asked(recipe: Recipe) -> None:
    recipe.rank, recipe.rank_above = 4096, "clamp"
    adapter = training.prepare(recipe, Console(quiet=True)).adapter
    assert {adapter.tensors.branch(path).A.shape[0] for path in adapter.placement.methods} == {
        16,
        32,
    }
    assert (
        read_recipe(Path(recipe.out) / run_directory.RECIPE, {"out": "other"}).rank_above == "clamp"
    )


def test_patterns_give_some_modules_another_rank_and_alpha(recipe: Recipe) -> None:
    recipe.rank_pattern, recipe.alpha_pattern = {"q_proj": 2}, {r"0\.self_attn\.q_proj": 6.0}
    adapter = training.prepare(recipe, Console(quiet=True)).adapter
    methods = adapter.placement.methods
    ranks = {path: method.setting("rank") for path, method in methods.items()}
    assert {rank for path, rank in ranks.items() if path.endswith("q_proj")} == {2}
    assert {rank for path, rank in ranks.items() if not path.endswith("q_proj")} == {recipe.rank}
    assert methods["model.layers.0.self_attn.q_proj"].setting("alpha") == 6.0
    written = read_recipe(Path(recipe.out) / run_directory.RECIPE, {"out": "other"})
    assert written.rank_pattern == recipe.rank_pattern


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, lk.SettingError, "q_proj"),
        ({"model": "/nowhere/at/all"}, lk.ModelError, "/nowhere/at/all"),
        ({"model": "org/not-there"}, lk.ModelError, "org/not-there"),
        ({"model": "missing.gguf"}, lk.ModelError, r"missing\.gguf"),
        ({"data": "missing.jsonl"}, lk.DataError, r"missing\.jsonl"),
        ({"targets": ["q_prj"]}, lk.TargetError, "q_proj"),
        ({"rank": 0}, lk.SettingError, "number"),
        ({"rank": 4096}, lk.SettingError, "4096"),
        (
            {"rank_above": "lower"},
            lk.SettingError,
            "refuse",
        ),
        ({"max_length": 3}, lk.DataError, "labels"),
        ({"layers": "7"}, lk.TargetError, "layer"),
        ({"dtype": "int3"}, lk.SettingError, "dtype"),
        ({"schedule": "foo"}, lk.SettingError, "foo"),
        ({"method": "magic"}, lk.SettingError, "magic"),
    ],
)
def test_bad_input_fails_before_anything_is_written(
    recipe: Recipe, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for name, value in changes.items():
        setattr(recipe, name, value)
    with pytest.raises(error, match=message):
        run(recipe)
    assert not Path(recipe.out).exists()


def test_options_reach_the_run(recipe: Recipe) -> None:
    recipe.targets, recipe.exclude, recipe.layers = ["q_proj", "v_proj"], ["*.0.*.v_proj"], "0-1"
    recipe.gradient_checkpointing, recipe.schedule, recipe.steps, recipe.epochs = (
        True,
        "linear",
        None,
        0.5,
    )
    result, shown, prepared = run(recipe)
    assert "3 modules" in shown
    assert prepared.total_steps == result.steps == 3
    assert prepared.loaded.model.model.layers[0].gradient_checkpointing


def test_bfloat16_trains_float32_masters(recipe: Recipe) -> None:
    recipe.dtype = "bfloat16"
    result, _, prepared = run(recipe)
    assert prepared.loaded.model.dtype == torch.bfloat16
    assert result.after.loss < 0.6 * result.before.loss
    assert {t.dtype for t in tensors(result.out).values()} == {torch.float32}


@pytest.fixture
def sentiment(bert_dir: str, write_rows: Write, tmp_path: Path) -> Recipe:
    rows = [
        {"text": f"the {word} {animal} {verb}", "label": label}
        for word, label in (
            ("good", "liked"),
            ("bad", "disliked"),
            ("fast", "liked"),
            ("slow", "disliked"),
        )
        for animal in ("cat", "dog", "bird")
        for verb in ("sat", "ran", "flew")
    ]
    data = write_rows(rows, "labels.jsonl")
    return Recipe(
        model=bert_dir,
        data=data,
        eval_data=data,
        out=str(tmp_path / "c"),
        rank=4,
        lr=1e-2,
        steps=30,
        batch_size=12,
    )


def test_a_classifier_trains_its_new_head_and_is_evaluated_from_disk(
    sentiment: Recipe, ids: Tensor
) -> None:
    result, shown, prepared = run(sentiment)
    assert result.after.accuracy == 1.0
    assert result.after.perplexity is None
    assert "classifier trained whole" in shown
    assert "⟦liked⟧" in shown or "⟦disliked⟧" in shown
    assert prepared.recipe.labels == ["disliked", "liked"]
    torch.manual_seed(99)  # the fresh head that evaluate loads is another one
    again = evaluate_rows(sentiment.model, sentiment.out, sentiment.data)
    assert again.accuracy == 1.0
    assert again.loss == pytest.approx(result.after.loss, rel=1e-5)
    loaded = load_with_adapter(sentiment.model, sentiment.out)
    assert loaded.model.config.id2label == {0: "disliked", 1: "liked"}
    with pytest.raises(lk.ModelError, match="BertForSequenceClassification"):
        answer(loaded, "the cat")
    merge(sentiment.model, sentiment.out, sentiment.out + "-merged")
    assert evaluate_rows(sentiment.out + "-merged", None, sentiment.data).accuracy == 1.0


def test_a_language_model_as_a_classifier(sentiment: Recipe, model_dir: str) -> None:
    sentiment.model, sentiment.steps, sentiment.format = model_dir, 20, "classification"
    result, shown, _ = run(sentiment)
    assert "score trained whole" in shown
    assert result.after.accuracy == 1.0
    assert evaluate_rows(model_dir, sentiment.out, sentiment.data).accuracy == 1.0


def test_a_classifiers_recipe_runs_again_to_the_same_adapter(
    sentiment: Recipe, tmp_path: Path
) -> None:
    sentiment.steps = 2
    run(sentiment)
    torch.manual_seed(77)
    twin = read_recipe(Path(sentiment.out) / "recipe.yaml", {"out": str(tmp_path / "twin")})
    run(twin)
    first, second = tensors(Path(sentiment.out)), tensors(tmp_path / "twin")
    assert any("classifier" in key for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_head_alone(sentiment: Recipe) -> None:
    sentiment.targets, sentiment.steps = ["none"], 4
    result, _, _ = run(sentiment)
    assert result.trainable_parameters == 2 * 32 + 2
    assert evaluate_rows(sentiment.model, sentiment.out, sentiment.data).loss == pytest.approx(
        result.after.loss, rel=1e-5
    )


def test_evaluating_what_does_not_suit(sentiment: Recipe, recipe: Recipe) -> None:
    with pytest.raises(lk.DataError):
        evaluate_rows(sentiment.model, None, sentiment.data)
    run(recipe)
    with pytest.raises(lk.DataError, match="LlamaForCausalLM"):
        evaluate_rows(recipe.model, recipe.out, sentiment.data)
    with pytest.raises(lk.SettingError, match="loss_on"):
        evaluate_rows(recipe.model, None, recipe.data, loss_on="some")


def test_a_merged_model_is_a_plain_directory_with_the_same_output(
    recipe: Recipe, tmp_path: Path, ids: Tensor
) -> None:
    result, _, prepared = run(recipe)
    size = merge(recipe.model, recipe.out, str(tmp_path / "merged"))
    assert size == sum(
        p.stat().st_size for p in (tmp_path / "merged").iterdir() if p.name != "export.json"
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = ids % 30
    torch.testing.assert_close(
        plain(ids).logits, prepared.loaded.model(ids).logits, rtol=1e-4, atol=1e-5
    )
    assert evaluate_rows(
        str(tmp_path / "merged"), None, recipe.data, dtype="float32"
    ).loss == pytest.approx(result.after.loss, rel=1e-4)
    with pytest.raises(lk.OutputError):
        merge(recipe.model, recipe.out, str(tmp_path / "merged"))


def test_a_full_disk_leaves_no_half_merged_model(recipe: Recipe, tmp_path: Path) -> None:
    import resource

    recipe.steps = 1
    run(recipe)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(lk.OutputError, match="--out"):
            merge(recipe.model, recipe.out, str(tmp_path / "merged"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_what_torch_says_of_a_full_disk_is_known(tmp_path: Path) -> None:
    import resource

    content, path = {"a": torch.ones(3000), "b": [torch.ones(40)] * 9}, tmp_path / "optimizer.pt"
    torch.save(content, path)
    size, old, found = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE), set()
    try:
        for most in range(8, size, 61):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, old[1]))
            try:
                torch.save(content, path)
            except RuntimeError as error:
                found |= {
                    writer for writer in training.DISK_FULL_MESSAGES if writer in str(error)
                } or {str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert found and found <= {*training.DISK_FULL_MESSAGES}


@pytest.mark.parametrize(
    "message", ["basic_ios::clear: iostream error", "[enforce fail at inline_container.cc:672] . "]
)
@pytest.mark.parametrize("whole", [0, 2])
def test_a_disk_that_fills_up_is_told_with_what_is_left(
    message: str, whole: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.steps, recipe.save_every = 4, 2
    save, calls = run_trainer.RunTraining._save_optimizer_and_scheduler, []

    def fails(self: Any, folder: str) -> None:
        calls.append(folder)
        if self.state.global_step > whole:
            raise RuntimeError(message)
        save(self, folder)

    monkeypatch.setattr(run_trainer.RunTraining, "_save_optimizer_and_scheduler", fails)
    left = (
        "checkpoint-2 is whole" if whole else "no checkpoint is whole yet, so it will begin again"
    )
    with pytest.raises(
        lk.OutputError,
        match=rf"cannot write to .*; {left}\. When there is room, resume with: lorakin train",
    ):
        run(recipe)
    assert calls
    monkeypatch.undo()
    run(run_directory.resumed_recipe(None, {"out": str(recipe.out)}), resume=True)


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_kept(
    tokenizer: Any, write_rows: Write, tmp_path: Path, ids: Tensor
) -> None:
    from conftest import tiny_bert

    transformers.BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    rows = [
        {"text": f"the {animal} {verb}", "label": verb}
        for animal in ("cat", "dog", "bird")
        for verb in ("sat", "ran")
    ] * 4
    recipe = Recipe(
        model=str(tmp_path / "mlm"),
        data=write_rows(rows),
        out=str(tmp_path / "out"),
        steps=2,
        settings={"rank": 2},
    )
    _, _, prepared = run(recipe)
    assert {"classifier", "bert.pooler.dense"} <= set(prepared.adapter.placement.whole_modules)
    loaded = load_with_adapter(recipe.model, recipe.out, "float32")
    torch.testing.assert_close(
        loaded.model(ids % 20).logits, prepared.loaded.model(ids % 20).logits
    )


def test_a_fused_run_is_the_same_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakin.kernels.cross_entropy import CrossEntropy

    plain, _, _ = run(recipe)
    calls = []
    forward = CrossEntropy.forward
    monkeypatch.setattr(
        CrossEntropy, "forward", staticmethod(lambda *args: (calls.append(1), forward(*args))[1])
    )
    fused, _, prepared = run(dataclasses.replace(recipe, fuse=True, out=str(tmp_path / "fused")))
    assert len(calls) == recipe.steps, "the loss of every step was computed without logits"
    assert fused.after.loss == pytest.approx(plain.after.loss, rel=1e-2)
    assert type(prepared.loaded.model.lm_head) is torch.nn.Linear, "the model is itself again"


def test_a_float16_base_trains_as_float32_does_and_resumes_to_the_bit(
    recipe: Recipe, tmp_path: Path
) -> None:
    recipe.save_every, recipe.steps, recipe.lr = 4, 8, 5e-3
    there = {}
    for dtype in ("float32", "float16"):
        recipe.dtype, recipe.out = dtype, str(tmp_path / dtype)
        there[dtype] = run(recipe)[0]
    assert there["float16"].after.loss == pytest.approx(there["float32"].after.loss, rel=0.02)
    assert there["float16"].after.loss < 0.9 * there["float16"].before.loss
    whole, half = tensors(tmp_path / "float16"), tmp_path / "half"
    assert all(t.dtype is torch.float32 for t in whole.values())
    assert (tmp_path / "float16" / "checkpoints" / "checkpoint-4" / "scaler.pt").is_file()
    shutil.copytree(tmp_path / "float16", half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-8")
    run(run_directory.resumed_recipe(None, {"out": str(half)}), resume=True)
    assert all(torch.equal(whole[key], t) for key, t in tensors(half).items())


def test_no_module_is_trained_whole_in_float16(recipe: Recipe) -> None:
    recipe.dtype, recipe.modules_to_save = "float16", ["lm_head"]
    with pytest.raises(lk.SettingError):
        run(recipe)
    assert not Path(recipe.out).exists()


DATED = (
    "{{ strftime_now('%d %b %Y') }} {% for m in messages %}<|{{ m.role }}|> {{ m.content }} "
    "<|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def test_a_template_that_prints_the_day_prints_the_same_when_resumed(
    recipe: Recipe, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    class Other(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2031, 1, 2)

    (tmp_path / "dated.jinja").write_text(DATED)
    recipe.chat_template, recipe.steps, recipe.save_every = str(tmp_path / "dated.jinja"), 4, 2
    first = run(recipe)[2]
    again = run_directory.resumed_recipe(None, {"out": recipe.out})
    assert again.date == datetime.date.today().isoformat()
    monkeypatch.setattr(prepare.datetime, "date", Other)
    assert run(again, resume=True)[2].train.examples == first.train.examples


def test_an_adapter_keeps_the_chat_template_that_it_was_trained_with(
    recipe: Recipe, tmp_path: Path
) -> None:
    template = DATED.replace("{{ strftime_now('%d %b %Y') }}", "the cat")
    (tmp_path / "own.jinja").write_text(template)
    recipe.chat_template, recipe.steps = str(tmp_path / "own.jinja"), 2
    run(recipe)
    assert (
        load_with_adapter(recipe.model, recipe.out, "float32").tokenizer.chat_template == template
    )
    merge(recipe.model, recipe.out, str(tmp_path / "merged"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template
    export(ExportRequest(recipe.out, "lora", str(tmp_path / "plain"), recipe.model))
    assert (
        load_with_adapter(recipe.model, str(tmp_path / "plain"), "float32").tokenizer.chat_template
        == template
    )
    recipe.out, recipe.chat_template = str(tmp_path / "none"), str(tmp_path / "nothing.jinja")
    with pytest.raises(lk.DataError, match="--chat-template"):
        run(recipe)
    assert not Path(recipe.out).exists()
