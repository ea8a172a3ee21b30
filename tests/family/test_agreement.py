"""Two methods are one if they compute and train alike, however they are spelt."""

from __future__ import annotations

from typing import Any

import pytest

import lorakin as lk
from lorakin.family import Method

PAIR = {"rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lk.DoRA(**PAIR), [lk.LoRA(**PAIR), lk.DoRA()]),
        (
            [lk.DoRA(), lk.LoRAPlus(ratio=4, **PAIR)],
            [lk.LoRA(**PAIR), lk.LoRAPlus(ratio=4), lk.DoRA()],
        ),
        (lk.LoRAFA(**PAIR), [lk.LoRAFA(), lk.LoRA(**PAIR)]),
        (lk.LoRA(**PAIR), lk.LoRA(**PAIR, init="gaussian")),
        (lk.VeRA(rank=8), lk.VeRA(rank=8, d_init=0.2, save_projection=False)),
        (lk.AdaLoRA(), lk.AdaLoRA(total_steps=100)),
        (lk.AdaLoRA(total_steps=100), lk.AdaLoRA()),
    ],
)
def test_spellings_of_one_method(one: Any, other: Any) -> None:
    for training in (True, False):
        assert Method.of(one).agrees_with(Method.of(other), training)
        assert Method.of(other).agrees_with(Method.of(one), training)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lk.LoRA(**PAIR), lk.DoRA(**PAIR)),
        (lk.LoRA(**PAIR), lk.LoRA(rank=4, alpha=4)),
        (lk.LoRA(**PAIR), lk.LoRA(rank=2, alpha=8)),
        (lk.LoRA(**PAIR), lk.LoRA(**PAIR, rslora=True)),
        (lk.LoRA(**PAIR), lk.DeltaLoRA(**PAIR)),
        (lk.LoRA(**PAIR), lk.LoRADrop(keep=1, **PAIR)),
        (lk.LoRA(**PAIR), lk.AdaLoRA()),
        (lk.VeRA(rank=8), lk.VeRA(rank=8, seed=1)),
        (lk.DeltaLoRA(**PAIR), lk.DeltaLoRA(**PAIR, start_step=7)),
    ],
)
def test_methods_that_compute_otherwise(one: Any, other: Any) -> None:
    for training in (True, False):
        assert not Method.of(one).agrees_with(Method.of(other), training)
        assert not Method.of(other).agrees_with(Method.of(one), training)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lk.LoRA(**PAIR), lk.LoRAPlus(**PAIR)),
        (lk.LoRA(**PAIR), lk.LoRAFA(**PAIR)),
        (lk.LoRA(**PAIR), lk.LoRA(**PAIR, dropout=0.1)),
        (lk.LoRAPlus(ratio=4, **PAIR), lk.LoRAPlus(ratio=8, **PAIR)),
        (lk.DoRA(**PAIR), [lk.DoRA(**PAIR), lk.LoRAPlus()]),
        (lk.AdaLoRA(target_rank=4), lk.AdaLoRA(target_rank=6)),
    ],
)
def test_methods_that_only_train_otherwise(one: Any, other: Any) -> None:
    assert not Method.of(one).agrees_with(Method.of(other))
    assert not Method.of(other).agrees_with(Method.of(one))
    assert Method.of(one).agrees_with(Method.of(other), training=False)
    assert Method.of(other).agrees_with(Method.of(one), training=False)
