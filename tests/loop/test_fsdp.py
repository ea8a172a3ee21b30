"""FSDP2 by hand: the base sharded over two processes, the adapter whole in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from loop import sharded
from training.test_processes import launch

SCRIPT = str(Path(sharded.__file__))
ORDERS = ("early", "late", "tokens", "plain", "unused")


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """What two processes say of each order: they start once, for all."""
    lines = launch(SCRIPT, *ORDERS, "wrong").stdout.splitlines()
    return {line.split()[1]: line.split()[2:] for line in lines if line.startswith("figures")}


@pytest.mark.parametrize("order", ORDERS)
def test_sharded_is_whole(
    order: str, said: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the base is sharded makes no difference, nor an optimizer that lorakin sees late."""
    monkeypatch.setattr(sharded, "fully_shard", lambda module, **_: module)
    whole = sharded.figures_of(order, 0, 1)
    assert [float(figure) for figure in said[order]] == pytest.approx(whole, rel=1e-5)


def test_a_sharded_adapter_is_refused(said: dict[str, list[str]]) -> None:
    assert said["wrong"] == ["StateError", "True"]
