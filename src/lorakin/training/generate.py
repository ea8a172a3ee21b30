"""Answers from a model, prompted as it was trained: one, or many in batches."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from lorakin.errors import ModelError, SettingError
from lorakin.switching import mixed_batch
from lorakin.training.base_class import is_seq2seq
from lorakin.training.generation_settings import StopAtNaN, with_settings
from lorakin.training.kept_cache import KeptCache
from lorakin.training.limits import check_prompt, check_rows
from lorakin.training.models import Loaded
from lorakin.training.prompts import Prompt
from lorakin.training.sampling import Sampling
from lorakin.training.speakers import Speaker
from lorakin.training.streaming import Streamer


def answer(
    loaded: Loaded,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    chat_template: bool = True,
    seed: int = 0,
    stream: bool = False,
    system: str | None = None,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
) -> str:
    """Returns the model's answer to a prompt.

    It ends at the end of text or, with `chat_template`, of the assistant's turn.

    Args:
        loaded: the model and its tokenizer.
        prompt: the user's words.
        max_new_tokens, temperature, top_p, seed, stop: see `Sampling`.
        chat_template: whether the prompt goes into the tokenizer's chat template, if it has one.
        stream: whether the answer is also printed on stdout while it comes.
        system: the system's message; it needs a chat template.

    Raises:
        ModelError: the model cannot generate, computes NaN, or has no positions left.
        SettingError: a value outside its range.
        DataError: a token that the embedding has no row for.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop)
    speaker = Speaker.of(loaded, chat_template=chat_template)
    return answer_of(speaker, prompt, sampling, system, stream=stream)


def answer_of(
    speaker: Speaker,
    prompt: str,
    sampling: Sampling,
    system: str | None = None,
    *,
    stream: bool = False,
) -> str:
    """Returns a speaker's answer to a prompt; `answer` says the rest."""
    check_generates(speaker.loaded)
    ids = speaker.prompt(prompt, system)
    check_prompt(ids, speaker.loaded)
    streamer = Streamer(speaker.tokenizer, speaker.stops(sampling)) if stream else None
    return generated([request_for(speaker, ids, sampling)], sampling, streamer)[0]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one answer is generated from.

    Attributes:
        speaker: who answers.
        ids: the prompt's tokens.
        longest: the most tokens of the answer.
        number: which of the prompts it is, from 0; the draws depend on it.
    """

    speaker: Speaker
    ids: list[int]
    longest: int
    number: int = 0


def answers(
    asked: Sequence[tuple[Prompt, Speaker]],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[list[tuple[Request, str]]]:
    """Generates answers; yields each batch when it is done.

    Prompts of about the same length are together, the longest first: batches hold little padding
    then, and a model that is too large for the memory fails at once. Where their adapters allow it,
    several speakers answer in one batch (`lorakin.mixed_batch`).

    Args:
        asked: each prompt with who is to answer it; the speakers share one model.
        sampling: how tokens are chosen.
        batch_size: answers at a time.

    Raises:
        LorakinError: as `answer`; what is wrong with a prompt, before the first batch.
    """
    speakers = list(dict.fromkeys(speaker for _, speaker in asked))
    if not speakers:
        return
    check_generates(speakers[0].loaded)
    ids = [speaker.ids(prompt.content) for prompt, speaker in asked]
    examples = [{"input_ids": one} for one in ids]
    check_rows(examples, speakers[0].loaded, [prompt.where for prompt, _ in asked], "the prompts")
    requests = [
        request_for(speaker, one, sampling, prompt.number)
        for (prompt, speaker), one in zip(asked, ids, strict=True)
    ]
    together = _mixable(speakers)
    places = {id(speaker): place for place, speaker in enumerate(speakers)}

    def group(request: Request) -> tuple[Any, ...]:
        speaker = request.speaker
        apart = 0 if together else places[id(speaker)]
        return apart, -request.longest, speaker.ends, speaker.stops(sampling)

    requests.sort(key=lambda request: (group(request), -len(request.ids)))
    for _, alike in itertools.groupby(requests, group):
        while batch := list(itertools.islice(alike, batch_size)):
            yield list(zip(batch, generated(batch, sampling), strict=True))


def _mixable(speakers: Sequence[Speaker]) -> bool:
    try:
        mixed_batch(speakers[0].model, [speaker.adapter for speaker in speakers])
    except SettingError:  # some adapters act on all rows alike
        return False
    return True


@torch.no_grad()
def generated(
    requests: Sequence[Request],
    sampling: Sampling,
    streamer: Any = None,
    stopping: Sequence[transformers.StoppingCriteria] = (),
    kept: KeptCache | None = None,
) -> list[str]:
    """Returns the answers to requests of one group, in one batch.

    Args:
        requests: of the same length of the answer and the same ends.
        sampling: how tokens are chosen.
        streamer: gets the tokens of a single answer while they come.
        stopping: what else ends the answers.
        kept: what was computed before, for one request.
    """
    speaker, longest = requests[0].speaker, requests[0].longest
    model, tokenizer = speaker.model.eval(), speaker.tokenizer
    ends, texts = list(speaker.ends), list(speaker.stops(sampling))
    pad = next((one for one in (tokenizer.pad_token_id, *ends) if one is not None), 0)
    # An encoder counts positions from the left, and the answer does not follow the prompt.
    has_encoder = is_seq2seq(model.config)
    rows, mask = _padded(requests, pad, to_the_right=has_encoder)
    kept = None if has_encoder else kept

    used = [request.speaker.adapter for request in requests]
    if len(set(used)) == 1:
        speaker.activate()
    numbers = [request.number for request in requests]
    processors = [StopAtNaN(speaker.loaded.name), *sampling.processors(numbers)]
    # Draws are Gumbel noise on the logits, whose largest sum is then taken.
    settings = {"eos_token_id": ends or None, "pad_token_id": pad, "do_sample": False}
    cached: dict[str, Any] = {}
    if kept is not None:
        cache = kept.take(speaker, rows[0])
        cached = {"past_key_values": cache} if cache is not None else {}
        settings["return_dict_in_generate"] = True
    with with_settings(model, **settings), _mixed(model, used):
        out = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=longest,
            stop_strings=texts or None,
            tokenizer=tokenizer,
            logits_processor=transformers.LogitsProcessorList(processors),
            stopping_criteria=transformers.StoppingCriteriaList(stopping),
            streamer=streamer,
            **cached,
        )
    if kept is not None:
        kept.keep(speaker, out.sequences[0].tolist(), out.past_key_values)
        out = out.sequences
    answered = out[:, 1:] if has_encoder else out[:, len(rows[0]) :]
    return [_text(row, speaker, sampling) for row in answered.tolist()]


def _padded(
    requests: Sequence[Request], pad: int, to_the_right: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the tokens of prompts, padded to one length, and the attention mask."""
    width = max(len(request.ids) for request in requests)
    missing = [width - len(request.ids) for request in requests]
    if to_the_right:
        rows = [r.ids + [pad] * n for n, r in zip(missing, requests, strict=True)]
        return rows, [[1] * (width - n) + [0] * n for n in missing]
    rows = [[pad] * n + r.ids for n, r in zip(missing, requests, strict=True)]
    return rows, [[0] * n + [1] * (width - n) for n in missing]


