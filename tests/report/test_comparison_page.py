"""The command that a report offers to copy gives `lorakin train` what the comparison had."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorakin.cli.recipe_options import recipe_options
from lorakin.compare.arms import LIMIT, MEMBER, REFERENCE, Arm
from lorakin.compare.estimates import Estimate
from lorakin.compare.standings import Standing
from lorakin.report.comparison_page import as_options
from lorakin.report.comparison_table import arms_table
from lorakin.training.recipe_words import ALL_FIELDS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("targets", ["q_proj", "layers.[0-9]{1,2}.mlp"]),
        ("columns", {"prompt": "question", "completion": "answer"}),
        ("template_args", {"enable_thinking": False, "style": "brief"}),
        ("schedule_args", {"min_lr": 1e-05, "num_cycles": None}),
        ("schedule", "cosine_with_min_lr"),
        ("chat_template", False),
        ("chat_template", "alpaca"),
        ("fuse", True),
        ("gradient_checkpointing", False),
        ("batch_size", 4),
    ],
)
def test_options_to_copy_read_as_the_field(name: str, value: Any) -> None:
    seen: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @recipe_options(*ALL_FIELDS)
    def command(**flags: Any) -> None:
        seen.update(flags)

    result = CliRunner().invoke(app, as_options(name, value), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert seen == {name: value}


@pytest.mark.parametrize(
    ("measure", "names"),
    [
        ("matthews", ["b", "a", "c"]),
        ("f1", ["b", "a", "c"]),
        ("mean_absolute_error", ["c", "a", "b"]),
    ],
)
def test_the_best_arm_comes_first_whatever_decides(measure: str, names: list[str]) -> None:
    standings = [
        Standing(
            Arm(name, name, kind, "lora", 8, 2.0, lr=1e-3), [], [], "", 1e-3, False,
            quality=Estimate(mean, 0.0, 2, 1.0),
        )
        for name, kind, mean in (("a", REFERENCE, 0.5), ("b", MEMBER, 0.9), ("c", LIMIT, -0.1))
    ]  # fmt: skip
    table = arms_table(standings, measure)
    assert [row.cells[0] for row in table.table_rows] == names
