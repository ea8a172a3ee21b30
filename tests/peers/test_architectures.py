"""Other architectures: identity, merge, and PEFT's logits from our file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from conftest import randomise

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "qwen2":  # biases on q, k, v
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)).eval()
    if kind == "gpt_neox":  # fused q, k, v
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL)).eval()
    if kind == "opt":
        return transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=64,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
            )
        ).eval()
    if kind == "mixtral":  # experts are packed parameters, which all-linear does not reach
        return transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**GROUPED, num_local_experts=2)
        ).eval()
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ).eval()


def logits(of: Any, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"decoder_input_ids": ids} if of.config.is_encoder_decoder else {}
    return of(input_ids=ids, **inputs).logits


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "opt", "mixtral", "t5"])
def test_architecture(kind: str, tmp_path: Path, ids: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    base = model(kind)
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    before = logits(base, ids)
    adapter = lk.adapt(base, lk.LoRA(rank=2))
    torch.testing.assert_close(
        logits(base, ids), before, rtol=1e-5, atol=1e-5
    )  # T5 alone is not the same bits twice
    randomise(adapter)
    changed = logits(base, ids)
    assert (changed - before).abs().max() > 1e-4
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(kind), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, ids), changed, rtol=1e-5, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(logits(base, ids), changed, rtol=1e-4, atol=1e-5)
    adapter.remove()
    assert set(base.state_dict()) == set(weights)
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in weights.items())
