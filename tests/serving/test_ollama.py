"""Modelfiles: the template rendered as Ollama would is the tokenizer's own chat template."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conftest import TEMPLATE
from lorakin.serving.ollama import modelfile, turns_of
from serving.words import byte_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + message['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "zephyr": ZEPHYR, "ours": TEMPLATE}


def tokenizer(template: str | None) -> Any:
    made = byte_tokenizer(bos_token="<|user|>")
    made.chat_template = template
    return made


def as_ollama_would(text: str, prompt: str, system: str = "") -> str:
    """Ollama's reading of a Modelfile: its template with these values, up to where the answer begins."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    default = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert template
    values = {"System": system or (default[1] if default else ""), "Prompt": prompt}
    filled = template[1]
    for name, value in values.items():
        block = re.compile(rf"\{{\{{ if \.{name} \}}\}}(.*?)\{{\{{ end \}}\}}", re.DOTALL)
        filled = block.sub(lambda found, v=value: found[1] if v else "", filled)
        filled = filled.replace(f"{{{{ .{name} }}}}", value)
    return filled.split("{{ .Response }}")[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_written_as_the_chat_template_writes_them(name: str) -> None:
    made = tokenizer(TEMPLATES[name])
    text = modelfile("./model.gguf", None, made)
    for system in ("", "Answer in French."):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": "What is 2+2?"})
        if system and turns_of(made).system is None:  # type: ignore[union-attr]
            continue
        want = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert as_ollama_would(text, "What is 2+2?", system) == want
    assert (turns_of(made).system is None) == (name in ("mistral", "gemma"))  # type: ignore[union-attr]
    assert f'PARAMETER stop "{made.eos_token}"' in text


def test_the_end_of_a_turn_stops_the_answer() -> None:
    for name, stop in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")):
        assert f'PARAMETER stop "{stop}"' in modelfile("x", None, tokenizer(TEMPLATES[name])), name


def test_a_bos_that_the_reader_adds_itself_is_not_written_twice() -> None:
    from tokenizers import processors

    made = tokenizer(MISTRAL)
    number = made.bos_token_id
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", number)]
    )
    assert made("a")["input_ids"][0] == number
    assert as_ollama_would(modelfile("x", None, made), "Hi") == "[INST] Hi [/INST]"


def test_files_and_models_without_a_template_of_turns() -> None:
    assert modelfile("./base.gguf", "./adapter.gguf", tokenizer(ZEPHYR)).startswith(
        "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"
    )
    for template in (None, "{{ messages | length }}", "{{ raise_exception('no') }}"):
        text = modelfile("x", None, tokenizer(template))
        assert 'TEMPLATE """{{ .Prompt }}"""' in text and "# the model has no chat template of turns" in text
