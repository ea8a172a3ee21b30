"""The command that a report offers to copy gives `lorakin train` what the comparison had."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorakin.cli.recipe_options import ALL_FIELDS, recipe_options
from lorakin.report.comparison_page import as_options


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
