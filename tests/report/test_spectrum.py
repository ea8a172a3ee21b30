"""Singular values, suggested ranks and their patterns, against NumPy and PEFT's own rule."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lorakin.family import Pair
from lorakin.inject.patterns import resolve
from lorakin.report.spectrum import (
    effective_rank,
    needed_rank,
    rank_pattern,
    singular_values,
    suggested_ranks,
)


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(40, 30, 5), (3, 30, 5), (30, 3, 5), (6, 6, 0)]
)
def test_singular_values_are_those_of_the_product(outputs: int, inputs: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    up, down = (
        torch.randn(outputs, rank, generator=generator),
        torch.randn(rank, inputs, generator=generator),
    )
    truth = np.linalg.svd(up.double().numpy() @ down.double().numpy(), compute_uv=False)
    found = singular_values(Pair(up, down))
    assert len(found) == min(outputs, inputs, rank)
    np.testing.assert_allclose(found, truth[: len(found)], rtol=1e-12)


def test_effective_rank_is_that_of_an_even_spread_and_of_a_single_direction() -> None:
    assert effective_rank([2.0] * 5) == pytest.approx(5)
    assert effective_rank([3.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) == effective_rank([]) == 0
    shares = np.array([3, 2, 1]) / 6
    assert effective_rank([3, 2, 1]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_suggested_ranks_of_a_case_by_hand() -> None:
    """Squares 90, 9, 1: two of three directions keep exactly 99 %."""
    spectra = {
        "two": [90**0.5, 3.0, 1.0],
        "one": [10.0, 0.5, 0.1],
        "even": [1.0] * 9,  # all nine, of which 12 would be the next sensible rank
        "five": [1.0] * 5 + [1e-3] * 11,
        "none": [0.0, 0.0],
        "empty": [],
    }
    assert suggested_ranks(spectra) == {
        "two": 2,
        "one": 1,
        "even": 9,
        "five": 6,
        "none": 0,
        "empty": 0,
    }
    assert suggested_ranks(spectra, energy=0.9)["two"] == 1


def test_the_suggested_rank_keeps_the_energy_and_less_would_not() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = np.sort(rng.gamma(0.5, size=rng.integers(1, 40)))[::-1]
        rank, squares = needed_rank(list(values)), values**2
        assert squares[:rank].sum() >= 0.99 * squares.sum() * (1 - 1e-9)
        assert squares[: rank - 1].sum() < 0.99 * squares.sum()
        suggested = suggested_ranks({"x": list(values)})["x"]
        assert rank <= suggested <= min(len(values), 1.5 * rank)


def test_a_pattern_is_short_where_all_layers_agree() -> None:
    ranks = {
        f"model.layers.{n}.{m}": r
        for n in range(12)
        for m, r in (("attn.q", 4), ("attn.k", 8), ("mlp.up", 8), ("mlp.down", 8))
    }
    ranks |= {
        "model.layers.2.mlp.up": 16,
        "model.layers.11.mlp.up": 16,
        "model.layers.3.mlp.down": 0,
    }
    assert rank_pattern(ranks) == (
        8,
        {"q": 4, r"layers\.(2|11)\.mlp\.up": 16},
        ("model.layers.3.mlp.down",),
    )


@pytest.mark.parametrize("seed", range(20))
def test_patterns_give_every_module_its_rank_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["q", "attn.q", "attn.out.q", "mlp.q_up", "x.y+z"]
    towers = ["model.layers", "encoder.layers", "layers", "decoder.block"]
    paths = [f"{tower}.{n}.{name}" for tower in towers for n in range(12) for name in names] + [
        "q",
        "head",
        "x.head",
    ]
    ranks = {
        path: int(rng.choice([0, 2, 4, 8], p=[0.05, 0.15, 0.2, 0.6]))
        for path in paths
        if rng.random() < 0.7
    }
    usual, pattern, unchanged = rank_pattern(ranks)
    assert set(unchanged) == {path for path, rank in ranks.items() if rank == 0}
    for order in (dict(pattern), dict(sorted(pattern.items())), dict(reversed(pattern.items()))):
        assert {path: resolve(order, path, usual) for path in ranks if path not in unchanged} == {
            path: rank for path, rank in ranks.items() if rank
        }
    for path in ranks:
        assert sum(bool(re.match(rf"(.*\.)?({key})$", path)) for key in pattern) <= 1


@pytest.mark.peer
def test_peft_reads_the_patterns_alike() -> None:
    other = pytest.importorskip("peft.utils.other")
    ranks = {f"model.layers.{n}.{m}": (4 if n < 3 else 8) for n in range(6) for m in ("q", "k")} | {
        "head": 2
    }
    usual, pattern, _ = rank_pattern(ranks)
    assert {
        path: pattern.get(other.get_pattern_key(pattern, path), usual) for path in ranks
    } == ranks


def test_no_modules_no_pattern() -> None:
    assert rank_pattern({}) == (0, {}, ())
    assert rank_pattern({"a": 0}) == (0, {}, ("a",))
