"""transformers' Trainer and TRL's SFTTrainer, unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor

import lorakin as lk
from conftest import randomise, small, tiny_llama
from lorakin.training import prepare_trainer

ROWS = [
    {
        "input_ids": [3 + (i * k) % 50 for k in range(1, 9)],
        "labels": [3 + (i * k) % 50 for k in range(1, 9)],
    }
    for i in range(16)
]


def arguments(out: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
        "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    return settings | changes


def trainer(out: Path, model: Any, **changes: Any) -> transformers.Trainer:
    return transformers.Trainer(
        model=model,
        eval_dataset=datasets.Dataset.from_list(ROWS),
        args=transformers.TrainingArguments(**arguments(out, **changes)),
        train_dataset=datasets.Dataset.from_list(ROWS),
        data_collator=transformers.default_data_collator,
    )


def adapted(**settings: Any) -> tuple[Any, lk.Adapter]:
    model = tiny_llama()
    return model, lk.adapt(model, lk.LoRA(rank=2, **settings), seed=0)


def state(adapter: lk.Adapter) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_with_its_own_optimizer(tmp_path: Path, checkpointing: bool | None) -> None:
    model, adapter = adapted()
    base = {key: t.clone() for key, t in model.state_dict().items() if ".lorakin." not in key}
    options = {} if checkpointing is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}
    }  # fmt: skip
    run = trainer(tmp_path, model, gradient_accumulation_steps=2, **options)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[key], t) for key, t in base.items())
    assert all(p.any() for p in adapter.parameters())


def test_trainer_with_ours_gives_the_same(tmp_path: Path) -> None:
    results = []
    for own in (True, False):
        model, adapter = adapted()
        run = trainer(tmp_path, model, weight_decay=0.0)
        if own:
            run.optimizer = adapter.optimizer(torch.optim.AdamW, lr=1e-2)
        run.train()
        results.append(state(adapter))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_hold_the_adapter_and_resuming_is_exact(tmp_path: Path, dropout: float) -> None:
    model, adapter = adapted(dropout=dropout)
    prepare_trainer(trainer(tmp_path / "whole", model)).train()
    whole = state(adapter)
    files = {p.name for p in (tmp_path / "whole" / "checkpoint-3").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "trainer_state.json",
    } <= files
    assert "model.safetensors" not in files
    model, adapter = adapted(dropout=dropout)
    randomise(adapter)
    prepare_trainer(trainer(tmp_path / "again", model)).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state(adapter).items()), (
        "bit for bit"
    )
    model, adapter = adapted(dropout=dropout)
    over = prepare_trainer(trainer(tmp_path / "over", model))
    over.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert over.state.global_step == 6, "not a step more than it was asked for"
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state(adapter).items())


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    model, adapter = adapted()
    run = prepare_trainer(
        trainer(
            tmp_path, model, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="loss",
            learning_rate=1e-2,
        )
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    other = tiny_llama()
    loaded = lk.load(other, best)
    assert all(torch.equal(p, state(adapter)[name]) for name, p in loaded.named_parameters())


def test_two_adapters_lie_as_peft_lays_them(tmp_path: Path) -> None:
    model, _ = adapted()
    lk.adapt(model, lk.LoRA(rank=3), "q_proj", name="second")
    prepare_trainer(trainer(tmp_path, model)).train()
    assert (tmp_path / "checkpoint-6" / "adapter_config.json").exists()
    assert (
        lk.load(tiny_llama(), tmp_path / "checkpoint-6" / "second").method.parametrisation.rank == 3
    )


@pytest.mark.filterwarnings("default::lorakin.errors.LorakinWarning")
def test_a_plain_trainers_checkpoint_resumes_loudly(tmp_path: Path) -> None:
    model, _ = adapted()
    trainer(tmp_path, model).train()
    model, _ = adapted()
    with pytest.warns(lk.LorakinWarning, match="holds the base alone"):
        trainer(tmp_path, model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


MEMBERS: list[Any] = [
    small("lora+", rank=2),
    small("adalora", initial_rank=4, finish=2),
    small("dora,delta-lora", rank=2, start_step=2),
]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: str(m)[:12])
def test_a_prepared_trainer_needs_nothing_else(member: Any, tmp_path: Path) -> None:
    """It makes the optimizer itself, with the method's rates and decays, and tells the length of the run; and resumes."""
    results = []
    for part in ("whole", "again"):
        model = tiny_llama()
        adapter = lk.adapt(model, member, seed=0)
        run = prepare_trainer(trainer(tmp_path / part, model, weight_decay=0.1))
        run.train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
            if part == "again"
            else None
        )
        assert adapter.run.steps == 6
        results.append(state(adapter))
        rates = {
            id(p): (group["initial_lr"], group["weight_decay"])
            for group in run.optimizer.param_groups
            for p in group["params"]
        }
        for group in adapter.parameter_groups(lr=1e-2, weight_decay=0.1):
            assert all(
                rates[id(p)] == (group["lr"], group["weight_decay"]) for p in group["params"]
            )
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items()), "bit for bit"


