"""The public face: `adapt` a model, and the `Adapter` it returns."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lorakin.errors import AdapterError, SettingError, StateError
from lorakin.family import Member
from lorakin.storage import directory
from lorakin.surgery import graft as surgery
from lorakin.surgery.graft import Graft
from lorakin.surgery.optimizer import check_attached, parameter_groups
from lorakin.surgery.targets import ALL_LINEAR, Targets

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741 - the conventional letter for "an optimizer class"


class Adapter(Graft):
    """One named adapter in a model; made by `adapt` and `load`, found again by `adapters`."""

    def parameters(self) -> list[nn.Parameter]:
        """Every tensor of the adapter, once."""
        return list({id(parameter): parameter for _, parameter in self.named_parameters()}.values())

    @property
    def trainable_parameters(self) -> int:
        """How many numbers it trains, fully trained modules included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def parameter_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Groups for any torch optimizer; `options` (such as weight_decay) go into each of them."""
        return parameter_groups(self, lr, **options)

    def optimizer(self, cls: type[O] = torch.optim.AdamW, *, lr: float, **options: Any) -> O:  # type: ignore[assignment]
        """An optimizer of class `cls` over the adapter's groups, attached.

        Decay defaults to 0 here, not to the class's default: B starts at zero and decay pulls it back there.
        """
        if "weight_decay" in inspect.signature(cls).parameters:
            options.setdefault("weight_decay", 0.0)
        return self.attach(cls(self.parameter_groups(lr), **options))

    def attach(self, optimizer: O) -> O:
        """Check that `optimizer` trains the whole adapter, and hand it back.

        Raises:
            SettingError: it holds not all of the adapter's trainable tensors.
        """
        check_attached(self, optimizer)
        return optimizer

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the adapter to the directory `path` in PEFT's layout, whole or not at all.

        Warns if the adapter, or part of it, changes nothing: training never reached it.

        Raises:
            OutputError: it cannot be written there; an adapter that was there is intact.
        """
        directory.warn_of_zero_changes(self)
        return directory.save(self, Path(path))

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Overwrite the adapter's tensors with those saved in `path`, in place, so that optimizers keep holding them.

        Raises:
            AdapterError: the directory holds another adapter than this one. Nothing is overwritten then.
        """
        if self.is_merged:
            raise StateError(f"adapter {self.name!r} is merged; unmerge it before restoring it from {path}")
        contents = directory.read(Path(path)).match(self.model)
        if contents.plan != self.plan:
            raise AdapterError(f"{path}: it holds another adapter than {self!r}: {contents.plan.member}")
        with torch.no_grad():
            for at, tensors in contents.sites.items():
                for slot, parameter in self.site(at).tensors().items():
                    parameter.copy_(tensors[slot])
            for at, state in contents.copies.items():
                self.copy_of(at).load_state_dict(state)

    def __repr__(self) -> str:
        state = "merged" if self.is_merged else "active" if self.is_active else "inactive"
        return f"Adapter({self.name!r}, {self.plan.member}, {len(self.plan.sites)} modules, {state})"


def adapt(
    model: nn.Module,
    member: Member,
    targets: Targets = ALL_LINEAR,
    *,
    name: str = "default",
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Put a fresh adapter into `model`, which stays itself: same class, same names, same output until it is trained.

    The base is frozen; the new adapter is the active one (see `activate`). The adapter's tensors are float32 whatever
    the base's dtype (float64 on a float64 base) and take part in the forward in the base's dtype.

    Args:
        model: any module with linear, Conv1D, embedding or convolution layers.
        member: what to put in, such as `LoRA(rank=16, alpha=32)`.
        targets: "all-linear" (every linear layer but the head); a name, glob or regular expression, or a list of
            them; or a function of (path, module). A name selects modules whose path ends in it.
        name: the adapter's name.
        exclude: patterns of modules to leave out.
        layers: only modules inside these repeated layers, e.g. [0, 1, -1].
        rank_pattern, alpha_pattern: regular expression → a rank or alpha of its own, as in PEFT; the first that
            matches the end of a module's path wins.
        modules_to_save: names of modules to train whole, such as a new head; the adapter trains a copy.
        seed: draw the initial tensors from a generator of their own with this seed.
        dtype: another dtype for the adapter's tensors.

    Raises:
        SettingError: a rank above a weight's smaller side, a name that is taken.
        TargetError: a pattern that selects nothing, or something that cannot be adapted.
        StateError: another adapter is merged at the moment.
    """
    model = surgery.root_of(model)
    if not isinstance(member, Member):
        raise SettingError(f"adapt needs a member with its settings, such as lk.LoRA(rank=16), not {member!r}")
    chosen = surgery.plan(
        model,
        member,
        targets,
        exclude=exclude,
        layer_indices=layers,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        modules_to_save=modules_to_save,
    )
    adapter = Adapter(model, name, chosen)
    adapter.install(surgery.fresh(None if seed is None else torch.Generator().manual_seed(seed), dtype))
    adapter.freeze_base()
    return adapter


def load(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", trainable: bool = False) -> Adapter:
    """Put the adapter saved in the directory `path`, by lorakin or by PEFT, into `model`, and make it the active one.

    Args:
        model: the base model that the adapter was trained on.
        path: the adapter's directory.
        name: the name it gets here; files carry none.
        trainable: go on training it, which freezes the base; otherwise no `requires_grad` changes.

    Raises:
        AdapterError: missing, unknown or misshapen tensors, unsupported settings, or another base. The model is then
            as it was before.
    """
    model = surgery.root_of(model)
    contents = directory.read(Path(path)).match(model)
    adapter = Adapter(model, name, contents.plan)

    def tensors(at: str, module: nn.Module, member: Member) -> dict[str, torch.Tensor]:
        saved = contents.sites[at]
        if not trainable:
            return dict(saved)  # in the file's dtype
        return {slot: t.to(torch.promote_types(t.dtype, torch.float32)) for slot, t in saved.items()}  # float32 masters

    adapter.install(tensors, contents.copies)
    if trainable:
        adapter.freeze_base()
    else:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return adapter


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in `model`, by name."""
    return {name: graft for name, graft in surgery.grafts(surgery.root_of(model)).items() if isinstance(graft, Adapter)}


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use exactly these adapters; several add up, `[]` leaves the base alone. Changes no `requires_grad`.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole.
        StateError: an adapter is merged.
    """
    surgery.activate(surgery.root_of(model), names)
