"""A checkpoint is one thing: whatever part of it is damaged, lost, edited or another's, training
cannot be resumed from it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from rich.console import Console

import lorakin as lk
from conftest import tiny_llama
from lorakin.training import checkpoint_manifest, checkpoints, prepare_trainer, run_directory
from lorakin.training import train as training
from lorakin.training.recipe import Recipe

PARTS = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorakin.json",
    "lorakin.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]
ADALORA = {"initial_rank": 6, "target_rank": 3, "start": 1, "finish": 1}


def run(recipe: Recipe, resume: bool = False) -> training.Result:
    return training.train(training.prepare(recipe, Console(file=io.StringIO()), resume))


def resume(out: Path, **flags: Any) -> training.Result:
    return run(run_directory.resumed_recipe(None, {"out": str(out), **flags}), resume=True)


@pytest.fixture(scope="module")
def whole(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of AdaLoRA with checkpoints at 2 and 4, and one with another seed."""
    place = tmp_path_factory.mktemp("runs")
    rows = [
        {
            "prompt": f"what did the {animal} {verb}",
            "completion": f"the {animal} {verb} on the {thing}",
        }
        for animal in ("cat", "dog", "bird")
        for verb in ("sat", "ran", "flew")
        for thing in ("mat", "tree")
    ]
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        model_dir,
        str(data),
        str(place / "one"),
        "adalora",
        eval_data=str(data),
        settings=ADALORA,
        lr=1e-2,
        steps=4,
        save_every=2,
        dtype="float32",
        targets=["q_proj"],
        batch_size=4,
    )
    run(recipe)
    run(dataclasses.replace(recipe, out=str(place / "two"), seed=1))
    return {"one": place / "one", "two": place / "two"}


@pytest.fixture
def out(whole: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole["one"], tmp_path / "out"))


@pytest.fixture
def last(out: Path) -> Path:
    return out / "checkpoints" / "checkpoint-4"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 1
    file.write_bytes(content)


def test_every_part_is_in_the_manifest(last: Path) -> None:
    said = json.loads((last / checkpoint_manifest.MANIFEST).read_text())
    assert sorted(said["parts"]) == PARTS
    assert (said["step"], said["processes"]) == (4, 1)
    assert said["run"]["recipe"]["lr"] == 1e-2
    assert said["versions"]["lorakin"] == lk.__version__
    assert checkpoint_manifest.verified(last).step == 4


@pytest.mark.parametrize("part", [*PARTS, checkpoint_manifest.MANIFEST])
def test_a_flipped_bit_is_refused_by_name(part: str, last: Path, out: Path) -> None:
    chance, content = random.Random(5), (last / part).read_bytes()
    for _ in range(12):
        flip(last / part, chance.randrange(len(content)))
        with pytest.raises(
            lk.AdapterError,
            match=rf"checkpoint-4 is damaged: .*{part}.*checkpoint-2, delete",
        ):
            resume(out)
        (last / part).write_bytes(content)


@pytest.mark.parametrize("part", PARTS)
def test_a_lost_part_is_refused_by_name(part: str, last: Path, out: Path) -> None:
    (last / part).unlink()
    with pytest.raises(lk.AdapterError, match=rf"checkpoint-4 is damaged: {part} is missing"):
        resume(out)


def test_an_edited_step_is_refused(last: Path, out: Path) -> None:
    said = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps(said | {"global_step": 1}))
    with pytest.raises(lk.AdapterError, match=r"trainer_state\.json"):
        resume(out)
    shutil.rmtree(last)
    (out / "checkpoints" / "checkpoint-2").rename(last)
    with pytest.raises(lk.AdapterError, match="step 2"):
        resume(out)


@pytest.mark.parametrize("part", ["lorakin.json", "optimizer.pt", "adapter_model.safetensors"])
def test_a_part_of_another_step_is_refused(part: str, last: Path, out: Path) -> None:
    shutil.copy(out / "checkpoints" / "checkpoint-2" / part, last)
    with pytest.raises(lk.AdapterError, match=rf"{part} is not the one that was saved in it"):
        resume(out)


