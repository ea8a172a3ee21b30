"""The same run by transformers' Trainer alone, and what both logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from lorakin.training.run import PreparedRun


def losses_of(folder: Path) -> list[float]:
    """Returns the training losses that a run wrote."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def losses_by_transformers(twin: PreparedRun, collator: Any, folder: Path) -> list[float]:
    """Trains what was prepared with transformers' Trainer and the model's own loss."""
    recipe = twin.recipe
    trainer = transformers.Trainer(
        twin.loaded.model,
        transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=recipe.batch_size, max_steps=recipe.steps or 1,
            learning_rate=recipe.lr or 0.0, lr_scheduler_type="constant", logging_steps=1,
            report_to="none", save_strategy="no", seed=0, data_seed=0, use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False,
        ),
        train_dataset=twin.train.examples,
        data_collator=collator,
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
