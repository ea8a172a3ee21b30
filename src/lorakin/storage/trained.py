"""Did training reach the adapter? Asked before it is saved, so that nobody keeps an empty file."""

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
    """Checks that the adapter is what it says, and warn of every part that training never reached.

    Raises:
        StateError: a member that acts at optimizer steps never saw one.
    """
    acting = [member.word for member in adapter.method.members if member.acts_at_steps]
    if acting and adapter.is_fresh and not adapter.run.steps:
        raise StateError(
            f"adapter {adapter.name!r} is not saved: {', '.join(acting)} acts at optimizer steps "
            "and never saw one, so this is not what it says. Train with a torch optimizer that "
            "holds the adapter's tensors, such as adapter.optimizer(…)"
        )
    for check in CHECKS:
        for message in check(adapter):
            warnings.warn(message, LorakinWarning, stacklevel=3)


def untrained_members(adapter: InsertedAdapter) -> Iterator[str]:
    """What the members say themselves, such as an allocator that was not through."""
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
    """PEFT's files have no place for buffers of the base that training moved."""
    if moved := sorted(adapter.tensors.moved_buffers()):
        yield (
            f"training moved buffers of the base ({some(moved)}). They are saved beside adapter "
            f"{adapter.name!r}, in a file that lorakin reads and PEFT does not. For PEFT, train "
            "the modules that own them whole, with modules_to_save"
        )


def unmoved_whole_modules(adapter: InsertedAdapter) -> Iterator[str]:
    """Modules that are trained whole are no longer the base's."""
    still = [path for path in adapter.placement.whole_modules if _is_the_bases(adapter, path)]
    if _was_trained_here(adapter) and still:
        yield (
            f"adapter {adapter.name!r} trains {', '.join(still)} whole, but it is exactly the "
            "base's: training never reached it"
        )


def unmoved_token_rows(adapter: InsertedAdapter) -> Iterator[str]:
    """Token rows are no longer the base's."""
    if not _was_trained_here(adapter):
        return
    for path, rows in base_rows(adapter.model, adapter.placement.tokens).items():
        same = (adapter.tensors.rows_at(path).to(rows) == rows).all(1).tolist()
        ids = adapter.placement.tokens[path].ids
        if still := [str(n) for n, unmoved in zip(ids, same, strict=True) if unmoved]:
            yield (
                f"adapter {adapter.name!r} trains rows of {path} that are exactly the base's: "
                f"training never met the tokens {some(still)}"
            )


def unmoved_biases(adapter: InsertedAdapter) -> Iterator[str]:
    """At least one bias is no longer the base's."""
    own = adapter.tensors.biases() if _was_trained_here(adapter) else {}
    if own and all(_is_the_bases_bias(adapter, path, bias) for path, bias in own.items()):
        named = some(f"the bias of {path}" for path in own)
        yield (
            f"adapter {adapter.name!r} trains {named}, but each is exactly the base's: training "
            "never reached them"
        )


def unmoved_modules(adapter: InsertedAdapter) -> Iterator[str]:
    """Each module's tensors are no longer at their start."""
    rules = adapter.run.rules or ()
    reached = [
        p
        for p in adapter.run.adapted_modules()
        if not any(rule.took_all_ranks(p) for rule in rules)
    ]
    still = [place.path for place in reached if _changes_nothing(adapter, place.path)]
    if still:
        count = len(adapter.placement.methods)
        share = "every module" if len(still) == count else f"{len(still)} of {count} modules"
        yield (
            f"adapter {adapter.name!r} changes nothing in {share} ({still[0]}, …): the change is "
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
"""Each yields what to warn of."""


def _was_trained_here(adapter: InsertedAdapter) -> bool:
    """Whether the adapter was made and trained in this process, so that its start is known."""
    return adapter.is_fresh and bool(adapter.run.steps)


def _is_the_bases(adapter: InsertedAdapter, path: str) -> bool:
    base = module_at(adapter.model, path).state_dict()
    own = adapter.tensors.copy_of(path).state_dict()
    return all(torch.equal(tensor, base[key].to(tensor)) for key, tensor in own.items())


def _is_the_bases_bias(adapter: InsertedAdapter, path: str, bias: Tensor) -> bool:
    base = base_bias(module_at(adapter.model, path))
    if base is None or base.is_meta or is_sharded(base):
        return False  # the base's is elsewhere, so that nothing can be said
    return torch.equal(bias, base.to(bias))


def _changes_nothing(adapter: InsertedAdapter, path: str) -> bool:
    branch = adapter.tensors.branch(path)
    if not any(slot.trained for slot in branch.slots().values()):
        return False  # it is not meant to move
    bias = adapter.tensors.biases().get(path)
    if bias is not None and not _is_the_bases_bias(adapter, path, bias):
        return False
    there = branch.tensors().values()
    has_numbers = not any(t.is_meta for t in there) and all(t.numel() for t in there if t.dim() > 1)
    return has_numbers and branch.is_at_start
