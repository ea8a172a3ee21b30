"""Merged models stop where training ended an answer: generation_config.json, and the tokens that a
GGUF file names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_llama
from lorakin.serving.export import export
from lorakin.serving.generation_config import FILE, write_stop_ids
from lorakin.serving.job import ExportRequest
from lorakin.training.endings import end_of_turn
from peers import llama_cpp
from training.carried import TEMPLATES, tokenizer_of

CHATML = TEMPLATES["qwen2_5"].replace(
    "<|im_end|>", "<|over|>"
)  # an end that no reader knows by its name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose template closes turns with <|over|>."""
    folder = tmp_path_factory.mktemp("base")
    made = tokenizer_of(CHATML, "</s>", merges=True)
    model = tiny_llama(
        tied=False,
        vocab_size=len(made),
        eos_token_id=made.eos_token_id,
        bos_token_id=made.bos_token_id,
    )
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=made.eos_token_id, temperature=0.25, do_sample=True
    )
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def exported(base: Path, tmp_path: Path, to: str, **more: Any) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    randomise(lk.adapt(model, lk.LoRA(rank=2))).save(tmp_path / "adapter")
    export(ExportRequest(str(tmp_path / "adapter"), to, str(tmp_path / to), str(base), **more))
    return tmp_path / to


def ids(base: Path) -> tuple[int, int]:
    made = transformers.AutoTokenizer.from_pretrained(base)
    (end,) = end_of_turn(made)
    assert made.convert_ids_to_tokens(end) == "<|over|>" and end != made.eos_token_id
    return made.eos_token_id, end


def saying(model: Any, after: dict[int, int]) -> Any:
    """The model, made to say after each token the one that stands here."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (read, said) in enumerate(after.items()):
            model.model.embed_tokens.weight[read, place] = 1
            model.lm_head.weight[said, place] = 1
    return model


def test_a_merged_model_ends_at_both(base: Path, tmp_path: Path) -> None:
    out = exported(base, tmp_path, "merged")
    content = json.loads((out / FILE).read_text())
    assert content["eos_token_id"] == list(ids(base))
    assert content["temperature"] == 0.25 and content["do_sample"] is True
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert merged.generation_config.eos_token_id == list(ids(base))
    saying(merged, {5: 6, 6: ids(base)[1], ids(base)[1]: 5})
    assert merged.generate(torch.tensor([[5]]), max_new_tokens=6, do_sample=False).tolist() == [
        [5, 6, ids(base)[1]]
    ]


def test_a_base_without_the_file(base: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for file in base.iterdir():
        if file.name != FILE:
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    write_stop_ids(tmp_path / "other")
    made = transformers.GenerationConfig.from_pretrained(tmp_path / "other")
    assert made.eos_token_id == list(ids(base))
    assert made.bos_token_id == transformers.AutoConfig.from_pretrained(base).bos_token_id


def test_what_is_right_is_left_alone(tmp_path: Path, tokenizer: Any) -> None:
    """An end of turn that is the end of text; a classifier; a model without a tokenizer."""
    tiny_llama(eos_token_id=1).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    before = (tmp_path / "llama" / FILE).read_bytes()
    write_stop_ids(tmp_path / "llama")
    assert (tmp_path / "llama" / FILE).read_bytes() == before
    tiny_bert().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    write_stop_ids(tmp_path / "bert")
    assert not (tmp_path / "bert" / FILE).exists()
    tiny_llama(eos_token_id=9).save_pretrained(tmp_path / "bare")
    write_stop_ids(tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / FILE).read_text())["eos_token_id"] == 9


@pytest.mark.parametrize("content", ["[1]", "{", '{"eos_token_id": 1'])
def test_a_damaged_file(base: Path, tmp_path: Path, content: str) -> None:
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FILE).write_text(content)
    with pytest.raises(lk.ModelError, match=FILE):
        write_stop_ids(tmp_path)


def test_a_gguf_model_names_both(base: Path, tmp_path: Path) -> None:
    fields = gguf.GGUFReader(
        exported(base, tmp_path, "gguf-merged", verify=False) / "model.gguf"
    ).fields
    assert fields[gguf.Keys.Tokenizer.EOS_ID].contents() == ids(base)[0]
    assert fields[gguf.Keys.Tokenizer.EOT_ID].contents() == ids(base)[1]


@pytest.mark.peer
@pytest.mark.skipif(llama_cpp.available() is not None, reason=str(llama_cpp.available()))
def test_llama_cpp_ends_an_answer_at_each(base: Path, tmp_path: Path) -> None:
    made = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    end, turn = ids(base)
    plain = made("a", add_special_tokens=False)["input_ids"][0]
    saying(model, {5: plain, plain: turn, turn: end, end: end})
    model.save_pretrained(tmp_path / "says")
    made.save_pretrained(tmp_path / "says")
    randomise(lk.adapt(model, lk.LoRA(rank=2)), 1e-4).save(tmp_path / "adapter")
    export(
        ExportRequest(
            str(tmp_path / "adapter"),
            "gguf-merged",
            str(tmp_path / "out"),
            str(tmp_path / "says"),
            verify=False,
        )
    )
    (said,) = llama_cpp.run(tmp_path / "out" / "model.gguf", [[5]], max_tokens=3, top=2)
    assert said.tokens == [plain, turn, end]
    assert said.ends == [False, True, True]


def test_the_template_of_the_training_goes_along(base: Path, tmp_path: Path) -> None:
    """An adapter that was trained with another chat template than the base's ends its turns by that
    one.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    randomise(lk.adapt(model, lk.LoRA(rank=2))).save(tmp_path / "adapter")
    other = CHATML.replace("<|over|>", "<|im_start|>")
    (tmp_path / "adapter" / "chat_template.jinja").write_text(other)
    for to in ("merged", "gguf-merged"):
        export(
            ExportRequest(
                str(tmp_path / "adapter"), to, str(tmp_path / to), str(base), verify=False
            )
        )
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    end = merged.convert_tokens_to_ids("<|im_start|>")
    assert merged.chat_template == other
    assert json.loads((tmp_path / "merged" / FILE).read_text())["eos_token_id"] == [
        merged.eos_token_id,
        end,
    ]
    fields = gguf.GGUFReader(tmp_path / "gguf-merged" / "model.gguf").fields
    assert fields[gguf.Keys.Tokenizer.CHAT_TEMPLATE].contents() == other
    assert fields[gguf.Keys.Tokenizer.EOT_ID].contents() == end
    assert 'PARAMETER stop "<|im_start|>"' in (tmp_path / "gguf-merged" / "Modelfile").read_text()
