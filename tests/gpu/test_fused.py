"""`lk.fuse` on a GPU: Liger's kernels give the unfused model's values, from float64 no farther."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_llama
from gpu.common import GPU, SINGLE, KernelCount, adapted, moved_from_start
from lorakin.inject.llama_fusions import MIXINS
from lorakin.kernels.cross_entropy import CrossEntropy, summed_cross_entropy
from lorakin.kernels.gate import gated_silu
from lorakin.kernels.liger_operators import FAKES
from lorakin.kernels.norm import rms_norm
from lorakin.kernels.rotary import in_place_of, plainly_rotated

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="Liger is not installed"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(GPU, dtype).requires_grad_()


def few_tokens() -> dict[str, Tensor]:
    """A batch for a model: each token is a program of most kernels."""
    ids = torch.tensor([[3, 4, 5, 6, 7]], device=GPU)
    labels = torch.tensor([[-100, -100, 5, 6, 7]], device=GPU)
    return {"input_ids": ids, "labels": labels}


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """What a function returns, and the gradients of its inputs."""
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(GPU, out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_as_close(function: Any, replaced: Any, exact: Any, *inputs: Tensor) -> None:
    """Values and gradients are as close to float64's as those of what is replaced."""
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = with_gradients(exact, *wide)
    theirs = [
        (tensor - true).norm()
        for tensor, true in zip(with_gradients(replaced, *inputs), truth, strict=True)
    ]
    ours = [
        (tensor - true).norm()
        for tensor, true in zip(with_gradients(function, *inputs), truth, strict=True)
    ]
    for own, their, true in zip(ours, theirs, truth, strict=True):
        assert own <= 1.05 * their + 1e-7 * true.norm(), (own, their)


@KINDS
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 130)], ids=str)
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def llamas(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * wide.to(x.dtype)

    x, weight = numbers(*shape, dtype=dtype), numbers(shape[-1], seed=1, dtype=dtype)
    assert_as_close(lambda x, w: rms_norm(x, w, 1e-6), llamas, llamas, x, weight)


@KINDS
def test_gate(dtype: torch.dtype) -> None:
    def llamas(gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate) * up

    gate, up = (numbers(3, 5, 30, seed=seed, dtype=dtype) for seed in (2, 3))
    assert_as_close(gated_silu, llamas, llamas, gate, up)


@KINDS
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary(dtype: torch.dtype, rows: int) -> None:
    """Queries come as a view of what a linear layer returned; there may be one row of angles."""
    x = numbers(2, 5, 3, 12, dtype=dtype)
    cos, sin = (numbers(rows, 5, 12, seed=seed, dtype=dtype).detach() for seed in (1, 2))
    rotary = in_place_of(lambda *others: pytest.fail("not by our kernel"))

    def exact(x: Tensor) -> Tensor:
        return plainly_rotated(x.transpose(1, 2), cos.double(), sin.double())

    assert_as_close(
        lambda x: rotary(x.transpose(1, 2), x.transpose(1, 2)[:, :1], cos, sin)[0],
        lambda x: plainly_rotated(x.transpose(1, 2), cos, sin),
        exact,
        x,
    )


@KINDS
def test_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakin.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "BLOCK_ELSEWHERE", 4 * 50)
    monkeypatch.setattr(cross_entropy, "ROWS", 1)
    hidden, weight = numbers(11, 16, dtype=dtype), numbers(50, 16, seed=1, dtype=dtype).detach()
    target = torch.tensor([0, 49, -7, 3, 3, -7, 20, 7, -7, 1, 2], device=GPU)

    def exact(hidden: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            hidden @ weight.double().T, target, ignore_index=-7, reduction="sum"
        )

    assert_as_close(
        lambda h: summed_cross_entropy(h, weight, target, -7),
        lambda h: CrossEntropy.apply(h, weight, target, -7),
        exact,
        hidden,
    )
    with pytest.raises(RuntimeError, match="not one of the classes"):
        summed_cross_entropy(hidden, weight, target + 1, -6)


def test_nothing_is_written_over() -> None:
    """Others may still read what was given: hooks, adapters that keep it, a second backward."""
    x, weight = numbers(4, 24), numbers(24, seed=1)
    gate, up = numbers(4, 30, seed=2), numbers(4, 30, seed=3)
    for function, inputs in (
        (lambda x, w: rms_norm(x, w, 1e-6), (x, weight)),
        (gated_silu, (gate, up)),
    ):
        before = [tensor.detach().clone() for tensor in inputs]
        out = function(*inputs)
        grad = torch.ones_like(out)
        first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        again = torch.autograd.grad(out, inputs, grad)
        assert all(map(torch.equal, first, again))
        assert all(map(torch.equal, before, inputs)) and torch.equal(grad, torch.ones_like(out))


def step(model: Any, batch: dict[str, Tensor], autocast: torch.dtype | None) -> list[Tensor]:
    """The loss and the gradients of all that trains."""
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast("cuda", autocast) if autocast else contextlib.nullcontext():
        loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "autocast": {"autocast": torch.bfloat16},
    "checkpointed": {"reentrant": False},
    "reentrant": {"reentrant": True},
}
WAYS = [(words, "plain") for words in SINGLE] + [
    (words, how) for words in (("lora",), ("dora",)) for how in HOW if how != "plain"
]


