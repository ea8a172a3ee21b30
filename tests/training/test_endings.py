"""Where answers end: with every chat template that trl and transformers carry, and in what
transformers really generates.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from conftest import tiny_llama
from lorakin.training.endings import end_of_turn, end_of_turn_text, stop_ids
from lorakin.training.generate import answer
from lorakin.training.models import Loaded
from training.carried import TEMPLATES, tokenizer_of

ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma4": "<turn|>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "mistral": "</s>",
    "transformers_llama4": "<|eot|>",
    "transformers_qwen2_audio": "<|im_end|>",
    "transformers_smolvlm": "<end_of_utterance>",
}
"""What the templates of each family close an assistant's turn with, by the start of their names."""


def rigged(tokenizer: Any, token: int) -> Any:
    """A Llama that says "a" and then always `token`, whatever it reads."""
    model = tiny_llama(
        tied=False,
        vocab_size=len(tokenizer) + 3,
        num_hidden_layers=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()[:, 0] = 1
        model.model.embed_tokens.weight[before] = 0
        model.model.embed_tokens.weight[before, 1] = 1
        model.lm_head.weight.zero_()[before, 0] = 1
        model.lm_head.weight[token, 1] = 1
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return model


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_with_its_turn(name: str) -> None:
    made = tokenizer_of(TEMPLATES[name], "</s>", merges=True)
    want = next(
        end for family, end in sorted(ENDS.items(), reverse=True) if name.startswith(family)
    )
    assert made.convert_ids_to_tokens(end_of_turn(made)) == [want]
    assert end_of_turn_text(made) is None


@pytest.mark.parametrize("name", ["llama3_1", "gemma3", "qwen3", "phi3", "glm4moe", "cohere2"])
def test_generate_stops_there(name: str) -> None:
    made = tokenizer_of(TEMPLATES[name], "</s>", merges=True)
    (end,) = end_of_turn(made)
    loaded = Loaded(rigged(made, end), made, "rigged", "float32")
    out: list[int] = []

    def spy(**kwargs: Any) -> Any:
        result = generate(**kwargs)
        out[:] = result[0, kwargs["input_ids"].shape[1] :].tolist()
        return result

    generate = loaded.model.generate
    loaded.model.generate = spy
    assert answer(loaded, "Hi", max_new_tokens=9) == "a"
    assert out == [made("a", add_special_tokens=False)["input_ids"][-1], end]
    answer(
        loaded, "Hi", max_new_tokens=9, chat_template=False
    )  # where answers are no turns, they end with the text alone
    assert len(out) == 9


def test_generate_stops_at_the_end_of_text_too() -> None:
    made = tokenizer_of(TEMPLATES["qwen3"], "</s>", merges=True)
    loaded = Loaded(rigged(made, made.eos_token_id), made, "rigged", "float32")
    loaded.model.generation_config.eos_token_id = None  # as a base may have it
    assert answer(loaded, "Hi", max_new_tokens=9) == "a"


def test_an_end_that_is_text() -> None:
    """ChatML put onto a tokenizer that has no such tokens."""
    made = tokenizer_of(None, "</s>", merges=True)
    made.chat_template = TEMPLATES["qwen2_5"]
    assert end_of_turn(made) == [] and end_of_turn_text(made) == "<|im_end|>"
    model = tiny_llama(tied=False, vocab_size=len(made), num_hidden_layers=1)
    loaded = Loaded(model, made, "base", "float32")
    ids = made("yes<|im_end|>no", add_special_tokens=False)["input_ids"]

    def says(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        criteria = transformers.StopStringCriteria(kwargs["tokenizer"], kwargs["stop_strings"])
        for token in ids:
            input_ids = torch.cat([input_ids, torch.tensor([[token]])], 1)
            if bool(criteria(input_ids, None).all()):
                break
        return input_ids

    model.generate = says
    assert answer(loaded, "Hi") == "yes"


def test_a_full_stop_is_no_end() -> None:
    made = tokenizer_of(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '.\n' }}{% endfor %}",
        merges=True,
    )
    assert end_of_turn(made) == [] and end_of_turn_text(made) is None


@pytest.mark.parametrize(
    "template", [None, "{{ messages | length }}", "{{ raise_exception('no') }}"]
)
def test_no_turns(template: str | None) -> None:
    made = tokenizer_of(template, "</s>", merges=True)
    assert end_of_turn(made) == [] and end_of_turn_text(made) is None
    settings = transformers.GenerationConfig(eos_token_id=[7, made.eos_token_id])
    assert stop_ids(made, settings) == [7, made.eos_token_id]
    assert stop_ids(None) == []
