"""Parameters that several modules share, such as embedding and head, when merging separates them.

A merged module has a weight of its own; what shared the base's keeps that. transformers writes a
shared tensor once, and when it loads it ties what `_tied_weights_keys` names and the files lack.
So, as long as a tie is separated, each of its modules has its own tensor, which is written, and
the config says that nothing is tied.

That has two complications. Whatever else that config ties (the bias of a masked head) must be
written too. And some configs cannot say it: the class ties always (T5), or a forward reads the flag
(UMT5). transformers 5 then loads tensors apart that have different values in the files.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakin.errors import LorakinWarning
from lorakin.inject.attachments import adapter_prefixes

FLAG = "tie_word_embeddings"
ParameterAt = tuple[nn.Module, str]
"""A module, and the name of one of its own parameters."""


@dataclasses.dataclass(frozen=True)
class TyingConfig:
    """A part of a transformers model whose config ties parameters.

    `configs` are its own and its text model's; `names` are the tied parameters.
    """

    configs: tuple[Any, ...]
    names: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Separation:
    """What follows if some parameters are no longer tied; nothing, if no config ties them.

    Attributes:
        separated: the parameters.
        names: those that need tensors of their own in a file.
        configs: the configs that must say that nothing is tied.
        cannot_say: the parts whose configs cannot say it.
    """

    separated: frozenset[str]
    names: frozenset[str]
    configs: list[Any]
    cannot_say: list[TyingConfig]

    @classmethod
    def of(cls, model: nn.Module, separated: Iterable[str]) -> Separation:
        """Returns what follows in a model that is still tied, or was when it was made.

        `separated` are all names of each tie.
        """
        separated = frozenset(separated)
        concerned = [tying for tying in _tying_configs(model) if tying.names & separated]
        can_say = [tying for tying in concerned if _can_untie(model, tying)]
        names = separated.union(*(tying.names for tying in can_say)) if concerned else frozenset()
        configs = [config for tying in can_say for config in tying.configs]
        return cls(separated, names, configs, [g for g in concerned if g not in can_say])

    def announce(self, stacklevel: int) -> None:
        """Warns of what a config cannot say."""
        for tying in self.cannot_say:
            warnings.warn(
                f"{', '.join(sorted(tying.names & self.separated))} were one weight, and merging "
                "an adapter of one of them has separated them, which a "
                f"{type(tying.configs[0]).__name__} cannot say. Each of them is written, and "
                "transformers 5 loads them so; but tie_weights() and resize_token_embeddings() "
                "would make them one again, as may programs that go by the config",
                LorakinWarning,
                stacklevel=stacklevel + 1,
            )


class Ties:
    """The parameters that were shared in the model, and what separating them has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.groups = groups(model)
        self.copies: list[tuple[ParameterAt, ParameterAt]] = []
        self.untied: list[Any] = []
        self.has_copied_configs = False

    def restore(self) -> None:
        """Undoes `separate`, before other adapters are merged or taken out."""
        for (module, leaf), (keeper, kept) in self.copies:
            setattr(module, leaf, getattr(keeper, kept))
        for config in self.untied:
            setattr(config, FLAG, True)
        self.copies, self.untied = [], []

    def separate(self, model: nn.Module) -> None:
        """Gives each module of a separated tie a tensor of its own, and lets the config say so.

        Warns where the config cannot say so.
        """
        separated = {
            name
            for group in self.groups
            if len({id(_parameter_at(place)) for place in group.values()}) > 1
            for name in group
        }
        if not separated:
            return
        separation = Separation.of(model, separated)
        self._untie(model, separation.configs)
        for group in self.groups:
            if group.keys() & separation.names:
                self.copies += _copied(group)
        separation.announce(stacklevel=6)

    def _untie(self, model: nn.Module, configs: list[Any]) -> None:
        """Lets these configs say that nothing is tied, as copies: the caller may hold them."""
        if configs and not self.has_copied_configs:
            copies, self.has_copied_configs = _copied_configs(model), True
            configs = [copies.get(id(config), config) for config in configs]
        self.untied = [config for config in configs if getattr(config, FLAG, False)]
        for config in self.untied:
            setattr(config, FLAG, False)


