"""Exports of every member: what is written is read back, is the model that was trained, and is
refused if it is not.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import lorakin as lk
from conftest import randomise, small, tiny_gpt2, tiny_llama
from lorakin.cli.app import run
from lorakin.serving import verify
from lorakin.serving.export import Exported, export
from lorakin.serving.gguf_adapter import read_adapter
from lorakin.serving.job import ExportJob, ExportRequest
from lorakin.serving.merged import NotStreamed, StreamedMerge
from lorakin.storage import directory
from lorakin.training.models import load_model
from serving.words import byte_tokenizer

MEMBERS: dict[str, Any] = {
    word: small(word, **({"alpha": 8.0} if word == "lora" else {}))
    for word in ("lora", "vera", "adalora", "dora", "dora,vera")
}
TARGETS = ("lora", "merged", "gguf", "gguf-merged")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama in several shards, whose tokenizer llama.cpp knows."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_llama(vocab_size=320, initializer_range=0.2, tie_word_embeddings=False)
    model.generation_config.max_length = 77
    model.save_pretrained(folder, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return str(folder)


def adapter_on(base: str, member: Any, out: Path, **more: Any) -> str:
    loaded = load_model(base, "base")
    adapter = randomise(lk.adapt(loaded.model, member, **more), 0.2)
    if isinstance(member, lk.DoRA | list):  # near its start, so that a gain is no noise
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name.endswith(".m"):
                    rows = adapter.tensors.base_weight(name.removesuffix(".m")).norm(dim=1)
                    parameter.copy_(rows * (1 + 0.1 * parameter))
    return str(directory.save(adapter, out))


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("word", MEMBERS)
def test_every_member_to_every_target(word: str, to: str, base_dir: str, tmp_path: Path) -> None:
    adapter = adapter_on(base_dir, MEMBERS[word], tmp_path / "adapter")
    rank = (
        32 if "dora" in word and to in ("lora", "gguf") else None
    )  # the full rank of these layers, so exact
    dtype = "float32" if to.startswith("gguf") else None
    done = export(ExportRequest(adapter, to, str(tmp_path / "out"), rank=rank, dtype=dtype))
    assert done.agreement is not None
    assert (
        done.agreement.tokens == 1 and done.agreement.largest < 1e-4 * done.agreement.largest_logit
    )
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["verified"]["places"] == done.agreement.positions > 100
    trained, other = load_model(base_dir, "base").model, load_model(base_dir, "base").model
    lk.load(trained, adapter)
    if to == "lora":
        lk.load(other, tmp_path / "out")
    elif to == "merged":
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    elif to == "gguf":
        pairs = read_adapter(tmp_path / "out" / "adapter.gguf", other.config)
        with torch.no_grad():
            for path, pair in pairs.items():
                other.get_submodule(path).weight += pair.up @ pair.down
    else:
        held = transformers.GgufConfig(dequantize=True)
        settings = {"gguf_file": "model.gguf", "dtype": torch.float32, "quantization_config": held}
        other = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), **settings)
    torch.testing.assert_close(logits(other), logits(trained), rtol=0, atol=2e-4)
    assert not torch.allclose(
        logits(trained), logits(load_model(base_dir, "base").model), atol=0.05
    )


@pytest.mark.parametrize("to", ["lora", "merged", "gguf-merged"])
def test_rows_of_tokens(to: str, base_dir: str, tmp_path: Path) -> None:
    rows = {"embed_tokens": [5, 6], "lm_head": [7]}
    adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter", trainable_tokens=rows)
    done = export(
        ExportRequest(
            adapter, to, str(tmp_path / "out"), dtype="float32" if to == "gguf-merged" else None
        )
    )
    assert done.agreement is not None
    assert (
        done.agreement.tokens == 1 and done.agreement.largest < 1e-4 * done.agreement.largest_logit
    )


def test_a_merged_model_keeps_shards_dtype_tokenizer_and_generation_settings(
    base_dir: str, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    transformers.AutoModelForCausalLM.from_pretrained(
        base_dir, dtype=torch.bfloat16
    ).save_pretrained(half, max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(base_dir) / name, half / name)
    adapter = adapter_on(
        str(half), MEMBERS["lora"], tmp_path / "adapter", targets=["q_proj", "lm_head"]
    )
    export(ExportRequest(adapter, "merged", str(tmp_path / "out"), str(half)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*(p.name for p in half.iterdir()), "export.json"]
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (half / name).read_bytes(), name
    said, had = (
        json.loads((folder / "generation_config.json").read_text())
        for folder in (tmp_path / "out", half)
    )
    assert had["max_length"] == 77 and said == {
        **had,
        "eos_token_id": [2, 0],
    }  # the tokenizer's, too
    base, merged = (
        load_model(str(half), "base").model,
        load_model(str(tmp_path / "out"), "base").model,
    )
    whole = load_model(str(half), "base").model
    lk.load(whole, adapter).merge(permanent=True)
    changed = []
    for name, tensor in whole.state_dict().items():
        assert merged.state_dict()[name].dtype is torch.bfloat16
        assert torch.equal(merged.state_dict()[name], tensor), (
            "folded in float32 and rounded once, as in memory"
        )
        changed += [name] if not torch.equal(tensor, base.state_dict()[name]) else []
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "lm_head"}


def test_the_safetensors_are_the_librarys_own(base_dir: str, tmp_path: Path) -> None:
    adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
    export(ExportRequest(adapter, "merged", str(tmp_path / "out"), verify=False))
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        again = safetensors.torch.load(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        with safetensors.safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["weight_map"]
        == json.loads((Path(base_dir) / "model.safetensors.index.json").read_text())["weight_map"]
    )


def test_tied_embeddings_come_apart(tmp_path: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path / "base")
    for n, targets in enumerate(("embed_tokens", "lm_head", ["embed_tokens", "lm_head"])):
        model = tiny_llama(tied=True)
        adapter = randomise(lk.adapt(model, lk.LoRA(2), targets=targets), 0.3)
        adapter.save(tmp_path / f"adapter{n}")
        (out := tmp_path / f"out{n}").mkdir()
        StreamedMerge(tmp_path / "base", directory.read(tmp_path / f"adapter{n}")).write(out)
        merged = transformers.AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits_small(merged), logits_small(model), rtol=0, atol=1e-5)


def test_biases_are_written_and_forms_without_them_refuse(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    for bias in ("lora_only", "all"):
        model = tiny_gpt2()
        adapter = randomise(lk.adapt(model, lk.LoRA(2), targets="c_attn", bias=bias), 0.3)
        adapter.save(tmp_path / bias)
        (out := tmp_path / f"{bias}-merged").mkdir()
        StreamedMerge(tmp_path / "base", directory.read(tmp_path / bias)).write(out)
        merged = transformers.AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits_small(merged), logits_small(model), rtol=0, atol=1e-5)


def logits_small(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 13).view(1, -1)).logits


def test_a_classifier_with_its_head_from_a_base_without_one(bert_dir: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = load_model(bert_dir, "float32", ["bad", "good", "odd"])
    adapter = randomise(
        lk.adapt(
            loaded.model, lk.LoRA(4), targets=["query", "dense"], modules_to_save=["classifier"]
        ),
        0.3,
    )
    want = logits_small(loaded.model)
    adapter.save(tmp_path / "adapter")
    assert (
        run(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 0
    )
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_small(merged), want, rtol=0, atol=1e-5)
    assert merged.config.num_labels == 3
    for to, said in (("gguf", "gguf-merged"), ("lora", "merge")):
        with pytest.raises(lk.LorakinError, match=said):
            export(
                ExportRequest(
                    str(tmp_path / "adapter"), to, str(tmp_path / "other"), portable=to == "lora"
                )
            )


def test_a_base_that_is_not_stored_under_its_own_names_is_loaded_whole(
    base_dir: str, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    old = tmp_path / "old"
    shutil.copytree(base_dir, old, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    adapter = adapter_on(str(old), MEMBERS["dora"], tmp_path / "adapter")
    with pytest.raises(NotStreamed):
        StreamedMerge(old, directory.read(Path(adapter)))
    for to in ("merged", "gguf-merged"):
        done = export(ExportRequest(adapter, to, str(tmp_path / to), dtype="float32"))
        assert done.agreement is not None and done.agreement.tokens == 1


def test_peak_memory_is_about_one_tensor(tmp_path: Path) -> None:
    """Eight shards of 8 MB; the merged model is 64 MB. Counted is the process's own memory, not the
    files mapped into it.
    """
    sizes = {
        "vocab_size": 256,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
    }
    tiny_llama(tied=True, **sizes).save_pretrained(tmp_path / "base", max_shard_size="8MB")
    randomise(lk.adapt(tiny_llama(tied=True, **sizes), lk.DoRA(rank=2))).save(tmp_path / "adapter")
    merged = StreamedMerge(tmp_path / "base", directory.read(tmp_path / "adapter"))
    (tmp_path / "out").mkdir()
    merged["model.layers.0.mlp.up_proj.weight"]  # what is loaded at the first use is not counted
    peak, before, done = [0.0], own_memory(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own_memory() - before)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    merged.write(tmp_path / "out")
    done.set()
    watcher.join()
    total = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert total > 60e6
    assert peak[0] < 0.5 * total, f"{peak[0] / 1e6:.0f} MB for {total / 1e6:.0f} MB of weights"


def own_memory() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not say how much memory is a process's own")


class TestRefusals:
    def test_a_gain_needs_a_rank(self, base_dir: str, tmp_path: Path) -> None:
        adapter = adapter_on(base_dir, MEMBERS["dora"], tmp_path / "adapter")
        for to in ("lora", "gguf"):
            with pytest.raises(lk.SettingError, match="--error"):
                export(ExportRequest(adapter, to, str(tmp_path / "out")))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]

    def test_what_is_not_near_enough_is_not_kept(self, base_dir: str, tmp_path: Path) -> None:
        adapter = adapter_on(base_dir, MEMBERS["dora"], tmp_path / "adapter")
        with pytest.raises(lk.VerificationError, match="--max-kl"):
            export(ExportRequest(adapter, "lora", str(tmp_path / "out"), rank=1))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
        assert (
            run(["export", adapter, "--to", "lora", "--rank", "1", "--out", str(tmp_path / "out")])
            == 4
        )
        done = export(ExportRequest(adapter, "lora", str(tmp_path / "out"), rank=1, max_kl=100.0))
        assert done.agreement is not None and 0.02 < done.agreement.divergence < 100
        export(ExportRequest(adapter, "lora", str(tmp_path / "unseen"), rank=1, verify=False))
        assert json.loads((tmp_path / "unseen" / "export.json").read_text())["verified"] is None

    @pytest.mark.filterwarnings(
        "ignore::lorakin.LorakinWarning"
    )  # the damage is also seen by its checksum
    @pytest.mark.parametrize("to", TARGETS)
    def test_a_fault_in_what_was_written_is_found(
        self, to: str, base_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One weight of one layer is damaged on its way to the disk."""
        adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
        from lorakin.serving import targets

        kind, write = targets.TARGETS[to], targets.TARGETS[to].write

        def damaged(job: Any, folder: Path) -> None:
            write(job, folder)
            file = next(
                f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".gguf")
            )
            content = bytearray(file.read_bytes())
            content[-4000:-3000] = bytes(1000)
            file.write_bytes(bytes(content))

        monkeypatch.setattr(kind, "write", staticmethod(damaged))
        with pytest.raises(lk.VerificationError):
            export(ExportRequest(adapter, to, str(tmp_path / "out"), dtype="float32"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"to": "onnx"}, "onnx.*lora, merged, gguf, gguf-merged"),
            ({"to": "merged", "rank": 4}, "--rank"),
            ({"to": "gguf-merged", "portable": True}, "--portable"),
            ({"to": "lora", "dtype": "q8_0"}, "q8_0"),
            ({"to": "lora", "rank": 0}, "1"),
            ({"to": "lora", "model": "/nowhere"}, "/nowhere"),
            ({"adapter": "/nowhere"}, "/nowhere"),
        ],
    )
    def test_bad_requests(
        self, changes: dict[str, Any], said: str, base_dir: str, tmp_path: Path
    ) -> None:
        adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
        options = {"adapter": adapter, "to": "lora", "out": str(tmp_path / "out"), **changes}
        with pytest.raises(lk.LorakinError, match=said):
            export(ExportRequest(**options))
        assert not (tmp_path / "out").exists()

    def test_what_is_there_is_left_alone(self, base_dir: str, tmp_path: Path) -> None:
        adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        with pytest.raises(lk.OutputError):
            export(ExportRequest(adapter, "lora", str(tmp_path / "out")))
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]

    def test_another_base(self, base_dir: str, tmp_path: Path) -> None:
        adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
        other = tmp_path / "other"
        shutil.copytree(base_dir, other)
        model = transformers.AutoModelForCausalLM.from_pretrained(other)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.save_pretrained(other, max_shard_size="50KB")
        for verified in (True, False):
            with pytest.raises(lk.AdapterError, match="--other-base"):
                export(
                    ExportRequest(
                        adapter, "merged", str(tmp_path / "out"), str(other), verify=verified
                    )
                )
        export(ExportRequest(adapter, "merged", str(tmp_path / "out"), str(other), other_base=True))

    def test_numbers_too_large_for_half_precision(self, base_dir: str, tmp_path: Path) -> None:
        loaded = load_model(base_dir, "base")
        adapter = randomise(lk.adapt(loaded.model, lk.LoRA(2), targets="q_proj"))
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                parameter.mul_(1e6 if name.endswith("B") else 1e-6)
        adapter.save(tmp_path / "adapter")
        for to in ("lora", "gguf"):
            with pytest.raises(lk.LorakinError, match="float16|f16"):
                export(
                    ExportRequest(
                        str(tmp_path / "adapter"), to, str(tmp_path / "out"), dtype="float16"
                    )
                )


