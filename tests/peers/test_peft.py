"""Real PEFT, both ways: it loads our files and we load its, with equal logits."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import (
    ConvNet,
    randomise,
    tiny_bert,
    tiny_gpt2,
    tiny_gpt_oss,
    tiny_llama,
    tiny_llama4,
    tiny_mixtral,
)
from lorakin.storage.summary import summarise

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning:peft")]

ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def output(model: Any, ids: Tensor) -> Tensor:
    if isinstance(model, ConvNet) or isinstance(
        getattr(getattr(model, "base_model", None), "model", None), ConvNet
    ):
        return model(torch.linspace(-1, 1, 48).view(2, 3, 8))
    return model(ids).logits


# what is adapted: model, our arguments, PEFT's arguments for the same
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "linear": (
        tiny_llama,
        {"member": lk.LoRA(4, 8), "targets": ATTENTION},
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    ),
    "all-linear": (
        tiny_llama,
        {"member": lk.LoRA(4, 12)},
        {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"},
    ),
    "rslora": (
        tiny_llama,
        {"member": lk.LoRA(4, 8, rslora=True), "targets": ATTENTION},
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
    ),
    "patterns": (
        tiny_llama,
        {
            "member": lk.LoRA(4, 8, rslora=True),
            "rank_pattern": {"layers.0.self_attn.q_proj": 6, "self_attn.k_proj": 2},
            "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 5},
        },
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"layers.0.self_attn.q_proj": 6, "self_attn.k_proj": 2},
            "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 5},
        },
    ),
    "conv1d": (
        tiny_gpt2,
        {"member": lk.LoRA(4, 8), "targets": "c_attn"},
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "embedding": (
        lambda: tiny_llama(tied=False),
        {"member": lk.LoRA(4, 8), "targets": ["embed_tokens", "q_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "convolutions": (  # PEFT's A pads with zeros whatever the layer's padding mode, so its merge differs from its forward
        lambda: ConvNet("zeros"),
        {"member": lk.LoRA(1, 3), "targets": ["one", "two", "three", "head"]},
        {"r": 1, "lora_alpha": 3, "target_modules": ["one", "two", "three", "head"]},
    ),
    "dora-conv1d": (
        tiny_gpt2,
        {"member": lk.DoRA(rank=4, alpha=8), "targets": "c_attn"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn"],
            "fan_in_fan_out": True,
            "use_dora": True,
        },
    ),
    "dora-embedding": (
        lambda: tiny_llama(tied=False),
        {"member": lk.DoRA(rank=4, alpha=8), "targets": ["embed_tokens", "q_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "dora-convolutions": (
        lambda: ConvNet("zeros"),
        {"member": lk.DoRA(rank=1, alpha=3), "targets": ["one", "two", "three", "head"]},
        {
            "r": 1,
            "lora_alpha": 3,
            "target_modules": ["one", "two", "three", "head"],
            "use_dora": True,
        },
    ),
    "experts": (
        tiny_mixtral,
        {
            "member": lk.LoRA(4, 8),
            "targets": ["q_proj", "gate_up_proj", "down_proj", "gate.weight"],
        },
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "target_parameters": [*EXPERTS, "gate.weight"],
        },
    ),
    "experts-transposed": (
        tiny_gpt_oss,
        {"member": lk.LoRA(4, 8), "targets": ["down_proj", "gate_up_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS},
    ),
    "head": (
        lambda: tiny_bert(3),
        {"member": lk.LoRA(2, 8), "targets": ["query", "value"], "modules_to_save": ["classifier"]},
        {"r": 2, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
}


def peft_model(
    make: Callable[[], nn.Module], settings: dict[str, Any], name: str = "default"
) -> Any:
    """A PEFT model whose adapter tensors are random, as after training."""
    torch.manual_seed(3)
    model = peft.get_peft_model(make(), peft.LoraConfig(**settings), adapter_name=name).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_our_files(case: str, tmp_path: Path, ids: Tensor) -> None:
    make, ours, _ = CASES[case]
    model = make()
    randomise(lk.adapt(model, **ours)).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing keys
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*model_config|.*tie_word_embeddings")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(output(theirs, ids), output(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["default", "q_proj"]
)  # a name that is also a module's, which PEFT itself once mixed up
@pytest.mark.parametrize("case", CASES)
def test_we_load_pefts_files_and_it_ours_again(
    case: str, name: str, tmp_path: Path, ids: Tensor
) -> None:
    make, ours, settings = CASES[case]
    theirs = peft_model(make, settings, name)
    theirs.save_pretrained(tmp_path)
    model = make()
    adapter = lk.load(model, tmp_path if name == "default" else tmp_path / name, name=name)
    back = peft.PeftModel.from_pretrained(
        make(), adapter.save(tmp_path / "again"), adapter_name=name
    ).eval()
    torch.testing.assert_close(output(back, ids), output(theirs, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(model, ids), output(theirs, ids), rtol=1e-5, atol=1e-5)
    assert set(adapter.placement.methods) == set(lk.adapt(make(), **ours).placement.methods), (
        "the same targets mean the same modules"
    )
    adapter.merge()
    torch.testing.assert_close(output(model, ids), output(theirs, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_laid_out_alike(case: str, tmp_path: Path) -> None:
    make, ours, settings = CASES[case]
    randomise(lk.adapt(make(), **ours)).save(tmp_path / "ours")
    peft_model(make, settings).save_pretrained(tmp_path / "theirs")
    read = [
        safetensors.torch.load_file(tmp_path / who / "adapter_model.safetensors")
        for who in ("ours", "theirs")
    ]
    shapes = [
        {
            key: (tuple(t.shape), t.dtype)
            for key, t in tensors.items()
            if ".base_layer.weight" not in key
        }
        for tensors in read
    ]
    assert shapes[0] == shapes[1]
    configs = [
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    ]
    for field in (
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "rank_pattern",
        "alpha_pattern",
    ):
        assert configs[0].get(field) == (configs[1][field] or configs[0].get(field)), field
    assert set(configs[0]) <= set(configs[1]), "only PEFT's own words"


def test_a_named_adapter_of_peft(tmp_path: Path, ids: Tensor) -> None:
    theirs = peft_model(tiny_llama, {"r": 4, "target_modules": ATTENTION})
    theirs.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    theirs.set_adapter("other")
    model = tiny_llama()
    lk.load(model, tmp_path / "other", name="mine")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    lk.load(model, tmp_path)
    theirs.set_adapter("default")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_narrowed_targets_of_peft(tmp_path: Path, ids: Tensor) -> None:
    for settings in (
        {"target_modules": ATTENTION, "layers_to_transform": [1]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    ):
        theirs = peft_model(tiny_llama, {"r": 2, **settings})
        theirs.save_pretrained(tmp_path)
        model = tiny_llama()
        lk.load(model, tmp_path)
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_pefts(dtype: torch.dtype, tmp_path: Path, ids: Tensor) -> None:
    theirs = peft_model(
        lambda: tiny_llama(dtype=dtype), {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    )
    theirs.save_pretrained(tmp_path)
    model = tiny_llama(dtype=dtype)
    adapter = lk.load(model, tmp_path, trainable=True)
    theirs(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    gradients = {
        name.replace("base_model.model.", "").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 2e-3}
    )
    for name, p in adapter.named_parameters():
        path, slot = name.rsplit(".", 1)
        torch.testing.assert_close(p.grad, gradients[f"{path}.lora_{slot}.weight"], **tolerance)


def test_training_with_the_same_start_goes_the_same_way(tmp_path: Path, ids: Tensor) -> None:
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION)
    ).train()
    theirs.save_pretrained(tmp_path)
    model = tiny_llama().train()
    adapter = lk.load(model, tmp_path, trainable=True)
    optimizers = [
        torch.optim.AdamW(
            [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
        ),
        adapter.optimizer(torch.optim.AdamW, lr=1e-2),
    ]
    for _ in range(10):
        losses = []
        for one, optimizer in zip((theirs, model), optimizers, strict=True):
            loss = one(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_unsupported_files_of_peft_are_refused_by_name(tmp_path: Path) -> None:
    peft.get_peft_model(
        tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True)
    ).save_pretrained(tmp_path)
    with pytest.raises(lk.AdapterError, match="a bias on B"):
        lk.load(tiny_bert(), tmp_path)
    peft.get_peft_model(
        tiny_bert(), peft.IA3Config(target_modules=["query"], feedforward_modules=[])
    ).save_pretrained(tmp_path)
    with pytest.raises(lk.AdapterError, match="peft_type is 'IA3'"):
        lk.load(tiny_bert(), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": "all-linear"
        },  # PEFT then takes the experts and the router too, gate_up_proj at twice the rank
        {"target_modules": r".*\.(q|k)_proj", "target_parameters": ["mlp.experts.down_proj"]},
        {
            "target_modules": ATTENTION,
            "target_parameters": EXPERTS,
            "rank_pattern": {r".*\.down_proj": 6},
        },
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "alpha_pattern": {r".*\.down_proj": 3},
        },
    ],
)
def test_target_parameters_of_peft(settings: dict[str, Any], tmp_path: Path, ids: Tensor) -> None:
    theirs = peft_model(tiny_mixtral, {"r": 4, **settings})
    theirs.save_pretrained(tmp_path)
    model = tiny_mixtral()
    adapter = lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    read = [
        safetensors.torch.load_file(where / "adapter_model.safetensors")
        for where in (tmp_path, adapter.save(tmp_path / "x"))
    ]
    assert read[0].keys() == read[1].keys() and all(
        torch.equal(read[0][key], read[1][key]) for key in read[0]
    )
    back = peft.PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "x").eval()
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    assert summarise(tmp_path).ranks == summarise(tmp_path / "x").ranks, "without a model"
    assert summarise(tmp_path).norms == pytest.approx(
        {path: adapter.tensors.pair_now(path).norm() for path in adapter.placement.methods}
    )


def test_a_pattern_that_means_nothing_to_peft(tmp_path: Path, ids: Tensor) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS}
    theirs = peft_model(tiny_mixtral, settings | {"alpha_pattern": {r"down_proj\.0": 3}})
    theirs.save_pretrained(tmp_path)
    model = tiny_mixtral()
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_experts_that_peft_reads_the_other_way_round(tmp_path: Path, ids: Tensor) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": names}
    theirs = peft_model(tiny_llama4, settings)
    theirs.save_pretrained(tmp_path)
    model = tiny_llama4()
    adapter = lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    back = peft.PeftModel.from_pretrained(tiny_llama4(), adapter.save(tmp_path / "again")).eval()
    assert torch.equal(back(ids).logits, theirs(ids).logits)


def test_pefts_experts_train_as_ours(tmp_path: Path, ids: Tensor) -> None:
    theirs = peft_model(
        tiny_mixtral, {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": EXPERTS}
    )
    theirs.save_pretrained(tmp_path)
    model = tiny_mixtral()
    adapter = lk.load(model, tmp_path, trainable=True)
    theirs(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    for outer, name in (("lora_", "down_proj"), ("base_layer.lora_", "gate_up_proj")):
        for layer in range(2):
            owner = theirs.get_submodule(f"base_model.model.model.layers.{layer}.mlp.experts")
            down = owner.get_submodule(f"{outer}A.default").weight.grad.view(4, 4, -1)
            up = owner.get_submodule(f"{outer}B.default").weight.grad
            for number in range(4):
                own = adapter.tensors.branch(
                    f"model.layers.{layer}.mlp.experts.{name}.{number}"
                ).tensors()
                torch.testing.assert_close(own["A"].grad, down[number], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(
                    own["B"].grad, up.view(len(up), 4, 4)[..., number], rtol=1e-5, atol=1e-6
                )


def test_what_peft_has_no_form_for_among_experts(tmp_path: Path, ids: Tensor) -> None:
    some = lk.adapt(
        model := tiny_mixtral(),
        lk.LoRA(rank=4, dropout=0.1),
        targets=["down_proj.1", "gate_up_proj.0"],
    )
    randomise(some).save(tmp_path / "some")
    theirs = peft.PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "some").eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    randomise(lk.adapt(tiny_mixtral(), lk.DoRA(rank=4), targets="down_proj")).save(
        tmp_path / "dora"
    )
    with pytest.raises(ValueError, match="does not work with use_dora"):
        peft.PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "dora")


def test_a_rank_above_the_layer_is_read(tmp_path: Path, ids: Tensor) -> None:
    theirs = peft_model(tiny_llama, {"r": 40, "target_modules": ATTENTION})
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_names_that_peft_matches_by_their_end(tmp_path: Path, ids: Tensor) -> None:
    theirs = peft_model(
        tiny_llama, {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["norm"]}
    )
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    adapter = lk.load(model, tmp_path)
    assert "model.layers.0.input_layernorm" in adapter.placement.whole_modules
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_embeddings_that_peft_saves_along(tmp_path: Path, ids: Tensor) -> None:
    theirs = peft_model(lambda: tiny_llama(tied=False), {"r": 2, "target_modules": ATTENTION})
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = tiny_llama(tied=False)
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    resized = tiny_llama(tied=False, vocab_size=70)
    with pytest.raises(
        lk.AdapterError,
        match=r"had another weight there, \(64, 32\), perhaps because its vocabulary was resized",
    ):
        lk.load(resized, tmp_path)


class Stages(nn.Module):
    """Two numbers in every path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {"blocks": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))}
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage["blocks"]:
                x = torch.tanh(block["q"](x))
        return x


