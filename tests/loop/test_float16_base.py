"""Gradients on a float16 base, against float64: with a scaled loss they are right, and a step that
overflows is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lorakin as lk
from conftest import tiny_bert, tiny_llama
from lorakin.loop.float16_base import FIRST_SCALE, leave_unscaling_to_the_scaler, loss_scaler
from lorakin.training import prepare_trainer

IDS = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
SMALL = 1 / 256
"""Times the loss: what a long run's, or a well-trained model's, comes to."""


def adapted(dtype: torch.dtype) -> tuple[Any, lk.Adapter]:
    model = tiny_llama(num_hidden_layers=4).to(torch.float64).to(dtype)
    adapter = lk.adapt(model, lk.LoRA(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, adapter


def errors(found: list[Tensor], true: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True)]


class Small(transformers.Trainer):
    """A loss that is small all over, in float32."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        logits = model(input_ids=inputs["input_ids"]).logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return SMALL * torch.nn.functional.cross_entropy(
            wide[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        )


def seen_by_the_optimizer(
    dtype: torch.dtype, tmp_path: Path, prepared: bool = True, **more: Any
) -> list[Tensor]:
    """The gradients in the first step of a Trainer, as the optimizer sees them."""
    model, adapter = adapted(dtype)
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(str(tmp_path), save_strategy="no", **{**settings, **more})
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    trainer = Small(
        model, args, train_dataset=rows, data_collator=transformers.default_data_collator
    )
    found: list[Tensor] = []

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            inner = getattr(optimizer, "optimizer", optimizer)
            inner.register_step_pre_hook(
                lambda *_: found.extend(p.grad.detach().clone() for p in adapter.parameters())
            )

    trainer.add_callback(Look())
    (prepare_trainer(trainer) if prepared else trainer).train()
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 2},
        {"optim": "adamw_torch"},
    ],
)
def test_a_trainer_gives_the_optimizer_right_gradients(
    more: dict[str, Any], tmp_path: Path
) -> None:
    true = seen_by_the_optimizer(torch.float64, tmp_path, **more)
    half = errors(seen_by_the_optimizer(torch.float16, tmp_path, **more), true)
    plain = errors(seen_by_the_optimizer(torch.float16, tmp_path, prepared=False, **more), true)
    other = errors(seen_by_the_optimizer(torch.bfloat16, tmp_path, **more), true)
    assert max(half) < 5e-3 and max(half) < max(other), (
        "as float16 rounds, which is finer than bfloat16"
    )
    assert max(plain) > 0.1, "without scaling it is another gradient"


def test_a_step_that_overflows_is_none(tmp_path: Path) -> None:
    """The scale is halved until it fits, the weights stay, and nothing that hangs on steps has seen
    one.
    """
    model, adapter = adapted(torch.float16)
    scaler, optimizer = loss_scaler(model), adapter.optimizer(torch.optim.AdamW, lr=0.1, fused=True)
    leave_unscaling_to_the_scaler([optimizer])
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    before, seen, tried = [p.detach().clone() for p in adapter.parameters()], [], 0
    optimizer.register_step_post_hook(lambda *_: seen.append(tried))
    while all(torch.equal(a, p) for a, p in zip(before, adapter.parameters(), strict=True)):
        tried += 1
        scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert tried < 60
    assert seen == [tried] and tried > 2 and scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_other_bases_are_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert not loss_scaler(adapted(dtype)[0]).is_enabled()
    assert loss_scaler(adapted(torch.float16)[0]).get_scale() == FIRST_SCALE


def test_what_trains_in_float16_is_refused() -> None:
    model = tiny_bert().to(torch.float16)
    lk.adapt(model, lk.LoRA(rank=2), modules_to_save=["classifier"])
    with pytest.raises(
        lk.SettingError,
        match="classifier",
    ):
        loss_scaler(model)


def test_a_probe_is_right_on_float16() -> None:
    found = {}
    for dtype in (torch.float64, torch.float16):
        model = tiny_llama().to(torch.float64).to(dtype)
        batches = [{"input_ids": IDS[n : n + 4], "labels": IDS[n : n + 4]} for n in (0, 4)]

        def small(model: Any, batch: dict[str, Tensor]) -> Tensor:
            return SMALL**2 * model(**batch).loss

        found[dtype] = lk.importance(
            model, lk.LoRADrop(rank=4), batches, loss=small, lr=1e-3, seed=0
        )
    for path, share in found[torch.float64].items():
        assert found[torch.float16][path] == pytest.approx(share, rel=0.05)
