"""The cross-entropy of a frozen head, in blocks of logits; the whole logits are never there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakin.kernels.autograd import backward_once
from lorakin.kernels.liger_operators import fit

BLOCK_OF_LOGITS = {"cpu": 1 << 22}
"""How many logits are computed at a time, of at least `ROWS` tokens, by the type of the device."""
BLOCK_ELSEWHERE = 1 << 26
"""For a GPU, to which small blocks are as dear as large ones; 256 MiB in float32."""
ROWS = 32


def summed_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, ignored: int) -> Tensor:
    """Computes Σ −log softmax(W h)_target over the tokens whose target is not `ignored`.

    On a GPU with Liger's kernel, where it is installed.

    Args:
        hidden: h, (tokens, inputs).
        weight: W, (vocabulary, inputs), which is frozen.
        target: (tokens,), int64.
        ignored: the target of tokens that do not count.

    Returns:
        (), in float32 at least.

    >>> summed_cross_entropy(torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([0, 3, -1]), -1)
    tensor(2.7726)
    """
    if not fit(hidden, weight):
        return CrossEntropy.apply(hidden, weight, target, ignored)  # type: ignore[no-untyped-call, no-any-return]
    # The kernel would read and write outside the logits; no GPU waits for this check.
    torch._assert_async(
        are_targets(target, len(weight), ignored).all(), "a target is not one of the classes"
    )
    return LigerCrossEntropy.apply(hidden, weight, target, ignored)  # type: ignore[no-untyped-call, no-any-return]


def are_targets(target: Tensor, classes: int, ignored: int) -> Tensor:
    """Returns which targets (tokens,) are a class or `ignored`.

    >>> are_targets(torch.tensor([0, 3, 4, -100]), 4, -100)
    tensor([ True,  True, False,  True])
    """
    return ((target >= 0) & (target < classes)) | (target == ignored)


def _rows_of_a_block(hidden: Tensor, weight: Tensor) -> int:
    block = BLOCK_OF_LOGITS.get(hidden.device.type, BLOCK_ELSEWHERE)
    return max(ROWS, block // len(weight))


class CrossEntropy(torch.autograd.Function):
    """Σ −log softmax(W h)_target over the tokens whose target is not `ignored`.

    h is (tokens, inputs) and W (vocabulary, inputs), which is frozen. Logits have the dtype of h,
    the softmax is in float32. Only the gradient of h is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ignored: int) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows, left_out = _rows_of_a_block(hidden, weight), (target == ignored).unsqueeze(1)

        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.T).to(wide)
            classes = target[part].unsqueeze(1).masked_fill(left_out[part], 0)
            of_target, largest = logits.gather(1, classes), logits.amax(-1, keepdim=True)
            shares = logits.sub_(largest).exp_()
            total_share = shares.sum(-1, keepdim=True)
            total += (largest + total_share.log() - of_target).masked_fill_(left_out[part], 0).sum()
            if gradient is not None:
                # softmax − one-hot, times W
                shares.div_(total_share).scatter_add_(1, classes, torch.full_like(total_share, -1))
                shares.masked_fill_(left_out[part], 0)
                torch.mm(shares.to(weight.dtype), weight, out=gradient[part])

        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.to(grad.dtype) * grad).to(gradient.dtype), None, None, None


class LigerCrossEntropy(torch.autograd.Function):
    """What `CrossEntropy` computes, three kernels for a block; logits are only in the dtype of h.

    Liger's kernel reads the logits and writes softmax − one-hot over them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ignored: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        rows, target = _rows_of_a_block(hidden, weight), target.contiguous()

        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.T
            torch.ops.lorakin.softmax_less_target(logits, target[part], losses[part], ignored)
            torch.mm(logits, weight, out=gradient[part])

        ctx.save_for_backward(gradient)
        return losses.sum()

    backward = CrossEntropy.backward
