"""Delta-LoRA, telescoped and in place, against NumPy's literal rule, and what each leaves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakin as lk
from conftest import tiny_llama
from family.problem import array, close, data, fit, linear
from lorakin.storage import directory
from references import delta_lora as reference

FORMS = ["telescoped", "in_place"]


@pytest.mark.parametrize("update", FORMS)
@pytest.mark.parametrize("K", [0, 1, 12])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_eighty_steps_of_training(
    update: Any, K: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Both forms are the paper's literal rule, with decay on A and B."""
    model, (x, target) = linear(dtype), data(dtype)
    adapter = lk.adapt(
        model, lk.DeltaLoRA(rank=3, alpha=6, lam=1.5, start_step=K, update=update), "0", seed=1
    )
    site, W0 = adapter.tensors.branch("0"), array(model[0].weight)
    numbers = [array(t) for t in (x, target, model[0].weight, model[0].bias, site.A, site.B)]
    A, B, W, losses, _ = reference.train_literal(
        *numbers, s=2, lam=1.5, K=K, steps=80, lr=0.01, weight_decay=0.05
    )
    seen = fit(
        model, adapter.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.05), x, target, 80
    )
    assert losses[-1] < 0.8 * losses[0], "it learns"
    close(seen, losses, 10 * tolerance)
    close(site.A, A, 50 * tolerance)
    close(site.B, B, 50 * tolerance)
    total = W + 2 * B @ A
    adapter.merge()
    close(model[0].weight, total, 50 * tolerance)
    adapter.unmerge()
    if update == "in_place":
        close(model[0].weight, W, 50 * tolerance)
    with adapter.disabled():
        assert (array(model[0].weight) == W0).all(), "the base's own weight is there, to the bit"
    adapter.remove()
    assert (array(model[0].weight) == W0).all()


def test_telescoped_and_in_place_are_equal_in_float64() -> None:
    weights = []
    for update in FORMS:
        model, (x, target) = linear(), data()
        adapter = lk.adapt(
            model, lk.DeltaLoRA(rank=3, alpha=6, start_step=7, update=update), "0", seed=1
        )  # type: ignore[arg-type]
        fit(model, adapter.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.05), x, target, 80)
        adapter.merge(permanent=True)
        weights.append(model[0].weight.detach())
    assert (weights[0] - weights[1]).abs().max() < 1e-12


@pytest.mark.parametrize("K", [0, 5])
def test_forward_and_gradients(K: int) -> None:
    """The gradient is a plain pair's at the full effective weight, not 1 + λ times that."""
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DeltaLoRA(rank=3, alpha=6, start_step=K), "0")
    site = adapter.tensors.branch("0")
    start = array(site.A), array(site.B)
    fit(model, adapter.optimizer(lr=0.05), x, target, K)
    A_K, B_K = (array(site.A), array(site.B)) if K else start
    fit(model, torch.optim.SGD(adapter.parameters(), lr=0.05), x, target, 4)
    x, delta = x.requires_grad_(), data()[1]
    y = model(x)
    y.backward(delta)
    numbers = [array(t) for t in (x, model[0].weight, model[0].bias, site.A, site.B)]
    rest = {"s": 2, "lam": 2.0, "A_K": A_K, "B_K": B_K}
    close(y, reference.telescoped_forward(*numbers, **rest), 1e-10)
    dA, dB, dx = reference.telescoped_gradients(
        numbers[0], numbers[1], *numbers[3:], **rest, delta=array(delta)
    )
    for got, want in ((site.A.grad, dA), (site.B.grad, dB), (x.grad, dx)):
        close(got, want, 1e-10)


def test_it_is_continuous_where_it_begins_and_of_rank_2r() -> None:
    model, (x, target) = linear(torch.float64, 16, 16), data(inputs=16, outputs=16)
    adapter = lk.adapt(model, lk.DeltaLoRA(rank=2, alpha=4, start_step=4), "0")
    optimizer = adapter.optimizer(lr=0.05)
    fit(model, optimizer, x, target, 3)
    loss = ((model(x) - target) ** 2).mean()
    loss.backward()
    optimizer.step()
    pair = adapter.tensors.pair_now("0")
    site = adapter.tensors.branch("0")
    assert pair.down.shape[0] == 4
    torch.testing.assert_close(pair.up @ pair.down, 2 * site.B @ site.A, rtol=1e-12, atol=1e-14)
    fit(model, optimizer, x, target, 10)
    singular = torch.linalg.svdvals(
        (lambda pair: pair.up @ pair.down)(adapter.tensors.pair_now("0"))
    )
    assert (singular > 1e-10).sum() == 4