class TestData:
    def test_calibration_fits_the_outputs(
        self, base_dir: str, tmp_path: Path, write_rows: Any
    ) -> None:
        adapter = adapter_on(base_dir, MEMBERS["dora"], tmp_path / "adapter")
        texts = ["the quick brown fox", "jumps over 1234 lazy dogs", "don't you think it's ok?"]
        data = write_rows(
            [
                {"prompt": f"{text} {n}", "completion": text[::-1]}
                for n in range(30)
                for text in texts
            ]
        )
        done: dict[str, Exported] = {}
        for name, given in (("plain", None), ("fitted", data)):
            request = ExportRequest(
                adapter, "lora", str(tmp_path / name), rank=6, data=given, max_kl=100.0
            )
            done[name] = export(request)
        assert all(fit.output_error is not None for fit in done["fitted"].fits.values())
        assert all(fit.output_error is None for fit in done["plain"].fits.values())
        assert done["fitted"].agreement is not None and done["fitted"].agreement.positions > 300
        assert any("of the outputs" in line for line in done["fitted"].lines())


class TestComparing:
    def test_the_figures(self) -> None:
        one, other = (
            torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]),
            torch.tensor([[1.0, 2.5, 0.0], [2.0, 1.0, 1.0]]),
        )
        transcript = verify.Transcript([[1, 2]], [one])

        class Said(torch.nn.Module):
            device = torch.device("cpu")

            def forward(self, input_ids: torch.Tensor) -> Any:
                return transformers.modeling_outputs.CausalLMOutput(logits=other[None])

        agreement = verify.compare_logits(transcript, Said())
        p, q = one.double().softmax(-1), other.double().softmax(-1)
        assert (
            agreement.largest == 2
            and agreement.mean == pytest.approx(4.5 / 6)
            and agreement.tokens == 0.5
        )
        assert agreement.divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
        assert agreement.positions == 2 and agreement.largest_logit == 3

    def test_nan_is_never_within_tolerance(self) -> None:
        agreement = verify.LogitComparison(float("nan"), float("nan"), float("nan"), 0.0, 1, 3.0)
        for tolerance in (verify.TOLERANCES["bfloat16"], verify.NEAREST):
            with pytest.raises(lk.VerificationError):
                agreement.check(tolerance, "it")

    @pytest.mark.parametrize(
        ("precisions", "near", "max_kl", "want"),
        [
            (("float32", "float32"), False, None, verify.TOLERANCES["float32"]),
            (("bfloat16", "float32"), False, None, verify.TOLERANCES["bfloat16"]),
            (("float32", "q8_0"), False, None, verify.TOLERANCES["q8_0"]),
            (("float32", "base"), False, None, verify.TOLERANCES["float32"]),
            (("float32", "float32"), True, None, verify.NEAREST),
            (("float32", "float32"), False, 0.5, verify.Tolerance(float("inf"), 0.5)),
        ],
    )
    def test_which_tolerance(
        self, precisions: Any, near: bool, max_kl: float | None, want: verify.Tolerance
    ) -> None:
        assert verify.tolerance_for(precisions, near, max_kl) == want


