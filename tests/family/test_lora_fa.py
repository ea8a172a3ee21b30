"""LoRA-FA against NumPy, and that it keeps A·x instead of x."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakin as lk
from conftest import tiny_llama
from family.problem import (
    BOTH_PRECISIONS,
    array,
    close,
    data,
    fit,
    linear,
    mask,
    randomised,
    saved_bytes,
)
from references import lora_fa as reference


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    model = linear(dtype).train()
    adapter = randomised(lk.adapt(model, lk.LoRAFA(rank=3, alpha=5, dropout=dropout), "0"))
    site, x, delta = adapter.tensors.branch("0"), data(dtype)[0].requires_grad_(), data(dtype)[1]
    torch.manual_seed(4)
    model(x).backward(delta)
    torch.manual_seed(4)
    dropped = mask(x, dropout)
    dB, dx = reference.gradients(
        *map(array, (x, model[0].weight, site.A, site.B)), s=5 / 3, delta=array(delta), mask=dropped
    )
    assert site.A.grad is None
    close(site.B.grad, dB, tolerance)
    close(x.grad, dx, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
@pytest.mark.parametrize("corrected", [False, True])
def test_twenty_five_steps_of_training(
    dtype: torch.dtype, tolerance: float, corrected: bool
) -> None:
    model, (x, target) = linear(dtype), data(dtype)
    adapter = lk.adapt(model, lk.LoRAFA(rank=3, alpha=6, corrected=corrected), "0")
    site = adapter.tensors.branch("0")
    A = array(site.A)
    B, losses = reference.train(
        *map(array, (x, target, model[0].weight, model[0].bias, site.A, site.B)),
        s=2, steps=25, lr=0.02, weight_decay=0.1, correction=corrected,
    )  # fmt: skip
    seen = fit(
        model, adapter.optimizer(torch.optim.AdamW, lr=0.02, weight_decay=0.1), x, target, 25
    )
    assert losses[-1] < 0.9 * losses[0], "it learns"
    close(seen, losses, tolerance)
    close(site.B, B, 10 * tolerance)
    close(site.A, A, 0)


def test_the_corrected_gradient_is_the_nearest_to_the_full_one() -> None:
    """g_B minimises ‖s·g_B·A − ∂W‖: the residual is orthogonal to A; an embedding's to B."""
    model, (x, target) = linear(), data()
    model[0].weight.requires_grad_()
    adapter = randomised(lk.adapt(model, lk.LoRAFA(rank=3, alpha=6, corrected=True), "0"))
    model[0].weight.requires_grad_()  # for the full gradient alone
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0)
    fit(model, optimizer, x, target, 0)
    ((model(x) - target) ** 2).mean().backward()
    optimizer.step()
    site, full = adapter.tensors.branch("0"), model[0].weight.grad
    torch.testing.assert_close(
        (2 * site.B.grad @ site.A - full) @ site.A.T, torch.zeros(7, 3, dtype=torch.float64)
    )

    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(9, 5, dtype=torch.float64))
    adapter = lk.adapt(table, lk.LoRAFA(rank=2, alpha=4, corrected=True), "0")
    table[0].weight.requires_grad_()
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0)
    (table(torch.arange(9)) ** 3).sum().backward()
    optimizer.step()
    site, full = adapter.tensors.branch("0"), table[0].weight.grad.T
    assert site.B.grad is None
    torch.testing.assert_close(
        site.B.T @ (2 * site.B @ site.A.grad - full), torch.zeros(2, 9, dtype=torch.float64)
    )


