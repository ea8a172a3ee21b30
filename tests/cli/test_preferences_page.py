"""The commands of docs/howto/preferences.md run, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lorakin.cli.app import run
from training.test_preference import pairs, verdicts

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "preferences.md"


def test_the_commands_run(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chats = [{"messages": row["prompt"] + row["chosen"]} for row in pairs()]
    files = {"prefs": pairs(80), "test": pairs(), "thumbs": verdicts(), "chats": chats}
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    assert len(lines) == 14
    outs = {"train": 0}
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "compare":  # tests/compare/test_tasks.py runs one
            continue
        more = ["--steps", "2", "--batch-size", "4"] if words[0] == "train" else []
        if words[0] == "train":  # the page gives some the same name
            outs["train"] += 1
            at = words.index("--out") + 1
            if Path(words[at]).exists():
                words[at] = f"{words[at]}-{outs['train']}"
        tiny = {"smollm2": model_dir, "50": "1", "a": "adapter", "b": "adapter", "512": "16"}
        assert run([tiny.get(word, word) for word in words] + more) == 0, line
    answers = Path("answers.jsonl").read_text().splitlines()
    assert json.loads(answers[0]).keys() >= {"chosen", "rejected", "won"}
