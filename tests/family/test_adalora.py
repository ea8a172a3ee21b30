"""AdaLoRA against NumPy: forward, gradients, schedule, scores, masks, and the freeing of ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lorakin as lk
from family.problem import BOTH_PRECISIONS, array, close, data, fit, linear, mask, randomised
from lorakin.family.allocation import Allocation
from lorakin.storage import directory
from references import adalora as reference

SCHEDULE = {"start": 3, "finish": 8, "interval": 2}
T = 25


def triples(model: nn.Module, adapter: lk.Adapter) -> list[dict[str, object]]:
    """The layers of `model` as the reference wants them."""
    found = []
    for path in adapter.placement.methods:
        module, site = model.get_submodule(path), adapter.tensors.branch(path)
        found.append(
            {
                k: array(t)
                for k, t in (("W0", module.weight), ("bias", module.bias), *site.tensors().items())
            }
        )
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_and_gradients(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    model = linear(dtype).train()
    adapter = randomised(lk.adapt(model, lk.AdaLoRA(initial_rank=4, alpha=6, dropout=dropout), "0"))
    site, x, delta = adapter.tensors.branch("0"), data(dtype)[0].requires_grad_(), data(dtype)[1]
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    dropped = mask(x, dropout)
    y.backward(delta)
    s = reference.scaling(6, 4)
    numbers = [array(t) for t in (x, model[0].weight, site.P, site.E, site.Q)]
    close(
        y,
        reference.forward(*numbers[:2], array(model[0].bias), *numbers[2:], s=s, mask=dropped),
        tolerance,
    )
    dP, dE, dQ, dx = reference.gradients(*numbers, s=s, delta=array(delta), mask=dropped)
    for got, want in ((site.P.grad, dP), (site.E.grad, dE), (site.Q.grad, dQ), (x.grad, dx)):
        close(got, want, 10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
@pytest.mark.parametrize(("gamma", "steps"), [(0.1, T - 8), (0.0, T)])
def test_training_with_its_masks(
    dtype: torch.dtype, tolerance: float, gamma: float, steps: int
) -> None:
    """Two layers compete for one budget: the same triplets survive as in the reference.

    After T − t_f the reference keeps masked triplets and we free them; with γ = 0 that is equal.
    """
    model, (x, target) = linear(dtype, 11, 9, 7), data(dtype)
    member = lk.AdaLoRA(initial_rank=4, target_rank=2, alpha=8, orthogonality=gamma, **SCHEDULE)
    adapter = lk.adapt(model, member)
    layers = triples(model, adapter)
    schedule = (T, SCHEDULE["start"], SCHEDULE["finish"], SCHEDULE["interval"])
    wanted = reference.train(
        array(x),
        array(target),
        layers,
        reference.scaling(8, 4),
        *schedule,
        2,
        lr=0.02,
        gamma=gamma,
        weight_decay=0.05,
    )
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=0.02, weight_decay=0.05, total_steps=T)
    seen, ranks = [], []
    for n in range(1, steps + 1):
        seen += fit(model, optimizer, x, target, 1)
        if n in (6, 8):
            zeros = [
                ~adapter.tensors.branch(path).E.flatten().bool().numpy()
                for path in adapter.placement.methods
            ]
            for zero, kept in zip(zeros, wanted["kept"][n - 1], strict=True):
                np.testing.assert_array_equal(zero, ~kept)
        ranks.append(sum(len(adapter.tensors.branch(path).E) for path in adapter.placement.methods))
    close(seen, wanted["losses"][:steps], tolerance)
    assert ranks == [8] * (T - 8 - 1) + [4] * (steps - (T - 8 - 1)), (
        "freed when the pattern is fixed"
    )
    assert wanted["losses"][-1] < 0.9 * wanted["losses"][0], "it learns"
    if steps < T:
        return
    for path, layer, kept in zip(
        adapter.placement.methods, wanted["layers"], wanted["kept"][-1], strict=True
    ):
        site = adapter.tensors.branch(path)
        for got, want in (
            (site.P, layer["P"][:, kept]),
            (site.E, layer["E"][kept]),
            (site.Q, layer["Q"][kept]),
        ):
            close(got, want, 20 * tolerance)


def test_the_regulariser_is_added_exactly_once_a_step() -> None:
    """Under accumulation too, and in the gradient alone: the loss is the task's."""
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = randomised(
        lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=2, orthogonality=0.3, **SCHEDULE))
    )
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0, total_steps=T)
    for part in (slice(0, 10), slice(10, 20)):
        (((model(x[part]) - target[part]) ** 2).mean() / 2).backward()
    task = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    optimizer.step()
    sites = [adapter.tensors.branch(path) for path in adapter.placement.methods]
    _, (dPs, dQs) = reference.regulariser([array(s.P) for s in sites], [array(s.Q) for s in sites])
    for path, dP, dQ in zip(adapter.placement.methods, dPs, dQs, strict=True):
        site = adapter.tensors.branch(path)
        close(site.P.grad - task[f"{path}.P"], 0.3 * dP, 1e-10)
        close(site.Q.grad - task[f"{path}.Q"], 0.3 * dQ, 1e-10)
        assert torch.equal(site.E.grad, task[f"{path}.E"])


