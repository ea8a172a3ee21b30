"""Weights that are read without calling their layer, and classes with a forward of their own.

The truth is the model whose weights are the changed ones, made here in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakin as lk
from conftest import randomise

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lk.LoRA(rank=2),
    "vera": lambda: lk.VeRA(rank=4),
    "dora": lambda: lk.DoRA(rank=2),
    "adalora": lambda: lk.AdaLoRA(initial_rank=3, target_rank=2, total_steps=10),
    "delta-lora": lambda: lk.DeltaLoRA(rank=2, start_step=2),
}


class Attention(nn.Module):
    """torch's attention, which reads its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x, x, x)[0]
        return out


class TiedHead(nn.Module):
    """An embedding that is called, and read again for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.words(ids)) @ self.words.weight.T


class Times(torch.autograd.Function):
    """A product that torch's function protocol does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class IntoAFunction(nn.Module):
    """A head whose weight goes into an autograd function, as in fused losses and Mamba's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.head.weight.dtype or self.head.weight.shape[1] != x.shape[-1]:
            raise AssertionError
        out: Tensor = Times.apply(x, self.head.weight)
        return out


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.movedim(-1, -2)[:, :4], self.conv.weight, self.conv.bias)


class ScaledWords(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out.clamp(-1, 1) if self.training else (2 * out).clamp(-1, 1)


def scaled_words() -> nn.Module:
    return nn.Sequential(ScaledWords(16, 8), nn.Linear(8, 4))


READERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "attention": (Attention, ["inside.out_proj"]),
    "tied head": (TiedHead, ["words"]),
    "function": (IntoAFunction, ["head"]),
    "convolution": (Convolved, ["conv"]),
    "scaled embedding": (scaled_words, ["0"]),
    "clamped": (lambda: nn.Sequential(Clamped(8, 8)), ["0"]),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        ["linear1", "linear2"],
    ),
}
CASES = [
    (reader, method)
    for reader in READERS
    for method in METHODS
    if not (method in ("vera", "adalora") and reader in ("tied head", "scaled embedding"))
]


def inputs(reader: str) -> Tensor:
    if reader in ("tied head", "scaled embedding"):
        return torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(1))
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_changed_weights(base: nn.Module, adapter: lk.Adapter) -> nn.Module:
    """A copy of `base` whose weights are diag(g)·(W0 + up·down), trained by nobody."""
    changed = copy.deepcopy(base)
    for path in adapter.placement.methods:
        pair, module = adapter.tensors.pair_now(path), changed.get_submodule(path)
        transposed = isinstance(module, nn.Embedding)
        matrix = module.weight.detach().T if transposed else module.weight.detach().flatten(1)
        matrix = matrix + pair.up.detach() @ pair.down.detach()
        if pair.gain is not None:
            matrix = pair.gain.detach()[:, None] * matrix
        weight = matrix.T if transposed else matrix.view_as(module.weight)
        module.weight = nn.Parameter(weight.contiguous())
    return changed


@pytest.mark.parametrize(("reader", "method"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_who_reads_a_weight_reads_the_changed_one(reader: str, method: str, training: bool) -> None:
    torch.manual_seed(0)
    make, targets = READERS[reader]
    base, x = make().double().train(training), inputs(reader)
    model = copy.deepcopy(base)
    adapter = randomise(lk.adapt(model, METHODS[method](), targets, seed=0), 0.5)
    expected = with_changed_weights(base, adapter)
    want, got = expected(x), model(x)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, base(x))
    want.square().sum().backward()
    got.square().sum().backward()
    for path in targets:  # the change ∂W of the whole weight, against that of each factor
        grad = expected.get_submodule(path).weight.grad
        assert grad is not None
        grad = grad.T if isinstance(base.get_submodule(path), nn.Embedding) else grad.flatten(1)
        tensors = {
            slot: t.detach().requires_grad_()
            for slot, t in adapter.tensors.branch(path).tensors().items()
        }
        pair = adapter.tensors.branch(path).method.pair(
            tensors, adapter.tensors.branch(path).shape, adapter.tensors.base_weight(path)
        )
        weight = adapter.tensors.base_weight(path)
        whole = weight + pair.up @ pair.down
        whole = whole if pair.gain is None else pair.gain[:, None] * whole
        whole.backward(grad)
        for slot, parameter in adapter.tensors.branch(path).tensors().items():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, tensors[slot].grad)
    adapter.merge()
    torch.testing.assert_close(model(x), want)
    adapter.unmerge()
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
    adapter.remove()
    assert torch.equal(model(x), base(x))


def test_outside_of_a_forward_the_weight_is_the_bases_own() -> None:
    base = IntoAFunction()
    own = base.head.weight
    adapter = randomise(lk.adapt(base, lk.LoRA(rank=2), ["head"]))
    assert base.head.weight is own
    assert base.state_dict()["head.weight"].data_ptr() == own.data_ptr()
    with adapter.disabled():
        assert torch.equal(base(torch.ones(1, 8)), torch.ones(1, 8) @ own.T)


def test_several_adapters_add_up_where_a_weight_is_read() -> None:
    torch.manual_seed(0)
    model = IntoAFunction().double()
    x, own = torch.randn(3, 8, dtype=torch.float64), model.head.weight.detach()
    one = randomise(lk.adapt(model, lk.LoRA(rank=2), ["head"], name="one"), 0.5)
    two = randomise(lk.adapt(model, lk.DoRA(rank=2), ["head"], name="two"), 0.5, seed=2)
    lk.activate(model, ["one", "two"])
    changes = [a.tensors.pair_now("head").applied_to(own) - own for a in (one, two)]
    torch.testing.assert_close(model(x), x @ (own + sum(changes)).T)
    one.merge()
    torch.testing.assert_close(model(x), x @ (own + sum(changes)).T)


def test_a_weight_that_is_read_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    model = TiedHead()
    randomise(lk.adapt(model, lk.LoRA(rank=2), ["words"]))
    ids = torch.arange(6).view(2, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))


def test_dropout_that_cannot_act_is_said() -> None:
    model = Attention()
    lk.adapt(model, lk.LoRA(rank=2, dropout=0.5), ["out_proj"])
    with pytest.warns(lk.LorakinWarning):
        model(torch.randn(1, 2, 8))


def test_a_mixed_batch_refuses_what_it_cannot_split() -> None:
    model = Attention().eval()
    randomise(lk.adapt(model, lk.LoRA(rank=2), ["out_proj"], name="a"))
    with pytest.raises(lk.StateError), lk.mixed_batch(model, ["a", None]):
        model(torch.randn(2, 3, 8))


WAVLM = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "wavlm": (
        lambda: transformers.WavLMForSequenceClassification(transformers.WavLMConfig(**WAVLM)),
        {"input_values": torch.linspace(-1, 1, 400).view(2, 200)},
    ),
    "mamba": (
        lambda: transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64,
        hidden_size=32, num_hidden_layers=1)),
        {"input_ids": torch.arange(5, 13).view(2, 4)},
    ),
    "deberta": (
        lambda: transformers.DebertaV2Model(
            transformers.DebertaV2Config(
                vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                intermediate_size=48,
                relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8,
            )
        ),
        {"input_ids": torch.arange(5, 13).view(2, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, batch = MODELS[name]
    base = make().eval()
    model = copy.deepcopy(base)
    targets = ["rel_embeddings", "query_proj"] if name == "deberta" else "all-linear"
    heads = ["classifier", "projector"] if name == "wavlm" else []
    adapter = lk.adapt(model, lk.LoRA(rank=2), targets, modules_to_save=heads, seed=0)
    model.train()
    optimizer = adapter.optimizer(lr=1e-2)
    model(**batch)[0].square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    optimizer.step()
    model.eval()
    randomise(adapter)
    want = model(**batch)[0]
    adapter.save(tmp_path)
    other = copy.deepcopy(base)
    lk.load(other, tmp_path)
    torch.testing.assert_close(other(**batch)[0], want)
    adapter.merge()
    torch.testing.assert_close(model(**batch)[0], want, rtol=1e-4, atol=1e-5)


class Tagger(nn.Module):
    """Reads its labels' weight, calls a method of its projector, and its head's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.labels = nn.Embedding(5, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.projector = Projector()

    def forward(self, x: Tensor) -> Tensor:
        for part in self.head:
            x = part(x)
        x = self.head[0](self.projector.encode(self.body(x))) * len(self.head)
        return torch.tanh(x) @ self.labels.weight.T


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("shift", torch.ones(8))

    def encode(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shift

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it is not called")


@pytest.mark.peer
@pytest.mark.parametrize("whole", ["labels", "head", "projector"])
def test_modules_trained_whole_answer_for_their_attributes(whole: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, x = Tagger(), torch.randn(3, 8)
    if whole != "head":  # PEFT wraps a Sequential in what cannot be iterated over
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(target_modules=["body"], modules_to_save=[whole])
        )
        optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.01)
        theirs(x).square().sum().backward()
        optimizer.step()
        theirs.save_pretrained(tmp_path / "theirs")
        ours = copy.deepcopy(base)
        lk.load(ours, tmp_path / "theirs")
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    model = copy.deepcopy(base)
    adapter = lk.adapt(model, lk.LoRA(rank=2), ["body"], modules_to_save=[whole])
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.01)
    model(x).square().sum().backward()
    assert any(p.grad is not None for p in adapter.tensors.copy_of(whole).parameters())
    optimizer.step()
    want = model(x)
    assert not torch.allclose(want, base(x))
    adapter.save(tmp_path / "ours")
    loaded = copy.deepcopy(base)
    lk.load(loaded, tmp_path / "ours")
    torch.testing.assert_close(loaded(x), want)
    adapter.merge()
    torch.testing.assert_close(model(x), want)
    adapter.unmerge()
    with adapter.disabled():
        assert torch.equal(model(x), base(x))


class Checkpointed(nn.Module):
    """Checkpoints a method of its own, which is run again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.second.weight.T

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_that_is_run_again_reads_the_same_weight(method: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = (
        Checkpointed(reentrant).double(),
        torch.randn(3, 8, dtype=torch.float64, requires_grad=True),
    )
    adapter = randomise(lk.adapt(model, METHODS[method](), ["first", "second"], seed=0), 0.5)
    found = []
    for run in (model, model.body):
        x.grad = None
        for parameter in adapter.parameters():
            parameter.grad = None
        if run is model:
            model(x).square().sum().backward()
        else:
            nn.Module.__call__(Plainly(model), x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in adapter.parameters() if p.requires_grad)])
    assert all(grad is not None for grads in found for grad in grads)
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain)


class Plainly(nn.Module):
    def __init__(self, model: Checkpointed) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.body(x)
