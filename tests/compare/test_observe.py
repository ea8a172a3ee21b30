"""What a run did to each weight, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lorakin as lk
from conftest import randomise, tiny_llama
from lorakin.compare import observe

PATH = "model.layers.1.mlp.up_proj"


def truth(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float, float]:
    """ΔM, ΔD and ‖ΔW‖ of rows, in float64."""
    w, v = before.detach().double().numpy(), after.detach().double().numpy()
    sizes, lengths = np.linalg.norm(w, axis=1), np.linalg.norm(v, axis=1)
    cosine = (w * v).sum(1) / (sizes * lengths)
    return np.abs(lengths - sizes).mean(), (1 - cosine).mean(), np.linalg.norm(v - w)


@pytest.mark.parametrize(
    "member",
    [lk.LoRA(rank=4), lk.DoRA(rank=4), lk.VeRA(rank=8), lk.DeltaLoRA(rank=2, start_step=0)],
)
def test_moves_and_norms_are_those_of_the_merged_weight(member: Any) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, member))
    before = model.get_submodule(PATH).weight.detach().clone()
    moves, layers = observe.magnitude_direction_changes(adapter), observe.change_norms(adapter)
    adapter.merge()
    expected = truth(before, model.get_submodule(PATH).weight)
    assert moves[PATH] == pytest.approx(expected[:2], rel=1e-3)
    assert layers[PATH]["norm"] == pytest.approx(expected[2], rel=1e-4)
    assert layers[PATH]["relative"] == pytest.approx(expected[2] / float(before.norm()), rel=1e-4)
    assert len(moves) == len(adapter.placement.methods) == 14


def test_a_module_that_is_trained_whole_is_seen_too() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(), "none", modules_to_save=[PATH])
    with torch.no_grad():
        adapter.tensors.copy_of(PATH).weight.mul_(1.5)
    before = model.get_submodule(PATH).weight
    assert observe.magnitude_direction_changes(adapter)[PATH] == pytest.approx(
        (0.5 * float(before.norm(dim=1).mean()), 0.0), abs=1e-5
    )
    assert observe.change_norms(adapter)[PATH] == {
        "norm": pytest.approx(0.5 * float(before.norm())),
        "relative": pytest.approx(0.5),
    }


def test_nothing_has_moved_at_the_start() -> None:
    adapter = lk.adapt(tiny_llama(), lk.DoRA(rank=4))
    assert all(
        move == pytest.approx((0.0, 0.0), abs=1e-6)
        for move in observe.magnitude_direction_changes(adapter).values()
    )


def test_ranks_are_those_that_are_not_switched_off() -> None:
    adapter = lk.adapt(tiny_llama(), lk.AdaLoRA(initial_rank=6, target_rank=2))
    assert observe.ranks_in_use(adapter) == {}  # Λ starts at zero, which tells nothing yet
    with torch.no_grad():
        adapter.tensors.branch(PATH).tensors()["E"][:4] = 1.0
    assert observe.ranks_in_use(adapter)[PATH] == 4
    assert (
        observe.ranks_in_use(lk.adapt(tiny_llama(), lk.VeRA(rank=8))) == {}
    )  # has such numbers, but moves no budget
