"""Predictions against counts in papers, sums by hand, real tensors followed by the same eyes, and a process that trains."""

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
from torch import nn
from torch._subclasses import FakeTensorMode

import lorakin as lk
from conftest import tiny_llama
from lorakin.errors import LorakinWarning, ModelError, SettingError
from lorakin.family import FAMILY, Method, method_named
from lorakin.plan import prediction as planning
from lorakin.plan import rehearsal
from lorakin.plan.rehearsal import FORWARD, STEP, Conditions, rehearse, rehearse_whole
from lorakin.plan.skeleton import built, skeleton, trainable_parameters
from lorakin.plan.traced import Machine, Traced
from lorakin.training.models import config_of

MACHINE = Machine(5e10, 2e10, 3e-6)
LLAMA_3B = transformers.LlamaConfig(
    vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
WORDS = [member.word for member in FAMILY]


def small(layers: int = 2, **changes: Any) -> Any:
    settings = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**settings, **changes})


def conditions(layers: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> Conditions:
    return Conditions(
        small(layers), dtype, **{"batch_size": 2, "max_length": 16, "padded": False, **changes}
    )


@pytest.mark.parametrize(
    ("member", "count"),
    [
        (lk.LoRA(rank=32), 9_175_040),
        (lk.LoRAFA(rank=32), 3_670_016),
        (lk.VeRA(rank=256), 129_024),
        (lk.DoRA(rank=32), 9_289_728),
    ],
)
def test_a_skeleton_counts_as_the_papers_do(member: Any, count: int) -> None:
    model = built(LLAMA_3B, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 3_212_749_824
    assert trainable_parameters(model, Method.of(member), ["q_proj", "v_proj"]) == count
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_method_with_a_probe_is_counted_from_above() -> None:
    model = built(small(8))
    bound = trainable_parameters(model, method_named(WORDS[6], {"rank": 4}))
    plain = trainable_parameters(model, method_named(WORDS[0], {"rank": 4}))
    paths = [
        path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"
    ]
    importance = {path: 2.0**-number for number, path in enumerate(paths)}
    total = sum(importance.values())
    known = lk.LoRADrop(
        rank=4, importance={path: share / total for path, share in importance.items()}
    )
    assert trainable_parameters(model, Method.of(known)) < bound < plain


def test_a_skeleton_takes_no_memory_and_ties_what_is_tied() -> None:
    model = skeleton("smollm2", "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_gguf_file_is_not_converted_for_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIN_CACHE", str(tmp_path / "cache"))
    config = config_of("smollm2")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49_152)
    assert not (tmp_path / "cache").exists()


def test_a_model_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model './nowhere'"):
        skeleton("./nowhere")


def test_a_peak_by_hand() -> None:
    """y = relu(x W1) W2 without adapters: 8 × 16 → 32 → 16 in float32, W frozen, x wanting a gradient."""
    with FakeTensorMode(), Traced(MACHINE) as traced:
        with traced.phase("", makes="weights"):
            first, second = torch.empty(16, 32), torch.empty(32, 16)
        x = torch.empty(8, 16, requires_grad=True)
        with traced.phase("forward", makes="activations"):
            y = torch.relu(x @ first) @ second
        assert traced.alive["weights"] == 4 * 2 * 16 * 32
        assert traced.peaks["forward"].kinds["activations"] == 4 * (
            8 * 32 + 8 * 32
        )  # x W1 and relu of it
        assert traced.alive["activations"] == 4 * (8 * 32 + 8 * 16)
        del y
        assert traced.alive["activations"] == 0
    assert traced.seconds["forward"] == pytest.approx(
        MACHINE.seconds(2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))
        + MACHINE.seconds(0, 4 * 2 * 8 * 32)
        + MACHINE.seconds(2 * 8 * 32 * 16, 4 * (8 * 32 + 32 * 16 + 8 * 16))
    )