@pytest.mark.filterwarnings("ignore:the first step of adapter:lorakin.errors.LorakinWarning")
def test_a_shared_pairs_gradient_is_corrected_once() -> None:
    model, (x, target) = (
        nn.Sequential(*(nn.ModuleDict({"fc": layer}) for layer in linear(torch.float64, 8, 8, 8))),
        data(inputs=8, outputs=8),
    )
    model.add_module("elsewhere", nn.Linear(8, 8, dtype=torch.float64))
    share = {"0.fc": 0.1, "1.fc": 0.2, "elsewhere": 9.0}
    adapter = randomised(
        lk.adapt(
            model,
            [lk.LoRADrop(keep=1, importance=share), lk.LoRAFA(rank=3, alpha=6, corrected=True)],
        )
    )
    one, two = (adapter.tensors.branch(path) for path in ("0.fc", "1.fc"))
    assert one.B is two.B
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0)
    ((model[1]["fc"](model[0]["fc"](x)) - target) ** 2).mean().backward()
    plain = array(one.B.grad)
    optimizer.step()
    close(one.B.grad, reference.corrected(plain, array(one.A), 2), 1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_backward_keeps_Ax_and_never_x(dropout: float) -> None:
    """LoRA keeps x (`in` numbers per token) and A x (r); LoRA-FA A x alone, with dropout a mask."""
    rows, width, rank = 256, 128, 4
    kept = {}
    for member in (lk.LoRA, lk.LoRAFA):
        model = linear(torch.float32, width, width).train()
        lk.adapt(model, member(rank=rank, dropout=dropout))
        kept[member] = saved_bytes(model, torch.randn(rows, width, requires_grad=True))
    ax, x, mask = 4 * rows * rank, 4 * rows * width, (rows * width if dropout else 0)
    assert kept[lk.LoRA] >= x + ax
    assert kept[lk.LoRAFA] <= ax + 4 * width * rank + 4 * mask, "A x, s·B, and a mask"
    assert kept[lk.LoRA] - kept[lk.LoRAFA] >= x


def test_A_stays_frozen_through_everything() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRAFA(rank=2))
    frozen = {name for name, p in adapter.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in adapter.named_parameters() if name.endswith(".A")}
    with adapter.disabled():
        pass
    lk.activate(model, [])
    lk.activate(model, "default")
    adapter.merge()
    adapter.unmerge()
    assert frozen == {name for name, p in adapter.named_parameters() if not p.requires_grad}


def test_it_is_frozen_again_after_loading(tmp_path) -> None:  # type: ignore[no-untyped-def]
    randomised(lk.adapt(tiny_llama(), lk.LoRAFA(rank=2))).save(tmp_path)
    adapter = lk.load(tiny_llama(), tmp_path, trainable=True)
    assert {
        name.rpartition(".")[2] for name, p in adapter.named_parameters() if p.requires_grad
    } == {"B"}
    assert adapter.method.words == "lora-fa"


def test_an_embedding_trains_its_vocabulary_factor() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRAFA(rank=2), targets=["embed_tokens"])
    assert {
        name.rpartition(".")[2] for name, p in adapter.named_parameters() if p.requires_grad
    } == {"A"}
    ids = torch.arange(3, 12).unsqueeze(0)
    optimizer = adapter.optimizer(lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_an_orthonormal_start() -> None:
    adapter = lk.adapt(linear(), lk.LoRAFA(rank=4, init="orthonormal"), "0")
    A = adapter.tensors.branch("0").A.detach()
    torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=torch.float64) / 3, rtol=1e-6, atol=1e-6)


def test_on_adalora_Q_is_frozen_and_orthonormal() -> None:
    adapter = lk.adapt(linear(), [lk.LoRAFA(), lk.AdaLoRA(initial_rank=4)], "0")
    site = adapter.tensors.branch("0")
    assert [slot for slot, t in site.tensors().items() if not t.requires_grad] == ["Q"]
    torch.testing.assert_close(
        (site.Q @ site.Q.T).detach(), torch.eye(4, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_what_does_not_go_together() -> None:
    with pytest.raises(lk.SettingError, match="corrected=True"):
        lk.adapt(linear(), [lk.LoRAFA(corrected=True), lk.AdaLoRA()])
    with pytest.raises(lk.SettingError, match="corrected"):
        lk.LoRAFA(corrected=1)  # type: ignore[arg-type]
    with pytest.raises(lk.SettingError, match="init"):
        lk.adapt(linear(), lk.LoRAFA(init="zeros"))  # type: ignore[arg-type]
