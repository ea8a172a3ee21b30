"""The survey's claims, each with the paper's figure and a judge of the study's evidence on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.claims.judges import (
    ELSEWHERE,
    SAVES,
    Judge,
    below,
    better,
    correlations,
    equal,
    on_par,
    ranks_moved,
    share_of,
    sooner,
)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A claim.

    Attributes:
        member: the member that it is about.
        claim: in our words.
        paper: the paper's figure and setting.
        measured: returns what was measured and the verdict.
    """

    member: str
    claim: str
    paper: str
    measured: Judge


STATEMENTS: Sequence[Statement] = (
    Statement("lora", "LoRA is on par with training the same layers whole", "RoBERTa-base on GLUE: 86.6 and 85.2", on_par("lora", "full")),
    Statement("lora+", "LoRA+ is better than LoRA", "1–2 % (abstract)", better("lora+")),
    Statement("lora+", "LoRA+ needs at most two thirds of LoRA's steps (both under a rate that falls to 0)", "up to about 2× (abstract)", sooner("lora+", 1.5)),
    Statement("lora+", "LoRA+ is LoRA with alpha × 16 (theory: Adam, no clipping, one rate)", "none", equal("lora+", "lora-alpha-x16")),
    Statement("vera", "VeRA trains 97 % fewer parameters", "GPT-3, rank 16: 3.1 % are left", share_of("vera", "trained", 0.031, ELSEWHERE)),
    Statement("vera", "VeRA is slightly below LoRA", "GLUE: 85.2 and 86.6; E2E: ahead", below("vera")),
    Statement("vera", "VeRA is better than LoRA with as many parameters", "none", better("vera", "lora-few")),
    Statement("lora-fa", "LoRA-FA trains half of LoRA's parameters", "half", share_of("lora-fa", "trained", 0.505, ELSEWHERE)),
    Statement("lora-fa", "LoRA-FA is on par with LoRA", "on par", on_par("lora-fa")),
    Statement("lora-fa", "LoRA-FA needs less memory (at most 0.95 ×)", "up to 1.4× less", share_of("lora-fa", "memory", SAVES)),
    Statement("lora-drop", "LoRA-drop keeps half of the modules and is on par", "on par at about 50 %", on_par("lora-drop")),
    Statement("lora-drop", "LoRA-drop takes less time (at most 0.95 ×)", "much less (third parties)", share_of("lora-drop", "time", SAVES)),
    Statement("lora-drop", "The modules it chooses are better than random ones", "better", better("lora-drop", "lora-drop-random-1", "lora-drop-random-2")),
    Statement("adalora", "AdaLoRA is better than LoRA at one final budget", "better", better("adalora")),
    Statement("adalora", "AdaLoRA gives more rank to FFN layers, and to upper layers", "both (figure 3)", ranks_moved),
    Statement("dora", "DoRA is better than LoRA", "LLaMA-7B: 78.4 and 74.7 (76.3 in the authors' later list)", better("dora")),
    Statement("dora", "DoRA at half of LoRA's rank is better than LoRA", "LLaMA-7B: 77.5 and 74.7", better("dora-half-rank")),
    Statement("dora", "LoRA's ΔM and ΔD of query weights go together, and not those of full training (full / LoRA / DoRA)", "−0.62 / +0.83 / −0.31", correlations("q", lambda full, plain, split: full < 0 < plain)),
    Statement("dora", "DoRA's are more like those of full training than LoRA's are", "−0.62 / +0.83 / −0.31", correlations("q", lambda full, plain, split: abs(split - full) < abs(plain - full))),
    Statement("delta-lora", "Delta-LoRA is better than LoRA", "better", better("delta-lora")),
    Statement("delta-lora", "Delta-LoRA is LoRA with alpha × 3 (theory: Adam, no clipping, K = 0; here K is a quarter of the steps)", "none", equal("delta-lora", "lora-alpha-x3")),
    Statement("pissa", "PiSSA is better than LoRA", "better", better("pissa")),
    Statement("olora", "OLoRA is better than LoRA", "better", better("olora")),
    Statement("lora-xs", "LoRA-XS is on par with LoRA", "on par", on_par("lora-xs")),
    Statement("eva", "EVA is better than LoRA", "better", better("eva")),
    Statement("lora-ga", "LoRA-GA is better than LoRA", "better", better("lora-ga")),
)  # fmt: skip
