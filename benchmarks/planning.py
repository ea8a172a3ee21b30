"""Compares the peaks that `lorakin plan` predicts with those of `lorakin train`.

    python -m benchmarks.planning --out planning              everything: about ten minutes
    python -m benchmarks.planning --only 0,3 --out planning
    python -m benchmarks.planning --predict --out planning    only predict again

Each configuration is measured in a process of its own. The measured peak is what the process adds
to its imports: the highest resident memory (VmHWM) of the real command's `prepare` and `train`,
less the resident memory before.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20

SIZES = {
    "wide": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "deep": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
}
"""Llamas of random weights with SmolLM2's tokenizer."""
T5 = {
    "decoder_start_token_id": 0,
    "d_model": 512,
    "d_ff": 1024,
    "d_kv": 64,
    "num_layers": 6,
    "num_heads": 8,
}
"""A T5 of random weights with the same tokenizer."""
LABELS = {
    "classification": lambda number, words: "yes" if number % 3 else "no",
    "multi-label": lambda number, words: [["red"], ["red", "blue"], []][number % 3],
    "regression": lambda number, words: number / 7,
    "token-classification": lambda number, words: (
        ["thing", "other"] * (words // 2) + ["thing"] * (words % 2)
    ),
}
"""Task → a row's label, of its number and its words."""
CLASSES = {"classification": 2, "multi-label": 2, "regression": 1, "token-classification": 2}


def run(
    model: str, method: str, dtype: str, batch_size: int, max_length: int, **more: Any
) -> dict[str, Any]:
    """Returns a configuration: fields of a recipe."""
    return {
        "model": model,
        "method": method,
        "dtype": dtype,
        "batch_size": batch_size,
        "max_length": max_length,
        **more,
    }


CONFIGURATIONS = [
    run("smollm2", "lora", "bfloat16", 4, 256),
    run("smollm2", "lora", "float32", 2, 128),
    run("wide", "lora", "bfloat16", 2, 512),
    run("deep", "dora", "float32", 4, 128),
    run("smollm2", "lora", "bfloat16", 4, 256, fuse=True),
    run("smollm2", "lora", "bfloat16", 4, 256, gradient_checkpointing=True),
    run("smollm2", "dora", "bfloat16", 2, 256),
    run("smollm2", "vera", "float32", 2, 256),
    run("smollm2", "adalora", "bfloat16", 4, 128),
    run("smollm2", "delta-lora", "float32", 1, 256, settings={"start_step": 1}),
    run("smollm2", "lora-fa", "bfloat16", 8, 128),
    run("smollm2", "lora-drop", "float32", 2, 128),
    run("smollm2", "lora+", "bfloat16", 1, 64),
    run("smollm2", "lora", "float32", 1, 16, rank=192),
    run("smollm2", "lora", "float32", 4, 128, dropout=0.1, padded=True),
    run("minilm", "lora", "float32", 16, 128, task="classification"),
    run("minilm", "dora", "float32", 8, 256, padded=True, task="classification"),
    run("wide", "dora", "float32", 2, 256),
    run("wide", "lora", "float32", 4, 256, fuse=True),
    run("deep", "vera", "bfloat16", 2, 512),
    run("deep", "lora", "bfloat16", 8, 256, gradient_checkpointing=True, fuse=True),
    run("minilm", "lora", "float32", 8, 256, task="regression"),
    run("minilm", "lora", "float32", 32, 128, task="multi-label", padded=True),
    run("minilm", "vera", "float32", 16, 256, task="token-classification"),
    run("t5", "lora", "float32", 4, 128, task="seq2seq"),
    run("t5", "dora", "float32", 4, 256, task="seq2seq", padded=True),
    run("smollm2", "lora", "bfloat16", 4, 256, eval_every=1, keep="best"),
    run("smollm2", "lora", "bfloat16", 2, 512, packing=True),
    run("smollm2", "dora", "float32", 1, 512, packing=True),
    run("smollm2", "lora", "bfloat16", 2, 256, task="dpo"),
    run("smollm2", "dora", "float32", 2, 128, task="dpo", padded=True),
    run("wide", "lora", "bfloat16", 2, 256, task="dpo"),
    run("smollm2", "lora", "bfloat16", 2, 256, task="orpo"),
    run("smollm2", "lora", "float32", 4, 128, task="kto"),
    run("smollm2", "lora", "bfloat16", 2, 256, task="reward"),
]


def main() -> None:
    """Measures and predicts; writes `planning.json` and `planning.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="numbers of configurations, with commas between")
    parser.add_argument("--out", type=Path, default=Path("planning"))
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured(json.loads(arguments.child))))
        return
    numbers = (
        [int(n) for n in arguments.only.split(",")]
        if arguments.only
        else range(len(CONFIGURATIONS))
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "planning.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for number in numbers if not arguments.predict else sorted(map(int, rows)):
        configuration = CONFIGURATIONS[number]
        measured_there = rows[str(number)] if arguments.predict else in_child(configuration)
        rows[str(number)] = {
            **measured_there,
            "configuration": configuration,
            **predicted(configuration),
        }
        path.write_text(json.dumps(rows, indent=1) + "\n")
        (arguments.out / "planning.md").write_text(markdown(rows))
        print(json.dumps(rows[str(number)]), flush=True)


def in_child(configuration: dict[str, Any]) -> dict[str, float]:
    """Measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.planning", "--child", json.dumps(configuration)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{configuration}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(configuration: dict[str, Any]) -> dict[str, float]:
    """Returns the MiB that the real run adds after loading, and at its peak."""
    import torch
    from rich.console import Console

    from lorakin.training import train
    from lorakin.training.recipe import Recipe

    torch.set_num_threads(1)
    import_lazily(configuration.get("task"))
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(configuration)
        model = placed(settings.pop("model"), Path(folder))
        rows = written(
            Path(folder),
            settings.pop("padded", False),
            settings["max_length"],
            settings.get("task"),
        )
        recipe = Recipe(model=model, data=str(rows), out=f"{folder}/out", steps=3, **settings)
        before = resident("VmRSS")
        run = train.prepare(recipe, Console(quiet=True))
        loaded = resident("VmHWM")
        train.train(run)
        return {"loading": (loaded - before) / MIB, "peak": (resident("VmHWM") - before) / MIB}


TRAINERS = {
    "dpo": "trl.trainer.dpo_trainer",
    "kto": "trl.trainer.kto_trainer",
    "orpo": "trl.experimental.orpo.orpo_trainer",
    "reward": "trl.trainer.reward_trainer",
}
"""Task → the module of its trainer."""


def import_lazily(task: str | None) -> None:
    """Imports what libraries would import when they are first used."""
    for name in (
        *([TRAINERS[task]] if task in TRAINERS else []),
        "matplotlib.pyplot",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
        "transformers.models.t5.modeling_t5",
        "sklearn.metrics",
        "scipy.stats",
    ):
        importlib.import_module(name)


def placed(model: str, folder: Path) -> str:
    """Returns a model that `lorakin train` can load; another process writes those of `SIZES`."""
    if model not in (*SIZES, "t5"):
        return model
    kind = "T5" if model == "t5" else "Llama"
    head = "ForConditionalGeneration" if model == "t5" else "ForCausalLM"
    code = (
        "import sys, json, torch, transformers;"
        "from lorakin.training.model_sources import directory_of;"
        "tokens = transformers.AutoTokenizer.from_pretrained(directory_of('smollm2'));"
        "tokens.save_pretrained(sys.argv[1]);"
        "sizes = {'vocab_size': len(tokens), 'tie_word_embeddings': True};"
        f"config = transformers.{kind}Config(**sizes, **json.loads(sys.argv[2]));"
        f"transformers.{kind}{head}(config).save_pretrained(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder / model), json.dumps(SIZES.get(model, T5))],
        check=True,
        capture_output=True,
    )
    return str(folder / model)


def written(folder: Path, padded: bool, length: int, task: str | None) -> Path:
    """Writes rows that are cut at `length` tokens; if `padded`, every other one is shorter."""
    path = folder / "rows.jsonl"
    # A reward model gets no answer without its end, and the chat template takes some 40 tokens.
    longest = length - 48 if task == "reward" else length
    with path.open("w") as file:
        for number in range(160):
            words = max(1, length - 8) // 2 if padded and number % 2 else longest
            file.write(json.dumps(row_of(task, number, words)) + "\n")
    return path


def row_of(task: str | None, number: int, words: int) -> dict[str, Any]:
    """Returns a row of so many words for a task, None for a text alone."""
    text = ["word"] * words
    first, second = " ".join(text[: words // 2]), " ".join(text[words // 2 :])
    if task in ("dpo", "orpo", "reward"):
        return {"prompt": first, "chosen": second, "rejected": second.replace("word", "fact")}
    if task in ("seq2seq", "kto"):
        verdict = {"label": number % 2 == 0} if task == "kto" else {}
        return {"prompt": first, "completion": second} | verdict
    if task == "token-classification":
        return {"tokens": text, "tags": LABELS[task](number, words)}
    label = {} if task is None else {"label": LABELS[task](number, words)}
    return {"text": " ".join(text)} | label


def resident(kind: str) -> int:
    """Returns bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind + ":"))


def predicted(configuration: dict[str, Any]) -> dict[str, Any]:
    """Returns what `lorakin plan` predicts in MiB, and how many seconds that takes."""
    import torch
    import transformers

    from lorakin.family import method_named
    from lorakin.plan.conditions import Conditions
    from lorakin.plan.prediction import plan_method
    from lorakin.training.models import config_of

    settings = {"padded": False, **configuration}
    for name in ("eval_every", "keep"):
        settings.pop(name, None)
    model, labels = settings.pop("model"), CLASSES.get(settings.get("task", ""))
    own = {"vocab_size": 49_152, "tie_word_embeddings": True, "dtype": "float32"}
    if model == "t5":
        config: Any = transformers.T5Config(**own, **T5)
    elif model in SIZES:
        config = transformers.LlamaConfig(**own, **SIZES[model])
    else:
        config = config_of(model, None if labels is None else list(map(str, range(labels))))
    given = settings.pop("settings", {}) | {
        key: settings.pop(key) for key in ("rank", "dropout") if key in settings
    }
    method, dtype = (
        method_named(settings.pop("method"), given),
        getattr(torch, settings.pop("dtype")),
    )
    started = time.perf_counter()
    plan = plan_method(Conditions(config, dtype, labels=labels, steps=3, **settings), method, 1.0)
    return {
        "predicted": plan.peak / MIB,
        "phase": plan.phase,
        "seconds": time.perf_counter() - started,
    }


def markdown(rows: dict[str, Any]) -> str:
    """Returns the table of docs/howto/memory.md."""
    lines = [
        f"{platform.machine()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}, one thread",
        "",
        "| | model, method | dtype | rows × tokens | with | its peak is in | measured, MiB "
        "| predicted | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shown = ("model", "method", "dtype", "batch_size", "max_length")
    for number, row in sorted(rows.items(), key=lambda item: int(item[0])):
        c = row["configuration"]
        extra = ", ".join(_words(key, value) for key, value in c.items() if key not in shown)
        lines.append(
            f"| {number} | {c['model']}, {c['method']} | {c['dtype']} "
            f"| {c['batch_size']} × {c['max_length']} | {extra} | {row['phase']} "
            f"| {row['peak']:,.0f} | {row['predicted']:,.0f} "
            f"| {row['predicted'] / row['peak'] - 1:+.1%} |"
        )
    errors = [abs(row["predicted"] / row["peak"] - 1) for row in rows.values()]
    lines += [
        "",
        f"{sum(error <= 0.1 for error in errors)} of {len(errors)} within 10 %; "
        f"the largest error is {max(errors):.1%}.",
    ]
    return "\n".join(lines) + "\n"


def _words(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(_words(name, inner) for name, inner in value.items())
    return key.replace("_", " ") if value is True else f"{key.replace('_', ' ')} {value}"


if __name__ == "__main__":
    main()