@pytest.mark.parametrize(
    ("member", "message"),
    [(MEMBERS[0], "learn at different rates"), (MEMBERS[1], "does not know its length")],
)
def test_a_plain_trainer_does_not_make_another_method_of_it(
    member: Any, message: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    lk.adapt(model, member)
    with pytest.raises(lk.LorakinError, match=message):
        trainer(tmp_path, model, weight_decay=0.0).train()


def test_a_plain_trainer_is_enough_where_nothing_need_be_told(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = lk.adapt(
        model,
        [lk.AdaLoRA(initial_rank=4, target_rank=2, total_steps=6, start=1, finish=2), lk.DoRA()],
    )
    trainer(tmp_path, model, gradient_accumulation_steps=2, max_grad_norm=0.1).train()
    assert sum(len(adapter.tensors.branch(path).E) for path in adapter.placement.methods) == 14 * 2
    adapter.save(tmp_path / "adapter")


def test_a_trainer_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lk.StateError, match="the trainer's model has no adapters"):
        prepare_trainer(trainer(tmp_path, tiny_llama()))
    with pytest.raises(
        lk.SettingError, match="expected a Trainer of transformers or TRL, not a LlamaForCausalLM"
    ):
        prepare_trainer(tiny_llama())


@pytest.mark.parametrize("fused", [False, True])
def test_sft_trainer(
    tmp_path: Path, tokenizer: Any, chat_rows: list[dict[str, str]], fused: bool
) -> None:
    trl = pytest.importorskip("trl")
    model, adapter = adapted()
    if fused:
        lk.fuse(model)
    base = {key: t.clone() for key, t in model.state_dict().items() if ".lorakin." not in key}
    rows = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "completion": [{"role": "assistant", "content": r["completion"]}],
        }
        for r in chat_rows
    ]
    run = prepare_trainer(
        trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                **arguments(tmp_path, bf16=False, gradient_checkpointing=False, max_steps=8)
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[key], t) for key, t in base.items())
    lk.load(tiny_llama(), tmp_path / "checkpoint-6")
    run.save_model(str(tmp_path / "final"))
    lk.load(tiny_llama(), tmp_path / "final")
    assert all(p.any() for p in adapter.parameters())


def test_sft_trainer_with_members_that_act_at_steps(tmp_path: Path, tokenizer: Any) -> None:
    trl = pytest.importorskip("trl")
    model = tiny_llama()
    adapter = lk.adapt(
        model, [lk.AdaLoRA(initial_rank=4, target_rank=2, start=1, finish=2), lk.LoRAPlus(ratio=4)]
    )
    prepare_trainer(
        trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**arguments(tmp_path, bf16=False, gradient_checkpointing=True)),
            train_dataset=datasets.Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
    ).train()
    assert sum(len(adapter.tensors.branch(path).E) for path in adapter.placement.methods) == 14 * 2
    adapter.save(tmp_path / "adapter")


@pytest.mark.parametrize("whole", [False, True])
def test_a_head_whose_weight_the_trainer_reads_trains(
    whole: bool, tmp_path: Path, tokenizer: Any
) -> None:
    """TRL multiplies by the head's weight without calling the head; it refuses PEFT's adapters there."""
    trl = pytest.importorskip("trl")
    model = tiny_llama(tied=False)
    targets = (
        {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}
        if whole
        else {"targets": ["q_proj", "lm_head"]}
    )
    adapter = lk.adapt(model, lk.LoRA(rank=2), **targets)
    trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **arguments(tmp_path, bf16=False, gradient_checkpointing=False, save_strategy="no")
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer,
    ).train()
    if whole:
        assert not torch.equal(
            adapter.tensors.copy_of("lm_head").weight, model.lm_head._parameters["weight"]
        )
    else:
        assert adapter.tensors.branch("lm_head").tensors()["B"].any()
    adapter.save(tmp_path / "adapter")  # which would say what training never reached