def test_a_checkpoint_of_another_run_is_refused(
    last: Path, out: Path, whole: dict[str, Path]
) -> None:
    shutil.rmtree(last)
    shutil.copytree(whole["two"] / "checkpoints" / "checkpoint-4", last)
    with pytest.raises(lk.SettingError):
        resume(out)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.5), ("steps", 9), ("settings", {**ADALORA, "target_rank": 4})]
)
def test_a_recipe_that_was_edited_is_refused(name: str, value: Any, out: Path) -> None:
    said = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump(said | {name: value}))
    with pytest.raises(lk.SettingError, match=rf"checkpoint-4 was made with {name}=.*another run"):
        resume(out)


def test_a_recipe_without_a_setting_that_mattered_is_refused(out: Path) -> None:
    """What the recipe leaves open is filled in, and compared then."""
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    said = yaml.safe_load((out / "recipe.yaml").read_text())
    del said["lr"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(lk.SettingError, match="checkpoint-2"):
        resume(out)


def test_other_rows_are_refused_though_the_metrics_are_gone(out: Path) -> None:
    said = yaml.safe_load((out / "recipe.yaml").read_text())
    rows = Path(said["data"][0])
    content = rows.read_text()
    (out / "metrics.jsonl").unlink()
    try:
        rows.write_text("".join(reversed(content.splitlines(keepends=True))))
        with pytest.raises(lk.DataError, match="checkpoint-4"):
            resume(out)
    finally:
        rows.write_text(content)


def test_without_the_damaged_one_the_older_comes_to_the_same(
    last: Path, out: Path, whole: dict[str, Path]
) -> None:
    flip(last / "optimizer.pt", 3000)
    with pytest.raises(lk.AdapterError, match="checkpoint-2"):
        resume(out)
    shutil.rmtree(last)
    resume(out)
    for name in ("adapter_model.safetensors", "lorakin.json"):
        assert (out / name).read_bytes() == (whole["one"] / name).read_bytes()
    assert checkpoint_manifest.verified(last).step == 4


def test_the_only_one_that_is_damaged(last: Path, out: Path) -> None:
    shutil.rmtree(out / "checkpoints" / "checkpoint-2")
    flip(last / "rng_state.pth", 900)
    with pytest.raises(lk.AdapterError):
        resume(out)


def test_one_of_an_earlier_lorakin_is_refused_with_the_reason(last: Path, out: Path) -> None:
    (last / checkpoint_manifest.MANIFEST).unlink()
    with pytest.raises(
        lk.AdapterError,
        match=r"lorakin-checkpoint\.json",
    ):
        resume(out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-2")
    with pytest.raises(lk.AdapterError):
        resume(out)


def test_one_that_was_cut_off_is_passed_over(last: Path, out: Path) -> None:
    checkpoint_manifest.unseal(last)
    (last / "scheduler.pt").unlink()
    assert checkpoints.last_checkpoint(out / "checkpoints") == out / "checkpoints" / "checkpoint-2"
    (out / "checkpoints" / "checkpoint-6").mkdir()  # killed before its first file
    (out / "checkpoints" / "checkpoint-²").mkdir()
    assert checkpoints.last_checkpoint(out / "checkpoints") == out / "checkpoints" / "checkpoint-2"


@pytest.mark.parametrize(
    "name",
    ["scaler.pt", "optimizer.bin", "rng_state_0.pth", "adapter_model.bin", "default/x.json", "n"],
)
def test_what_was_not_saved_in_it_is_refused_by_name(name: str, last: Path, out: Path) -> None:
    (last / name).parent.mkdir(exist_ok=True)
    (last / name).write_bytes(b"junk")
    with pytest.raises(
        lk.AdapterError, match=rf"checkpoint-4 holds {name}, which was not saved in it"
    ):
        resume(out)
    (last / name).unlink()
    (last / "README.md").write_text("a person's, who may")
    assert checkpoint_manifest.verified(last).step == 4


@pytest.mark.parametrize("left", ["optimizer.pt", "README.md", "default"])
def test_one_that_lost_its_manifest_and_more_is_refused(left: str, last: Path, out: Path) -> None:
    """A kill leaves a manifest, or nothing but hidden files."""
    for path in last.iterdir():
        if path.name != left:
            path.unlink()
    (last / "default").mkdir()
    with pytest.raises(
        lk.AdapterError,
        match=r"lorakin-checkpoint\.json",
    ):
        resume(out)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "where",
    ["checkpoints", "checkpoints/checkpoint-4", "checkpoints/checkpoint-4/optimizer.pt", "x/y"],
)
def test_links_in_a_run_are_not_written_through(where: str, out: Path, tmp_path: Path) -> None:
    link = (
        out / where
        if where != "x/y"
        else out / "checkpoints" / "checkpoint-6" / "deep" / "optimizer.pt"
    )
    theirs = tmp_path / "theirs"
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        link.rename(theirs)
    else:
        theirs.write_text("mine")
    if theirs.is_dir():
        (theirs / "mine.txt").write_text("mine")
    link.symlink_to(theirs)
    before = tree(tmp_path)
    with pytest.raises(
        lk.OutputError, match=f"{link.name} is a link to .*theirs, which is not written through"
    ):
        resume(out)
    assert tree(tmp_path) == before


def test_what_has_no_manifest_is_neither_written_into_nor_deleted(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        checkpoints.begin(tmp_path / f"checkpoint-{step}")
        checkpoint_manifest.seal(tmp_path / f"checkpoint-{step}", step, 1, {})
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "mine").write_text("mine")
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "checkpoint-3")
    checkpoints.rotate(tmp_path, 6, 2, None)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (1, 3, 4, 6)}
    checkpoints.rotate(tmp_path, 6, 1, None)
    assert (tmp_path / "checkpoint-3" / "mine").read_text() == "mine"
    for folder in ("checkpoint-3", "checkpoint-1"):
        with pytest.raises(lk.OutputError):
            checkpoints.begin(tmp_path / folder)
    assert {path.name for path in (tmp_path / "checkpoint-3").iterdir()} == {"mine"}
    checkpoints.check_place(tmp_path, after=3)
    with pytest.raises(
        lk.OutputError,
        match=r"lorakin-checkpoint\.json",
    ):
        checkpoints.check_place(tmp_path, after=2)


