"""Checks that what was written is the model that was trained, by the logits of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakin.errors import SettingError, VerificationError
from lorakin.inject.module_mode import in_mode
from lorakin.serving.inputs import inputs_of, is_encoder_decoder, random_inputs, reads_text
from lorakin.training.encoding import prompt_ids
from lorakin.training.endings import stop_ids
from lorakin.training.generation_settings import with_settings
from lorakin.training.limits import position_count
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
"""The tokens that the model writes after each prompt."""
LONGEST, FEWEST = 256, 10
"""The most tokens of a text, and the fewest different tokens of all texts: below, the tokenizer is
not the model's."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How much the target's precision may change.

    Attributes:
        logit: the largest difference of logits, as a share of the largest logit.
        divergence: the mean KL in nats.
    """

    logit: float
    divergence: float


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-6),
    "float16": Tolerance(2e-2, 3e-4),
    "bfloat16": Tolerance(2e-1, 1e-2),
    "q8_0": Tolerance(2e-1, 3e-2),
}
"""The tolerances, by the less precise of what is compared; docs/howto/serve.md has measurements."""
NEAREST = Tolerance(float("inf"), 1e-2)
"""The tolerance for a nearest pair, which is exact in no precision: only the KL decides."""


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The trained model's logits on some inputs.

    Attributes:
        texts: the inputs: token ids, or the model's arguments by name, each a batch of one.
        logits: (positions, vocabulary) or (classes,), for each input.
        dtype: the precision of the model.
        inputs: what the inputs are, in words.
    """

    texts: Sequence[list[int] | Mapping[str, Tensor]]
    logits: list[Tensor]
    dtype: str = "float32"
    inputs: str = "prompts"


