"""Several changes as one, against NumPy: TIES, pruning, DARE, on changes and on factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lorakin as lk
from family.problem import array, close
from lorakin.family import combining
from lorakin.family.combining import Combination
from lorakin.family.low_rank import nearest_to
from lorakin.family.pair import Pair
from references import combining as reference

WEIGHTS = [0.7, -0.4, 1.3]
ALL = [
    ("sum", None),
    ("ties", 0.3),
    ("ties", 1.0),
    ("magnitude_prune", 0.3),
    ("dare_linear", 1.0),
    ("dare_ties", 1.0),
]


def pairs(ranks: Sequence[int] = (2, 5, 3), outputs: int = 9, inputs: int = 7) -> list[Pair]:
    g = torch.Generator().manual_seed(0)
    draw = [
        (
            torch.randn(outputs, r, generator=g, dtype=torch.float64),
            torch.randn(r, inputs, generator=g, dtype=torch.float64),
        )
        for r in ranks
    ]
    return [Pair(up, down) for up, down in draw]


@pytest.fixture(params=[1 << 20, 14], ids=["whole", "two rows at a time"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combining, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("how", "density", "elect"),
    [(*one, None) for one in ALL] + [(*one, "frequency") for one in ALL if "ties" in one[0]],
)
def test_on_changes_of_any_ranks(how: str, density: float | None, elect: str | None) -> None:
    rule = Combination(how, density=density, elect=elect)
    changes = [array(pair.up @ pair.down) for pair in pairs()]
    want = reference.combined(changes, WEIGHTS, how, density or 1.0, elect or "total")
    close(rule.of_pairs(pairs(), WEIGHTS, rule.generator()), want, 1e-12)


def test_electing_by_total_and_by_frequency_differ() -> None:
    parts = [torch.tensor([[5.0]]), torch.tensor([[-1.0]]), torch.tensor([[-2.0]])]
    for elect, value in (("total", 5.0), ("frequency", -1.5)):
        rule = Combination("ties", density=1.0, elect=elect)
        assert rule.of_matrices(parts, [1, 1, 1], rule.generator()).item() == value


def test_a_vote_that_is_tied_is_won_by_plus_and_who_has_nothing_does_not_count() -> None:
    parts = [torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[-2.0, -3.0, 0.0]])]
    rule = Combination("ties", density=1.0)
    assert rule.of_matrices(parts, [1, 1], rule.generator()).tolist() == [[2.0, -3.0, 0.0]]


@pytest.mark.parametrize(("how", "density"), ALL)
def test_on_factors(how: str, density: float | None) -> None:
    factors, scales = pairs((3, 3, 3)), [2.0, 0.5, 1.0]
    rule = Combination(how, on="factors", density=density)
    got = rule.of_factors(factors, scales, WEIGHTS, rule.generator())
    roots = [abs(w * s) ** 0.5 for w, s in zip(WEIGHTS, scales, strict=True)]
    signed = [np.sign(w) * root for w, root in zip(WEIGHTS, roots, strict=True)]
    close(
        got.up,
        reference.combined([array(p.up) for p in factors], roots, how, density or 1.0),
        1e-12,
    )
    close(
        got.down,
        reference.combined([array(p.down) for p in factors], signed, how, density or 1.0),
        1e-12,
    )


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_mean_and_a_share(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(200, 300, dtype=torch.float64)
    rule = Combination(how, density=0.3, seed=5)
    got = rule.of_matrices([one, one], [1.0, 1.0], rule.generator())
    share = 0.3 if how == "dare_linear" else 1 - 0.7**2
    count = {"dare_linear": 2.0, "dare_ties": 1.0}[how]
    largest = count / 0.3
    assert float((got != 0).double().mean()) == pytest.approx(1 - 0.7**2, abs=0.01)
    assert float(got.max()) == pytest.approx(largest)
    if how == "dare_linear":
        assert float(got.mean()) == pytest.approx(2.0, abs=0.03), "of both, as without dropping"
    else:
        assert float(got.mean()) == pytest.approx(share / 0.3, abs=0.03)
    again = rule.of_matrices([one, one], [1.0, 1.0], rule.generator())
    assert torch.equal(got, again), "a seed, and the same again"
    other = Combination(how, density=0.3, seed=6)
    assert not torch.equal(got, other.of_matrices([one, one], [1.0, 1.0], other.generator()))
    monkeypatch.setattr(combining, "BLOCK", 900)
    assert torch.equal(got, rule.of_matrices([one, one], [1.0, 1.0], rule.generator())), (
        "whatever the blocks"
    )


def test_what_is_dropped_is_drawn_anew_for_each_change() -> None:
    one, generator = torch.ones(50, 60), Combination("dare_linear", density=0.5).generator()
    rule = Combination("dare_linear", density=0.5)
    got = rule.of_matrices([one, one], [1.0, 100.0], generator)
    assert set(got.unique().tolist()) == {0.0, 2.0, 200.0, 202.0}


def test_matrices_without_numbers() -> None:
    rule = Combination("ties", density=0.5)
    assert rule.of_pairs(pairs((0, 0)), [1, 1], rule.generator()).eq(0).all()
    assert rule.of_factors(pairs((0, 0)), [1, 1], [1, 1], rule.generator()).up.shape == (9, 0)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (6, 6)])
def test_the_nearest_pair_of_a_matrix(shape: tuple[int, int]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    near, fit = nearest_to(change, rank=3)
    want = reference.nearest(array(change), 3)
    close(near.up @ near.down, want, 1e-7)
    assert fit.rank == near.down.shape[0] == 3
    assert fit.error == pytest.approx(
        np.linalg.norm(array(change) - want) / np.linalg.norm(array(change)), rel=1e-6
    )
    assert nearest_to(change, error=0.999)[1].rank <= 1
    assert nearest_to(torch.zeros(shape), rank=3)[1].rank == 0
    assert nearest_to(change.float(), rank=2)[0].up.dtype is torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "tise"}, "'tise'.*'ties'"),
        ({"how": "ties_svd"}, 'how="ties", rank='),
        ({"how": "cat"}, 'how="sum"'),
        ({"how": "linear"}, 'how="sum", on="factors"'),
        ({"how": None}, "how=None"),
        ({"how": "ties"}, "density"),
        ({"how": "ties", "density": 0}, "density"),
        ({"how": "ties", "density": 1.5}, "density"),
        ({"how": "ties", "density": float("nan")}, "density"),
        ({"density": 0.5}, "'sum'.*density"),
        ({"how": "magnitude_prune", "density": 0.5, "elect": "total"}, "elect"),
        ({"how": "ties", "density": 0.5, "seed": 3}, "seed"),
        ({"how": "dare_ties", "density": 0.5, "seed": -1}, "seed"),
        ({"how": "ties", "density": 0.5, "elect": "size"}, "elect.*'size'"),
        ({"on": "weights"}, "on.*'weights'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(lk.SettingError, match=message):
        Combination(**settings)


def test_every_way_is_in_one_block_what_it_is_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = pairs((4, 4), 33, 20)

    def all_ways() -> list[Tensor]:
        rules = [Combination(how, density=None if how == "sum" else 0.4) for how in combining.KINDS]
        return [rule.of_pairs(changes, [1.0, 2.0], rule.generator()) for rule in rules]

    whole = all_ways()
    monkeypatch.setattr(combining, "BLOCK", 20)
    for one, other in zip(whole, all_ways(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
