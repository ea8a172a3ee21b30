"""Modelfiles: a conversation as Ollama writes it is the tokenizer's own; and nothing in one comes from a name or a token."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl

import lorakin as lk
from conftest import TEMPLATE
from lorakin.serving.ollama import modelfile, turns_of
from lorakin.training.endings import end_of_turn
from serving.modelfiles import parse, shown
from serving.words import byte_tokenizer
from training.carried import TEMPLATES, tokenizer_of

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
CHATML_WITH_DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OTHERS = {
    "mistral_7b": MISTRAL, "llama2": LLAMA2, "chatml_default": CHATML_WITH_DEFAULT, "zephyr": ZEPHYR,
    "ours": TEMPLATE,
}  # fmt: skip
NO_SYSTEM = {"mistral_7b", "gemma", "gemma_training"}
"""Templates that refuse a system prompt, or leave it out."""
SAID = ["What is 2+2?", "4", "In words,\n\nplease {{ .System }}.", "Four.", 'And """?']


def conversations(system: str | None) -> list[list[dict[str, str]]]:
    first = [{"role": "system", "content": system}] if system else []
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": text} for role, text in zip(roles, SAID, strict=False)]
    return [first + turns[:count] for count in (1, 3, 5)]


def own(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The tokenizer's rendering. Some templates want a list of parts."""
    with contextlib.suppress(jinja2.TemplateError):
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        if messages[-1]["content"] in text:
            return text
    parts = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages
    ]
    return str(tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("name", [*TEMPLATES, *OTHERS])
@pytest.mark.parametrize("system", [None, "Answer in French: {{ no }}."])
def test_ollama_writes_what_the_chat_template_writes(name: str, system: str | None) -> None:
    made = tokenizer_of({**TEMPLATES, **OTHERS}[name], "</s>", merges=True)
    text = modelfile("./model.gguf", None, made)
    (template,) = [value for word, value in parse(text) if word == "TEMPLATE"]
    assert "SYSTEM" not in dict(parse(text)), "a default system prompt is the template's own matter"
    told = "takes no system prompt" in text
    assert told == (name in NO_SYSTEM)
    for messages in conversations(system):
        if system and told:
            question = messages[1]["content"]
            messages_without = [
                {"role": "user", "content": f"{system}\n\n{question}"},
                *messages[2:],
            ]
            assert shown(template, messages) == own(made, messages_without)
        else:
            assert shown(template, messages) == own(made, messages)


def test_a_conversation_that_ends_with_an_answer_goes_on_with_it() -> None:
    made = tokenizer_of(TEMPLATES["qwen2_5"], "</s>", merges=True)
    (template,) = [value for word, value in parse(modelfile("x", None, made)) if word == "TEMPLATE"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    assert shown(template, messages) == own(made, messages[:1]) + "Hel"
    assert shown(template, messages[1:] + messages[:1]) == own(made, messages[:1]), (
        "an answer to nothing is left out"
    )


def test_the_end_of_a_turn_stops_the_answer() -> None:
    for name, stop in (
        ("qwen3", "<|im_end|>"),
        ("llama3_1", "<|eot_id|>"),
        ("gemma3", "<end_of_turn>"),
        ("glm4moe", "<|user|>"),
    ):
        stops = [
            value
            for word, value in parse(
                modelfile("x", None, tokenizer_of(TEMPLATES[name], "</s>", merges=True))
            )
            if word == "PARAMETER stop"
        ]
        assert stops == ["</s>", stop], name


def test_a_bos_that_the_reader_adds_itself_is_not_written_twice() -> None:
    from tokenizers import processors

    made = byte_tokenizer(bos_token="<|user|>")
    made.chat_template = MISTRAL
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", made.bos_token_id)]
    )
    assert made("a")["input_ids"][0] == made.bos_token_id
    (template,) = [value for word, value in parse(modelfile("x", None, made)) if word == "TEMPLATE"]
    assert shown(template, [{"role": "user", "content": "Hi"}]) == "[INST] Hi [/INST]"
    assert (
        shown(template, [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}])
        == "[INST] S\n\nHi [/INST]"
    )


def test_a_date_is_said() -> None:
    assert "prints the date" in modelfile(
        "x", None, tokenizer_of(TEMPLATES["llama3_2"], "</s>", merges=True)
    )
    assert "prints the date" not in modelfile(
        "x", None, tokenizer_of(TEMPLATES["llama3_1"], "</s>", merges=True)
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}",  # numbered: no text of turns alone
        "{% for m in messages %}<{{ m['content'] | length }}>{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}<{{ m['content'] | upper }}>{% endfor %}",
    ],
)
def test_where_no_template_is_known_it_is_said(template: str) -> None:
    made = tokenizer_of(template, "</s>", merges=True)
    assert turns_of(made) is None
    with pytest.warns(lk.LorakinWarning, match="will not answer as it was trained"):
        text = modelfile("x", None, made)
    assert dict(parse(text))["TEMPLATE"] == "{{ .Prompt }}" and "# WARNING" in text


