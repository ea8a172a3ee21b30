"""LoRA+: its training against NumPy, its groups, and that it is LoRA with another alpha."""

from __future__ import annotations

import math

import pytest
import torch

import lorakin as lk
from conftest import tiny_bert, tiny_llama
from family.problem import BOTH_PRECISIONS, array, close, data, fit, linear
from references import lora_plus as reference


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
def test_twenty_five_steps_of_training(dtype: torch.dtype, tolerance: float) -> None:
    model, (x, target) = linear(dtype), data(dtype)
    adapter = lk.adapt(model, lk.LoRAPlus(ratio=5, rank=3, alpha=6), "0")
    site = adapter.tensors.branch("0")
    A, B, losses = reference.train(
        *map(array, (x, target, model[0].weight, model[0].bias, site.A, site.B)),
        s=2,
        steps=25,
        lr=0.01,
        ratio=5,
        weight_decay=0.1,
    )
    seen = fit(
        model, adapter.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1), x, target, 25
    )
    assert losses[-1] < 0.8 * losses[0], "it learns"
    close(seen, losses, tolerance)
    close(site.A, A, 10 * tolerance)
    close(site.B, B, 10 * tolerance)


@pytest.mark.parametrize("member", [lk.LoRA, lk.DoRA, lk.VeRA, lk.AdaLoRA])
def test_under_adam_it_is_a_larger_scale(member: type) -> None:
    """§11: LoRA+ (alpha, η, ρ) ≡ LoRA (ρ·alpha, η) with ε → 0, no decay, no clipping.

    VeRA has no alpha: there the control is the frozen B times ρ. m moves the same in both.
    """
    ratio, (x, target) = 8.0, data()
    models = [linear(), linear()]
    scale = {"alpha": 4.0} if member is not lk.VeRA else {}
    more = (
        {"target_rank": 2, "start": 4, "finish": 5, "initial_rank": 4}
        if member is lk.AdaLoRA
        else {"rank": 4}
    )
    plus = lk.adapt(models[0], [member(**scale, **more), lk.LoRAPlus(ratio=ratio)], seed=3)
    control = lk.adapt(
        models[1], member(**{name: ratio * alpha for name, alpha in scale.items()}, **more), seed=3
    )
    if member is lk.VeRA:
        with torch.no_grad():
            control.tensors.branch("0").B.mul_(ratio)
    losses = []
    for model, adapter in zip(models, (plus, control), strict=True):
        optimizer = adapter.optimizer(torch.optim.Adam, lr=2e-3, eps=1e-30, total_steps=20)
        losses.append(fit(model, optimizer, x, target, 20))
    assert losses[0][-1] < losses[0][0] - 1e-3, "it learns"
    close(losses[0], losses[1], 1e-9)
    with torch.no_grad():
        torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-8, atol=1e-8)


def test_with_weight_decay_it_is_not() -> None:
    (x, target), losses = data(), []
    for member in ([lk.LoRA(rank=4, alpha=4), lk.LoRAPlus(ratio=8)], lk.LoRA(rank=4, alpha=32)):
        model = linear()
        optimizer = lk.adapt(model, member, seed=3).optimizer(
            torch.optim.AdamW, lr=2e-3, eps=1e-30, weight_decay=0.5
        )
        losses.append(fit(model, optimizer, x, target, 20)[-1])
    assert abs(losses[0] / losses[1] - 1) > 1e-4


def test_the_groups_go_by_role() -> None:
    adapter = lk.adapt(
        tiny_bert(), [lk.DoRA(rank=2), lk.LoRAPlus(ratio=10)], modules_to_save=["classifier"]
    )
    groups = adapter.parameter_groups(lr=1e-3, weight_decay=0.1)
    rates = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert (
        sum(p.numel() for group in groups for p in group["params"]) == adapter.trainable_parameters
    )
    expected = {
        "A": (1e-3, 0.1),
        "B": (1e-2, 0.1),
        "m": (1e-3, 0.0),
        "weight": (1e-3, 0.1),
        "bias": (1e-3, 0.0),
    }
    for name, parameter in adapter.named_parameters():
        assert rates[id(parameter)] == pytest.approx(expected[name.rpartition(".")[2]]), name


