"""Parameters that several modules share, such as embedding and head, while merging parts them.

A merged module has a weight of its own; what shared the base's keeps that. transformers writes what
is one tensor once. When it loads, it ties what `_tied_weights_keys` names and the files lack. So, for
as long as a tie is parted, each of its modules has a tensor of its own, which is written, and the
config says that nothing is tied, if a config can say that. What else that config ties (the bias of
a masked head) is then written too. Some cannot say it: the class ties always (T5), or a forward
reads the flag (UMT5). transformers 5 then loads apart what the files hold with different values.
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
from lorakin.inject.attachments import ours

FLAG = "tie_word_embeddings"
Place = tuple[nn.Module, str]
"""A module and the name of a parameter of its own."""


@dataclasses.dataclass(frozen=True)
class Governor:
    """A part of a transformers model whose config ties parameters: its own and its text model's, and the ties' names."""

    configs: tuple[Any, ...]
    names: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Parting:
    """What follows if these parameters of a model are no longer tied.

    `names` need tensors of their own in a file, `configs` are to say that nothing is tied, and the
    configs of `silent` cannot say it. Without a config that ties something, nothing follows.
    """

    parted: frozenset[str]
    names: frozenset[str]
    configs: list[Any]
    silent: list[Governor]

    @classmethod
    def of(cls, model: nn.Module, parted: Iterable[str]) -> Parting:
        """Of a model that is still tied, or was when it was made; `parted` are all names of each tie."""
        parted = frozenset(parted)
        concerned = [governor for governor in _governors(model) if governor.names & parted]
        heard = [governor for governor in concerned if _can_untie(model, governor)]
        names = parted.union(*(governor.names for governor in heard)) if concerned else frozenset()
        configs = [config for governor in heard for config in governor.configs]
        return cls(parted, names, configs, [g for g in concerned if g not in heard])

    def announce(self, stacklevel: int) -> None:
        """Warn of what a config cannot say."""
        for governor in self.silent:
            warnings.warn(
                f"{', '.join(sorted(governor.names & self.parted))} were one weight, and merging an "
                f"adapter of one of them has parted them, which a {type(governor.configs[0]).__name__} "
                "cannot say. Each of them is written, and transformers 5 loads them so; tie_weights() "
                "and resize_token_embeddings() would make them one again, and so may programs that go "
                "by the config",
                LorakinWarning,
                stacklevel=stacklevel + 1,
            )


class Ties:
    """The groups of places that are one parameter in `model`, as it was made, and what parting them has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.groups = groups(model)
        self.copies: list[tuple[Place, Place]] = []
        self.untied: list[Any] = []
        self.has_own_configs = False

    def rejoin(self) -> None:
        """Undo `part`, before other adapters are merged or taken out."""
        for (module, leaf), (keeper, kept) in self.copies:
            setattr(module, leaf, getattr(keeper, kept))
        for config in self.untied:
            setattr(config, FLAG, True)
        self.copies, self.untied = [], []

    def part(self, model: nn.Module) -> None:
        """Give each module of a tie that merging has parted a tensor of its own, and let the config say so.

        Warns where the config cannot say so.
        """
        parted = [
            group for group in self.groups if len({id(_at(place)) for place in group.values()}) > 1
        ]
        if not parted:
            return
        parting = Parting.of(model, {name for group in parted for name in group})
        self._untie(model, parting.configs)
        for group in self.groups:
            if group.keys() & parting.names:
                self.copies += _copied(group)
        parting.announce(stacklevel=6)

    def _untie(self, model: nn.Module, configs: list[Any]) -> None:
        """Let these configs say that nothing is tied; not the caller's own objects, but copies."""
        if configs and not self.has_own_configs:
            copies, self.has_own_configs = _own_configs(model), True
            configs = [copies.get(id(config), config) for config in configs]
        self.untied = [config for config in configs if getattr(config, FLAG, False)]
        for config in self.untied:
            setattr(config, FLAG, False)


def groups(model: nn.Module) -> list[dict[str, Place]]:
    """Name → place of the parameters that are one, without second names of the same module."""
    found: dict[int, dict[str, Place]] = {}
    skip = ours(model)
    for path, module in model.named_modules():
        if path.startswith(skip):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), {})[f"{path}.{leaf}" if path else leaf] = (
                    module,
                    leaf,
                )
    return [group for group in found.values() if len(group) > 1]


def _at(place: Place) -> Any:
    module, leaf = place
    return module._parameters[leaf]


def _copied(group: dict[str, Place]) -> list[tuple[Place, Place]]:
    """Give all but the first of those that are still one a copy; returns each with the one that it was tied to."""
    keepers: dict[int, Place] = {}
    copies = []
    for place in group.values():
        parameter = _at(place)
        keeper = keepers.setdefault(id(parameter), place)
        if keeper is not place:
            setattr(*place, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            copies.append((place, keeper))
    return copies


def _governors(model: nn.Module) -> list[Governor]:
    """The configs in the model that tie something, each with what all the parts tie that go by it."""
    names: dict[int, set[str]] = {}
    configs: dict[int, Any] = {}
    claimed: set[str] = set()
    first = {id(module): path for path, module in reversed(list(model.named_modules()))}
    known = {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False)}
    for path, part in reversed(list(model.named_modules())):  # innermost first
        ties = vars(part).get("all_tied_weights_keys") or {}
        pairs = [{_named(path, name, known) for name in pair} for pair in ties.items()]
        own = [pair for pair in pairs if not pair <= claimed]
        if own and (config := getattr(part, "config", None)) is not None:
            claimed.update(*own)
            configs[id(config)] = config
            names.setdefault(id(config), set()).update(*own)
    return [Governor(_with_text(config), frozenset(names[key])) for key, config in configs.items()]


def _named(path: str, name: str, known: dict[str, str]) -> str:
    """The name in the whole model of a parameter `name` of its part at `path`, by its module's first path."""
    owner, _, leaf = (f"{path}.{name}" if path else name).rpartition(".")
    owner = known.get(owner, owner)
    return f"{owner}.{leaf}" if owner else leaf


def _with_text(config: Any) -> tuple[Any, ...]:
    """A config, and that of its text model if it is another."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (config,) if text is config else (config, text)


def _can_untie(model: nn.Module, governor: Governor) -> bool:
    """Whether a config that says untied is read so, and no forward computes something else by it."""
    config = copy.deepcopy(governor.configs[0])
    for one in _with_text(config):
        setattr(one, FLAG, False)
    said = config.to_dict()
    try:
        if type(config).from_dict(copy.deepcopy(said)).to_dict() != said:
            return False
    except Exception:  # a config of a stranger's that its own dictionary does not make again
        return False
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return not any(_reads_flag(vars(kind)["forward"]) for kind in kinds if "forward" in vars(kind))


def _reads_flag(forward: Any) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and FLAG in code.co_names


def _own_configs(model: nn.Module) -> dict[int, Any]:
    """Give the model copies of all its parts' configs, which the caller may hold too; id → copy."""
    copies: dict[int, Any] = {}
    for module in model.modules():  # the whole's first, which holds those of parts
        if hasattr(config := vars(module).get("config"), "to_dict"):
            copy.deepcopy(config, copies)
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if hasattr(value, "to_dict") and id(value) in copies:
                setattr(module, key, copies[id(value)])
    return copies


__all__ = ["FLAG", "Parting", "Ties", "groups"]
