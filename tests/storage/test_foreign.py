"""Other libraries' files change the logits as their own forward does; other methods are refused.

Every file is written here in its library's layout. The truth is that library's forward in float64:
branches added by hooks, or its own way of merging. What is read is folded into the weights instead.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import lorakin as lk
from conftest import tiny_gpt2, tiny_llama
from lorakin.storage.foreign.foreign_file import ForeignAdapter
from lorakin.storage.foreign.read import read_foreign

CONFIG = "adapter_config.json"
Branch = Callable[[Tensor], Tensor]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def write(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Path:
    """The tensors as a file, as safetensors or with torch.save by its name, perhaps with a config
    beside it.
    """
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)
    if config is not None:
        (path.parent / CONFIG).write_text(json.dumps(config))
    return path


def branched(model: nn.Module, branches: Mapping[str, Branch]) -> nn.Module:
    """The model in float64 with each branch of a module's input added to the module's output."""
    model = copy.deepcopy(model).double()
    for path, branch in branches.items():
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, branch=branch: out + branch(args[0])
        )
    return model


def folded(model: nn.Module, found: ForeignAdapter) -> nn.Module:
    """The model in float64 with what was read in its weights, by the contract of `ForeignAdapter`."""
    model = copy.deepcopy(model).double()
    for path, slots in found.slots.items():
        module: Any = model.get_submodule(path)
        transposed = isinstance(module, nn.Embedding | transformers.pytorch_utils.Conv1D)
        weight = module.weight.detach()
        weight = weight.T if transposed else weight.flatten(1)
        weight = weight + found.scales[path] * slots["B"].double() @ slots["A"].double()
        if "m" in slots:
            weight = weight * (slots["m"].double() / weight.norm(dim=1)).unsqueeze(1)
        module.weight = nn.Parameter(
            (weight.T if transposed else weight).reshape(module.weight.shape)
        )
    return model


def agree(model: nn.Module, found: ForeignAdapter, theirs: nn.Module, x: Tensor) -> None:
    """Folded in, what was read gives the logits of `theirs`, and other ones than the base."""
    with torch.no_grad():
        ours, expected, base = (
            _logits(m, x) for m in (folded(model, found), theirs, copy.deepcopy(model).double())
        )
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert (expected - base).abs().max() > 1e-3


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


class Net(nn.Module):
    """Convolutions of several kinds and a linear head, over (batch, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.ModuleDict(
            {"down": nn.Conv2d(4, 6, 3, stride=2, padding=1), "proj": nn.Conv2d(6, 6, 1)}
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block["proj"](self.block["down"](self.conv_in(x).tanh()))
        return self.head(x.mean((2, 3)))


# loralib


def lora(A: Tensor, B: Tensor, s: float) -> Branch:
    """The branch of a linear layer."""
    return lambda x: (x @ A.T @ B.T) * s


@pytest.mark.parametrize("name", ["lora.pt", "lora.bin", "lora.safetensors"])
def test_loralib_on_gpt2(tmp_path: Path, ids: Tensor, name: str) -> None:
    A, B = drawn(3, 32), drawn(32, 3)
    E, D = drawn(2, 64), drawn(32, 2)
    tensors = {
        "transformer.h.0.attn.c_proj.lora_A": A,
        "transformer.h.0.attn.c_proj.lora_B": B,
        "transformer.wte.lora_A": E,
        "transformer.wte.lora_B": D,
    }
    model = tiny_gpt2()
    found = read_foreign(write(tmp_path / name, tensors), model, alpha=6)
    assert found.format == "loralib"
    assert found.scales == {"transformer.h.0.attn.c_proj": 2.0, "transformer.wte": 3.0}
    assert any("transformer.wte" in note and "tied" in note for note in found.notes)
    branches = {
        "transformer.h.0.attn.c_proj": lora(A, B, 2.0),
        "transformer.wte": lambda ids: F.embedding(ids, E.T) @ D.T * 3.0,
    }
    agree(model, found, branched(model, branches), ids)


def test_loralib_merged_parts_become_one_pair(tmp_path: Path, ids: Tensor) -> None:
    path = "transformer.h.1.attn.c_attn"
    A, B = drawn(3 * 2, 32), drawn(3 * 32, 2)
    model = tiny_gpt2()
    found = read_foreign(
        write(tmp_path / "a.pt", {f"{path}.lora_A": A, f"{path}.lora_B": B}), model, alpha=5
    )
    assert found.slots[path]["A"].shape == (6, 32) and found.slots[path]["B"].shape == (96, 6)
    assert found.scales == {path: 2.5}
    delta = F.conv1d(A.unsqueeze(0), B.unsqueeze(-1), groups=3).squeeze(0)  # as loralib merges them
    agree(model, found, branched(model, {path: lambda x: x @ delta.T * 2.5}), ids)


def test_loralib_convolutions(tmp_path: Path) -> None:
    r, k = 2, 3
    tensors = {
        "block.down.lora_A": drawn(r * k, 4 * k),
        "block.down.lora_B": drawn(6 * k, r * k),
        "block.proj.lora_A": drawn(r, 6),
        "block.proj.lora_B": drawn(6, r),
    }
    model = Net()
    found = read_foreign(write(tmp_path / "a.pt", tensors), model, alpha=3)
    assert found.scales == {"block.down": 1.5, "block.proj": 1.5}
    theirs = copy.deepcopy(model).double()
    for path in found.slots:
        weight = theirs.get_parameter(f"{path}.weight")
        weight.data += (tensors[f"{path}.lora_B"] @ tensors[f"{path}.lora_A"]).view(
            weight.shape
        ) * 1.5
    agree(model, found, theirs, drawn(2, 3, 8, 8))


# torchtune

TUNE_TO_HF = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def tune_tensors(model: nn.Module, magnitudes: bool, r: int = 3) -> dict[str, Tensor]:
    """torchtune's tensors for every layer it adapts and for the head."""
    names = {
        f"layers.{n}.{tune}": f"model.layers.{n}.{hf}"
        for n in range(2)
        for tune, hf in TUNE_TO_HF.items()
    }
    tensors = {}
    for seed, (name, path) in enumerate((names | {"output": "lm_head"}).items()):
        out, inputs = model.get_submodule(path).weight.shape
        tensors |= {
            f"{name}.lora_a.weight": drawn(r, inputs, seed=seed),
            f"{name}.lora_b.weight": drawn(out, r, seed=seed),
        }
        if magnitudes:
            tensors[f"{name}.magnitude"] = 1 + drawn(out, seed=seed)
    return tensors


def tuned(model: nn.Module, tensors: Mapping[str, Tensor], s: float, alternate: bool) -> nn.Module:
    """The model with torchtune's weights for queries and keys, in its order of rows, and the
    adapter folded in there.
    """
    theirs: Any = copy.deepcopy(model).double()
    head = theirs.model.layers[0].self_attn.head_dim
    for key in tensors:
        if not key.endswith(".lora_a.weight"):
            continue
        name = key.removesuffix(".lora_a.weight")
        n, _, rest = name.removeprefix("layers.").partition(".")
        module = (
            theirs.lm_head
            if name == "output"
            else theirs.get_submodule(f"model.layers.{n}.{TUNE_TO_HF[rest]}")
        )
        weight = module.weight.detach()
        if alternate and rest in ("attn.q_proj", "attn.k_proj"):
            weight = torch.stack(
                [weight[h + i] for h in range(0, len(weight), head) for i in _tune_order(head)]
            )
        weight = weight + s * tensors[f"{name}.lora_b.weight"] @ tensors[key]
        if f"{name}.magnitude" in tensors:
            weight = weight * (tensors[f"{name}.magnitude"] / weight.norm(dim=1)).unsqueeze(1)
        module.weight = nn.Parameter(weight)
    return theirs


def _tune_order(head: int) -> list[int]:
    """Row of a head in transformers' order, for each row in torchtune's."""
    return [i // 2 + (head // 2) * (i % 2) for i in range(head)]


def alternating_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Rotary positions as torchtune applies them: to neighbours, (x₀ c − x₁ s, x₁ c + x₀ s)."""
    half = cos.shape[-1] // 2
    c, s = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)

    return turned(q), turned(k)


@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("head_dim", [12, None])
def test_torchtune_on_llama(
    tmp_path: Path,
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    magnitudes: bool,
    head_dim: int | None,
) -> None:
    model = tiny_llama(tied=False, head_dim=head_dim)
    model.config.head_dim = head_dim  # None is what older configs have, for hidden_size / heads
    tensors = tune_tensors(model, magnitudes)
    write(
        tmp_path / "adapter_model.pt",
        tensors,
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"},
    )
    write(
        tmp_path / "adapter_model.safetensors", {"base_model.model.not.read": drawn(2)}
    )  # torchtune writes both
    found = read_foreign(tmp_path, model)
    assert found.format == "torchtune"
    assert set(found.scales.values()) == {2.0} and len(found.slots) == 15
    with torch.no_grad():
        ours = folded(model, found)(ids).logits
        monkeypatch.setattr(
            transformers.models.llama.modeling_llama, "apply_rotary_pos_emb", alternating_rope
        )
        theirs = tuned(model, tensors, 2.0, alternate=True)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_torchtune_leaves_the_rows_of_qwen2(tmp_path: Path, ids: Tensor) -> None:
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    ).eval()
    tensors = tune_tensors(model, magnitudes=False)
    found = read_foreign(write(tmp_path / "adapter_0.pt", tensors), model, alpha=6)
    agree(model, found, tuned(model, tensors, 2.0, alternate=False), ids)


# mlx-lm


def mlx_config(kind: str = "lora", **parameters: Any) -> dict[str, Any]:
    return {
        "fine_tune_type": kind,
        "num_layers": 2,
        "lora_parameters": {"rank": 3, "dropout": 0.0, **parameters},
    }


def test_mlx(tmp_path: Path, ids: Tensor) -> None:
    path = "model.layers.1.mlp.up_proj"
    a, b = drawn(32, 3), drawn(3, 48)
    write(
        tmp_path / "adapters.safetensors",
        {f"{path}.lora_a": a, f"{path}.lora_b": b},
        mlx_config(scale=20.0, alpha=16),
    )
    write(tmp_path / "0000100_adapters.safetensors", {f"{path}.lora_a": a * 2, f"{path}.lora_b": b})
    model = tiny_llama()
    found = read_foreign(tmp_path, model)
    assert (found.format, found.scales) == ("mlx-lm", {path: 20.0})
    agree(model, found, branched(model, {path: lambda x: 20.0 * ((x @ a) @ b)}), ids)
    earlier = read_foreign(tmp_path / "0000100_adapters.safetensors", model)
    torch.testing.assert_close(earlier.slots[path]["A"], 2 * found.slots[path]["A"])


def test_mlx_with_magnitudes(tmp_path: Path, ids: Tensor) -> None:
    path = "model.layers.0.self_attn.o_proj"
    a, b, m = drawn(32, 3), drawn(3, 32), 1 + drawn(32)
    tensors = {f"{path}.lora_a": a, f"{path}.lora_b": b, f"{path}.m": m}
    model = tiny_llama()
    found = read_foreign(
        write(tmp_path / "adapters.safetensors", tensors, mlx_config("dora", scale=2.0)), model
    )
    theirs = copy.deepcopy(model).double()

    def forward(x: Tensor) -> Tensor:
        weight = model.get_submodule(path).weight.detach().double()
        out = x @ weight.T + 2.0 * ((x @ a) @ b)
        return out * (m / torch.linalg.norm(weight + (2.0 * b.T) @ a.T, dim=1))

    theirs.get_submodule(path).forward = forward
    agree(model, found, theirs, ids)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_mlx_takes_its_tied_head_along(
    tmp_path: Path, ids: Tensor, tied: bool
) -> None:
    a, b = drawn(64, 3), drawn(3, 32)
    tensors = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    model = tiny_llama(tied=tied)
    found = read_foreign(
        write(tmp_path / "adapters.safetensors", tensors, mlx_config(scale=2.0)), model
    )
    assert bool(found.notes) is tied
    branches: dict[str, Branch] = {"model.embed_tokens": lambda ids: 2.0 * (a[ids] @ b)}
    if tied:
        branches["lm_head"] = lambda x: 2.0 * ((x @ b.T) @ a.T)  # mlx-lm's as_linear
    agree(model, found, branched(model, branches), ids)


def test_the_two_meanings_of_an_early_mlx_config(tmp_path: Path) -> None:
    path = "model.layers.1.mlp.up_proj"
    config = {
        "lora_layers": 16,
        "lora_parameters": {"rank": 8, "alpha": 16, "dropout": 0.0, "scale": 10.0},
    }
    file = write(
        tmp_path / "adapters.safetensors",
        {f"{path}.lora_a": drawn(32, 8), f"{path}.lora_b": drawn(8, 48)},
        config,
    )
    model = tiny_llama()
    with pytest.raises(
        lk.AdapterError,
        match="alpha=80.* 10 .*alpha=160.* 20",
    ):
        read_foreign(file, model)
    assert read_foreign(file, model, alpha=160).scales == {path: 20.0}
    assert read_foreign(file, model, alpha=80).scales == {path: 10.0}
    with pytest.raises(lk.AdapterError, match="alpha=16.* 80 or 160"):
        read_foreign(file, model, alpha=16)


# kohya and LyCORIS


def test_kohya_on_convolutions(tmp_path: Path) -> None:
    down, up = drawn(2, 4, 3, 3), drawn(6, 2, 1, 1)
    first, last = drawn(3, 3, 3, 3), drawn(4, 3, 1, 1)
    pa, pb, ha, hb = drawn(2, 6, 1, 1), drawn(6, 2, 1, 1), drawn(2, 6), drawn(5, 2)
    tensors = {
        "lora_unet_block_down.lora_down.weight": down,
        "lora_unet_block_down.lora_up.weight": up,
        "lora_unet_block_down.alpha": torch.tensor(3.0, dtype=torch.bfloat16),
        "lora_unet_conv_in.lora_down.weight": first,
        "lora_unet_conv_in.lora_up.weight": last,
        "lora_unet_block_proj.lora_down.weight": pa,
        "lora_unet_block_proj.lora_up.weight": pb,
        "lora_unet_block_proj.alpha": torch.tensor(0.0),
        "lora_unet_head.lora_down.weight": ha,
        "lora_unet_head.lora_up.weight": hb,
        "lora_unet_head.alpha": torch.tensor(8),
    }
    model = Net()
    found = read_foreign(write(tmp_path / "a.safetensors", tensors), model)
    assert found.format == "kohya/LyCORIS" and not found.notes
    assert found.scales == {"block.down": 1.5, "conv_in": 1.0, "block.proj": 1.0, "head": 4.0}
    branches = {
        "block.down": lambda x: 1.5 * F.conv2d(F.conv2d(x, down, stride=2, padding=1), up),
        "conv_in": lambda x: F.conv2d(F.conv2d(x, first, padding=1), last),
        "block.proj": lambda x: F.conv2d(F.conv2d(x, pa), pb),
        "head": lora(ha, hb, 4.0),
    }
    agree(model, found, branched(model, branches), drawn(2, 3, 8, 8))


def test_lycoris_with_a_magnitude_for_each_output(tmp_path: Path) -> None:
    down, up, m = drawn(2, 4, 3, 3), drawn(6, 2, 1, 1), 1 + drawn(6, 1, 1, 1)
    tensors = {
        "lycoris_block_down.lora_down.weight": down,
        "lycoris_block_down.lora_up.weight": up,
        "lycoris_block_down.alpha": torch.tensor(1.0),
        "lycoris_block_down.dora_scale": m,
    }
    model = Net()
    found = read_foreign(write(tmp_path / "a.safetensors", tensors), model)
    theirs = copy.deepcopy(model).double()
    weight = theirs.block["down"].weight
    changed = weight.detach() + 0.5 * torch.einsum("or,rikl->oikl", up.flatten(1), down)
    weight.data = changed * m / changed.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    agree(model, found, theirs, drawn(2, 3, 8, 8))


def kohya(name: str, out: int, inputs: int, r: int = 2) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": drawn(r, inputs), f"{name}.lora_up.weight": drawn(out, r)}


@functools.cache
def clip(layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.CLIPTextModel(config).eval()


def test_of_a_file_for_several_models_the_part_for_this_one(tmp_path: Path) -> None:
    q = "text_model_encoder_layers_{}_self_attn_q_proj"
    tensors = {
        **kohya("lora_unet_head", 5, 6),
        **kohya("lora_te1_" + q.format(0), 16, 16),
        **kohya("lora_te2_" + q.format(1), 24, 24),
    }
    file = write(tmp_path / "a.safetensors", tensors)
    unet = read_foreign(file, Net())
    assert list(unet.slots) == ["head"]
    assert [note.split(",")[0] for note in unet.notes] == [
        "the 2 tensors of lora_te1 were left out",
        "the 2 tensors of lora_te2 were left out",
    ]
    first, second = read_foreign(file, clip(2, 16)), read_foreign(file, clip(2, 24))
    assert [path.rpartition("encoder.")[2] for path in first.slots] == ["layers.0.self_attn.q_proj"]
    assert [path.rpartition("encoder.")[2] for path in second.slots] == [
        "layers.1.self_attn.q_proj"
    ]
    assert torch.equal(second.slots[next(iter(second.slots))]["A"], drawn(2, 24))


def test_two_parts_that_fit_the_same_model(tmp_path: Path) -> None:
    name = "text_model_encoder_layers_0_self_attn_q_proj"
    file = write(
        tmp_path / "a.pt", kohya(f"lora_te1_{name}", 16, 16) | kohya(f"lora_te2_{name}", 16, 16)
    )
    with pytest.raises(lk.AdapterError, match="lora_te1 and lora_te2"):
        read_foreign(file, clip(2, 16))


def test_a_name_that_can_mean_two_modules(tmp_path: Path) -> None:
    model = nn.Module()
    model.a_b, model.a = nn.Linear(4, 4), nn.ModuleDict({"b": nn.Linear(4, 4)})
    with pytest.raises(lk.AdapterError, match=r"a_b or a\.b"):
        read_foreign(write(tmp_path / "a.pt", kohya("lycoris_a_b", 4, 4)), model)


# what is refused

UP = "model.layers.1.mlp.up_proj"


def loralib(A: Tensor, B: Tensor, path: str = UP) -> dict[str, Tensor]:
    return {f"{path}.lora_A": A, f"{path}.lora_B": B}


def tune(name: str = "layers.1.mlp.w3", **more: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_a.weight": drawn(3, 32), f"{name}.lora_b.weight": drawn(48, 3), **more}


def mlx(path: str = UP, **more: Tensor) -> dict[str, Tensor]:
    return {
        f"{path}.lora_a": drawn(32, 3),
        f"{path}.lora_b": drawn(3, 48),
        **{f"{path}.{k}": t for k, t in more.items()},
    }


FLAT_UP = "lycoris_model_layers_1_mlp_up_proj"
GOOD = loralib(drawn(3, 32), drawn(48, 3))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (GOOD | {f"{UP}.bias": drawn(48)}, rf"{UP}\.bias"),
        (loralib(drawn(6, 32), drawn(32, 3)), f"{UP} .*enable_lora"),
        (GOOD | {"model.norm.weight": drawn(32)}, r"model\.norm\.weight"),
        ({f"{UP}.lora_A": drawn(3, 32)}, f"{UP} lacks lora_B"),
        (
            loralib(drawn(3, 30), drawn(48, 3)),
            r"up_proj has A \(3, 30\), B \(48, 3\).* LlamaForCausalLM is 48 × 32",
        ),
        (loralib(drawn(3, 32), drawn(48, 4)), r"has A \(3, 32\), B \(48, 4\)"),
        (loralib(drawn(32), drawn(48, 3)), r"A of .*up_proj has shape \(32,\), expected a matrix"),
        (loralib(drawn(0, 32), drawn(48, 0)), r"has A \(0, 32\)"),
        (loralib(drawn(3, 32), drawn(48, 3) / 0), "B of .*up_proj holds NaN or infinity"),
        (loralib(drawn(3, 32), drawn(48, 3) * math.nan), "B of .*up_proj holds NaN or infinity"),
        (loralib(drawn(3, 32).int(), drawn(48, 3)), r"A of .*up_proj is torch\.int32"),
        (loralib(drawn(3, 32), drawn(48, 3), "h.0"), r"h\.0.*LlamaForCausalLM"),
        (loralib(drawn(3, 32), drawn(48, 3), "model.norm"), "model.norm.*LlamaRMSNorm"),
        (tune("layers.1.mlp.w9"), r"layers\.1\.mlp\.w9.*llama"),
        (tune("tok_embeddings"), "tok_embeddings"),
        (tune(**{"layers.1.mlp.w3.magnitude": drawn(47)}), r"m \(47,\), as outputs × inputs"),
        (tune() | GOOD, "lora_A"),
        (
            mlx("model.embed_tokens", lora_a=drawn(64, 3), lora_b=drawn(3, 32), m=drawn(64)),
            "embed_tokens",
        ),
        (mlx(lora_a=drawn(4, 3, 32), lora_b=drawn(4, 48, 3)), r"\(4, 3, 32\)"),
        (
            kohya(FLAT_UP, 48, 32) | {f"{FLAT_UP}.lora_mid.weight": drawn(2, 2, 3, 3)},
            r"lora_mid\.weight .*Tucker",
        ),
        ({f"{FLAT_UP}.hada_w1_a": drawn(3, 3)}, "hada_w1_a .*LoHa"),
        ({f"{FLAT_UP}.lokr_w1": drawn(3, 3)}, "lokr_w1 .*LoKr"),
        ({f"{FLAT_UP}.oft_blocks": drawn(3, 3, 3)}, "oft_blocks .*OFT"),
        ({f"{FLAT_UP}.diff": drawn(48, 32)}, "diff .*difference"),
        (kohya(FLAT_UP, 48, 32) | {f"{FLAT_UP}.diff_b": drawn(48)}, "diff_b .*difference"),
        (
            kohya(FLAT_UP, 48, 32) | {f"{FLAT_UP}.dora_scale": drawn(1, 32)},
            r"dora_scale has shape \(1, 32\).*the 48 outputs",
        ),
        (
            kohya(FLAT_UP, 48, 32) | {f"{FLAT_UP}.alpha": torch.tensor(math.nan)},
            r"alpha is nan, expected one number",
        ),
        (kohya(FLAT_UP, 48, 32) | {f"{FLAT_UP}.scalar": torch.tensor(1.0)}, r"up_proj\.scalar"),
        (kohya(FLAT_UP, 48, 32) | {"lora_clip_x.alpha": torch.tensor(1.0)}, r"lora_clip_x\.alpha"),
        (kohya("lora_unet_conv_in", 4, 27), "conv_in.*LlamaForCausalLM"),
        (kohya("lora_te_model_embed_tokens", 32, 64), "model.embed_tokens"),
        ({f"base_model.model.{UP}.lora_A.weight": drawn(3, 32)}, "in PEFT's layout"),
        ({"some.weight": drawn(2)}, r"some\.weight"),
        ({}, "none at all"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str, suffix: str) -> None:
    file = write(tmp_path / f"a{suffix}", tensors)
    with pytest.raises(lk.AdapterError, match=message) as caught:
        read_foreign(
            file,
            tiny_llama(),
            alpha=None if "lycoris" in str(tensors) or "lora_te" in str(tensors) else 4,
        )
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "config", "alpha", "message"),
    [
        (GOOD, None, None, rf"alpha=….* rank of {UP} is 3"),
        (tune(), None, None, "alpha="),
        (mlx(), mlx_config(alpha=16), None, "alpha="),
        (
            tune(),
            {"r": 4, "lora_alpha": 8},
            None,
            r"layers\.1\.mlp\.w3.* 3.*r=4",
        ),
        (tune(), {"r": 3, "lora_alpha": "8"}, None, "lora_alpha is '8'"),
        (
            tune(),
            {"r": 3, "lora_alpha": 6},
            8,
            "alpha=8.* 6",
        ),
        (mlx(), mlx_config("full"), None, "full"),
        (mlx(), mlx_config("dora", scale=2.0), None, "lacks m"),
        (
            mlx(),
            {"use_dora": True, "lora_parameters": {"scale": 2.0}},
            None,
            "lacks m",
        ),
        (mlx(), mlx_config(scale=None), None, "scale is None"),
        (mlx(), {"lora_parameters": 3}, None, "lora_parameters is 3"),
        (kohya(FLAT_UP, 48, 32), None, 8, "alpha=8.* 2"),
    ],
)
def test_scales_that_are_missing_or_at_odds(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None,
    alpha: float | None,
    message: str,
) -> None:
    with pytest.raises(lk.AdapterError, match=message):
        read_foreign(write(tmp_path / "a.safetensors", tensors, config), tiny_llama(), alpha=alpha)


@pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan, "8", True])
def test_an_alpha_that_is_none(tmp_path: Path, alpha: Any) -> None:
    with pytest.raises(lk.SettingError, match="alpha"):
        read_foreign(write(tmp_path / "a.pt", GOOD), tiny_llama(), alpha=alpha)


def test_torchtune_needs_a_model_whose_rows_it_orders_in_a_known_way(tmp_path: Path) -> None:
    file = write(tmp_path / "a.pt", tune())
    with pytest.raises(lk.AdapterError, match="gpt2"):
        read_foreign(file, tiny_gpt2(), alpha=4)
    with pytest.raises(lk.AdapterError, match="None"):
        read_foreign(file, Net(), alpha=4)


def test_kernels_that_differ(tmp_path: Path) -> None:
    one, flat = drawn(2, 4, 1, 1), drawn(2, 36)
    for down, kernel in ((one, r"\(1, 1\)"), (flat, r"\(\)")):
        tensors = {
            "lora_unet_block_down.lora_down.weight": down,
            "lora_unet_block_down.lora_up.weight": drawn(6, 2, 1, 1),
        }
        with pytest.raises(lk.AdapterError, match=rf"{kernel}.*block\.down.*\(3, 3\)"):
            read_foreign(write(tmp_path / "a.pt", tensors), Net())


def test_dtypes_are_the_files(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {key: t.bfloat16() for key, t in GOOD.items()})
    assert {t.dtype for t in read_foreign(file, tiny_llama(), alpha=4).slots[UP].values()} == {
        torch.bfloat16
    }


class Code:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    file, trace = tmp_path / "a.pt", tmp_path / "trace"
    if zipped:
        torch.save(GOOD | {"x": Code(trace)}, file)
    else:
        file.write_bytes(pickle.dumps(GOOD | {"x": Code(trace)}, protocol=2))
    with pytest.raises(
        lk.AdapterError,
    ):
        read_foreign(file, tiny_llama(), alpha=4)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_at_any_place(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a{suffix}", GOOD)
    content, model = file.read_bytes(), tiny_llama()
    for end in [*range(0, 60, 3), *range(60, len(content) - 1, 97), len(content) - 1]:
        file.write_bytes(content[:end])
        with pytest.raises(lk.AdapterError, match=str(file)):
            read_foreign(file, model, alpha=4)


def test_other_things_in_a_pickle(tmp_path: Path) -> None:
    for content, message in (
        ({"a": 3}, "'a' is int"),
        ({3: drawn(2)}, "3 is Tensor"),
        ([drawn(2)], "holds list"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(lk.AdapterError, match=message):
            read_foreign(tmp_path / "a.pt", tiny_llama())


def test_files_that_are_not_there_or_too_many(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(lk.AdapterError, match="gone"):
        read_foreign(tmp_path / "gone", model)
    with pytest.raises(lk.AdapterError, match=str(tmp_path)):
        read_foreign(tmp_path, model)
    write(tmp_path / "one.pt", GOOD)
    assert list(read_foreign(tmp_path, model, alpha=4).slots) == [UP]
    write(tmp_path / "two.pt", GOOD)
    with pytest.raises(lk.AdapterError, match=r"one\.pt, two\.pt"):
        read_foreign(tmp_path, model)
    (tmp_path / "adapters.npz").touch()
    with pytest.raises(lk.AdapterError, match=r"adapters\.npz"):
        read_foreign(tmp_path / "adapters.npz", model)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[]", "holds list, expected an object")]
)
def test_a_config_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(lk.AdapterError, match=f"{CONFIG} {message}"):
        read_foreign(write(tmp_path / "a.pt", GOOD), tiny_llama(), alpha=4)
