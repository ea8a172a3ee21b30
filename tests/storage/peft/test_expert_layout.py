"""Which side of an experts' parameter is its inputs.

PEFT changed it twice. Checked with PEFT 0.18.0 to 0.21.2 themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_gpt_oss, tiny_llama4, tiny_mixtral

EXPERTS, RANK, ALPHA = 4, 2, 6
WHERE = {
    "mixtral": "model.layers.0.mlp.experts",
    "square": "model.layers.0.mlp.experts",
    "gpt-oss": "model.layers.0.mlp.experts",
    "llama4": "model.layers.1.feed_forward.experts",
}


def square() -> Any:
    """A Mixtral whose down_proj is square."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return transformers.MixtralForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": tiny_mixtral,
    "square": square,
    "gpt-oss": tiny_gpt_oss,
    "llama4": tiny_llama4,
}


def takes_last(version: str, says: bool) -> bool:
    """Whether this PEFT takes the last side for the inputs (its ParamWrapper)."""
    return {
        "0.17.1": False,
        "0.18.1": False,
        "0.19.0": says,
        "0.19.1": not says,
        "0.21.2": not says,
    }[version]


def write(path: Path, owner: str, parameter: Tensor, last: bool, version: str | None) -> Tensor:
    """A file of PEFT's for down_proj alone.

    Returns the change of the parameter, by PEFT's two formulas.
    """
    generator = torch.Generator().manual_seed(3)
    a, b = parameter.shape[1:]
    inputs, outputs = (b, a) if last else (a, b)
    A = torch.randn(EXPERTS * RANK, inputs, generator=generator) * 0.3
    B = torch.randn(outputs, RANK * EXPERTS, generator=generator) * 0.3
    key = f"base_model.model.{owner}.lora_"
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {f"{key}A.weight": A, f"{key}B.weight": B}, path / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [],
        "target_parameters": [f"{owner}.down_proj"],
    }
    (path / "adapter_config.json").write_text(
        json.dumps(config | ({"peft_version": version} if version else {}))
    )
    sides = "e o i" if last else "e i o"
    change = torch.einsum(
        f"o r e, e r i -> {sides}", B.view(outputs, RANK, EXPERTS), A.view(EXPERTS, RANK, inputs)
    )
    return ALPHA / RANK * change


@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_any_version(name: str, version: str, tmp_path: Path, ids: Tensor) -> None:
    owner, model, merged = WHERE[name], MODELS[name](), MODELS[name]()
    experts = merged.get_submodule(owner)
    last = takes_last(version, bool(getattr(experts, "is_transposed", False)))
    change = write(
        tmp_path,
        owner,
        experts.down_proj,
        last,
        None if version == "0.17.1" and name != "square" else version,
    )
    with torch.no_grad():
        experts.down_proj += change
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(ids).logits, MODELS[name]()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [None, "0.18.1.dev0@f2b1a3c", "0.19.2.dev0", "unknown"])
def test_what_nothing_tells_is_asked_for(version: str | None, tmp_path: Path) -> None:
    model = square()
    write(tmp_path, WHERE["square"], model.get_submodule(WHERE["square"]).down_proj, True, version)
    with pytest.raises(lk.AdapterError, match=r"Say in adapter_config.json .*\"peft_version\""):
        lk.load(model, tmp_path)
    assert not lk.adapters(model)


def test_another_parameter_of_the_file_tells(tmp_path: Path, ids: Tensor) -> None:
    """gate_up_proj is never square.

    What it says holds for down_proj too, even against the version.
    """
    model = square()
    randomise(
        lk.adapt(model, lk.LoRA(rank=2, alpha=6), targets=["gate_up_proj", "down_proj"])
    ).save(tmp_path)
    (tmp_path / "lorakin.json").unlink()
    for version in (None, "0.18.1"):
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(config | {"peft_version": version})
        )
        other = square()
        lk.load(other, tmp_path)
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_our_own_files_say_it(tmp_path: Path, ids: Tensor) -> None:
    model = square()
    randomise(lk.adapt(model, lk.LoRA(rank=2), targets="down_proj")).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("peft_version") == "0.19.1"
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config)
    )  # as lorakin wrote it before it said so
    other = square()
    lk.load(other, tmp_path)
    assert torch.equal(other(ids).logits, model(ids).logits)
