"""Checks before an adapter is saved that training reached all of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorakin.errors import LorakinWarning, StateError, some
from lorakin.family.sharding import is_sharded
from lorakin.inject.adapted import module_at
from lorakin.inject.biases import base_bias
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.trainable_tokens import base_rows


def check_trained(adapter: InsertedAdapter) -> None:
    """Checks that the adapter was trained, and warns of every part that training never reached.

    Raises:
        StateError: a member that acts at optimizer steps never saw one.
    """
    acting = [member.word for member in adapter.method.members if member.acts_at_steps]
    if acting and adapter.is_fresh and not adapter.run.steps:
        raise StateError(
            f"adapter {adapter.name!r} is not saved: {', '.join(acting)} acts at optimizer steps "
            "and never saw one. Train with a torch optimizer that holds the adapter's tensors, "
            "such as adapter.optimizer(…)"
        )
    for check in CHECKS:
        for message in check(adapter):
            warnings.warn(message, LorakinWarning, stacklevel=3)


def untrained_members(adapter: InsertedAdapter) -> Iterator[str]:
    """Yields the members' own reasons, such as a rank allocation that did not finish."""
    reasons = [
        reason for rule in adapter.run.rules or () if (reason := rule.unfinished(adapter.run.steps))
    ]
    for reason in (*reasons, *adapter.method.unmoved(adapter.run.adapted_modules())):
        yield f"adapter {adapter.name!r}: {reason}"


def unsaved_scale(adapter: InsertedAdapter) -> Iterator[str]:
    """Yields a warning of the scale that `adapter.effect.scale` set, which files do not hold."""
    if adapter.effect.scale != 1:
        yield (
            f"files hold no scale: adapter {adapter.name!r} is saved as it is at scale 1, and not "
            f"at {adapter.effect.scale:g}. For files of the scaled change, save what "
            "lorakin.as_lora makes of it"
        )


def moved_buffers(adapter: InsertedAdapter) -> Iterator[str]:
    """Yields a warning of buffers that training changed; PEFT's files have no place for them."""
    if moved := sorted(adapter.tensors.moved_buffers()):
        yield (
            f"training changed buffers of the base ({some(moved)}). They are saved beside adapter "
            f"{adapter.name!r}, in a file that lorakin reads and PEFT does not. For PEFT, train "
            "the modules that own them whole, with modules_to_save"
        )


def unmoved_whole_modules(adapter: InsertedAdapter) -> Iterator[str]:
    """Yields a warning of modules that are trained whole and still equal the base's."""
    unmoved = [
        path for path in adapter.placement.whole_modules if _equals_base_module(adapter, path)
    ]
    if _was_trained_here(adapter) and unmoved:
        yield (
            f"adapter {adapter.name!r} trains {', '.join(unmoved)} whole, but it is exactly the "
            "base's: training never reached it"
        )


def unmoved_token_rows(adapter: InsertedAdapter) -> Iterator[str]:
    """Yields a warning of token rows that still equal the base's."""
    if not _was_trained_here(adapter):
        return
    for path, rows in base_rows(adapter.model, adapter.placement.tokens).items():
        equal = (adapter.tensors.rows_at(path).to(rows) == rows).all(1).tolist()
        ids = adapter.placement.tokens[path].ids
        if unmoved := [str(n) for n, is_equal in zip(ids, equal, strict=True) if is_equal]:
            yield (
                f"adapter {adapter.name!r} trains rows of {path} that are exactly the base's: "
                f"training never saw the tokens {some(unmoved)}"
            )


def unmoved_biases(adapter: InsertedAdapter) -> Iterator[str]:
    """Yields a warning if all biases still equal the base's."""
    biases = adapter.tensors.biases() if _was_trained_here(adapter) else {}
    if biases and all(_equals_base_bias(adapter, path, b) for path, b in biases.items()):
        named = some(f"the bias of {path}" for path in biases)
        yield (
            f"adapter {adapter.name!r} trains {named}, but each is exactly the base's: training "
            "never reached them"
        )


def unmoved_modules(adapter: InsertedAdapter) -> Iterator[str]:
    """Yields a warning of modules whose tensors are still at their start."""
    rules = adapter.run.rules or ()
    unmoved = [
        module.path
        for module in adapter.run.adapted_modules()
        if not any(rule.took_all_ranks(module) for rule in rules)
        and _changes_nothing(adapter, module.path)
    ]
    if unmoved:
        count = len(adapter.placement.methods)
        share = "every module" if len(unmoved) == count else f"{len(unmoved)} of {count} modules"
        yield (
            f"adapter {adapter.name!r} changes nothing in {share} ({unmoved[0]}, …): the change is "
            "exactly zero there, so training never reached it"
        )


CHECKS: tuple[Callable[[InsertedAdapter], Iterator[str]], ...] = (
    untrained_members,
    unsaved_scale,
    moved_buffers,
    unmoved_whole_modules,
    unmoved_token_rows,
    unmoved_biases,
    unmoved_modules,
)
"""Each yields the texts of its warnings."""


def _was_trained_here(adapter: InsertedAdapter) -> bool:
    """Returns whether the adapter was made and trained in this process; then its start is known."""
    return adapter.is_fresh and bool(adapter.run.steps)


def _equals_base_module(adapter: InsertedAdapter, path: str) -> bool:
    base = module_at(adapter.model, path).state_dict()
    trained = adapter.tensors.copy_of(path).state_dict()
    return all(torch.equal(tensor, base[key].to(tensor)) for key, tensor in trained.items())


def _equals_base_bias(adapter: InsertedAdapter, path: str, bias: Tensor) -> bool:
    base = base_bias(module_at(adapter.model, path))
    if base is None or base.is_meta or is_sharded(base):
        return False  # its values are not in this process, so they cannot be compared
    return torch.equal(bias, base.to(bias))


def _changes_nothing(adapter: InsertedAdapter, path: str) -> bool:
    branch = adapter.tensors.branch(path)
    if not any(slot.trained for slot in branch.slots().values()):
        return False  # nothing is meant to train
    bias = adapter.tensors.biases().get(path)
    if bias is not None and not _equals_base_bias(adapter, path, bias):
        return False
    tensors = branch.tensors().values()
    has_values = not any(t.is_meta for t in tensors)
    has_rank = all(t.numel() for t in tensors if t.dim() > 1)
    return has_values and has_rank and branch.is_at_start