@pytest.mark.parametrize("word", WORDS)
def test_tensors_without_numbers_take_what_real_ones_take(word: str) -> None:
    """The same step on real tensors, followed by the same eyes: so nothing goes another way for lack of numbers."""
    method, dtype = (
        method_named(word, {}),
        torch.bfloat16 if WORDS.index(word) % 2 else torch.float32,
    )
    where = conditions(dtype=dtype, steps=600)
    planned = rehearse_whole(where, method, MACHINE)
    model = transformers.LlamaForCausalLM(small()).to(dtype).train()
    method = rehearsal.supposed(model, method)
    adapter = lk.adapt(model, method, seed=0)
    batch = {key: t for key, t in rehearsal._rows(where).items() if key != "attention_mask"}
    with Traced(MACHINE, real=True) as traced:
        traced.see(model.parameters(), "weights")
        traced.see(model.buffers(), "weights")
        traced.see(adapter.parameters(), "adapter")
        optimizer: torch.optim.Optimizer = adapter.optimizer(lr=1e-3, total_steps=600)
        run = rehearsal._Run(model, adapter, optimizer, batch, traced)
        run.optimize(1)
        run.step(2)
        if word == WORDS[7]:
            run.optimize(500)
            run.step(501)
    for phase in (FORWARD, STEP):
        assert planned.peaks[phase].total == pytest.approx(traced.peaks[phase].total, rel=2e-3), (
            phase
        )


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        (WORDS[0], {}),
        (WORDS[0], {"fuse": True, "gradient_checkpointing": True, "max_length": 4}),
        (WORDS[3], {"fuse": True}),
        (WORDS[5], {}),
        (WORDS[7], {}),
    ],
)
def test_few_layers_tell_the_peak_of_many(word: str, changes: dict[str, Any]) -> None:
    where, method = conditions(10, torch.bfloat16, **changes), method_named(word, {})
    told, whole = rehearse(where, method, MACHINE), rehearse_whole(where, method, MACHINE)
    assert max(p.total for p in told.peaks.values()) == max(
        p.total for k, p in whole.peaks.items() if k
    )
    assert (told.trainable_parameters, told.adapter_bytes, told.modules) == (
        whole.trainable_parameters,
        whole.adapter_bytes,
        whole.modules,
    )
    assert told.seconds == pytest.approx(whole.seconds, rel=0.02)


def test_targets_that_only_deep_models_have_are_rehearsed_whole() -> None:
    where = conditions(10, targets=["layers.7.mlp.up_proj", "layers.9.mlp.up_proj"])
    assert rehearse(where, method_named(WORDS[0], {}), MACHINE).modules == 2
    some = conditions(
        10, targets=[r"model\.layers\.[0-4]\.mlp\.up_proj"]
    )  # the first few layers look as if all were meant
    assert rehearse(some, method_named(WORDS[0], {}), MACHINE).modules == 5


def test_periods_of_layers_are_kept() -> None:
    where = Conditions(
        small(12, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 4),
        torch.float32,
    )
    assert rehearsal.shallow_depths(where) is None  # 3 + 6 + 9 layers are more than 12
    deep = Conditions(
        small(31, layer_types=["sliding_attention", "full_attention"] * 15 + ["sliding_attention"]),
        torch.float32,
    )
    assert rehearsal.shallow_depths(deep) == (3, 5, 7)
    assert rehearsal.shallow(deep, 5).config.layer_types == deep.config.layer_types[:5]
    assert rehearsal.shallow_depths(conditions(3)) is None


def test_a_longer_run_holds_the_anchors_too() -> None:
    member = {"start_step": 5}
    method = method_named(WORDS[7], member)
    later = rehearse_whole(conditions(steps=100), method, MACHINE)
    assert (
        later.adapter_bytes
        == 2
        * rehearse_whole(conditions(), method_named(WORDS[0], {"rank": 8}), MACHINE).adapter_bytes
    )


def test_options_save_what_they_say() -> None:
    method = method_named(WORDS[0], {})
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


def test_models_of_other_kinds_are_planned_or_refused_with_a_reason() -> None:
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    experts = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **sizes)
    gpt = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)
    gemma = transformers.Gemma2Config(
        num_key_value_heads=2, head_dim=16, **sizes
    )  # with a tensor that its class makes
    method = method_named(WORDS[0], {"rank": 4})
    attention, gated = (
        (64 + 64) + 2 * (64 + 32) + (64 + 64),
        3 * (64 + 96),
    )  # numbers a rank: q, k, v, o; gate, up, down
    conv = (64 + 192) + (64 + 64) + 2 * (64 + 256)
    for config, numbers in ((experts, attention), (gpt, conv), (gemma, attention + gated)):
        there = rehearse(
            Conditions(config, torch.bfloat16, batch_size=2, max_length=16), method, MACHINE
        )
        assert there.trainable_parameters == 2 * 4 * numbers
        assert there.peaks[FORWARD].kinds["activations"] > 0
    with pytest.raises(
        ModelError,
        match="Mixtral cannot be planned with 2 rows of 16 tokens: on tensors without numbers",
    ):
        rehearse(Conditions(experts, torch.float32, batch_size=2, max_length=16), method, MACHINE)


