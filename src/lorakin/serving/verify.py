"""Checks that what was written is the model that was trained, by the logits of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakin.errors import SettingError, VerificationError
from lorakin.inject.module_mode import in_mode
from lorakin.serving.inputs import inputs_of, is_pair, random_inputs, reads_text
from lorakin.training.encoding import prompt_ids
from lorakin.training.endings import stops
from lorakin.training.generation_settings import with_settings
from lorakin.training.limits import places
from lorakin.training.models import Loaded

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "def add(a, b):\n    return",
    "List three fruits.",
    "Translate to German: Good morning, how are you?",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take?",
    "The film was far too long, and yet I would watch it again.",
    "Explain in simple words why the sky is blue.",
)
CONTINUATION = 16
LONGEST, FEWEST = 256, 10
"""Tokens of a text; and how many different tokens all prompts must have, or nothing was read."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How much the target's precision may change.

    `logit` is the largest difference of logits as a share of the largest logit, `divergence` the
    mean KL in nats.
    """

    logit: float
    divergence: float


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-6),
    "float16": Tolerance(2e-2, 3e-4),
    "bfloat16": Tolerance(2e-1, 1e-2),
    "q8_0": Tolerance(2e-1, 3e-2),
}
"""By the less precise of what is compared; docs/howto/serve.md has what was measured."""
NEAREST = Tolerance(float("inf"), 1e-2)
"""For a nearest pair, which is exact in no precision: only the KL decides."""


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What the trained model says to each input: its logits at each place.

    Attributes:
        texts: the inputs: token ids, or all that the model takes by name, each a batch of one.
        logits: (places, vocabulary) or (classes,), for each input.
        dtype: the precision of the model.
        of: what the inputs are, in words.
    """

    texts: Sequence[list[int] | Mapping[str, Tensor]]
    logits: list[Tensor]
    dtype: str = "float32"
    of: str = "prompts"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two models' logits are apart, over `places` places of the same texts.

    `divergence` is the mean of KL(trained ‖ written) in nats, `tokens` the share of places where
    both find the same token (or class) the most likely.
    """

    largest: float
    mean: float
    divergence: float
    tokens: float
    places: int
    largest_logit: float
    of: str = "prompts"

    def as_dict(self) -> dict[str, float | int | str]:
        """Returns it for the report."""
        return {
            "max_logit_difference": self.largest,
            "mean_logit_difference": self.mean,
            "mean_kl": self.divergence,
            "token_agreement": self.tokens,
            "places": self.places,
            "largest_logit": self.largest_logit,
            "inputs": self.of,
        }

    def check(
        self, tolerance: Tolerance, what: str, report: Mapping[str, Any] | None = None
    ) -> None:
        """Checks that the two are no further apart than `tolerance`.

        Raises:
            VerificationError: they are; it carries the `report`.
        """
        share = self.largest / max(self.largest_logit, 1e-30)
        if share <= tolerance.logit and self.divergence <= tolerance.divergence:
            return
        of_logits = (
            f" and a logit difference of {tolerance.logit * self.largest_logit:.3g}"
            if tolerance.logit < 1
            else ""
        )
        raise VerificationError(
            f"{what} is not the model that was trained: {self}. Tolerated is a KL of "
            f"{tolerance.divergence:g}{of_logits}. Nothing was kept; --max-kl allows more, "
            "--no-verify leaves this check out",
            report or self.as_dict(),
        )

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.largest:.3g} (mean {self.mean:.2g}, largest logit "
            f"{self.largest_logit:.3g}), KL {self.divergence:.2g}, same token in {self.tokens:.2%} "
            f"of {self.places} places" + ("" if self.of == "prompts" else f", of {self.of}")
        )


def check_limit(max_kl: float | None) -> None:
    """Checks a limit on the KL.

    Raises:
        SettingError: it is no number of at least 0.

    >>> check_limit(-1.0)
    Traceback (most recent call last):
    ...
    lorakin.errors.SettingError: --max-kl must be a number of at least 0, not -1.0
    """
    if max_kl is not None and not 0 <= max_kl < float("inf"):
        raise SettingError(f"--max-kl must be a number of at least 0, not {max_kl!r}")


def tolerance_for(precisions: Sequence[str], is_nearest: bool, max_kl: float | None) -> Tolerance:
    """Returns what is tolerated between models of these precisions, or where pairs are only near.

    `max_kl` overrules both.

    >>> tolerance_for(["float32", "float16"], is_nearest=False, max_kl=None)
    Tolerance(logit=0.02, divergence=0.0003)
    """
    if max_kl is not None:
        return Tolerance(float("inf"), max_kl)
    if is_nearest:
        return NEAREST
    known = [TOLERANCES[precision] for precision in precisions if precision in TOLERANCES]
    return max(known, key=lambda tolerance: tolerance.logit, default=TOLERANCES["float32"])


def record(loaded: Loaded, texts: Sequence[Sequence[int]] = ()) -> Transcript:
    """Lets the model read `texts` (token ids), or `PROMPTS` and what it says to them.

    A model that reads no text gets random inputs.

    Raises:
        ModelError: it is not known how to make inputs for it.
    """
    chosen: list[Any] = [list(text)[: _longest(loaded.model)] for text in texts]
    of = "the data" if chosen else "prompts"
    if not chosen and loaded.tokenizer is not None and reads_text(loaded.model):
        chosen = _own_texts(loaded)
    kinds = {token for text in chosen for token in text}
    if len(kinds) < FEWEST:  # a tokenizer that transformers made up gives few
        chosen, of = random_inputs(loaded.model), f"random {loaded.model.main_input_name}"
    return Transcript(chosen, logits_of(loaded.model, chosen), loaded.dtype, of)


def compare(transcript: Transcript, model: Any) -> Agreement:
    """Returns how far `model` is from the one that the transcript is of."""
    sums = torch.zeros(3, dtype=torch.float64)
    largest = top = 0.0
    count = numbers = 0
    for trained, written in zip(transcript.logits, logits_of(model, transcript.texts), strict=True):
        difference = (trained - written).abs()
        divergence, same = _divergence(trained, written)
        sums += torch.stack([difference.double().sum(), divergence.sum(), same.double().sum()])
        worst = float(difference.max())
        largest = worst if worst != worst else max(largest, worst)  # NaN stays
        top = max(top, float(trained.abs().max()))
        count, numbers = count + len(divergence), numbers + difference.numel()
    return Agreement(
        largest,
        float(sums[0]) / numbers,
        float(sums[1]) / count,
        float(sums[2]) / count,
        count,
        top,
        transcript.of,
    )


def _divergence(trained: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Returns KL(trained ‖ written), and whether the likeliest token is the same, by place."""
    rows = trained.reshape(-1, trained.shape[-1]).double()
    others = written.reshape(-1, written.shape[-1]).double()
    said, heard = rows.log_softmax(-1), others.log_softmax(-1)
    return (said.exp() * (said - heard)).sum(-1), rows.argmax(-1) == others.argmax(-1)


