"""What an adapter has placed in its model: its tensors, and what they make of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family import FrozenWeight, Pair, widened
from lorakin.family.pair import ScaledPair
from lorakin.family.sharding import whole_shape
from lorakin.inject.adapted import is_adapted, module_at, resized_message
from lorakin.inject.attachments import Attachments, attachments_of, base_state
from lorakin.inject.branch import Branch, Copy
from lorakin.inject.layer_kinds import ExpertLayer
from lorakin.inject.model_registry import registry_of
from lorakin.inject.part import Part, attachments_at
from lorakin.inject.placement import base_weight_of, target_of
from lorakin.inject.token_rows import TokenRowsBranch
from lorakin.inject.trainable_tokens import places_of


class AdapterTensors(Part):
    """What an adapter has placed in its model: its tensors, and the modules that hold them."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every tensor of the adapter, as (`<path>.<tensor>`, parameter), trained or not."""
        for path in self.paths():
            child = attachments_at(self.model, path)[self.name]
            inner = child.module if isinstance(child, Copy) else child
            yield from (
                (f"{path}.{key}", p) for key, p in inner.named_parameters(remove_duplicate=False)
            )

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of them that train; none once the adapter is gone."""
        return (
            (name, p)
            for name, p in (self.named_parameters() if self.adapter.is_present else ())
            if p.requires_grad
        )

    def modules(self) -> list[nn.Module]:
        """The modules that hold its tensors, one for each place in the model.

        For whatever shards or moves a model and should leave them out.
        """
        return [attachments_at(self.model, path)[self.name] for path in self.paths()]

    def branch(self, path: str) -> Branch:
        """The adapter's tensors on the module at `path`."""
        branch = attachments_at(self.model, path)[self.name]
        assert isinstance(branch, Branch)
        return branch

    def pair_at(self, path: str) -> Pair:
        """The pair of the module at `path` with its gain over the base weight, float32 at least."""
        return self.branch(path).pair(target_of(module_at(self.model, path)).weight)

    def base_weight(self, path: str) -> Tensor:
        """The weight of the module at `path` as a matrix; see `base_weight_of`."""
        return base_weight_of(module_at(self.model, path))

    def change_at(self, path: str) -> Pair:
        """The whole change of the module at `path`, scaled as it is now; float32 at least."""
        branch = self.branch(path)
        pair = branch.method.pair(widened(self.at(path)), branch.shape, self.base_weight(path))
        return pair.times(branch.scale)

    def scaled_pair_at(self, path: str) -> ScaledPair:
        """The same with the scale beside `up`, where the pair has one."""
        branch = self.branch(path)
        tensors, weight = widened(self.at(path)), FrozenWeight(self.base_weight(path))
        return branch.method.scaled_pair(tensors, branch.shape, weight).times(branch.scale)

    def experts(self) -> list[str]:
        """Paths of adapted modules that are matrices of a stack of experts, and never called."""
        return [path for path in self.placement.methods if self.branch(path).kind is ExpertLayer]

    def copy_of(self, path: str) -> nn.Module:
        """The adapter's own copy of the module at `path`, which it trains whole."""
        child = attachments_at(self.model, path)[self.name]
        assert isinstance(child, Copy)
        return child.module

    def rows_at(self, path: str) -> nn.Parameter:
        """The rows of tokens (k, dim) that the adapter trains in the module at `path`."""
        child = attachments_at(self.model, path)[self.name]
        assert isinstance(child, TokenRowsBranch)
        return child.rows

    def biases(self) -> dict[str, nn.Parameter]:
        """Its own biases, by the path of the module."""
        own = {
            path: attachments_at(self.model, path).bias_of(self.name)
            for path in self.placement.biases
        }
        return {path: bias for path, bias in own.items() if bias is not None}

    def at(self, path: str) -> dict[str, Tensor]:
        """All that a file must hold of the module at `path`, by slot."""
        tensors: dict[str, Tensor] = dict(self.branch(path).tensors())
        return tensors | self.adapter.run.extra_tensors(path)

    def moved_buffers(self) -> dict[str, Tensor]:
        """Those of its own buffers that are no longer the base's, by name."""
        return registry_of(self.model).buffers.moved(self.model, self.adapter)

    def base_buffer(self, name: str) -> Tensor | None:
        """The base's own buffer of this name, which may be set aside."""
        return registry_of(self.model).buffers.own(self.model, name)

    def take_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Let its own buffers hold these values, and the base's where none is given."""
        known = registry_of(self.model).buffers
        for name in self.adapter.buffers:
            known.put(self.model, self.adapter, name, values.get(name, known.own(self.model, name)))

    def check_sizes(self) -> None:
        """Raise `StateError` if a module was resized since it was adapted."""
        for path in (*self.placement.methods, *places_of(self.placement.tokens)):
            attached, module = attachments_at(self.model, path), module_at(self.model, path)
            weight = module._parameters.get("weight")
            if weight is not None and attached.shape not in (None, whole_shape(weight)):
                raise StateError(resized_message(path, attached.shape or (), whole_shape(weight)))
        for path in self.placement.whole_modules:
            base, own = (base_state(m) for m in (module_at(self.model, path), self.copy_of(path)))
            for key in own.keys() & base.keys():
                if whole_shape(own[key]) != whole_shape(base[key]):
                    raise StateError(
                        resized_message(
                            f"{path}.{key}", whole_shape(own[key]), whole_shape(base[key])
                        )
                    )

    def attachments(self) -> list[Attachments]:
        """What is attached to these modules, as far as they are still there."""
        modules = [module_at(self.model, path) for path in self.paths()]
        return [attachments_of(module) for module in modules if is_adapted(module)]

    def paths(self) -> tuple[str, ...]:
        """Every module that it has something on."""
        beside = (path for path in self.placement.biases if path not in self.placement.methods)
        return (
            *self.placement.methods,
            *self.placement.whole_modules,
            *places_of(self.placement.tokens),
            *beside,
        )
