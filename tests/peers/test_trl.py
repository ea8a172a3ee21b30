"""TRL's trainers and sentence-transformers', unchanged, on adapted models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import lorakin as lk
from conftest import tiny_llama
from lorakin.training import prepare_trainer

trl = pytest.importorskip("trl")

PAIRS = 4 * [
    {"prompt": f"who is {animal}", "chosen": f"a {animal} on the mat", "rejected": "no bad no bad"}
    for animal in ("cat", "dog", "bird")
]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    chosen = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
        "logging_steps": 1, "save_steps": 3, "use_cpu": True, "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return chosen | changes


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "member", [lk.LoRA(rank=4), lk.DoRA(rank=4), lk.VeRA(rank=8)], ids=lambda m: m.word
)
def test_sft_with_packing(
    member: Any, tmp_path: Path, tokenizer: Any, chat_rows: list[dict[str, str]]
) -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, member)
    rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in chat_rows]
    args = trl.SFTConfig(
        **settings(tmp_path, packing=True, packing_strategy="wrapped", max_length=24)
    )
    trainer = trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    assert all(len(row["input_ids"]) == 24 for row in list(trainer.train_dataset)[:-1]), "packed"
    prepare_trainer(trainer).train()
    assert adapter.run.steps == 6
    again = lk.load(tiny_llama(), tmp_path / "checkpoint-6")
    assert again.method.words == adapter.method.words


@pytest.mark.parametrize(
    "members",
    [[lk.LoRA(rank=4)], [lk.DoRA(rank=4), lk.LoRAPlus(ratio=4)]],
    ids=["lora", "dora,lora+"],
)
def test_dpo_against_the_model_itself(members: Any, tmp_path: Path, tokenizer: Any) -> None:
    """The same losses as with a second copy of the base as the reference, without one."""

    def run(model: Any, ref_model: Any, folder: Path) -> list[float]:
        args = trl.DPOConfig(**settings(folder))
        trainer = trl.DPOTrainer(
            model,
            ref_model,
            args,
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=tokenizer,
        )
        prepare_trainer(trainer).train()
        return losses(trainer)

    model, base = tiny_llama(), tiny_llama()
    lk.adapt(model, members, seed=0)
    ours = lk.reference(model)
    before = {id(p) for p in model.parameters()}
    assert {id(p) for p in ours.parameters()} == before, "no second copy"
    shared = run(model, ours, tmp_path / "shared")
    twin = tiny_llama()
    lk.adapt(twin, members, seed=0)
    copied = run(twin, base, tmp_path / "copied")
    assert shared == pytest.approx(copied, rel=1e-5)
    assert shared[-1] < shared[0]
    assert type(model) is transformers.LlamaForCausalLM


def test_a_reference_is_the_base_whatever_becomes_of_the_adapters(ids: torch.Tensor) -> None:
    model = tiny_llama().train()
    base = model(ids).logits
    with pytest.raises(lk.SettingError, match="it has none"):
        lk.reference(model)
    adapter = lk.adapt(model, lk.LoRA(rank=4))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    ours = lk.reference(model)
    changed = model(ids).logits
    assert torch.equal(ours(ids).logits, base)
    assert not torch.equal(changed, base)
    assert torch.equal(model(ids).logits, changed)
    assert ours.eval() is ours
    assert ours.requires_grad_(False) is ours
    assert any(p.requires_grad for p in model.parameters())
    assert model.training
    adapter.merge()
    torch.testing.assert_close(ours(ids).logits, base)
    torch.testing.assert_close(model(ids).logits, changed)
    adapter.remove()
    other = lk.adapt(model, lk.LoRA(rank=2), name="other")
    with torch.no_grad():
        other.tensors.branch("model.layers.0.mlp.up_proj").B.normal_()
    assert torch.equal(ours(ids).logits, base)
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_a_head_that_trl_reads_trains_whole(
    tmp_path: Path, tokenizer: Any, chat_rows: list[dict[str, str]]
) -> None:
    model = tiny_llama(tied=False)
    adapter = lk.adapt(model, lk.LoRA(rank=4), ["q_proj"], modules_to_save=["lm_head"])
    rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in chat_rows]
    args = trl.SFTConfig(**settings(tmp_path, save_strategy="no"))
    trainer = trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    prepare_trainer(trainer).train()
    assert not torch.equal(
        adapter.tensors.copy_of("lm_head").weight, model.lm_head._parameters["weight"]
    )
    adapter.save(tmp_path / "adapter")


def test_a_reward_model(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    adapter = lk.adapt(model, lk.LoRA(rank=4), modules_to_save=["score"])
    rows = [
        {
            "chosen": f"{row['prompt']} {row['chosen']}",
            "rejected": f"{row['prompt']} {row['rejected']}",
        }
        for row in PAIRS
    ]
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(**settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    prepare_trainer(trainer).train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not torch.equal(adapter.tensors.copy_of("score").weight, model.score.weight)
    torch.manual_seed(1)
    other = transformers.LlamaForSequenceClassification(config)
    other.model.load_state_dict(
        {key: t for key, t in model.model.state_dict().items() if "lorakin" not in key}
    )
    lk.load(other, tmp_path / "checkpoint-6", other_base=True)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(other.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.model
def test_sentence_transformers(tmp_path: Path) -> None:
    """The packaged MiniLM as a sentence encoder, fine-tuned by sentence-transformers' own trainer."""
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    from lorakin.training.model_sources import packaged

    def encoder() -> Any:
        return sentences.SentenceTransformer(str(packaged("minilm")), device="cpu")

    model = encoder()
    texts = ["a cat sat on the mat", "shares fell on Monday", "the dog ran home"]
    before = model.encode(texts, convert_to_tensor=True)
    adapter = lk.adapt(model, lk.LoRA(rank=4), ["query", "value"], seed=0)
    torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), before)
    rows = datasets.Dataset.from_list(
        8
        * [
            {"anchor": "a cat sat on the mat", "positive": "a kitten was on the rug"},
            {"anchor": "shares fell", "positive": "stocks dropped"},
        ]
    )
    args = sentences.SentenceTransformerTrainingArguments(**settings(tmp_path, learning_rate=1e-3))
    loss = MultipleNegativesRankingLoss(model)
    trainer = sentences.SentenceTransformerTrainer(model, args, train_dataset=rows, loss=loss)
    prepare_trainer(trainer).train()
    assert adapter.run.steps == 6
    after = model.encode(texts, convert_to_tensor=True)
    assert (after - before).abs().max() > 1e-4
    other = encoder()
    lk.load(other, tmp_path / "checkpoint-6")
    torch.testing.assert_close(other.encode(texts, convert_to_tensor=True), after)
