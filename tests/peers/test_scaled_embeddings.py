"""Embeddings whose forward scales what it looks up, as Gemma 3's and BART's do: PEFT both ways, and no changed table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import lorakin as lk
from conftest import randomise, small

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning:peft")]

WORDS = 4096
GEMMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"], "tie_word_embeddings": False,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "scale_embedding": True, "dropout": 0.0,
    "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip


def gemma() -> Any:
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA)).eval()


def bart() -> Any:
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)).eval()


MODELS: dict[str, Callable[[], Any]] = {"gemma": gemma, "bart": bart}
MEMBERS: dict[str, Callable[[], Any]] = {
    word: functools.partial(small, word, rank=2, alpha=3) for word in ("lora", "dora")
}


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(12).view(2, 6)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_both_ways(name: str, member: str, tmp_path: Path, ids: Tensor) -> None:
    make = MODELS[name]
    model = make()
    randomise(lk.adapt(model, MEMBERS[member](), "embed_tokens"), 0.2).save(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(
        read(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["embed_tokens"], use_dora=member == "dora"
    )
    theirs = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_embedding" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = lk.load(again := make(), tmp_path / "theirs", trainable=True)
    out, wanted = again(input_ids=ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    out.square().mean().backward()
    wanted.square().mean().backward()
    grads = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
    }
    for key, parameter in adapter.named_parameters():
        path, slot = key.rsplit(".", 1)
        wanted_key = (
            f"{path}.lora_embedding_{slot}"
            if slot != "m"
            else f"{path}.lora_magnitude_vector.weight"
        )
        torch.testing.assert_close(
            parameter.grad, grads[wanted_key].view_as(parameter), rtol=1e-4, atol=1e-6
        )
    adapter.merge()
    torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_checkpointed_and_mixed(name: str, member: str, ids: Tensor) -> None:
    model = MODELS[name]()
    base = model(input_ids=ids).logits.detach()
    adapter = randomise(lk.adapt(model, MEMBERS[member](), "embed_tokens"), 0.2)
    out = model(input_ids=ids).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, out)
    with lk.mixed_batch(model, ["default", None]):
        mixed = model(input_ids=ids).logits
    torch.testing.assert_close(mixed, torch.cat([out[:1], base[1:]]))
    tensors = [t for t in adapter.parameters() if t.requires_grad]
    wanted = torch.autograd.grad(out.square().mean(), tensors)
    model.gradient_checkpointing_enable()
    model.train()
    again = torch.autograd.grad(
        model(input_ids=ids, use_cache=False).logits.square().mean(), tensors
    )
    torch.testing.assert_close(again, wanted)


class Tables(TorchDispatchMode):
    """The operations whose result is as large as the table and is no view of something."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for one in out if isinstance(out, tuple | list) else [out]:
            if (
                isinstance(one, Tensor)
                and one.numel() >= 32 * WORDS
                and one.untyped_storage().data_ptr() not in known
            ):
                self.made.append(str(func))
        return out


@pytest.mark.parametrize("member", MEMBERS)
def test_no_table_is_made(member: str) -> None:
    ids = torch.arange(12).view(2, 6)
    model = nn.Sequential(Gemma3TextScaledWordEmbedding(WORDS, 32, 0, 3.0))
    randomise(lk.adapt(model, MEMBERS[member](), "0"), 0.1)
    with Tables() as tables:
        model(ids).square().sum().backward()
        with torch.no_grad():
            model(ids)
    assert not tables.made


def test_no_table_is_compiled() -> None:
    ids, graphs = torch.arange(12).view(2, 6), []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = nn.Sequential(Gemma3TextScaledWordEmbedding(WORDS, 32, 0, 3.0))
    randomise(lk.adapt(model, lk.LoRA(rank=2), "0"), 0.1)
    compiled = torch.compile(
        model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True
    )
    torch.testing.assert_close(compiled(ids), model(ids))
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    sizes = {
        str(node.target): node.meta["val"].numel()
        for node in nodes
        if isinstance(node.meta.get("val"), Tensor)
    }
    assert sizes and max(sizes.values()) < 32 * WORDS, sizes
