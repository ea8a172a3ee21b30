"""The cache of converted GGUF files: named by content, repaired, shared, and left clean by whoever
is killed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lorakin as lk
from lorakin.serving.gguf_model import write_model
from lorakin.training import gguf_cache, loading, models
from serving.gguf_models import tiny
from serving.words import byte_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    byte_tokenizer().save_pretrained(folder / "words")
    model = tiny("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    write_model(folder / "m.gguf", model.config, folder / "words", model.state_dict(), dtype="f32")
    torch.save(model.state_dict(), folder / "state.pt")
    return folder / "m.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gguf_cache, "_standing_in", {})
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def is_the_model(source: Path, folder: Path | None = None) -> bool:
    held = models.load_model(str(folder or source), "base").model.state_dict()
    return all(
        torch.equal(tensor, held[key])
        for key, tensor in torch.load(source.parent / "state.pt").items()
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are converted from here on."""
    made: list[Path] = []
    read = gguf_cache._read

    def counted(path: Path) -> object:
        made.append(path)
        return read(path)

    monkeypatch.setattr(gguf_cache, "_read", counted)
    return made


def test_an_entry_is_of_the_files_content(
    source: Path, cache: Path, reads: list[Path], tmp_path: Path
) -> None:
    assert is_the_model(source) and is_the_model(source)
    copy = tmp_path / "elsewhere" / "m.gguf"
    copy.parent.mkdir()
    shutil.copyfile(source, copy)
    assert is_the_model(source, copy) and len(reads) == 1 and len(entries(cache)) == 1
    stamp, content = copy.stat(), bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    os.utime(copy, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the same path, size and time
    assert not is_the_model(source, copy) and len(entries(cache)) == 2


def flip(file: Path) -> None:
    stamp, content = file.stat(), bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "conversion.json"]
)
def test_a_damaged_entry_is_made_again(
    harm: Callable[[Path], None], name: str, source: Path, cache: Path, reads: list[Path]
) -> None:
    gguf_cache.converted(source)
    (entry,) = entries(cache)
    harm(entry / name)
    assert not gguf_cache.is_whole(entry)
    assert gguf_cache.config(source).num_hidden_layers == 1
    assert is_the_model(source) and len(reads) == 2
    assert entries(cache) == [entry] and gguf_cache.is_whole(entry)


def test_an_entry_that_was_merely_copied_is_whole(
    source: Path, cache: Path, reads: list[Path], tmp_path: Path
) -> None:
    gguf_cache.converted(source)
    shutil.copytree(cache, tmp_path / "copy")
    shutil.rmtree(cache)
    shutil.move(tmp_path / "copy", cache)
    assert is_the_model(source) and len(reads) == 1


def test_what_is_not_a_directory_is_replaced(source: Path, cache: Path) -> None:
    gguf_cache.converted(source)
    (entry,) = entries(cache)
    shutil.rmtree(entry)
    entry.write_text("nothing")
    assert is_the_model(source) and entry.is_dir()


def test_a_cache_that_cannot_be_written_is_said_and_not_needed(
    source: Path, cache: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file in its place")
    with pytest.warns(lk.errors.LorakinWarning, match="LORAKIN_CACHE"):
        assert is_the_model(source)
    assert is_the_model(source) and len(reads) == 1  # once in a process
    (place,) = tmp_path.glob(f"lorakin-{os.getpid()}-*")
    assert gguf_cache._standing_in and place in next(iter(gguf_cache._standing_in.values())).parents
    shutil.rmtree(place)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(lk.ModelError):
        gguf_cache.converted(source)


def test_a_cache_that_can_only_be_read_serves_what_it_has(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_cache.converted(source)
    monkeypatch.setattr(gguf_cache, "_cache_lock", None)  # any writing
    assert is_the_model(source)


def test_a_full_disk_is_said_in_one_sentence(source: Path, cache: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(lk.ModelError):
            gguf_cache.converted(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not entries(cache) and not list(tmp_path.glob("lorakin-*"))
    assert is_the_model(source)


WORKER = """
import sys, time
from pathlib import Path
from lorakin.training import gguf_cache
if sys.argv[2] == "slowly":
    write = gguf_cache._write
    def slowly(folder, model, tokenizer):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        print("begun", flush=True)
        time.sleep(600)
    gguf_cache._write = slowly
else:
    read = gguf_cache._read
    def counted(path):
        print("read", flush=True)
        return read(path)
    gguf_cache._read = counted
print(gguf_cache.converted(Path(sys.argv[1])), flush=True)
"""


def start(source: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(source), how], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_conversion_leaves_nothing(source: Path, cache: Path, tmp_path: Path) -> None:
    process = start(source, "slowly")
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    beside = (
        tmp_path / f"lorakin-{process.pid}-abc"
    )  # as the process makes where the cache cannot be written
    beside.mkdir()
    other = tmp_path / f"lorakin-{os.getppid()}-abc"  # of one that lives
    other.mkdir()
    assert list(cache.glob(".converting-*"))
    process.kill()
    process.wait()
    started = time.perf_counter()
    assert is_the_model(source)
    assert time.perf_counter() - started < 30  # the lock died with its process
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
    assert other.exists() and not beside.exists()


def test_two_processes_convert_once(source: Path, cache: Path) -> None:
    both = [start(source, "counted") for _ in range(2)]
    said = [process.communicate()[0].split() for process in both]
    assert sorted(len(words) for words in said) == [1, 2]
    assert {words[-1] for words in said} == {str(entries(cache)[0])}
    assert all(process.returncode == 0 for process in both)


def test_what_lies_beside_the_file_is_none_of_its_business(
    source: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    shutil.copyfile(source, folder / "m.gguf")
    (folder / "theirs.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Theirs: pass\n"
    )
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "theirs.Theirs")
    for name in (
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "adapter_config.json",
    ):
        (folder / name).write_text(
            json.dumps({"auto_map": auto, "model_type": "theirs", "max_length": 3})
        )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    )
    assert gguf_cache.config(folder / "m.gguf").model_type == "llama"
    assert is_the_model(source, folder / "m.gguf")
    assert not (tmp_path / "executed").exists()
    assert loading.config(entries(cache)[0]).to_dict().get("auto_map") is None
