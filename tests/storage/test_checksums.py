"""Every number of every parameter counts, rounding does not, and the line says how far two tensors
are apart.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakin as lk
from conftest import randomise, tiny_llama
from lorakin.storage import checksums

SHAPES = [(1,), (7,), (576,), (1, 1), (3, 5), (64, 32), (300, 1000), (4, 6, 3, 2)]
HALF = (torch.bfloat16, torch.float16)


def numbers(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def ways(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers, rounded in every way that a model is stored in."""
    rounded = [
        tensor,
        tensor.double(),
        *(tensor.to(a) for a in HALF),
        *(tensor.to(a).to(b) for a in HALF for b in HALF),
    ]
    return [*rounded, *(one.float() for one in rounded)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_the_same_tensor(shape: tuple[int, ...]) -> None:
    for seed in range(20):
        lines = [checksums.line_of(one) for one in ways(numbers(shape, seed))]
        held = [str(line).split()[:2] for line in lines]
        other = [(a, b) for a, b in zip(lines, held, strict=True)]
        assert all(
            checksums.distance(a, b) == 0.0 for a, (h, _) in other for b, (g, _) in other if h != g
        )
        once = [
            checksums.line_of(numbers(shape, seed).to(half)) for half in HALF
        ]  # run in the other half, and in float32
        again = [
            checksums.line_of(numbers(shape, seed).to(half).to(one).to(two))
            for half in HALF
            for one in HALF
            for two in HALF
        ]
        assert all(
            checksums.distance(one, line) == 0.0
            for n, one in enumerate(once)
            for line in again[4 * n : 4 * n + 4]
        )
        assert held[0] == held[1] and held[2] == held[12]  # widened, the numbers are the same


@pytest.mark.parametrize("shape", [(64, 32), (300, 1000), (4, 6, 3, 2), (576,)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_another_tensor_is_as_far_as_the_difference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for seed in range(10):
        one, share = numbers(shape, seed), 0.05
        other = one + share * numbers(shape, seed + 100)
        found = checksums.distance(
            checksums.line_of(one.to(dtype)), checksums.line_of(other.to(dtype))
        )
        assert found == pytest.approx(share, rel=0.6)
        assert checksums.distance(
            checksums.line_of(one), checksums.line_of(numbers(shape, seed + 100).to(dtype))
        ) == pytest.approx(2**0.5, rel=0.7)


def test_the_sums_are_the_formula() -> None:
    one = numbers((6, 5)).double()
    line = checksums.line_of(one.float())
    assert line is not None
    left, right = checksums._signs("rows", 6), checksums._signs("columns", 5)
    want = [
        float(one.float().double().norm()),
        *(float(left[:, k] @ one.float().double() @ right[:, k]) for k in range(8)),
    ]
    assert [float(word) for word in line.split()[2:]] == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert left.unique().tolist() == [-1.0, 1.0]
    assert checksums._signs("rows", 4)[:, 0].tolist() == checksums._signs("rows", 4)[:, 0].tolist()
    assert (
        "".join("+" if sign > 0 else "-" for sign in checksums._signs("rows", 6)[:, 0]) == "++-+--"
    )  # kept in files: never others


@pytest.mark.parametrize("at", [0, 1, 777, 2047])
def test_one_changed_number_of_a_float32_tensor_is_seen(at: int) -> None:
    one = numbers((64, 32))
    other = one.clone()
    other.view(-1)[at] = torch.nextafter(other.view(-1)[at], torch.tensor(1.0))
    assert checksums.distance(checksums.line_of(one), checksums.line_of(other)) > 0
    swapped = one.clone()
    swapped[[3, 5]] = one[[5, 3]]
    assert checksums.distance(checksums.line_of(one), checksums.line_of(swapped)) > 0.05


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("at", [0, 777, 2047])
def test_one_changed_number_of_a_half_precision_tensor_is_seen(at: int, dtype: torch.dtype) -> None:
    one = numbers((64, 32)).to(dtype)
    other = one.clone()
    other.view(-1)[at] *= 1.02
    line, now = checksums.line_of(one), checksums.line_of(other)
    assert line is not None and now is not None and 0 < checksums.distance(line, now) < 0.01
    earlier = [
        f"{held} {crc[:8]} {rest}"
        for held, crc, rest in (text.split(" ", 2) for text in (line, now))
    ]
    assert (
        checksums.distance(earlier[0], line) == checksums.distance(earlier[0], earlier[1]) == 0.0
    )  # their first checksum had rounding in it


def test_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    one = numbers((300, 40))
    whole = checksums.line_of(one)
    monkeypatch.setattr(checksums, "CHUNK", 1000)
    parts = checksums.line_of(one)
    assert whole is not None and parts is not None and parts.split()[:2] == whole.split()[:2]
    assert checksums.line_of(one.t().contiguous().t()) == parts  # stored the other way round


def test_what_has_no_plain_numbers_has_no_line() -> None:
    assert checksums.line_of(torch.ones(3, device="meta")) is None
    assert checksums.line_of(torch.ones(3, dtype=torch.int64)) is None
    assert checksums.line_of(torch.ones(0, 3)) is None
    assert (
        checksums.line_of(torch.tensor([1.0, float("nan")])) is None
        and checksums.line_of(torch.tensor([float("inf")])) is None
    )
    assert checksums.line_of(nn.Parameter(torch.ones(2, 2))) == checksums.line_of(torch.ones(2, 2))
    one = numbers((5, 3))
    assert (
        checksums.line_of(one, [1, 4]) == checksums.line_of(one[[0, 2, 3]])
        and checksums.line_of(one, [0]) is None
    )


def test_lines_of_files_are_checked() -> None:
    line = checksums.line_of(numbers((3, 5)))
    assert checksums.is_line(line)
    for wrong in (
        None,
        3,
        "",
        "float32",
        f"{line} 1",
        str(line).replace(str(line).split()[2], "nan"),
        "a zz " + "1 " * 9,
    ):
        assert not checksums.is_line(wrong)


def saved(folder: Path, dtype: torch.dtype = torch.float32, **where: Any) -> Path:
    return randomise(lk.adapt(tiny_llama(dtype=dtype), lk.LoRA(2), **where)).save(
        folder / "adapter"
    )


@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run_in", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_with_a_random_remainder_is_another(
    trained_in: torch.dtype, run_in: torch.dtype, tmp_path: Path
) -> None:
    """All but the four numbers that earlier versions kept of each parameter."""
    adapter = saved(tmp_path, trained_in)
    model = tiny_llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp.up_proj" in name:
                flat = weight.view(-1)
                kept = torch.linspace(0, flat.numel() - 1, 4, dtype=torch.float64).round().long()
                values = flat[kept].clone()
                flat.normal_(std=0.02, generator=torch.Generator().manual_seed(9))
                flat[kept] = values
    with pytest.raises(lk.AdapterError, match=r"up_proj.*\d+\.\d+%"):
        lk.load(model.to(run_in), adapter)
    assert not lk.adapters(model)
    lk.load(model, adapter, other_base=True)


def test_one_number_of_the_base_counts(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 17] += 1e-6
    with pytest.raises(lk.AdapterError, match="layers.1.mlp.down_proj"):
        lk.load(model, adapter)


def test_files_of_earlier_versions_still_load(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    own = json.loads((adapter / "lorakin.json").read_text())
    assert own["base"]["sums"].keys() == own["base"]["weights"].keys()
    del own["base"]["sums"], own["sha256"]
    (adapter / "lorakin.json").write_text(json.dumps(own))
    lk.load(tiny_llama(), adapter)


def test_saving_again_reads_what_was_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(2), targets="q_proj"))
    adapter.save(tmp_path / "first")
    made: list[int] = []
    of = checksums.line_of
    monkeypatch.setattr(checksums, "line_of", lambda *given: made.append(1) or of(*given))
    adapter.save(tmp_path / "second")
    assert not made
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    adapter.save(tmp_path / "third")
    assert len(made) == 1
    with pytest.raises(lk.AdapterError, match="model.norm.* 3"):
        lk.load(tiny_llama(), tmp_path / "third")
    made.clear()
    lk.load(model, tmp_path / "third", name="again")
    assert made  # loading reads all


@pytest.mark.model
def test_it_takes_a_second_or_so() -> None:
    weights = {str(n): torch.randn(1536, 576) for n in range(60)}
    started = time.perf_counter()
    checksums.lines_of(weights, {})
    assert time.perf_counter() - started < 10
