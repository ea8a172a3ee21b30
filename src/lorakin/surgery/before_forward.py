"""What an adapted model does before each forward of its own: two things that nobody else can know.

Whether several processes train it is known once they are there, at the first training forward; and
how it checkpoints activations, which a Trainer decides when training begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorakin.surgery.graft import Graft

FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps the function with which a module checkpoints its parts."""


class BeforeForward:
    """The forward pre-hook of an adapted model's root."""

    def __init__(self, model: nn.Module, grafts: dict[str, Graft]) -> None:
        self.grafts = grafts
        self.checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        for module in self.checkpointing:
            if module.gradient_checkpointing:
                _let_gradients_pass(module)
        for graft in self.grafts.values():
            graft.average_if_several()


def _let_gradients_pass(module: Any) -> None:
    """Let a module that checkpoints in the re-entrant way give gradients also without any in its inputs.

    torch's re-entrant checkpoint only looks at a part whose inputs need gradients. Behind a frozen
    embedding none does, however much is trained in the part.
    """
    checkpoint: Callable[..., Any] | None = getattr(module, FUNCTION, None)
    if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"):
        setattr(module, FUNCTION, functools.partial(_checkpointed, checkpoint))


def _checkpointed(checkpoint: Callable[..., Any], part: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint(part, *args)`, with one more input that needs a gradient if none of `args` does."""
    if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return checkpoint(part, *args)
    dummy = torch.zeros((), requires_grad=True)
    return checkpoint(lambda _, *given: part(*given), dummy, *args)