def test_the_identity_that_an_honest_comparison_controls_for() -> None:
    """§11: Delta-LoRA (λ, K = 0) ≡ LoRA ((1+λ)·alpha).

    Under AdamW with ε → 0 and any decay; under SGD at η/(1+λ).
    """
    for cls, lr, more in (
        (torch.optim.AdamW, 0.01, {"eps": 1e-30, "weight_decay": 0.1}),
        (torch.optim.SGD, 0.02, {}),
    ):
        outputs = []
        for member, rate in (
            (lk.DeltaLoRA(rank=3, alpha=4, lam=2, start_step=0), lr),
            (lk.LoRA(rank=3, alpha=12), lr),
        ):
            model, (x, target) = linear(), data()
            rate = rate / 3 if cls is torch.optim.SGD and isinstance(member, lk.LoRA) else rate
            adapter = lk.adapt(model, member, "0", seed=5)
            losses = fit(model, adapter.optimizer(cls, lr=rate, **more), x, target, 30)  # type: ignore[arg-type]
            outputs.append((losses, array(model(x))))
        assert outputs[0][0][-1] < outputs[0][0][0]
        close(outputs[0][0], outputs[1][0], 1e-9)
        close(torch.tensor(outputs[0][1]), outputs[1][1], 1e-8)


def test_with_lora_plus_it_is_a_still_larger_scale() -> None:
    outputs = []
    for member in (
        [lk.DeltaLoRA(rank=3, alpha=2, lam=2, start_step=0), lk.LoRAPlus(ratio=4)],
        lk.LoRA(rank=3, alpha=24),
    ):
        model, (x, target) = linear(), data()
        adapter = lk.adapt(model, member, "0", seed=5)
        fit(model, adapter.optimizer(torch.optim.Adam, lr=0.002, eps=1e-30), x, target, 20)
        outputs.append(array(model(x)))
    close(torch.tensor(outputs[0]), outputs[1], 1e-8)


def test_on_lora_fa_one_pair_of_rank_r_holds_both() -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, [lk.DeltaLoRA(rank=3, alpha=6, start_step=2), lk.LoRAFA()], "0")
    optimizer = adapter.optimizer(lr=0.05)
    fit(model, optimizer, x, target, 2)
    B_K, site = array(adapter.tensors.branch("0").B), adapter.tensors.branch("0")
    fit(model, optimizer, x, target, 3)
    pair = adapter.tensors.pair_now("0")
    assert pair.down.shape[0] == 3
    close(pair.up, 2 * (3 * array(site.B) - 2 * B_K), 1e-12)


@pytest.mark.parametrize("update", FORMS)
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_resuming_before_at_and_after_the_anchor(update: Any, stop: int, tmp_path: Path) -> None:
    def begin() -> tuple[Any, lk.Adapter, torch.optim.Optimizer]:
        model = linear()
        adapter = lk.adapt(model, lk.DeltaLoRA(rank=3, start_step=5, update=update), "0", seed=1)
        return model, adapter, adapter.optimizer(torch.optim.AdamW, lr=0.05)

    x, target = data()
    model, adapter, optimizer = begin()
    whole = fit(model, optimizer, x, target, stop)
    directory.save(adapter, tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    whole = fit(model, optimizer, x, target, 6)
    other, resumed, again = begin()
    resumed.restore(tmp_path)
    again.load_state_dict(kept)
    assert resumed.run.steps == stop
    rest = fit(other, again, x, target, 6)
    if update == "telescoped" or stop == 3:
        assert rest == whole, "to the bit"
        assert torch.equal(other(x), model(x))
    else:  # the moved weight is made again from the anchor: the same but for rounding
        close(rest, whole, 1e-12)
        close(other(x), array(model(x)), 1e-12)


@pytest.mark.parametrize("update", FORMS)
def test_going_back_and_forth_within_a_run(update: Any, tmp_path: Path) -> None:
    """As a Trainer does that loads its best checkpoint: back to an earlier state, and forth."""
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DeltaLoRA(rank=3, start_step=2, update=update), "0")
    optimizer = adapter.optimizer(lr=0.05)
    outputs = {}
    for steps in (1, 4, 7):
        fit(model, optimizer, x, target, steps - adapter.run.steps)
        directory.save(adapter, tmp_path / str(steps))
        outputs[steps] = array(model(x))
    for steps in (4, 1, 7, 4):
        adapter.restore(tmp_path / str(steps))
        assert adapter.run.steps == steps
        close(model(x), outputs[steps], 1e-12)
    optimizer = adapter.optimizer(lr=0.05)  # a second run goes on from what was learned
    adapter.restore(tmp_path / "7")
    close(model(x), outputs[7], 1e-12)
    adapter.optimizer(lr=0.05)
    close(model(x), outputs[7], 1e-12)


