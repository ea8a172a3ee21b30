"""What `lorakin demo` does to its directory: it removes what an earlier demo wrote, as it wrote it,
and nothing else.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import lorakin as lk
from lorakin.cli import demo
from lorakin.training import docstrings

ROWS = [{"prompt": f"Write.\n\ndef f{n}(): ...", "completion": "Does it."} for n in range(100)]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "docstring_rows", lambda: ROWS)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def trained(out: Path) -> None:
    """As a demo leaves its directory."""
    demo._write_data(out)
    with demo._recording(out):
        (out / "adapter" / "checkpoints" / "checkpoint-8").mkdir(parents=True)
        for name in (
            "adapter_model.safetensors",
            "recipe.yaml",
            "checkpoints/checkpoint-8/optimizer.pt",
        ):
            (out / "adapter" / name).write_text(name)


def test_a_directory_with_files_of_the_same_names_survives(tmp_path: Path) -> None:
    mine = {"train.jsonl": "my rows", "held_out.jsonl": "my other rows", "notes/thesis.txt": "mine"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for listed in (
        None,
        "nonsense",
        "[]",
        "null",
        '{"train.jsonl": 3}',
        "{}",
        '{"train.jsonl": "abc", "notes/thesis.txt": "x"}',
    ):
        if listed is not None:
            (tmp_path / demo.RECORD).write_text(listed)
        with pytest.raises(lk.OutputError):
            demo._write_data(tmp_path)
        assert mine.items() <= contents(tmp_path).items()


def test_a_second_demo_replaces_the_first_and_keeps_what_is_beside_it(tmp_path: Path) -> None:
    trained(tmp_path / "demo")
    (tmp_path / "demo" / "merged").mkdir()
    (tmp_path / "demo" / "merged" / "model.txt").write_text("mine")
    demo._write_data(tmp_path / "demo")
    found = contents(tmp_path / "demo")
    assert found.keys() == {
        "train.jsonl",
        "held_out.jsonl",
        "prompt.txt",
        "merged/model.txt",
        demo.RECORD,
    }
    assert json.loads(found[demo.RECORD]).keys() == {"train.jsonl", "held_out.jsonl", "prompt.txt"}
    assert len(found["train.jsonl"].splitlines()) == 4


@pytest.mark.parametrize(
    "name", ["train.jsonl", "prompt.txt", "adapter/recipe.yaml", "adapter/notes.txt"]
)
def test_what_was_changed_since_stays_and_nothing_is_removed(name: str, tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(lk.OutputError, match=f"{name} is not as an earlier demo left it"):
        demo._write_data(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["train.jsonl", "adapter", "adapter/checkpoints", "adapter/recipe.yaml", demo.RECORD]
)
def test_links_are_not_followed(name: str, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    trained(out)
    elsewhere.mkdir()
    (out / name).rename(elsewhere / "it")
    (out / name).symlink_to(elsewhere / "it")
    before = contents(tmp_path)
    with pytest.raises(lk.OutputError):
        demo._write_data(out)
    assert contents(tmp_path) == before


def test_an_interrupted_demo_is_replaced_too(tmp_path: Path) -> None:
    demo._write_data(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), demo._recording(tmp_path):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "recipe.yaml").write_text("model: x")
        raise KeyboardInterrupt
    demo._write_data(tmp_path)
    assert not (tmp_path / "adapter").exists()