def _text(row: list[int], speaker: Speaker, sampling: Sampling) -> str:
    """Returns the text of an answer's tokens, up to its end; padding follows that in a batch."""
    end = next((n for n, token in enumerate(row) if token in speaker.ends), len(row))
    text = speaker.tokenizer.decode(row[: end + 1], skip_special_tokens=True)
    return sampling.cut(text, *speaker.stops(sampling))


def _mixed(model: Any, adapters: Sequence[str | None]) -> contextlib.AbstractContextManager[None]:
    """Lets each row use its own adapter, if they are not all the same."""
    return mixed_batch(model, adapters) if len(set(adapters)) > 1 else contextlib.nullcontext()


def check_generates(loaded: Loaded) -> None:
    """Checks that a model writes text.

    Raises:
        ModelError: it does not.
    """
    model = loaded.model
    if not hasattr(model, "generate") or not model.can_generate():
        raise ModelError(
            f"{loaded.name} with this adapter is a {type(model).__name__}, which classifies and "
            "cannot generate"
        )


def request_for(speaker: Speaker, ids: list[int], sampling: Sampling, number: int = 0) -> Request:
    """Returns the request for an answer to a prompt's tokens.

    Raises:
        ModelError: the model has no position left for an answer.
    """
    positions = speaker.positions
    if positions is not None and len(ids) >= positions:
        raise ModelError(
            f"the prompt has {len(ids)} tokens, and {speaker.loaded.name} has positions for "
            f"{positions}, the answer's included"
        )
    left = sys.maxsize if positions is None else positions - len(ids)
    return Request(speaker, ids, min(sampling.max_new_tokens, left), number)