@pytest.mark.parametrize("pattern", ["blocks", "stages", None])
def test_layer_patterns(pattern: str | None, tmp_path: Path) -> None:
    theirs = peft_model(
        Stages,
        {"r": 2, "target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": pattern},
    )
    theirs.save_pretrained(tmp_path)
    model, x = Stages(), torch.linspace(-1, 1, 8).view(2, 4)
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(x), theirs(x))


def test_an_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    theirs = peft_model(
        lambda: tiny_llama(tied=False), {"r": 2, "target_modules": ["embed_tokens"]}
    )
    theirs.save_pretrained(tmp_path)
    other = tiny_llama(tied=False)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    with pytest.raises(
        lk.AdapterError, match="another base model: model.embed_tokens had another weight"
    ):
        lk.load(other, tmp_path)


def test_a_model_that_peft_has_adapted_is_refused(ids: Tensor) -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=ATTENTION))
    with pytest.raises(
        lk.StateError,
        match=r"PEFT has adapted this model \(base_model.model.model.layers.0.*unload",
    ):
        lk.adapt(theirs, lk.LoRA(rank=2))
    plain = theirs.unload()
    lk.adapt(plain, lk.LoRA(rank=2)).remove()


def test_peft_can_go_on_in_a_model_that_lorakin_left(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(rank=2))
    adapter.remove()
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=ATTENTION)
    )
    assert torch.equal(wrapped(ids).logits, model(ids).logits)
