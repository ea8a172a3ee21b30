"""DPO, ORPO, KTO and reward models: the same run by TRL alone, and held-out figures by hand."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DPOConfig, DPOTrainer
from trl.trainer.kto_trainer import KTOConfig, KTOTrainer
from trl.trainer.reward_trainer import RewardConfig, RewardTrainer

import lorakin as lk
from lorakin.terminal import Terminal
from lorakin.training import predictions
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.paired import paired
from lorakin.training.prepare import prepare
from lorakin.training.preview import preview
from lorakin.training.reading import read_rows
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import read_recipe, write_recipe
from lorakin.training.reference_adapter import reference_view
from lorakin.training.run import PreparedRun, Result
from lorakin.training.train import train
from training.twins import losses_of

Write = Callable[..., str]
Row = dict[str, Any]
BY_TRL: dict[str, Any] = {
    "dpo": (DPOTrainer, DPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "reward": (RewardTrainer, RewardConfig),
}


def turn(role: str, content: str) -> list[Row]:
    return [{"role": role, "content": content}]


def pairs(count: int = 18) -> list[Row]:
    """Two answers to a prompt, of other lengths in each row."""
    chance = np.random.default_rng(0)
    animals, verbs = ("cat", "dog", "bird"), ("sat", "ran", "flew")
    rows = []
    for n in range(count):
        animal, verb = animals[n % 3], verbs[n // 3 % 3]
        rows.append(
            {
                "prompt": turn("user", f"what did the {animal} {verb}"),
                "chosen": turn("assistant", f"the {animal} {verb} " + "on " * chance.integers(4)),
                "rejected": turn("assistant", "no " * chance.integers(1, 4) + "bad"),
            }
        )
    return rows


def verdicts() -> list[Row]:
    """Good answers first, then bad ones: an order that a trainer must not keep."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for row in pairs()
    ]


def rows_for(task: str) -> list[Row]:
    return verdicts() if task == "kto" else pairs()


def recipe_for(model_dir: str, data: str, out: Path, **changes: Any) -> Recipe:
    settings: Row = {
        "model": model_dir, "data": data, "eval_data": data, "out": str(out), "rank": 4, "lr": 1e-2,
        "steps": 6, "batch_size": 6, "warmup": 0.0, "schedule": "constant", "save_every": 0,
        "dtype": "float32", "targets": ["q_proj", "down_proj"],
    }  # fmt: skip
    return Recipe(**settings | changes)


def run_of(recipe: Recipe) -> tuple[PreparedRun, Result]:
    run = prepare(recipe, Terminal(quiet=True))
    return run, train(run)


