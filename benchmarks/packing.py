"""Times the training of the same rows with and without packing: SmolLM2-135M, LoRA of rank 16, on
this CPU.

    python -m benchmarks.packing --rounds 5
    python -m benchmarks.packing rows.jsonl --rows 64
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch

import lorakin as lk
from benchmarks.measure import interleaved, ratio
from lorakin.training.batches import Row, answer_loss
from lorakin.training.contents import PlainText
from lorakin.training.docstrings import docstring_rows
from lorakin.training.encoding import Encoder
from lorakin.training.epoch import padding_share
from lorakin.training.models import Loaded, load_model
from lorakin.training.packing import packed
from lorakin.training.reading import read_rows
from lorakin.training.tasks.language import Language

BATCH = 8
"""Rows of a batch; packed sequences are as many as hold about as many tokens."""


def contents(data: str | None) -> dict[str, list[Any]]:
    """Returns what rows say, by a name for the data: the file's, or two that come with Python."""
    if data is not None:
        return {data: [record.content for record in read_rows(data).records]}
    rows = docstring_rows()
    return {
        "questions of many lengths": [PlainText(r["prompt"], r["completion"]) for r in rows],
        "one-line texts": [PlainText("", row["completion"]) for row in rows],
    }


def measure(loaded: Loaded, rows: Sequence[Row], length: int, rounds: int) -> None:
    """Prints the time of an epoch of packed rows over that of the same rows by themselves."""
    collate = Language().collator(loaded.model, loaded.tokenizer)
    lengths = [len(row["input_ids"]) for row in rows]
    sequences = packed(rows, length, seed=0)
    several = max(1, round(BATCH * sum(lengths) / len(rows) / length))

    def epoch(examples: Sequence[Row], size: int) -> None:
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size])
            labels = batch.pop("labels")
            answer_loss(loaded.model(**batch), labels).backward()
        loaded.model.zero_grad()

    calls = {
        "alone": lambda: epoch(rows, BATCH),
        "packed": lambda: epoch(sequences, several),
    }
    seconds = interleaved(calls, rounds)["thread"]
    full = [len(sequence["input_ids"]) for sequence in sequences]
    padding = [
        padding_share(lengths, range(len(lengths)), BATCH),
        padding_share(full, range(len(full)), several),
    ]
    print(
        f"  {len(rows)} rows of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all;"
    )
    print(f"  {len(sequences)} sequences of {length}, {several} in a batch")
    for name, share in zip(calls, padding, strict=True):
        print(f"  {name:8} {share:4.0%} padding, time × alone: {ratio(seconds, name, 'alone')}")


def main() -> None:
    """Reads the options and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model("smollm2", "float32")
    loaded.model.config.use_cache = False
    lk.adapt(loaded.model, lk.LoRA(), seed=0)
    encoder = Encoder(loaded.tokenizer)
    for name, said in contents(given.data).items():
        chosen = random.Random(0).sample(said, min(given.rows, len(said)))
        rows: list[Row] = []
        for content in chosen:
            ids, labels = encoder.encode(content)
            rows.append({"input_ids": ids[: given.length], "labels": labels[: given.length]})
        print(name)
        measure(loaded, rows, given.length, given.rounds)


if __name__ == "__main__":
    main()
