"""Every member through `lorakin train`, on a language model and on a classifier: it learns, and
resumes to the bit.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

import lorakin as lk
import soak
from conftest import tiny_mixtral
from lorakin.cli.app import run as command
from lorakin.family import FAMILY
from lorakin.training import checkpoint_manifest, probe, run_directory
from lorakin.training import train as training
from lorakin.training.recipe import Recipe
from training.saved import tensors

Write = Callable[..., str]
WORDS = [member.word for member in FAMILY]
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 6, "target_rank": 3, "start": 2, "finish": 3},
    "delta-lora": {"start_step": 4},
    "lora-ga": {"rank": 8},
    "lora-xs": {"rank": 8},
    "lora-drop": {"keep": 5, "probe_epochs": 1, "sample": 0.5},
    "vera": {"rank": 16},
    "vera,dora": {"rank": 16},
    "adalora,dora,lora-drop": {
        "initial_rank": 6,
        "target_rank": 3,
        "start": 2,
        "finish": 3,
        "keep": 5,
    },
}
RATES = {"vera": 0.3, "vera,dora": 0.3, "lora-xs": 0.1}


@pytest.fixture
def recipe(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Write, tmp_path: Path
) -> Callable[..., Recipe]:
    def make(words: str, **changes: Any) -> Recipe:
        data = write_rows(chat_rows, "train.jsonl")
        settings = {
            "model": model_dir,
            "data": data,
            "eval_data": data,
            "out": str(tmp_path / "out"),
            "dtype": "float32",
        }
        settings |= {
            "lr": RATES.get(words, 2e-2),
            "steps": 10,
            "save_every": 3,
            "settings": SETTINGS.get(words, {}),
        }
        return Recipe(**(settings | {"method": words} | changes))

    return make


def run(recipe: Recipe, resume: bool = False) -> tuple[training.Result, str]:
    text = io.StringIO()
    prepared = training.prepare(recipe, Console(file=text, width=200), resume)
    return training.train(prepared), text.getvalue()


class Keeping(transformers.TrainerCallback):
    """Copies each checkpoint, of which the Trainer keeps but the last two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(Path(args.output_dir) / name, self.folder / name)


@pytest.fixture
def experts(tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    """Of a recipe: a model with experts, and that they are adapted."""
    folder = tmp_path / "experts"
    tiny_mixtral().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "targets": ["all-linear", "gate_up_proj", "down_proj"]}


