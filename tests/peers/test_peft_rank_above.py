"""Adapters whose rank was clamped to a weight's smaller side, read by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import tiny_llama, tiny_mixtral
from inject.test_rank_above import MEMBERS, adapted, trained

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:rank_above"),
    pytest.mark.filterwarnings("ignore:.*adalora has not reached"),
]


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("word", MEMBERS)
def test_every_member_is_read_with_equal_logits(
    word: str, steps: int, ids: Tensor, tmp_path: Path
) -> None:
    adapter = trained(adapted(word, ids), ids, steps)
    want = adapter.model(ids).logits
    read: Any = peft.PeftModel.from_pretrained(tiny_llama(), adapter.save(tmp_path / "out"))
    torch.testing.assert_close(read(ids).logits, want, rtol=0, atol=1e-5)


def test_experts(ids: Tensor, tmp_path: Path) -> None:
    model = tiny_mixtral()
    adapter = lk.adapt(
        model,
        lk.LoRA(40),
        ["q_proj", "experts.gate_up_proj", "experts.down_proj"],
        rank_above="clamp",
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    want = model(ids).logits
    read = peft.PeftModel.from_pretrained(tiny_mixtral(), adapter.save(tmp_path / "out"))
    torch.testing.assert_close(read(ids).logits, want, rtol=0, atol=1e-4)
