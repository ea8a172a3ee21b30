"""What a model's generation_config.json says besides its ends is not done, and a model that
computes NaN says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from conftest import tiny_llama
from lorakin.cli.app import run
from lorakin.cli.options import print_json
from lorakin.serving.verify import _answered_prompts
from lorakin.training import models
from lorakin.training.endings import stop_ids
from lorakin.training.generate import answer
from lorakin.training.models import Loaded

SETTINGS: list[dict[str, Any]] = [
    {"return_dict_in_generate": True},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"repetition_penalty": -1.0},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"sequence_bias": {"a": 1}},
    {"forced_eos_token_id": [999]},
    {"dola_layers": "high"},
    {"constraints": [1]},
    {"max_time": 0.0},
    {"num_beams": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_other_ways_of_decoding_are_not_taken(settings: dict[str, Any], tokenizer: Any) -> None:
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    loaded = Loaded(model, tokenizer, "tiny", "float32")
    want, read = answer(loaded, "the cat", max_new_tokens=5), _answered_prompts(loaded)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    before = model.generation_config
    assert answer(loaded, "the cat", max_new_tokens=5) == want
    assert _answered_prompts(loaded) == read
    assert model.generation_config is before


def test_only_ids_are_ends() -> None:
    assert stop_ids(None, transformers.GenerationConfig(eos_token_id=[3, -1, 7])) == [3, 7]


@pytest.mark.parametrize("ends", ["x", [1, "x"], 2**40, True, {"a": 1}, 1.5])
def test_ends_that_are_no_ids(ends: Any, model_dir: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(lk.ModelError, match=r"generation_config\.json"):
        models.load_model(str(folder))


def test_a_model_of_nan_says_so(tokenizer: Any) -> None:
    model = tiny_llama(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    for options in ({}, {"temperature": 0.7}):
        with pytest.raises(lk.ModelError, match="NaN"):
            answer(Loaded(model, tokenizer, "tiny", "float32"), "the cat", **options)


@pytest.mark.parametrize("temperature", [1e-40, float("inf"), float("nan"), -1.0])
def test_temperatures_that_are_none(temperature: float, tokenizer: Any) -> None:
    with pytest.raises(lk.SettingError):
        answer(
            Loaded(tiny_llama(), tokenizer, "tiny", "float32"), "the cat", temperature=temperature
        )


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(lk.ModelError, match="NaN"):
        print_json({"loss": float("nan")})
    assert not capsys.readouterr().out


def test_a_loss_of_nan_ends_with_2(
    model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.load_model(model_dir, "float32").model
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    model.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat", "completion": "sat"}\n')
    assert (
        run(["evaluate", "--model", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--json"])
        == 2
    )
    assert not capsys.readouterr().out


def test_a_prompt_that_is_no_text(model_dir: str) -> None:
    assert run(["generate", "--model", model_dir, "--prompt", "a\udcff"]) == 2
