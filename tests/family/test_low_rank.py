"""Nearest pairs, against NumPy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorakin.errors import SettingError
from lorakin.family.low_rank import nearest, padded, root_of_samples
from lorakin.family.pair import Pair

NONE = torch.empty(0)


def drawn(outputs: int, inputs: int, rank: int, gained: bool = False) -> tuple[Pair, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs * inputs)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gain = 1 + 0.1 * normal(outputs) if gained else None
    return Pair(normal(outputs, rank), normal(rank, inputs), gain), normal(outputs, inputs)


def change(pair: Pair, weight: torch.Tensor) -> np.ndarray:
    return (pair.applied_to(weight) - weight).numpy()


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_is_the_truncated_svd(shape: tuple[int, int], rank: int, gained: bool) -> None:
    pair, weight = drawn(*shape, 6, gained)
    near, fit = nearest(pair, weight, rank=rank)
    true = change(pair, weight)
    u, s, v = np.linalg.svd(true, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose((near.up @ near.down).numpy(), best, atol=1e-9)
    assert near.gain is None and near.down.shape[0] == fit.rank == rank
    assert fit.error == pytest.approx(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), rel=1e-6)
    assert fit.output_error is None and (fit.gain is not None) == gained
    (
        torch.testing.assert_close(near.up.norm(dim=0), near.down.norm(dim=1)),
        "both factors are of one size",
    )


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_weighted_it_is_the_best_for_the_outputs(shape: tuple[int, int], gained: bool) -> None:
    pair, weight = drawn(*shape, 6, gained)
    x = torch.randn(400, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = x * torch.linspace(0.05, 4, shape[1], dtype=torch.float64)
    root = root_of_samples(x, ridge=0)
    weighted, fit = nearest(pair, weight, rank=3, root=root)
    plain, _ = nearest(pair, weight, rank=3)
    true = change(pair, weight)
    wrong = [
        np.linalg.norm((true - (p.up @ p.down).numpy()) @ x.numpy().T) for p in (weighted, plain)
    ]
    assert wrong[0] < 0.98 * wrong[1]
    assert fit.output_error == pytest.approx(
        wrong[0] / np.linalg.norm(true @ x.numpy().T), rel=1e-6
    )
    values = np.linalg.svd(true @ x.numpy().T, compute_uv=False)
    assert wrong[0] == pytest.approx(np.sqrt((values[3:] ** 2).sum()), rel=1e-6), (
        "no rank-3 pair does better"
    )


def test_the_smallest_rank_within_an_error() -> None:
    pair, weight = drawn(14, 18, 8, gained=True)
    values = np.linalg.svd(change(pair, weight), compute_uv=False)
    errors = np.sqrt(
        np.array([(values[k:] ** 2).sum() for k in range(len(values) + 1)]) / (values**2).sum()
    )
    for error in (0.5, 0.1, 0.01):
        _, fit = nearest(pair, weight, error=error)
        assert fit.rank == int((errors > error).sum()) and fit.error <= error
        _, both = nearest(pair, weight, error=error, rank=4)
        assert both.rank == min(4, fit.rank)


def test_the_true_rank_is_found() -> None:
    pair, weight = drawn(14, 18, 4)
    doubled = Pair(torch.cat([pair.up, -0.5 * pair.up], 1), torch.cat([pair.down, pair.down], 0))
    near, fit = nearest(doubled, weight, error=1e-7)
    assert fit.rank == 4
    torch.testing.assert_close(near.up @ near.down, 0.5 * pair.up @ pair.down, atol=1e-6, rtol=0)


def test_what_fits_stays_as_it_is_and_a_gain_needs_a_rank() -> None:
    pair, weight = drawn(8, 9, 4)
    near, fit = nearest(pair, weight, rank=4)
    assert near is pair and fit.error == 0
    assert nearest(pair, NONE)[0] is pair
    gained, weight = drawn(8, 9, 4, gained=True)
    with pytest.raises(SettingError):
        nearest(gained, weight)


def test_nothing_changes_nothing() -> None:
    near, fit = nearest(Pair(torch.zeros(5, 3), torch.ones(3, 6)), NONE, rank=2)
    assert near.down.shape == (0, 6) and near.up.shape == (5, 0) and fit == type(fit)(0, 0.0)


def test_padding_is_exact() -> None:
    pair, _ = drawn(5, 6, 2)
    wide = padded(pair, 8)
    assert wide.up.shape == (5, 8) and wide.down.shape == (8, 6)
    torch.testing.assert_close(wide.up @ wide.down, pair.up @ pair.down, rtol=0, atol=0)