def test_a_quantised_base_is_not_folded_into(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    randomise(lk.adapt(tiny_llama(), lk.LoRA(2), targets="q_proj")).save(tmp_path / "adapter")
    file = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors[
        "model.layers.0.self_attn.q_proj.weight"
    ].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    merged = StreamedMerge(tmp_path / "base", directory.read(tmp_path / "adapter"))
    with pytest.raises(
        lk.ModelError,
        match="torch.float8",
    ):
        merged["model.layers.0.self_attn.q_proj.weight"]


def test_an_index_that_points_elsewhere(base_dir: str, tmp_path: Path) -> None:
    shutil.copytree(base_dir, tmp_path / "base")
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {key: f"../base/{file}" for key, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
    with pytest.raises(lk.ModelError):
        export(
            ExportRequest(
                adapter, "merged", str(tmp_path / "out"), str(tmp_path / "base"), verify=False
            )
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("to", "target"), [("merged", "float32"), ("merged", "float16"), ("gguf-merged", None)]
)
def test_a_half_precision_base_is_judged_by_its_own_precision(
    dtype: torch.dtype, to: str, target: str | None, base_dir: str, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(base_dir, half, ignore=shutil.ignore_patterns("*.safetensors*"))
    transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype).save_pretrained(half)
    adapter = adapter_on(str(half), MEMBERS["lora"], tmp_path / "adapter")
    done = export(ExportRequest(adapter, to, str(tmp_path / "out"), dtype=target))
    assert done.agreement is not None and done.agreement.divergence < 1e-2


class TestBrokenBases:
    def test_truncated(self, base_dir: str, tmp_path: Path) -> None:
        adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
        shutil.copytree(base_dir, tmp_path / "base")
        shard = sorted((tmp_path / "base").glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:1000])
        for verified in (True, False):
            with pytest.raises(lk.ModelError):
                export(
                    ExportRequest(
                        adapter,
                        "merged",
                        str(tmp_path / "out"),
                        str(tmp_path / "base"),
                        verify=verified,
                    )
                )

    def test_a_tensor_is_missing(self, tmp_path: Path, tokenizer: Any) -> None:
        tiny_llama().save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        randomise(lk.adapt(tiny_llama(), lk.LoRA(2), targets="q_proj")).save(tmp_path / "adapter")
        for verified in (True, False):
            request = ExportRequest(
                str(tmp_path / "adapter"),
                "merged",
                str(tmp_path / "out"),
                str(tmp_path / "base"),
                verify=verified,
            )
            with pytest.raises(
                lk.ModelError,
                match=r"model\.layers\.0\.mlp\.up_proj\.weight",
            ):
                export(request)

    def test_a_base_of_another_name_that_nothing_tells_apart(
        self, base_dir: str, tmp_path: Path
    ) -> None:
        adapter = Path(adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter"))
        (adapter / "lorakin.json").unlink()
        shutil.copytree(base_dir, tmp_path / "another")
        with pytest.warns(lk.LorakinWarning):
            export(
                ExportRequest(
                    str(adapter), "lora", str(tmp_path / "out"), str(tmp_path / "another")
                )
            )


def test_the_bases_other_files_go_along_in_their_folders(base_dir: str, tmp_path: Path) -> None:
    adapter = adapter_on(base_dir, MEMBERS["lora"], tmp_path / "adapter")
    shutil.copytree(base_dir, tmp_path / "base")
    (tmp_path / "base" / "chat_templates").mkdir()
    (tmp_path / "base" / "chat_templates" / "extra.jinja").write_text("{{ messages }}")
    (tmp_path / "base" / "original").mkdir()
    (tmp_path / "base" / "original" / "consolidated.pth").write_bytes(b"weights")
    export(
        ExportRequest(
            adapter, "merged", str(tmp_path / "out"), str(tmp_path / "base"), verify=False
        )
    )
    assert (tmp_path / "out" / "chat_templates" / "extra.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "original").exists()


def test_rows_to_fit_to_are_not_rows_to_compare_on(
    base_dir: str, tmp_path: Path, write_rows: Any
) -> None:
    adapter = adapter_on(base_dir, MEMBERS["dora"], tmp_path / "adapter")
    for count, read in ((3, 0), (8, 2), (200, 16)):
        data = write_rows(
            [{"prompt": f"the fox {n}", "completion": "jumps"} for n in range(count)],
            f"{count}.jsonl",
        )
        job = ExportJob(
            ExportRequest(adapter, "lora", "", data=data), directory.read(Path(adapter)), base_dir
        )
        fitted, compared = job.fit_and_compare_rows
        assert len(compared) == len(job.compared_ids()) == read and len(fitted) == min(
            64, count - read
        )
        assert not [row for row in compared if row in list(fitted)]