def test_a_save_begins_with_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    folder, theirs = tmp_path / "checkpoint-2", tmp_path / "theirs"
    theirs.mkdir()
    checkpoints.begin(folder)
    (folder / "b").mkdir()
    for name in ("rng_state_1.pth", "b/optimizer.pt"):
        (folder / name).write_bytes(b"of a save that was cut off")
    checkpoints.begin(folder)
    assert list(tree(folder)) == [
        checkpoint_manifest.MANIFEST
    ] and not checkpoint_manifest.is_whole(folder)


def test_other_software_is_said(last: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lk, "__version__", "99.0")
    with pytest.warns(lk.LorakinWarning, match=r"99\.0"):
        resume(out)


def test_a_manifest_that_names_other_files(last: Path, out: Path) -> None:
    for name in ("../../recipe.yaml", "/etc/passwd"):
        said = json.loads((last / checkpoint_manifest.MANIFEST).read_text())
        said["parts"][name] = "0"
        checkpoint_manifest._write(
            last, {key: value for key, value in said.items() if key != "sha256"}
        )
        with pytest.raises(lk.AdapterError):
            resume(out)
    checkpoint_manifest._write(last, {"format": 1, "is_whole": True, "step": "4"})
    with pytest.raises(lk.AdapterError):
        resume(out)
    checkpoint_manifest._write(last, {"format": 2})
    with pytest.raises(lk.AdapterError):
        resume(out)


def test_the_steps_count_and_not_the_clock(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        checkpoints.begin(tmp_path / f"checkpoint-{step}")
        checkpoint_manifest.seal(tmp_path / f"checkpoint-{step}", step, 1, {})
        os.utime(tmp_path / f"checkpoint-{step}", (2e9 - 1000 * step, 2e9 - 1000 * step))
    assert checkpoints.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    checkpoints.begin(tmp_path / "checkpoint-6")
    checkpoints.rotate(tmp_path, 8, 3, str(tmp_path / "checkpoint-2"))
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (2, 4, 8, 10)}
    checkpoints.rotate(tmp_path, 8, 1, str(tmp_path / "checkpoint-2"))
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (2, 8, 10)}
    checkpoints.rotate(tmp_path, 8, None, None)
    checkpoints.rotate(tmp_path, 10, 2, None)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (8, 10)}


