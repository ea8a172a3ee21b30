"""A training run of an adapter: its steps, what members do at them, and callbacks for others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError, StateError, some
from lorakin.family import Method, Rule
from lorakin.inject.adapted import attachments_at, module_at
from lorakin.inject.branch import Branch
from lorakin.inject.part import Part
from lorakin.inject.placed_module import PlacedModule
from lorakin.kernels.autograd import is_capturing

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


class AdapterCallback:
    """Callbacks for packages that import this one, such as lorakin.loop.

    Append an instance to `CALLBACKS`.
    """

    def made(self, adapter: InsertedAdapter) -> None:
        """Is called when an adapter's object is made, also as a copy; nothing is in it yet."""

    def begins(self, adapter: InsertedAdapter) -> None:
        """Is called when a training run begins."""

    def before_backward(self, adapter: InsertedAdapter) -> None:
        """Is called when a forward begins whose backward may train the adapter."""

    def before_first_step(self, adapter: InsertedAdapter) -> None:
        """Is called when an optimizer is about to take the run's first step."""


DAMAGED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a rule raises that is given a state with other contents than it saved."""
CALLBACKS: list[AdapterCallback] = []
"""The callbacks of all adapters; lorakin.loop adds its own when it is imported."""


class AdapterRun(Part):
    """An adapter's training run: how far it has come, and what members do at its steps."""

    def __init__(self, adapter: InsertedAdapter) -> None:
        super().__init__(adapter)
        self.resolved_method: Method | None = None
        self.rules: list[Rule] | None = None
        self.steps = 0
        self._stepped = False
        self.rate_factors: dict[float, int] = {}
        self.warned_of_rates = False
        self._state: Mapping[str, Any] | None = None
        self._in_graph: list[int] | None = None

    @property
    def method(self) -> Method:
        """The method, with what its run has decided."""
        return self.resolved_method or self.placement.method

    def begin(self, total_steps: int | None = None) -> None:
        """Prepares a run of `total_steps` optimizer steps (None if that is not known).

        It begins at step 1, or at the step of a restored state.

        Raises:
            SettingError: a member cannot be run like that.
        """
        if total_steps is not None and (
            not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1
        ):
            raise SettingError(f"total_steps must be a whole number ≥ 1, not {total_steps!r}")
        method = self.placement.method.resolved(total_steps)
        if self.rules is not None and not self._stepped and method == self.resolved_method:
            # It was begun twice before the first step, by Trainer and by `Adapter.attach`.
            return
        self.end()
        self.resolved_method, self.rules = method, method.rules(self.adapted_modules())
        self.steps, self._stepped = 0, False
        self.rate_factors, self.warned_of_rates = {}, False
        for callback in CALLBACKS:
            callback.begins(self.adapter)
        if self._state is not None:
            self.restore_state(self._state)

    def end(self) -> None:
        """Lets the run's rules remove what they keep outside the adapter's tensors."""
        for rule in self.rules or ():
            rule.end()

    def adapted_modules(self) -> list[PlacedModule]:
        """Returns the adapted modules, as members' rules see them."""
        return [PlacedModule(self.adapter, path) for path in self.placement.methods]

    def before_backward(self) -> None:
        """Calls the callbacks when a forward begins whose backward may train the adapter."""
        for callback in CALLBACKS:
            callback.before_backward(self.adapter)

    def is_captured(self) -> None:
        """Remembers that a CUDA graph captures a forward, and so where its tensors are now."""
        self._in_graph = self._addresses()

    def _addresses(self) -> list[int]:
        weights = (module_at(self.model, path)._parameters for path in self.placement.methods)
        tensors = [t for of_module in weights if (t := of_module.get("weight")) is not None]
        tensors += (parameter for _, parameter in self.adapter.tensors.named_parameters())
        return [tensor.data_ptr() for tensor in tensors]

    def before_step(self) -> None:
        """Runs what members do before a step, when gradients are complete.

        Raises:
            StateError: a CUDA graph captures the step, whose replays would leave that out.
        """
        if is_capturing() and not all(rule.is_same_at_each_step for rule in self.rules or ()):
            raise StateError(
                f"a CUDA graph captures the optimizer's step, but its replays run no Python, so "
                f"what {self.method.words} does at steps would happen once. Capture the forward "
                "and the backward, and call optimizer.step() after each replay"
            )
        if not self._stepped:
            for callback in CALLBACKS:
                callback.before_first_step(self.adapter)
            self._warn_of_unreached()
        for rule in self.rules or ():
            rule.before(self.steps + 1)

    def _warn_of_unreached(self) -> None:
        """Warns of modules, and of slots in all other modules, that got no gradient at first."""
        reached: list[nn.Module] = []
        unreached: list[str] = []
        for path in self.adapter.tensors.paths():
            child = attachments_at(self.model, path)[self.name]
            trained = [p for p in child.parameters() if p.requires_grad]
            if any(p.grad is not None for p in trained):
                reached.append(child)
            elif trained:
                unreached.append(path)
        if unreached:
            warnings.warn(
                f"the first step of adapter {self.name!r} has no gradient for {len(unreached)} of "
                f"{len(unreached) + len(reached)} modules ({some(unreached)}): the forward of the "
                "model did not use them on these data. What it never uses does not train; leave it "
                "out of the targets",
                LorakinWarning,
                stacklevel=2,
            )
        if unused := _slots_without_gradient(reached):
            warnings.warn(
                f"the first step of adapter {self.name!r} has no gradient for the slots "
                f"{some(unused)} of any module: what {self.placement.method.words} computes does "
                "not use them, so they do not train",
                LorakinWarning,
                stacklevel=2,
            )

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs what members do after a step of the optimizer."""
        self.steps, self._stepped, self._state = self.steps + 1, True, None
        for rule in self.rules or ():
            rule.after(self.steps, optimizer)
        if self._in_graph is not None and self._in_graph != self._addresses():
            self._in_graph = None
            warnings.warn(
                f"after step {self.steps} {self.method.words} has other tensors than the CUDA "
                "graph that captured its forward, which goes on with the old ones: capture it "
                "again",
                LorakinWarning,
                stacklevel=2,
            )

    def state(self) -> dict[str, Any]:
        """Returns how far training has come, for `restore_state`: nested dicts and lists."""
        return {"steps": self.steps, "rules": [rule.state() for rule in self.rules or ()]}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from `state`, also after a `begin` that follows before the first step.

        The adapter's tensors are restored already.
        """
        self._state = state
        if self.rules is None:
            return
        if len(self.rules) != len(state["rules"]):
            raise StateError(
                "the saved training state belongs to another method than "
                f"{self.placement.method.words}"
            )
        self.steps = state["steps"]
        try:
            for rule, saved in zip(self.rules, state["rules"], strict=True):
                rule.restore(saved)
        except DAMAGED as error:
            raise StateError(
                f"the saved training state is damaged ({error}); resume from an earlier checkpoint"
            ) from None

    def extra_tensors(self, path: str) -> dict[str, Tensor]:
        """Returns what the adapter's files must hold of the module at `path` beside its tensors."""
        return {
            name: t for rule in self.rules or () for name, t in rule.extra_tensors(path).items()
        }


def _slots_without_gradient(modules: Iterable[nn.Module]) -> list[str]:
    """Returns the trained slots that have no gradient in any of these modules."""
    has_gradient: dict[str, bool] = {}
    for module in modules:
        if isinstance(module, Branch):
            for slot, tensor in module.tensors().items():
                if tensor.requires_grad:
                    has_gradient[slot] = has_gradient.get(slot, False) or tensor.grad is not None
    return [slot for slot, has in has_gradient.items() if not has]