@pytest.mark.parametrize(
    "words", ["lora", "lora-fa", "dora", "adalora"] if soak.is_slow() else ["dora", "adalora"]
)
def test_with_experts(
    words: str, experts: dict[str, Any], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    resumes_from_any_step(words, recipe(words, save_every=1, **experts), tmp_path)


@pytest.mark.parametrize("words", [*WORDS, "vera,dora", "adalora,dora,lora-drop"])
def test_it_learns_and_resumes_to_the_bit_from_any_step(
    words: str, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    resumes_from_any_step(words, recipe(words, save_every=1), tmp_path)


def resumes_from_any_step(words: str, given: Recipe, tmp_path: Path) -> None:
    text = io.StringIO()
    prepared = training.prepare(given, Console(file=text, width=200))
    result = training.train(prepared, callbacks=[Keeping(tmp_path / "kept")])
    assert result.after.loss < result.before.loss - 0.01
    assert words in text.getvalue()
    whole, apart = tensors(result.out), []
    for stop in range(1, 11) if soak.is_slow() else (4, 10):
        half = tmp_path / f"half-{stop}"
        half.mkdir()
        for name in ("recipe.yaml", "importance.json", "metrics.jsonl"):
            if (result.out / name).exists():
                shutil.copy(result.out / name, half)
        shutil.copytree(
            tmp_path / "kept" / f"checkpoint-{stop}", half / "checkpoints" / f"checkpoint-{stop}"
        )
        run(run_directory.resumed_recipe(None, {"out": str(half)}), resume=True)
        again = tensors(half)
        assert whole.keys() == again.keys()
        assert all(torch.equal(t, again[key]) for key, t in whole.items()), f"from step {stop}"
        apart += [float((t - again[key]).abs().max()) for key, t in whole.items() if t.numel()]
    method = f"{words} with experts" if "gate_up_proj" in given.targets else words
    soak.record(
        "Resumed from each step, against uninterrupted",
        method=method,
        resumes=10,
        largest_difference=max(apart),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    adapter = lk.load(model, result.out)
    assert set(adapter.method.words.split(",")) == set(words.split(","))


@pytest.mark.parametrize(
    "words", WORDS if soak.is_slow() else ["lora", "dora", "adalora", "lora-drop", "delta-lora"]
)
def test_a_classifier(
    words: str, recipe: Callable[..., Recipe], bert_dir: str, write_rows: Write
) -> None:
    rows = [
        {"text": f"the {animal} {verb} yes", "label": verb}
        for animal in ("cat", "dog", "bird")
        for verb in ("sat", "ran")
    ] * 6
    data = write_rows(rows, "labels.jsonl")
    lr = {"lora+": 2e-3, "adalora": 5e-2, "delta-lora": 2e-3}.get(words, 2e-2)
    result, _ = run(
        recipe(words, model=bert_dir, data=data, eval_data=data, steps=30, batch_size=12, lr=lr)
    )
    assert result.after.loss < result.before.loss
    assert result.after.accuracy is not None


def test_what_cannot_be_measured_is_refused_at_once(
    experts: dict[str, Any], recipe: Callable[..., Recipe]
) -> None:
    given = recipe("lora-drop", **experts)
    with pytest.raises(lk.SettingError):
        run(given)
    assert not Path(given.out).exists()


def test_lora_drops_probe_is_shown_saved_and_not_run_twice(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    given = recipe("lora-drop")
    result, shown = run(given)
    assert "1 passes over 18 examples (3 batches): which modules matter?" in shown
    assert "importance in %: 5 of 14 modules keep a pair of their own" in shown
    importance = json.loads((result.out / "importance.json").read_text())
    assert len(importance) == 14
    assert sum(importance.values()) == pytest.approx(1)
    own = json.loads((result.out / "lorakin.json").read_text())
    assert own["members"][0]["settings"]["importance"] == importance
    changed = dict(zip(importance, list(importance.values())[::-1], strict=True))
    (result.out / "importance.json").write_text(json.dumps(changed))
    shutil.rmtree(result.out / "checkpoints")
    _, shown = run(run_directory.resumed_recipe(None, {"out": str(result.out)}), resume=True)
    assert "which modules matter" not in shown
    own = json.loads((result.out / "lorakin.json").read_text())
    assert own["members"][0]["settings"]["importance"] == changed


def test_settings_on_the_command_line(
    model_dir: str,
    chat_rows: list[dict[str, str]],
    write_rows: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows(chat_rows)
    base = ["train", "-m", model_dir, "-d", data, "--dtype", "float32", "--steps", "2"]
    out = tmp_path / "adapter"
    given = ["--method", "dora,lora+", "--rank", "4", "--set", "ratio=8", "--out", str(out)]
    assert command([*base, *given]) == 0
    assert "method: dora,lora+\nrank: 4\nsettings:\n  ratio: 8" in (out / "recipe.yaml").read_text()
    assert (
        command(
            [
                "train",
                str(out / "recipe.yaml"),
                "--set",
                "ratio=2e0",
                "--out",
                str(tmp_path / "again"),
            ]
        )
        == 0
    )
    assert "ratio: 2.0" in (tmp_path / "again" / "recipe.yaml").read_text()
    capsys.readouterr()
    assert command(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "lora+ (rank 4, ratio 8" in shown
    assert "dora (rank 4)" in shown
    for words, setting, message in (
        ("lora", "ratio=8", r"has no setting 'ratio'; it has"),
        ("lora+", "ratio", "--set takes NAME=VALUE, such as ratio=8, not 'ratio'"),
        ("lora+", "ratio=[", "is not a value"),
        ("lora+", "ratio=fast", "ratio must be a number ≥ 1, not 'fast'"),
        ("lora,vera", "ratio=1", "has no setting 'ratio'"),
        (
            "delta-lora",
            "start_step=2",
            "start_step=2",
        ),
        ("lora+,lora-fa", "ratio=2", "lora+ and lora-fa"),
    ):
        where = tmp_path / "never"
        assert command([*base, "--method", words, "--set", setting, "--out", str(where)]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
        assert not where.exists()


def test_a_probe_that_was_interrupted_goes_on(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe is there before the probe, so --resume knows what to do."""
    given = recipe("lora-drop")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(probe, "importance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(given)
    assert (Path(given.out) / "recipe.yaml").is_file()
    result, shown = run(run_directory.resumed_recipe(None, {"out": given.out}), resume=True)
    assert "which modules matter" in shown
    (result.out / "importance.json").write_text("{")
    with pytest.raises(lk.AdapterError, match=r"importance\.json"):
        run(run_directory.resumed_recipe(None, {"out": given.out}), resume=True)


def test_what_is_wrong_is_said_before_a_probe(recipe: Callable[..., Recipe]) -> None:
    given = recipe("lora-drop", targets=["q_prj"])
    with pytest.raises(lk.TargetError, match="q_prj"):
        run(given)
    assert not Path(given.out).exists()


def test_a_checkpoint_that_was_cut_off_is_passed_over(recipe: Callable[..., Recipe]) -> None:
    result, _ = run(recipe("lora"))
    whole = tensors(result.out)
    (result.out / "checkpoints" / "checkpoint-10" / "optimizer.pt").unlink()
    checkpoint_manifest.unseal(result.out / "checkpoints" / "checkpoint-10")
    _, shown = run(run_directory.resumed_recipe(None, {"out": str(result.out)}), resume=True)
    assert "step 10/10" in shown
    assert "step 9/10" not in shown
    assert all(torch.equal(t, whole[key]) for key, t in tensors(result.out).items())


@pytest.mark.filterwarnings("default::lorakin.errors.LorakinWarning")
def test_words_and_settings_on_the_command_line(
    model_dir: str,
    chat_rows: list[dict[str, str]],
    write_rows: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows(chat_rows)
    base = ["train", "-m", model_dir, "-d", data, "--dtype", "float32", "--steps", "2"]
    out = tmp_path / "adapter"
    given = [
        "--method",
        "dora",
        "--method",
        "lora+",
        "--set",
        "ratio=8",
        "--set",
        "embedding_lr=None",
        "--out",
        str(out),
    ]
    assert command([*base, *given]) == 0
    assert "method: dora,lora+" in (out / "recipe.yaml").read_text()
    assert command(["inspect", str(out)]) == 0
    assert "‖up·down‖ by layer and module, without the magnitudes" in capsys.readouterr().out
    assert (
        command(
            [
                "train",
                str(out / "recipe.yaml"),
                "--method",
                "lora",
                "--out",
                str(tmp_path / "plain"),
            ]
        )
        == 0
    ), "ratio is gone"
    assert (
        command(
            [
                *base,
                "--method",
                "lora+",
                "--set",
                "ratio=8",
                "--set",
                "ratio=9",
                "--out",
                str(tmp_path / "never"),
            ]
        )
        == 2
    )
    assert "--set gives ratio twice" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text(
        f"model: {model_dir}\ndata: {data}\nout: {tmp_path / 'never'}\nsettings: [ratio=4]\n"
    )
    assert command(["train", str(tmp_path / "bad.yaml")]) == 2
    assert "settings must be lines such as 'ratio: 8', not ['ratio=4']" in capsys.readouterr().err
    assert (
        command(
            [
                *base,
                "--method",
                "adalora",
                "--set",
                "target_rank=12",
                "--steps",
                "9",
                "--out",
                str(tmp_path / "warned"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().err
    assert "warning: target_rank=12 is not below initial_rank=12" in shown
    assert ".py:" not in shown.split("warning:")[1].splitlines()[0]
    vera = [
        "--method",
        "vera",
        "--rank",
        "4",
        "--set",
        "save_projection=false",
        "--out",
        str(tmp_path / "vera"),
    ]
    assert command([*base, *vera]) == 0
    capsys.readouterr()
    assert command(["inspect", str(tmp_path / "vera")]) == 0
    assert "the shared pair is not stored in the file" in capsys.readouterr().out
    drop = ["--method", "lora-drop", "--set", "keep=4", "--out", str(tmp_path / "drop")]
    assert command([*base, *drop]) == 0
    capsys.readouterr()
    assert command(["inspect", str(tmp_path / "drop")]) == 0
    assert "4 of 14 modules have a pair of their own" in capsys.readouterr().out


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in WORDS)
    assert "vera and lora-fa do not combine" in shown.replace("\n", " ")
    assert command(["methods", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [member["word"] for member in content["members"]] == WORDS
    assert all({one["one"], one["other"]} <= set(WORDS) for one in content["refused"])
    pairs = [{one["one"], one["other"]} for one in content["refused"]]
    assert {"vera", "lora-fa"} in pairs and {"dora", "lora+"} not in pairs
    assert content["members"][0]["settings"] == {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "rslora": False,
        "init": "kaiming",
    }
