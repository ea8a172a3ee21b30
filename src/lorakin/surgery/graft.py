"""An adapter in a model: putting it in, switching it, merging it, taking it out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.family import Member
from lorakin.surgery import layers
from lorakin.surgery.adapted import Copy, Hung, Site, conflict, hang, is_adapted, new_site, unhang
from lorakin.surgery.merge import set_merged
from lorakin.surgery.targets import ALL_LINEAR, Targets, check_patterns, find_modules, resolve, select


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an adapter will be, decided and checked before the model is touched.

    `sites` holds the member of each adapted module, with its own rank and alpha where a pattern gives it some;
    `copies` the paths of the modules trained whole.
    """

    member: Member
    sites: Mapping[str, Member]
    copies: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Registry:
    """What a model remembers about the adapters in it, in its attribute `_lorakin`."""

    grafts: dict[str, Graft] = dataclasses.field(default_factory=dict)
    requires_grad: dict[str, bool] = dataclasses.field(default_factory=dict)
    hook: Any = None
    tied: bool = False


def plan(
    model: nn.Module,
    member: Member,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: str | Sequence[str] = (),
    layer_indices: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
) -> Plan:
    """Choose the modules and check every setting against them. See `lorakin.adapt` for the arguments and errors."""
    rank_pattern = {key: operator.index(rank) for key, rank in (rank_pattern or {}).items()}
    alpha_pattern = {key: float(alpha) for key, alpha in (alpha_pattern or {}).items()}
    copies = tuple(find_modules(model, [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save or ()))
    paths = select(model, targets, exclude, layer_indices, reserved=copies)
    check_patterns("rank_pattern", dict(rank_pattern), paths)
    check_patterns("alpha_pattern", dict(alpha_pattern), paths)
    chosen = plan_for(member, paths, copies, rank_pattern, alpha_pattern)
    for path, there in chosen.sites.items():
        kind = layers.kind_of(model.get_submodule(path))
        assert kind is not None
        there.check(kind.shape(model.get_submodule(path)), path)
    return chosen


def plan_for(
    member: Member,
    paths: Sequence[str],
    copies: Sequence[str],
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> Plan:
    """The plan for modules already chosen: gives each its rank and alpha."""
    sites = {}
    for path in paths:
        own: dict[str, Any] = {}
        for setting, pattern in (("rank", rank_pattern), ("alpha", alpha_pattern)):
            if pattern:
                own[setting] = resolve(dict(pattern), path, getattr(member, setting))
        sites[path] = dataclasses.replace(member, **own) if own else member  # type: ignore[type-var]
    return Plan(member, sites, tuple(copies), dict(rank_pattern), dict(alpha_pattern))


class Graft:
    """One named adapter in one model. Made by `install`; `lorakin.Adapter` adds files and optimizers to it."""

    def __init__(self, model: nn.Module, name: str, plan: Plan) -> None:
        self.model = model
        self.name = name
        self.plan = plan
        self._disabled = 0
        self._merge_again = False

    def install(
        self,
        tensors: Callable[[str, nn.Module, Member], Mapping[str, Tensor]],
        copies: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Hang the adapter's tensors on the planned modules and make this adapter the active one.

        Args:
            tensors: gives the tensors of the module at a path, for the member there.
            copies: the state of the modules trained whole, by path; without it they start as the base's.

        Nothing is changed if anything fails.

        Raises:
            SettingError: an unusable name, or one already taken.
            StateError: adapters are merged, or a module is in use in a way that does not go together.
        """
        registry = self._free_registry()
        children: dict[str, Site | Copy] = {}
        for path, member in self.plan.sites.items():
            module = self.model.get_submodule(path)
            children[path] = new_site(module, member, dict(tensors(path, module, member)))
        for path in self.plan.copies:
            whole = self.model.get_submodule(path)
            twin = _plain_copy(whole).requires_grad_(True)
            if copies is not None:
                twin.load_state_dict(copies[path])
            children[path] = Copy(twin)
        for path, child in children.items():
            if reason := conflict(self.model.get_submodule(path), self.name, child):
                raise StateError(f"{path} cannot be adapted: {reason}")
        vars(self.model)["_lorakin"] = registry
        registry.grafts[self.name] = self
        for path, child in children.items():
            child.train(self.model.get_submodule(path).training)
            hang(self.model.get_submodule(path), self.name, child)
        _mark_base(self.model, registry)
        activate(self.model, self.name)

    def remove(self) -> None:
        """Take the adapter out. The last one to go restores classes, `requires_grad` flags and saving as they were.

        Merged weights are restored first.
        """
        self._require_present()
        if any(self.name in h.merged for h in self._hung_if_there()):
            self.unmerge()
        for path in self._paths():
            module = self.model.get_submodule(path)
            if is_adapted(module):  # another module may have been put in its place
                unhang(module, self.name)
        registry = _registry(self.model)
        del registry.grafts[self.name]
        _mark_base(self.model, registry)

    def freeze_base(self) -> None:
        """Stop training everything that is not an adapter's, remembering what trained before."""
        registry = _registry(self.model)
        named = _base_parameters(self.model)
        for key, parameter in named:
            registry.requires_grad.setdefault(key, parameter.requires_grad)
        for _, parameter in named:
            parameter.requires_grad_(False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every tensor of the adapter, as (`<path>.<tensor>`, parameter), trained or not."""
        for path in self._paths():
            child = _hung(self.model, path)[self.name]
            inner = child.module if isinstance(child, Copy) else child
            yield from ((f"{path}.{key}", p) for key, p in inner.named_parameters(remove_duplicate=False))

    def site(self, path: str) -> Site:
        """The adapter's tensors on the module at `path`."""
        site = _hung(self.model, path)[self.name]
        assert isinstance(site, Site)
        return site

    def copy_of(self, path: str) -> nn.Module:
        """The adapter's own copy of the module at `path`, which it trains whole."""
        child = _hung(self.model, path)[self.name]
        assert isinstance(child, Copy)
        return child.module

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is folded into the weights."""
        return any(self.name in _hung(self.model, path).merged for path in self._paths())

    @property
    def is_active(self) -> bool:
        """Whether the adapter takes part in the forward."""
        return any(self.name in _hung(self.model, path).active for path in self._paths())

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave this adapter out of the forward inside the context, also while merged. Nests; trains nothing new."""
        self._require_present()
        if not self._disabled:
            self._merge_again = self.is_merged
            if self._merge_again:
                self.unmerge()
        self._disabled += 1  # counted, so that contexts may overlap, and nothing stale is put back
        for hung in self._hung_if_there():
            hung.off.add(self.name)
        try:
            yield
        finally:
            self._disabled -= 1
            if not self._disabled:
                for hung in self._hung_if_there():
                    hung.off.discard(self.name)
                if self._merge_again and _registry(self.model).grafts.get(self.name) is self:
                    self.merge()

    def merge(self, *, permanent: bool = False) -> None:
        """Fold the adapter into the weights; the forward then costs what the base's does. Merging twice is merging once.

        The base's parameters are kept aside for `unmerge`: one more copy of each adapted weight, until then.
        With `permanent` they are given up and the adapter leaves the model, which is a plain model again.

        Raises:
            StateError: a merged weight would not be finite (nothing is merged then), the adapter is disabled, or
                `permanent` while another adapter is merged.
        """
        self._require_present()
        if self._disabled:
            raise StateError(f"adapter {self.name!r} is disabled at the moment; merge it outside of disabled()")
        if permanent and (others := [n for n, g in _registry(self.model).grafts.items() if g is not self and g.is_merged]):
            raise StateError(f"adapter {others[0]!r} is merged too; unmerge it before merging {self.name!r} for good")
        before = {path: _hung(self.model, path).merged for path in self._paths()}
        try:
            for path, merged in before.items():
                if self.name not in merged:
                    set_merged(self.model.get_submodule(path), path, (*merged, self.name))
        except BaseException:
            for path, merged in before.items():
                set_merged(self.model.get_submodule(path), path, merged)
            raise
        _follow_ties(self.model)
        if permanent:
            for path in self._paths():
                hung = _hung(self.model, path)
                hung.base, hung.merged = {}, ()
            self.remove()

    def unmerge(self) -> None:
        """Give the base its own parameters back, bit for bit."""
        self._require_present()
        for path in self._paths():
            rest = tuple(name for name in _hung(self.model, path).merged if name != self.name)
            set_merged(self.model.get_submodule(path), path, rest)
        _follow_ties(self.model)

    def _hung_if_there(self) -> list[Hung]:
        modules = [self.model.get_submodule(path) for path in self._paths()]
        return [module.lorakin for module in modules if is_adapted(module)]  # type: ignore[misc]

    def _paths(self) -> tuple[str, ...]:
        return (*self.plan.sites, *self.plan.copies)

    def _require_present(self) -> None:
        if _registry(self.model).grafts.get(self.name) is not self:
            raise StateError(f"adapter {self.name!r} is no longer in the model")

    def _free_registry(self) -> Registry:
        registry = _registry(self.model)
        if not self.name or not isinstance(self.name, str) or "." in self.name or "/" in self.name:
            raise SettingError(f"an adapter's name must be text without '.' and '/', not {self.name!r}")
        if hasattr(Hung(), self.name):
            raise SettingError(f"an adapter cannot be called {self.name!r}: torch's modules have an attribute of that name")
        if self.name in registry.grafts:
            raise SettingError(f"the model already has an adapter {self.name!r}; remove it first, or choose another name")
        if merged := [name for name, graft in registry.grafts.items() if graft.is_merged]:
            raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before adding another")
        return registry


def grafts(model: nn.Module) -> dict[str, Graft]:
    """The adapters in `model`, by name."""
    return dict(_registry(model).grafts)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use exactly these adapters in the forward, adding up their changes; `[]` leaves the base alone.

    Changes no `requires_grad`.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole.
        StateError: an adapter is merged.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    known = _registry(model).grafts
    for name in names:
        if name not in known:
            raise SettingError(f"no adapter {name!r} in the model; there are: {', '.join(map(repr, known)) or 'none'}")
    if merged := [name for name, graft in known.items() if graft.is_merged]:
        raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before switching")
    replaced: dict[str, str] = {}
    for name in names:
        for path in known[name].plan.copies:
            if path in replaced:
                raise SettingError(f"{replaced[path]!r} and {name!r} both train {path} whole; activate one of them")
            replaced[path] = name
    for name in names:
        for path in known[name].plan.sites:
            whole = next((copy for copy in replaced if path.startswith(copy + ".") and replaced[copy] != name), None)
            if whole:
                raise SettingError(
                    f"{name!r} adapts {path}, inside {whole}, which {replaced[whole]!r} trains whole; activate one"
                )
    for graft in known.values():
        for path in graft._paths():
            hung = _hung(model, path)
            hung.active = tuple(name for name in names if name in hung)


def root_of(model: nn.Module) -> nn.Module:
    """`model` itself, or the module that `torch.compile` wrapped.

    Raises:
        StateError: PEFT has put adapters of its own into the model.
    """
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and (taken := [path for path, m in inner.named_modules() if isinstance(m, peft.BaseTunerLayer)]):
        raise StateError(
            f"PEFT has adapted this model ({taken[0]}, …); take its adapters out first (model.unload(), or "
            "model.merge_and_unload() to keep them), or save them with PEFT and load the files with lorakin.load"
        )
    return inner


def fresh(generator: torch.Generator | None, dtype: torch.dtype | None) -> Callable[..., dict[str, Tensor]]:
    """For `Graft.install`: the member's initial tensors, drawn on the CPU so that a seed means the same everywhere."""

    def start(path: str, module: nn.Module, member: Member) -> dict[str, Tensor]:
        kind, weight = layers.kind_of(module), module.weight
        assert kind is not None
        assert isinstance(weight, Tensor)
        device = torch.device("meta" if weight.is_meta else "cpu")
        wide = dtype or torch.promote_types(weight.dtype, torch.float32)
        tensors = member.start(kind.shape(module), None if weight.is_meta else generator, device)
        return {slot: tensor.to(wide) for slot, tensor in tensors.items()}

    return start


def _plain_copy(module: nn.Module) -> nn.Module:
    """A copy of the base's own module, without what other adapters hang on it."""
    twin = copy.deepcopy(module)
    for part in [part for part in twin.modules() if is_adapted(part)]:
        hung = part.lorakin
        assert isinstance(hung, Hung)
        for name in hung.names():
            unhang(part, name)
    return twin


def _registry(model: nn.Module) -> Registry:
    """The model's registry; of a model without adapters, an empty one that it does not hold."""
    registry = vars(model).get("_lorakin") or Registry()
    assert isinstance(registry, Registry)
    return registry


def _hung(model: nn.Module, path: str) -> Hung:
    module = model.get_submodule(path)
    if not is_adapted(module):
        raise StateError(
            f"{path} is no longer the module that was adapted: something, such as resize_token_embeddings, put another "
            "in its place; do that before adapting"
        )
    hung = module.lorakin
    assert isinstance(hung, Hung)
    return hung


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = model.named_parameters(remove_duplicate=False)  # under each of its names: merging may part what was tied
    return [(key, p) for key, p in named if "lorakin" not in key.split(".")]


def _mark_base(model: nn.Module, registry: Registry) -> None:
    """Keep `save_pretrained` writing the base alone, and a load that would leave the adapters untouched audible.

    With no adapter left, undo that and give the base its `requires_grad` flags back.
    """
    for module in model.modules():
        if hasattr(module, "_keys_to_ignore_on_save"):
            model_like: Any = module
            others = {k for k in model_like._keys_to_ignore_on_save or () if "lorakin" not in k.split(".")}
            ours = {key for key, _ in module.named_parameters(remove_duplicate=False) if "lorakin" in key.split(".")}
            model_like._keys_to_ignore_on_save = others | ours
    if registry.grafts and registry.hook is None:
        registry.hook = model.register_load_state_dict_post_hook(_warn_of_missing_adapters)  # type: ignore[no-untyped-call]
        config = getattr(model, "config", None)
        single = not getattr(config, "is_encoder_decoder", False)  # there the encoder's and decoder's stay tied to each other
        registry.tied = single and getattr(config, "tie_word_embeddings", False) and _tied_embeddings(model)
    if not registry.grafts:
        registry.hook.remove()
        for key, parameter in _base_parameters(model):
            parameter.requires_grad_(registry.requires_grad.get(key, parameter.requires_grad))
        del model.__dict__["_lorakin"]


def _warn_of_missing_adapters(model: nn.Module, incompatible: Any) -> None:
    missing = [key for key in incompatible.missing_keys if "lorakin" in key.split(".")]
    if missing:
        warnings.warn(
            f"the state dict just loaded has no tensors for {len(missing)} entries of this model's adapters "
            f"({missing[0]}, …), which keep their present values. A checkpoint of transformers' Trainer holds the base "
            "alone unless the trainer went through lorakin.training.adapter_checkpoints(trainer); "
            "load adapters with lorakin.load",
            LorakinWarning,
            stacklevel=3,
        )


def _tied_embeddings(model: nn.Module) -> bool:
    """Whether the input and output embeddings of a transformers model are one parameter."""
    inputs, outputs = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    return inputs is not None and outputs is not None and inputs.weight is outputs.weight


def _follow_ties(model: nn.Module) -> None:
    """Let the config of a model with tied embeddings say whether they still are, so that a merged model saves both."""
    if _registry(model).tied:
        model.config.tie_word_embeddings = _tied_embeddings(model)  # type: ignore[union-attr]


__all__ = ["Graft", "Plan", "activate", "fresh", "grafts", "plan", "plan_for", "root_of"]