def losses_by_trl(twin: PreparedRun, rows: list[Row], folder: Path, ref: Any = None) -> list[float]:
    """Trains what was prepared with TRL's trainer, on rows that TRL tokenises."""
    recipe = twin.recipe
    trainer_class, config = BY_TRL[twin.task.word]
    data = datasets.Dataset.from_list(rows)
    trainer = trainer_class(
        twin.loaded.model,
        args=config(
            str(folder), per_device_train_batch_size=recipe.batch_size, max_steps=recipe.steps,
            learning_rate=recipe.lr, lr_scheduler_type="constant", logging_steps=1,
            report_to="none", save_strategy="no", seed=0, data_seed=0, use_cpu=True,
            disable_tqdm=True, bf16=False, gradient_checkpointing=False, **recipe.task_args,
        ),
        train_dataset=data.shuffle(seed=0) if twin.task.word == "kto" else data,
        processing_class=twin.loaded.tokenizer,
        **({} if ref is None else {"ref_model": ref}),
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class StopAt(transformers.TrainerCallback):
    """Interrupts a run once it has saved a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def base_of(model_dir: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("dpo", {}),
        ("dpo", {"loss_type": "ipo", "beta": 0.3}),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2], "ld_alpha": 0.5}),
        ("orpo", {"beta": 0.5}),
        ("kto", {}),
        ("kto", {"loss_type": "apo_zero_unpaired", "desirable_weight": 2.0}),
        ("reward", {"center_rewards_coefficient": 0.01}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "default",
)
def test_training_is_that_of_trl(
    task: str, arguments: Row, model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    rows = rows_for(task)
    data = write_rows(rows)
    recipe = recipe_for(model_dir, data, tmp_path / "a", task_args=arguments)
    recipe.task = task if task in ("orpo", "reward") else None
    run, result = run_of(recipe)
    assert run.task.word == task
    assert "forward" not in vars(run.loaded.model)
    if task != "reward":
        assert type(run.loaded.model) is transformers.LlamaForCausalLM

    again = Recipe(**{**vars(recipe), "out": str(tmp_path / "b")})
    twin = prepare(again, Terminal(quiet=True))
    reference = base_of(model_dir) if task in ("dpo", "kto") else None
    theirs = losses_by_trl(twin, rows, tmp_path / "c", reference)
    assert losses_of(tmp_path / "a") == pytest.approx(theirs, rel=1e-5)
    assert result.after.loss < result.before.loss
    assert result.after.metrics["reward_accuracy"].value > 0.9


def log_probability(model: Any, tokenizer: Any, messages: list[Row], answer: list[Row]) -> float:
    """Returns a model's log-probability of an answer, token by token."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    ids = tokenizer.apply_chat_template(messages + answer, return_dict=True)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logps[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))


def test_held_out_figures_of_dpo_are_those_of_the_paper(
    model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    rows, beta = pairs(), 0.3
    data, out = write_rows(rows), tmp_path / "a"
    recipe = recipe_for(model_dir, data, out, steps=2, lr=1e-3, task_args={"beta": beta})
    _, result = run_of(recipe)
    assert result.before.metrics["reward_accuracy"].value == 0.5  # all rewards are 0
    found = evaluate_rows(model_dir, str(out), data, dtype="float32", batch_size=4)
    assert found.count == 18
    assert found.loss == pytest.approx(result.after.loss, rel=1e-5)

    base, tokenizer = base_of(model_dir), transformers.AutoTokenizer.from_pretrained(model_dir)
    tuned = peft.PeftModel.from_pretrained(base_of(model_dir), out)
    rewards = np.array(
        [
            [
                beta * (
                    log_probability(tuned, tokenizer, row["prompt"], row[side])
                    - log_probability(base, tokenizer, row["prompt"], row[side])
                )
                for side in ("chosen", "rejected")
            ]
            for row in rows
        ]
    )  # fmt: skip
    margins = rewards[:, 0] - rewards[:, 1]
    assert found.metrics["reward_margin"].value == pytest.approx(margins.mean(), rel=1e-4)
    assert found.metrics["reward_accuracy"].value == (margins > 0).mean()
    assert found.loss == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)

    path = tmp_path / "answers.jsonl"
    predictions.write(path, {None: found})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["chosen_reward"] for line in lines] == pytest.approx(rewards[:, 0], abs=1e-5)
    assert lines[0]["rejected"] == rows[0]["rejected"][0]["content"]
    assert {line["won"] for line in lines} <= {"chosen", "rejected"}
    with_base = evaluate_rows(model_dir, None, data, dtype="float32")
    assert with_base.metrics["reward_margin"].value == 0
    assert found.note.startswith("dpo: beta 0.")
    assert paired(with_base, found).better == (margins > 0).sum()


def test_a_reward_model_is_read_by_peft(model_dir: str, write_rows: Write, tmp_path: Path) -> None:
    rows = pairs()
    data, out = write_rows(rows), tmp_path / "a"
    run_of(recipe_for(model_dir, data, out, task="reward"))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=1, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    margins = []
    with torch.no_grad():
        for row in rows:
            ids = [
                tokenizer.apply_chat_template(row["prompt"] + row[side], return_tensors="pt")
                for side in ("chosen", "rejected")
            ]
            scores = [model(**one).logits.item() for one in ids]
            margins.append(scores[0] - scores[1])
    found = evaluate_rows(model_dir, str(out), data, dtype="float32")
    assert found.metrics["reward_margin"].value == pytest.approx(np.mean(margins), rel=1e-4)
    assert found.metrics["reward_accuracy"].value == np.mean(np.array(margins) > 0)
    assert found.loss == pytest.approx(
        np.mean([math.log1p(math.exp(-m)) for m in margins]), rel=1e-4
    )


