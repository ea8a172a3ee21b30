"""The arms beyond those of `lorakin compare`: sizes of LoRA and DoRA, and modules at random."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from lorakin.compare.arms import BASE, CONTROL, FULL, HEAD, PLAIN, Arm

STARTS = ("pissa", "olora", "lora-xs", "eva", "lora-ga")
MEMBERS = ("lora", "lora+", "lora-fa", "vera", "dora", "adalora", "lora-drop", "delta-lora")
METHODS = (*MEMBERS, *STARTS)
PILOT = (PLAIN, "dora")
"""The two arms whose runs show how seeds and rows scatter before the others run."""
HALF, TWICE, FEW, HALF_DORA = "lora-half-rank", "lora-twice-rank", "lora-few", "dora-half-rank"
RANDOM = "lora-drop-random"
DRAWS_OF_MODULES = 2
FEW_TARGETS = {
    "minilm": ["query", "key", "value", "attention.output.dense", r".*\.\d+\.output\.dense", "pooler.dense"],
    "smollm2": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
}  # fmt: skip
"""Modules on which LoRA of rank 1 trains as many parameters as VeRA of rank 256 on all: 30,720 and
30,592 of MiniLM besides its head, 207,360 and 209,280 of SmolLM2."""


def sizes(plain: Arm, dora: Arm, model: str) -> list[Arm]:
    """Returns LoRA at half and twice the rank and at VeRA's size, and DoRA at half the rank.

    Alpha / rank stays, as in the DoRA paper's runs at half the rank.
    """

    def sized(name: str, arm: Arm, rank: int, title: str, **more: object) -> Arm:
        return dataclasses.replace(
            arm, name=name, title=title, kind=CONTROL, rank=rank, explains="", **more
        )  # type: ignore[arg-type]

    half, twice = plain.rank // 2, 2 * plain.rank
    arms = [
        sized(HALF, plain, half, f"lora, rank {half}"),
        sized(TWICE, plain, twice, f"lora, rank {twice}"),
        sized(HALF_DORA, dora, half, f"dora, rank {half}"),
    ]
    if model not in FEW_TARGETS:
        return arms
    few = {"targets": FEW_TARGETS[model]}
    return [*arms, sized(FEW, plain, 1, "lora, as many parameters as vera", recipe=few)]


def random_modules(drop: Arm, paths: Sequence[str], kept: int) -> list[Arm]:
    """Returns LoRA-drop with as many own pairs as it kept, on modules drawn at random.

    Args:
        drop: LoRA-drop's arm.
        paths: the adapted modules.
        kept: how many of them kept an own pair where the probe chose.
    """
    arms = []
    for draw in range(DRAWS_OF_MODULES):
        chosen = set(random.Random(draw).sample(sorted(paths), kept))
        importance = {path: 1.0 if path in chosen else 0.001 for path in paths}
        arms.append(
            dataclasses.replace(
                drop,
                name=f"{RANDOM}-{draw + 1}",
                title=f"lora-drop, random modules {draw + 1}",
                kind=CONTROL,
                given={**drop.given, "importance": importance, "keep": kept},
            )
        )
    return arms


MAIN = (*MEMBERS, "lora-alpha-x16", "lora-alpha-x3", BASE, HEAD, FULL)
"""The arms that run first on every task."""