def test_accumulated_gradients_are_alive_in_the_next_forward() -> None:
    one, several = (
        rehearse_whole(conditions(accumulate=n), method_named(WORDS[0], {}), MACHINE)
        for n in (1, 4)
    )
    more = several.peaks[FORWARD].total - one.peaks[FORWARD].total
    assert more == pytest.approx(4 * one.trainable_parameters, rel=0.02)


def test_a_classifier_trains_its_head() -> None:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
    )
    there = rehearse(
        Conditions(config, torch.float32, labels=3, batch_size=2, max_length=16),
        method_named(WORDS[0], {}),
        MACHINE,
    )
    linears = 2 * (4 * 16 * (32 + 32) + 2 * 16 * (32 + 48)) + 16 * (
        32 + 32
    )  # of two layers, and the pooler's
    assert there.trainable_parameters == linears + 3 * 32 + 3


def test_methods_that_cannot_run_are_refused_and_the_others_planned() -> None:
    methods = [
        method_named(WORDS[0], {"rank": 4}),
        method_named(WORDS[7], {"rank": 4}),
        method_named(WORDS[0], {"rank": 60}),
    ]
    plain, delta, high = planning.plan(conditions(steps=20), methods)
    assert isinstance(plain, planning.Plan)
    assert isinstance(delta, planning.Refusal)
    assert "start_step=500" in delta.reason
    assert isinstance(high, planning.Refusal)
    assert "60" in high.reason


def test_quantising_is_arithmetic_over_the_linear_layers() -> None:
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    saved, largest = planning.quantised(conditions(dtype=torch.bfloat16), "nf4")
    assert saved == round(weights * (2 - 4.127 / 8))
    assert largest == 2 * 64 * 96
    rows = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert planning.quantised(conditions(dtype=torch.bfloat16), "int8")[0] == weights - 4 * rows
    with pytest.raises(SettingError, match="one of nf4, int8, torchao-int8, not 'int3'"):
        planning.quantised(conditions(), "int3")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24e9),
        ("24GiB", 24 * 2**30),
        ("24000MB", 24e9),
        ("1.5 gib", 1.5 * 2**30),
        ("80g", 80e9),
    ],
)
def test_sizes(text: str, size: float) -> None:
    assert planning.parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "much", "-3GB", "0GB", "24XB", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(SettingError, match="such as 24GB"):
        planning.parse_memory(text)


def test_the_largest_batch_and_remedies_fit_and_the_next_does_not() -> None:
    method = method_named(WORDS[0], {})
    where = [conditions(1, batch_size=rows, max_length=64) for rows in (2, 4, 8)]
    two, four, _ = (planning.planned(there, method, 1.0).peak for there in where)
    room = (two + four) // 2
    found = dict(planning.remedies(where[2], method, room))
    assert found["--batch-size 2"].peak == two <= room < four
    assert all(plan.peak <= room for plan in found.values())
    assert planning.remedies(where[2], method, 10) == []


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_the_predicted_peak_is_the_measured_one(tmp_path: Path) -> None:
    """A process of its own trains a Llama of 45 million parameters, as `python -m benchmarks.planning` does for many."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 32_000,
    }
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, dtype="float32")
    where = Conditions(config, torch.float32, batch_size=4, max_length=128, padded=False)
    found = rehearse(where, method_named(WORDS[0], {}), MACHINE).peaks[FORWARD]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOOP, json.dumps(sizes)],
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
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))
def step(rows, length, **sizes):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **sizes)).train()
    optimizer = lk.adapt(model, lk.LoRA()).optimizer(lr=1e-3)
    ids = torch.ones(rows, length, dtype=torch.long)
    for _ in range(2):
        answer_loss(model(input_ids=ids, logits_to_keep=torch.arange(length - 1)), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
sizes = json.loads(sys.argv[1])
step(2, 8, **{**sizes, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100})
before = status("VmRSS")
step(4, 128, **sizes)
print(status("VmHWM") - before)
"""


def test_nothing_here_warns_of_what_only_tensors_without_numbers_do(
    recwarn: pytest.WarningsRecorder,
) -> None:
    rehearse_whole(conditions(), method_named(WORDS[3], {}), MACHINE)
    assert not [
        w
        for w in recwarn
        if "FakeTensor" in str(w.message) or issubclass(w.category, LorakinWarning)
    ]


def test_the_model_that_is_planned_is_left_alone() -> None:
    config = small()
    rehearse(
        Conditions(config, torch.bfloat16, batch_size=1, max_length=8),
        method_named(WORDS[0], {}),
        MACHINE,
    )
    assert config.to_dict() == small().to_dict()
    assert tiny_llama().dtype == torch.float32
