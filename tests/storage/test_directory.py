"""Saving whole or not at all, and refusing what is broken, incomplete or for another model."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorakin as lk
from conftest import interruptible, randomise, tiny_bert, tiny_gpt2, tiny_llama
from lorakin.storage import directory

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=3, alpha=6))).save(tmp_path / "adapter")


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path / TENSORS)
    change(tensors)
    safetensors.torch.save_file(tensors, path / TENSORS)
    (path / "lorakin.json").unlink(
        missing_ok=True
    )  # of another writer, who knows nothing of lorakin's part


def test_round_trip(saved: Path, ids: Tensor) -> None:
    expected = tiny_llama()
    randomise(lk.adapt(expected, lk.LoRA(rank=3, alpha=6)))
    model = tiny_llama()
    lk.load(model, saved)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_the_files(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", CONFIG, TENSORS, "lorakin.json"]
    config = json.loads((saved / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "use_rslora" not in config
    with safetensors.safe_open(saved / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = list(file.keys())
        assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    own = json.loads((saved / "lorakin.json").read_text())
    assert [entry["member"] for entry in own["members"]] == ["lora"]


def test_the_same_adapter_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=3, alpha=6))).save(tmp_path / "again")
    for name in (CONFIG, TENSORS, "lorakin.json"):
        assert (saved / name).read_bytes() == (again / name).read_bytes()


def test_dtypes_are_kept(tmp_path: Path, ids: Tensor) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    randomise(lk.adapt(model, lk.LoRA(rank=2), dtype=torch.float16)).save(tmp_path)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / TENSORS).values()} == {
        torch.float16
    }
    other = tiny_llama(dtype=torch.bfloat16)
    assert {p.dtype for p in lk.load(other, tmp_path).parameters()} == {torch.float16}
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_what_only_lorakin_knows_stands_beside(tmp_path: Path) -> None:
    model = tiny_llama()
    randomise(lk.adapt(model, lk.LoRA(rank=2, init="gaussian"))).save(tmp_path)
    assert lk.load(tiny_llama(), tmp_path).method.members == (lk.LoRA(rank=2, init="gaussian"),)
    (tmp_path / "lorakin.json").unlink()
    assert lk.load(tiny_llama(), tmp_path).method.members == (lk.LoRA(rank=2),)
    (tmp_path / "lorakin.json").write_text('{"format": 99}')
    with pytest.raises(lk.AdapterError, match="format 99"):
        lk.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora=True"),
        ({"use_qalora": True}, "QALoRA"),
        ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"bias": "some"}, "'some'"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"r": 4}, r"\(3, 32\).*\(4, 32\).*rank 4"),
        ({"r": 0}, "rank"),
        ({"r": "three"}, "three"),
        ({"lora_alpha": None}, "alpha must be"),
        ({"target_modules": ["q_proj"]}, "target"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.*weight"),
    ],
)
def test_a_config_that_does_not_fit(saved: Path, change: dict[str, Any], message: str) -> None:
    edit(saved, **change)
    model = tiny_llama()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(lk.AdapterError, match=message):
        lk.load(model, saved)
    assert not lk.adapters(model)
    assert set(model.state_dict()) == set(before), "the model is as it was"


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q.format("B")), "model.layers.0.self_attn.q_proj lacks lora_B.weight"),
        (
            lambda t: [t.pop(Q.format(slot)) for slot in "AB"],
            "model.layers.0.self_attn.q_proj",
        ),
        (
            lambda t: t.update({"base_model.model.extra.weight": torch.ones(2)}),
            "extra.weight",
        ),
        (
            lambda t: t.update({Q.format("A"): torch.ones(3, 31)}),
            r"\(3, 31\).*\(3, 32\)",
        ),
        (lambda t: t[Q.format("A")].fill_(torch.nan), "q_proj.A holds NaN"),
        (
            lambda t: t.update({Q.format("A"): torch.ones(3, 32, dtype=torch.int8)}),
            "int8",
        ),
        (lambda t: t.clear(), "proj"),
    ],
)
def test_tensors_that_do_not_fit(
    saved: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(saved, change)
    with pytest.raises(lk.AdapterError, match=message):
        lk.load(tiny_llama(), saved)


def test_another_base(saved: Path) -> None:
    with pytest.raises(
        lk.AdapterError,
        match=r"model\.layers\.0.*GPT2LMHeadModel",
    ):
        lk.load(tiny_gpt2(), saved)
    with pytest.raises(lk.AdapterError, match=r"\(3, 64\).*rank 3"):
        lk.load(tiny_llama(hidden_size=64), saved)
    with pytest.raises(lk.AdapterError, match="model.layers.1"):
        lk.load(tiny_llama(num_hidden_layers=1), saved)


def test_a_head_of_another_size(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_bert(labels=3), lk.LoRA(rank=2), modules_to_save=["classifier"])).save(
        tmp_path
    )
    with pytest.raises(lk.AdapterError, match=r"classifier.* has shape .*3"):
        lk.load(tiny_bert(labels=2), tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("base_model.model.classifier.bias"))
    with pytest.raises(lk.AdapterError, match="classifier.*bias"):
        lk.load(tiny_bert(labels=3), tmp_path)


def test_unknown_settings_are_named_unless_empty(saved: Path) -> None:
    edit(saved, some_new_thing=None, another=False)
    lk.load(tiny_llama(), saved)
    edit(saved, some_new_thing=3)
    with pytest.warns(lk.LorakinWarning, match="some_new_thing"):
        lk.load(tiny_llama(), saved)


def test_a_setting_that_is_absent_has_pefts_default_not_ours(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=8, alpha=99, dropout=0.5))).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for field in ("r", "lora_alpha", "lora_dropout"):
        del config[field]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    own = json.loads((tmp_path / "lorakin.json").read_text())
    del own["config"], own["sha256"]  # as earlier files are, which do not know what the config said
    (tmp_path / "lorakin.json").write_text(json.dumps(own))
    assert lk.load(tiny_llama(), tmp_path).method.members == (
        lk.LoRA(rank=8, alpha=8, dropout=0.0),
    )


def test_directories_that_hold_no_adapter(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_llama(), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lk.AdapterError, match="adapter_config.json"):
        lk.load(tiny_llama(), tmp_path / "empty")
    whole = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_llama(), saved)
    (saved / TENSORS).unlink()
    with pytest.raises(lk.AdapterError, match="adapter_model.safetensors"):
        lk.load(tiny_llama(), saved)
    for text, message in (("{", "cannot be read as JSON"), ("[]", "expected an object")):
        (saved / CONFIG).write_text(text)
        with pytest.raises(lk.AdapterError, match=message):
            lk.load(tiny_llama(), saved)


def test_the_old_pickle_is_read_without_running_it(saved: Path, ids: Tensor) -> None:
    expected = tiny_llama()
    lk.load(expected, saved)
    tensors = safetensors.torch.load_file(saved / TENSORS)
    (saved / TENSORS).unlink()
    (saved / "lorakin.json").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    model = tiny_llama()
    lk.load(model, saved)
    assert torch.equal(model(ids).logits, expected(ids).logits)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch " + str(saved / "ran"),)

    torch.save(Evil(), saved / "adapter_model.bin")
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_llama(), saved)
    assert not (saved / "ran").exists()


def test_an_adapter_that_learned_nothing_is_announced(tmp_path: Path) -> None:
    adapter = lk.adapt(tiny_llama(), lk.LoRA(rank=2))
    with pytest.warns(lk.LorakinWarning, match="default"):
        adapter.save(tmp_path / "a")
    randomise(adapter)
    with torch.no_grad():
        adapter.tensors.branch("model.layers.1.mlp.up_proj").B.zero_()
    with pytest.warns(lk.LorakinWarning, match=r"1 of 14.*model\.layers\.1\.mlp\.up_proj"):
        adapter.save(tmp_path / "b")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(lk.OutputError):
        adapter.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_old_adapter_whole(saved: Path, ids: Tensor) -> None:
    """The size limit of a process makes its writes fail as a full disk does."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=5)))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        with pytest.raises(lk.OutputError):
            adapter.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize("at", range(12))
