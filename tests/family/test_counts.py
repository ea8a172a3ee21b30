"""The papers' parameter counts, on the meta device: only the shapes are needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import lorakin as lk


class Blocks(nn.Module):
    """Linear layers of given names and shapes, repeated, on the meta device."""

    def __init__(self, depth: int, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                nn.ModuleDict(
                    {name: nn.Linear(i, o, bias=False) for name, (o, i) in shapes.items()}
                )
                for _ in range(depth)
            )


def square(width: int, names: Iterable[str] = "qkvo") -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, (width, width))


def llama(width: int, inner: int) -> dict[str, tuple[int, int]]:
    return {**square(width), "gate": (inner, width), "up": (inner, width), "down": (width, inner)}


GPT3, ROBERTA, ROBERTA_LARGE = (96, square(12288)), (12, square(768)), (24, square(1024))
GPT2_M, GPT2_L = (24, square(1024)), (36, square(1280))
VIT_B, VIT_L = ROBERTA, ROBERTA_LARGE
LLAMA_3B = (28, {"q": (3072, 3072), "k": (1024, 3072), "v": (1024, 3072), "o": (3072, 3072)})
LLAMA_7B, LLAMA_13B = (32, llama(4096, 11008)), (40, llama(5120, 13824))
LLAMA3_8B = (
    32,
    {
        "q": (4096, 4096),
        "k": (1024, 4096),
        "v": (1024, 4096),
        "up": (14336, 4096),
        "down": (4096, 14336),
    },
)
DEBERTA = (12, {**square(768), "in": (3072, 768), "out": (768, 3072)})
FIVE = ("q", "k", "v", "up", "down")


def adapted(
    shapes: tuple[int, dict[str, tuple[int, int]]], member: Any, targets: Iterable[str] = "qv"
) -> lk.Adapter:
    return lk.adapt(Blocks(*shapes), member, targets if targets == "all-linear" else list(targets))


@pytest.mark.parametrize(
    ("shapes", "targets", "member", "count"),
    [
        (GPT3, "qv", lk.LoRA(rank=1), 4_718_592),
        (GPT3, "qv", lk.LoRA(rank=2), 9_437_184),
        (GPT3, "qkvo", lk.LoRA(rank=1), 9_437_184),
        (GPT3, "qv", lk.LoRA(rank=4), 18_874_368),
        (GPT3, "qkvo", lk.LoRA(rank=2), 18_874_368),
        (GPT3, "qv", lk.LoRA(rank=8), 37_748_736),
        (GPT3, "qkvo", lk.LoRA(rank=4), 37_748_736),
        (GPT3, "qv", lk.LoRA(rank=16), 75_497_472),  # the survey's 75.5M
        (GPT3, "qv", lk.LoRA(rank=64), 301_989_888),
        (GPT3, "qkvo", lk.LoRA(rank=64), 603_979_776),
        (GPT3, "qv", lk.LoRA(rank=256), 1_207_959_552),
        (ROBERTA, "qv", lk.LoRA(rank=8), 294_912),
        (ROBERTA_LARGE, "qv", lk.LoRA(rank=8), 786_432),
        (GPT2_M, "qv", lk.LoRA(rank=4), 393_216),
        (GPT2_L, "qv", lk.LoRA(rank=4), 737_280),
        (LLAMA_3B, "qv", lk.LoRA(rank=32), 9_175_040),
        (LLAMA_7B, FIVE, lk.LoRA(rank=32), 56_098_816),
        (LLAMA_7B, FIVE, lk.LoRA(rank=16), 28_049_408),
        (LLAMA_13B, FIVE, lk.LoRA(rank=32), 87_818_240),
        (LLAMA3_8B, FIVE, lk.LoRA(rank=32), 56_623_104),
        (LLAMA_7B, "all-linear", lk.LoRA(rank=64), 159_907_840),
        (LLAMA_13B, "all-linear", lk.LoRA(rank=64), 250_347_520),
        (DEBERTA, "all-linear", lk.LoRA(rank=2), 331_776),
        (DEBERTA, "all-linear", lk.LoRA(rank=8), 1_327_104),
        (LLAMA_3B, "qv", lk.LoRAPlus(rank=32), 9_175_040),
        (LLAMA_3B, "qv", lk.LoRAFA(rank=32), 3_670_016),
        (ROBERTA, "qv", lk.VeRA(rank=1), 18_456),
        (ROBERTA, "qv", lk.VeRA(rank=16), 18_816),
        (ROBERTA, "qv", lk.VeRA(rank=256), 24_576),
        (ROBERTA, "qv", lk.VeRA(rank=1024), 43_008),
        (ROBERTA_LARGE, "qv", lk.VeRA(rank=1), 49_200),
        (ROBERTA_LARGE, "qv", lk.VeRA(rank=16), 49_920),
        (ROBERTA_LARGE, "qv", lk.VeRA(rank=256), 61_440),
        (GPT3, "qv", lk.VeRA(rank=1), 2_359_488),
        (GPT3, "qv", lk.VeRA(rank=16), 2_362_368),
        (GPT3, "qv", lk.VeRA(rank=256), 2_408_448),
        (GPT2_M, "qv", lk.VeRA(rank=1024), 98_304),
        (GPT2_L, "qv", lk.VeRA(rank=1024), 165_888),
        (LLAMA_7B, "all-linear", lk.VeRA(rank=256), 1_417_216),
        (LLAMA_7B, "all-linear", lk.VeRA(rank=1024), 1_589_248),
        (LLAMA_13B, "all-linear", lk.VeRA(rank=1024), 2_416_640),
        (VIT_B, "qv", lk.VeRA(rank=256), 24_576),
        (VIT_L, "qv", lk.VeRA(rank=256), 61_440),
        (LLAMA_3B, "qv", lk.VeRA(rank=256), 129_024),
        (LLAMA_7B, FIVE, lk.DoRA(rank=32), 56_975_360),
        (LLAMA_7B, FIVE, lk.DoRA(rank=16), 28_925_952),
        (LLAMA_13B, FIVE, lk.DoRA(rank=32), 89_190_400),
        (LLAMA3_8B, FIVE, lk.DoRA(rank=32), 57_409_536),
        (LLAMA_7B, "all-linear", lk.DoRA(rank=64), 161_267_712),
        (LLAMA_7B, "all-linear", [lk.VeRA(rank=1024), lk.DoRA()], 2_949_120),
        (LLAMA_3B, "qv", lk.DoRA(rank=32), 9_289_728),  # a number per input: 9,347,072
        (LLAMA_3B, "qv", lk.AdaLoRA(initial_rank=64), 18_353_664),
        ((1, square(768)), "q", lk.AdaLoRA(initial_rank=1, target_rank=1), 1_537),
        ((1, DEBERTA[1]), ["in"], lk.AdaLoRA(initial_rank=1, target_rank=1), 3_841),
        (DEBERTA, "all-linear", lk.AdaLoRA(initial_rank=2, target_rank=2), 331_920),
        (DEBERTA, "all-linear", lk.AdaLoRA(initial_rank=8), 1_327_680),
        (GPT3, "qv", lk.DeltaLoRA(rank=8, alpha=16), 37_748_736),
    ],
)  # fmt: skip
def test_the_papers_counts(shapes: Any, targets: Any, member: Any, count: int) -> None:
    assert adapted(shapes, member, targets).trainable_parameters == count


@pytest.mark.parametrize(
    ("rank", "all_numbers"), [(1, 2_384_064), (16, 2_755_584), (256, 8_699_904)]
)
def test_veras_2_8M_is_trained_plus_frozen_shared(rank: int, all_numbers: int) -> None:
    """All six of the paper's GPT-3 cells, which count the shared pair too."""
    adapter = adapted(GPT3, lk.VeRA(rank=rank))
    assert sum(p.numel() for p in adapter.parameters()) == all_numbers
    shared = all_numbers - adapter.trainable_parameters
    assert shared == 2 * 12288 * rank
    lora = adapted(GPT3, lk.LoRA(rank=16)).trainable_parameters
    if rank == 16:
        assert 1 - adapter.trainable_parameters / lora == pytest.approx(0.9687, abs=5e-5), (
            "97 % fewer"
        )
        assert 1 - all_numbers / lora == pytest.approx(0.9635, abs=5e-5)


@pytest.mark.parametrize(
    ("shapes", "targets", "base", "lora", "dora"),
    [
        (LLAMA_7B, FIVE, 6_738_415_616, 0.83, 0.84),
        (LLAMA_13B, FIVE, 13_015_864_320, 0.67, 0.68),
        (LLAMA3_8B, FIVE, 8_030_261_248, 0.70, 0.71),
    ],
)
def test_doras_percentages(shapes: Any, targets: Any, base: int, lora: float, dora: float) -> None:
    for member, percent in ((lk.LoRA(rank=32), lora), (lk.DoRA(rank=32), dora)):
        trained = adapted(shapes, member, targets).trainable_parameters
        assert 100 * trained / (base + trained) == pytest.approx(percent, abs=0.01)


def test_lora_fas_share() -> None:
    share = {
        names: adapted(LLAMA_7B, lk.LoRAFA(rank=16), names).trainable_parameters
        / adapted(LLAMA_7B, lk.LoRA(rank=16), names).trainable_parameters
        for names in ("all-linear", ("gate", "up"), ("down",))
    }
    assert list(share.values()) == pytest.approx([0.544, 0.729, 0.271], abs=5e-4)