@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.6, 0.9)])
def test_the_scores_are_the_papers(betas: tuple[float, float]) -> None:
    """Over steps in which sensitivities rise and fall, with two different smoothing factors."""
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    member = lk.AdaLoRA(
        initial_rank=4,
        target_rank=2,
        start=8,
        finish=3,
        beta1=betas[0],
        beta2=betas[1],
        orthogonality=0.0,
    )
    adapter = randomised(lk.adapt(model, member))
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.3, total_steps=T)
    (rule,) = adapter.run.rules or ()
    assert isinstance(rule, Allocation)
    expected = reference.Scores(*betas)
    for n in range(6):
        ((model(x) - (-1) ** n * n * target) ** 2).mean().backward()
        for path in adapter.placement.methods:
            for slot, w in adapter.tensors.branch(path).tensors().items():
                expected.update(f"{path}.{slot}", array(w), array(w.grad))
        optimizer.step()
        optimizer.zero_grad()
        got = rule.scores().split([matrix.rank for matrix in rule.matrices])
        for path, scores_here in zip(adapter.placement.methods, got, strict=True):
            scores = [expected.score(f"{path}.{slot}") for slot in ("P", "E", "Q")]
            close(scores_here, reference.triplet_scores(*scores), 1e-10)


def test_the_start() -> None:
    site = lk.adapt(linear(torch.float32, 200, 100), lk.AdaLoRA(initial_rank=50)).tensors.branch(
        "0"
    )
    assert not site.E.any()
    for factor in (site.P, site.Q):
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(factor.mean().item()) < 0.002


def test_on_lora_fa_the_regulariser_is_on_P_alone() -> None:
    """Q is frozen and orthonormal there: the mean is over the P of all modules."""
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = randomised(
        lk.adapt(
            model,
            [lk.AdaLoRA(initial_rank=4, target_rank=2, orthogonality=0.3, **SCHEDULE), lk.LoRAFA()],
        )
    )
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0, total_steps=T)
    ((model(x) - target) ** 2).mean().backward()
    sites = [adapter.tensors.branch(path) for path in adapter.placement.methods]
    task = [site.P.grad.clone() for site in sites]
    optimizer.step()
    for site, before in zip(sites, task, strict=True):
        P = array(site.P)
        _, ((dP, *_), _) = reference.regulariser([P], [array(site.Q)])
        close(
            site.P.grad - before, 0.3 * dP, 1e-10
        )  # one P and one Q there, two P here: the same count


def allocation(
    all_ranks: list[int], total: int, start: int, finish: int, interval: int, target: int
) -> Allocation:
    model = linear(torch.float32, *[64] * (len(all_ranks) + 1))
    member = lk.AdaLoRA(
        initial_rank=all_ranks[0], target_rank=target, start=start, finish=finish, interval=interval
    )
    adapter = lk.adapt(model, member)
    adapter.run.begin(total)
    (rule,) = adapter.run.rules or ()
    assert isinstance(rule, Allocation)
    return rule


def test_the_budget_is_the_papers() -> None:
    rule = allocation([12] * 3, 20, 2, 5, 1, 4)
    assert [rule.budget(n) for n in range(1, 21)] == [
        36,
        36,
        30,
        26,
        22,
        19,
        17,
        15,
        14,
        13,
        *[12] * 10,
    ]
    rule = allocation([12] * 72, 10000, 1000, 2000, 10, 8)
    assert [rule.budget(n) for n in (1000, 1001, 1100, 2000, 4500, 8000)] == [
        864,
        863,
        851,
        757,
        612,
        576,
    ]


def test_the_budget_is_exact_in_whole_numbers() -> None:
    rule = allocation([5] * 25, 7, 1, 1, 1, 1)
    assert [rule.budget(n) for n in range(1, 8)] == [
        reference.budget(n, 7, 1, 1, 125, 25) for n in range(1, 8)
    ]


