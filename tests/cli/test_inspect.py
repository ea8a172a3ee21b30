"""`lorakin inspect --html`: a page for every member, from lorakin's files and from PEFT's, that
says what it cannot know.
"""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

import lorakin as lk
from conftest import randomise, tiny_llama, tiny_mixtral
from lorakin.cli.app import run
from lorakin.family import FAMILY, Member, Method
from lorakin.storage.summary import summarise
from report.browser import Browser, browser

__all__ = ["browser"]


SMALL: dict[str, dict[str, Any]] = {
    "delta-lora": {"start_step": 1},
    "lora-xs": {"rank": 4},
    "eva": {"rank": 4},
    "lora-ga": {"rank": 4},
}
"""Settings of members whose own do not suit a tiny model, or a run of three steps."""


def saved(member: Any, path: Path, **options: Any) -> Path:
    return randomise(lk.adapt(tiny_llama(), member, **options)).save(path / "adapter")


def trained(kind: Any, path: Path) -> Path:
    """Its adapter after three steps, chosen by a probe if that is its way."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    batch, model = {"input_ids": ids, "labels": ids}, tiny_llama().train()
    member = kind(**SMALL.get(kind.word, {}))
    method = Method.of(member)
    probe = (
        [batch] if method.needed_probe is not None or method.measured_member is not None else None
    )
    adapter = lk.adapt(model, member, targets=["q_proj", "v_proj", "down_proj"], probe=probe)
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=3)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter.save(path / "adapter")


def page_of(adapter: Path) -> str:
    """The text of its page, without the library."""
    out = adapter.parent / "page.html"
    assert run(["inspect", str(adapter), "--html", str(out)]) == 0
    return html.unescape(re.sub("<script>.*?</script>", "", out.read_text(), flags=re.DOTALL))


def lines_of(text: str) -> dict[str, Any]:
    """The ranks to copy."""
    (lines,) = re.findall(r"<code>(\{.*?\})</code>", text, re.DOTALL)
    return dict(json.loads(lines))


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.word)
def test_every_member_has_a_page(kind: type[Member], tmp_path: Path) -> None:
    adapter = trained(kind, tmp_path)
    text = page_of(adapter)
    assert "<h1>Adapter adapter</h1>" in text
    assert kind.word in text
    assert ("‖up·down‖ by layer and module" in text) == summarise(adapter).has_gain
    for norm in summarise(adapter).norms.values():
        assert f">{norm:.3g}<" in text
    assert ("magnitudes, one for each output" in text) == any(
        "gain" in member.decides for member in summarise(adapter).method.members
    )
    assert lines_of(text)["r"] > 0


def test_the_page_opens_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    adapter = saved(lk.LoRA(rank=4), tmp_path, rank_pattern={"q_proj": 2})
    (adapter / "importance.json").write_text(
        json.dumps(dict.fromkeys(summarise(adapter).ranks, 1 / 14))
    )
    page_of(adapter)
    assert browser.open(tmp_path / "page.html", width=360).unfolded().marks() == [
        14,
        28,
        28,
        14,
        28,
    ]
    assert browser.errors() == []
    assert browser.requests() == [(tmp_path / "page.html").as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    titles = browser.run("return [...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert titles == [
        "At a glance",
        "Change",
        "Importance",
        "Rank",
        "Rank that is needed",
        "Every module",
    ]


@pytest.mark.filterwarnings(
    "ignore:adapter 'default' changes nothing:lorakin.errors.LorakinWarning"
)
def test_the_suggested_ranks_are_what_the_change_needs(tmp_path: Path) -> None:
    """A change of rank 1 in q, of rank 2 in k, of none in v, under rank 8."""
    adapter = lk.adapt(
        tiny_llama(), lk.LoRA(rank=8, alpha=16), targets=["q_proj", "k_proj", "v_proj"]
    )
    with torch.no_grad():
        for path in adapter.placement.methods:
            up = adapter.tensors.saved_tensors(path)["B"]
            up.zero_()
            for direction in range({"q": 1, "k": 2, "v": 0}[path.rpartition(".")[2][0]]):
                up[direction, direction] = 1.0
    text = page_of(adapter.save(tmp_path / "adapter"))
    found = lines_of(text)
    assert found["r"] in (1, 2)
    assert found["lora_alpha"] == 2 * found["r"]
    other = {1: ("k_proj", 2), 2: ("q_proj", 1)}[found["r"]]
    assert found["rank_pattern"] == dict([other])
    assert found["alpha_pattern"] == {other[0]: 2 * other[1]}
    assert "model.layers.0.self_attn.v_proj\nmodel.layers.1.self_attn.v_proj" in text
    now = 2 * 8 * ((32 + 32) + 2 * (16 + 32))
    then = 2 * (1 * (32 + 32) + 2 * (16 + 32))
    assert f"have {then:,} parameters, {then / now:.0%} of the {now:,}" in text


@pytest.mark.filterwarnings(
    "ignore:adapter 'default' changes nothing:lorakin.errors.LorakinWarning"
)
def test_an_untrained_adapter_has_no_pictures(tmp_path: Path) -> None:
    text = page_of(lk.adapt(tiny_llama(), lk.LoRA(rank=2)).save(tmp_path / "adapter"))
    assert "No module changes" in text
    assert "<figure" not in text


def test_without_the_shared_pair_there_are_facts(tmp_path: Path) -> None:
    text = page_of(saved(lk.VeRA(rank=4, save_projection=False), tmp_path))
    assert "drawn again" in text
    assert "14 modules" in text
    assert "<figure" not in text


def test_a_shared_pair_is_said_to_be_too_wide(tmp_path: Path) -> None:
    text = page_of(saved(lk.VeRA(rank=4), tmp_path))
    assert "narrower" in text
    assert "because modules share a pair" in text


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    text = page_of(tmp_path / "adapter")
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    norm = float(2 * (tensors[key.format("B")] @ tensors[key.format("A")]).norm())
    assert f">{norm:.3g}<" in text


def test_experts_are_shown_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = lk.adapt(
        tiny_mixtral(), lk.LoRA(rank=4), targets=["q_proj", "gate_up_proj", "down_proj"]
    )
    randomise(adapter).save(tmp_path / "a")
    assert run(["inspect", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "18 modules: self_attn.q_proj, mlp.experts.down_proj, mlp.experts.gate_up_proj" in shown
    norms = [
        adapter.tensors.pair_now(f"model.layers.0.mlp.experts.down_proj.{n}").norm()
        for n in range(4)
    ]
    assert f"{math.hypot(*norms):.3g}" in shown


def test_what_is_in_the_way_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = saved(lk.LoRA(rank=2), tmp_path)
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert run(["inspect", str(adapter), "--html", str(mine)]) == 2
    assert "mine.html" in capsys.readouterr().err.replace("\n", " ")
    assert mine.read_text() == "mine"
    (adapter / "importance.json").write_text('{"a": "much"}')
    assert run(["inspect", str(adapter), "--html", str(tmp_path / "page.html")]) == 2
    assert (
        "importance.json cannot be read (a is 'much', expected"
        in capsys.readouterr().err.replace("\n", " ")
    )
    assert not (tmp_path / "page.html").exists()


def test_the_result_stays_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved(lk.LoRA(rank=2), tmp_path)
    assert run(["inspect", str(adapter), "--json", "--html", str(tmp_path / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out)["member"] == "lora"
    assert (tmp_path / "page.html").is_file()


def _set(value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor], key: str) -> None:
        tensors[key].view(-1)[0] = value

    return change


def _cast(dtype: torch.dtype) -> Any:
    def change(tensors: dict[str, torch.Tensor], key: str) -> None:
        tensors[key] = tensors[key].to(dtype)

    return change


BROKEN = {
    "NaN": _set(float("nan")),
    "infinity": _set(float("inf")),
    "int8": _cast(torch.int8),
    "bool": _cast(torch.bool),
    "float8": _cast(torch.float8_e4m3fn),
    "belong to nothing": lambda tensors, key: tensors.update(stray=torch.ones(2)),
    "lacks": lambda tensors, key: tensors.pop(key),
    "no tensors": lambda tensors, key: tensors.clear(),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("options", [["--json"], ["--html", "page.html"]])
def test_what_every_other_command_refuses(
    what: str,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = saved(lk.LoRA(rank=2), tmp_path)
    (adapter / "lorakin.json").unlink()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    BROKEN[what](tensors, next(iter(tensors)))
    save_file(tensors, file, metadata={"format": "pt"})
    assert run(["inspect", str(adapter), *options]) == 2
    said = capsys.readouterr()
    assert (
        not said.out
        and what in said.err.replace("\n", " ")
        and not (tmp_path / "page.html").exists()
    )
