"""The first thing in which a saved adapter differs from one in a model, for an error's message."""

from __future__ import annotations

import reprlib
from collections.abc import Collection

from lorakin.family import Method, Modifier
from lorakin.family.agreement import difference
from lorakin.family.member import overrides
from lorakin.inject.placement import Placement


def difference_in_words(saved: Placement, present: Placement, training: bool) -> str | None:
    """Returns the first difference between a saved placement and the one in a model, in words.

    It is None if they agree. What members decide when a run begins makes no difference, nor do
    ranks that were freed since. With `training=False` only what the methods compute is compared.
    """
    return (
        _different_methods(saved, present, training)
        or _different_paths("adapt", saved.methods, present.methods, _from_data(saved.method))
        or _different_paths("train the whole module", saved.whole_modules, present.whole_modules)
        or _different_rows(saved, present)
        or _different_paths("train the bias of", saved.biases, present.biases)
        or _different_order(saved, present)
    )


def _different_methods(saved: Placement, present: Placement, training: bool) -> str | None:
    methods = [
        (f" of {path}", method, present.methods[path])
        for path, method in saved.methods.items()
        if path in present.methods
    ]
    compared: set[tuple[int, int]] = set()
    for of_module, saved_method, method in methods or [("", saved.method, present.method)]:
        # Most modules share one method object.
        if (both := (id(saved_method), id(method))) in compared:
            continue
        compared.add(both)
        found = difference(saved_method, method, training)
        if found is not None and found.setting == "method":
            return f"the method is {found.first} in the files and {found.second} in the model"
        if found is not None:
            hint = _from_data(saved.method) if found.setting in ("rank", "alpha") else ""
            return (
                f"{found.setting}{of_module} is {reprlib.repr(found.first)} in the files and "
                f"{reprlib.repr(found.second)} in the model{hint}"
            )
    return None


def _from_data(method: Method) -> str:
    """Returns a hint if a member of the method chose the ranks from data; else nothing."""
    member: Modifier | None = method.measured_member
    if member is None or not overrides(member, "settings_found"):
        return ""
    return f" ({member.word} chose the ranks from data)"


def _different_paths(
    verb: str, saved: Collection[str], present: Collection[str], hint: str = ""
) -> str | None:
    if only_saved := [path for path in saved if path not in present]:
        return f"the files {verb} {only_saved[0]}, and the adapter in the model does not{hint}"
    if only_present := [path for path in present if path not in saved]:
        return f"the files do not {verb} {only_present[0]}, and the adapter in the model does{hint}"
    return None


def _different_rows(saved: Placement, present: Placement) -> str | None:
    if of_paths := _different_paths("train token rows of", saved.tokens, present.tokens):
        return of_paths
    for path, rows in saved.tokens.items():
        if rows != present.tokens[path]:
            return f"the files train other token rows of {path} than the adapter in the model"
    return None


def _different_order(saved: Placement, present: Placement) -> str | None:
    for saved_paths, paths in (
        (saved.methods, present.methods),
        (saved.whole_modules, present.whole_modules),
        (saved.biases, present.biases),
    ):
        if list(saved_paths) != list(paths):
            return "the files have its modules in another order"
    return None
