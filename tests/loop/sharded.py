"""One of two processes of tests/loop/test_fsdp.py: FSDP2 by hand, a loop that accumulates.

torchrun --nproc_per_node 2 tests/loop/sharded.py early late plain tokens unused wrong
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import lorakin as lk
from conftest import tiny_llama


def run(order: str, rank: int, world: int) -> list[float]:
    """Train; `order` says when the base is sharded. The norms of the gradients and the sum of the
    adapter's sizes.
    """
    model = tiny_llama()
    adapter = lk.adapt(
        model, lk.DoRA(rank=4), seed=0, trainable_tokens=[5, 6] if order == "tokens" else None
    )
    left_out = set() if order == "wrong" else set(adapter.parameters())

    def shard() -> None:
        for layer in model.model.layers:
            fully_shard(layer, ignored_params=left_out)
        fully_shard(model, ignored_params=left_out)

    if order in ("early", "tokens", "wrong"):
        shard()
    if order == "plain":  # an optimizer that lorakin first sees at its first step
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            adapter.parameter_groups(lr=1e-2), weight_decay=0.0
        )
        shard()
    else:
        optimizer = adapter.optimizer(lr=1e-2)
    if order == "late":
        shard()
    generator, said = torch.Generator().manual_seed(1), []
    for _ in range(4):
        for _ in range(2):
            ids = torch.randint(3, 64, (4, 9), generator=generator)[rank::world]
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        trained = [p for p in adapter.parameters() if p.requires_grad]
        if order != "plain":
            said.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    return [*said, sum(float(p.double().abs().sum()) for p in adapter.parameters())]


class Experts(torch.nn.Module):
    """Two experts, of which a batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        out: torch.Tensor = self.experts[which](x)
        return out


def run_unused(rank: int, world: int) -> list[float]:
    """Each process uses an expert of its own, and has no gradient for the other's adapter."""
    model = Experts()
    adapter = lk.adapt(model, lk.LoRA(rank=2), seed=0)
    if world > 1:
        fully_shard(model, ignored_params=set(adapter.parameters()))
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.5)
    x = torch.linspace(-1, 1, 16).view(2, 8)
    for _ in range(4):
        mine = [rank] if world > 1 else [0, 1]
        for which in mine:
            (model(x[which], which).square().sum() / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
    sums = torch.tensor(
        [float(p.detach().double().square().sum()) for p in adapter.parameters()],
        dtype=torch.float64,
    )
    if world > 1:
        both = [torch.empty_like(sums) for _ in range(world)]
        dist.all_gather(both, sums)
        assert torch.equal(both[0], both[1]), "the processes differ"
    return sums.tolist()


def figures_of(order: str, rank: int, world: int) -> list[float]:
    """What training in this order comes to."""
    return run_unused(rank, world) if order == "unused" else run(order, rank, world)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for order in sys.argv[1:]:
        try:
            figures: list[object] = [*figures_of(order, dist.get_rank(), dist.get_world_size())]
        except lk.StateError as error:
            figures = [type(error).__name__, "ignored_params" in str(error)]
        if dist.get_rank() == 0:
            print("figures", order, *figures, flush=True)
    dist.barrier()  # or the one that leaves first may break the other
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo's may abort while the interpreter is taken down
