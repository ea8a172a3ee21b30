"""The commands of docs/howto/much-data.md run, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lorakin.cli.app import run

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "much-data.md"
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
]
WORDS = "the a cat dog bird sat ran flew on over".split()


@pytest.mark.parametrize("line", COMMANDS)
def test_it_runs(
    line: str, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"the {WORDS[n % 10]}", "completion": WORDS[n // 10]} for n in range(40)]
    texts = [{"text": " ".join(WORDS * (1 + n % 4))} for n in range(20)]
    for name in ("general", "own", "rows", "huge", "held", "books"):
        content = texts if name == "books" else rows
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    tiny = {"smollm2": model_dir, "--steps": "--steps", "2000": "4"}
    words = shlex.split(line)
    assert words[0] == "lorakin"
    assert run([tiny.get(word, word) for word in words[1:]]) == 0
    assert Path("adapter").exists() == (words[1] == "train")
