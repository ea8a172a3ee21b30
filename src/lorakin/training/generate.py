"""An answer from a model, prompted as it was trained."""

from __future__ import annotations

import sys

import torch
import transformers

from lorakin.errors import ModelError, SettingError
from lorakin.terminal import visible
from lorakin.training.encoding import prompt_ids
from lorakin.training.endings import end_of_turn_text, stops
from lorakin.training.limits import check_prompt, places
from lorakin.training.models import Loaded
from lorakin.training.plainly import OnlyNumbers, by_own_settings

COOLEST, HOTTEST = 1e-4, 1e4
"""Temperatures beyond which logits that are divided by them are infinite in float16, or all the same."""


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
    """What the model says to `prompt`: the likeliest token each time, or sampled at a `temperature` above 0.

    It ends at the end of text or, with `chat_template`, of the assistant's turn. With `stream` the answer is also printed on
    stdout while it comes.

    Raises:
        ModelError: the model cannot generate, computes NaN, or has no positions left after the prompt.
        SettingError: a temperature outside of `COOLEST` to `HOTTEST`.
        DataError: a token that its embedding has no row for.
    """
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    if temperature != 0 and not COOLEST <= temperature <= HOTTEST:
        raise SettingError(
            f"temperature must be 0, or from {COOLEST:g} to {HOTTEST:g}, not {temperature!r}"
        )
    if not hasattr(model, "generate") or not model.can_generate():
        raise ModelError(
            f"{loaded.name} with this adapter is a {type(model).__name__}, which classifies and cannot generate"
        )
    asked = prompt_ids(prompt, tokenizer, chat_template)
    check_prompt(asked, loaded)
    if (there := places(model)) is not None and len(asked) >= there:
        raise ModelError(
            f"the prompt has {len(asked)} tokens, and {loaded.name} has positions for {there}, the answer's included"
        )
    ids = torch.tensor([asked], device=model.device)
    text = end_of_turn_text(tokenizer) if chat_template else None
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    torch.manual_seed(seed)
    ends = stops(tokenizer, model.generation_config, chat_template) or None
    with by_own_settings(model, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **sampling):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens
            if there is None
            else min(max_new_tokens, there - len(asked)),
            stop_strings=text,
            tokenizer=tokenizer,
            logits_processor=transformers.LogitsProcessorList([OnlyNumbers(loaded.name)]),
            streamer=_Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            if stream
            else None,
        )
    said: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return said.strip() if text is None else said.strip().removesuffix(text).strip()


class _Streamer(transformers.TextStreamer):
    """Prints an answer while it comes: visible on a terminal, the model's own characters into a file or pipe."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is ready."""
        end = "\n" if stream_end else ""
        print(visible(text) if sys.stdout.isatty() else text, flush=True, end=end)
