"""Measures `lorakin train` beside `trl sft --use_peft`: the same model, rows, steps and LoRA.

    python -m benchmarks.beside_trl [--steps 20] [--rounds 3] [--dtype float32] [--out beside-trl]

Both are commands, each in a process of its own from its first import to the saved adapter, in
turns. Both train LoRA of rank 16 on all linear layers of the packaged SmolLM2-135M, on the same
conversations, with the loss on the answers, and evaluate the same held-out rows before and after.
One thread works. Counted are the processor's time and the largest memory of the process, as the
system reports them. TRL checkpoints activations unless it is told not to, so it runs both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from lorakin.training.docstrings import docstring_rows
from lorakin.training.models import load_model

BATCH, RANK, ALPHA, RATE, LENGTH = 4, 16, 32, 2e-4, 256
HELD_OUT = 16
LORAKIN, CHECKPOINTED = "lorakin train", "lorakin train --gradient-checkpointing"
TRL, PLAIN_TRL = "trl sft --use_peft", "trl sft --use_peft --gradient_checkpointing False"
PAIRS = ((LORAKIN, TRL), (LORAKIN, PLAIN_TRL), (CHECKPOINTED, TRL))
Figures = dict[str, dict[str, list[float]]]


def main() -> None:
    """Runs the commands in turns, and writes `results.json` and `table.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("beside-trl"))
    options = parser.parse_args()
    write_inputs(options.out, options.steps)
    results = options.out / f"results-{options.dtype}.json"
    figures: Figures = json.loads(results.read_text()) if results.is_file() else {}
    done = min((len(one["seconds"]) for one in figures.values()), default=0)
    for number in range(done, options.rounds):
        for name, words in commands(options.out, options.steps, options.dtype).items():
            seconds, peak = measured(words, options.out / f"run-{number}", name)
            one = figures.setdefault(name, {"seconds": [], "peak": []})
            one["seconds"].append(seconds)
            one["peak"].append(peak)
            print(f"{number} {name}: {seconds:.1f} s, {peak:.2f} GiB", flush=True)
        results.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    lines = table(figures)
    (options.out / f"table-{options.dtype}.md").write_text(
        "\n".join(lines) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))


def write_inputs(out: Path, steps: int) -> None:
    """Writes the model and the rows, unless they are there."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in docstring_rows()
        if len(row["prompt"]) + len(row["completion"]) < 2 * LENGTH
    ]
    for name, part in (("test", rows[:HELD_OUT]), ("train", rows[HELD_OUT:][: BATCH * steps])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (data / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if not (out / "model").is_dir():
        loaded = load_model("smollm2", "float32")
        loaded.model.save_pretrained(out / "model")
        loaded.tokenizer.save_pretrained(out / "model")


def commands(out: Path, steps: int, dtype: str) -> dict[str, list[str]]:
    """Returns the command lines by name."""
    lorakin = [
        "lorakin", "train", "--model", out / "model", "--data", out / "data/train.jsonl",
        "--eval-data", out / "data/test.jsonl", "--rank", RANK, "--alpha", ALPHA, "--lr", RATE,
        "--steps", steps, "--batch-size", BATCH, "--max-length", LENGTH, "--dtype", dtype,
        "--save-every", 0, "--warmup", 0, "--schedule", "constant", "--quiet",
    ]  # fmt: skip
    trl = [
        "trl", "sft", "--model_name_or_path", out / "model", "--dataset_name", out / "data",
        "--use_peft", "--lora_r", RANK, "--lora_alpha", ALPHA, "--lora_dropout", 0,
        "--lora_target_modules", "all-linear", "--learning_rate", RATE, "--max_steps", steps,
        "--per_device_train_batch_size", BATCH, "--per_device_eval_batch_size", BATCH,
        "--max_length", LENGTH, "--dtype", dtype, "--bf16", dtype == "bfloat16",
        "--eval_strategy", "steps", "--eval_steps", steps, "--eval_on_start", "True",
        "--lr_scheduler_type", "constant", "--save_strategy", "no", "--report_to", "none",
        "--use_cpu", "True", "--logging_steps", 1, "--disable_tqdm", "True",
    ]  # fmt: skip
    plain = ["--gradient_checkpointing", "False"]
    found = {
        LORAKIN: lorakin,
        CHECKPOINTED: [*lorakin, "--gradient-checkpointing"],
        TRL: trl,
        PLAIN_TRL: [*trl, *plain],
    }
    return {name: list(map(str, words)) for name, words in found.items()}


def measured(words: list[str], out: Path, name: str) -> tuple[float, float]:
    """Runs a command, and returns its processor time in seconds and its peak memory in GiB."""
    out.mkdir(exist_ok=True)
    flag = "--out" if words[0] == "lorakin" else "--output_dir"
    folder = out / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".log")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:], flag, str(folder)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed; see {log}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def table(figures: Figures) -> list[str]:
    """Returns the ratios as lines of Markdown: median (lowest to highest)."""
    lines = ["| | processor time | peak memory |", "|---|---|---|"]
    for name, one in figures.items():
        seconds, peak = statistics.median(one["seconds"]), statistics.median(one["peak"])
        lines.append(f"| `{name}` | {seconds:.0f} s | {peak:.2f} GiB |")
    for mine, other in PAIRS:
        cells = [ratio(figures[mine][key], figures[other][key]) for key in ("seconds", "peak")]
        lines.append(f"| `{mine}` ÷ `{other}` | {cells[0]} | {cells[1]} |")
    return lines


def ratio(mine: list[float], others: list[float]) -> str:
    """Returns the median ratio of a round, with the lowest and the highest."""
    found = [a / b for a, b in zip(mine, others, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


if __name__ == "__main__":
    main()
