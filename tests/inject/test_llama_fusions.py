"""Light norms, gates and losses: transformers' own values and gradients, in less memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lorakin as lk
from conftest import randomise, tiny_gpt2, tiny_llama
from family.problem import saved_bytes
from lorakin.inject.llama_fusions import LightGate, LightHead, LightNorm
from lorakin.kernels.lazy_logits import LazyLogits

METHODS: dict[str, Any] = {
    "lora": lk.LoRA(rank=3),
    "lora with dropout": lk.LoRA(rank=3, dropout=0.3),
    "lora-fa": lk.LoRAFA(rank=3),
    "vera": lk.VeRA(rank=5),
    "dora": lk.DoRA(rank=3),
    "adalora": lk.AdaLoRA(initial_rank=4),
    "lora-fa,dora": [lk.LoRAFA(rank=3), lk.DoRA()],
}


def labelled(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, :4] = -100
    return labels


def trained_step(model: Any, ids: Tensor, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of all that trains."""
    torch.manual_seed(seed)
    loss = model(ids, labels=labelled(ids)).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("order", ["fuse first", "adapt first"])
@pytest.mark.parametrize("method", METHODS)
def test_a_fused_model_trains_as_before(method: str, order: str, ids: Tensor) -> None:
    model = tiny_llama().train()
    if order == "fuse first":
        assert lk.fuse(model) == 5 + 2 + 2 + 1
    randomise(lk.adapt(model, METHODS[method], seed=0))
    if order == "adapt first":
        assert lk.fuse(model) == 5 + 2 + 2 + 1
    loss, gradients = trained_step(model, ids)
    lk.unfuse(model)
    assert not any(
        isinstance(module, LightNorm | LightGate | LightHead) for module in model.modules()
    )
    expected, wanted = trained_step(model, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_in_bfloat16_gradients_are_as_close_to_float64_as_before(method: str, ids: Tensor) -> None:
    model = tiny_llama(dtype=torch.bfloat16).train()
    randomise(lk.adapt(model, METHODS[method], seed=0), 0.05)
    exact = trained_step(copy.deepcopy(model).double(), ids)[1]
    errors = []
    for light in (False, True):
        if light:
            lk.fuse(model)
        got = trained_step(model, ids)[1]
        errors.append(
            torch.cat([(g.double() - e).flatten() for g, e in zip(got, exact, strict=True)]).norm()
        )
    assert errors[1] < 1.4 * errors[0]


def test_the_forward_is_the_same_to_the_bit(ids: Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(dtype=dtype).train()
        randomise(lk.adapt(model, lk.LoRA(rank=3)))
        before = model(ids).logits
        lk.fuse(model)
        assert torch.equal(model(ids).logits + 0, before)
        model.eval()
        assert type(model(ids).logits) is Tensor, "evaluation gets its logits"
        assert torch.equal(model(ids).logits, before)


def test_gradient_checkpointing(ids: Tensor) -> None:
    model = tiny_llama().train()
    randomise(lk.adapt(model, lk.LoRA(rank=3, dropout=0.3)))
    lk.fuse(model)
    loss, gradients = trained_step(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, others = trained_step(model, ids)
    torch.testing.assert_close(loss, again)
    for got, want in zip(gradients, others, strict=True):
        torch.testing.assert_close(got, want)


def test_norms_that_train_get_their_gradient(ids: Tensor) -> None:
    model = tiny_llama().train()
    _, wanted = trained_step(model, ids)
    lk.fuse(model)
    _, gradients = trained_step(model, ids)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_what_backward_keeps_of_a_block() -> None:
    """Norm and gate keep only their inputs, although seven adapted layers read their outputs."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=8,
    )
    model = transformers.LlamaModel(config).train()
    lk.adapt(model, lk.LoRA(rank=2))
    norm, mlp, x = (
        model.layers[0].input_layernorm,
        model.layers[0].mlp,
        torch.randn(2, 50, 64, requires_grad=True),
    )
    block = nn.Sequential(norm, mlp)
    before = saved_bytes(block, x)
    lk.fuse(block)
    after = saved_bytes(block, x)
    numbers = 100 * 4
    kept = numbers * (64 + 1 + 2 * 160 + 3 * 2)
    assert after <= kept + 4 * 2 * 3 * (64 + 160) * 2 + 1000, (
        "x, its scale, gate, up, the products with A"
    )
    assert after < 0.65 * before


def test_copies_pickles_and_files_know_the_own_classes(ids: Tensor, tmp_path: Any) -> None:
    model = tiny_llama()
    lk.fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)
        lk.unfuse(other)
        assert type(other.lm_head) is nn.Linear
    assert lk.fuse(model) == 0, "twice is once"
    model.save_pretrained(tmp_path)
    assert torch.equal(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits,
        model(ids).logits,
    )


def test_an_adapted_head_is_right_and_comes_off_first(ids: Tensor) -> None:
    model = tiny_llama().train()
    lk.fuse(model)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=3), ["lm_head", "q_proj"]))
    loss, gradients = trained_step(model, ids)
    with pytest.raises(lk.StateError, match="lm_head"):
        lk.unfuse(model)
    plain = tiny_llama().train()
    other = lk.adapt(plain, lk.LoRA(rank=3), ["lm_head", "q_proj"])
    with torch.no_grad():
        for mine, its in zip(other.parameters(), adapter.parameters(), strict=True):
            mine.copy_(its)
    expected, wanted = trained_step(plain, ids)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    adapter.remove()
    lk.unfuse(model)
    assert type(model.lm_head) is nn.Linear


def test_a_model_of_another_kind_is_refused_and_other_norms_stay(ids: Tensor) -> None:
    with pytest.raises(lk.SettingError, match="Sequential"):
        lk.fuse(nn.Sequential(nn.Linear(2, 2)))
    gpt2 = tiny_gpt2()
    assert lk.fuse(gpt2) == 1, "the head alone"
    config = transformers.GemmaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
        vocab_size=64,
    )  # fmt: skip
    gemma = transformers.GemmaForCausalLM(config).train()  # 1 + w, GELU
    _, wanted = trained_step(gemma, ids)
    assert lk.fuse(gemma) == 2, "the head, and on a GPU its rotary embedding"
    for got, want in zip(trained_step(gemma, ids)[1], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Clamped(nn.Module):
    """An MLP with the names of a gated one, that does something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(8, 12),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(
            self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x)
        )
        return hidden


class ClampedMLP(Clamped):
    pass


def test_an_mlp_that_does_more_is_left_as_it_is() -> None:
    model = nn.Sequential(ClampedMLP(), nn.Linear(8, 8))
    with pytest.raises(lk.SettingError):
        lk.fuse(model)


def test_an_attention_uses_the_functions_that_its_file_has_now(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward runs with one name changed; what others patch there stays patched."""
    from transformers.models.llama import modeling_llama

    model = tiny_llama().eval()
    model.set_attn_implementation("eager")
    before = model(ids, output_attentions=True)
    lk.fuse(model)
    after = model(ids, output_attentions=True)
    assert torch.equal(after.logits, before.logits)
    assert all(map(torch.equal, after.attentions, before.attentions))

    own = modeling_llama.apply_rotary_pos_emb
    for name in ("apply_rotary_pos_emb", "eager_attention_forward"):
        calls: list[int] = []
        plain = getattr(modeling_llama, name)
        with monkeypatch.context() as patched:
            patched.setattr(
                modeling_llama, name, lambda *a, f=plain, n=calls, **k: (n.append(1), f(*a, **k))[1]
            )
            model(ids)
        assert len(calls) == 2, name
    assert modeling_llama.apply_rotary_pos_emb is own


class Turning(nn.Module):
    """Has an attention that rotates, and nothing else to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = tiny_llama().model.layers[0].self_attn


def test_an_attention_alone_is_nothing_to_fuse() -> None:
    with pytest.raises(lk.SettingError, match="Turning"):
        lk.fuse(Turning())


def test_a_norm_that_is_trained_whole_goes_on_training(ids: Tensor) -> None:
    for order in ("fuse", "adapt"):
        model = tiny_llama().train()
        if order == "fuse":
            lk.fuse(model)
        adapter = lk.adapt(model, lk.LoRA(rank=3), modules_to_save=["norm"])
        if order == "adapt":
            lk.fuse(model)
        model(ids, labels=ids).loss.backward()
        assert adapter.tensors.copy_of("model.norm").weight.grad.any(), order  # type: ignore[union-attr, operator]
        adapter.remove()
        lk.unfuse(model)
        assert type(model.model.norm) is transformers.models.llama.modeling_llama.LlamaRMSNorm


def test_a_hook_may_change_what_a_norm_gives(ids: Tensor) -> None:
    """Then it is kept, not made again."""
    gradients = []
    for light in (False, True):
        model = tiny_llama().train()
        randomise(lk.adapt(model, lk.LoRA(rank=3), seed=0))
        model.model.layers[0].input_layernorm.register_forward_hook(
            lambda module, args, out: (out.mul_(3), None)[1]
        )
        if light:
            lk.fuse(model)
        gradients.append(trained_step(model, ids)[1])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def deferred(dtype: torch.dtype = torch.float32) -> tuple[LazyLogits, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 10, dtype=dtype, requires_grad=True)
    weight = torch.randn(23, 10, dtype=dtype)
    return LazyLogits.of(hidden, weight), hidden, hidden @ weight.T


def test_the_loss_of_deferred_logits_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakin.kernels import cross_entropy as module

    monkeypatch.setitem(module.BLOCK_OF_LOGITS, "cpu", 23 * 4)  # four tokens at a time
    monkeypatch.setattr(module, "ROWS", 1)
    logits, hidden, real = deferred(torch.float64)
    target = torch.randint(0, 23, (21,))
    target[5:9] = -100
    for reduction in ("mean", "sum"):
        loss = cross_entropy(logits.view(-1, 23), target, reduction=reduction)
        want = cross_entropy(real.view(-1, 23), target, reduction=reduction)
        assert "CrossEntropyBackward" in str(loss.grad_fn.next_functions) + str(loss.grad_fn), (
            "not the fused path"
        )
        torch.testing.assert_close(loss, want)
        for got, expected in zip(
            torch.autograd.grad(3 * loss, hidden),
            torch.autograd.grad(3 * want, hidden),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
        real = hidden @ logits.weight.T


def test_a_loss_of_nothing_is_what_it_was() -> None:
    logits, _, real = deferred()
    target = torch.full((21,), -100)
    assert torch.isnan(cross_entropy(logits.view(-1, 23), target)) and torch.isnan(
        cross_entropy(real.view(-1, 23), target)
    )
    assert cross_entropy(logits.view(-1, 23), target, reduction="sum") == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t[:, :-1],
        lambda t: t[..., :-1, :].contiguous().view(-1, 23),
        lambda t: t[:, 2:5].float().flatten(0, 1),
        lambda t: t.to(torch.float64).reshape(21, -1),
        lambda t: t.view(3, 7, 23),
        lambda t: t.view(-1),
        lambda t: t.reshape(3, -1),
        lambda t: t[0],
        lambda t: t[:, :, 3],
        lambda t: t[..., 2:4],
        lambda t: t[t.argmax(-1) > 3],
        lambda t: t.flatten(),
        lambda t: t.softmax(-1),
        lambda t: t.argmax(-1),
        lambda t: t + 1,
        lambda t: 1 - t,
        lambda t: torch.stack([t, t]),
        lambda t: torch.cat([t, t], dim=0),
        lambda t: t.detach().clone(),
        lambda t: t.sum(),
        lambda t: t.half(),
        lambda t: t.transpose(0, 1),
        lambda t: cross_entropy(t.view(-1, 23), torch.arange(21), label_smoothing=0.1),
        lambda t: cross_entropy(t.view(-1, 23), torch.arange(21), reduction="none"),
        lambda t: cross_entropy(t.view(-1, 23), torch.arange(21), weight=torch.arange(23.0)),
        lambda t: cross_entropy(t.transpose(1, 2), torch.arange(21).view(3, 7)),
        lambda t: cross_entropy(t.view(-1, 23), torch.ones(21, 23) / 23),
        lambda t: torch.tensor(t.tolist()),
        lambda t: torch.tensor([t.max().item()]),
        lambda t: torch.from_numpy(t.detach().numpy()),
    ],
)  # fmt: skip
def test_whatever_is_asked_of_deferred_logits_they_answer(use: Any) -> None:
    logits, _, real = deferred()
    got, want = use(logits), use(real)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.computed() if isinstance(got, LazyLogits) else got, want)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.__setitem__((..., slice(5, None)), -1e4),
        lambda t: t.div_(0.1),
        lambda t: t.masked_fill_(torch.arange(23) > 20, -1e4),
        lambda t: t.clamp_(max=0.5),
    ],
)
def test_what_is_written_into_deferred_logits_stays(write: Any) -> None:
    logits, hidden, real = deferred()
    target = torch.arange(21) % 5
    write(logits)
    real = real.clone()
    write(real)
    got, want = (cross_entropy(t.view(-1, 23), target) for t in (logits, real))
    torch.testing.assert_close(got, want)
    for mine, its in zip(
        torch.autograd.grad(got, hidden), torch.autograd.grad(want, hidden), strict=True
    ):
        torch.testing.assert_close(mine, its)