@torch.no_grad()
def logits_of(model: Any, texts: Sequence[Sequence[int] | Mapping[str, Tensor]]) -> list[Tensor]:
    """Returns the model's logits on each text, float32 on the CPU; else its first output."""
    with in_mode(model, training=False):
        return [_answer(model(**inputs_of(model, text))).float().cpu() for text in texts]


def _answer(output: Any) -> Tensor:
    """Returns the answer to a batch of one: logits, a span's start and end, or the first tensor."""
    if (logits := getattr(output, "logits", None)) is not None:
        found: Tensor = logits[0]
        return found
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    spans: list[Any] = [getattr(output, f"{side}_logits", None) for side in ("start", "end")]
    if all(span is not None for span in spans):
        return torch.stack([span[0] for span in spans])
    return tensors[0][0]


def _longest(model: Any) -> int:
    return min(LONGEST, places(model) or LONGEST)


def _own_texts(loaded: Loaded) -> list[list[int]]:
    longest = _longest(loaded.model)
    prompts = [prompt_ids(prompt, loaded.tokenizer)[:longest] for prompt in PROMPTS]
    if is_pair(loaded.model) or not (
        hasattr(loaded.model, "can_generate") and loaded.model.can_generate()
    ):
        return prompts
    texts, ends = [], stops(None, loaded.model.generation_config) or None
    for prompt in prompts:
        if (room := min(CONTINUATION, longest - len(prompt))) < 1:
            texts.append(prompt)
            continue
        ids = torch.tensor([prompt], device=loaded.model.device)
        with with_settings(
            loaded.model,
            eos_token_id=ends,
            pad_token_id=loaded.tokenizer.pad_token_id,
            do_sample=False,
        ):
            out = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room
            )
        texts.append(out[0].tolist())
    return texts