def test_ties_fall_to_the_first() -> None:
    """All scores equal: exactly b triplets remain, the first in the model's order."""
    rule = allocation([4] * 2, 10, 1, 4, 1, 2)
    for matrix in rule.matrices:
        matrix.module.tensors()["E"].data.fill_(1)
    rule.after(6, torch.optim.SGD([torch.zeros(1)], lr=0.1))
    assert [len(matrix.module.tensors()["E"]) for matrix in rule.matrices] == [4, 0], (
        "rank 0 is legal"
    )


def test_scores_that_are_all_equal_are_announced() -> None:
    rule = allocation([4] * 2, 10, 1, 4, 1, 2)
    rule.after(6, torch.optim.SGD([torch.zeros(1)], lr=0.1))
    assert "scores were all equal" in (rule.unfinished(10) or "")


def test_equal_ranks_are_no_crash_but_no_pruning() -> None:
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=4, **SCHEDULE))
    with pytest.warns(lk.LorakinWarning, match="target_rank=4"):
        optimizer = adapter.optimizer(lr=0.01, total_steps=T)
    fit(model, optimizer, x, target, T)
    assert {len(adapter.tensors.branch(path).E) for path in adapter.placement.methods} == {4}


def test_what_is_pruned_is_freed() -> None:
    """Parameters, gradients and optimizer state shrink in place; the function stays."""
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=2, **SCHEDULE))
    before = adapter.parameters()
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=0.01, total_steps=T)
    fit(model, optimizer, x, target, T - 9)
    trained = adapter.trainable_parameters
    loss = ((model(x) - target) ** 2).mean()  # its graph outlives the step that frees
    loss.backward()
    masked = copy.deepcopy(model)
    optimizer.step()
    sites = [adapter.tensors.branch(path) for path in adapter.placement.methods]
    ranks = [len(site.E) for site in sites]
    assert sum(ranks) == 4
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in before]
    for site, rank, (i, o) in zip(sites, ranks, ((11, 9), (9, 7)), strict=True):
        assert (site.P.shape, site.E.shape, site.Q.shape) == ((o, rank), (rank, 1), (rank, i))
        for tensor in site.tensors().values():
            assert tensor.grad is None
            assert optimizer.state[tensor]["exp_avg"].shape == tensor.shape
            assert optimizer.state[tensor]["exp_avg_sq"].shape == tensor.shape
    assert adapter.trainable_parameters < trained
    assert lk.adapters(masked)["default"].trainable_parameters == trained, (
        "a copy of the model is its own"
    )
    optimizer.zero_grad()
    fit(model, optimizer, x, target, 8)
    with pytest.raises(AssertionError):
        close(model(x), array(masked(x)), 1e-6)


def test_a_module_whose_ranks_come_back_trains_again(tmp_path: Path) -> None:
    """A run with freed ranks goes back to a checkpoint that has them; an empty module loads."""
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=1, start=1, finish=4))
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.01, total_steps=12)
    (rule,) = adapter.run.rules or ()
    assert isinstance(rule, Allocation)
    fit(model, optimizer, x, target, 2)
    directory.save(adapter, tmp_path / "early")
    rule.scores = lambda: torch.cat(  # type: ignore[method-assign]
        [torch.full((m.rank,), float(m.module.path == "0")) for m in rule.matrices]
    )
    fit(model, optimizer, x, target, 10)
    directory.save(adapter, tmp_path / "late")
    assert not any(
        t.requires_grad or t.numel() for t in adapter.tensors.branch("1").tensors().values()
    )
    loaded = lk.load(linear(torch.float64, 11, 9, 7), tmp_path / "late", trainable=True)
    assert not any(t.requires_grad for t in loaded.tensors.branch("1").tensors().values())
    assert all(t.requires_grad for t in loaded.tensors.branch("0").tensors().values())
    adapter.restore(tmp_path / "early")
    assert all(
        t.requires_grad and t.numel() for t in adapter.tensors.branch("1").tensors().values()
    )
    before = array(adapter.tensors.branch("1").Q)
    fit(model, optimizer, x, target, 1)
    assert (array(adapter.tensors.branch("1").Q) != before).any()


def test_on_vera_what_is_pruned_stays_pruned() -> None:
    """There is nothing to free: the pattern is applied after every step, and scores are dropped."""
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = lk.adapt(model, [lk.VeRA(rank=6), lk.AdaLoRA(target_rank=2, start=3, finish=8)])
    optimizer = adapter.optimizer(lr=0.05, total_steps=T)
    fit(model, optimizer, x, target, T - 8)
    pruned = [adapter.tensors.branch(path).d == 0 for path in adapter.placement.methods]
    assert sum(int(zero.sum()) for zero in pruned) == 2 * 6 - 2 * 2
    fit(model, optimizer, x, target, 8)
    for path, zero in zip(adapter.placement.methods, pruned, strict=True):
        assert torch.equal(adapter.tensors.branch(path).d == 0, zero)
    (rule,) = adapter.run.rules or ()
    assert rule.state()["sensitivity"] == {}


