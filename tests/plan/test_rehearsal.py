"""Rehearsals against the same steps on real tensors, sums by hand, and a process that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from lorakin.errors import LorakinWarning
from lorakin.family import FAMILY, Member, method_named
from lorakin.plan.conditions import Conditions
from lorakin.plan.few_layers import rehearse
from lorakin.plan.meta_model import with_assumed_importance
from lorakin.plan.rehearsal import FORWARD, SETUP, STEP, RehearsedRun, rehearse_whole
from lorakin.plan.traced import Traced
from plan.small import MACHINE, conditions, real_steps, small


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.word)
def test_tensors_without_numbers_take_what_real_ones_take(kind: type[Member]) -> None:
    """The same steps on real tensors take the same: nothing goes another way without data."""
    method = method_named(kind.word, dict(kind.test_settings))
    dtype = (torch.float32, torch.bfloat16)[FAMILY.index(kind) % 2]
    where = conditions(dtype=dtype, steps=600)
    planned = rehearse_whole(where, method, MACHINE)
    model = transformers.LlamaForCausalLM(small()).to(dtype).train()
    task = where.learned
    rows = task.full_batch(where.batch_size, where.max_length)
    batch = {key: t for key, t in rows.items() if key != "attention_mask"}
    known = with_assumed_importance(model, method)
    varied = {**batch, "input_ids": torch.randint(128, batch["input_ids"].shape)}
    data = {} if known.measured_member is None else {"probe": [varied], "loss": task.step_loss}
    with Traced(MACHINE, real=True) as traced:
        traced.see(model.parameters(), "weights")
        traced.see(model.buffers(), "weights")
        with traced.phase(SETUP, makes="adapter"):
            adapter = lk.adapt(model, known, seed=0, **data)  # type: ignore[arg-type]
        optimizer: torch.optim.Optimizer = adapter.optimizer(lr=1e-3, total_steps=600)
        RehearsedRun(model, adapter, optimizer, task, batch, traced).steps()
    close = 2e-3 if known.measured_member is None else 1e-2  # a look at data may move ranks
    for phase in (FORWARD, STEP):
        real = traced.peaks[phase].total
        assert planned.peaks[phase].total == pytest.approx(real, rel=close), phase


BERT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 128, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("classification", 3),
        ("multi-label", 3),
        ("regression", 1),
        ("token-classification", 5),
        ("seq2seq", None),
    ],
)
def test_each_task_takes_what_its_training_takes(task: str, labels: int | None) -> None:
    config = (
        transformers.T5Config(**T5)
        if task == "seq2seq"
        else transformers.BertConfig(**BERT, num_labels=labels)
    )
    few: dict[str, Any] = {"batch_size": 4, "max_length": 24, "padded": False}
    where = Conditions(config, torch.float32, labels=labels, task=task, **few)
    method = method_named("lora", {})
    planned = rehearse_whole(where, method, MACHINE)

    assert where.learned.word == task
    adapter, traced = real_steps(where, method)
    assert planned.trainable_parameters == adapter.trainable_parameters
    for phase in (FORWARD, STEP):
        real = traced.peaks[phase].total
        assert planned.peaks[phase].total == pytest.approx(real, rel=2e-3), phase


@pytest.mark.parametrize(
    ("task", "labels"),
    [("language", 3), ("token-classification", None), ("regression", 2), ("seq2seq", None)],
)
def test_labels_that_do_not_suit_the_task(task: str, labels: int | None) -> None:
    where = conditions(task=task, labels=labels)
    with pytest.raises((lk.SettingError, lk.ModelError)):
        where.model()


def test_a_longer_run_holds_the_anchors_too() -> None:
    member = {"start_step": 5}
    method = method_named("delta-lora", member)
    later = rehearse_whole(conditions(steps=100), method, MACHINE)
    assert (
        later.adapter_bytes
        == 2
        * rehearse_whole(conditions(), method_named("lora", {"rank": 8}), MACHINE).adapter_bytes
    )


def test_options_save_what_they_say() -> None:
    method = method_named("lora", {})
    plain = rehearse_whole(conditions(4), method, MACHINE).peaks[FORWARD].kinds["activations"]
    fused = (
        rehearse_whole(conditions(4, fuse=True), method, MACHINE)
        .peaks[FORWARD]
        .kinds["activations"]
    )
    checked = (
        rehearse_whole(conditions(4, gradient_checkpointing=True), method, MACHINE)
        .peaks[FORWARD]
        .kinds["activations"]
    )
    wide = (
        rehearse_whole(conditions(4, batch_size=4), method, MACHINE)
        .peaks[FORWARD]
        .kinds["activations"]
    )
    assert fused < 0.8 * plain
    assert checked < 0.8 * plain
    assert wide == pytest.approx(2 * plain, rel=0.05)


def test_packed_rows_take_a_mask() -> None:
    """It has a byte for each pair of tokens in a sequence."""
    method = method_named("lora", {})
    alone, packed = (
        rehearse_whole(conditions(max_length=256, packing=packing), method, MACHINE).peaks[FORWARD]
        for packing in (False, True)
    )
    assert packed.total - alone.total >= 2 * 256 * 256


def test_accumulated_gradients_are_alive_in_the_next_forward() -> None:
    one, several = (
        rehearse_whole(conditions(accumulate=n), method_named("lora", {}), MACHINE) for n in (1, 4)
    )
    more = several.peaks[FORWARD].total - one.peaks[FORWARD].total
    assert more == pytest.approx(4 * one.trainable_parameters, rel=0.02)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_the_predicted_peak_is_the_measured_one(packing: bool) -> None:
    """A process of its own trains a Llama of 45 million parameters."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 32_000,
    }
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, dtype="float32")
    length = 256 if packing else 128
    where = Conditions(
        config, torch.float32, batch_size=512 // length, max_length=length, padded=False,
        packing=packing,
    )  # fmt: skip
    found = rehearse(where, method_named("lora", {}), MACHINE).peaks[FORWARD]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOOP, json.dumps(sizes), str(length)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert found.total == pytest.approx(float(done.stdout), rel=0.1)


