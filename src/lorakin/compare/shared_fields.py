"""The fields of a recipe that the user may set for all trials of a comparison."""

from __future__ import annotations

OF_A_RECIPE = (
    "targets", "rank_above", "batch_size", "accumulate", "max_length", "loss_on", "columns",
    "format", "task", "task_args", "max_rows", "packing", "group_by_length", "chat_template",
    "template_args", "schedule", "schedule_args", "gradient_checkpointing", "fuse", "dtype",
    "quantize",
)  # fmt: skip