def test_state_of_another_shape_is_given_up() -> None:
    """Adafactor keeps rows and columns: what no longer fits begins anew."""
    from transformers.optimization import Adafactor

    model, (x, target) = linear(torch.float32, 11, 9, 7), data(torch.float32)
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=2, **SCHEDULE))
    optimizer = adapter.optimizer(
        Adafactor, lr=0.01, relative_step=False, scale_parameter=False, total_steps=T
    )
    losses = fit(model, optimizer, x, target, T)
    assert losses[-1] < losses[0]


def test_the_length_of_the_run_is_asked_for() -> None:
    adapter = lk.adapt(linear(), lk.AdaLoRA(initial_rank=4, target_rank=2))
    with pytest.raises(lk.SettingError, match="total_steps"):
        adapter.optimizer(lr=1e-3)
    with pytest.raises(lk.SettingError):
        torch.optim.AdamW(adapter.parameters(), lr=1e-3).step()
    with pytest.raises(lk.SettingError, match="total_steps=9.*10"):
        lk.adapt(linear(), lk.AdaLoRA(initial_rank=4, target_rank=2, total_steps=9)).optimizer(
            lr=1e-3, total_steps=10
        )
    with pytest.raises(lk.SettingError, match="start=6 and finish=4.*10"):
        lk.adapt(linear(), lk.AdaLoRA(initial_rank=4, target_rank=2, start=6, finish=4)).optimizer(
            lr=1e-3, total_steps=10
        )


def test_the_schedule_that_is_left_open() -> None:
    for total, interval in ((4_999, 1), (5_000, 10), (15_000, 100)):
        adapter = lk.adapt(linear(), lk.AdaLoRA(initial_rank=6, target_rank=2))
        adapter.run.begin(total)
        chosen = [
            adapter.method.setting(name) for name in ("total_steps", "start", "finish", "interval")
        ]
        assert chosen == [total, round(0.12 * total), round(0.45 * total), interval]


def test_an_allocator_that_never_ran_is_no_adapter(tmp_path: Path) -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=6, target_rank=2))
    for _ in range(5):  # by hand, without an optimizer
        ((model(x) - target) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    with pytest.raises(lk.StateError, match="adalora"):
        adapter.save(tmp_path)
    adapter.remove()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=6, target_rank=2, start=3, finish=2))
    fit(model, adapter.optimizer(lr=0.01, total_steps=10), x, target, 3)
    assert not list(tmp_path.iterdir())
    with pytest.warns(lk.LorakinWarning, match="step 3 of 10.*step 8"):
        adapter.save(tmp_path)


def test_saved_ranks_are_the_true_ones(tmp_path: Path) -> None:
    model, (x, target) = linear(torch.float64, 11, 9, 7), data()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=1, **SCHEDULE))
    fit(model, adapter.optimizer(lr=0.01, total_steps=T), x, target, T)
    ranks = {path: len(adapter.tensors.branch(path).E) for path in adapter.placement.methods}
    adapter.save(tmp_path)
    other = linear(torch.float64, 11, 9, 7)
    loaded = lk.load(other, tmp_path)
    assert {path: len(loaded.tensors.branch(path).E) for path in loaded.placement.methods} == ranks
    assert torch.equal(other(x), model(x))
    assert loaded.run.rules is None, "inference holds no training state"


def test_settings_outside_their_range() -> None:
    for settings, message in (
        ({"rank": 8}, "initial_rank"),
        ({"rslora": True}, "rslora"),
        ({"target_rank": 0}, "target_rank"),
        ({"beta1": 1.0}, "beta1"),
        ({"orthogonality": -1}, "orthogonality"),
        ({"interval": 0}, "interval"),
    ):
        with pytest.raises(lk.SettingError, match=message):
            lk.AdaLoRA(**settings)  # type: ignore[arg-type]
    with pytest.raises(lk.SettingError, match="rank 12.*7 × 11"):
        lk.adapt(linear(), lk.AdaLoRA())
    with pytest.raises(lk.SettingError, match="rank=4"):
        lk.adapt(linear(), [lk.AdaLoRA(initial_rank=4), lk.DoRA(rank=4)])
