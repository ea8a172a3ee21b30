"""Quantised bases: every member trains on them as on a plain base with the same numbers."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakin as lk
import soak
from conftest import MEMBERS, randomise, tiny_llama
from lorakin.errors import LorakinWarning, SettingError
from lorakin.inject import quantised
from lorakin.training import prepare_trainer

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

SIZES = {"hidden_size": 64, "intermediate_size": 128}


class OtherLinear(nn.Module):
    """A quantised layer of a library that lorakin does not know: no `weight`, numbers in its own
    buffers.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.packed * self.scale).to(x.dtype), self.bias)


def _four_bits(nested: bool) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: _four_bits(False),
    "nf4-nested": lambda: _four_bits(True),
    "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao-int4": lambda: transformers.TorchAoConfig(
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    ),
}
ALL = [*CONFIGS, "other"]
EXACT = [name for name in ALL if name != "int8"]
"""Of int8 bitsandbytes rounds the activations too, so that it is no matrix to be exact about."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama(**SIZES).save_pretrained(folder)
    return str(folder)


def load(name: str, stored: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == "other":
        model = tiny_llama(dtype=dtype, **SIZES)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                owner, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(owner), leaf, OtherLinear(module))
        return model
    return transformers.AutoModelForCausalLM.from_pretrained(
        stored, quantization_config=CONFIGS[name](), dtype=dtype
    )


def unpacked(module: Any) -> Tensor:
    """The module's weight by its own library, whole."""
    if isinstance(module, OtherLinear):
        return module.packed * module.scale
    if isinstance(module, bnb.nn.Linear4bit):
        whole: Tensor = bnb.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
        return whole
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return module.weight.data.float() * scales[:, None] / 127
    dequantised: Tensor = module.weight.dequantize()
    return dequantised


def plain_twin(model: Any) -> Any:
    """A plain model with the numbers that the quantised one stands for."""
    twin = tiny_llama(**SIZES)
    with torch.no_grad():
        for path, module in twin.named_modules():
            if quantised.is_quantised(model.get_submodule(path)):
                module.weight.copy_(unpacked(model.get_submodule(path)))
    return twin


def change_of(adapter: lk.Adapter) -> Tensor:
    """What the adapter changes, all of it in one vector."""
    weights = {
        path: adapter.tensors.base_weight(path).double() for path in adapter.placement.methods
    }
    changed = [
        (adapter.tensors.saved_change(path).applied_to(weight) - weight).detach()
        for path, weight in weights.items()
    ]
    return torch.cat([change.flatten() for change in changed])


def trained(model: Any, member: str, ids: Tensor, steps: int = 6) -> tuple[lk.Adapter, list[float]]:
    batch = {"input_ids": ids, "labels": ids}
    made = MEMBERS[member]()
    adapter = lk.adapt(model, made, seed=0, probe=[batch] if member == "lora-drop" else None)
    optimizer = adapter.optimizer(
        torch.optim.SGD, lr=1.0 if member == "vera" else 0.05, total_steps=steps
    )
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return adapter, losses


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", ALL)
def test_training_is_that_on_the_numbers_themselves(
    name: str, member: str, stored: str, ids: Tensor
) -> None:
    model = load(name, stored)
    twin = plain_twin(model)
    adapter, losses = trained(model, member, ids)
    exact, truth = trained(twin, member, ids)
    assert losses[-1] < losses[0]
    close = {"rtol": 5e-5, "atol": 1e-6} if name in EXACT else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(truth), **close)
    both = list(zip(adapter.named_parameters(), exact.named_parameters(), strict=True))
    if name in EXACT:
        for (path, mine), (_, theirs) in both:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=path)
    mine, theirs = change_of(adapter), change_of(exact)
    apart, size = float((mine - theirs).norm()), float(theirs.norm())
    soak.cell(soak.MATRIX, member, f"{name}, one process", f"✔ {apart / size:.0e}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LorakinWarning)
        apart = model(ids).logits
        adapter.merge()
        merged = model(ids).logits
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-5 if name in EXACT else 0.05)
    adapter.unmerge()
    assert torch.equal(model(ids).logits, apart)


