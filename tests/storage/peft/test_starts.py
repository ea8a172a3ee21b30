"""Every start that PEFT knows.

A file that is a plain pair on the plain base is read, any other is refused with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_llama
from lorakin.storage.peft import starts

PLAIN: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "in capitals": {"init_lora_weights": "GAUSSIAN"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "mica of an embedding": {"init_lora_weights": "mica", "target_modules": ["embed_tokens"]},
    "random": {"init_lora_weights": False},
    "none": {"init_lora_weights": None},
    "velora": {"velora_config": ("VeloraConfig", {"num_groups": 2, "init_type": "random"})},
    "monteclora": {"monteclora_config": ("MontecloraConfig", {})},
    "corda not chosen": {"corda_config": ("CordaConfig", {})},
    "lora-ga not chosen": {"lora_ga_config": ("LoraGAConfig", {})},
    "loftq not chosen": {"loftq_config": {"loftq_bits": 4}},
    "orthogonal with dora": {"init_lora_weights": "orthogonal", "use_dora": True},
}
CHANGED: dict[str, dict[str, Any]] = {
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "kasa": {"kasa_config": ("KasaConfig", {})},
}


def trained(settings: dict[str, Any]) -> tuple[Any, bool]:
    """PEFT's model with random pairs, and whether its start left the base weights alone."""
    peft = pytest.importorskip("peft")
    made = {
        k: getattr(peft.tuners.lora.config, v[0])(**v[1]) if isinstance(v, tuple) else v
        for k, v in settings.items()
    }
    model = tiny_llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 4, **made})
    ).eval()
    own = {
        k.removeprefix("base_model.model.").replace("base_layer.", ""): t
        for k, t in theirs.state_dict().items()
    }
    same = all(torch.equal(tensor, own[key]) for key, tensor in before.items())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return theirs, same


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PLAIN)
def test_a_start_that_leaves_the_base_alone(name: str, tmp_path: Path, ids: Tensor) -> None:
    theirs, same = trained(PLAIN[name])
    assert same
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("name", CHANGED)
def test_a_start_that_changes_the_base(name: str, tmp_path: Path) -> None:
    theirs, same = trained(CHANGED[name])
    assert not same
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lk.AdapterError, match="KaSA" if name == "kasa" else "pissa_niter_4"):
        lk.load(tiny_llama(), tmp_path)


MADE_AGAIN: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa of another alpha": {"init_lora_weights": "pissa", "lora_alpha": 3},
    "olora": {"init_lora_weights": "olora"},
    "pissa with rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora with patterns": {
        "init_lora_weights": "olora",
        "rank_pattern": {"layers.0.self_attn.q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
    },
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True},
}


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MADE_AGAIN)
def test_a_start_that_the_member_makes_again(name: str, tmp_path: Path, ids: Tensor) -> None:
    theirs, same = trained(MADE_AGAIN[name])
    assert not same
    theirs.save_pretrained(tmp_path / "peft")
    model, state = tiny_llama(), torch.random.get_rng_state()
    adapter = lk.load(model, tmp_path / "peft")
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's draws change"
    assert name[:5] in adapter.method.words
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)

    peft = pytest.importorskip("peft")
    if adapter.method.has_gain:
        return
    adapter.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-5)
    other = tiny_llama()
    lk.load(other, tmp_path / "ours")
    assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_ga_is_read_as_peft_reads_it(tmp_path: Path, ids: Tensor) -> None:
    """PEFT keeps no trace of what it took out of the base.

    Both load a plain pair, and ours says so.
    """
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga

    model = tiny_llama()
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(),
    )
    preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    ours = tiny_llama()
    with pytest.warns(lk.LorakinWarning, match="lora_ga"):
        lk.load(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("PiSSA_niter_16", "PiSSA_niter_16"),
        ("corda", "corda"),
        ("loftq", "loftq"),
        ("of tomorrow", "of tomorrow"),
        (["pissa"], "init_lora_weights"),
    ],
)
def test_the_reason(start: Any, reason: str, tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2), "q_proj")).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    with pytest.raises(lk.AdapterError, match=reason):
        lk.load(tiny_llama(), tmp_path)


def test_tensors_of_training_go() -> None:
    names = (
        "a.lora_A.weight",
        "a.lora_velora_embed",
        "a.lora_monteclora_sampler.std_prior",
        "a.lora_velora_embedding",
    )
    left = starts.without_training_tensors(dict.fromkeys(names, torch.ones(1)))
    assert list(left) == ["a.lora_A.weight", "a.lora_velora_embedding"]
