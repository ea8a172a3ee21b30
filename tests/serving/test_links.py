"""Links in a base's directory and in the place of a result: content is copied where it is the
model's, and nowhere else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakin as lk
from conftest import randomise
from lorakin.cli.app import run
from lorakin.serving.merged import StreamedMerge
from lorakin.serving.other_files import files_without_weights
from lorakin.storage import directory
from lorakin.training.models import load_model


@pytest.fixture
def adapter(model_dir: str, tmp_path: Path) -> Path:
    return randomise(lk.adapt(load_model(model_dir, "float32").model, lk.LoRA(2))).save(
        tmp_path / "adapter"
    )


@pytest.fixture
def base(model_dir: str, tmp_path: Path) -> Path:
    shutil.copytree(model_dir, tmp_path / "base")
    return tmp_path / "base"


def merge(base: Path, adapter: Path, out: Path) -> int:
    return run(["merge", "-m", str(base), "-a", str(adapter), "-o", str(out), "--no-verify"])


def test_a_snapshot_of_the_hub_is_copied_as_files(
    model_dir: str, adapter: Path, tmp_path: Path
) -> None:
    """Its files are links into the blobs beside it."""
    home = tmp_path / "hub" / "models--org--name"
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(Path(model_dir).iterdir())):
        shutil.copyfile(file, home / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    assert merge(snapshot, adapter, tmp_path / "out") == 0
    made = list((tmp_path / "out").iterdir())
    assert not [path for path in made if path.is_symlink()]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        Path(model_dir) / "tokenizer.json"
    ).read_bytes()
    assert all(path.is_symlink() for path in snapshot.iterdir())
    load_model(str(tmp_path / "out"), "base")


@pytest.mark.parametrize("name", ["tokenizer.json", "notes.txt", "more/deep.txt"])
@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_a_link_to_the_outside_is_not_copied(
    name: str,
    how: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret, link = tmp_path / "secret", base / name
    secret.write_text("secret")
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(
        secret
        if how == "absolute"
        else Path("../" * (2 + name.count("/")), tmp_path.name, "secret")
    )
    assert link.read_text() == "secret"
    assert merge(base, adapter, tmp_path / "out") == 2
    assert (
        "is a link to" in capsys.readouterr().err or name == "tokenizer.json"
    )  # which no tokenizer can be read from
    assert not (tmp_path / "out").exists()
    with pytest.raises(lk.ModelError):
        files_without_weights(base)


def test_links_inside_and_to_directories(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (base / "folder").symlink_to(tmp_path / "elsewhere")
    (base / "NOTICE").write_text("notice")
    (base / "LICENSE").symlink_to("NOTICE")
    (base / "gone").symlink_to("nothing")
    assert merge(base, adapter, tmp_path / "out") == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "notice" and not (
        tmp_path / "out" / "LICENSE"
    ).is_symlink()
    assert not (tmp_path / "out" / "folder").exists() and not (tmp_path / "out" / "gone").exists()


@pytest.mark.parametrize("there", ["an empty directory", "nothing", "a file"])
def test_a_result_is_not_written_through_a_link(
    there: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    if there == "an empty directory":
        target.mkdir()
    elif there == "a file":
        target.write_text("theirs")
    out.symlink_to(target)
    assert merge(base, adapter, out) == 2
    assert out.is_symlink()
    if there == "a file":
        assert target.read_text() == "theirs"
    else:
        assert not target.exists() or not list(target.iterdir())


def test_the_weights_are_those_that_transformers_takes(base: Path, adapter: Path) -> None:
    """With one file and an index both there, the index is not looked at."""
    state = load_file(base / "model.safetensors")
    save_file(
        {key: torch.zeros_like(t) for key, t in state.items()},
        base / "other.safetensors",
        metadata={"format": "pt"},
    )
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "other.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merged = StreamedMerge(base, directory.read(adapter))
    assert torch.equal(merged["model.norm.weight"], state["model.norm.weight"])
    assert load_model(str(base), "base").model.model.norm.weight.any()


def test_a_file_of_weights_that_another_directory_holds(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Weights are read through links, which a user's own copies often are; nothing of the link is
    kept.
    """
    shutil.move(base / "model.safetensors", tmp_path / "weights")
    (base / "model.safetensors").symlink_to(tmp_path / "weights")
    before = (tmp_path / "weights").read_bytes()
    assert merge(base, adapter, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "weights").read_bytes() == before
