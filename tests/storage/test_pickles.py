"""Files of `torch.save` that claim more than they hold, or hold no plain tensors.

Refused, soon, in little memory.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_llama
from lorakin.storage.pickles import tensors_of

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def strided(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.zeros(1).as_strided(shape, stride)


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.qint8)


class Sub(Tensor):
    pass


HOSTILE: dict[str, Callable[[], Any]] = {
    "a tensor of 10¹² ones": lambda: {KEY: strided((10**6, 10**6), (0, 0))},
    "one that overlaps itself": lambda: {KEY: torch.zeros(100).as_strided((90, 90), (1, 0))},
    "a memory under many names": lambda: dict.fromkeys(
        (f"x{n}" for n in range(1000)), torch.ones(10**5)
    ),
    "sparse": lambda: {KEY: torch.eye(4).to_sparse()},
    "sparse rows": lambda: {KEY: torch.eye(4).to_sparse_csr()},
    "quantised": lambda: {KEY: quantised()},
    "without values": lambda: {KEY: torch.ones(4, 4, device="meta")},
    "nested": lambda: {KEY: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    "of another class": lambda: {KEY: torch.ones(2).as_subclass(Sub)},
    "a list": lambda: [torch.ones(2)],
    "a number": lambda: 3,
    "numbers by name": lambda: {KEY: 3},
    "a dict in it": lambda: {KEY: {"x": torch.ones(2)}},
    "a name that is none": lambda: {("x", 1): torch.ones(2)},
    "bytes": lambda: {KEY: bytearray(100)},
    "a module": lambda: nn.Linear(2, 2),
}
HARMLESS: dict[str, Callable[[], Any]] = {
    "parameters": lambda: collections.OrderedDict({"x": nn.Parameter(torch.ones(2, 2))}),
    "transposed": lambda: {"x": torch.arange(6.0).view(2, 3).T},
    "tied": lambda: (lambda t: {"x": t, "y": t})(torch.ones(300_000)),
    "a number alone": lambda: {"x": torch.tensor(3.0)},
    "empty": lambda: {"x": torch.empty(0, 2**40)},
}


@pytest.fixture
def patience() -> Iterator[None]:
    """Half a minute, and 300 MB more than there are."""
    before = psutil.Process().memory_info().rss
    old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it took more than half a minute"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    assert psutil.Process().memory_info().rss - before < 300 << 20


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_no_adapter_holds(what: str, old: bool, tmp_path: Path, patience: None) -> None:
    file = tmp_path / "adapter_model.bin"
    try:
        torch.save(HOSTILE[what](), file, _use_new_zipfile_serialization=not old)
    except (RuntimeError, NotImplementedError, pickle.PicklingError) as error:
        pytest.skip(f"torch writes no such file: {error}")
    with pytest.raises(lk.AdapterError, match="adapter_model.bin"):
        tensors_of(file)
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}'
    )
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_llama(), tmp_path)
    with pytest.raises(lk.AdapterError):
        lk.convert(tiny_llama(), file)


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_as_it_should_be(what: str, tmp_path: Path) -> None:
    content = HARMLESS[what]()
    torch.save(content, tmp_path / "x.bin")
    found = tensors_of(tmp_path / "x.bin")
    assert found.keys() == content.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, content[key])
        assert tensor.is_contiguous()
        assert type(tensor) is Tensor


def test_what_is_packed(tmp_path: Path) -> None:
    """Sixty megabytes of zeros in one."""
    plain = io.BytesIO()
    torch.save({KEY: torch.zeros(2**24)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "x.bin").stat().st_size < 1 << 20
    with pytest.raises(lk.AdapterError, match="compressed"):
        tensors_of(tmp_path / "x.bin")


@pytest.mark.parametrize("where", ["head", "middle", "end"])
def test_what_is_cut_off_or_changed(where: str, tmp_path: Path, patience: None) -> None:
    file = tmp_path / "x.bin"
    torch.save({KEY: torch.ones(1000)}, file)
    whole = file.read_bytes()
    for change in (
        whole[: {"head": 10, "middle": len(whole) // 2, "end": len(whole) - 10}[where]],
        b"",
        b"PK\x03\x04" + whole[:50],
    ):
        file.write_bytes(change)
        with pytest.raises(lk.AdapterError):
            tensors_of(file)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lorakin.json"],
)
def test_pipes_and_devices_are_no_files(name: str, tmp_path: Path, patience: None) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2), targets="q_proj")).save(tmp_path)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir):
        if name.endswith(".bin"):
            (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
        path = tmp_path / name
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(lk.AdapterError):
            lk.load(tiny_llama(), tmp_path)
        if name.startswith("adapter_model"):
            with pytest.raises(lk.AdapterError):
                lk.convert(tiny_llama(), path) if not path.is_dir() else lk.load(
                    tiny_llama(), tmp_path
                )


def test_a_small_file_that_asks_for_a_large_pair(tmp_path: Path) -> None:
    """19 MB of VeRA's vectors whose shared pair, drawn again, would take gigabytes.

    In a process that has no such memory.
    """
    rank = 4_700_000
    path = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_"

    safetensors.torch.save_file(
        {path + "d": torch.ones(rank), path + "b": torch.ones(32)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "VERA",
        "r": rank,
        "save_projection": False,
        "target_modules": ["model.layers.0.self_attn.q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    script = (
        "import resource, sys, lorakin as lk\n"
        "from conftest import tiny_llama; model = tiny_llama()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)\n"
        "try:\n    lk.load(model, sys.argv[1])\n"
        "except lk.AdapterError as error:\n    print(error)\n"
    )
    tests = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=tests,
    )
    assert "300,800,000" in done.stdout, done.stderr[-2000:]