@pytest.mark.parametrize(("words", "how"), WAYS, ids=[f"{w[0]}, {how}" for w, how in WAYS])
def test_a_step_is_that_of_the_unfused_model(words: tuple[str, ...], how: str) -> None:
    """With adapters on every linear layer, which recompute the outputs of norms and gates."""
    settings = HOW[how]
    dtype = settings.get("dtype", torch.float32)
    model = tiny_llama(dtype=dtype, num_hidden_layers=1).to(GPU)
    model.enable_input_require_grads()
    if "reentrant" in settings:
        model.gradient_checkpointing_enable({"use_reentrant": settings["reentrant"]})
        model.config.use_cache = False
    adapter, _ = adapted(model, words, GPU, targets="all-linear")
    moved_from_start(adapter)
    batch = few_tokens()
    model.train()

    unfused = step(model, batch, settings.get("autocast"))
    wide = copy.deepcopy(model).double()
    truth = step(wide, batch, None)
    assert lk.fuse(model) == 3 + 1 + 1 + 1
    fused = step(model, batch, settings.get("autocast"))
    lk.unfuse(model)
    assert not any(isinstance(m, MIXINS) for m in model.modules())
    assert all(map(torch.equal, step(model, batch, settings.get("autocast")), unfused))

    def error(got: list[Tensor]) -> Tensor:
        off = [(g.double() - t).flatten() for g, t in zip(got[1:], truth[1:], strict=True)]
        return torch.cat(off).norm()

    size = torch.cat([t.flatten() for t in truth[1:]]).norm()
    # In a narrow dtype each error is one draw.
    assert error(fused) <= 1.5 * error(unfused) + 1e-6 * size
    torch.testing.assert_close(fused[0], unfused[0], rtol=1e-3, atol=0, check_dtype=False)


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma", "phi"])
def test_other_models(kind: str) -> None:
    """Norms of queries and keys, other norms, other MLPs, and rotation of a part of each head."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(GPU).train()
    batch = few_tokens()
    unfused = step(model, batch, None)
    lk.fuse(model)
    for got, want in zip(step(model, batch, None), unfused, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_norms_that_train() -> None:
    model = tiny_llama().to(GPU).train()
    batch = few_tokens()
    unfused = step(model, batch, None)
    lk.fuse(model)
    for got, want in zip(step(model, batch, None), unfused, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_kernels_and_waits_of_a_fused_model() -> None:
    """Beside the linear layers: a norm takes 1 + 2, a gate 1 + 1, rotary 2 + 2, a block of the loss 3."""
    counts: dict[bool, list[KernelCount]] = {}
    model = tiny_llama(dtype=torch.bfloat16).to(GPU).requires_grad_(False).train()
    model.enable_input_require_grads()
    batch = few_tokens()
    for fused in (False, True):
        if fused:
            lk.fuse(model)
        counts[fused] = [KernelCount(), KernelCount()]
        with counts[fused][0]:
            loss = model(**batch).loss
        with counts[fused][1]:
            loss.backward()
        assert [launch for count in counts[fused] for launch in count.waits] == []
    ours = {name: [count.of(name) for count in counts[True]] for name in FAKES}
    assert ours == {
        "rms_norm": [5, 0], "rms_norm_backward": [0, 2 * 5], "rms_norm_backward_of_both": [0, 0],
        "gated": [2, 0], "gated_backward": [0, 2], "rotated": [4, 4],
        "softmax_less_target": [1, 0],
    }  # fmt: skip
    saved = [was.kernels - now.kernels for was, now in zip(*counts.values(), strict=True)]
    assert saved[0] >= 42 and saved[1] >= 88


def test_an_output_that_layers_read_is_recomputed_once() -> None:
    model = tiny_llama().to(GPU).train()
    model.enable_input_require_grads()
    lk.adapt(model, lk.LoRA(rank=3), "all-linear", seed=0)
    lk.fuse(model)
    loss = model(**few_tokens()).loss
    with KernelCount() as count:
        loss.backward()
    assert count.of("rms_norm") == 2 * 2, "for q, k and v, and for gate and up"
    assert count.of("gated") == 2


def test_without_liger_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the user learns once how to get it."""
    from lorakin.kernels import liger_operators

    model = tiny_llama().to(GPU).train()
    randomise(lk.adapt(model, lk.LoRA(rank=3), seed=0))
    batch = few_tokens()
    lk.fuse(model)
    with_liger = step(model, batch, None)
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel.ops.swiglu", None)
    liger_operators._work_on.cache_clear()
    try:
        with pytest.warns(lk.LorakinWarning, match=r"lorakin\[gpu\]") as told:
            without = step(model, batch, None)
    finally:
        liger_operators._work_on.cache_clear()
    assert len(told) == 1
    for got, want in zip(without, with_liger, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
