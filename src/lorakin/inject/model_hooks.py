"""The hooks of an adapted model around its forward.

Before each forward they check that no other thread has chosen other adapters, and that the adapted
modules are still in place. Before a training forward they let gradients pass checkpointed parts,
and adapters prepare for several processes.
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
from lorakin.kernels.autograd import is_capturing

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter

FUNCTION = "_gradient_checkpointing_func"
"""The attribute where transformers keeps the function with which a module checkpoints its parts."""


class ModelHooks:
    """The forward hooks of an adapted model; the object itself is the pre-hook."""

    def __init__(self, model: nn.Module, adapters: dict[str, InsertedAdapter]) -> None:
        self.adapters = adapters
        self.checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.watched: list[tuple[nn.Module, str, nn.Module, str]] = []
        self.pre_hook = model.register_forward_pre_hook(self)
        self.post_hook = model.register_forward_hook(self.end_of_forward, always_call=True)
        self.first_forward_hook: Any = model.register_forward_hook(
            self.after_first, with_kwargs=True
        )

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self.pre_hook.remove()
        self.post_hook.remove()
        if self.first_forward_hook is not None:
            self.first_forward_hook.remove()

    def after_first(self, model: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Makes sure that a gradient can come back from the first training forward.

        An autograd function that runs layers itself, as Reformer's reversible layers do, needs a
        gradient only if its input does. Behind a frozen embedding it does not. Then the embedding's
        output is made to need one, and the forward is run again. This draws new random numbers for
        dropout, in this one forward.
        """
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return None
        trains = (
            any(True for _ in adapter.tensors.trained())
            for adapter in self.adapters.values()
            if adapter.effect.is_active
        )
        if not any(trains):
            return None
        self.first_forward_hook.remove()
        self.first_forward_hook = None
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        if not tensors or any(tensor.requires_grad for tensor in tensors):
            return None
        embedding = _or_none(getattr(model, "get_input_embeddings", lambda: None))
        if embedding is None:
            return None
        embedding.register_forward_hook(_needs_gradient)
        return model.forward(*args, **kwargs)

    def watch(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Remembers the modules at these paths, to check before each forward that they stay."""
        places = (path.rpartition(".")[::2] for path in dict.fromkeys(paths) if path)
        parents = (
            (model.get_submodule(owner), leaf, f"{owner}.{leaf}".lstrip("."))
            for owner, leaf in places
        )
        self.watched = [
            (parent, leaf, parent._modules[leaf], path)  # type: ignore[misc]
            for parent, leaf, path in parents
        ]

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        threads.begin_forward(model)
        for parent, leaf, module, path in self.watched:
            if parent._modules.get(leaf) is not module:
                raise StateError(exchanged_message(path))
        for adapter in self.adapters.values():
            if adapter.effect.is_active:
                adapter.cast.begin()
        if not (model.training and torch.is_grad_enabled()):
            return
        for module in self.checkpointing:
            if module.gradient_checkpointing:
                _let_gradients_pass(module)
        captured = is_capturing()
        for adapter in self.adapters.values():
            adapter.run.before_backward()
            if captured and adapter.effect.is_active:
                adapter.run.is_captured()

    def end_of_forward(self, model: nn.Module, args: Any, out: Any) -> None:
        """Ends what `__call__` began; a hook that also runs after a forward that failed."""
        if torch.compiler.is_compiling():
            return
        threads.end_forward(model)
        for adapter in self.adapters.values():
            adapter.cast.end()


def _or_none(get_embedding: Callable[[], Any]) -> Any:
    """Returns the model's input embedding; None if its class says that it has none."""
    try:
        return get_embedding()
    except NotImplementedError:
        return None


def _needs_gradient(module: nn.Module, args: Any, out: Any) -> None:
    """Makes the output need a gradient while somebody trains; a forward hook."""
    if torch.is_grad_enabled() and isinstance(out, Tensor) and not out.requires_grad:
        out.requires_grad_(True)


def exchanged_message(path: str) -> str:
    """Returns the message for a path that holds another module than the one that was adapted."""
    return (
        f"{path} is no longer the module that was adapted: something, such as "
        "resize_token_embeddings, put another in its place. Do that before you adapt the model; "
        "here, remove the adapter and adapt again"
    )


def _let_gradients_pass(module: Any) -> None:
    """Lets gradients pass a module that uses re-entrant checkpoints although its inputs need none.

    torch's re-entrant checkpoint skips a part if none of its inputs needs a gradient. Behind
    a frozen embedding none does, even if something trains in the part.
    """
    checkpoint: Callable[..., Any] | None = getattr(module, FUNCTION, None)
    if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"):
        setattr(module, FUNCTION, functools.partial(_checkpointed, checkpoint))


def _checkpointed(checkpoint: Callable[..., Any], part: Callable[..., Any], *args: Any) -> Any:
    """Runs `checkpoint(part, *args)` with an input that needs a gradient, if no arg does."""
    if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return checkpoint(part, *args)
    dummy = torch.zeros((), requires_grad=True)
    return checkpoint(lambda _, *given: part(*given), dummy, *args)