def test_a_model_without_a_template_has_prompts_as_they_are() -> None:
    text = modelfile("./base.gguf", "./adapter.gguf", tokenizer_of(None, "</s>", merges=True))
    assert parse(text) == [
        ("FROM", "./base.gguf"), ("ADAPTER", "./adapter.gguf"), ("TEMPLATE", "{{ .Prompt }}"), ("PARAMETER stop", "</s>")
    ]  # fmt: skip
    assert "WARNING" not in text


HOSTILE = [
    'x"""\nADAPTER /etc/passwd\nTEMPLATE """', '"""', '"', "{{ .System }}", "}}", "{", "{{", "{{-", "\nFROM /etc/shadow\n",
    "\\", '\\"""', "#", "\r\nSYSTEM evil\r\n", '{{ "', "`", "\x1b[2J", "\u2028FROM /etc/shadow", "{{/*", "'''", "💥{{",
]  # fmt: skip


@pytest.mark.parametrize("evil", HOSTILE)
@pytest.mark.parametrize("where", ["<{}user>", "{}", "a{}b"])
def test_a_templates_own_text_is_no_instruction(evil: str, where: str) -> None:
    """Text around turns, default system prompts and openings that would end the template, or begin another instruction."""
    literal = repr(where.format(evil))
    made = tokenizer_of(None, "</s>", merges=True)
    made.chat_template = (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {literal} }}}}{{% endif %}}{{% for m in messages %}}{{{{ {literal} + "
        f"m['role'] + {literal} + m['content'] + {literal} }}}}{{% endfor %}}{{% if add_generation_prompt %}}"
        f"{{{{ {literal} }}}}{{% endif %}}"
    )
    text = modelfile("./model.gguf", None, made)
    found = parse(text)
    assert [word for word, _ in found if word != "PARAMETER stop"] == ["FROM", "TEMPLATE"]
    for system in (None, "S"):
        for messages in conversations(system):
            assert shown(dict(found)["TEMPLATE"], messages) == own(made, messages)


@pytest.mark.parametrize("evil", HOSTILE)
def test_a_stop_is_no_instruction(evil: str) -> None:
    made = tokenizer_of(None, eos=f"<end{evil}>", merges=True)
    found = parse(modelfile("./model.gguf", None, made))
    assert [word for word, _ in found] in (
        ["FROM", "TEMPLATE", "PARAMETER stop"],
        ["FROM", "TEMPLATE"],
    )
    assert [value for word, value in found if word == "PARAMETER stop"] in ([], [f"<end{evil}>"])


@pytest.mark.parametrize("evil", HOSTILE)
def test_a_files_name_is_no_instruction(evil: str) -> None:
    for name in (f"/models/{evil}.gguf", f"{evil}.gguf", f"/models/x.gguf{evil}"):
        found = parse(modelfile(name, "./adapter.gguf", tokenizer_of(None, "</s>", merges=True)))
        assert [word for word, _ in found] == ["FROM", "ADAPTER", "TEMPLATE", "PARAMETER stop"]
        assert found[0][1] in (name, "./base.gguf")
    assert parse(modelfile("/my models/a b.gguf", None, tokenizer_of(None, "</s>", merges=True)))[
        0
    ] == (
        "FROM",
        "/my models/a b.gguf",
    )


def table() -> list[str]:
    """Rows for docs/evidence/ollama.md: families of templates, how many are written, what ends an answer, the system prompt."""
    families: dict[str, list[str]] = {}
    for name in TEMPLATES:
        plain = name.removesuffix("_training").replace("transformers_", "transformers: ")
        family = re.sub(r"_([a-z]+|v\d|instruct_\d+)$", "", plain)
        families.setdefault(family, []).append(name)
    rows = []
    for family, names in families.items():
        made = [tokenizer_of(TEMPLATES[name], "</s>", merges=True) for name in names]
        turns = [turns_of(one) for one in made]
        ends = dict.fromkeys(one.convert_ids_to_tokens(end_of_turn(one))[0] for one in made)
        joined = any(t and not t.has_system_slot for t in turns)
        system = "before the first question, no place of its own" if joined else "in its place"
        system = "with the last question" if any(t and t.system_later for t in turns) else system
        shown_ends = ", ".join(f"`{end}`" for end in ends).replace("|", "\\|")
        rows.append(
            f"| {family} | {sum(t is not None for t in turns)} of {len(names)} | {shown_ends} | {system} |"
        )
    return rows


@pytest.mark.skipif(trl.__version__ != "1.16.0", reason="another version has other templates")
def test_the_table_in_the_docs() -> None:
    page = (
        (Path(__file__).parents[2] / "docs" / "evidence" / "ollama.md")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    assert not [row for row in table() if row not in page]
