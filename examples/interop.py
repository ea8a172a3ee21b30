"""Reads every member's adapter with other software. Is it still the same model?

    make interop       (or: PYTHONPATH=tests python examples/interop.py [--steps 10])

Each member is trained for a few steps on docstrings by `lorakin train`, exported by
`lorakin export`, and read by software that is not lorakin: PEFT loads the adapter and its plain
LoRA, transformers loads the merged model, and llama.cpp (through node) runs the F32 base with the
GGUF adapter, and the merged GGUF.

Each is compared with the trained model in float32 on 20 prompts and the 24 tokens that it answers:
the largest difference of a logit, and the share of positions with the same likeliest token. llama.cpp
answers by itself: there it is the largest difference of the log-probabilities of the 50 likeliest
tokens, up to the first position with another token, and how many of the 20 answers are the same.

llama.cpp runs the packaged 4-bit base with 8-bit activations. There the difference comes from the
quantisation, with or without an adapter. DoRA has no exact plain LoRA, so it has a table by rank.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import lorakin as lk
from family import TASKS, settings_of, train, write_data
from lorakin.family import FAMILY, member_named
from lorakin.serving.export import export
from lorakin.serving.gguf_model import write_model
from lorakin.serving.job import ExportRequest
from lorakin.serving.verify import Transcript, compare_logits, logits_of
from lorakin.training.docstrings import docstring_rows
from lorakin.training.encoding import prompt_ids
from lorakin.training.model_sources import directory_of, packaged
from lorakin.training.models import load_model
from peers import llama_cpp

MODEL, TASK = "smollm2", TASKS[0]
SAID, TOP = 24, 50
RANKS = (8, 16, 32, 64, 128, 256)
PROMPTS = (
    *[row["prompt"] for row in docstring_rows() if len(row["prompt"]) < 240][:12],
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "Translate to German: Good morning, how are you?",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take?",
    "Explain in simple words why the sky is blue.",
    "The film was far too long, and yet I would watch it again.",
    "Who wrote Hamlet?",
)


class Trained:
    """What a trained model says: 20 prompts, its answers, and its logits on both."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.prompts = [prompt_ids(prompt, tokenizer) for prompt in PROMPTS]
        texts = [greedy(model, prompt) for prompt in self.prompts]
        self.said = [text[len(prompt) :] for text, prompt in zip(texts, self.prompts, strict=True)]
        self.transcript = Transcript(texts, logits_of(model, texts))

    def against(self, model: Any) -> dict[str, Any]:
        """Compares with a model that transformers runs."""
        found = compare_logits(self.transcript, model)
        return {"difference": found.largest, "tokens": found.tokens, "kl": found.divergence}

    def against_llama(self, model: Path, loras: Sequence[Path] = ()) -> dict[str, Any]:
        """Compares with llama.cpp's own answers, up to the first place with another token."""
        answers = llama_cpp.run(model, self.prompts, loras=loras, max_tokens=SAID, top=TOP)
        apart, same, places = [], 0, 0
        for answer, said, logits in zip(answers, self.said, self.transcript.logits, strict=True):
            expected = logits[-SAID - 1 : -1].double().log_softmax(-1)
            for number, (place, ours) in enumerate(zip(answer.logprobs, expected, strict=True)):
                if answer.tokens[:number] == said[:number]:
                    apart += [abs(value - float(ours[token])) for token, value in place.items()]
                    same += answer.tokens[number] == said[number]
                    places += 1
        equal = sum(answer.tokens == said for answer, said in zip(answers, self.said, strict=True))
        return {
            "difference": max(apart),
            "mean": statistics.mean(apart),
            "tokens": same / places,
            "answers": equal,
        }


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Returns the prompt and the likeliest `SAID` tokens after it; no token ends the answer."""
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {
        "max_new_tokens": SAID,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    out: Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return list(out[0].tolist())


def base() -> Any:
    """Returns SmolLM2 in float32 without adapters."""
    return load_model(MODEL, "float32").model


def peft_reads(folder: Path) -> Any:
    """Returns the base with the adapter in this directory, loaded by PEFT."""
    return peft.PeftModel.from_pretrained(base(), folder).eval()


def base_gguf(out: Path) -> Path:
    """Returns the base as an F32 GGUF file, which is written once."""
    path = out / "base.gguf"
    if not path.is_file():
        model, source = base(), directory_of(MODEL)
        write_model(path, model.config, source, model.state_dict(), dtype="f32")
    return path


def measured(word: str, adapter: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Returns all figures of one member."""
    loaded = load_model(MODEL, "float32")
    plain_model = logits_of(loaded.model, [prompt_ids(PROMPTS[0], loaded.tokenizer)])[0]
    lk.load(loaded.model, adapter)
    trained = Trained(loaded.model, loaded.tokenizer)
    moved = float((logits_of(loaded.model, [trained.prompts[0]])[0] - plain_model).abs().max())
    del loaded
    figures: dict[str, dict[str, Any]] = {
        "trained": {"moved": moved},
        "peft": trained.against(peft_reads(adapter)),
    }
    gained = any("gain" in member_named(one).decides for one in word.split(","))
    work = out / "work"

    def through(to: str, read: Callable[[Path], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        shutil.rmtree(work, ignore_errors=True)
        done = export(ExportRequest(str(adapter), to, str(work), MODEL, verify=False, **settings))
        errors = [fit.error for fit in done.fits.values()]
        size = sum(file.stat().st_size for file in work.glob("adapter*")) / 2**20
        more = {"errors": [statistics.median(errors), max(errors)]} if any(errors) else {}
        return {**read(work), **more, "mib": size}

    figures["merged"] = through(
        "merged", lambda folder: trained.against(load_model(str(folder), "base").model)
    )
    figures["gguf-merged"] = through(
        "gguf-merged", lambda folder: trained.against_llama(folder / "model.gguf"), dtype="float32"
    )
    for rank in RANKS if gained else (None,):
        name = "" if rank is None else f" {rank}"
        figures[f"plain{name}"] = through(
            "lora", lambda folder: trained.against(peft_reads(folder)), rank=rank, portable=True
        )
        if rank is None or rank >= RANKS[-1]:
            figures["gguf"] = through(
                "gguf",
                lambda folder: trained.against_llama(base_gguf(out), [folder / "adapter.gguf"]),
                rank=rank,
            )
            figures["4-bit"] = trained.against_llama(
                packaged(MODEL), [out / "work" / "adapter.gguf"]
            )
    shutil.rmtree(work, ignore_errors=True)
    return figures


def base_alone(out: Path) -> dict[str, dict[str, Any]]:
    """Returns figures of the base without an adapter in llama.cpp, in F32 and as packaged."""
    loaded = load_model(MODEL, "float32")
    said = Trained(loaded.model, loaded.tokenizer)
    return {
        "gguf": said.against_llama(base_gguf(out)),
        "4-bit": said.against_llama(packaged(MODEL)),
    }


def cell(figures: dict[str, Any] | None) -> str:
    """Writes a difference, the agreement, and for llama.cpp how many answers are the same."""
    if figures is None:
        return "–"
    answers = f", {figures['answers']}/{len(PROMPTS)}" if "answers" in figures else ""
    return f"{figures['difference']:.1e}, {figures['tokens']:.2%}{answers}"


def four_bit(figures: dict[str, dict[str, Any]]) -> str:
    """Writes the mean difference too, because the quantised base is another model."""
    return f"mean {figures['4-bit']['mean']:.3f}, {cell(figures['4-bit'])}"


def report(
    results: dict[str, dict[str, dict[str, Any]]], alone: dict[str, dict[str, Any]], steps: int
) -> str:
    """Returns the tables as Markdown."""
    versions = (
        f"{platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}, "
        f"lorakin {lk.__version__}"
    )
    lines = [
        versions,
        "",
        f"### SmolLM2-135M, each member after {steps} steps: largest difference, places with the "
        "same token",
        "",
        "| member | changed by | PEFT | plain LoRA, portable, in PEFT | merged, transformers "
        "| GGUF adapter, llama.cpp | merged GGUF, llama.cpp | GGUF adapter on the 4-bit base |",
        "|---|---|---|---|---|---|---|---|",
        f"| (none) | – | – | – | – | {cell(alone['gguf'])} | – | {four_bit(alone)} |",
    ]
    for word, figures in results.items():
        plain = cell(figures.get("plain")) if "plain" in figures else "by rank, below"
        gguf = cell(figures["gguf"]) + ("" if "plain" in figures else f" (rank {RANKS[-1]})")
        cells = [
            f"`{word}`",
            f"{figures['trained']['moved']:.1f}",
            cell(figures["peft"]),
            plain,
            cell(figures["merged"]),
        ]
        lines.append(
            f"| {' | '.join([*cells, gguf, cell(figures['gguf-merged']), four_bit(figures)])} |"
        )
    for word, figures in results.items():
        if "plain" in figures:
            continue
        lines += [
            "",
            f"### `{word}` as plain LoRA",
            "",
            "| rank | relative error of a module, median | worst | largest difference of a logit "
            "| KL | same token | MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for rank in RANKS:
            one = figures[f"plain {rank}"]
            median, worst = one["errors"]
            lines.append(
                f"| {rank} | {median:.3f} | {worst:.3f} | {one['difference']:.2f} "
                f"| {one['kl']:.1e} | {one['tokens']:.2%} | {one['mib']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains, exports, reads and compares; writes `interop.md` and `interop.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("interop"))
    parser.add_argument("--members", default=",".join(member.word for member in FAMILY))
    arguments = parser.parse_args()
    if reason := llama_cpp.available():
        raise SystemExit(f"make interop compares with llama.cpp, but {reason}")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_data(TASK, out)
    results: dict[str, Any] = {}
    for word in arguments.members.split(","):
        train(TASK, word, out, arguments.steps)
        known = out / f"{word}.figures.json"
        if not known.is_file():
            known.write_text(json.dumps(measured(word, out / word, out)))
        results[word] = json.loads(known.read_text())
        print(f"{word}: {settings_of(word, arguments.steps) or ''} {results[word]}", flush=True)
    alone = base_alone(out)
    (out / "interop.json").write_text(json.dumps({"base": alone, **results}, indent=2) + "\n")
    text = report(results, alone, arguments.steps)
    (out / "interop.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
