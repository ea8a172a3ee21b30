"""Real PEFT beside the other members: the same forward, gradients and updates; its files read here, to the logits.

Where PEFT is known to be wrong the test says so and shows the difference: it is not copied.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorakin as lk
from conftest import tiny_bert, tiny_gpt2, tiny_llama
from family.problem import randomised
from lorakin.storage import directory

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning:peft")]

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Any, Any]] = {
    "dora": (
        lk.DoRA(rank=4, alpha=6),
        lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=SEVEN),
    ),
    "vera": (
        lk.VeRA(rank=6, seed=3),
        lambda: peft.VeraConfig(
            r=6, projection_prng_key=3, target_modules=["q_proj", "v_proj", "up_proj"]
        ),
    ),
    "adalora": (
        lk.AdaLoRA(initial_rank=5, target_rank=2, alpha=9),
        lambda: peft.AdaLoraConfig(
            init_r=5, target_r=2, lora_alpha=9, total_step=100, target_modules=SEVEN
        ),
    ),
}
NAMES = {
    "dora": {
        "lora_A.default.weight": "A",
        "lora_B.default.weight": "B",
        "lora_magnitude_vector.default.weight": "m",
    },
    "vera": {"vera_lambda_d.default": "d", "vera_lambda_b.default": "b"},
    "adalora": {"lora_A.default": "Q", "lora_B.default": "P", "lora_E.default": "E"},
}


def theirs_and_ours(case: str) -> tuple[Any, Any, lk.Adapter, dict[str, tuple[str, str]]]:
    """Two models with the same tensors, PEFT's and ours, and PEFT's names → (path, slot) of ours."""
    member, config = CASES[case]
    theirs = peft.get_peft_model(tiny_llama(), config())
    model = tiny_llama()
    adapter = lk.adapt(model, member, targets=sorted(config().target_modules))
    randomised(adapter, 0.2)
    where = {}
    for name, parameter in theirs.named_parameters():
        for ending, slot in NAMES[case].items():
            if name.endswith("." + ending):
                path = name.removeprefix("base_model.model.").removesuffix("." + ending)
                where[name] = (path, slot)
                parameter.data.copy_(
                    adapter.tensors.branch(path).tensors()[slot].detach().view_as(parameter)
                )
    assert len(where) == sum(p.requires_grad for p in adapter.parameters())
    return theirs.train(), model.train(), adapter, where


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, ids: Tensor) -> None:
    theirs, model, adapter, where = theirs_and_ours(case)
    logits = [m(ids).logits for m in (theirs, model)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    assert (logits[1] - tiny_llama()(ids).logits).abs().max() > 0.05, "it changes something"
    for out in logits:
        torch.nn.functional.cross_entropy(
            out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
    for name, parameter in theirs.named_parameters():
        if name in where:
            path, slot = where[name]
            ours = adapter.tensors.branch(path).tensors()[slot].grad
            torch.testing.assert_close(
                ours.view_as(parameter), parameter.grad, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["default", "other"])
def test_its_files_are_read(case: str, name: str, ids: Tensor, tmp_path: Path) -> None:
    _, config = CASES[case]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(tiny_llama(), config(), adapter_name=name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path)
    model = tiny_llama()
    adapter = lk.load(model, tmp_path if name == "default" else tmp_path / name, name=name)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert adapter.method.words == ("lora,dora" if case == "dora" else case)
    back = peft.PeftModel.from_pretrained(
        tiny_llama(), directory.save(adapter, tmp_path / "again"), adapter_name=name
    ).eval()
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("case", CASES)
def test_our_files_on_other_layers(case: str, make: Any, ids: Tensor, tmp_path: Path) -> None:
    model = make()
    whole = ["classifier"] if make is tiny_bert else []
    adapter = randomised(lk.adapt(model, CASES[case][0], modules_to_save=whole), 0.1)
    directory.save(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_veras_projections_both_ways(
    saved: bool, dtype: torch.dtype, ids: Tensor, tmp_path: Path
) -> None:
    """Stored or drawn again, also through a bfloat16 base, which rounds them."""
    config = peft.VeraConfig(
        r=6, projection_prng_key=3, target_modules=SEVEN, save_projection=saved
    )
    theirs = peft.get_peft_model(tiny_llama(dtype=dtype), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = tiny_llama(dtype=dtype)
    adapter = lk.load(model, tmp_path / "theirs")
    site = adapter.tensors.branch("model.layers.0.self_attn.q_proj")
    assert torch.equal(site.A.detach(), theirs.base_model.vera_A["default"].float())
    assert torch.equal(site.B.detach(), theirs.base_model.vera_B["default"].float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        model(ids).logits, theirs(ids).logits, rtol=tolerance, atol=tolerance
    )
    ours = tiny_llama(dtype=dtype)
    randomised(lk.adapt(ours, lk.VeRA(rank=6, seed=3, save_projection=saved))).save(
        tmp_path / "ours"
    )
    back = peft.PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path / "ours").eval()
    torch.testing.assert_close(back(ids).logits, ours(ids).logits, rtol=tolerance, atol=tolerance)


def test_a_projection_that_is_missing(ids: Tensor, tmp_path: Path) -> None:
    randomised(lk.adapt(tiny_llama(), lk.VeRA(rank=4))).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        key: t for key, t in safetensors.torch.load_file(path).items() if "vera_A" not in key
    }
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "lorakin.json").unlink()
    with pytest.raises(
        lk.AdapterError,
        match=r"lacks base_model.vera_A and base_model.vera_B, which the config says it holds",
    ):
        lk.load(tiny_llama(), tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adalora_that_peft_pruned(ids: Tensor, tmp_path: Path) -> None:
    """PEFT's allocator, driven by hand as its users must, then its pruned file here and ours there."""
    config = peft.AdaLoraConfig(
        init_r=5,
        target_r=2,
        lora_alpha=9,
        total_step=12,
        tinit=1,
        tfinal=4,
        deltaT=1,
        target_modules=SEVEN,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step in range(12):
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    model = tiny_llama()
    adapter = lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    ranks = [len(adapter.tensors.branch(path).E) for path in adapter.placement.methods]
    assert 0 < sum(ranks) <= 14 * 2 + 1
    adapter.save(tmp_path / "again")
    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval()
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_lora_plus_groups() -> None:
    """PEFT sorts by name and by dimension; by role we agree on A and B, and differ on a bias and on DoRA's magnitude."""
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(
        r=2,
        target_modules=["query"],
        use_dora=True,
        modules_to_save=["classifier"],
        init_lora_weights=True,
    )
    theirs = peft.get_peft_model(tiny_bert(), config)
    groups = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
    ).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    their_rate = {
        name.replace(".default", ""): rates[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    adapter = lk.adapt(
        tiny_bert(),
        [lk.DoRA(rank=2), lk.LoRAPlus(ratio=16)],
        targets=["query"],
        modules_to_save=["classifier"],
    )
    rates = {
        id(p): group["lr"] for group in adapter.parameter_groups(lr=1e-3) for p in group["params"]
    }
    endings = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector.weight"}
    differ = set()
    for name, parameter in adapter.named_parameters():
        path, _, slot = name.rpartition(".")
        key = f"base_model.model.{path}.{endings.get(slot) or f'modules_to_save.{slot}'}"
        if their_rate[key] != pytest.approx(rates[id(parameter)]):
            differ.add(slot)
            assert (their_rate[key], rates[id(parameter)]) == pytest.approx((1.6e-2, 1e-3))
    assert differ == {"m", "bias"}, "PEFT gives them the high rate (peft#1504, #1915)"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_fa_updates(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's optimizer with its corrected gradient: the same steps, once it does not round that gradient to bfloat16."""
    from peft.optimizers import create_lorafa_optimizer

    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)

    theirs = peft.get_peft_model(
        tiny_llama().double(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=SEVEN)
    )
    model = tiny_llama().double()
    adapter = lk.adapt(model, lk.LoRAFA(rank=4, alpha=6, corrected=True))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_A." in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                parameter.copy_(adapter.tensors.branch(path).A)
    theirs.double()
    optimizers = [
        create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-2, weight_decay=0.0),
        adapter.optimizer(torch.optim.AdamW, lr=1e-2, eps=1e-30),
    ]
    optimizers[0].param_groups[0]["eps"] = (
        1e-30  # it divides by its own before the bias is corrected
    )
    for _ in range(5):
        for one, optimizer in zip((theirs, model), optimizers, strict=True):
            one(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    compared = 0
    for name, parameter in theirs.named_parameters():
        if ".lora_B." in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
            torch.testing.assert_close(
                adapter.tensors.branch(path).B.detach(), parameter.detach(), rtol=1e-5, atol=1e-6
            )
            compared += 1
    assert compared == 14


def test_pefts_dora_is_nan_on_a_zero_row_and_ours_is_not(ids: Tensor, tmp_path: Path) -> None:
    """peft#2049: 0 divided by 0. Here the row keeps gain 1."""
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[2] = 0
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, use_dora=True, target_modules=["up_proj"])
    )
    theirs.eval().save_pretrained(tmp_path)
    assert theirs(ids).logits.isnan().any()
    lk.load(base, tmp_path)
    assert torch.isfinite(base(ids).logits).all()


def test_a_classifier_without_a_trained_head_is_read_by_peft(ids: Tensor, tmp_path: Path) -> None:
    """PEFT expects a head in the file of a classification task, so without one the task stays open."""
    model = tiny_bert()
    randomised(lk.adapt(model, lk.DoRA(rank=2)), 0.1).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
