"""How the tokens of an answer are chosen: the likeliest, or drawn; and where an answer is cut."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from lorakin.errors import SettingError

COOLEST, HOTTEST = 1e-4, 1e4
"""Beyond these temperatures, logits divided by them are infinite in float16, or all the same."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of answers.

    >>> Sampling(temperature=0.7, stop=["Question:"]).cut("Paris. Question: and Rome?")
    'Paris.'

    Attributes:
        max_new_tokens: tokens of the longest answer.
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn.
        top_p: draws only from the likeliest tokens that have this probability together.
        seed: of the draws.
        stop: texts that end an answer; they are not part of it.

    Raises:
        SettingError: a value outside its range, or a `top_p` without a temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")
        if self.temperature != 0 and not COOLEST <= self.temperature <= HOTTEST:
            raise SettingError(
                f"temperature must be 0, or from {COOLEST:g} to {HOTTEST:g}, "
                f"not {self.temperature!r}"
            )
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.top_p < 1 and self.temperature == 0:
            raise SettingError(
                f"top_p={self.top_p:g} does nothing at temperature 0, which takes the likeliest "
                "token; give a temperature too"
            )
        if "" in self.stop:
            raise SettingError("stop is an empty text, which would end every answer at once")

    def processors(self, numbers: Sequence[int]) -> list[transformers.LogitsProcessor]:
        """Returns what changes the logits of a batch so that their largest is the drawn token.

        Args:
            numbers: of the rows of the batch; a row's draws depend on its number and the seed.
        """
        if self.temperature == 0:
            return []
        warpers = [transformers.TemperatureLogitsWarper(self.temperature)]
        if self.top_p < 1:
            warpers.append(transformers.TopPLogitsWarper(self.top_p))
        return [*warpers, GumbelNoise(self.seed, numbers)]

    def cut(self, text: str, *more_stops: str) -> str:
        """Returns an answer up to the first stop text, without blanks around it."""
        found = [text.find(stop) for stop in (*self.stop, *more_stops)]
        return text[: min((place for place in found if place >= 0), default=None)].strip()


class GumbelNoise(transformers.LogitsProcessor):
    """Adds Gumbel noise to logits: the largest sum is a draw from their softmax.

    Every row has a generator of its own, so its draws do not depend on the other rows of the batch,
    as those of torch.multinomial do. The Gumbel-max trick: Gumbel, Statistical Theory of Extreme
    Values, 1954; Maddison et al., A* Sampling, arXiv 1411.0030.
    """

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        # Python hashes the text, so that neighbouring numbers have unrelated streams.
        self.seeds = [random.Random(f"{seed} {number}").getrandbits(63) for number in numbers]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores, (batch, vocabulary), with noise."""
        # The smallest exponentials decide, and those are coarse in float32. MPS has no float64.
        device = torch.device("cpu") if scores.device.type == "mps" else scores.device
        if not self.generators:
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in self.seeds]
        exponential = torch.empty(scores.shape, dtype=torch.float64, device=device)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential.log_().to(scores)
