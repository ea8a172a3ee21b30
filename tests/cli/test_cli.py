"""The command line as a user types it: results, JSON, help, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from conftest import interruptible
from lorakin.cli.app import run
from lorakin.training.recipe_words import split_names

COMMANDS = ["train", "generate", "chat", "doctor", "evaluate", "merge", "inspect", "demo"]


@pytest.fixture
def data(write_rows: Callable[..., str], chat_rows: list[dict[str, str]]) -> str:
    return write_rows(chat_rows)


@pytest.fixture
def trained(model_dir: str, data: str, tmp_path: Path) -> Path:
    out = tmp_path / "adapter"
    assert run(training_of(model_dir, data, out)) == 0
    return out


def training_of(model: str, data: str, out: Path) -> list[str]:
    return [
        "train",
        "-m",
        model,
        "-d",
        data,
        "-o",
        str(out),
        "--steps=4",
        "--rank=4",
        "--lr=1e-2",
        "--dtype=float32",
    ]


def script(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lorakin.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples" in shown
    assert f"lorakin {command}" in shown


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_train_says_where_everything_is(
    model_dir: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(training_of(model_dir, data, tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    for part in (
        "one example",
        "held out before",
        "held out after",
        "perplexity",
        "loss.png",
        "metrics.jsonl",
        "recipe.yaml",
    ):
        assert part in shown, part
    assert str(tmp_path / "out") in shown


def test_a_recipe_runs_with_flags_over_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert (
        run(
            [
                "train",
                str(trained / "recipe.yaml"),
                "--steps",
                "2",
                "--out",
                str(tmp_path / "other"),
                "--json",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["steps"] == 2
    assert result["out"] == str(tmp_path / "other")
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["adapter_bytes"] > 0
    assert "one example" in captured.err
    assert "rank: 4" in (tmp_path / "other" / "recipe.yaml").read_text()
    assert run(["train", "--resume", "--out", str(tmp_path / "other")]) == 0


def test_generate_streams_and_gives_json(
    trained: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "generate",
        "-m",
        model_dir,
        "--prompt",
        "what did the cat ran",
        "--max-new-tokens",
        "5",
        "--dtype",
        "float32",
    ]
    capsys.readouterr()
    assert run([*common, "--adapter", str(trained)]) == 0
    streamed = capsys.readouterr().out.strip()
    assert run([*common, "--adapter", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "prompt": "what did the cat ran",
        "answer": streamed,
    }
    assert run(common) == 0
    assert capsys.readouterr().out.strip() != streamed, (
        "without the adapter it is the base that answers"
    )
    assert run([*common, "--temperature", "5", "--seed", "1", "--json"]) == 0


def test_evaluate(
    trained: Path, model_dir: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = []
    for adapter in ([], ["--adapter", str(trained)]):
        capsys.readouterr()
        assert (
            run(["evaluate", "-m", model_dir, "-d", data, "--json", "--dtype", "float32", *adapter])
            == 0
        )
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[1]["loss"] < figures[0]["loss"]
    assert figures[0]["perplexity"] == pytest.approx(2.718281828 ** figures[0]["loss"], rel=1e-6)
    assert run(["evaluate", "-m", model_dir, "-d", data]) == 0
    assert "perplexity" in capsys.readouterr().out

    both = ["evaluate", "-m", model_dir, "-d", data, "--dtype", "float32", "--base"]
    assert run([*both, "--adapter", str(trained), "--json"]) == 0
    base = json.loads(capsys.readouterr().out)
    (other,) = base["others"]
    assert (base["adapter"], other["adapter"]) == (None, str(trained))
    assert [base["loss"], other["loss"]] == [figure["loss"] for figure in figures]
    assert 0 < other["better"] <= other["differ"]
    capsys.readouterr()
    answers = tmp_path / "answers.jsonl"
    both += ["--adapter", str(trained)]
    assert run([*both, "--predictions", str(answers)]) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["adapter"] for row in rows[:4]] == [None, str(trained)] * 2
    assert [row["row"] for row in rows[::2]] == [row["row"] for row in rows[1::2]]
    better = sum(new["loss"] < old["loss"] for old, new in zip(rows[::2], rows[1::2], strict=True))
    assert better == other["better"]
    assert run([*both, "--predictions", str(answers)]) == 2  # it is there now


def test_merge(
    trained: Path, model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert (
        run(
            ["merge", "-m", model_dir, "-a", str(trained), "-o", str(tmp_path / "merged"), "--json"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    lk.load(base, trained)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(plain(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert run(["merge", "-m", model_dir, "-a", str(trained), "-o", str(tmp_path / "merged")]) == 2


@pytest.mark.parametrize("options", [["merge"], ["export", "--to", "merged"]])
def test_the_adapter_is_an_argument_or_an_option(
    options: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = str(trained), str(tmp_path / "out")
    for n, given in enumerate(([adapter], ["--adapter", adapter])):
        assert run([*options, *given, "--out", f"{out}{n}", "--no-verify"]) == 0
    first, second = (tmp_path / f"out{n}" / "model.safetensors" for n in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    for given in ([], [adapter, "--adapter", adapter]):
        assert run([*options, *given, "--out", f"{out}2", "--no-verify"]) == 2
        assert "adapter" in capsys.readouterr().err.lower() and not (tmp_path / "out2").exists()


def test_export(
    trained: Path, model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out = tmp_path / "plain"
    assert (
        run(["export", str(trained), "--to", "lora", "--portable", "-o", str(out), "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["verified"]["token_agreement"] == 1 and report["order"]["model"] is None, (
        "the adapter names its base"
    )
    assert report == json.loads((out / "export.json").read_text())
    assert (
        run(
            [
                "export",
                str(trained),
                "--to",
                "lora",
                "--rank",
                "1",
                "--max-kl",
                "9",
                "-o",
                str(tmp_path / "one"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "worst first" in said
        and "rank 1, relative error 0." in said
        and "compared with the trained model" in said
    )
    refused = [
        "export",
        str(trained),
        "--to",
        "lora",
        "--rank",
        "1",
        "--max-kl",
        "1e-9",
        "-o",
        str(tmp_path / "two"),
    ]
    assert run([*refused, "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["verified"]["mean_kl"] > 1e-9, (
        "a script learns how far it was"
    )
    assert run(refused) == 4
    assert (
        "not the model that was trained" in capsys.readouterr().err
        and not (tmp_path / "two").exists()
    )


def test_combine(
    trained: Path, model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "sum")
    assert run(["combine", f"{trained}=0.25", f"{trained}=0.75", "-m", model_dir, "-o", out]) == 0
    assert "rank 4, exact" in capsys.readouterr().out
    one, both = (transformers.AutoModelForCausalLM.from_pretrained(model_dir) for _ in range(2))
    lk.load(one, trained)
    lk.load(both, out)
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(both(ids).logits, one(ids).logits, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    less = ["combine", str(trained), "--rank", "1", "-m", model_dir, "--json", "-o"]
    assert run([*less, out]) == 2, "what is there is left alone"
    assert run([*less, str(tmp_path / "less"), "--max-kl", "1e-12"]) == 4
    assert not (tmp_path / "less").exists()
    assert run([*less, str(tmp_path / "less"), "--max-kl", "9"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["ranks"] == [1]
        and report["largest_relative_error"] > 0
        and 0 < report["verified"]["mean_kl"] < 9
    )
    assert report == json.loads((tmp_path / "less" / "export.json").read_text())
    ties = [
        "combine",
        str(trained),
        f"{out}=0.5",
        "--how",
        "ties",
        "-m",
        model_dir,
        "-o",
        str(tmp_path / "ties"),
        "--json",
    ]
    assert run([*ties, "--density", "0.5"]) == 2 and run([*ties, "--rank", "3"]) == 2
    assert "give density" in capsys.readouterr().err
    assert run([*ties, "--density", "0.5", "--rank", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["how"] == {"how": "ties", "on": "change", "density": 0.5} and report["ranks"] == [
        3
    ]
    assert report["verified"]["mean_kl"] < 1e-9 < report["largest_relative_error"]
    factors = [
        "combine",
        str(trained),
        str(out),
        "--on",
        "factors",
        "--how",
        "dare_linear",
        "--density",
        "0.5",
        "--seed",
        "3",
    ]
    assert run([*factors, "-m", model_dir, "-o", str(tmp_path / "factors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_relative_error"] == 0
    assert run(["combine", f"{trained}=0", "-m", model_dir, "-o", str(tmp_path / "none")]) == 2
    assert run(["combine", f"{trained}=much", "-m", model_dir, "-o", out]) == 2
    assert "much" in capsys.readouterr().err


def test_convert(model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator) for shape in ((3, 32), (32, 3)))
    path = "model.layers.1.self_attn.o_proj"
    torch.save({f"{path}.lora_A": a, f"{path}.lora_B": b}, tmp_path / "lora.pt")
    out = str(tmp_path / "converted")
    assert run(["convert", str(tmp_path / "lora.pt"), "-m", model_dir, "-o", out]) == 2
    assert "alpha" in capsys.readouterr().err
    assert (
        run(["convert", str(tmp_path / "lora.pt"), "-m", model_dir, "--alpha", "6", "-o", out]) == 0
    )
    assert "loralib adapter" in capsys.readouterr().out
    assert (
        run(["convert", str(tmp_path / "lora.pt"), "-m", model_dir, "--alpha", "6", "-o", out]) == 2
    ), "not over another"
    ours, theirs = (transformers.AutoModelForCausalLM.from_pretrained(model_dir) for _ in range(2))
    lk.load(ours, out)
    with torch.no_grad():
        theirs.get_submodule(path).weight += 2 * b @ a
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_another_base(
    trained: Path, model_dir: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    model.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "other")
    for command in (
        ["generate", "-p", "the cat", "--max-new-tokens", "2"],
        ["evaluate", "-d", data],
    ):
        arguments = [
            *command,
            "-m",
            str(tmp_path / "other"),
            "-a",
            str(trained),
            "--dtype",
            "float32",
        ]
        assert run(arguments) == 2
        assert "5.00% from that one" in capsys.readouterr().err
        assert run([*arguments, "--other-base"]) == 0


def test_inspect(trained: Path, model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["inspect", str(trained), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["member"] == "lora"
    assert summary["base"] == model_dir
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    adapter = lk.load(base, trained)
    for path, module in summary["modules"].items():
        pair = adapter.tensors.pair_now(path)
        assert module["rank"] == 4
        assert module["norm"] == pytest.approx(float((pair.up @ pair.down).norm()), rel=1e-4)
    assert run(["inspect", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("lora", "rank", "q_proj", "down_proj", "targets", "MiB"))


def test_inspecting_what_is_incomplete(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(trained / "adapter_model.safetensors")
    del tensors[next(key for key in tensors if "lora_B" in key)]
    safetensors.torch.save_file(tensors, trained / "adapter_model.safetensors")
    (trained / "lorakin.json").unlink()
    assert run(["inspect", str(trained)]) == 2
    assert "lacks lora_B.weight" in capsys.readouterr().err.replace("\n", " ")


def test_errors_are_one_line_and_exit_codes_mean_something(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train", "--model", "/nowhere", "--data", data, "--out", str(tmp_path / "x")]
    assert run(asked) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "/nowhere" in said and "\n" not in said
    assert run(["inspect", str(tmp_path / "none")]) == 2
    assert run(["train"]) == 2
    assert run(["train", "--rank", "many"]) == 2
    assert run(["fly"]) == 2
    assert run(["train", "--model", "m", "--data", "d", "--out", "o", "--rank", "0"]) == 2


def test_a_diverged_run_ends_with_3(
    model_dir: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "train",
        "-m",
        model_dir,
        "-d",
        data,
        "-o",
        str(tmp_path / "x"),
        "--steps",
        "40",
        "--dtype",
        "float32",
    ]
    assert run([*common, "--lr", "1e30", "--max-grad-norm", "1e30"]) == 3
    assert "the loss became" in capsys.readouterr().err.replace("\n", " ")


def test_ctrl_c_in_training_ends_with_130_and_resumes(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    arguments = [
        "train",
        "-m",
        model_dir,
        "-d",
        data,
        "-o",
        str(out),
        "--steps",
        "3000",
        "--save-every",
        "5",
        "--dtype",
        "float32",
    ]
    command = [sys.executable, "-c", "from lorakin.cli import main; main()", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    from lorakin.training.trainers import last_checkpoint

    deadline = time.time() + 90
    # One whose manifest is written: an interrupt before that leaves none to resume from.
    while last_checkpoint(out / "checkpoints") is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert f"lorakin train --resume --out {out}" in shown

    checkpoint = last_checkpoint(out / "checkpoints")
    assert checkpoint
    assert lk.load(transformers.AutoModelForCausalLM.from_pretrained(model_dir), checkpoint)


def test_target_lists_on_the_command_line() -> None:
    assert split_names(["q_proj,v_proj"]) == ["q_proj", "v_proj"]
    assert split_names([r".*\.[a-z]{1,2}_proj"]) == [r".*\.[a-z]{1,2}_proj"]


def test_the_core_alone_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("typer", "rich", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    result = script("train", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert "pip install 'lorakin[train]'" in result.stderr
    core = (
        "import sys, torch, lorakin as lk\n"
        "lk.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), lk.LoRA(rank=1))\n"
        "more = {'transformers', 'datasets', 'accelerate', 'typer', 'rich'}\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & more))"
    )
    result = subprocess.run(
        [sys.executable, "-c", core], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", "the library imports nothing but torch and safetensors"
