"""An answer from a model, prompted as it was trained."""

from __future__ import annotations

import sys

import torch
import transformers

from lorakin.errors import ModelError
from lorakin.terminal import visible
from lorakin.training.encoding import prompt_ids
from lorakin.training.models import Loaded


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

    With `stream` the answer is also printed on stdout while it comes.
    """
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    if not hasattr(model, "generate") or not model.can_generate():
        raise ModelError(f"{loaded.name} with this adapter is a {type(model).__name__}, which classifies and cannot generate")
    ids = torch.tensor([prompt_ids(prompt, tokenizer, chat_template)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=_Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        **sampling,
    )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


class _Streamer(transformers.TextStreamer):
    """Prints an answer while it comes: visible on a terminal, the model's own characters into a file or pipe."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is ready."""
        end = "\n" if stream_end else ""
        print(visible(text) if sys.stdout.isatty() else text, flush=True, end=end)
