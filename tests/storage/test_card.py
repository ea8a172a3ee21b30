"""The model card beside an adapter.

What it says, that nothing breaks it, and that a person's is left alone.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lorakin as lk
from conftest import MEMBERS, randomise, tiny_bert, tiny_llama, tiny_mixtral
from lorakin.storage import card, directory

NASTY = (
    "a\n---\nbase_model: evil\n```python\nrm\n```\n# no | `x` ``y`` <!-- --> <b> [l](u) "
    "\"q\" 'q' \ud800 \u2028 \x07 " + "z" * 999
)


def front(text: str) -> dict[str, Any]:
    """The front matter as the hub cuts it out."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    matter: dict[str, Any] = yaml.safe_load(found[1])
    return matter


def saved(adapter: lk.Adapter, path: Path, **options: Any) -> str:
    return (adapter.save(path, **options) / card.CARD).read_text()


def named(model: nn.Module, name: str) -> Any:
    model.name_or_path = name  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    "word", ["lora", "lora+", "lora-fa", "vera", "dora", "adalora", "delta-lora"]
)
def test_what_it_says_of_each_member(word: str, tmp_path: Path) -> None:
    adapter = randomise(lk.adapt(named(tiny_llama(), "org/base"), MEMBERS[word]()))
    directory.save(adapter, tmp_path)
    text = (tmp_path / card.CARD).read_text()
    matter = front(text)
    assert matter["base_model"] == "org/base" and matter["base_model_relation"] == "adapter"
    assert (matter["library_name"], matter["pipeline_tag"]) == ("peft", "text-generation")
    assert {"lora", "lorakin", word} <= set(matter["tags"])
    assert f"{adapter.trainable_parameters:,} of " in text
    assert (
        'LlamaForCausalLM.from_pretrained("org/base")' in text
        and "PeftModel.from_pretrained" in text
    )
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.base_model == "org/base"


@pytest.mark.parametrize("word", ["lora", "vera", "dora", "adalora"])
def test_the_code_in_it_runs(word: str, tmp_path: Path, ids: torch.Tensor) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    adapter = lk.adapt(named(base, "org/base"), MEMBERS[word]())
    optimizer = adapter.optimizer(lr=1e-2, total_steps=8)
    for _ in range(8):
        base(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    text = saved(adapter, tmp_path / "adapter")
    ours, peers = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for code in (ours, peers):
        if code is peers:
            pytest.importorskip("peft")
        code = code.replace("org/base", str(tmp_path / "base")).replace(
            "path/to/this/directory", str(tmp_path / "adapter")
        )
        names: dict[str, Any] = {}
        exec(code, names)
        torch.testing.assert_close(
            names["model"](ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_a_classifier_a_quantised_base_and_a_model_of_no_library(tmp_path: Path) -> None:
    text = saved(
        randomise(lk.adapt(tiny_bert(3), lk.LoRA(2), modules_to_save=["classifier"])),
        tmp_path / "one",
    )
    assert (
        front(text)["pipeline_tag"] == "text-classification"
        and "num_labels=3" in text
        and "`classifier`" in text
    )
    assert "base_model" not in front(text)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    text = saved(randomise(lk.adapt(plain, lk.LoRA(2))), tmp_path / "two")
    assert (
        "pipeline_tag" not in front(text) and "transformers" not in text and "`Sequential`" in text
    )
    dora = randomise(lk.adapt(tiny_mixtral(), lk.DoRA(rank=2), ["mlp.experts.down_proj"]))
    assert "refuses" in saved(dora, tmp_path / "three")


def test_only_what_the_hub_knows_is_a_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").mkdir()
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(2)))

    def base(name: Any, fetched: str | None = None) -> str | None:
        adapter.model.name_or_path = name  # type: ignore[assignment]
        adapter.model.config = types.SimpleNamespace(_commit_hash=fetched)  # type: ignore[assignment]
        return card.base_id(adapter)

    assert base("org/base") == "org/base" and base("gpt2", "a" * 40) == "gpt2"
    assert all(
        base(name) is None
        for name in ("gpt2", "org/here", "/tmp/model", "a/b/c", "", None, 'o/"x', "o/x\n", "../x")
    )


def test_nothing_breaks_it(tmp_path: Path) -> None:
    adapter = randomise(lk.adapt(named(tiny_llama(), NASTY), lk.LoRA(2)))
    text = saved(adapter, tmp_path, notes={NASTY: NASTY, "Data": "rows | of\n\n---\nmine"})
    plain = saved(adapter, tmp_path, notes={"a": "b", "c": "d"})
    assert front(text) == front(plain) and "base_model" not in front(text)
    assert text.count("\n") == plain.count("\n")
    assert text.count("```") == plain.count("```") and text.count("<!--") == plain.count("<!--")
    assert [line[:4] for line in text.splitlines()][:20] == [
        line[:4] for line in plain.splitlines()
    ][:20]
    assert max(map(len, text.splitlines())) < 2000
    assert "rows \\| of --- mine" in text


def test_the_same_adapter_gives_the_same_card(tmp_path: Path) -> None:
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(2)))
    one = saved(adapter, tmp_path / "one")
    other = saved(lk.load(tiny_llama(), tmp_path / "one"), tmp_path / "another")  # frozen there
    assert one == other == saved(adapter, tmp_path / "one")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "# Mine\n",
        lambda text: text.replace("A lora adapter", "Our adapter"),
        lambda text: text + "\nAnd more.\n",
        lambda text: text.rpartition("<!--")[0],
        lambda text: "",
        lambda text: b"\xff\xfe\x00",
    ],
    ids=["other", "changed", "appended", "without its mark", "empty", "no text"],
)
def test_what_a_person_wrote_stays(edit: Callable[[str], str | bytes], tmp_path: Path) -> None:
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(2)))
    edited = edit(saved(adapter, tmp_path))
    content = edited if isinstance(edited, bytes) else edited.encode()
    (tmp_path / card.CARD).write_bytes(content)
    adapter.save(tmp_path)
    assert (tmp_path / card.CARD).read_bytes() == content


def test_its_own_is_written_anew(tmp_path: Path) -> None:
    first = saved(randomise(lk.adapt(tiny_llama(), lk.LoRA(2))), tmp_path)
    (tmp_path / card.CARD).write_bytes(
        first.replace("\n", "\r\n").encode()
    )  # as git may have it on Windows
    second = saved(randomise(lk.adapt(tiny_llama(), lk.DoRA(rank=3))), tmp_path)
    assert second != first and card.is_generated(second) and "dora" in second
    (tmp_path / card.CARD).unlink()
    (tmp_path / card.CARD).mkdir()  # nothing to write to, and no reason to fail
    randomise(lk.adapt(tiny_llama(), lk.LoRA(2))).save(tmp_path)
    assert (tmp_path / "lorakin.json").exists()