def test_an_interrupt_anywhere_in_a_save_leaves_one_whole_adapter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Ctrl-C at the n-th system call of a save.

    Until the record is there the old adapter counts, then the new.
    """
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=5)))
    calls = iter(range(100))

    def interrupted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return real(*args)

        return call

    monkeypatch.setattr(os, "fsync", interrupted(os.fsync))
    monkeypatch.setattr(os, "replace", interrupted(os.replace))
    try:
        adapter.save(saved)
        assert at >= 10
    except KeyboardInterrupt:
        assert at < 10
    monkeypatch.undo()
    now = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert set(now) == set(before), "no temporary file is left"
    rank = lk.load(tiny_llama(), saved).method.parametrisation.rank
    assert rank == (3 if at < 6 else 5)
    assert (now == before) is (at < 6)


def test_a_real_interrupt_while_saving(saved: Path) -> None:
    """A process that saves over and over is stopped with SIGINT; what it leaves loads."""
    script = textwrap.dedent(
        """
        import sys, torch
        sys.path[:0] = [{tests!r}]
        from conftest import tiny_llama, randomise
        import lorakin as lk
        adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=5)))
        print("saving", flush=True)
        while True:
            adapter.save({path!r})
        """
    ).format(tests=str(Path(__file__).parents[1]), path=str(saved))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout
    assert process.stdout.readline() == "saving\n"
    for _ in range(
        30
    ):  # one signal may fall into a callback of torch's, where Python cannot raise it
        process.send_signal(2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
            break
    ended = process.poll() is not None
    process.kill()
    assert ended
    assert lk.load(tiny_llama(), saved).method.parametrisation.rank in (3, 5)
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", CONFIG, TENSORS, "lorakin.json"]


def test_one_path_may_be_the_tail_of_another(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        )

    adapted, other, x = model(), model(), torch.ones(1, 4)
    randomise(lk.adapt(adapted, lk.LoRA(rank=1), exclude="1.0")).save(tmp_path)
    assert list(lk.load(other, tmp_path).placement.methods) == ["0", "1.1"]
    assert torch.equal(adapted(x), other(x))


def test_whole_modules_restore_in_whatever_order_they_were_named(tmp_path: Path) -> None:
    adapter = randomise(
        lk.adapt(
            tiny_llama(tied=False),
            lk.LoRA(rank=2),
            modules_to_save=["model.norm", "lm_head", "embed_tokens"],
        )
    )
    adapter.save(tmp_path)
    adapter.restore(tmp_path)
    adapter.merge()
    with pytest.raises(lk.StateError):
        adapter.restore(tmp_path)


def test_what_goes_on_training_has_float32_masters(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2), dtype=torch.bfloat16)).save(tmp_path)
    assert {p.dtype for p in lk.load(tiny_llama(), tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in lk.load(tiny_llama(), tmp_path, trainable=True).parameters()} == {
        torch.float32
    }


def test_a_directory_in_a_files_place(saved: Path) -> None:
    before = (saved / TENSORS).read_bytes()
    (saved / "lorakin.json").unlink()
    (saved / "lorakin.json").mkdir()
    with pytest.raises(lk.OutputError, match="lorakin.json is a directory|Is a directory"):
        randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=5))).save(saved)
    assert (saved / TENSORS).read_bytes() == before


def test_restore_overwrites_in_place(saved: Path, ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=3, alpha=6)), seed=7)
    tensors = adapter.parameters()
    adapter.restore(saved)
    expected = tiny_llama()
    lk.load(expected, saved)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert all(a is b for a, b in zip(adapter.parameters(), tensors, strict=True)), (
        "optimizers keep holding them"
    )
    assert all(p.requires_grad for p in adapter.parameters())
    other = lk.adapt(tiny_llama(), lk.LoRA(rank=2))
    with pytest.raises(lk.AdapterError):
        other.restore(saved)


def trained_beside(path: Path, seed: int = 0) -> Any:
    """A Delta-LoRA, whose own tensors stand beside PEFT's; in `path`."""
    torch.manual_seed(0)
    model = tiny_llama()
    adapter = lk.adapt(model, [lk.DeltaLoRA(rank=2, start_step=1), lk.DoRA()], seed=seed)
    optimizer = adapter.optimizer(lr=0.05)
    ids = torch.arange(3, 12).unsqueeze(0)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(path)
    return model


