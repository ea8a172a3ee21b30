"""An adapter's groups, and an optimizer that forgot some of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorakin as lk
from conftest import tiny_bert, tiny_gpt2, tiny_llama
from lorakin.loop.parameter_groups import group_of
from lorakin.training import prepare_trainer


def test_every_trainable_tensor_is_in_exactly_one_group() -> None:
    adapter = lk.adapt(tiny_bert(), lk.LoRA(rank=2), modules_to_save=["classifier"])
    groups = adapter.parameter_groups(lr=1e-3, weight_decay=0.1)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert sum(p.numel() for p in held) == adapter.trainable_parameters
    assert {id(p) for p in held} == {id(p) for p in adapter.model.parameters() if p.requires_grad}
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0)]
    assert [id(p) for p in groups[1]["params"]] == [id(adapter.tensors.copy_of("classifier").bias)]


def test_the_default_decay_is_none_and_other_options_pass_through() -> None:
    adapter = lk.adapt(tiny_llama(), lk.LoRA(rank=2))
    optimizer = adapter.optimizer(lr=1e-3, betas=(0.8, 0.9))
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert (
        adapter.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.2).param_groups[0][
            "weight_decay"
        ]
        == 0.2
    )
    assert adapter.optimizer(torch.optim.Rprop, lr=1e-3).param_groups[0]["lr"] == 1e-3


def test_an_optimizer_that_holds_too_little_is_refused() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(rank=2))
    own = torch.optim.SGD(adapter.parameter_groups(lr=0.1))
    assert adapter.attach(own) is own
    half = torch.optim.SGD(adapter.parameters()[::2], lr=0.1)
    with pytest.raises(lk.SettingError, match="14"):
        adapter.attach(half)


def tiny_vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
    )
    return transformers.ViTForImageClassification(config)


def tiny_t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_labels=2
    )
    return transformers.T5ForSequenceClassification(config)


WHOLE: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "bert": (tiny_bert, ["classifier", "pooler", "LayerNorm", "embeddings"]),
    "llama": (
        lambda: tiny_llama(tied=False),
        ["lm_head", "input_layernorm", "post_attention_layernorm", "model.norm"],
    ),
    "gpt2": (tiny_gpt2, ["ln_1", "ln_2", "ln_f", "transformer.h.1.mlp"]),
    "vit": (
        tiny_vit,
        ["classifier", "layernorm_before", "layernorm_after", "layernorm", "patch_embeddings"],
    ),
    "t5": (
        tiny_t5,
        ["classification_head", "layer_norm", "final_layer_norm", "relative_attention_bias"],
    ),
}
"""Models, and modules of theirs to train whole."""


def decayed(optimizer: torch.optim.Optimizer, adapter: lk.Adapter) -> set[str]:
    groups = group_of(optimizer)
    return {
        name
        for name, p in adapter.named_parameters()
        if p.requires_grad and groups[id(p)]["weight_decay"]
    }


@pytest.mark.parametrize("kind", WHOLE)
def test_what_decays_in_modules_trained_whole_is_what_decays_in_transformers(
    kind: str, tmp_path: Path
) -> None:
    make, whole = WHOLE[kind]
    model = make()
    arguments = transformers.TrainingArguments(
        tmp_path, weight_decay=0.1, report_to=[], use_cpu=True
    )
    theirs = set(transformers.Trainer(model, arguments).get_decay_parameter_names(model))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    adapter = lk.adapt(model, lk.DoRA(rank=2), modules_to_save=whole)
    inside = tuple(f"{path}." for path in adapter.placement.whole_modules)
    want = {name for name in names & theirs if name.startswith(inside)}
    assert {name for name in names if name.startswith(inside)} > want, "some are exempt"
    pair = {name for name, _ in adapter.named_parameters() if name.endswith((".A", ".B"))}
    assert decayed(adapter.optimizer(lr=1e-3, weight_decay=0.1), adapter) == want | pair
    if kind in ("bert", "llama"):
        trainer = prepare_trainer(transformers.Trainer(model, arguments))
        assert decayed(trainer.create_optimizer(), adapter) == want | pair


def test_a_bias_that_has_no_gradient_stays_and_a_weight_shrinks() -> None:
    model = tiny_bert()
    adapter = lk.adapt(model, lk.LoRA(rank=2), modules_to_save=["classifier", "LayerNorm"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(1.0)
    optimizer = adapter.optimizer(
        torch.optim.SGD, lr=0.5, weight_decay=0.2, foreach=False, fused=False
    )
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norm = adapter.tensors.copy_of("bert.encoder.layer.0.output.LayerNorm")
    head = adapter.tensors.copy_of("classifier")
    kept, shrunk = (
        (norm.weight, norm.bias, head.bias),
        (head.weight, *adapter.tensors.branch(next(iter(adapter.placement.methods))).parameters()),
    )
    assert all((p == 1).all() for p in kept)
    assert all(torch.allclose(p, torch.tensor(0.9)) for p in shrunk)


def test_normalisations_whose_names_do_not_say_so() -> None:
    """BatchNorm, which transformers' names miss; not a head whose class has norm in its name."""

    class NormHead(nn.Linear):
        pass

    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    holder = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 4),
            "bn": nn.BatchNorm1d(4),
            "ln": nn.LayerNorm((2, 2)),
            "f": RMSNorm(),
            "out": NormHead(4, 4),
        }
    )
    adapter = lk.adapt(holder, lk.LoRA(rank=2), "fc", modules_to_save=["bn", "ln", "f", "out"])
    assert decayed(adapter.optimizer(lr=1e-3, weight_decay=0.1), adapter) == {
        "fc.A",
        "fc.B",
        "out.weight",
    }


def test_without_decay_the_groups_are_those_of_before(recwarn: pytest.WarningsRecorder) -> None:
    """So that a run begun without decay resumes; and no one's own optimizer is warned of a head's
    bias that decays.
    """
    adapter = lk.adapt(tiny_bert(), lk.LoRA(rank=2), modules_to_save=["classifier"])
    assert (
        len(adapter.optimizer(lr=1e-3).param_groups)
        == len(adapter.parameter_groups(lr=1e-3, weight_decay=0))
        == 1
    )
    own = torch.optim.AdamW(
        [p for p in adapter.model.parameters() if p.requires_grad], weight_decay=0.1
    )
    adapter.attach(own)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    own.step()
    assert adapter.run.steps == 1
    assert not [w for w in recwarn if issubclass(w.category, lk.LorakinWarning)]