def groups(model: nn.Module) -> list[dict[str, ParameterAt]]:
    """Returns the parameters that are one: name → place, one name for each module.

    >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    >>> model["head"].weight = model["embed"].weight
    >>> [list(group) for group in groups(model)]
    [['embed.weight', 'head.weight']]
    """
    by_id: dict[int, dict[str, ParameterAt]] = {}
    skip = adapter_prefixes(model)
    for path, module in model.named_modules():
        if path.startswith(skip):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{leaf}" if path else leaf
                by_id.setdefault(id(parameter), {})[name] = (module, leaf)
    return [group for group in by_id.values() if len(group) > 1]


def _parameter_at(place: ParameterAt) -> Any:
    module, leaf = place
    return module._parameters[leaf]


def _copied(group: dict[str, ParameterAt]) -> list[tuple[ParameterAt, ParameterAt]]:
    """Gives all but the first of those that are one a copy; returns each with its original."""
    keepers: dict[int, ParameterAt] = {}
    copies = []
    for place in group.values():
        parameter = _parameter_at(place)
        keeper = keepers.setdefault(id(parameter), place)
        if keeper is not place:
            setattr(*place, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            copies.append((place, keeper))
    return copies


def _tying_configs(model: nn.Module) -> list[TyingConfig]:
    """Returns the configs in the model that tie something, each with all that it ties."""
    names: dict[int, set[str]] = {}
    configs: dict[int, Any] = {}
    claimed: set[str] = set()
    first = {id(module): path for path, module in reversed(list(model.named_modules()))}
    first_path = {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False)}
    # The innermost parts come first.
    for path, part in reversed(list(model.named_modules())):
        ties = vars(part).get("all_tied_weights_keys") or {}
        pairs = [{_name_in_model(path, name, first_path) for name in pair} for pair in ties.items()]
        new_pairs = [pair for pair in pairs if not pair <= claimed]
        if new_pairs and (config := getattr(part, "config", None)) is not None:
            claimed.update(*new_pairs)
            configs[id(config)] = config
            names.setdefault(id(config), set()).update(*new_pairs)
    return [
        TyingConfig(_with_text(config), frozenset(names[key])) for key, config in configs.items()
    ]


def _name_in_model(path: str, name: str, first_path: dict[str, str]) -> str:
    """Returns the name in the whole model of a parameter of its part at `path`.

    `first_path`: each path of a module → the first path at which the model has that module.
    """
    owner, _, leaf = (f"{path}.{name}" if path else name).rpartition(".")
    owner = first_path.get(owner, owner)
    return f"{owner}.{leaf}" if owner else leaf


def _with_text(config: Any) -> tuple[Any, ...]:
    """Returns a config, and that of its text model if it is another."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (config,) if text is config else (config, text)


def _can_untie(model: nn.Module, tying: TyingConfig) -> bool:
    """Returns whether the config can say "untied", and no forward depends on the flag."""
    config = copy.deepcopy(tying.configs[0])
    for part in _with_text(config):
        setattr(part, FLAG, False)
    as_dict = config.to_dict()
    try:
        if type(config).from_dict(copy.deepcopy(as_dict)).to_dict() != as_dict:
            return False
    # A config of other code may not be what its own dictionary makes.
    except Exception:
        return False
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return not any(_reads_flag(vars(kind)["forward"]) for kind in kinds if "forward" in vars(kind))


def _reads_flag(forward: Any) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and FLAG in code.co_names


def _copied_configs(model: nn.Module) -> dict[int, Any]:
    """Gives the model copies of its parts' configs, which the caller may hold; id → copy."""
    copies: dict[int, Any] = {}
    for module in model.modules():  # the whole model's first: it holds those of its parts
        if hasattr(config := vars(module).get("config"), "to_dict"):
            copy.deepcopy(config, copies)
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if hasattr(value, "to_dict") and id(value) in copies:
                setattr(module, key, copies[id(value)])
    return copies