@pytest.mark.parametrize("name", ALL)
def test_rows_are_the_librarys_own_numbers(name: str, stored: str) -> None:
    module = load(name, stored).model.layers[0].mlp.up_proj
    weight, whole = quantised.PackedWeight(module), unpacked(module).float()
    torch.testing.assert_close(weight.matrix, whole, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(weight.squares, whole.double().square().sum(1).float())
    by_backward = quantised._by_backward(module)(3, 40)
    torch.testing.assert_close(by_backward.float(), whole[3:40], rtol=2e-3, atol=1e-5)
    if (read := quantised.row_reader(module)) is not None:
        cuts = [0, 1, 77, 128]
        rows = [read(start, stop) for start, stop in itertools.pairwise(cuts)]
        torch.testing.assert_close(torch.cat(rows).float(), whole, rtol=1e-6, atol=1e-8)
    down = torch.randn(3, 64)
    torch.testing.assert_close(weight.product(down), whole @ down.T, rtol=1e-4, atol=1e-4)


def test_rows_that_share_a_scale() -> None:
    """Rows of 48 numbers, scales for 64: a row's scales cannot be told from another's by counting
    rows.
    """
    linear = bnb.nn.Linear4bit(48, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    linear.load_state_dict({"weight": torch.randn(32, 48)})
    linear.to("cpu")
    read, whole = quantised.row_reader(linear), unpacked(linear).float()
    assert read is not None
    for start, stop in ((0, 5), (5, 8), (4, 32), (0, 32)):
        torch.testing.assert_close(
            read(start, stop).float(), whole[start:stop], rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("nested", [False, True])
def test_a_base_that_was_used_for_inference_can_be_trained(
    nested: bool, stored: str, ids: Tensor
) -> None:
    """On some CPUs bitsandbytes lays 4-bit weights out for a kernel without a backward, and never
    back.
    """
    model = load("nf4-nested" if nested else "nf4", stored)
    before = plain_twin(model)
    with torch.no_grad():
        model(ids)
    adapter = lk.adapt(model, lk.LoRA(rank=4), seed=0)
    for (
        path
    ) in adapter.placement.methods:  # what was rounded on the way are the scales, to bfloat16
        now, was = (
            quantised.PackedWeight(model.get_submodule(path)).matrix,
            before.get_submodule(path).weight,
        )
        torch.testing.assert_close(now, was, rtol=2**-8, atol=0)
    with torch.no_grad():
        model(ids)
    randomise(adapter)
    model(ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters()), (
        "also in the first layer"
    )


@pytest.mark.parametrize("name", ["nf4", "torchao-int8", "other"])
def test_merging_for_good_leaves_a_plain_model(
    name: str, stored: str, ids: Tensor, tmp_path: Path
) -> None:
    model = load(name, stored)
    twin = plain_twin(model)
    mine, theirs = (
        randomise(lk.adapt(model, lk.DoRA(rank=4))),
        randomise(lk.adapt(twin, lk.DoRA(rank=4))),
    )
    with pytest.warns(
        LorakinWarning,
        match="14 .*torch.float32",
    ):
        mine.merge(permanent=True)
    theirs.merge(permanent=True)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(quantised.is_quantised(module) for module in model.modules())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_the_trainer_takes_it_and_the_flags_come_back(
    name: str, stored: str, ids: Tensor, tmp_path: Path
) -> None:
    model = load(name, stored)
    said = {flag: getattr(model, flag, None) for flag in quantised.FLAGS}
    adapter = lk.adapt(model, lk.DoRA(rank=4))
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    prepare_trainer(transformers.Trainer(model, args, train_dataset=rows)).train()
    assert adapter.run.steps == 2
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    adapter.remove()
    assert {flag: getattr(model, flag, None) for flag in quantised.FLAGS} == said
    assert quantised.is_quantised(model.model.layers[0].mlp.up_proj)
    assert not hasattr(model.model.layers[0].mlp.up_proj, "lorakin")


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_on_either_base(
    name: str, stored: str, ids: Tensor, tmp_path: Path
) -> None:
    model = load(name, stored)
    adapter = randomise(lk.adapt(model, lk.DoRA(rank=4)))
    expected = model(ids).logits
    adapter.save(tmp_path / "a")
    again = load(name, stored)
    lk.load(again, tmp_path / "a")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)
    plain = tiny_llama(**SIZES)
    lk.load(plain, tmp_path / "a")
    assert (plain(ids).logits - expected).abs().max() < 0.3 * (
        expected - tiny_llama(**SIZES)(ids).logits
    ).abs().max()


@pytest.mark.parametrize("member", ["lora", "dora", "vera"])
def test_files_are_pefts_own_form(member: str, stored: str, tmp_path: Path) -> None:
    """As those of an adapter on the plain base, and no second copy of the tensors beside them."""
    for name in ("plain", "nf4"):
        model = tiny_llama() if name == "plain" else load(name, stored)
        randomise(lk.adapt(model, MEMBERS[member](), "q_proj", seed=0)).save(tmp_path / name)
    plain, packed = (
        {file.name for file in (tmp_path / name).iterdir()} for name in ("plain", "nf4")
    )
    assert (
        plain
        == packed
        == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorakin.json"}
    )
    one, other = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("plain", "nf4")
    )
    assert one == other | {"base_model_name_or_path": None}


@pytest.mark.parametrize("name", ["nf4", "torchao-int8"])
def test_several_adapters_copies_and_mixed_batches(name: str, stored: str, ids: Tensor) -> None:
    model = load(name, stored)
    for number, (key, member) in enumerate({"a": lk.LoRA(rank=4), "b": lk.DoRA(rank=2)}.items()):
        randomise(lk.adapt(model, member, name=key), seed=number)
        for parameter in lk.adapters(model)[key].parameters():
            parameter.requires_grad_(False)
    alone = {}
    for key in "ab":
        lk.activate(model, key)
        alone[key] = model(ids).logits
    with torch.no_grad(), lk.mixed_batch(model, ["a", "b"]):
        mixed = model(ids).logits
    torch.testing.assert_close(
        mixed, torch.stack([alone["a"][0], alone["b"][1]]), rtol=1e-4, atol=1e-5
    )
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(ids).logits, alone["b"])
    lk.activate(model, [])
    with torch.no_grad():
        base = model(ids).logits
    torch.testing.assert_close(base, load(name, stored).train()(ids).logits, rtol=1e-3, atol=1e-3)


