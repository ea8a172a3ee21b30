"""Every file that a command reads, damaged in many ways: one sentence and exit code 2, or a result;
no traceback, no hang.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakin as lk
import soak
from compare.test_fuzz import places
from conftest import tiny_llama
from lorakin.cli.app import run

COUNT = soak.count("LORAKIN_FUZZ", 400) // 2
JUNK: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3.5,
    10**9,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "²",
    "none",
    "x" * 5000,
    "[/x]\x1b[31m",
    "../../../etc/passwd",
    "(",
    "(.*)*!",
    "all",
    [],
    [None],
    [[[]]],
    ["q_proj"] * 3,
    [-1],
    [True],
    [10**30],
    {},
    {"": {}},
    {"q_proj": [True, False]},
    {"(": 1},
    {"q_proj": -1},
    {"q_proj": 10**30},
    {"x": {"x": {"x": 1}}},
    {"tensor": "x"},
    {"tensor": []},
]
TEXTS = [
    b"",
    b"null",
    b"[]",
    b"1",
    b'"x"',
    b"{",
    b"{}",
    b"{}{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xff\xfe\x00",
    b"PK\x03\x04",
    b"\x1f\x8b\x08\x00" + b"x" * 50,
    b"\x00" * 100,
    b'{"a": 1, "a": 2}',
    b"9" * 10_000,
    b'{"x": ' + b"9" * 10_000 + b"}",
    b"\xef\xbb\xbf{}",
    b"{'a': 1}",
    b"NaN",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with all that its files can hold: state, patterns, tensors of our own, an
    importance.
    """
    model, ids = tiny_llama(tied=False), torch.arange(3, 12).view(1, -1)
    targets = ["q_proj", "down_proj"]
    method = [lk.DoRA(), lk.AdaLoRA(initial_rank=3, target_rank=2)]
    made = lk.adapt(model, method, targets=targets, modules_to_save=["lm_head"])
    optimizer = made.optimizer(torch.optim.SGD, lr=0.1, total_steps=3)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = made.save(tmp_path_factory.mktemp("adapter"))
    (folder / "importance.json").write_text(json.dumps(dict.fromkeys(made.placement.methods, 0.1)))
    return folder


@pytest.fixture(autouse=True)
def patience() -> Iterator[Callable[[], Any]]:
    old = signal.signal(
        signal.SIGALRM, lambda *_: pytest.fail("a command took more than twenty seconds")
    )
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def tried(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> int:
    """The exit code of a command, which must be 0, or 2 with one short sentence that names a file
    of the folder.
    """
    code = run(arguments)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code in (0, 2), said
    assert len(errors) == (code == 2), said
    assert all(len(line) < 1500 and str(folder) in line for line in errors), said
    return code


@pytest.mark.filterwarnings("default::lorakin.errors.LorakinWarning")
def test_an_adapters_files(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], patience: Callable[[], Any]
) -> None:
    chance, codes = random.Random(8), {0: 0, 2: 0}
    names = ["adapter_config.json", "lorakin.json", "importance.json"]
    page = ["--html", str(tmp_path / "page.html")]
    for number in range(COUNT):
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter, folder)
        name = names[number % 3]
        if number % 7 == 0:
            (folder / name).write_bytes(chance.choice(TEXTS))
        else:
            content = json.loads((folder / name).read_text())
            for _ in range(chance.choice([1, 1, 4])):
                holder, key = chance.choice(list(places(content)) or [({}, "x")])
                if chance.random() < 0.2 and isinstance(holder, dict):
                    holder[chance.choice(["", "²", "r", "state"])] = holder.pop(key, None)
                else:
                    holder[key] = copy.deepcopy(chance.choice(JUNK))
            (folder / name).write_text(json.dumps(content))
        patience()
        codes[
            tried(
                [
                    "inspect",
                    str(folder),
                    *(page if number % 10 == 0 or (name == names[2] and number % 3 == 0) else []),
                ],
                capsys,
                folder,
            )
        ] += 1
    assert min(codes.values()) > COUNT // 20
    soak.record(
        "Hostile files",
        files="JSON of adapters, through inspect",
        tried=COUNT,
        refused=codes[2],
        usable=codes[0],
    )