@dataclasses.dataclass(frozen=True)
class LogitComparison:
    """How far two models' logits are apart on the same inputs.

    Attributes:
        largest: the largest difference of a logit.
        mean: the mean difference of a logit.
        divergence: the mean of KL(trained ‖ written) over the positions, in nats.
        tokens: the share of positions where both models find the same token (or class) likeliest.
        positions: the number of positions.
        largest_logit: the largest logit of the trained model.
        inputs: what the inputs are, in words.
    """

    largest: float
    mean: float
    divergence: float
    tokens: float
    positions: int
    largest_logit: float
    inputs: str = "prompts"

    def as_dict(self) -> dict[str, float | int | str]:
        """Returns it for the report."""
        return {
            "max_logit_difference": self.largest,
            "mean_logit_difference": self.mean,
            "mean_kl": self.divergence,
            "token_agreement": self.tokens,
            "places": self.positions,
            "largest_logit": self.largest_logit,
            "inputs": self.inputs,
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
        and_logits = ""
        if tolerance.logit < 1:
            and_logits = f" and a logit difference of {tolerance.logit * self.largest_logit:.3g}"
        raise VerificationError(
            f"{what} is not the model that was trained: {self}. The tolerance is a KL of "
            f"{tolerance.divergence:g}{and_logits}. Nothing was kept; --max-kl allows more, "
            "--no-verify leaves this check out",
            report or self.as_dict(),
        )

    def __str__(self) -> str:
        same = round(self.tokens * self.positions) if math.isfinite(self.tokens) else 0
        text = (
            f"logits differ by at most {self.largest:.3g} (mean {self.mean:.2g}, largest logit "
            f"{self.largest_logit:.3g}), KL {self.divergence:.2g}, same top token at {same} of "
            f"{self.positions} positions"
        )
        return text if self.inputs == "prompts" else f"{text} of {self.inputs}"


def check_limit(max_kl: float | None) -> None:
    """Checks a limit on the KL.

    Raises:
        SettingError: it is not a number of at least 0.

    >>> check_limit(-1.0)
    Traceback (most recent call last):
    ...
    lorakin.errors.SettingError: --max-kl must be a number of at least 0, not -1.0
    """
    if max_kl is not None and not 0 <= max_kl < float("inf"):
        raise SettingError(f"--max-kl must be a number of at least 0, not {max_kl!r}")


def tolerance_for(precisions: Sequence[str], is_nearest: bool, max_kl: float | None) -> Tolerance:
    """Returns the tolerance between models of these precisions, or for nearest pairs.

    `max_kl` overrides both.

    >>> tolerance_for(["float32", "float16"], is_nearest=False, max_kl=None)
    Tolerance(logit=0.02, divergence=0.0003)
    """
    if max_kl is not None:
        return Tolerance(float("inf"), max_kl)
    if is_nearest:
        return NEAREST
    tolerances = [TOLERANCES[precision] for precision in precisions if precision in TOLERANCES]
    return max(tolerances, key=lambda tolerance: tolerance.logit, default=TOLERANCES["float32"])


def record_logits(loaded: Loaded, texts: Sequence[Sequence[int]] = ()) -> Transcript:
    """Runs the model on `texts` (token ids), or on `PROMPTS` with the answers that it generates.

    A model that does not read text gets random inputs.

    Raises:
        ModelError: lorakin cannot make inputs for it.
    """
    chosen: list[Any] = [list(text)[: _longest(loaded.model)] for text in texts]
    inputs = "the data" if chosen else "prompts"
    if not chosen and loaded.tokenizer is not None and reads_text(loaded.model):
        chosen = _answered_prompts(loaded)
    tokens = {token for text in chosen for token in text}
    if len(tokens) < FEWEST:  # a tokenizer that transformers made up gives few
        chosen, inputs = random_inputs(loaded.model), f"random {loaded.model.main_input_name}"
    return Transcript(chosen, logits_of(loaded.model, chosen), loaded.dtype, inputs)


def compare_logits(transcript: Transcript, model: Any) -> LogitComparison:
    """Returns how far `model` is from the one that gave the transcript."""
    sums = torch.zeros(3, dtype=torch.float64)
    largest = largest_logit = 0.0
    positions = logits = 0
    for trained, written in zip(transcript.logits, logits_of(model, transcript.texts), strict=True):
        difference = (trained - written).abs()
        divergence, same = _divergence(trained, written)
        sums += torch.stack([difference.double().sum(), divergence.sum(), same.double().sum()])
        worst = float(difference.max())
        largest = worst if worst != worst else max(largest, worst)  # NaN stays
        largest_logit = max(largest_logit, float(trained.abs().max()))
        positions, logits = positions + len(divergence), logits + difference.numel()
    return LogitComparison(
        largest=largest,
        mean=float(sums[0]) / logits,
        divergence=float(sums[1]) / positions,
        tokens=float(sums[2]) / positions,
        positions=positions,
        largest_logit=largest_logit,
        inputs=transcript.inputs,
    )


def _divergence(trained: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Returns KL(trained ‖ written), and whether the likeliest token is the same, by position."""
    trained = trained.reshape(-1, trained.shape[-1]).double().log_softmax(-1)
    written = written.reshape(-1, written.shape[-1]).double().log_softmax(-1)
    divergence = (trained.exp() * (trained - written)).sum(-1)
    return divergence, trained.argmax(-1) == written.argmax(-1)


@torch.no_grad()
def logits_of(model: Any, texts: Sequence[Sequence[int] | Mapping[str, Tensor]]) -> list[Tensor]:
    """Returns the model's logits on each text, float32 on the CPU; else its first output."""
    with in_mode(model, training=False):
        return [_logits_in(model(**inputs_of(model, text))).float().cpu() for text in texts]


def _logits_in(output: Any) -> Tensor:
    """Returns the output for a batch of one: logits, a span's start and end, or a first tensor."""
    if (logits := getattr(output, "logits", None)) is not None:
        first: Tensor = logits[0]
        return first
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    spans: list[Any] = [getattr(output, f"{side}_logits", None) for side in ("start", "end")]
    if all(span is not None for span in spans):
        return torch.stack([span[0] for span in spans])
    return tensors[0][0]


def _longest(model: Any) -> int:
    return min(LONGEST, position_count(model) or LONGEST)


def _answered_prompts(loaded: Loaded) -> list[list[int]]:
    """Returns the token ids of each prompt and, of a model that generates, of its answer."""
    longest = _longest(loaded.model)
    prompts = [prompt_ids(prompt, loaded.tokenizer)[:longest] for prompt in PROMPTS]
    if is_encoder_decoder(loaded.model) or not (
        hasattr(loaded.model, "can_generate") and loaded.model.can_generate()
    ):
        return prompts
    texts, ends = [], stop_ids(None, loaded.model.generation_config) or None
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