def test_files_of_two_adapters_do_not_mix(tmp_path: Path, ids: Tensor) -> None:
    """Ours beside PEFT's that it was not written with.

    What PEFT's say counts, and it is said. Ours of another is damage.
    """
    one = trained_beside(tmp_path / "one")
    trained_beside(tmp_path / "two", seed=1)
    (tmp_path / "one" / "lorakin.safetensors").write_bytes(
        (tmp_path / "two" / "lorakin.safetensors").read_bytes()
    )
    with pytest.raises(lk.AdapterError, match="lorakin.safetensors"):
        lk.load(tiny_llama(), tmp_path / "one")
    (tmp_path / "one" / "lorakin.safetensors").unlink()
    other = tiny_llama()
    with pytest.warns(
        lk.LorakinWarning,
        match="lorakin.safetensors",
    ):
        adapter = lk.load(other, tmp_path / "one")
    assert adapter.method.words == "lora,dora"
    torch.testing.assert_close(other(ids).logits, one(ids).logits, rtol=1e-4, atol=1e-4)
    (tmp_path / "two" / TENSORS).write_bytes((tmp_path / "one" / TENSORS).read_bytes())
    with pytest.warns(lk.LorakinWarning, match=TENSORS):
        lk.load(tiny_llama(), tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CONFIG, lambda config: config.update(lora_alpha=2 * config["lora_alpha"])),
        (CONFIG, lambda config: config.update(use_rslora=True)),
        (CONFIG, lambda config: config.update(r=5)),
        ("lorakin.json", lambda own: own["members"][0]["settings"].update(lam=5.0)),
        ("lorakin.json", lambda own: own["members"][0]["settings"].update(alpha=64.0)),
    ],
)
def test_what_ours_and_pefts_files_say_must_be_the_same(
    name: str, change: Any, tmp_path: Path
) -> None:
    trained_beside(tmp_path)
    content = json.loads((tmp_path / name).read_text())
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_llama(), tmp_path)


