"""The answers of a base and its adapters, to one prompt or to a file of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakin.errors import OutputError, SettingError
from lorakin.storage import paths
from lorakin.training.answer_file import AnswerFile, check_columns
from lorakin.training.contents import PlainText
from lorakin.training.generate import answers
from lorakin.training.prompts import Prompt, digest, read_prompts
from lorakin.training.sampling import Sampling
from lorakin.training.speakers import Speaker, load_speakers, names_of, with_system
from lorakin.waiting import waiting

WEIGHTS = "adapter_model.safetensors"


def answer_side_by_side(
    speakers: Sequence[Speaker], prompt: str, sampling: Sampling, system: str | None = None
) -> dict[str, str]:
    """Returns the answers of several speakers to one prompt, by their names.

    Raises:
        LorakinError: as `generate.answers`.
    """
    one = Prompt(0, "the prompt", {}, with_system(PlainText(prompt, ""), system))
    said = {
        request.speaker.name: text
        for batch in answers([(one, s) for s in speakers], sampling, len(speakers))
        for request, text in batch
    }
    return {speaker.name: said[speaker.name] for speaker in speakers}


def answer_file(
    model: str,
    adapters: Sequence[str],
    prompts: str,
    out: str,
    sampling: Sampling,
    *,
    batch_size: int = 8,
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
    layout: str | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Writes a file with the rows of a data file and what each speaker answers to them.

    What an interrupted run with the same settings left is gone on with.

    Args:
        model, adapters, loading: as for `load_speakers`.
        prompts, columns, layout: as for `read_prompts`.
        out: the file, JSONL.
        sampling: how tokens are chosen.
        batch_size: answers at a time.
        system: the system's message, for rows without one.

    Returns:
        The file, how many rows it has, and how many answers were there already.

    Raises:
        OutputError: the file exists, or cannot be written.
        LorakinError: the data, the model or an adapter cannot be used.
    """
    path = paths.user_path(out, "--out", OutputError)
    rows = read_prompts(prompts, columns, layout)
    check_columns(row.values for row in rows)
    rows = [dataclasses.replace(row, content=with_system(row.content, system)) for row in rows]
    names = names_of(adapters)
    run = {
        "model": model,
        "adapters": {name: _digest(folder) for name, folder in zip(names, adapters, strict=True)},
        "prompts": digest(rows),
        "sampling": dataclasses.asdict(sampling),
        **loading,
    }
    file = AnswerFile(path, run)
    try:
        there = len(file.done)
        speakers = load_speakers(model, adapters, **loading)
        asked = [
            (row, speaker)
            for row in rows
            for speaker in speakers
            if (row.number, speaker.name) not in file.done
        ]
        with waiting("answering", total=len(asked)) as advance:
            for batch in answers(asked, sampling, batch_size):
                file.add({(request.number, request.speaker.name): text for request, text in batch})
                advance(len(batch))
        file.finish([row.values for row in rows], [speaker.name for speaker in speakers])
    finally:
        file.close()
    return {"out": str(path), "rows": len(rows), "resumed": there}


def _digest(adapter: str) -> str:
    """Returns a digest of an adapter's weights; the hub's id of one that is not a directory."""
    weights = Path(adapter) / WEIGHTS
    if not weights.is_file():
        return adapter
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_asked(prompt: str | None, prompts: str | None, out: str | None) -> None:
    """Checks that a prompt is given, or a file of them and where the answers go.

    Raises:
        SettingError: neither, or both.
    """
    if (prompt is None) == (prompts is None):
        both = "both are" if prompt is not None else "neither is"
        raise SettingError(f"give --prompt TEXT or --prompts FILE; {both} given")
    if (prompts is None) != (out is None):
        raise SettingError(
            f"--prompts {prompts} needs --out FILE for the answers"
            if out is None
            else f"--out {out} is for the answers to --prompts FILE, which is not given"
        )
