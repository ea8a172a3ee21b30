"""Models, batches and methods for the tests on a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from family.test_composition import LEGAL, STARTS, members
from gpu.kernel_count import KernelCount
from lorakin.family import FAMILY, Method

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
STEPS = 8
SINGLE = [(member.word,) for member in FAMILY]


def without_dropout(model: Any) -> Any:
    """Returns a model of transformers without dropout of its own: two devices draw otherwise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MODELS = {
    "llama": tiny_llama,
    "gpt2": lambda: without_dropout(tiny_gpt2()),
    "bert": lambda: without_dropout(tiny_bert()),
    "mixtral": tiny_mixtral,
}


def batch_for(model: Any, device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5)).to(device)
    if "Classification" in type(model).__name__:
        labels = torch.tensor([0, 1], device=device)
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def adapted(
    model: Any, words: tuple[str, ...], device: torch.device, **options: Any
) -> tuple[lk.Adapter, dict[str, Tensor]]:
    """Adapts a model, whose inputs are on `device`; a batch is the probe for those that want one.

    A member that starts from data does it on the CPU: rounding may give other singular vectors.
    """
    batch = batch_for(model, device)
    method = Method.of(members(words))
    where = CPU if method.measured_member is not None else device
    looks = method.needed_probe is not None or method.measured_member is not None
    probe = [{key: tensor.to(where) for key, tensor in batch.items()}] if looks else None
    model.to(where)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rank_above", lk.LorakinWarning)
        adapter = lk.adapt(model, method, seed=0, probe=probe, rank_above="clamp", **options)
    model.to(device)
    return adapter, batch


def moved_from_start(adapter: lk.Adapter) -> lk.Adapter:
    """Moves what trains a little, the same on each device, so that no gradient is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise.to(parameter.device))
    return adapter


def losses_of(
    called: Any,
    adapter: lk.Adapter,
    batch: dict[str, Tensor],
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    lr: float = 1e-3,
) -> list[float]:
    """Trains for `STEPS` steps, and returns the losses; `called` is the model or wraps it."""
    optimizer = adapter.optimizer(kind, lr=lr, total_steps=STEPS)
    called.train()
    losses = []
    for _ in range(STEPS):
        loss = called(**batch).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Stack(nn.Module):
    """Linear layers one after another: what a step costs is the layers' cost."""

    def __init__(self, layers: int, width: int, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


__all__ = [
    "CPU", "GPU", "LEGAL", "MODELS", "SINGLE", "STARTS", "STEPS", "KernelCount", "Stack",
    "adapted", "batch_for", "losses_of", "members", "moved_from_start", "without_dropout",
]  # fmt: skip
