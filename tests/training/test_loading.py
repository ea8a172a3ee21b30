"""Code that comes with a model runs nowhere, and an adapter beside it is not applied unasked."""

from __future__ import annotations

import json
import shutil
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakin as lk
from conftest import randomise
from lorakin.cli.app import run
from lorakin.plan.meta_model import meta_model_of
from lorakin.training import loading, models, with_adapter


def hostile(folder: Path, ran: Path, known: bool) -> Path:
    """Put code into every place of a model's directory where a loader might run it."""
    code = f"open({str(ran)!r}, 'w')\nclass Theirs: pass\n"
    kinds = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    )
    auto: dict[str, Any] = dict.fromkeys(kinds, "theirs.Theirs")
    named: dict[str, dict[str, Any]] = {
        "config.json": {"auto_map": auto}
        | ({} if known else {"model_type": "theirs", "architectures": ["Theirs"]}),
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
        | ({} if known else {"tokenizer_class": "Theirs"}),
        "generation_config.json": {"custom_generate": str(folder), "trust_remote_code": True},
        "processor_config.json": {"auto_map": {"AutoProcessor": "theirs.Theirs"}},
    }
    for name, said in named.items():
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | said))
    for file in (
        "theirs.py",
        "modeling_llama.py",
        "custom_generate/generate.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(code)
    return folder


@pytest.fixture
def adapter(model_dir: str, tmp_path: Path) -> Path:
    return randomise(lk.adapt(models.load_model(model_dir, "float32").model, lk.LoRA(2))).save(
        tmp_path / "adapter"
    )


def commands(model: str, adapter: str, data: str, out: Path) -> dict[str, list[str]]:
    """Every command that loads a model."""
    both = ["-m", model, "-a", adapter]
    brief = ["--dtype=float32", "--steps=1"]
    return {
        "train": ["train", "-m", model, "-d", data, "-o", str(out / "t"), *brief, "--save-every=0"],
        "generate": [
            "generate",
            *both,
            "--prompt",
            "the cat",
            "--max-new-tokens=2",
            "--dtype=float32",
            "--other-base",
        ],
        "evaluate": ["evaluate", *both, "-d", data, "--dtype=float32", "--other-base"],
        "merge": ["merge", *both, "-o", str(out / "m"), "--other-base"],
        "export": [
            "export",
            adapter,
            "--to",
            "lora",
            "-m",
            model,
            "-o",
            str(out / "e"),
            "--other-base",
        ],
        "gguf": [
            "export",
            adapter,
            "--to",
            "gguf-merged",
            "-m",
            model,
            "-o",
            str(out / "g"),
            "--other-base",
        ],
        "combine": ["combine", f"{adapter}=1", "-m", model, "-o", str(out / "c"), "--other-base"],
        "convert": ["convert", adapter, "-m", model, "-o", str(out / "v")],
        "plan": ["plan", "-m", model, "--method=lora"],
        "inspect": ["inspect", adapter, "--html", str(out / "i.html")],
        "compare": [
            "compare",
            "-m",
            model,
            "-d",
            data,
            "--methods=lora",
            "--budget=steps=1",
            "-o",
            str(out / "x"),
        ],
    }


@pytest.mark.parametrize("known", [True, False])
def test_no_command_runs_code_that_comes_with_a_model(
    known: bool,
    model_dir: str,
    adapter: Path,
    tmp_path: Path,
    write_rows: Callable[..., str],
    chat_rows: list[dict[str, str]],
) -> None:
    """Where the model is of a kind that transformers has, it loads as that; else it is refused."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_dir, folder)
    hostile(folder, ran, known)
    data, codes = write_rows(chat_rows), {}
    asked = commands(str(folder), str(adapter), data, tmp_path)
    if known:
        del asked["compare"], asked["plan"]  # what they load is what these load:
        meta_model_of(str(folder), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for word, arguments in asked.items():
            codes[word] = run(arguments)
            assert not ran.exists(), word
    if known:
        bad = ("convert", "gguf")  # no other library's file; words that llama.cpp has no form for
        assert codes == {word: 2 if word in bad else 0 for word in codes}
    else:
        assert codes == {word: 0 if word == "inspect" else 2 for word in codes}


def test_the_door_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Loader:
        @classmethod
        def from_pretrained(cls, source: str, **options: Any) -> Any:
            given.append(options)
            return types.SimpleNamespace(config=types.SimpleNamespace())

        from_config = from_pretrained

    monkeypatch.setattr(
        loading, "transformers", types.SimpleNamespace(AutoConfig=Loader, AutoTokenizer=Loader)
    )
    loading.config("x", trust_remote_code=True)
    loading.tokenizer("x", trust_remote_code=True)
    loading.model(Loader, "x", trust_remote_code=True)
    loading.model_from_config(Loader, "x", trust_remote_code=True)
    assert [options["trust_remote_code"] for options in given] == [False] * 4


def test_an_adapter_beside_the_base_is_said_and_not_applied(
    model_dir: str, adapter: Path, tmp_path: Path
) -> None:
    want = models.load_model(model_dir, "float32").model
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, folder / name)
    with pytest.warns(lk.errors.LorakinWarning, match="--adapter"):
        found = models.load_model(str(folder), "float32").model
    assert type(found) is type(want)
    assert found.state_dict().keys() == want.state_dict().keys()
    assert all(
        torch.equal(tensor, found.state_dict()[key]) for key, tensor in want.state_dict().items()
    )
    ids = torch.arange(3, 12).view(1, -1)
    assert torch.equal(found(ids).logits, want(ids).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # and that its base lay elsewhere
        applied = with_adapter.load_with_adapter(str(folder), str(folder), "float32").model
    assert not torch.allclose(applied(ids).logits, want(ids).logits, atol=1e-3)


def test_an_adapter_alone_is_no_base(adapter: Path) -> None:
    """transformers would load the base that it names, and apply it."""
    with pytest.raises(lk.ModelError, match=r"config\.json"):
        models.load_model(str(adapter))


def test_an_adapter_beside_a_hub_id_is_said_too(
    model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(loading, "hub_has_file", lambda *given: asked.append(given) or True)
    monkeypatch.setattr(loading, "raw_config", lambda name: {})
    with pytest.warns(
        lk.errors.LorakinWarning,
        match=r"adapter_config\.json",
    ):
        models._size("org/name")
    assert asked == [("org/name", "adapter_config.json")]
    monkeypatch.undo()
    assert not loading.hub_has_file("org/nothing-of-the-kind", "adapter_config.json")


def test_merging_does_not_carry_the_adapter_along(
    model_dir: str, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (
            run(["merge", "-m", str(folder), "-a", str(adapter), "-o", str(tmp_path / "merged")])
            == 0
        )
    assert not list((tmp_path / "merged").glob("adapter*"))


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), TypeError("y"), RuntimeError("one\ntwo"), ValueError(""), RecursionError()],
)
def test_what_libraries_say_becomes_one_sentence(error: Exception) -> None:
    with (
        pytest.raises(lk.ModelError) as caught,
        loading.as_model_error("model 'm' cannot be loaded"),
    ):
        raise error
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


def test_a_panic_of_the_tokenizers_library_is_an_error_and_ctrl_c_is_not() -> None:
    class PanicException(BaseException):  # as pyo3 makes them
        pass

    with pytest.raises(lk.ModelError, match="panicked"), loading.as_model_error("x"):
        raise PanicException("panicked")
    with pytest.raises(KeyboardInterrupt), loading.as_model_error("x"):
        raise KeyboardInterrupt
