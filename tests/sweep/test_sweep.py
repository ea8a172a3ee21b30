"""Train, merge, save, load and remove a LoRA adapter on every architecture of the sweep."""

from __future__ import annotations

import pytest
import transformers

from sweep import architectures, checks
from sweep.architectures import REFUSED

PRESENT = [name for name, head in architectures.HEADS.items() if hasattr(transformers, head)]
"""Those that the installed transformers has."""


def test_the_sweep_is_wide() -> None:
    assert len(PRESENT) >= 200


@pytest.mark.parametrize("name", PRESENT)
def test_an_adapter_trains_merges_is_saved_and_goes(name: str) -> None:
    found = checks.examined(name)
    assert found.refused.keys() == REFUSED.get(name, {}).keys(), (
        "what lorakin refuses here is not what REFUSED says"
    )
    if not found.adapted:
        return
    assert not found.ungiven, (
        "adapter tensors without a gradient, although the base weight gets one"
    )
    assert not found.unmoved, (
        "modules whose adapter has a gradient of zero, although the base weight's is not"
    )
    assert found.unlike_itself == 0, "the base's own output differs from call to call with one seed"
    assert found.moved > checks.MOVED, "the adapter does not change the output"
    assert found.merged <= checks.EXACT, "merged is not unmerged"
    assert found.unmerged == 0, "unmerging does not give back what was before"
    assert found.loaded <= checks.SAME, "what was saved and loaded is not what was trained"
    assert not found.changed, "removing the adapter does not give the base back"
    assert found.removed == 0, "the base's output is not what it was"
