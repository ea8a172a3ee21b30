"""An answer from a model, prompted as it was trained."""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

from lorakin.errors import ModelError, SettingError
from lorakin.terminal import visible
from lorakin.training.encoding import Encoder
from lorakin.training.endings import end_of_turn_text, stop_ids
from lorakin.training.generation_settings import StopAtNaN, with_settings
from lorakin.training.limits import check_prompt, position_count
from lorakin.training.models import Loaded

COOLEST, HOTTEST = 1e-4, 1e4
"""Beyond these temperatures, logits divided by them are infinite in float16, or all the same."""


@torch.no_grad()
def answer(
    loaded: Loaded,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    chat_template: bool = True,
    seed: int = 0,
    stream: bool = False,
) -> str:
    """Returns the model's answer to a prompt.

    It ends at the end of text or, with `chat_template`, of the assistant's turn.

    Args:
        loaded: the model and its tokenizer.
        prompt: the user's words.
        max_new_tokens: tokens of the longest answer.
        temperature: 0 takes the likeliest token each time; above 0, tokens are sampled.
        chat_template: whether the prompt goes into the tokenizer's chat template, if it has one.
        seed: draws the samples.
        stream: whether the answer is also printed on stdout while it comes.

    Raises:
        ModelError: the model cannot generate, computes NaN, or has no positions left.
        SettingError: a temperature outside of `COOLEST` to `HOTTEST`.
        DataError: a token that the embedding has no row for.
    """
    _check(loaded, temperature)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    encoder = Encoder(tokenizer)
    asked = encoder.prompt(prompt) if chat_template else encoder.opened(prompt)
    longest = min(max_new_tokens, _positions_left(loaded, asked))

    template = encoder.template if chat_template else None
    text = end_of_turn_text(template)
    settings: dict[str, Any] = {
        "eos_token_id": stop_ids(tokenizer, model.generation_config, template or False) or None,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        settings["temperature"] = temperature
    streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    ids = torch.tensor([asked], device=model.device)
    torch.manual_seed(seed)
    with with_settings(model, **settings):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            stop_strings=text,
            tokenizer=tokenizer,
            logits_processor=transformers.LogitsProcessorList([StopAtNaN(loaded.name)]),
            streamer=streamer,
        )
    reply: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return reply.strip() if text is None else reply.strip().removesuffix(text).strip()


def _check(loaded: Loaded, temperature: float) -> None:
    if temperature != 0 and not COOLEST <= temperature <= HOTTEST:
        raise SettingError(
            f"temperature must be 0, or from {COOLEST:g} to {HOTTEST:g}, not {temperature!r}"
        )
    model = loaded.model
    if not hasattr(model, "generate") or not model.can_generate():
        raise ModelError(
            f"{loaded.name} with this adapter is a {type(model).__name__}, which classifies and "
            "cannot generate"
        )


def _positions_left(loaded: Loaded, asked: list[int]) -> int:
    """Returns how many positions the model has after a prompt's tokens.

    Raises:
        ModelError: none.
        DataError: a token that the embedding has no row for.
    """
    check_prompt(asked, loaded)
    positions = position_count(loaded.model)
    if positions is not None and len(asked) >= positions:
        raise ModelError(
            f"the prompt has {len(asked)} tokens, and {loaded.name} has positions for {positions}, "
            "the answer's included"
        )
    return sys.maxsize if positions is None else positions - len(asked)


class _Streamer(transformers.TextStreamer):
    """Prints an answer as it comes: visible on a terminal, raw into a file or pipe."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints what is ready."""
        end = "\n" if stream_end else ""
        print(visible(text) if sys.stdout.isatty() else text, flush=True, end=end)
