"""The models that are compared: a frozen decoder alone, with lorakin's members, and with PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lorakin as lk

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, int]] = {
    "S": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "layers": 4,
    },
    "W": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "layers": 1,
    },
}
"""S is SmolLM2-135M's shape, W TinyLlama's, with enough layers for steady figures."""


def config(
    shape: dict[str, int], layers: int, vocabulary: int, **more: Any
) -> transformers.LlamaConfig:
    """Returns the config of a Llama of one of `SHAPES`."""
    sizes = {
        **shape,
        **more,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "use_cache": False,
    }
    sizes.pop("layers", None)
    return transformers.LlamaConfig(**sizes)


class Decoder(nn.Module):
    """A Llama decoder without embeddings and head. Its loss is linear in the output."""

    def __init__(self, shape: dict[str, int], layers: int | None = None) -> None:
        super().__init__()
        self.decoder = transformers.LlamaModel(config(shape, layers or shape["layers"], 8))

    def forward(self, x: Tensor, weights: Tensor) -> Any:
        """x and weights (batch, length, hidden)."""
        out = self.decoder(inputs_embeds=x).last_hidden_state
        return transformers.utils.ModelOutput(loss=(out * weights).sum())


def decoder(
    shape: dict[str, int], dtype: torch.dtype, device: str = "cpu", layers: int | None = None
) -> Decoder:
    """Returns a frozen decoder with random weights, in train mode."""
    torch.manual_seed(0)
    return Decoder(shape, layers).to(device, dtype).train().requires_grad_(False)


def batch(model: Decoder, rows: int = 4, length: int = 256) -> tuple[Tensor, Tensor]:
    """Returns inputs of a decoder and weights of its loss, both (rows, length, hidden)."""
    like = next(model.parameters())
    hidden = model.decoder.config.hidden_size
    return tuple(
        torch.randn(rows, length, hidden, device=like.device).to(like.dtype) for _ in range(2)
    )  # type: ignore[return-value]


def twin(base: nn.Module) -> Any:
    """Returns a copy of a model that shares its weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


@dataclass(frozen=True)
class Subject:
    """One method in both libraries.

    Attributes:
        name: of the method.
        ours: makes lorakin's members.
        theirs: makes PEFT's config, if PEFT has the method.
        prepare: brings the adapter into the state of later training.
        frozen_down: whether PEFT's `lora_A` must be frozen.
        acts: whether something at each optimizer step belongs to the cost.
    """

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], peft.PeftConfig] | None = None
    prepare: Callable[[lk.Adapter], None] = lambda adapter: None
    frozen_down: bool = False
    acts: bool = False


def _begin_delta(adapter: lk.Adapter) -> None:
    adapter.run.begin()
    for rule in adapter.run.rules or ():
        rule.after(1, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def lora_config(rank: int = 16, **settings: Any) -> Callable[[], peft.PeftConfig]:
    """Returns a function that makes PEFT's config of LoRA on all linear layers."""
    return lambda: peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, **settings)


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("lora", lambda: lk.LoRA(16, 32), lora_config()),
        Subject(
            "lora, dropout 0.05",
            lambda: lk.LoRA(16, 32, dropout=0.05),
            lora_config(lora_dropout=0.05),
        ),
        Subject("lora+", lambda: [lk.LoRA(16, 32), lk.LoRAPlus()], lora_config()),
        Subject("lora-fa", lambda: lk.LoRAFA(rank=16, alpha=32), lora_config(), frozen_down=True),
        Subject("dora", lambda: lk.DoRA(rank=16, alpha=32), lora_config(use_dora=True)),
        Subject(
            "vera",
            lambda: lk.VeRA(rank=256),
            lambda: peft.VeraConfig(r=256, target_modules=LINEARS, projection_prng_key=0),
        ),
        Subject(
            "adalora",
            lambda: lk.AdaLoRA(
                initial_rank=24,
                target_rank=16,
                alpha=32,
                total_steps=10_000,
                start=0,
                finish=1_000,
                interval=1,
            ),
            lambda: peft.AdaLoraConfig(
                init_r=24,
                target_r=16,
                lora_alpha=32,
                target_modules=LINEARS,
                total_step=10_000,
                tinit=0,
                tfinal=1_000,
                deltaT=1,
                orth_reg_weight=0.1,
            ),
            acts=True,
        ),
        Subject(
            "delta-lora",
            lambda: lk.DeltaLoRA(rank=16, alpha=32, start_step=1),
            prepare=_begin_delta,
        ),
    )
}


def ours(
    base: nn.Module, subject: Subject, targets: Sequence[str] = LINEARS
) -> tuple[Any, lk.Adapter]:
    """Returns the base with lorakin's adapter; every trained tensor has left its start."""
    model = twin(base)
    adapter = lk.adapt(model, subject.ours(), targets, seed=0)
    _shake(adapter.parameters())
    subject.prepare(adapter)
    return model, adapter


def theirs(base: nn.Module, subject: Subject, narrow: bool = False) -> Any:
    """Returns the base with PEFT's adapter; `narrow` uses the base's dtype, not float32."""
    assert subject.theirs is not None
    model = peft.get_peft_model(twin(base), subject.theirs(), autocast_adapter_dtype=not narrow)
    if subject.frozen_down:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    _shake(model.parameters())
    return model


@torch.no_grad()
def _shake(parameters: Any) -> None:
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