def test_in_place_delta_lora_is_refused_before_it_begins(stored: str) -> None:
    adapter = lk.adapt(load("nf4", stored), lk.DeltaLoRA(rank=4, start_step=2, update="in_place"))
    with pytest.raises(SettingError, match="telescoped"):
        adapter.optimizer(lr=1e-3)


def test_a_layer_without_a_gradient_is_refused(stored: str) -> None:
    model = load("other", stored)

    class NoGradient(OtherLinear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    model.model.layers[1].mlp.up_proj.__class__ = NoGradient
    with pytest.raises(
        lk.TargetError,
        match=r"layers\.1\.mlp\.up_proj",
    ):
        lk.adapt(model, lk.LoRA(), ["up_proj"])


def test_the_norm_never_holds_the_weight(stored: str) -> None:
    """DoRA on a large 4-bit layer: its blocks of rows, not the whole in float32."""
    linear = bnb.nn.Linear4bit(
        2048, 2048, bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    linear.load_state_dict({"weight": torch.randn(2048, 2048)})
    linear.to("cpu")
    largest = max(rows.numel() for rows in quantised.packed_weight(linear).blocks())
    assert largest <= 2**20 == 2048 * 2048 // 4


def test_what_cannot_be_trained_whole_is_refused(stored: str) -> None:
    for name in ("nf4", "int8", "torchao-int8"):
        with pytest.raises(
            lk.TargetError,
            match=r"layers\.1\.mlp\.down_proj",
        ):
            lk.adapt(
                load(name, stored),
                lk.LoRA(rank=2),
                ["v_proj"],
                modules_to_save=["layers.1.mlp.down_proj"],
            )


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_a_model_merged_in_part_can_be_saved_and_loaded(
    name: str, stored: str, ids: Tensor, tmp_path: Path
) -> None:
    model = load(name, stored)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), ["v_proj"]))
    with pytest.warns(LorakinWarning, match="2 .*torch.float32"):
        adapter.merge(permanent=True)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert quantised.is_quantised(again.model.layers[0].mlp.up_proj)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("targets", ["all-linear", "v_proj"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_callers_config_makes_the_same_model_again(
    name: str, targets: str, stored: str
) -> None:
    config = CONFIGS[name]()
    before = config.to_dict()
    made = [
        transformers.AutoModelForCausalLM.from_pretrained(stored, quantization_config=config)
        for _ in "ab"
    ]
    counts = [sum(map(quantised.is_quantised, model.modules())) for model in made]
    for model in made[1:]:
        with pytest.warns(LorakinWarning, match="quantised"):
            randomise(lk.adapt(model, lk.LoRA(rank=2), targets)).merge(permanent=True)
    assert config.to_dict() == before
    again = transformers.AutoModelForCausalLM.from_pretrained(stored, quantization_config=config)
    assert sum(map(quantised.is_quantised, again.modules())) == counts[0] == 14


@pytest.mark.parametrize("name", ["nf4", "torchao-int8", "other"])
def test_an_adapter_that_stays_hangs_on_the_plain_layer(
    name: str, stored: str, ids: Tensor
) -> None:
    model = load(name, stored)
    one = randomise(lk.adapt(model, lk.DoRA(rank=2), "v_proj", name="one"), seed=1)
    other = randomise(lk.adapt(model, lk.LoRA(rank=2), ["v_proj", "q_proj"], name="other"), seed=2)
    optimizer = other.optimizer(torch.optim.SGD, lr=0.1)
    lk.activate(model, ["one", "other"])
    expected = model(ids).logits
    with pytest.warns(LorakinWarning, match="2 adapted"):
        one.merge(permanent=True)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert other.is_active
    with other.disabled():
        assert (model(ids).logits - expected).abs().max() > 1e-3
    model(ids).logits.square().sum().backward()
    optimizer.step()
    assert (model(ids).logits - expected).abs().max() > 1e-3, (
        "the optimizer still holds its tensors"
    )
    after = model(ids).logits
    with pytest.warns(LorakinWarning, match="2 adapted"):
        other.merge(permanent=True)
    torch.testing.assert_close(model(ids).logits, after, rtol=1e-4, atol=1e-5)
    assert not quantised.is_quantised(model.model.layers[0].self_attn.v_proj)


@pytest.mark.parametrize("there", ["plain", "nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize(
    "name", ["plain", "nf4", "nf4-nested", "int8", "torchao-int8", "torchao-int4"]
)
def test_an_adapter_knows_its_base_in_few_bits_too(
    name: str, there: str, stored: str, tmp_path: Path
) -> None:
    def base(kind: str, folder: str) -> Any:
        if kind != "plain":
            return load(kind, folder)
        if folder == stored:
            return tiny_llama(**SIZES)
        return transformers.AutoModelForCausalLM.from_pretrained(folder)

    randomise(lk.adapt(base(name, stored), lk.LoRA(rank=2))).save(tmp_path / "a")
    lk.load(base(there, stored), tmp_path / "a")
    other = tiny_llama(**SIZES)
    with torch.no_grad():
        for path, parameter in other.named_parameters():
            if path.endswith("_proj.weight"):
                parameter.neg_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(lk.AdapterError):
        lk.load(base(there, str(tmp_path / "other")), tmp_path / "a")


def test_the_library_gets_its_layout_back(stored: str) -> None:
    model = load("nf4", stored)
    before = [getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()]
    adapter = lk.adapt(model, lk.LoRA(rank=2))
    assert not any(
        getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules()
    )
    adapter.remove()
    assert [
        getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()
    ] == before
