"""Real llama.cpp, as another reader of our GGUF files: what it generates, and with which probabilities.

It comes prebuilt inside npm packages (Linux on x86-64), installed from `llama/package-lock.json` into `.venv/llama`, or into
the folder that the environment variable LORAKIN_LLAMA names. Sums are in float32: no flash attention, a float32 KV cache; but
against quantised weights llama.cpp rounds the activations to 8 bits.

To update: change package.json, `npm install --package-lock-only --omit-lockfile-registry-resolved`, and take out of the lock
file every package marked optional and all `optionalDependencies`: they are binaries for other machines, and not on every
mirror.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).parent / "llama"
SECONDS = 300
NODE = 20  # the oldest version that node-llama-cpp runs on


@dataclasses.dataclass(frozen=True)
class Answer:
    """What llama.cpp says after one prompt.

    Attributes:
        tokens: the greedily chosen ones, as many as were asked for; an end-of-text token does not end them.
        logprobs: for each of them the most likely tokens in its place, token → natural log-probability, most likely first.
        prompt: the same for what follows each token of the prompt, the last included; empty unless asked for.
        ends: for each of the tokens whether llama.cpp would end the answer there.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt: list[dict[int, float]]
    ends: list[bool]


def available() -> str | None:
    """Why llama.cpp cannot run here, or None if it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"llama.cpp comes prebuilt for Linux on x86-64 here, not for {sys.platform} on {platform.machine()}"
    node = shutil.which("node")
    if node is None:
        return "llama.cpp needs node, which is not installed"
    version = subprocess.run(
        [node, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < NODE:
        return f"llama.cpp needs node {NODE} or newer, not {version}"
    if not (_installed() / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins").is_dir():
        return f"llama.cpp is not installed in {_installed()}"
    return None


def run(
    model: Path,
    prompts: Sequence[Sequence[int]],
    *,
    loras: Sequence[Path] = (),
    max_tokens: int = 24,
    top: int = 50,
    score: bool = False,
) -> list[Answer]:
    """Generate greedily after each prompt (token ids, at least one, exactly as given: no BOS is added), without penalties.

    Args:
        model: a GGUF model.
        loras: GGUF adapters for it, all active, each at its own alpha / rank.
        max_tokens: how many tokens to generate, exactly; 0 with `score` only reads.
        top: how many tokens to report in each place; the vocabulary's size reports all.
        score: report every place of the prompts too.

    Raises:
        RuntimeError: llama.cpp failed; the message is all it wrote.
    """
    request = {
        "model": str(model),
        "loras": [{"path": str(path), "scale": 1} for path in loras],
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "top": top,
        "score": score,
    }
    done = subprocess.run(
        ["node", HERE / "run.mjs", _installed()],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"llama.cpp failed with exit status {done.returncode}:\n{done.stderr.strip()}"
        )
    return [
        Answer(
            answer["tokens"],
            [dict(place) for place in answer["logprobs"]],
            [dict(place) for place in answer["prompt"]],
            answer["ends"],
        )
        for answer in json.loads(done.stdout)
    ]


def dequantise(source: Path, target: Path) -> Path:
    """Write the GGUF model `source` to `target` with every tensor in float32 and the same metadata, and return `target`.

    llama.cpp then computes what transformers does with the dequantised model, but for the order of its sums.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    for name, field in reader.fields.items():
        if (
            name.startswith("GGUF.") or name == gguf.Keys.General.ARCHITECTURE
        ):  # the header's own, and what the writer has put
            continue
        value = (
            gguf.LlamaFileType.ALL_F32 if name == gguf.Keys.General.FILE_TYPE else field.contents()
        )
        writer.add_key_value(
            name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None
        )
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _installed() -> Path:
    return Path(os.environ.get("LORAKIN_LLAMA") or Path(__file__).parents[2] / ".venv" / "llama")
