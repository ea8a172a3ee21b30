"""What an adapted model does before each forward of its own: four things that are not known before.

Whether another thread has chosen other adapters; whether the adapted modules are still there;
whether several processes train the model, which shows at the first training forward; and how it
checkpoints activations, as a Trainer decides when training begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorakin.errors import StateError
from lorakin.inject import threads

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter

FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps the function with which a module checkpoints its parts."""


class BeforeForward:
    """The forward pre-hook of an adapted model's root."""

    def __init__(self, model: nn.Module, adapters: dict[str, InsertedAdapter]) -> None:
        self.adapters = adapters
        self.checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.held: list[tuple[nn.Module, str, nn.Module, str]] = []
        self.handle = model.register_forward_pre_hook(self)
        self.end = model.register_forward_hook(_through, always_call=True)
        self.first: Any = model.register_forward_hook(self.after_first, with_kwargs=True)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.handle.remove()
        self.end.remove()
        if self.first is not None:
            self.first.remove()

    def after_first(self, model: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """See that a gradient can come back from the first training forward.

        A function of autograd's that runs layers itself, as the reversible layers of Reformer, asks
        for one only if its input needs one. Behind a frozen embedding none does. Then the embedding's
        output is made to need one, and the forward is run again.
        """
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return None
        if not any(
            adapter.merging.is_active and any(True for _ in adapter.tensors.trained())
            for adapter in self.adapters.values()
        ):
            return None
        self.first.remove()
        self.first = None
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        embedding = getattr(model, "get_input_embeddings", lambda: None)
        if (
            not tensors
            or any(t.requires_grad for t in tensors)
            or (words := _or_none(embedding)) is None
        ):
            return None
        words.register_forward_hook(_needs_gradient)
        return model.forward(*args, **kwargs)

    def hold(self, model: nn.Module, paths: Iterable[str]) -> None:
        """See before each forward that the modules at these paths are those that are there now."""
        places = (path.rpartition(".")[::2] for path in dict.fromkeys(paths) if path)
        parents = (
            (model.get_submodule(owner), leaf, f"{owner}.{leaf}".lstrip("."))
            for owner, leaf in places
        )
        self.held = [(parent, leaf, parent._modules[leaf], path) for parent, leaf, path in parents]  # type: ignore[misc]

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        threads.enter(model)
        for parent, leaf, module, path in self.held:
            if parent._modules.get(leaf) is not module:
                raise StateError(exchanged(path))
        if not (model.training and torch.is_grad_enabled()):
            return
        for module in self.checkpointing:
            if module.gradient_checkpointing:
                _let_gradients_pass(module)
        for adapter in self.adapters.values():
            adapter.run.before_backward()


def _through(model: nn.Module, args: Any, out: Any) -> None:
    """Forward hook, also of a forward that failed."""
    if not torch.compiler.is_compiling():
        threads.leave(model)


def _or_none(embedding: Callable[[], Any]) -> Any:
    """The input embedding of a model; None if its class says that it has none."""
    try:
        return embedding()
    except NotImplementedError:
        return None


def _needs_gradient(module: nn.Module, args: Any, out: Any) -> None:
    """Forward hook: the output needs a gradient while somebody trains."""
    if torch.is_grad_enabled() and isinstance(out, Tensor) and not out.requires_grad:
        out.requires_grad_(True)


def exchanged(path: str) -> str:
    """What to say of a path where another module stands than the one that was adapted."""
    return (
        f"{path} is no longer the module that was adapted: something, such as resize_token_embeddings, put another "
        "in its place. Do that before adapting; here, remove the adapter, and adapt again"
    )


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