def test_the_factor_that_starts_at_zero_in_every_pair() -> None:
    for member, fast, slow in (
        (lk.VeRA(rank=4), "b", ["d"]),
        (lk.AdaLoRA(initial_rank=4), "E", ["P", "Q"]),
    ):
        adapter = lk.adapt(tiny_llama(), [member, lk.LoRAPlus(ratio=10)])
        groups = adapter.parameter_groups(lr=1e-3)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        for name, parameter in adapter.named_parameters():
            slot = name.rpartition(".")[2]
            assert (slot == fast) == (rates.get(id(parameter)) == pytest.approx(1e-2))
            assert (slot in slow) == (rates.get(id(parameter)) == pytest.approx(1e-3))


def test_pairs_on_embeddings_have_a_rate_of_their_own() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRAPlus(ratio=10, rank=2), targets=["embed_tokens", "q_proj"])
    rates = {group["lr"] for group in adapter.parameter_groups(lr=1e-3)}
    assert sorted(rates) == pytest.approx([1e-6, 1e-3, 1e-2])
    other = lk.adapt(
        tiny_llama(), lk.LoRAPlus(ratio=10, rank=2, embedding_lr=None), targets=["embed_tokens"]
    )
    rates = {
        id(p): group["lr"] for group in other.parameter_groups(lr=1e-3) for p in group["params"]
    }
    assert rates[id(other.tensors.branch("model.embed_tokens").A)] == pytest.approx(1e-2), (
        "an embedding's A starts at zero"
    )
    model(torch.arange(5).unsqueeze(0)).logits.sum().backward()
    adapter.optimizer(lr=1e-3).step()  # its own rate is not held against the ratio


def test_a_scheduler_keeps_the_ratio() -> None:
    model, (x, target) = linear(), data()
    optimizer = lk.adapt(model, lk.LoRAPlus(ratio=16, rank=2)).optimizer(lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, n / 5) * 0.9**n)
    for _ in range(6):
        fit(model, optimizer, x, target, 1)
        schedule.step()
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert fast / slow == pytest.approx(16)


@pytest.mark.parametrize(
    "settings", [{"ratio": 0.5}, {"ratio": math.inf}, {"ratio": "16"}, {"embedding_lr": 0}]
)
def test_settings_outside_their_range(settings: dict[str, object]) -> None:
    with pytest.raises(lk.SettingError, match=next(iter(settings))):
        lk.LoRAPlus(**settings)  # type: ignore[arg-type]
    assert lk.LoRAPlus(8).ratio == 8


def test_an_optimizer_with_one_rate_for_all_is_refused() -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.LoRAPlus(ratio=16, rank=2))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    with pytest.raises(lk.StateError, match=r"lora\+.*adapter.optimizer"):
        fit(model, optimizer, x, target, 1)


def test_two_optimizers_or_a_schedule_do_not_undo_it_silently() -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.LoRAPlus(ratio=16, rank=2))
    for slot in ("A", "B"):
        optimizer = torch.optim.AdamW([adapter.tensors.branch("0").tensors()[slot]], lr=1e-3)
        with pytest.raises(lk.SettingError):
            fit(model, optimizer, x, target, 1)
    optimizer = adapter.optimizer(lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    with pytest.raises(lk.StateError, match="OneCycleLR"):
        fit(model, optimizer, x, target, 1)
    optimizer = adapter.optimizer(lr=1e-3)
    fit(model, optimizer, x, target, 1)
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    with pytest.warns(lk.LorakinWarning, match="step 2"):
        fit(model, optimizer, x, target, 1)
    fit(model, optimizer, x, target, 1)  # said once


@pytest.mark.parametrize("lr", [-1e-3, float("nan"), "1e-3", None, True])
def test_what_is_no_learning_rate(lr: object) -> None:
    with pytest.raises(lk.SettingError, match="lr"):
        lk.adapt(linear(), lk.LoRAPlus(rank=2)).optimizer(lr=lr)  # type: ignore[arg-type]


def test_an_optimizer_that_finds_one_rate_itself_is_refused() -> None:
    class Prodigy(torch.optim.AdamW):
        """Like prodigyopt's: its defaults hold d0."""

        def __init__(self, params: object, **options: object) -> None:
            super().__init__(params, **options)  # type: ignore[arg-type]
            self.defaults["d0"] = 1e-6

    with pytest.raises(lk.StateError, match="Prodigy"):
        lk.adapt(linear(), lk.LoRAPlus(rank=2)).optimizer(Prodigy, lr=1.0)
    lk.adapt(linear(), lk.LoRA(rank=2)).optimizer(Prodigy, lr=1.0)