class Doubled(torch.autograd.Function):
    """Somebody's own function, which autograd hands its arguments past Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_gradients_reach_the_hidden_states_through_others_functions() -> None:
    logits, hidden, real = deferred()
    assert logits.requires_grad
    got = torch.autograd.grad(Doubled.apply(logits).square().sum(), hidden)[0]
    want = torch.autograd.grad(Doubled.apply(real).square().sum(), hidden)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("target", "more"),
    [
        (torch.full((21,), -1), {}),
        (torch.full((21,), 23), {}),
        (torch.zeros(20, dtype=torch.long), {}),
        (torch.zeros(1, dtype=torch.long), {}),
        (torch.zeros(21, dtype=torch.int32), {}),
    ],
)
def test_targets_that_torch_refuses_are_refused(target: Tensor, more: dict[str, Any]) -> None:
    logits, _, real = deferred()
    with pytest.raises((IndexError, ValueError, RuntimeError)) as theirs:
        cross_entropy(real.view(-1, 23), target, **more)
    with pytest.raises(type(theirs.value)):
        cross_entropy(logits.view(-1, 23), target, **more)


def test_what_is_ignored_may_be_anything() -> None:
    logits, hidden, real = deferred()
    target = torch.arange(21) % 5
    target[3] = 300
    torch.testing.assert_close(
        *(cross_entropy(t.view(-1, 23), target, ignore_index=300) for t in (logits, real))
    )
    with torch.no_grad():
        hidden[0, 3] = float("nan")
    loss = cross_entropy(
        LazyLogits.of(hidden, logits.weight).view(-1, 23), target, ignore_index=300
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.isfinite(loss)
    assert not gradient[0, 3].any()
    assert torch.isfinite(gradient).all()


def test_a_scaled_loss_in_float16_does_not_overflow() -> None:
    logits, hidden, _ = deferred(torch.float16)
    target = torch.arange(21) % 5
    loss = cross_entropy(logits.float().view(-1, 23), target) * 2.0**17
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_reading_the_form_of_deferred_logits_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, _, real = deferred()
    monkeypatch.setattr(LazyLogits, "computed", lambda self: pytest.fail("computed"))
    assert (logits.shape, logits.ndim, logits.dtype, logits.device) == (
        real.shape,
        real.ndim,
        real.dtype,
        real.device,
    )
    assert (logits.size(-1), logits.dim(), len(logits), logits.numel()) == (23, 3, 3, real.numel())
    assert "LazyLogits" in repr(logits)
    cross_entropy(
        logits[:, :-1].float().flatten(0, 1), torch.zeros(18, dtype=torch.long)
    ).backward()


def test_transformers_trainer_and_its_loss(ids: Tensor, tmp_path: Any) -> None:
    """With and without accumulation, which divides by the labels of all batches."""
    for accumulate in (1, 2):
        finals = []
        for light in (False, True):
            torch.manual_seed(0)
            model = tiny_llama()
            adapter = lk.adapt(model, lk.LoRA(rank=3), seed=0)
            if light:
                lk.fuse(model)
            rows = [
                {"input_ids": row, "labels": labelled(row.view(1, -1))[0]}
                for row in ids.repeat(4, 1)
            ]
            args = transformers.TrainingArguments(
                str(tmp_path), per_device_train_batch_size=2,
                gradient_accumulation_steps=accumulate, max_steps=3,
                learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no",
                disable_tqdm=True,
            )  # fmt: skip
            trainer = transformers.Trainer(model, args, train_dataset=rows)  # type: ignore[arg-type]
            trainer.train()
            finals.append([p.detach().clone() for p in adapter.parameters()])
        for got, want in zip(*finals, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_modules_that_accelerate_has_hooked_are_replaced_too() -> None:
    """Its hooks keep the forward of the class that a module had; there and back."""
    hooks = pytest.importorskip("accelerate.hooks")
    plain, model = tiny_llama(), tiny_llama()
    ids = torch.randint(0, 60, (2, 5))
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    assert lk.fuse(model) == lk.fuse(tiny_llama())
    adapter = lk.adapt(model, lk.LoRA(rank=2), "q_proj")
    assert isinstance(model.train()(ids).logits, LazyLogits)
    adapter.remove()
    lk.unfuse(model)
    assert type(model(ids).logits) is Tensor
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
