"""The head of a model: which modules it is, and whether it looks untrained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorakin.inject import layer_kinds
from lorakin.inject.attachments import adapter_prefixes
from lorakin.inject.patterns import is_inside


def head_of(model: nn.Module) -> list[str]:
    """Returns the paths of the model's head.

    That is what a transformers model holds outside its `base_model`, and its output embeddings.
    """
    paths = []
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        in_base_model = {id(module) for module in base.modules()}
        paths = [path for path, m in model.named_modules() if path and id(m) not in in_base_model]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    paths += [path for path, module in model.named_modules() if module is output]

    skip = adapter_prefixes(model)
    of_base = (path for path in dict.fromkeys(paths) if not f"{path}.".startswith(skip))
    return [path for path in of_base if any(True for _ in model.get_submodule(path).parameters())]


def new_heads(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """Returns the paths of a task's heads that look untrained, and that no adapter trains.

    A new linear layer has a bias of zeros; without a bias nobody can tell. The output embedding of
    a language model is not such a head: it comes with the model.

    Args:
        model: the base.
        adapted: paths that adapters are on.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return []
    adapted = tuple(adapted)
    heads = [
        path for path in head_of(model) if not layer_kinds.is_container(model.get_submodule(path))
    ]
    untrained = []
    for path in heads:
        if is_inside(path, [other for other in heads if other != path]):
            continue
        linear = [m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)]
        biases = [m.bias for m in linear if m.bias is not None and not m.bias.is_meta]
        trained = any(is_inside(path, [root]) or is_inside(root, [path]) for root in adapted)
        if linear and not trained and not any(bool(bias.any()) for bias in biases):
            untrained.append(path)
    return untrained
