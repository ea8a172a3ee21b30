"""An adapter in a model: putting it in, switching it, merging it, taking it out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError, StateError, some
from lorakin.family import Method, Pair, Rule, Shape, Target, Weight, widened
from lorakin.family.pair import whole_shape
from lorakin.inject import experts, layers, parameters, quantised
from lorakin.inject.adapted import (
    Child,
    attach,
    conflict,
    detach,
    is_adapted,
    module_at,
    move_base,
    resized,
    swap_moved,
)
from lorakin.inject.attachments import (
    Attachments,
    Bias,
    attachments_of,
    attachments_or_none,
    base_parameters,
    base_state,
    ours,
)
from lorakin.inject.before_forward import BeforeForward, exchanged
from lorakin.inject.biases import NONE as NO_BIASES
from lorakin.inject.biases import bias_of, check_biases_apart, find_biases, start_of, tie_merged
from lorakin.inject.branch import Branch, Copy, trains
from lorakin.inject.buffers import Buffers, own_copy
from lorakin.inject.layers import ExpertLayer, UngroupedLayer
from lorakin.inject.merge import check_for_good, check_together, move_adapters, set_merged
from lorakin.inject.patterns import Values
from lorakin.inject.rows import TokenRowsBranch
from lorakin.inject.scale import rescaled
from lorakin.inject.targets import (
    ALL_LINEAR,
    Targets,
    check_patterns,
    find_modules,
    for_stacks,
    select,
)
from lorakin.inject.threads import alone, changing, chosen, spoil
from lorakin.inject.ties import Ties
from lorakin.inject.tokens import (
    TokenRows,
    Tokens,
    base_rows,
    check_apart,
    check_free,
    find_tokens,
    keep_ties,
    places_of,
    rows_for,
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """What an adapter will be, decided and checked before the model is touched.

    `branches` holds the method of each adapted module, with its own rank and alpha where a pattern gives it some;
    `copies` the paths of the modules trained whole, `tokens` the rows that are trained of a module, `biases`
    the paths of the modules whose bias is trained.
    """

    method: Method
    methods: Mapping[str, Method]
    copies: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ungrouped: frozenset[str] = frozenset()
    """The grouped convolutions to which a pair over all their inputs is added."""
    tokens: Mapping[str, TokenRows] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()


RANK_ABOVE = ("refuse", "clamp")
"""What becomes of a rank above the smaller side of a module's weight."""
NONE_HERE = "none (name the model that was adapted, not a part of it or what wraps it)"


@dataclasses.dataclass
class Registry:
    """What a model remembers about the adapters in it, in its attribute `_lorakin`."""

    grafts: dict[str, Graft] = dataclasses.field(default_factory=dict)
    requires_grad: dict[str, bool] = dataclasses.field(default_factory=dict)
    hook: Any = None
    ties: Ties | None = None
    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    laid_out: list[nn.Module] = dataclasses.field(default_factory=list)
    before_forward: BeforeForward | None = None
    buffers: Buffers = dataclasses.field(default_factory=Buffers)
    ignored: dict[nn.Module, set[str]] = dataclasses.field(default_factory=dict)
    """What `_keys_to_ignore_on_save` of a module holds that is lorakin's."""


