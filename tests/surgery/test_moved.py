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
            places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
            places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "cpu"}
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
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
    change = adapter.pair_at("0").applied_to(own)
    torch.testing.assert_close(model(x), x @ change.T + base[0].bias, rtol=1e-3, atol=1e-4)
    model(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("kind", ["vit", "whisper", "llama"])
def test_reentrant_checkpointing_passes_gradients(kind: str, ids: Tensor) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
            hidden_dropout_prob=0.0,
        )  # fmt: skip
        model, batch = transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}
        batch["labels"] = torch.tensor([0, 1])
    elif kind == "whisper":
        whisper = transformers.WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=20, max_target_positions=20,
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
        adapter = randomise(lk.adapt(each, lk.LoRA(rank=2), "all-linear", modules_to_save=heads, seed=0))
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
    assert set(adapter.plan.sites) == {"lorakin.0", "other"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.lorakin.default.{slot}" for path in adapter.plan.sites for slot in "AB"
    }
    adapter.save(tmp_path)
    loaded = copy.deepcopy(base)
    lk.load(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    adapter.remove()
    assert all(torch.equal(t, base.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["merged", "base", "active", "dense", "rows", "off", "shape", "inside", "names", "my adapter"])
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
