"""Rows of tokens that train beside an adapter: as a table that holds them would."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import lorakin as lk
from conftest import MEMBERS, randomise, tiny_bert, tiny_gpt2, tiny_llama
from lorakin.inject.trainable_tokens import TokenRows

IDS = [5, 6]
BOTH = {"embed_tokens": IDS, "lm_head": IDS}


def tiny_gemma() -> Any:
    """A Gemma 3, whose embedding scales what it looks up, tied to the head."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).eval()


def tiny_t5() -> Any:
    """A T5, of whose weight there are four tied modules."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def untied() -> Any:
    return tiny_llama(tied=False)


def output(model: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


@pytest.fixture
def ids(ids: Tensor) -> Tensor:
    ids[0, 1], ids[1, 2] = IDS
    return ids


def with_tables(make: Callable[[], Any], adapter: lk.Adapter) -> Any:
    """The truth: a base whose own tables hold the rows, and train."""
    model = make().double()
    for path, rows in adapter.placement.tokens.items():
        weight = model.get_submodule(path).weight
        with torch.no_grad():
            weight[list(rows.ids)] = adapter.tensors.rows_at(path)
    return model


@pytest.mark.parametrize(
    ("make", "tokens", "tied"),
    [
        (tiny_llama, [6, 5, 0, 5], {"model.embed_tokens": ["lm_head"]}),
        (untied, IDS, {"model.embed_tokens": []}),
        (untied, {"lm_head": IDS}, {"lm_head": []}),
        (untied, BOTH, {"model.embed_tokens": [], "lm_head": []}),
        (tiny_llama, BOTH, {"model.embed_tokens": ["lm_head"]}),
        (tiny_gpt2, IDS, {"transformer.wte": ["lm_head"]}),
        (tiny_bert, IDS, {"bert.embeddings.word_embeddings": []}),
        (tiny_gemma, IDS, {"model.embed_tokens": ["lm_head"]}),
        (tiny_t5, [0, 5], {"shared": ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]}),
    ],
)
def test_forward_and_gradient_are_those_of_the_whole_table(
    make: Any, tokens: Any, tied: Any, ids: Tensor
) -> None:
    model = make().double()
    before = output(model, ids)
    adapter = lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=tokens)
    model.eval()
    assert {path: list(rows.tied) for path, rows in adapter.placement.tokens.items()} == tied
    torch.testing.assert_close(output(model, ids), before, rtol=0, atol=1e-12)
    randomise(adapter, 0.3)
    truth = with_tables(make, adapter)
    want, got = output(truth, ids), output(model, ids)
    assert not torch.allclose(want, before, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    for out in (want, got):
        out.tanh().square().sum().backward()
    for path, rows in adapter.placement.tokens.items():
        whole = truth.get_submodule(path).weight.grad
        torch.testing.assert_close(
            adapter.tensors.rows_at(path).grad, whole[list(rows.ids)], rtol=1e-9, atol=1e-12
        )


def test_rows_of_tokens_that_a_batch_lacks_get_a_zero_gradient(ids: Tensor) -> None:
    model = untied()
    adapter = lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=[1, 5])
    model(input_ids=ids, labels=ids).loss.backward()
    grad = adapter.tensors.rows_at("model.embed_tokens").grad
    assert grad is not None and not grad[0].any() and grad[1].any()


class Reader(nn.Module):
    """Reads the weight of its table and of its tied head instead of calling them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.table, self.head = how, nn.Embedding(64, 8), nn.Linear(8, 64)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "call":
            return self.head(self.table(x).sin())
        weight = self.table.weight
        hidden = F.embedding(x, weight).sin().to(weight.dtype)
        if self.how == "linear":
            return F.linear(hidden, self.head.weight, self.head.bias)
        product = hidden @ weight.t() if self.how == "product" else Product.apply(hidden, weight)
        return product + self.head.bias