def test_what_is_saved_in_place_is_the_form_that_leaves_the_base_alone(tmp_path: Path) -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DeltaLoRA(rank=3, start_step=2, update="in_place"), "0")
    fit(model, adapter.optimizer(lr=0.05), x, target, 6)
    adapter.save(tmp_path)
    other = linear()
    weight = array(other[0].weight)
    loaded = lk.load(other, tmp_path)
    close(other(x), array(model(x)), 1e-12)
    assert (array(other[0].weight) == weight).all()
    assert loaded.tensors.pair_now("0").down.shape[0] == 6


@pytest.mark.parametrize("update", FORMS)
def test_what_was_learned_stays_when_training_goes_on(update: Any, tmp_path: Path) -> None:
    """Its anchor came with the file; a new run takes no other at step K."""
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DeltaLoRA(rank=3, start_step=2, update=update), "0")
    fit(model, adapter.optimizer(lr=0.05), x, target, 6)
    adapter.save(tmp_path)
    other = linear()
    again = lk.load(other, tmp_path, trainable=True)
    learned = array(other(x))
    close(model(x), learned, 1e-12)
    fit(other, again.optimizer(torch.optim.SGD, lr=0.0), x, target, 4)
    close(other(x), learned, 1e-12)


def test_a_moved_base_has_the_model_to_itself() -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DeltaLoRA(rank=3, start_step=0, update="in_place"), "0")
    fit(model, adapter.optimizer(lr=0.05), x, target, 2)
    for forbidden in (
        lambda: lk.adapt(model, lk.LoRA(rank=2), name="other"),
        lambda: lk.activate(model, []),
    ):
        with pytest.raises(lk.StateError, match="'default'"):
            forbidden()
    moved = array(model[0].weight)
    with adapter.disabled(), adapter.disabled():
        assert not (array(model[0].weight) == moved).all()
    assert (array(model[0].weight) == moved).all()
    adapter.merge()
    merged = array(model(x))
    adapter.unmerge()
    close(model(x), merged, 1e-12)
    model.float()
    assert model[0].weight.dtype == torch.float32
    adapter.remove()
    assert model[0].weight.dtype == torch.float32, "what is set aside moves with the model"


def test_a_run_that_would_never_begin() -> None:
    adapter = lk.adapt(linear(), lk.DeltaLoRA(rank=2, start_step=10))
    with pytest.raises(lk.SettingError, match="start_step=10"):
        adapter.optimizer(lr=0.1, total_steps=10)
    adapter.optimizer(lr=0.1, total_steps=11)


def test_a_run_that_never_began_is_announced(tmp_path: Path) -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DeltaLoRA(rank=2))
    with pytest.raises(lk.StateError, match="delta-lora"):
        adapter.save(tmp_path)
    fit(model, adapter.optimizer(lr=0.1), x, target, 3)
    with pytest.warns(lk.LorakinWarning, match="3 optimizer steps.*start_step=500"):
        adapter.save(tmp_path)


def test_dropout_is_refused() -> None:
    with pytest.raises(lk.SettingError, match="0.1"):
        lk.DeltaLoRA(dropout=0.1)
    for pair in (lk.LoRA(dropout=0.1), lk.VeRA(dropout=0.1)):
        with pytest.raises(lk.SettingError, match="0.1"):
            lk.adapt(tiny_llama(), [pair, lk.DeltaLoRA()])


def test_settings() -> None:
    assert lk.adapt(
        linear(torch.float32, 32, 32), lk.DeltaLoRA()
    ).method.parametrisation == lk.LoRA(rank=8, alpha=16)
    for settings in ({"lam": 0}, {"start_step": -1}, {"update": "inplace"}):
        with pytest.raises(lk.SettingError, match=next(iter(settings))):
            lk.DeltaLoRA(**settings)  # type: ignore[arg-type]