ROWS = [
    {
        "input_ids": [3 + (i * k) % 50 for k in range(1, 9)],
        "labels": [3 + (i * k) % 50 for k in range(1, 9)],
    }
    for i in range(8)
]


def trainer(out: Path, **changes: Any) -> tuple[Any, lk.Adapter]:
    """A Trainer of the user's own, prepared."""
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(rank=2), "q_proj", seed=0)
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 1,
        "save_strategy": "steps",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(str(out), **settings | changes)
    return prepare_trainer(
        transformers.Trainer(model, args, train_dataset=datasets.Dataset.from_list(ROWS))
    ), adapter


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Its last two checkpoints, whose times are the wrong way round."""
    run, _ = trainer(tmp_path / "run", save_total_limit=2)
    run.add_callback(ClockGoesBack())
    run.train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-3", "checkpoint-4"}
    return tmp_path / "run"


class ClockGoesBack(transformers.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time = 2e9 - 1000 * state.global_step
        os.utime(Path(args.output_dir) / f"checkpoint-{state.global_step}", (time, time))


@pytest.mark.parametrize("how", ["path", True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda last: flip(last / "optimizer.pt", 2000), r"optimizer\.pt"),
        (lambda last: (last / "rng_state.pth").unlink(), r"rng_state\.pth"),
        (
            lambda last: (last / checkpoint_manifest.MANIFEST).unlink(),
            "earlier",
        ),
        (
            lambda last: shutil.copy(last.parent / "checkpoint-3" / "trainer_state.json", last),
            r"trainer_state\.json",
        ),
    ],
)
def test_a_users_own_trainer_does_not_go_on_from_a_damaged_one(
    how: Any, change: Callable[[Path], Any], said: str, trained: Path
) -> None:
    last = trained / "checkpoint-4"
    change(last)
    again, adapter = trainer(trained, max_steps=6)
    before = [p.clone() for p in adapter.parameters()]
    with pytest.raises(lk.AdapterError, match=said):
        again.train(resume_from_checkpoint=str(last) if how == "path" else True)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))


def test_a_users_own_trainer_does_not_write_through_links(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (trained / "checkpoint-5").symlink_to(tmp_path / "theirs")
    again, _ = trainer(trained, max_steps=6)
    with pytest.raises(lk.OutputError, match="checkpoint-5"):
        again.train(resume_from_checkpoint=True)
    assert not list((tmp_path / "theirs").iterdir())


def test_a_users_own_trainer_passes_over_what_was_cut_off(trained: Path) -> None:
    expected = safetensors.torch.load_file(trained / "checkpoint-4" / "adapter_model.safetensors")
    checkpoint_manifest.unseal(trained / "checkpoint-4")
    (trained / "checkpoint-4" / "scheduler.pt").unlink()
    again, _ = trainer(trained)
    with pytest.raises(lk.AdapterError, match="checkpoint-3"):
        again.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    again.train(resume_from_checkpoint=True)
    now = safetensors.torch.load_file(trained / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(now[key], tensor) for key, tensor in expected.items())
    shutil.rmtree(trained)
    with pytest.raises(lk.SettingError):
        trainer(trained)[0].train(resume_from_checkpoint=True)


def test_what_a_probe_found_belongs_to_it(whole: dict[str, Path], tmp_path: Path) -> None:
    """LoRA-drop's choice of modules lies beside the recipe; with another one the checkpoint is of
    another adapter.
    """
    recipe = run_directory.resumed_recipe(None, {"out": str(whole["one"])})
    recipe = dataclasses.replace(
        recipe, out=str(tmp_path / "out"), method="lora-drop", targets=["q_proj", "v_proj"],
        settings={"keep": 2, "probe_epochs": 1, "sample": 0.5},
    )  # fmt: skip
    run(recipe)
    found = json.loads((tmp_path / "out" / "importance.json").read_text())
    turned = dict(zip(found, [found[key] for key in reversed(found)], strict=True))
    assert turned != found
    (tmp_path / "out" / "importance.json").write_text(json.dumps(turned))
    with pytest.raises(lk.AdapterError):
        resume(tmp_path / "out")
