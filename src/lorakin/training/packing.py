"""Several rows in one sequence: where each goes, and the check that a model keeps them apart.

Position ids begin at 0 with each row. Without an attention mask, transformers makes of them the
mask in which no row sees another (`transformers.masking_utils`), for models that use it.
"""

from __future__ import annotations

import bisect
import collections
import inspect
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.inject.module_mode import in_mode
from lorakin.training.batches import Row
from lorakin.training.token_labels import IGNORED

if TYPE_CHECKING:
    from lorakin.training.tasks import Task

LENGTHS = (7, 9)
"""Tokens of the two rows on which a model is tried."""


def packed(rows: Sequence[Row], length: int, seed: int) -> list[Row]:
    """Returns sequences of up to `length` tokens that hold all rows, each row whole.

    >>> rows = [{"input_ids": [n] * n, "labels": [n] * n} for n in (3, 4, 1)]
    >>> sequences = packed(rows, length=4, seed=0)
    >>> [sequence["input_ids"] for sequence in sequences]
    [[4, 4, 4, 4], [3, 3, 3, 1]]
    >>> sequences[1]["position_ids"], sequences[1]["labels"]
    ([0, 1, 2, 0], [-100, 3, 3, -100])

    Args:
        rows: tokenised rows of at most `length` tokens.
        length: tokens of a sequence.
        seed: mixes the rows, so that rows that stand beside each other in the data are not put
            together.
    """
    mixed = list(rows)
    random.Random(seed).shuffle(mixed)
    places = best_fit([len(row["input_ids"]) for row in mixed], length)
    return [joined([mixed[place] for place in sequence]) for sequence in places]


def best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Returns which rows each sequence holds: the longest first, each where it leaves least space.

    >>> best_fit([3, 4, 1], length=4)
    [[1], [0, 2]]

    Args:
        lengths: each row's number of tokens, at most `length`.
        length: tokens of a sequence.
    """
    sequences: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = collections.defaultdict(list)
    spaces: list[int] = []  # those that some sequence has, in order
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect.bisect_left(spaces, lengths[place])
        if at == len(spaces):
            space, sequence = length, list[int]()
            sequences.append(sequence)
        else:
            space = spaces[at]
            sequence = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(at)
        sequence.append(place)
        space -= lengths[place]
        if not with_space[space]:
            bisect.insort(spaces, space)
        with_space[space].append(sequence)
    return sequences


def joined(rows: Sequence[Row]) -> Row:
    """Returns rows as one, in which each begins at position 0 and none predicts the next."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
        "position_ids": [at for row in rows for at in range(len(row["input_ids"]))],
    }


def check_task(task: Task | type[Task]) -> None:
    """Checks that several rows of a task can share a sequence.

    Raises:
        SettingError: they cannot.
    """
    if not task.packs:
        raise SettingError(
            f"--packing puts several rows into a sequence, and with task {task.word} each row has "
            "a sequence of its own; leave it out; --group-by-length saves padding, too"
        )


def check(model: Any, collate: Callable[[Sequence[Row]], dict[str, Tensor]], name: str) -> None:
    """Tries on two rows of random tokens that the model reads packed rows as if each stood alone.

    Their logits must be those of each alone, up to what padding changes by rounding, and the
    derivative of the second row's logits by the first row's embeddings must be exactly zero.

    Args:
        model: a causal language model of transformers.
        collate: makes a batch of rows, packed or not.
        name: what an error calls the model.

    Raises:
        SettingError: they are not.
    """
    advice = "leave --packing out; --group-by-length saves padding, too"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise SettingError(
            f"--packing needs a model that takes position_ids, by which it tells rows apart, and "
            f"{name} (a {type(model).__name__}) takes none; {advice}"
        )
    # As the Trainer sets it: with a cache, transformers makes no mask of position ids.
    model.config.use_cache = False
    chance = torch.Generator().manual_seed(0)
    tokens = model.get_input_embeddings().weight.shape[0]
    drawn = [torch.randint(tokens, (n,), generator=chance).tolist() for n in LENGTHS]
    rows = [_learned(ids) for ids in drawn]
    long = _learned([*drawn[0], *drawn[1]])

    with in_mode(model, training=False):
        alone = [_logits(model, collate([row]))[0] for row in rows]
        padded = _logits(model, collate([*rows, long]))
        both, leak = _logits_and_leak(model, collate([joined(rows), joined(rows[::-1])]))
    first, second = LENGTHS
    rounding = max(_apart(padded[n, : len(row)], row) for n, row in enumerate(alone))
    error = max(
        _apart(both[0, :first], alone[0]), _apart(both[0, first:], alone[1]),
        _apart(both[1, :second], alone[1]), _apart(both[1, second:], alone[0]),
    )  # fmt: skip
    # Written so that NaN is refused, too.
    if not (leak == 0 and error <= 3 * rounding + 4 * torch.finfo(both.dtype).eps):
        how = "the second of two rows sees the first"
        if leak == 0:
            how = (
                f"their logits are {error:.1%} off those of each alone ({rounding:.1%} by rounding)"
            )
        raise SettingError(
            f"--packing: {name} (a {type(model).__name__}) does not keep rows of a sequence apart: "
            f"{how}; {advice}"
        )


def _learned(ids: list[int]) -> Row:
    return {"input_ids": ids, "labels": ids}


def _inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    aside = ("labels", "logits_to_keep")
    return {key: tensor.to(model.device) for key, tensor in batch.items() if key not in aside}


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**_inputs(model, batch)).logits[:]
    return logits


def _logits_and_leak(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Returns the logits of packed rows, and how much the second row's depend on the first."""
    embedded: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = model(**_inputs(model, batch)).logits[:]
    finally:
        hook.remove()
    seconds = [(n, length) for n, length in enumerate(LENGTHS)]
    # Scaled, since the gradients of a float16 model would overflow.
    total = sum(logits[n, at:].float().pow(2).mean().sqrt() for n, at in seconds)
    (gradient,) = torch.autograd.grad(total, embedded[-1])
    leak = max(float(gradient[n, :at].abs().max()) for n, at in seconds)
    return logits.detach(), leak


def _apart(found: Tensor, right: Tensor) -> float:
    """Returns how far logits are from others, by the size of the others around their mean."""
    found, right = found.float(), right.float()
    return float((found - right).norm() / (right - right.mean(-1, keepdim=True)).norm())
