"""Options that are made of a recipe's fields."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lorakin as lk
from lorakin.cli.app import run
from lorakin.cli.recipe_options import recipe_options
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_option import PANELS
from lorakin.training.recipe_words import ALL_FIELDS, defaults


def given(*arguments: str) -> dict[str, Any]:
    """What a command that takes all fields gets."""
    found: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @recipe_options(*ALL_FIELDS)
    def command(**flags: Any) -> None:
        found.update(flags)

    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found


def test_nothing_is_given_where_the_user_says_nothing() -> None:
    assert given() == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-rows", "-3"),
        ("--lr", "0"),
        ("--loss-on", "questions"),
        ("--report-to", "paper"),
        ("--data-weights", "1,b"),
        ("--rank-pattern", "q_proj=much"),
        ("--schedule-arg", "min_lr"),
    ],
)
def test_a_wrong_value_is_named_by_its_option(option: str, value: str) -> None:
    app = typer.Typer()

    @app.command()
    @recipe_options(*ALL_FIELDS)
    def command(**flags: Any) -> None:
        raise AssertionError("the command ran")

    result = CliRunner().invoke(app, [option, value])
    assert isinstance(result.exception, lk.SettingError)
    assert str(result.exception).startswith(option)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-m", "x", "--rank", "8", "--lr", "2e-4"], {"model": "x", "rank": 8, "lr": 2e-4}),
        (["--learning-rate=1"], {"lr": 1.0}),
        (["-d", "a,b.jsonl", "-d", "c"], {"data": ["a,b.jsonl", "c"]}),
        (["--method", "dora", "--method", "lora+"], {"method": "dora,lora+"}),
        (["--targets", "q_proj,v_proj"], {"targets": ["q_proj", "v_proj"]}),
        (["--set", "ratio=8", "--set", "a=1e-2"], {"settings": {"ratio": 8, "a": 0.01}}),
        (["--columns", "prompt=q,completion=a"], {"columns": {"prompt": "q", "completion": "a"}}),
        (["--rslora", "--no-fuse"], {"rslora": True, "fuse": False}),
        (["--rank-pattern", "q_proj=8"], {"rank_pattern": {"q_proj": 8}}),
        (["--no-chat-template"], {"chat_template": False}),
        (["--chat-template", "alpaca"], {"chat_template": "alpaca"}),
        (["--template-arg", "quiet=true"], {"template_args": {"quiet": True}}),
        (["--schedule-arg", "num_cycles=2"], {"schedule_args": {"num_cycles": 2}}),
        (["--save-every", "0"], {"save_every": 0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_given_is_as_a_recipe_takes_it(
    arguments: list[str], expected: dict[str, Any]
) -> None:
    assert given(*arguments) == expected
    needed = {"model": "m", "data": ["d"], "out": "o"}
    recipe = Recipe(**{**needed, **expected})
    assert {name: getattr(recipe, name) for name in expected} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-chat-template", "--chat-template", "x"],
        ["--fuse", "--no-fuse"],
        ["--set", "ratio"],
        ["--columns", "a"],
    ],
)
def test_what_contradicts_or_is_no_pair(arguments: list[str]) -> None:
    with pytest.raises(lk.SettingError):
        given(*arguments)


def test_the_defaults_are_the_recipes() -> None:
    recipe = Recipe("m", ["d"], "o")
    names = [name for name in ALL_FIELDS if name not in ("model", "data", "out")]
    assert defaults(*names) == {name: getattr(recipe, name) for name in names}


def test_help_of_train_lists_options_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)
    assert places[0] < shown.index("--data") < places[1] < shown.index("--rank") < places[2]
    assert places[3] < shown.index("--eval-every") < places[4]
    assert places[4] < shown.index("--save-every") < places[5] < shown.index("--quantize")


def test_other_commands_have_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--help"]) == 0
    assert not any(f"─ {panel} ─" in capsys.readouterr().out for panel in PANELS)