def test_damage_to_our_own_files(tmp_path: Path) -> None:
    import hashlib

    trained_beside(tmp_path)
    whole = {
        name: (tmp_path / name).read_bytes() for name in ("lorakin.json", "lorakin.safetensors")
    }
    tensors = safetensors.torch.load(whole["lorakin.safetensors"])
    tensors[next(key for key in tensors if key.endswith("/B"))][0, 0] = float("nan")
    own = json.loads(whole["lorakin.json"])
    (tmp_path / "lorakin.safetensors").write_bytes(safetensors.torch.save(tensors))
    own["beside"]["lorakin.safetensors"] = hashlib.sha256(
        (tmp_path / "lorakin.safetensors").read_bytes()
    ).hexdigest()
    (tmp_path / "lorakin.json").write_text(json.dumps(own))
    with pytest.raises(lk.AdapterError, match=r"lorakin\.safetensors.*NaN"):
        lk.load(tiny_llama(), tmp_path)
    for change, message in (
        (
            lambda own: own.update(state={"steps": "x", "rules": 7}),
            "expected steps, a number, and rules, a list",
        ),
        (lambda own: own.update(members="all"), "members is .all., expected a list"),
        (lambda own: own["tensors"].clear(), "lorakin.json lacks the tensors of"),
    ):
        own = json.loads(whole["lorakin.json"])
        change(own)
        (tmp_path / "lorakin.safetensors").write_bytes(whole["lorakin.safetensors"])
        (tmp_path / "lorakin.json").write_text(json.dumps(own))
        with pytest.raises(lk.AdapterError, match=message):
            lk.load(tiny_llama(), tmp_path)


