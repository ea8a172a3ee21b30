"""Models that are moved, resized, quantised or spread after they were adapted."""

from __future__ import annotations

import copy
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakin as lk
from conftest import MEMBERS, randomise, tiny_llama

NO_PROBE = [name for name in MEMBERS if name != "lora-drop"]


@pytest.mark.parametrize("member", NO_PROBE)
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_offloaded_after_adapting(member: str, how: str, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(tied=False)
    randomise(lk.adapt(model, MEMBERS[member](), modules_to_save=["lm_head"]))
    with torch.no_grad():
        want = model(ids).logits
        if how == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        elif how == "disk":
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        else:
            places = {
                "model.embed_tokens": "cpu",
                "model.rotary_emb": "cpu",
                "model.layers.0": "cpu",
            }
            places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "cpu"}
            accelerate.dispatch_model(
                model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
            )
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
@pytest.mark.parametrize("whole", [[], ["embed_tokens"]])
def test_a_vocabulary_resized_after_adapting_is_refused(
    targets: list[str], whole: list[str], ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama(tied=False)
    targets = [target for target in targets if target not in whole]
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), targets, modules_to_save=whole))
    model.resize_token_embeddings(70)
    if targets != ["q_proj"]:
        with pytest.raises(lk.StateError):
            model(ids)
    with pytest.raises(lk.StateError):
        adapter.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    adapter.remove()
    assert model(torch.full((1, 2), 68)).logits.shape == (1, 2, 70)


@pytest.mark.parametrize("member", NO_PROBE)
def test_quantised_after_adapting(member: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64))
    model = copy.deepcopy(base)
    adapter = randomise(lk.adapt(model, MEMBERS[member](), "all-linear"))
    x = torch.randn(2, 64)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    own = model[0]._parameters["weight"].dequantize()
    change = adapter.tensors.pair_now("0").applied_to(own)
    torch.testing.assert_close(model(x), x @ change.T + base[0].bias, rtol=1e-3, atol=1e-4)
    model(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("kind", ["vit", "whisper", "llama"])
def test_reentrant_checkpointing_passes_gradients(kind: str, ids: Tensor) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=16, patch_size=8,
            hidden_dropout_prob=0.0,
        )  # fmt: skip
        model, batch = (
            transformers.ViTForImageClassification(config),
            {"pixel_values": torch.randn(2, 3, 16, 16)},
        )
        batch["labels"] = torch.tensor([0, 1])
    elif kind == "whisper":
        whisper = transformers.WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
            max_source_positions=20, max_target_positions=20,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        )  # fmt: skip
        model = transformers.WhisperForConditionalGeneration(whisper)
        batch = {"input_features": torch.randn(2, 8, 40), "labels": ids}
    else:
        model, batch = tiny_llama(), {"input_ids": ids, "labels": ids}
    plain = copy.deepcopy(model)
    heads = ["classifier"] if kind == "vit" else []
    model.gradient_checkpointing_enable({"use_reentrant": True})
    grads = []
    for each in (model, plain):
        adapter = randomise(
            lk.adapt(each, lk.LoRA(rank=2), "all-linear", modules_to_save=heads, seed=0)
        )
        each.train()
        each(**batch).loss.backward()
        grads.append([p.grad for p in adapter.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


class Twice(nn.Module):
    """A module of the user's that is called lorakin, and holds one that is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.lorakin = nn.Sequential(nn.Linear(8, 8))
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(self.lorakin(x))
        return out


def test_a_module_of_the_users_may_be_called_lorakin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Twice(), torch.randn(2, 8)
    model = copy.deepcopy(base)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "all-linear"))
    assert set(adapter.placement.methods) == {"lorakin.0", "other"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.lorakin.default.{slot}" for path in adapter.placement.methods for slot in "AB"
    }
    adapter.save(tmp_path)
    loaded = copy.deepcopy(base)
    lk.load(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    adapter.remove()
    assert all(torch.equal(t, base.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["merged", "base", "active", "dense", "rows", "off", "shape", "inside", "names", "my adapter"],
)
def test_names_of_adapters(name: str, ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), ["q_proj"], name=name))
    want = model(ids).logits
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    state = {key: p.detach().clone() for key, p in model.named_parameters()}
    again = torch.func.functional_call(model, state, (ids,)).logits
    torch.testing.assert_close(again, want)


@pytest.mark.parametrize("member", NO_PROBE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_adapter_written_through_data_is_not_stale(
    member: str, dtype: torch.dtype, ids: Tensor
) -> None:
    """Moving averages and target networks write so; torch does not count it as a change."""
    model = tiny_llama(dtype=dtype)
    adapter = randomise(lk.adapt(model, MEMBERS[member]()))
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        before = model(ids).logits
        for parameter in adapter.parameters():
            parameter.data.mul_(1.5)
        got = model(ids).logits
        assert not torch.equal(got, before)
        assert torch.equal(got, copy.deepcopy(model)(ids).logits)


def test_an_optimizer_does_not_train_the_base_under_a_loaded_adapter(
    ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama()
    randomise(lk.adapt(model, lk.LoRA(rank=2), ["q_proj"])).save(tmp_path)
    model = tiny_llama()
    adapter = lk.load(model, tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(lk.StateError):
        optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    adapter.merge(permanent=True)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_modules_that_the_first_step_does_not_reach_are_said(ids: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "not": nn.Linear(4, 4)})
    adapter = lk.adapt(model, lk.LoRA(rank=2), ["used", "not"])
    optimizer = adapter.optimizer(lr=1e-2)
    model["used"](torch.ones(1, 4)).sum().backward()
    with pytest.warns(lk.LorakinWarning, match="1 of 2"):
        optimizer.step()


def test_a_new_head_that_nothing_trains_is_said() -> None:
    def fresh() -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
        return transformers.ViTForImageClassification(config)

    with pytest.warns(lk.LorakinWarning, match="classifier"):
        lk.adapt(fresh(), lk.LoRA(rank=2))
    lk.adapt(
        fresh(), lk.LoRA(rank=2), modules_to_save=["classifier"]
    )  # a warning would be an error here
    lk.adapt(fresh(), lk.LoRA(rank=1), ["q_proj", "classifier"])
    trained = fresh()
    nn.init.normal_(trained.classifier.bias)
    lk.adapt(trained, lk.LoRA(rank=2))


@pytest.mark.parametrize("member", NO_PROBE)
def test_every_tensor_has_the_dtype_that_was_asked_for(member: str, ids: Tensor) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    adapter = lk.adapt(model, MEMBERS[member](), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(ids).logits).all()