def test_an_encoder_learns_rewards_of_text_pairs(
    bert_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    rows = [{side: row[side][0]["content"] for side in row} for row in pairs()]
    recipe = recipe_for(
        bert_dir, write_rows(rows), tmp_path / "a", task="reward", targets=["query", "value"],
        steps=20,
    )  # fmt: skip
    _, result = run_of(recipe)
    assert result.after.loss < result.before.loss


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "reward"])
def test_a_run_resumes_to_the_bit(
    task: str, model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    """With the best step kept and evaluations between."""
    data = write_rows(rows_for(task))
    settings = {
        "task": task, "save_every": None, "eval_every": 2, "keep": "best", "dropout": 0.1,
        "metric": "reward_accuracy",
    }  # fmt: skip
    whole, _ = run_of(recipe_for(model_dir, data, tmp_path / "a", **settings))
    recipe = recipe_for(model_dir, data, tmp_path / "b", **settings)

    with pytest.raises(KeyboardInterrupt):
        train(prepare(recipe, Terminal(quiet=True)), callbacks=[StopAt(4)])
    resumed = prepare(recipe, Terminal(quiet=True), resume=True)
    assert resumed.checkpoint is not None
    train(resumed)
    for ours, theirs in zip(resumed.adapter.parameters(), whole.adapter.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


def test_a_run_from_an_adapter_resumes_to_the_bit(
    model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows(pairs())
    run_of(recipe_for(model_dir, data, tmp_path / "first", task="orpo", lr=1e-3))
    later: Row = {
        "adapter": str(tmp_path / "first"), "targets": ["all-linear"], "rank": None,
        "save_every": 2,
    }  # fmt: skip
    whole, _ = run_of(recipe_for(model_dir, data, tmp_path / "a", **later))
    recipe = recipe_for(model_dir, data, tmp_path / "b", **later)
    with pytest.raises(KeyboardInterrupt):
        train(prepare(recipe, Terminal(quiet=True)), callbacks=[StopAt(4)])
    resumed = prepare(recipe, Terminal(quiet=True), resume=True)
    train(resumed)
    for ours, theirs in zip(resumed.adapter.parameters(), whole.adapter.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "reward"])
def test_rows_are_streamed(task: str, model_dir: str, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(rows_for(task))
    _, result = run_of(recipe_for(model_dir, data, tmp_path / "a", task=task, streaming=True))
    assert result.after.loss < result.before.loss


def test_an_adapter_to_start_from_is_the_reference(
    model_dir: str, write_rows: Write, chat_rows: list[Row], tmp_path: Path
) -> None:
    """As with TRL, which copies a trained adapter of PEFT's."""
    first = recipe_for(model_dir, write_rows(chat_rows, "sft.jsonl"), tmp_path / "sft")
    run_of(first)
    rows = pairs()
    data = write_rows(rows)
    recipe = Recipe(
        model=model_dir, data=data, eval_data=data, out=str(tmp_path / "a"), lr=1e-2, steps=6,
        batch_size=6, warmup=0.0, schedule="constant", save_every=3, dtype="float32",
        adapter=str(tmp_path / "sft"),
    )  # fmt: skip
    run, result = run_of(recipe)
    assert result.before.metrics["reward_margin"].value == 0
    assert losses_of(tmp_path / "a")[0] == pytest.approx(math.log(2))

    reference = peft.PeftModel.from_pretrained(base_of(model_dir), tmp_path / "sft")
    twin = prepare(Recipe(**{**vars(recipe), "out": str(tmp_path / "b")}), Terminal(quiet=True))
    theirs = losses_by_trl(twin, rows, tmp_path / "c", reference.merge_and_unload())
    assert losses_of(tmp_path / "a") == pytest.approx(theirs, rel=1e-4)
    assert not (tmp_path / "a" / "reference").exists()
    assert set(lk.adapters(run.loaded.model)) == {"default", "reference"}


@pytest.mark.parametrize("start", [False, True], ids=["base", "adapter"])
def test_the_reference_has_no_dropout(
    start: bool, model_dir: str, write_rows: Write, tmp_path: Path, ids: torch.Tensor
) -> None:
    data = write_rows(pairs())
    first = recipe_for(model_dir, data, tmp_path / "a", dropout=0.5)
    run_of(first)
    if start:
        later = {"adapter": first.out, "targets": ["all-linear"], "rank": None}
        run = prepare(recipe_for(model_dir, data, tmp_path / "b", **later), Terminal(quiet=True))
    else:
        run = prepare(
            recipe_for(model_dir, data, tmp_path / "b", dropout=0.5), Terminal(quiet=True)
        )
    view = reference_view(run.loaded.model)
    run.loaded.model.train()
    base = base_of(model_dir).eval()
    if start:
        base = peft.PeftModel.from_pretrained(base, first.out).eval()
    with torch.no_grad():
        ids = ids.clamp(max=40)
        torch.testing.assert_close(view(ids).logits, base(ids).logits)
    assert run.loaded.model.training


def test_an_adapter_on_the_head_learns(model_dir: str, write_rows: Write, tmp_path: Path) -> None:
    """TRL multiplies by the head's weight without calling the head."""
    recipe = recipe_for(model_dir, write_rows(pairs()), tmp_path / "a", targets=["lm_head"])
    run, result = run_of(recipe)
    assert result.after.loss < result.before.loss
    moved = [p for name, p in run.adapter.named_parameters() if name.endswith("B")]
    assert moved
    assert all(bool(p.any()) for p in moved)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"task_args": {"bta": 0.2}}, lk.SettingError),
        ({"task_args": {"beta": 0}}, lk.SettingError),
        ({"task_args": {"loss_type": "sigmoit"}}, lk.SettingError),
        ({"task_args": {"loss_type": "exo_pair"}}, lk.SettingError),
        ({"task_args": {"loss_type": "ipo", "loss_weights": [1.0, 2.0]}}, lk.SettingError),
        (
            {"task_args": {"loss_type": "apo_zero", "f_divergence_type": "js_divergence"}},
            lk.SettingError,
        ),
        ({"task": "language", "task_args": {"beta": 0.2}}, lk.DataError),
        ({"task": "classification"}, lk.DataError),
        ({"label_smoothing": 0.1}, lk.SettingError),
        ({"loss_on": "all"}, lk.DataError),
        ({"metric": "accuracy"}, lk.SettingError),
        ({"max_length": 3}, lk.DataError),
        ({"task": "kto", "batch_size": 1}, lk.SettingError),
        ({"task": "kto", "group_by_length": True}, lk.SettingError),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_the_run(
    changes: Row, error: type[Exception], model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error):
        prepare(recipe_for(model_dir, write_rows(pairs()), out, **changes), Terminal(quiet=True))
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "reward"])
def test_a_missing_package_is_named(
    task: str, model_dir: str, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trainer in (*BY_TRL, "orpo"):
        monkeypatch.setitem(sys.modules, f"trl.trainer.{trainer}_trainer", None)
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo.orpo_trainer", None)
    recipe = recipe_for(model_dir, write_rows(pairs()), tmp_path / "a", task=task)
    with pytest.raises(lk.SettingError, match="pip install"):
        prepare(recipe, Terminal(quiet=True))


def test_arguments_go_with_their_task(model_dir: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    recipe = recipe_for(model_dir, "x.jsonl", tmp_path / "a", task="dpo", task_args={"beta": "0.2"})
    write_recipe(recipe, file)
    assert read_recipe(file, {}).task_args == {"beta": 0.2}
    assert read_recipe(file, {"task": "reward"}).task_args == {}


def test_answers_of_one_verdict_are_refused(
    model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    rows = [row for row in verdicts() if row["label"]]
    with pytest.raises(lk.DataError, match="empty preference"):
        prepare(recipe_for(model_dir, write_rows(rows), tmp_path / "a"), Terminal(quiet=True))


def test_long_pairs_are_cut_or_dropped_and_counted(
    model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    rows = pairs()
    rows[0]["chosen"] = turn("assistant", "cat " * 30)
    rows[1]["prompt"] = turn("user", "cat " * 30)
    recipe = recipe_for(model_dir, write_rows(rows), tmp_path / "a", max_length=20)
    run = prepare(recipe, Terminal(quiet=True))
    assert (run.train.cut, run.train.dropped, len(run.train.examples)) == (1, 1, 17)
    run.directory_lock.release()
    reward = preview(Recipe(**{**vars(recipe), "task": "reward", "out": str(tmp_path / "b")}))
    assert (reward.cut, reward.dropped, reward.rows, len(reward.lengths)) == (0, 2, 16, 32)


def test_pairs_are_shown_with_what_is_compared(
    model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    shown = preview(recipe_for(model_dir, write_rows(pairs()), tmp_path / "a"))
    assert shown.task == "dpo"
    assert len(shown.examples) == 3
    text = shown.examples[0].plain
    assert text.startswith("chosen: <|user|> what did the")
    assert "\nrejected: " in text
    assert text.count("⟦") == 2


def test_one_wrong_verdict_is_named_with_its_row(write_rows: Write) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(9)]
    rows[7]["label"] = "maybe"
    for given in ({}, {"task": "kto"}, {"layout": "feedback"}):
        with pytest.raises(lk.DataError, match="row 8"):
            read_rows(write_rows(rows), **given)