def test_a_shared_pair_that_was_damaged(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.VeRA(rank=4))).save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    tensors["base_model.vera_A"] *= 2
    safetensors.torch.save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    with pytest.warns(lk.LorakinWarning, match="lorakin.json"):
        lk.load(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    "member",
    [lk.LoRA(rank=2), lk.VeRA(rank=4), lk.AdaLoRA(initial_rank=4), [lk.VeRA(rank=4), lk.DoRA()]],
)
def test_a_loaded_adapters_tensors_come_in_the_order_of_a_fresh_ones(
    member: Any, tmp_path: Path
) -> None:
    """Or an optimizer's saved state would go to the wrong tensors."""
    adapter = randomise(lk.adapt(tiny_llama(), member))
    directory.save(adapter, tmp_path)
    loaded = lk.load(tiny_llama(), tmp_path, trainable=True)
    assert [name for name, _ in loaded.named_parameters()] == [
        name for name, _ in adapter.named_parameters()
    ]


@pytest.mark.parametrize("member", [lk.LoRAFA(rank=2), lk.VeRA(rank=4), lk.LoRAPlus(rank=2)])
def test_what_peft_saves_over_ours_is_what_peft_says(member: Any, tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), member, targets="q_proj")).save(tmp_path)
    other = randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=3), targets="v_proj")).save(
        tmp_path / "other"
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((other / name).read_bytes())
    with pytest.warns(lk.LorakinWarning, match="lorakin.json"):
        adapter = lk.load(tiny_llama(), tmp_path)
    assert adapter.method.words == "lora" and list(adapter.placement.methods) == [
        f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)
    ]


def test_a_base_without_values_keeps_the_files(tmp_path: Path, ids: Tensor) -> None:
    trained = tiny_llama()
    randomise(lk.adapt(trained, lk.LoRA(rank=2))).save(tmp_path)
    with torch.device("meta"):
        model = type(trained)(trained.config)
    lk.load(model, tmp_path)
    weights = {key: tensor for key, tensor in trained.state_dict().items() if "lorakin" not in key}
    with pytest.warns(lk.LorakinWarning, match="no tensors for"):
        model.load_state_dict(weights, strict=False, assign=True)
    model.model.rotary_emb = trained.model.rotary_emb
    torch.testing.assert_close(model.eval()(ids).logits, trained(ids).logits)


@pytest.mark.parametrize("pattern", ["(([a-z._0-9])+)+$!", "(a|ab)*c", "(a|a)*b", ".*" * 9 + "!"])
def test_patterns_that_would_take_for_ever_mean_what_they_mean(saved: Path, pattern: str) -> None:
    targets = json.loads((saved / "adapter_config.json").read_text())["target_modules"]
    edit(saved, target_modules=pattern)
    with pytest.raises(lk.AdapterError, match="target"):
        lk.load(tiny_llama(), saved)
    edit(saved, target_modules=targets, rank_pattern={pattern: 3})
    lk.load(tiny_llama(), saved)


def test_eight_bit_tensors(saved: Path) -> None:
    edit_tensors(
        saved, lambda t: t.update({Q.format("A"): t[Q.format("A")].to(torch.float8_e4m3fn)})
    )
    with pytest.raises(lk.AdapterError, match="float8_e4m3fn"):
        lk.load(tiny_llama(), saved)


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2), targets="q_proj")).save(tmp_path)
    (tmp_path / "lorakin.json").unlink()
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        {key: tensor.to(torch.complex64) for key, tensor in tensors.items()}, file
    )
    with pytest.raises(lk.AdapterError, match="complex64"):
        lk.load(tiny_llama(), tmp_path)
