"""Every real optimizer step reaches the members that act at steps, under any loop; a step that does
nothing does not.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from family.problem import data, fit, linear
from lorakin.loop import optimizer_hooks


def delta(model: nn.Module, K: int = 2) -> lk.Adapter:
    return lk.adapt(model, lk.DeltaLoRA(rank=3, start_step=K))


def test_accumulated_batches_are_one_step() -> None:
    model, (x, target) = linear(), data()
    adapter = delta(model)
    optimizer = adapter.optimizer(lr=0.01)
    for _ in range(3):
        for part in (slice(0, 10), slice(10, 20)):
            ((model(x[part]) - target[part]) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapter.run.steps == 3


def test_an_optimizer_that_the_adapter_never_heard_of() -> None:
    """Nothing is called: torch's own AdamW over the model's trainable parameters is enough."""
    model, (x, target) = linear(), data()
    adapter = delta(model)
    fit(
        model,
        torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0
        ),
        x,
        target,
        3,
    )
    assert adapter.run.steps == 3
    assert "up_K" in adapter.tensors.branch("0").tensors()


def test_other_optimizers_do_not_count() -> None:
    model, other, (x, target) = linear(), linear(), data()
    adapter = delta(model)
    optimizer = adapter.optimizer(lr=0.01)
    fit(other, torch.optim.SGD(other.parameters(), lr=0.1), x, target, 4)
    assert adapter.run.steps == 0
    fit(model, optimizer, x, target, 1)
    assert adapter.run.steps == 1
    adapter.remove()
    optimizer.step()
    assert adapter.run.steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler(fused: bool) -> None:
    """Steps that it skips do not count; scores see gradients without its scale, also where the
    optimizer unscales them.
    """
    members = lk.AdaLoRA(initial_rank=4, target_rank=2, start=1, finish=2, orthogonality=0.0)
    sensitivities: list[dict[str, Tensor]] = []
    for scaled in (False, True):
        model, (x, target) = linear(torch.float32), data(torch.float32)
        adapter = lk.adapt(model, members, seed=0)
        optimizer = adapter.optimizer(torch.optim.AdamW, lr=0.01, total_steps=10, fused=fused)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled
        )
        for n in range(4):
            loss = ((model(x) - target) ** 2).mean()
            scaler.scale(loss).backward()
            if scaled and n == 1:  # an overflow, which the unscaled run does not see
                adapter.tensors.branch("0").E.grad.fill_(float("inf"))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scaler.scale(((model(x) - target) ** 2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert adapter.run.steps == 4
        (rule,) = adapter.run.rules or ()
        sensitivities.append(rule.state()["sensitivity"])
    for key, plain in sensitivities[0].items():
        torch.testing.assert_close(sensitivities[1][key], plain, rtol=1e-3, atol=1e-9)


def test_clipping_is_a_common_factor() -> None:
    """A loop that clips has clipped before a member sees the gradients: the order of the scores
    stays.
    """
    kept = []
    for clip in (False, True):
        model, (x, target) = linear(torch.float64, 11, 9, 7), data()
        adapter = lk.adapt(
            model,
            lk.AdaLoRA(initial_rank=4, target_rank=2, start=0, finish=9, orthogonality=0.0),
            seed=0,
        )
        optimizer = adapter.optimizer(torch.optim.SGD, lr=1e-3, total_steps=10)
        ((model(x) - target) ** 2).mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1e-4)
        with torch.no_grad():
            for path in adapter.placement.methods:
                adapter.tensors.branch(path).E.add_(1)
        optimizer.step()
        (rule,) = adapter.run.rules or ()
        kept.append(rule.state()["pattern"])
    assert all(torch.equal(kept[0][path], kept[1][path]) for path in kept[0])


def test_an_optimizer_that_holds_a_part_is_refused() -> None:
    model, (x, target) = linear(), data()
    adapter = delta(model)
    with pytest.raises(lk.SettingError, match="1 trainable"):
        fit(model, torch.optim.SGD([adapter.tensors.branch("0").A], lr=0.1), x, target, 1)


def test_a_deep_copy_is_stepped_on_its_own() -> None:
    model, (x, target) = linear(), data()
    adapter = delta(model)
    fit(model, adapter.optimizer(lr=0.01), x, target, 1)
    twin = copy.deepcopy(model)
    copied = lk.adapters(twin)["default"]
    fit(twin, torch.optim.AdamW(copied.parameters(), lr=0.01, weight_decay=0), x, target, 3)
    assert (adapter.run.steps, copied.run.steps) == (1, 4)
    assert "up_K" in copied.tensors.branch("0").tensors()
    assert "up_K" not in adapter.tensors.branch("0").tensors()


def test_a_model_that_is_gone_is_let_go() -> None:
    model = linear()
    adapter = delta(model)
    optimizer = adapter.optimizer(lr=0.01)
    fit(model, optimizer, *data(), 1)
    gone = weakref.ref(adapter)
    del model, adapter, optimizer
    gc.collect()
    assert gone() is None
    assert all(adapter is not None for adapter in optimizer_hooks._ADAPTERS)


def test_a_second_run_begins_anew() -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=2, start=1, finish=2))
    fit(model, adapter.optimizer(lr=0.01, total_steps=6), x, target, 6)
    with pytest.warns(lk.LorakinWarning):
        pass_two = lk.adapt(linear(), lk.AdaLoRA(initial_rank=2, target_rank=2)).optimizer(
            lr=0.01, total_steps=4
        )
    assert pass_two.param_groups
    fit(model, adapter.optimizer(lr=0.01, total_steps=4), x, target, 4)
    assert adapter.run.steps == 4
    assert adapter.method.setting("total_steps") == 4
    assert len(adapter.tensors.branch("0").E) == 2


def test_accelerate(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, (x, target) = linear(torch.float32), data(torch.float32)
    adapter = delta(model)
    optimizer = adapter.optimizer(lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(((model(x) - target) ** 2).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert adapter.run.steps == 3


def test_an_adapter_that_takes_no_part_takes_no_step() -> None:
    """Its gradients are absent while another is active, and its allocator does not prune on."""
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=2, start=1, finish=2))
    optimizer = adapter.optimizer(lr=0.01, total_steps=10)
    fit(model, optimizer, x, target, 2)
    lk.adapt(model, lk.LoRA(rank=2), name="other")
    fit(model, optimizer, x, target, 3)
    assert adapter.run.steps == 2
    lk.activate(model, "default")
    fit(model, optimizer, x, target, 1)
    assert adapter.run.steps == 3


def test_what_the_method_keeps_frozen_is_not_trained() -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.LoRAFA(rank=2))
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(lk.StateError, match=r"0\.A.*lora-fa"):
        fit(model, torch.optim.SGD(adapter.parameters(), lr=0.1), x, target, 1)


def test_a_base_that_trains_beside_the_adapter_is_announced() -> None:
    model, (x, target) = linear(), data()
    lk.adapt(model, lk.LoRA(rank=2))
    model.requires_grad_(True)
    with pytest.warns(lk.LorakinWarning, match=r"0\.weight"):
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), x, target, 1)


def test_an_optimizer_that_cannot_be_followed_is_refused() -> None:
    adapter = lk.adapt(linear(), lk.AdaLoRA(initial_rank=4, target_rank=2))
    with pytest.raises(
        lk.SettingError,
        match="LBFGS.*adalora",
    ):
        adapter.attach(torch.optim.LBFGS(adapter.parameters()), total_steps=10)


@pytest.mark.parametrize(
    "cls", [torch.optim.Adafactor, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_a_module_without_ranks_troubles_no_optimizer(cls: Any) -> None:
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=1, start=1, finish=4))
    with torch.no_grad():
        adapter.tensors.branch("1").P.zero_()  # nothing there can matter
    optimizer = adapter.optimizer(cls, lr=0.01, total_steps=12)
    for group in optimizer.param_groups:
        group["params"] = list(group["params"])
    (rule,) = adapter.run.rules or ()
    fit(model, optimizer, x, target, 7)
    rule.scores = lambda: torch.cat(  # type: ignore[method-assign]
        [torch.full((m.rank,), float(m.module.path == "0")) for m in rule.matrices]
    )
    fit(model, optimizer, x, target, 5)
    assert [len(adapter.tensors.branch(path).E) for path in adapter.placement.methods] == [2, 0]


@pytest.mark.parametrize("steps", [0, -1, "5", 2.5, True])
def test_what_is_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(lk.SettingError, match="total_steps"):
        lk.adapt(linear(), lk.LoRA(rank=2)).optimizer(lr=0.1, total_steps=steps)


def test_a_broken_model_does_not_trouble_the_optimizers_of_others() -> None:
    broken, sound = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    kept = lk.adapt(broken, lk.LoRA(rank=2), "all-linear")
    broken[0] = nn.Linear(4, 4)
    adapter = lk.adapt(sound, lk.LoRA(rank=2), "all-linear")
    optimizer = adapter.optimizer(lr=0.1)
    sound(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert adapter.run.steps == 1
    assert kept.run.steps == 0