def place(
    model: nn.Module,
    method: Method,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: str | Sequence[str] = (),
    layer_indices: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    rank_above: str = "refuse",
    trainable_tokens: Tokens | None = None,
    bias: str = NO_BIASES,
) -> Placement:
    """Choose the modules and check every setting against them. See `lorakin.adapt` for the arguments and errors."""
    if rank_above not in RANK_ABOVE:
        raise SettingError(
            f"rank_above must be {' or '.join(map(repr, RANK_ABOVE))}, not {rank_above!r}"
        )
    try:
        rank_pattern = {key: operator.index(rank) for key, rank in dict(rank_pattern or {}).items()}
        alpha_pattern = {key: float(alpha) for key, alpha in dict(alpha_pattern or {}).items()}
    except (TypeError, ValueError):
        raise SettingError(
            f"rank_pattern and alpha_pattern map patterns to numbers, not {rank_pattern!r} and {alpha_pattern!r}"
        ) from None
    copies = tuple(
        find_modules(
            model, [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save or ()
        )
    )
    rows = find_tokens(model, trainable_tokens, copies=copies)
    paths = select(model, targets, exclude, layer_indices, reserved=copies, alone=bool(rows))
    stacks = {
        path.rpartition(".")[0]
        for path in paths
        if layers.kind_of(module_at(model, path)) is ExpertLayer
    }
    attentions = {path for path in map(parameters.attention_of, stacks) if path}
    rank_pattern = for_stacks(for_stacks(rank_pattern, attentions, parameters.PART), stacks)
    alpha_pattern = for_stacks(for_stacks(alpha_pattern, attentions, parameters.PART), stacks)
    check_patterns("rank_pattern", dict(rank_pattern), paths)
    check_patterns("alpha_pattern", dict(alpha_pattern), paths)
    method, paths = method.select(paths)
    chosen = placement_for(method, paths, copies, rank_pattern, alpha_pattern)
    check_free(rows, chosen.methods)
    chosen = dataclasses.replace(chosen, tokens=rows)
    shapes = {path: target_of(module_at(model, path)).shape for path in chosen.methods}
    if rank_above == "clamp":
        chosen = _clamped(chosen, shapes, stacks)
    for path, there in chosen.methods.items():
        there.check(shapes[path], path)
    biases = find_biases(model, bias, chosen.methods, copies)
    if both := sorted(set(biases) & set(places_of(rows))):
        raise SettingError(
            f"{both[0]} cannot have rows of tokens and a bias of its own in one adapter; leave one of them out"
        )
    return dataclasses.replace(chosen, biases=biases)


def _clamped(placement: Placement, shapes: Mapping[str, Shape], stacks: set[str]) -> Placement:
    """The placement in which no module has more ranks than its weight: as if `rank_pattern` gave those others of their own.

    A stack of experts whose matrices are all clamped has one pattern, as its files have.
    """
    settings = {
        path: there.parametrisation.clamped(shapes[path])
        for path, there in placement.methods.items()
    }
    fewer = {path: own for path, own in settings.items() if own}
    if not fewer:
        return placement
    ranks = {path: next(iter(own.values())) for path, own in fewer.items()}
    said = ", ".join(f"{path} {rank}" for path, rank in list(ranks.items())[:5]) + (
        ", …" if len(ranks) > 5 else ""
    )
    warnings.warn(
        f"rank_above='clamp': {len(fewer)} of {len(placement.methods)} modules have the rank of their weight's smaller side ({said})",
        LorakinWarning,
        stacklevel=4,
    )
    methods = {
        path: there.at(**fewer[path]) if path in fewer else there
        for path, there in placement.methods.items()
    }
    stacks = stacks - {path.rpartition(".")[0] for path in placement.methods.keys() - fewer.keys()}
    named = {
        path: path.rpartition(".")[0] if path.rpartition(".")[0] in stacks else path
        for path in fewer
    }
    own = {
        f"^{re.escape(named[path])}": ranks[path]
        for path, setting in fewer.items()
        if "rank" in setting
    }
    return dataclasses.replace(
        placement,
        methods=methods,
        rank_pattern=for_stacks(own, stacks) | dict(placement.rank_pattern),
    )


def rearranged(placement: Placement, settings: Mapping[str, Mapping[str, Any] | None]) -> Placement:
    """The placement with settings of their own for these modules, as if patterns said so; None leaves one out."""
    given = {path: own for path, own in settings.items() if own is not None}
    methods = {
        path: method.at(**given[path]) if path in given else method
        for path, method in placement.methods.items()
        if settings.get(path, {}) is not None
    }
    patterns = {
        name: {f"^{re.escape(path)}": own[name] for path, own in given.items() if name in own}
        for name in ("rank", "alpha")
    }
    return dataclasses.replace(
        placement,
        methods=methods,
        rank_pattern=patterns["rank"] | dict(placement.rank_pattern),
        alpha_pattern=patterns["alpha"] | dict(placement.alpha_pattern),
    )


def placement_for(
    method: Method,
    paths: Sequence[str],
    copies: Sequence[str],
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> Placement:
    """The placement for modules already chosen: gives each its rank and alpha."""
    methods = {}
    values: dict[str, Values[Any]] = {"rank": Values(rank_pattern), "alpha": Values(alpha_pattern)}
    for path in paths:
        said = {setting: value.of(path, None) for setting, value in values.items()}
        own = {setting: value for setting, value in said.items() if value is not None}
        methods[path] = method.at(**own) if own else method
    return Placement(method, methods, tuple(copies), dict(rank_pattern), dict(alpha_pattern))


def target_of(module: nn.Module) -> Target:
    """The module's shape and its weight as a matrix, the base's own even while adapters are merged."""
    kind = layers.kind_of(module)
    assert kind is not None
    return Target(kind.shape(module), kind.weight(module))


def own_weight(module: nn.Module) -> Tensor:
    """The module's weight as a matrix, the base's own even while adapters are merged or have moved it."""
    kind = layers.kind_of(module)
    assert kind is not None
    aside = attachments_of(module).unmoved.get("weight") if is_adapted(module) else None
    weight = kind.weight(module) if aside is None else kind.matrix(aside.detach())
    return weight if isinstance(weight, Tensor) else weight.matrix


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters by name, whatever adapters do with them; without modules that an adapter trains whole."""
    whole = tuple(
        f"{path}." for graft in _registry(model).grafts.values() for path in graft.placement.copies
    )
    own: dict[str, Tensor] = {}
    for name, parameter in base_parameters(model):
        if whole and name.startswith(whole):
            continue
        path, _, leaf = name.rpartition(".")
        module: Any = module_at(model, path)
        aside = attachments_or_none(module) or Attachments()
        own_stack = experts.own_stack(module, leaf)
        own[name] = (
            aside.unmoved.get(leaf, aside.base.get(leaf, parameter))
            if own_stack is None
            else own_stack
        )
    return own


class Watcher:
    """Hears what becomes of adapters, for rooms above this one. Subclass it and append an instance to `WATCHERS`."""

    def made(self, graft: Graft) -> None:
        """The adapter's object was made, also as a copy of another; nothing is in it yet."""

    def begins(self, graft: Graft) -> None:
        """A training run begins."""

    def before_backward(self, graft: Graft) -> None:
        """A forward has begun whose backward may train the adapter."""

    def before_first_step(self, graft: Graft) -> None:
        """An optimizer is about to take the run's first step."""


WATCHERS: list[Watcher] = []
"""Who hears of adapters; `lorakin/loop` adds itself when it is imported."""


class Graft:
    """One named adapter in one model. Made by `install`; `lorakin.Adapter` adds files and optimizers to it."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        graft = super().__new__(cls)
        for watcher in WATCHERS:  # here, so that they hear of a deep copy of the model too
            watcher.made(graft)
        return graft

    def __init__(self, model: nn.Module, name: str, placement: Placement) -> None:
        self.model = model
        self.name = name
        self.placement = placement
        self.is_fresh = False
        self.running: Method | None = None
        self.rules: list[Rule] | None = None
        self.steps = 0
        self._stepped = False
        self.rate_factors: dict[float, int] = {}
        self.warned_of_rates = False
        self._state: Mapping[str, Any] | None = None
        self.buffers: dict[str, Tensor | None] = {}
        self._scale = 1.0
        self._disabled = 0
        self._merge_again = False

    @alone
    def install(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        copies: Mapping[str, Mapping[str, Tensor]] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Hang the adapter's tensors on the planned modules and make this adapter the active one.

        Args:
            tensors: the tensors of each module, by path and slot. One object in several places becomes one parameter, on
                each device.
            copies: the state of the modules trained whole, by path; without it they start as the base's.
            buffers: what its own buffers hold, by name; without it they start as the base's.
            rows: the rows of tokens, by path; without it they start as the base's.
            biases: its own biases, by the module's path; without it they start as the base's.

        Nothing is changed if anything fails.

        Raises:
            SettingError: an unusable name, or one already taken.
            StateError: adapters are merged, or a module is in use in a way that does not go together.
        """
        registry = self._free_registry()
        children: dict[str, Child] = {}
        made: dict[tuple[int, torch.device], nn.Parameter] = {}
        modules = {path: module_at(self.model, path) for path in self._paths()}
        own_biases: dict[str, nn.Parameter] = {}
        for path, tensor in (
            start_of(self.model, self.placement.biases) if biases is None else biases
        ).items():
            own_bias, there = bias_of(modules[path]), tensor.detach()
            there = there if own_bias is None or own_bias.is_meta else there.to(own_bias.device)
            own_biases[path] = made.setdefault((id(tensor), there.device), nn.Parameter(there))
        for path, method in self.placement.methods.items():
            module = modules[path]
            kind = UngroupedLayer if path in self.placement.ungrouped else layers.kind_of(module)
            assert kind is not None
            shape, device = kind.shape(module), kind.device(module)
            slots, parameters = method.slots_at(path, shape), {}
            for slot, tensor in tensors[path].items():
                if (id(tensor), device) not in made:
                    there = (
                        tensor.detach() if device.type == "meta" else tensor.detach().to(device)
                    )  # values are not given up
                    made[id(tensor), device] = nn.Parameter(there, trains(slots[slot], tensor))
                parameters[slot] = made[id(tensor), device]
            children[path] = Branch(path, method, kind, shape, parameters, own_biases.get(path))
        for path in self.placement.copies:
            twin = _plain_copy(modules[path]).requires_grad_(True)
            if copies is not None:
                twin.load_state_dict(copies[path])
            children[path] = Copy(twin)
        own_rows = base_rows(self.model, self.placement.tokens) if rows is None else rows
        children |= rows_for(modules, self.placement.tokens, own_rows)
        children |= {path: Bias(bias) for path, bias in own_biases.items() if path not in children}
        for path, child in children.items():
            if reason := conflict(modules[path], self.name, child):
                raise StateError(f"{path} cannot be adapted: {reason}")
        registry.laid_out += quantised.keep_trainable(self.model)
        vars(self.model)["_lorakin"] = registry
        registry.grafts[self.name] = self
        for path, child in children.items():
            attach(modules[path], self.name, child.train(modules[path].training))
        _mark_base(self.model, registry)
        own = (
            registry.buffers.all(self.model, self.placement.copies) if buffers is None else buffers
        )
        self.buffers = {name: own_copy(buffer) for name, buffer in own.items()}
        registry.buffers.add(self.model, self)
        activate(self.model, self.name)

    @alone
    def remove(self) -> None:
        """Take the adapter out. The last one to go restores classes, `requires_grad` flags and saving as they were.

        Merged weights are restored first.
        """
        self._require_present()
        _check_unmixed(self.model, "removed")
        if any(self.name in h.merged for h in self._attachments_if_there()):
            self.unmerge()
        for path in self._paths():
            module = module_at(self.model, path)
            if is_adapted(module):  # another module may have been put in its place
                if not self._disabled:
                    swap_moved(module)
                detach(module, self.name)
        registry = _registry(self.model)
        del registry.grafts[self.name]
        registry.buffers.show(self.model, registry.grafts)
        _mark_base(self.model, registry)

    def freeze_base(self) -> None:
        """Stop training everything that is not an adapter's, remembering what trained before."""
        registry = _registry(self.model)
        named = base_parameters(self.model)
        for key, parameter in named:
            registry.requires_grad.setdefault(key, parameter.requires_grad)
        for _, parameter in named:
            parameter.requires_grad_(False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every tensor of the adapter, as (`<path>.<tensor>`, parameter), trained or not."""
        for path in self._paths():
            child = _attachments(self.model, path)[self.name]
            inner = child.module if isinstance(child, Copy) else child
            yield from (
                (f"{path}.{key}", p) for key, p in inner.named_parameters(remove_duplicate=False)
            )

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of them that train; none once the adapter is gone."""
        return (
            (name, p)
            for name, p in (self.named_parameters() if self.is_present else ())
            if p.requires_grad
        )

    def modules(self) -> list[nn.Module]:
        """What holds its tensors in each place of the model: for what shards or moves a model and should leave them out."""
        return [_attachments(self.model, path)[self.name] for path in self._paths()]

    def base_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The base model's own."""
        return base_parameters(self.model)

    @property
    def is_present(self) -> bool:
        """Whether the adapter is in its model."""
        return _registry(self.model).grafts.get(self.name) is self

    def branch(self, path: str) -> Branch:
        """The adapter's tensors on the module at `path`."""
        branch = _attachments(self.model, path)[self.name]
        assert isinstance(branch, Branch)
        return branch

    def pair_at(self, path: str) -> Pair:
        """The pair of the module at `path`, with its gain over the base weight; in float32 at least."""
        return self.branch(path).pair(target_of(module_at(self.model, path)).weight)

    def base_weight(self, path: str) -> Tensor:
        """The weight of the module at `path` as a matrix; see `own_weight`."""
        return own_weight(module_at(self.model, path))

    def change_at(self, path: str) -> Pair:
        """The whole change of the module at `path` over that weight, scaled as it is now; in float32 at least."""
        branch = self.branch(path)
        pair = branch.method.pair(
            widened(self.tensors_at(path)), branch.shape, self.base_weight(path)
        )
        return pair.times(branch.scale)

    def factors_at(self, path: str) -> tuple[Pair, float]:
        """The same before its scale is in `up`, and the scale, where the pair has one."""
        branch = self.branch(path)
        tensors, weight = widened(self.tensors_at(path)), Weight(self.base_weight(path))
        return branch.scaled_factors(branch.method.factors(tensors, branch.shape, weight))

    def experts(self) -> list[str]:
        """Paths of the adapted modules that are matrices of a stack of experts, which are never called themselves."""
        return [path for path in self.placement.methods if self.branch(path).layer is ExpertLayer]

    def copy_of(self, path: str) -> nn.Module:
        """The adapter's own copy of the module at `path`, which it trains whole."""
        child = _attachments(self.model, path)[self.name]
        assert isinstance(child, Copy)
        return child.module

    def rows_at(self, path: str) -> nn.Parameter:
        """The rows of tokens (k, dim) that the adapter trains in the module at `path`."""
        child = _attachments(self.model, path)[self.name]
        assert isinstance(child, TokenRowsBranch)
        return child.rows

    def biases(self) -> dict[str, nn.Parameter]:
        """Its own biases, by the path of the module."""
        own = {
            path: _attachments(self.model, path).bias_of(self.name)
            for path in self.placement.biases
        }
        return {path: bias for path, bias in own.items() if bias is not None}

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is folded into the weights."""
        return any(self.name in _attachments(self.model, path).merged for path in self._paths())

    @property
    def is_active(self) -> bool:
        """Whether the adapter takes part in the forward."""
        return any(self.name in _attachments(self.model, path).active for path in self._paths())

    @property
    def is_intact(self) -> bool:
        """Whether it is in its model, and on the modules that it was put on: none was exchanged."""
        try:
            return self.is_present and all(
                is_adapted(module_at(self.model, path)) for path in self._paths()
            )
        except AttributeError:
            return False

    @property
    def is_off(self) -> bool:
        """Whether it is disabled at the moment."""
        return self._disabled > 0

    @property
    def scale(self) -> float:
        """How many times its change the adapter makes: 1 at first, 0 is none; any number.

        W = W0 + scale · (the adapter's weight − W0), in every adapted module, also where a gain is part
        of the change; for inference, training and merging. Modules trained whole are used as they are.
        It is of this model in memory: files do not hold it. Setting it on a merged adapter merges anew.

        Raises, when it is set:
            SettingError: no finite number.
            StateError: inside `mixed_batch`, or the adapter has moved the base weights in place.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        with changing(self.model):
            self._rescale(scale)

    def _rescale(self, scale: float) -> None:
        self._require_present()
        _check_unmixed(self.model, "scaled")
        with _ties_kept(self.model) if self.is_merged else contextlib.nullcontext():
            self._scale = rescaled(self, scale)

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Inside, the adapter's scale is this one; behind it, what it was before. See `scale`."""
        before, self.scale = self._scale, scale
        try:
            yield
        finally:
            with changing(self.model, refused=False):
                if self.is_present:
                    spoil(self.model)
                    self._rescale(before)

    def moved_buffers(self) -> dict[str, Tensor]:
        """Those of its own buffers that are no longer the base's, by name."""
        return _registry(self.model).buffers.moved(self.model, self)

    def base_buffer(self, name: str) -> Tensor | None:
        """The base's own buffer of this name, which may be set aside."""
        return _registry(self.model).buffers.own(self.model, name)

    def take_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Let its own buffers hold these values, and the base's where none is given."""
        known = _registry(self.model).buffers
        for name in self.buffers:
            known.put(self.model, self, name, values.get(name, known.own(self.model, name)))

    def before_backward(self) -> None:
        """A forward has begun whose backward may train the adapter."""
        for watcher in WATCHERS:
            watcher.before_backward(self)

    def check_sizes(self) -> None:
        """Raise `StateError` if a module was resized since it was adapted."""
        for path in (*self.placement.methods, *places_of(self.placement.tokens)):
            attached, module = _attachments(self.model, path), module_at(self.model, path)
            weight = module._parameters.get("weight")
            if weight is not None and attached.shape not in (None, whole_shape(weight)):
                raise StateError(resized(path, attached.shape or (), whole_shape(weight)))
        for path in self.placement.copies:
            base, own = (base_state(m) for m in (module_at(self.model, path), self.copy_of(path)))
            for key in own.keys() & base.keys():
                if whole_shape(own[key]) != whole_shape(base[key]):
                    raise StateError(
                        resized(f"{path}.{key}", whole_shape(own[key]), whole_shape(base[key]))
                    )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave this adapter out of the forward inside the context, also while merged. Nests; trains nothing new."""
        self._turn_off()
        try:
            yield
        finally:
            self._turn_on()

    @alone
    def _turn_off(self) -> None:
        self._require_present()
        if not self._disabled:
            self._merge_again = self.is_merged
            if self._merge_again:
                self.unmerge()
            self._swap_moved()
        self._disabled += 1  # counted, so that contexts may overlap, and nothing stale is put back
        for attached in self._attachments_if_there():
            attached.off.add(self.name)
        self._show_buffers()

    def _turn_on(self) -> None:
        with changing(self.model, refused=False):  # it was on before
            self._disabled -= 1
            if not self._disabled:
                spoil(self.model)
                for attached in self._attachments_if_there():
                    attached.off.discard(self.name)
                self._swap_moved()
                self._show_buffers()
                if self._merge_again and self.is_present:
                    self.merge()

    def merge(self, *, permanent: bool = False) -> None:
        """Fold the adapter into the weights; the forward then costs what the base's does. Merging twice is merging once.

        The base's parameters are kept aside for `unmerge`: one more copy of each adapted weight, until then.
        With `permanent` they are given up and the adapter leaves the model, which is a plain model again; see `merge`.

        Raises:
            StateError: a merged weight would not be finite (nothing is merged then), the adapter is disabled, or another
                adapter would then be another function; see `inject/merge.py`.
        """
        with changing(self.model):
            self._require_present()
            if permanent:
                merge(self.model, self.name)
            elif dense := _fold(self.model, [self]):
                _warn_of_dense(dense, 2, permanent=False)

    def unmerge(self) -> None:
        """Give the base its own parameters back, bit for bit."""
        with changing(self.model):
            self._require_present()
            with _ties_kept(self.model):
                for path in self._paths():
                    rest = tuple(
                        name for name in _attachments(self.model, path).merged if name != self.name
                    )
                    set_merged(
                        module_at(self.model, path), path, rest, quantised.dtype_of(self.model)
                    )
                _keep_tables(self.model)

    def begin(self, total_steps: int | None = None) -> None:
        """Get ready for a run of `total_steps` optimizer steps (None: not known), from step 1 or where restored state is.

        Raises:
            SettingError: a member cannot be run like that.
        """
        if total_steps is not None and (
            not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1
        ):
            raise SettingError(f"total_steps must be a whole number ≥ 1, not {total_steps!r}")
        running = self.placement.method.resolved(total_steps)
        if self.rules is not None and not self._stepped and running == self.running:
            return
        self.end()
        self.running, self.rules = running, running.rules(self.adapted_modules())
        self.steps, self._stepped = 0, False
        self.rate_factors, self.warned_of_rates = {}, False
        for watcher in WATCHERS:
            watcher.begins(self)
        if self._state is not None:
            self.restore_state(self._state)

    def end(self) -> None:
        """Let the rules of the run leave nothing outside the adapter's tensors."""
        for rule in self.rules or ():
            rule.end()

    @property
    def method(self) -> Method:
        """The method, with what its run has decided."""
        return self.running or self.placement.method

    def adapted_modules(self) -> list[PlacedModule]:
        """The adapted modules, as members' rules see them."""
        return [PlacedModule(self, path) for path in self.placement.methods]

    def before_step(self) -> None:
        """Gradients are complete and an optimizer is about to use them."""
        if not self._stepped:
            for watcher in WATCHERS:
                watcher.before_first_step(self)
            self._warn_of_unreached()
        for rule in self.rules or ():
            rule.before(self.steps + 1)

    def _warn_of_unreached(self) -> None:
        """Say which modules the first backward did not reach, before many steps are spent on them."""
        reached: dict[str, bool] = {}
        for path in self._paths():
            child = _attachments(self.model, path)[self.name]
            trained = [p for p in child.parameters() if p.requires_grad]
            if trained:
                reached[path] = any(p.grad is not None for p in trained)
        if missed := [path for path, got in reached.items() if not got]:
            warnings.warn(
                f"the first step of adapter {self.name!r} has no gradient for {len(missed)} of {len(reached)} modules "
                f"({some(missed)}): the forward of the model did not use them on these data. What it never uses does not "
                "train; leave it out of the targets",
                LorakinWarning,
                stacklevel=2,
            )

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has taken a step."""
        self.steps, self._stepped, self._state = self.steps + 1, True, None
        for rule in self.rules or ():
            rule.after(self.steps, optimizer)

    def state(self) -> dict[str, Any]:
        """How far training has come, for `restore_state`: numbers, tensors and dicts of them."""
        return {"steps": self.steps, "rules": [rule.state() for rule in self.rules or ()]}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, also after a `begin` that follows before the first step. The tensors are restored already."""
        self._state = state
        if self.rules is not None:
            if len(self.rules) != len(state["rules"]):
                raise StateError(
                    f"the state to go on from is of another method than {self.placement.method.words}"
                )
            self.steps = state["steps"]
            try:
                for rule, saved in zip(self.rules, state["rules"], strict=True):
                    rule.restore(saved)
            except (
                AttributeError,
                IndexError,
                KeyError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                raise StateError(
                    f"what training would go on from is damaged ({error}); go back to an earlier checkpoint"
                ) from None

    def tensors_at(self, path: str) -> dict[str, Tensor]:
        """All that a file must hold of the module at `path`, by slot."""
        tensors: dict[str, Tensor] = dict(self.branch(path).tensors())
        for rule in self.rules or ():
            tensors |= rule.beside(path)
        return tensors

    @property
    def has_moved_base(self) -> bool:
        """Whether a copy of some base weight is in use that this adapter moves."""
        return any(
            attached.unmoved and self.name in attached for attached in self._attachments_if_there()
        )

    def _swap_moved(self) -> None:
        for path in self.placement.methods:
            if is_adapted(module := module_at(self.model, path)):
                swap_moved(module)

    def _show_buffers(self) -> None:
        registry = _registry(self.model)
        registry.buffers.show(self.model, registry.grafts)

    def _attachments_if_there(self) -> list[Attachments]:
        modules = [module_at(self.model, path) for path in self._paths()]
        return [attachments_of(module) for module in modules if is_adapted(module)]

    def _paths(self) -> tuple[str, ...]:
        beside = (path for path in self.placement.biases if path not in self.placement.methods)
        return (
            *self.placement.methods,
            *self.placement.copies,
            *places_of(self.placement.tokens),
            *beside,
        )

    def _require_present(self) -> None:
        if not self.is_present:
            raise StateError(f"adapter {self.name!r} is no longer in the model")

    def _free_registry(self) -> Registry:
        registry = _registry(self.model)
        if not self.name or not isinstance(self.name, str) or "." in self.name or "/" in self.name:
            raise SettingError(
                f"an adapter's name must be text without '.' and '/', not {self.name!r}"
            )
        if hasattr(Attachments().adapters, self.name):
            raise SettingError(
                f"an adapter cannot be called {self.name!r}: torch's modules have an attribute of that name"
            )
        if self.name in registry.grafts:
            raise SettingError(
                f"the model already has an adapter {self.name!r}; remove it first, or choose another name"
            )
        if merged := [name for name, graft in registry.grafts.items() if graft.is_merged]:
            raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before adding another")
        _check_unmoved(registry.grafts, "adding another")
        _check_unmixed(self.model, "added")
        return registry


class PlacedModule:
    """A branch as a member's rule sees it. Looked up anew each time, since what shards a model exchanges its parameters."""

    def __init__(self, graft: Graft, path: str) -> None:
        self.graft = graft
        self.path = path

    @property
    def shape(self) -> Shape:
        """The shape of the module's weight."""
        return self.graft.branch(self.path).shape

    @property
    def method(self) -> Method:
        """The method, with the module's own rank and alpha."""
        return self.graft.placement.methods[self.path]

    @property
    def weight(self) -> Tensor | Weight:
        """Its weight as a matrix, the base's own even while adapters are merged."""
        return target_of(module_at(self.graft.model, self.path)).weight

    def tensors(self) -> dict[str, nn.Parameter]:
        """The module's tensors by slot."""
        return self.graft.branch(self.path).tensors()

    def trains(self, slot: str) -> bool:
        """Whether the method trains this tensor."""
        return self.graft.branch(self.path).slots()[slot].trained

    def put(self, slot: str, tensor: Tensor) -> None:
        """Give it one more tensor, which does not train."""
        parameter = (
            tensor
            if isinstance(tensor, nn.Parameter)
            else nn.Parameter(tensor, requires_grad=False)
        )
        self.graft.branch(self.path).register_parameter(slot, parameter)

    def take(self, slot: str) -> Tensor:
        """Take such a tensor away from it."""
        tensor = self.tensors()[slot].detach()
        delattr(self.graft.branch(self.path), slot)
        return tensor

    def move_base(self, change: Tensor) -> None:
        """Add `change` (outputs, inputs) to a copy of the base weight, which takes its place."""
        if self.graft.scale != 1:
            raise StateError(
                f"adapter {self.graft.name!r} moves the base weights in place, which its scale of {self.graft.scale:g} "
                "does not reach; set it to 1 while training"
            )
        move_base(module_at(self.graft.model, self.path), change)

    def restore_base(self) -> None:
        """Put the base's own weight back, if it was moved."""
        module: Any = module_at(self.graft.model, self.path)
        swap_moved(module)
        attachments_of(module).unmoved = {}


def _check_unmixed(model: nn.Module, what: str) -> None:
    if any(attached.rows is not None for attached in hanging(model)):
        raise StateError(
            f"inside mixed_batch the adapters are what they were when it began; none can be {what}"
        )


def _check_unmoved(known: Mapping[str, Graft], purpose: str) -> None:
    if moved := [name for name, graft in known.items() if graft.has_moved_base]:
        raise StateError(
            f"adapter {moved[0]!r} has moved the base weights in place, so others cannot be used beside it; save and load it "
            f"(files hold the form that leaves the base alone), or remove it before {purpose}"
        )


def grafts(model: nn.Module) -> dict[str, Graft]:
    """The adapters in `model`, by name."""
    return dict(_registry(model).grafts)


@alone
def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use exactly these adapters in the forward, adding up their changes; `[]` leaves the base alone.

    Changes no `requires_grad`.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole, its bias, or the same row.
        StateError: an adapter is merged.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    known = check_switchable(model, names)
    _check_unmixed(model, "switched")
    replaced: dict[str, str] = {}
    for name in names:
        for path in known[name].placement.copies:
            if path in replaced:
                raise SettingError(
                    f"{replaced[path]!r} and {name!r} both train {path} whole; activate one of them"
                )
            replaced[path] = name
    check_apart({name: known[name].placement.tokens for name in names})
    for name in names:
        placement = known[name].placement
        for path in (*placement.methods, *places_of(placement.tokens), *placement.biases):
            whole = next(
                (
                    copy
                    for copy in replaced
                    if path.startswith(copy + ".") and replaced[copy] != name
                ),
                None,
            )
            if whole:
                raise SettingError(
                    f"{name!r} adapts {path}, inside {whole}, which {replaced[whole]!r} trains whole; activate one"
                )
    check_biases_apart(_plans([known[name] for name in names]), SettingError)
    _registry(model).buffers.owners(model, [known[name] for name in names])
    for graft in known.values():
        for path in graft._paths():
            attached = _attachments(model, path)
            attached.active = tuple(name for name in names if name in attached)
    _registry(model).buffers.show(model, known)
    chosen(model)


def merge(model: nn.Module, names: str | Sequence[str]) -> None:
    """Fold these adapters into the weights for good, all at once; they leave the model. `[]` does nothing.

    What the model computes with them in use does not change. Others may stay if their changes add to any weights.

    Raises:
        SettingError: an unknown name.
        StateError: a merged weight would not be finite, an adapter is disabled, another one is merged, or one that stays
            has a gain over a weight that would change. Nothing is merged then.
    """
    with changing(model):
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        known = _registry(model).grafts
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(map(repr, known)) or NONE_HERE
            raise SettingError(f"no adapter {unknown[0]!r} in the model; there are: {there}")
        chosen = [known[name] for name in names]
        others = {name: graft for name, graft in known.items() if graft not in chosen}
        if chosen and (merged := [name for name, graft in others.items() if graft.is_merged]):
            raise StateError(
                f"adapter {merged[0]!r} is merged too; unmerge it before merging {names[0]!r} for good"
            )
        check_for_good(_plans(chosen), _plans(others.values()))
        if dense := _fold(model, chosen):
            _warn_of_dense(dense, 3, permanent=True)
        for path in (path for graft in chosen for path in graft._paths()):
            attached = _attachments(model, path)
            attached.base, attached.unmoved, attached.merged, attached.dense = {}, {}, (), None
        for graft in chosen:
            _registry(model).buffers.give_up(model, graft)
            graft.remove()
        quantised_ones = {path: module_at(model, path) for path in dense}
        quantised.replace(model, dense)
        for path, old in quantised_ones.items():
            if is_adapted(old):
                move_adapters(old, module_at(model, path))
        if (registry := _registry(model)).grafts:
            registry.ties = Ties(model)
            _hold(model, registry)


def _fold(model: nn.Module, chosen: Sequence[Graft]) -> dict[str, Tensor]:
    """Merge these adapters, all or none; returns by path the weights that stand beside quantised ones."""
    _check_unmixed(model, "merged")
    if disabled := [graft.name for graft in chosen if graft._disabled]:
        raise StateError(
            f"adapter {disabled[0]!r} is disabled at the moment; merge it outside of disabled()"
        )
    others = [graft for graft in _registry(model).grafts.values() if graft not in chosen]
    _check_unmoved({graft.name: graft for graft in others if _share(graft, chosen)}, "merging")
    check_together(_plans([*chosen, *(graft for graft in others if graft.is_merged)]))
    check_biases_apart(
        _plans([*chosen, *(g for g in others if g.is_merged or (g.is_active and not g.is_off))]),
        StateError,
    )
    dtype = quantised.dtype_of(model)
    before = {path: _attachments(model, path).merged for graft in chosen for path in graft._paths()}
    with _ties_kept(model):
        try:
            for graft in chosen:
                for path in graft._paths():
                    if graft.name not in (merged := _attachments(model, path).merged):
                        set_merged(module_at(model, path), path, (*merged, graft.name), dtype)
                tie_merged(model, graft)
            _keep_tables(model)
        except BaseException:
            for path, merged in before.items():
                set_merged(module_at(model, path), path, merged, dtype)
            raise
    return {
        path: weight for path in before if (weight := _attachments(model, path).dense) is not None
    }


def _keep_tables(model: nn.Module) -> None:
    """Let tied tables whose rows adapters train stay one, where the same adapters are merged into them."""
    for graft in _registry(model).grafts.values():
        paths = places_of(graft.placement.tokens)
        keep_ties(
            model,
            graft.placement.tokens,
            {path: _attachments(model, path).merged for path in paths},
        )


@contextlib.contextmanager
def _ties_kept(model: nn.Module) -> Iterator[None]:
    """Change merged weights inside the context; what was tied is tied again before, and parted again after it."""
    ties = _registry(model).ties
    if ties is None:
        yield
        return
    ties.rejoin()
    try:
        yield
    finally:
        ties.part(model)


def _plans(chosen: Iterable[Graft]) -> dict[str, Placement]:
    return {graft.name: graft.placement for graft in chosen}


def _share(graft: Graft, others: Sequence[Graft]) -> bool:
    """Whether an adapter is on a module that one of the others is on too."""
    return any(set(graft._paths()) & set(other._paths()) for other in others)


def check_switchable(model: nn.Module, names: Sequence[str]) -> Mapping[str, Graft]:
    """The adapters in `model`, once it is clear that those of these names can be used instead of the active ones."""
    known = _registry(model).grafts
    for name in names:
        if name not in known:
            raise SettingError(
                f"no adapter {name!r} in the model; there are: {', '.join(map(repr, known)) or NONE_HERE}"
            )
    if merged := [name for name, graft in known.items() if graft.is_merged]:
        raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before switching")
    if len(known) > 1 or not names:
        _check_unmoved(known, "switching")
    return known


def hanging(model: nn.Module) -> list[Attachments]:
    """What hangs on the model's modules, once each."""
    found = [
        attached
        for graft in _registry(model).grafts.values()
        for attached in graft._attachments_if_there()
    ]
    return list(dict.fromkeys(found))


def root_of(model: nn.Module) -> nn.Module:
    """`model` itself, or the module that `torch.compile` wrapped.

    Raises:
        SettingError: it is no model.
        StateError: PEFT has put adapters of its own into the model.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise SettingError(f"expected a model, a torch.nn.Module, not {model!r}")
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and (
        taken := [path for path, m in inner.named_modules() if isinstance(m, peft.BaseTunerLayer)]
    ):
        raise StateError(
            f"PEFT has adapted this model ({taken[0]}, …); take its adapters out first (model.unload(), or "
            "model.merge_and_unload() to keep them), or save them with PEFT and load the files with lorakin.load"
        )
    return inner


def fresh(
    model: nn.Module,
    placement: Placement,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """For `Graft.install`: the method's initial tensors, drawn on the CPU so that a seed means the same everywhere.

    `measured` is what a member that starts by data found, by path.
    """
    targets = {
        path: target_of(module_at(model, path))._replace(measured=(measured or {}).get(path))
        for path in placement.methods
    }
    meta = any(target.weight.device.type == "meta" for target in targets.values())
    device = torch.device("meta" if meta else "cpu")
    return placement.method.start(
        targets, placement.methods, None if meta else generator, device, dtype
    )


def _plain_copy(module: nn.Module) -> nn.Module:
    """A copy of the base's own module, without what other adapters hang on it."""
    twin = copy.deepcopy(module)
    for part in [part for part in twin.modules() if is_adapted(part)]:
        for name in attachments_of(part).names():
            detach(part, name)
    return twin


def _registry(model: nn.Module) -> Registry:
    """The model's registry; of a model without adapters, an empty one that it does not hold."""
    registry = vars(model).get("_lorakin") or Registry()
    assert isinstance(registry, Registry)
    return registry


def _attachments(model: nn.Module, path: str) -> Attachments:
    module = module_at(model, path)
    if not is_adapted(module):
        raise StateError(exchanged(path))
    return attachments_of(module)


def _mark_base(model: nn.Module, registry: Registry) -> None:
    """Keep `save_pretrained` writing the base alone, and a load that would leave the adapters untouched audible.

    With no adapter left, undo that and give the base its `requires_grad` flags back.
    """
    for module in model.modules():
        by_its_parts = isinstance(
            getattr(type(module), "_keys_to_ignore_on_save", None), property
        )  # sentence-transformers
        if hasattr(module, "_keys_to_ignore_on_save") and not by_its_parts:
            model_like: Any = module
            skip, every = ours(module), module.named_parameters(remove_duplicate=False)
            own = {key for key, _ in every if key.startswith(skip)}
            others = set(model_like._keys_to_ignore_on_save or ()) - registry.ignored.get(
                module, set()
            )
            registry.ignored[module] = own
            model_like._keys_to_ignore_on_save = others | own
    if registry.grafts and registry.hook is None:
        registry.flags = quantised.take_flags(model)
        registry.before_forward = BeforeForward(model, registry.grafts)
        registry.hook = model.register_load_state_dict_post_hook(_warn_of_missing_adapters)  # type: ignore[no-untyped-call]
        registry.ties = Ties(model)
    _hold(model, registry)
    if not registry.grafts:
        registry.hook.remove()
        if registry.before_forward is not None:
            registry.before_forward.remove()
        vars(model).update(registry.flags)
        quantised.give_back(registry.laid_out)
        for key, parameter in base_parameters(model):
            parameter.requires_grad_(registry.requires_grad.get(key, parameter.requires_grad))
        del model.__dict__["_lorakin"]


def _hold(model: nn.Module, registry: Registry) -> None:
    """Let the model see before each forward that the adapted modules are those that are there now."""
    if registry.before_forward is not None:
        paths = [p for graft in registry.grafts.values() for p in graft._paths()]
        called = [p for p in paths if not isinstance(module_at(model, p), experts.ExpertMatrix)]
        registry.before_forward.hold(model, (p for p in called if is_adapted(module_at(model, p))))


def _warn_of_missing_adapters(model: nn.Module, incompatible: Any) -> None:
    skip = ours(model)
    missing = [key for key in incompatible.missing_keys if key.startswith(skip)]
    if missing:
        warnings.warn(
            f"the state dict just loaded has no tensors for {len(missing)} entries of this model's adapters "
            f"({missing[0]}, …), which keep their present values. A checkpoint of transformers' Trainer holds the base "
            "alone unless the trainer went through lorakin.training.prepare_trainer(trainer); "
            "load adapters with lorakin.load",
            LorakinWarning,
            stacklevel=3,
        )


def _warn_of_dense(dense: Mapping[str, Tensor], stacklevel: int, permanent: bool) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in dense.values())
    beside = (
        ""
        if permanent
        else ", which save_pretrained does not write before they are merged for good"
    )
    warnings.warn(
        f"the base is quantised: merged, its {len(dense)} adapted layers are {next(iter(dense.values())).dtype} and take "
        f"{size / 2**20:,.1f} MiB{beside}. To keep what was learned in a full-precision model, merge into the base that was "
        "quantised, with lorakin merge --model",
        LorakinWarning,
        stacklevel=stacklevel + 1,
    )


__all__ = [
    "Graft",
    "Placement",
    "activate",
    "check_switchable",
    "fresh",
    "grafts",
    "merge",
    "own_weight",
    "place",
    "placement_for",
    "root_of",
    "start_of",
    "target_of",
]
