"""The order of a classifier's classes is the adapter's own: a recipe beside it that was edited is
not taken on its word.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lorakin as lk
from conftest import randomise, tiny_bert
from lorakin.storage import directory
from lorakin.training.with_adapter import labels_of


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    model.config.id2label = {0: "no", 1: "yes"}
    saved = randomise(lk.adapt(model, lk.LoRA(2), modules_to_save=["classifier"])).save(
        tmp_path / "adapter"
    )
    recipe = saved / "recipe.yaml"
    assert labels_of(directory.read(saved)) == ["no", "yes"]
    recipe.write_text("labels: ['no', 'yes']\n")
    assert labels_of(directory.read(saved)) == ["no", "yes"]
    recipe.write_text("labels: ['yes', 'no']\n")
    with pytest.raises(lk.AdapterError):
        labels_of(directory.read(saved))
    own = json.loads((saved / "lorakin.json").read_text())
    del own["base"]["labels"], own["sha256"]  # as an earlier version wrote it
    (saved / "lorakin.json").write_text(json.dumps(own))
    assert labels_of(directory.read(saved)) == ["yes", "no"]