LOOP = """
import json, sys, torch, transformers, lorakin as lk
from torch import nn
from lorakin.training.batches import answer_loss
import transformers.models.llama.modeling_llama
def status(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
def step(rows, length, **sizes):
    config = transformers.LlamaConfig(tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = lk.adapt(model, lk.LoRA()).optimizer(lr=1e-3)
    ids = torch.ones(rows, length, dtype=torch.long)
    packed = {"position_ids": torch.arange(length).expand(rows, -1) % 128, "use_cache": False}
    inputs = {"input_ids": ids, "logits_to_keep": torch.arange(length - 1)}
    inputs |= packed if length > 128 else {}
    for _ in range(2):
        answer_loss(model(**inputs), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
sizes = json.loads(sys.argv[1])
step(2, 8, **{**sizes, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100})
before = status("VmRSS")
step(512 // int(sys.argv[2]), int(sys.argv[2]), **sizes)
print(status("VmHWM") - before)
"""


def test_nothing_here_warns_of_what_only_tensors_without_numbers_do(
    recwarn: pytest.WarningsRecorder,
) -> None:
    rehearse_whole(conditions(), method_named("vera", {}), MACHINE)
    assert not [
        w
        for w in recwarn
        if "FakeTensor" in str(w.message) or issubclass(w.category, LorakinWarning)
    ]


def test_the_model_that_is_planned_is_left_alone() -> None:
    config = small()
    rehearse(
        Conditions(config, torch.bfloat16, batch_size=1, max_length=8),
        method_named("lora", {}),
        MACHINE,
    )
    assert config.to_dict() == small().to_dict()
    assert torch.get_default_dtype() == torch.float32