class Product(torch.autograd.Function):
    """h·Wᵀ, as a fused loss computes it, past torch's functions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).t() @ hidden.flatten(0, 1)


@pytest.mark.parametrize("how", ["call", "linear", "product", "function"])
def test_who_reads_the_weight_sees_the_rows(how: str, ids: Tensor) -> None:
    model = Reader(how).double()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens={"table": IDS}))
    truth = with_tables(lambda: Reader("call"), adapter)
    for out in (got := model(ids), want := truth(ids)):
        out.tanh().square().sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        adapter.tensors.rows_at("table").grad, truth.table.weight.grad[IDS], rtol=1e-10, atol=1e-12
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), want, rtol=0, atol=1e-12)
    assert torch.equal(model.table.weight, Reader(how).double().table.weight), (
        "outside a forward it is the base's own"
    )


@pytest.mark.parametrize("make", [tiny_llama, untied, tiny_gemma])
def test_compiled_whole(make: Any, ids: Tensor) -> None:
    model = make()
    model.model.layers = model.model.layers[:1]
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), trainable_tokens=IDS))
    want = output(model, ids)
    got = output(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    grads = []
    for out in (want, got):
        out.square().sum().backward()
        grads.append([p.grad for p in adapter.parameters()])
        adapter.model.zero_grad()
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [tiny_llama, untied, tiny_gemma])
def test_merging_off_and_out_give_the_base_back_to_the_bit(make: Any, ids: Tensor) -> None:
    model = make()
    before, tied = copy.deepcopy(model.state_dict()), model.config.tie_word_embeddings
    base, table, head = (
        output(model, ids),
        model.get_input_embeddings().weight,
        model.lm_head.weight,
    )
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=BOTH), 0.3)
    model.eval()
    out = output(model, ids)
    adapter.merge()
    torch.testing.assert_close(output(model, ids), out, rtol=0, atol=1e-5)
    merged = model.get_input_embeddings().weight
    assert (
        merged is not table
        and (model.lm_head.weight is merged) is tied is model.config.tie_word_embeddings
    )
    with adapter.disabled():
        assert torch.equal(output(model, ids), base)
    assert model.get_input_embeddings().weight is not table
    adapter.unmerge()
    assert model.get_input_embeddings().weight is table and model.lm_head.weight is head
    assert torch.equal(output(model, ids), out)
    lk.activate(model, [])
    assert torch.equal(output(model, ids), base)
    adapter.remove()
    assert model.state_dict().keys() == before.keys() and type(model.lm_head) is nn.Linear
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    randomise(lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=BOTH), 0.3).merge(
        permanent=True
    )
    torch.testing.assert_close(output(model, ids), out, rtol=0, atol=1e-5)
    assert (
        model.lm_head.weight is model.get_input_embeddings().weight
    ) is tied and not lk.adapters(model)


def test_several_adapters(ids: Tensor) -> None:
    model = tiny_llama()
    for seed, (name, tokens) in enumerate({"a": IDS, "b": [7], "c": [6]}.items()):
        randomise(
            lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=tokens, name=name), 0.3, seed
        )
    alone = {}
    for name in "ab":
        lk.activate(model, name)
        alone[name] = output(model, ids)
    lk.activate(model, [])
    base = output(model, ids)
    with lk.mixed_batch(model, ["a", "b"]):
        mixed = output(model, ids)
    torch.testing.assert_close(
        mixed, torch.stack([alone["a"][0], alone["b"][1]]), rtol=0, atol=1e-5
    )
    with lk.mixed_batch(model, [None, "b"]):
        torch.testing.assert_close(output(model, ids)[0], base[0], rtol=0, atol=1e-6)
    with pytest.raises(lk.SettingError, match="'a' and 'c'.* 6 "):
        lk.activate(model, ["a", "c"])
    lk.activate(model, ["a", "b"])
    both = output(model, ids)
    assert not torch.allclose(both, alone["a"], atol=1e-3)
    for name in "ab":
        lk.adapters(model)[name].merge()
    torch.testing.assert_close(output(model, ids), both, rtol=0, atol=1e-5)
    with pytest.raises(lk.StateError, match=" 6 "):
        lk.adapters(model)["c"].merge()
    torch.testing.assert_close(output(model, ids), both, rtol=0, atol=1e-5)
    for name in "ab":
        lk.adapters(model)[name].unmerge()
    lk.combine(model, {"a": 1.0, "b": 1.0, "c": 0.0}, "sum")
    torch.testing.assert_close(output(model, ids), both, rtol=0, atol=1e-5)


def test_a_weighted_sum_of_the_same_row() -> None:
    model = tiny_llama()
    rows = {}
    for seed, name in enumerate("ab"):
        adapter = randomise(
            lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=[5, 6 + seed], name=name),
            0.3,
            seed,
        )
        rows[name] = adapter.tensors.rows_at("model.embed_tokens").detach()
    base = model.model.embed_tokens.weight.detach()
    made = lk.combine(model, {"a": 0.5, "b": -2.0}, "sum").adapter
    want = base[[5, 6, 7]] + torch.stack(
        [0.5 * (rows["a"][0] - base[5]), 0.5 * (rows["a"][1] - base[6]), 0 * base[7]]
    )
    want -= 2.0 * torch.stack([rows["b"][0] - base[5], 0 * base[6], rows["b"][1] - base[7]])
    assert made.placement.tokens == {"model.embed_tokens": TokenRows((5, 6, 7), ("lm_head",))}
    torch.testing.assert_close(made.tensors.rows_at("model.embed_tokens"), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("word", MEMBERS)
def test_every_member_trains_them_saves_them_and_loads_them(
    word: str, tied: bool, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama(tied)
    start = model.model.embed_tokens.weight[IDS].clone()
    probe = [{"input_ids": ids, "labels": ids}] if word == "lora-drop" else None
    adapter = lk.adapt(model, MEMBERS[word](), trainable_tokens=IDS, probe=probe)
    optimizer = adapter.optimizer(lr=1e-2, total_steps=6)
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (adapter.tensors.rows_at("model.embed_tokens") - start).norm(dim=1).min() > 1e-2
    out = output(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lk.LorakinWarning)
        adapter.save(tmp_path / "a")
    loaded = tiny_llama(tied)
    again = lk.load(loaded, tmp_path / "a", trainable=True)
    torch.testing.assert_close(output(loaded, ids), out, rtol=0, atol=1e-5)
    assert (
        again.placement.tokens == adapter.placement.tokens
        and again.trainable_parameters == adapter.trainable_parameters
    )
    saved = adapter.tensors.rows_at("model.embed_tokens").detach().clone()
    randomise(adapter).restore(tmp_path / "a")
    assert torch.equal(adapter.tensors.rows_at("model.embed_tokens"), saved)
    with pytest.raises(lk.SettingError):
        lk.as_lora(adapter, "portable", rank=4, portable=True)


def test_decay_is_zero_unless_it_is_asked_for(ids: Tensor) -> None:
    adapter = lk.adapt(tiny_llama(), lk.LoRA(rank=2), "none", trainable_tokens=IDS)
    assert [group["weight_decay"] for group in adapter.optimizer(lr=1e-2).param_groups] == [0.0]
    (group,) = adapter.parameter_groups(lr=1e-2, weight_decay=0.1)
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 1, (
        "the tied head's are the same"
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"trainable_tokens": [64]},
            lk.SettingError,
            "64",
        ),
        ({"trainable_tokens": [-1]}, lk.SettingError, "-1"),
        ({"trainable_tokens": "5"}, lk.SettingError, "convert_tokens_to_ids"),
        ({"trainable_tokens": ["<|a|>"]}, lk.SettingError, "convert_tokens_to_ids"),
        ({"trainable_tokens": [True]}, lk.SettingError, "True"),
        ({"trainable_tokens": 5}, lk.SettingError, "5"),
        ({"trainable_tokens": {"lm_head": []}}, lk.SettingError, "lm_head"),
        ({"trainable_tokens": {"wte": [1]}}, lk.TargetError, "'wte'"),
        ({"trainable_tokens": {"norm": [1]}}, lk.TargetError, "model.norm"),
        (
            {"trainable_tokens": [5], "targets": ["embed_tokens"]},
            lk.TargetError,
            "embed_tokens",
        ),
        (
            {"trainable_tokens": [5], "targets": ["lm_head"]},
            lk.TargetError,
            "lm_head",
        ),
        (
            {"trainable_tokens": [5], "modules_to_save": ["embed_tokens"]},
            lk.TargetError,
            "modules_to_save",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    settings: dict[str, Any], error: Any, message: str
) -> None:
    model = tiny_llama()
    with pytest.raises(error, match=message):
        lk.adapt(model, lk.LoRA(rank=2), **settings)
    assert not lk.adapters(model) and type(model.model.embed_tokens) is nn.Embedding


def test_a_tied_head_that_is_trained_whole_keeps_its_own(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = lk.adapt(
        model, lk.LoRA(rank=2), "none", trainable_tokens=IDS, modules_to_save=["lm_head"]
    )
    assert adapter.placement.tokens == {"model.embed_tokens": TokenRows((5, 6))}
    before = output(model, ids[:, :1])
    randomise(adapter, 0.3)
    assert not torch.allclose(output(model, ids[:, :1]), before, atol=1e-3)


def test_two_ways_on_one_module_are_refused() -> None:
    model = tiny_llama()
    lk.adapt(model, lk.LoRA(rank=2), ["embed_tokens"], name="pair")
    with pytest.raises(lk.StateError, match="model.embed_tokens"):
        lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=IDS, name="rows")
    assert list(lk.adapters(model)) == ["pair"]


def test_a_table_resized_under_its_rows_is_an_error(ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=IDS)
    model.resize_token_embeddings(70)
    for use in (lambda: model(ids), adapter.merge, lambda: adapter.save(tmp_path)):
        with pytest.raises(lk.StateError, match="70 × 32"):
            use()


def test_a_model_that_names_no_embedding() -> None:
    two = nn.ModuleDict({"one": nn.Embedding(8, 4), "two": nn.Embedding(8, 4)})
    with pytest.raises(lk.TargetError):
        lk.adapt(two, lk.LoRA(rank=2), "none", trainable_tokens=[1])
    adapter = lk.adapt(
        nn.Sequential(nn.Embedding(8, 4)),
        lk.LoRA(rank=2),
        "none",
        trainable_tokens=torch.tensor([1]),
    )
    assert adapter.placement.tokens == {"0": TokenRows((1,))}


@pytest.mark.parametrize("tied", [True, False])
def test_rows_come_along_where_the_model_is_offloaded_later(tied: bool, ids: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama(tied)
    randomise(lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=BOTH), 0.3)
    want = output(model, ids)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.model.embed_tokens.lorakin.default.rows.is_meta
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(output(model, ids), want, rtol=0, atol=1e-6)


def test_a_quantised_head_is_refused_and_the_embedding_beside_it_not(ids: Tensor) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_llama(tied=False, dtype=torch.bfloat16)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(lk.TargetError, match="lm_head"):
        lk.adapt(model, lk.LoRA(rank=2), trainable_tokens=BOTH)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=IDS))
    got = model.model.embed_tokens(ids)
    assert torch.equal(
        got[0, 1], adapter.tensors.rows_at("model.embed_tokens")[0].to(torch.bfloat16)
    )
    output(model, ids).float().sum().backward()
    assert adapter.tensors.rows_at("model.embed_tokens").grad.any()


@pytest.mark.parametrize("make", [tiny_llama, untied])
def test_fused_models_train_the_same(make: Any, ids: Tensor) -> None:
    grads = []
    for fused in (False, True):
        model = make()
        if fused:
            lk.fuse(model)
        adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), trainable_tokens=BOTH))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)
