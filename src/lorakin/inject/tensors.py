"""The parameters of an adapter, by module, and the change that they make of each weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family import FrozenWeight, Pair, widened
from lorakin.family.pair import ScaledPair
from lorakin.family.sharding import whole_shape
from lorakin.inject.adapted import attachments_at, is_adapted, module_at, resized_message
from lorakin.inject.attachments import Attachments, attachments_of, base_state
from lorakin.inject.branch import Branch, Copy
from lorakin.inject.layer_kinds import ExpertLayer, unadapted
from lorakin.inject.model_registry import registry_of
from lorakin.inject.part import Part
from lorakin.inject.placement import base_weight_of
from lorakin.inject.token_rows import TokenRowsBranch
from lorakin.inject.trainable_tokens import paths_with_rows


class AdapterTensors(Part):
    """The parameters of an adapter, and the modules that hold them."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every parameter as (`<path>.<slot>`, parameter), trained or not."""
        for path in self.paths():
            child = attachments_at(self.model, path)[self.name]
            inner = child.module if isinstance(child, Copy) else child
            yield from (
                (f"{path}.{key}", p) for key, p in inner.named_parameters(remove_duplicate=False)
            )

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields those of them that train; none once the adapter is removed."""
        return (
            (name, p)
            for name, p in (self.named_parameters() if self.adapter.is_present else ())
            if p.requires_grad
        )

    def modules(self) -> list[nn.Module]:
        """Returns the modules that hold its parameters, one for each adapted path.

        For code that shards or moves a model and should leave them out.
        """
        return [attachments_at(self.model, path)[self.name] for path in self.paths()]

    def branch(self, path: str) -> Branch:
        """Returns the adapter's tensors on the module at `path`."""
        branch = attachments_at(self.model, path)[self.name]
        assert isinstance(branch, Branch)
        return branch

    def pair_now(self, path: str) -> Pair:
        """Returns the pair of the module at `path` over its base weight, for inspection.

        It is in float32 at least. Tensors that only files hold, such as Delta-LoRA's anchors, do
        not count; see `saved_change`.
        """
        return self.branch(path).pair(unadapted(module_at(self.model, path)).weight)

    def base_weight(self, path: str) -> Tensor:
        """Returns the base weight of the module at `path` as a matrix; see `base_weight_of`."""
        return base_weight_of(module_at(self.model, path))

    def saved_change(self, path: str) -> Pair:
        """Returns the change of the module at `path` that files would hold, times `scale`.

        It is in float32 at least, and includes what rules add (Delta-LoRA's anchors).
        """
        branch = self.branch(path)
        pair = branch.method.pair(
            widened(self.saved_tensors(path)), branch.shape, self.base_weight(path)
        )
        return pair.times(branch.scale)

    def saved_scaled_pair(self, path: str) -> ScaledPair:
        """Returns `saved_change` with its scale apart from `up`, where the pair has one."""
        branch = self.branch(path)
        tensors, weight = widened(self.saved_tensors(path)), FrozenWeight(self.base_weight(path))
        return branch.method.scaled_pair(tensors, branch.shape, weight).times(branch.scale)

    def expert_paths(self) -> list[str]:
        """Returns the adapted paths that are matrices of a stack of experts, never called."""
        return [path for path in self.placement.methods if self.branch(path).kind is ExpertLayer]

    def copy_of(self, path: str) -> nn.Module:
        """Returns the adapter's copy of the module at `path`, which it trains whole."""
        child = attachments_at(self.model, path)[self.name]
        assert isinstance(child, Copy)
        return child.module

    def rows_at(self, path: str) -> nn.Parameter:
        """Returns the rows of tokens (k, dim) that it trains in the module at `path`."""
        child = attachments_at(self.model, path)[self.name]
        assert isinstance(child, TokenRowsBranch)
        return child.rows

    def biases(self) -> dict[str, nn.Parameter]:
        """Returns the adapter's biases, by the path of the module."""
        biases = {
            path: attachments_at(self.model, path).bias_of(self.name)
            for path in self.placement.biases
        }
        return {path: bias for path, bias in biases.items() if bias is not None}

    def saved_tensors(self, path: str) -> dict[str, Tensor]:
        """Returns what a file must hold of the module at `path`, by slot."""
        tensors: dict[str, Tensor] = dict(self.branch(path).tensors())
        return tensors | self.adapter.run.extra_tensors(path)

    def moved_buffers(self) -> dict[str, Tensor]:
        """Returns the adapter's buffers that differ from the base's, by name."""
        return registry_of(self.model).buffers.moved(self.model, self.adapter)

    def base_buffer(self, name: str) -> Tensor | None:
        """Returns the base's buffer of this name, also while the adapter's is in the model."""
        return registry_of(self.model).buffers.base_buffer(self.model, name)

    def take_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites the adapter's buffers with these values, or the base's where none is given."""
        buffers = registry_of(self.model).buffers
        for name in self.adapter.buffers:
            value = values.get(name, buffers.base_buffer(self.model, name))
            buffers.put(self.model, self.adapter, name, value)

    def check_sizes(self) -> None:
        """Checks that no module was resized since it was adapted.

        Raises:
            StateError: one was.
        """
        for path in (*self.placement.methods, *paths_with_rows(self.placement.tokens)):
            attached, module = attachments_at(self.model, path), module_at(self.model, path)
            weight = module._parameters.get("weight")
            if weight is not None and attached.shape not in (None, whole_shape(weight)):
                raise StateError(resized_message(path, attached.shape or (), whole_shape(weight)))
        for path in self.placement.whole_modules:
            base = base_state(module_at(self.model, path))
            trained = base_state(self.copy_of(path))
            for key in trained.keys() & base.keys():
                shape_before, shape_now = whole_shape(trained[key]), whole_shape(base[key])
                if shape_before != shape_now:
                    raise StateError(resized_message(f"{path}.{key}", shape_before, shape_now))

    def attachments(self) -> list[Attachments]:
        """Returns the attachments of these modules, as far as they are still in the model."""
        modules = [module_at(self.model, path) for path in self.paths()]
        return [attachments_of(module) for module in modules if is_adapted(module)]

    def paths(self) -> tuple[str, ...]:
        """Returns all paths at which the adapter has something."""
        only_biases = (p for p in self.placement.biases if p not in self.placement.methods)
        return (
            *self.placement.methods,
            *self.placement.whole_modules,
            *paths_with_rows(self.placement.tokens),
            *only_biases,
        )
