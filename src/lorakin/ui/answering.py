"""Answers of a base and an adapter beside each other, while they come."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from lorakin.errors import LorakinError, SettingError
from lorakin.training.generate import answers, check_generates, generated, request_for
from lorakin.training.limits import check_prompt
from lorakin.training.prompts import Prompt
from lorakin.training.sampling import Sampling
from lorakin.training.speakers import Speaker, load_speakers
from lorakin.training.streaming import Streamer

_one_at_a_time = threading.Lock()
"""Answers share a model, in which adapters are switched."""


class Stopped(transformers.StoppingCriteria):
    """Ends an answer after the next token, once `is_asked`."""

    def __init__(self) -> None:
        self.is_asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        """Returns (batch,): whether the rows are done."""
        return torch.full((len(input_ids),), self.is_asked, device=input_ids.device)


@functools.lru_cache(maxsize=1)
def _loaded(model: str, adapter: str, version: int) -> list[Speaker]:
    return load_speakers(model, [adapter] if adapter else [], base=True)


def speakers_of(model: str, adapter: str, version: int = 0) -> list[Speaker]:
    """Returns the base and the adapter; the last ones stay in memory.

    Args:
        model: a base model, as for `load_model`.
        adapter: the adapter's directory or hub id; "" for the base alone.
        version: another one when the adapter's files have changed.

    Raises:
        LorakinError: one of them cannot be loaded.
    """
    if not model:
        raise SettingError("model is missing; name it at the head of the page")
    return _loaded(model, adapter, version)


def side_by_side(
    speakers: Sequence[Speaker], prompt: str, sampling: Sampling
) -> Iterator[tuple[str, ...]]:
    """Yields the speakers' answers so far, the first speaker's first.

    Closing the iterator ends the answer after its next token.

    Raises:
        LorakinError: the prompt cannot be answered.
    """
    said = {speaker.name: "" for speaker in speakers}
    pieces: queue.Queue[tuple[str, str] | LorakinError | None] = queue.Queue()
    stopped = Stopped()

    def answer() -> None:
        try:
            with _one_at_a_time:
                for speaker in speakers:
                    _answer(speaker, prompt, sampling, stopped, pieces)
        except LorakinError as error:
            pieces.put(error)
        finally:
            pieces.put(None)

    threading.Thread(target=answer, daemon=True).start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, LorakinError):
                raise piece
            said[piece[0]] += piece[1]
            yield tuple(said.values())
    finally:
        stopped.is_asked = True


def _answer(
    speaker: Speaker,
    prompt: str,
    sampling: Sampling,
    stopped: Stopped,
    pieces: queue.Queue[Any],
) -> None:
    check_generates(speaker.loaded)
    ids = speaker.prompt(prompt)
    check_prompt(ids, speaker.loaded)
    streamer = Streamer(
        speaker.tokenizer,
        speaker.stops(sampling),
        lambda text: pieces.put((speaker.name, text)),
    )
    generated([request_for(speaker, ids, sampling)], sampling, streamer, [stopped])


def answered_rows(
    speakers: Sequence[Speaker], prompts: Sequence[Prompt], sampling: Sampling
) -> list[list[str]]:
    """Returns each prompt's answers, one of each speaker.

    Raises:
        LorakinError: a prompt cannot be answered.
    """
    said: dict[tuple[int, str], str] = {}
    with _one_at_a_time:
        for speaker in speakers:
            for batch in answers([(prompt, speaker) for prompt in prompts], sampling, len(prompts)):
                said |= {(one.number, one.speaker.name): text for one, text in batch}
    return [[said[prompt.number, speaker.name] for speaker in speakers] for prompt in prompts]
