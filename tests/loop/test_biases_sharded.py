"""An adapter with biases beside a base that FSDP2 shards, in one process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lorakin as lk
from conftest import randomise, tiny_bert


@pytest.fixture
def process() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_base_alone_is_sharded(process: None, tmp_path: Path, ids: Tensor) -> None:
    mesh = init_device_mesh("cpu", (1,))
    models = [tiny_bert(), tiny_bert()]
    plain, adapter = (
        randomise(lk.adapt(m, lk.LoRA(rank=2), "query", bias="all", seed=0)) for m in models
    )
    for layer in models[1].bert.encoder.layer:
        fully_shard(layer, mesh=mesh, ignored_params=set(adapter.parameters()))
    fully_shard(models[1], mesh=mesh, ignored_params=set(adapter.parameters()))
    for model in models:
        model(ids).logits.square().sum().backward()
    for one, other in zip(plain.parameters(), adapter.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    adapter.optimizer(lr=0.01).step()
    adapter.save(tmp_path / "a")
    again = tiny_bert()
    lk.load(again, tmp_path / "a")
    torch.testing.assert_close(again(ids).logits, models[1](ids).logits)
    with adapter.disabled():
        torch.testing.assert_close(models[1](ids).logits, tiny_bert()(ids).logits)
    late = tiny_bert()
    fully_shard(late, mesh=mesh)
    with pytest.raises(lk.StateError):
        lk.adapt(late, lk.LoRA(rank=2), "query", bias="all")
    assert not lk.adapters(late)
