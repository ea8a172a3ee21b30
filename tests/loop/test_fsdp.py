"""FSDP2 by hand: the base sharded over two processes, the adapter whole in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from loop import sharded
from training.test_processes import launch

SCRIPT = str(Path(sharded.__file__))


def figures(order: str) -> list[float]:
    (line,) = [
        line for line in launch(SCRIPT, order).stdout.splitlines() if line.startswith("figures")
    ]
    return [float(figure) for figure in line.split()[1:]]


@pytest.mark.parametrize("order", ["early", "late", "tokens"])
def test_sharded_is_whole(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "fully_shard", lambda module, **_: module)
    assert figures(order) == pytest.approx(sharded.run(order, 0, 1), rel=1e-5)


def test_an_optimizer_that_is_seen_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "fully_shard", lambda module, **_: module)
    assert figures("plain") == pytest.approx(sharded.run("plain", 0, 1), rel=1e-5)


def test_a_sharded_adapter_is_refused() -> None:
    with pytest.raises(
        AssertionError, match=r"was sharded together with the base.*ignored_params=set"
    ):
        launch(SCRIPT, "wrong")


def test_a_tensor_that_a_process_does_not_use() -> None:
    assert figures("unused") == pytest.approx(sharded.run_unused(0, 1), rel=1e-5)
