"""The public face of an adapter in a model: `Adapter`, and what loads, switches and merges them."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lorakin.errors import AdapterError, StateError
from lorakin.family import widened
from lorakin.inject import placement
from lorakin.inject.description import described, in_one_line
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.model_registry import root_of
from lorakin.loop.optimizer_hooks import trained_by
from lorakin.loop.parameter_groups import check_attached, check_rates, parameter_groups
from lorakin.storage import directory, hub
from lorakin.storage.document import Document

FUSED: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
)
"""Optimizers that have a kernel of one pass over each tensor."""
O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741 - the conventional letter for "an optimizer class"


class Adapter(InsertedAdapter):
    """One named adapter in a model; made by `adapt` and `load`, found again by `adapters`.

    It is made of a few things with one job each: `placement`, which modules it adapts and with what
    settings; `tensors`, what it has placed there; `merging`, how it takes part in the model; `run`, what
    its training has come to.
    """

    # What it has placed in the model.

    def parameters(self) -> list[nn.Parameter]:
        """Every tensor of the adapter, once."""
        return list({id(p): p for _, p in self.tensors.named_parameters()}.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every tensor of the adapter, as (`<path>.<slot>`, parameter), trained or not."""
        return self.tensors.named_parameters()

    def modules(self) -> list[nn.Module]:
        """What holds its tensors in each place of the model.

        For whatever shards or moves a model and should leave them out, such as FSDP.
        """
        return self.tensors.modules()

    # How it takes part.

    @property
    def is_active(self) -> bool:
        """Whether it takes part in the forward; see `activate`."""
        return self.merging.is_active

    @property
    def is_merged(self) -> bool:
        """Whether it is folded into the weights."""
        return self.merging.is_merged

    def merge(self, *, permanent: bool = False) -> None:
        """Fold the adapter into the weights; the forward then costs what the base's does.

        Merging twice is merging once. The base's parameters are kept aside for `unmerge`: one more copy
        of each adapted weight, until then. With `permanent` they are given up and the adapter leaves the
        model, which is a plain model again.

        Raises:
            StateError: a merged weight would not be finite (nothing is merged then), the adapter is
                disabled, or another adapter would then be another function.
        """
        self.merging.merge(permanent=permanent)

    def unmerge(self) -> None:
        """Give the base its own parameters back, bit for bit."""
        self.merging.unmerge()

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """`with adapter.disabled(): …` leaves the adapter out of the forward, also while merged. Nests."""
        return self.merging.disabled()

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
        return self.merging.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.merging.scale = scale

    def scaled(self, scale: float) -> contextlib.AbstractContextManager[None]:
        """`with adapter.scaled(0.5): …` sets the scale, and what it was before behind it."""
        return self.merging.scaled(scale)

    # How it trains.

    @property
    def trainable_parameters(self) -> int:
        """How many numbers it trains, fully trained modules included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def parameter_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Groups for any torch optimizer; `options` (such as weight_decay) go into each of them.

        Decay spares what the method says, and the biases and normalisations of modules trained whole.
        """
        return parameter_groups(self, lr, **options)

    def optimizer(
        self,
        cls: type[O] = torch.optim.AdamW,  # type: ignore[assignment]
        *,
        lr: float,
        total_steps: int | None = None,
        **options: Any,
    ) -> O:
        """An optimizer of class `cls` over the adapter's groups, attached.

        Decay defaults to 0 here, not to the class's default: B starts at zero and decay pulls it back there. Given one, it
        acts as `parameter_groups` says.
        torch's Adam, AdamW and SGD take their fused kernel where nothing else is asked for.
        `total_steps`, the optimizer steps of the run, is needed only for members that plan over it, such as AdaLoRA.
        """
        if "weight_decay" in inspect.signature(cls).parameters:
            options.setdefault("weight_decay", 0.0)
        if cls in FUSED and not {"foreach", "differentiable"} & options.keys():
            devices = {parameter.device.type for parameter in self.parameters()}
            options.setdefault("fused", devices <= {"cpu", "cuda"})
        decay = {name: options[name] for name in ("weight_decay",) if name in options}
        return self.attach(cls(self.parameter_groups(lr, **decay), **options), total_steps)

    def attach(self, optimizer: O, total_steps: int | None = None) -> O:
        """Begin a run with `optimizer`, once it is clear that it trains the whole adapter as the method says; returns it.

        What a member does at each step hangs on the optimizer's steps by itself; nothing need be called while training.

        Raises:
            SettingError: it holds not all of the adapter's trainable tensors, or a member cannot be run like that.
            StateError: it lacks learning rates that the method relates to each other.
        """
        check_attached(self, optimizer)
        self.run.begin(total_steps)
        trained_by(optimizer)
        check_rates(self, optimizer)
        return optimizer

    def save(
        self, path: str | os.PathLike[str], *, notes: Mapping[str, object] | None = None
    ) -> Path:
        """Write the adapter to the directory `path` in PEFT's layout, whole or not at all.

        A model card, README.md, is among the files, unless one that a person wrote is there. `notes` are more lines of it:
        `{"Data": "rows.jsonl", "Held-out loss": "2.31 before, 1.87 after"}`.
        Warns if the adapter, or part of it, changes nothing: training never reached it.

        Raises:
            StateError: a member did not do what it is for, such as an allocator that never ran.
            OutputError: it cannot be written there; an adapter that was there is intact.
        """
        directory.check_trained(self)
        return directory.save(self, Path(path), notes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> Any:
        """Save the adapter, with its card, into the hub's repository `repo_id`, which is made if it is not there.

        Args:
            repo_id: `org/name`, or `name` for your own.
            private: of a repository that is made now; None is the hub's own default.
            token: instead of the one that `hf auth login` keeps.
            commit_message: of the commit.
            revision: the branch, made if need be.
            notes: see `save`.

        Returns:
            huggingface_hub's CommitInfo: text, the commit's address.

        Raises:
            StateError: see `save`.
            OutputError: huggingface_hub is not installed; no token, no rights, no network.
        """
        directory.check_trained(self)
        return hub.upload(
            lambda folder: directory.save(
                self, folder, notes, home=repo_id if "/" in repo_id else None
            ),
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
        )

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Overwrite the adapter's tensors with those saved in `path`, in place, so that optimizers keep holding them.

        Files of PEFT's do not say how the adapter was trained: it is enough that it computes what this one does, so that a
        plain pair goes into LoRA+, and what this one's members do while training stays.

        Raises:
            AdapterError: the directory holds another adapter than this one. Nothing is overwritten then.
        """
        if self.merging.is_merged:
            raise StateError(
                f"adapter {self.name!r} is merged; unmerge it before restoring it from {path}"
            )
        files = directory.read(Path(path))
        if (other := files.beside.rewritten) is not None:
            raise AdapterError(
                f"{path}: {other} is not the one that {directory.OWN} was written with, so what training remembered is lost. "
                f"To restore what PEFT's files say alone, remove {directory.OWN}"
            )
        document = files.match(self.model)
        if not self._is_as(document.placement, training=files.own is not None):
            raise AdapterError(
                f"{path}: it holds another adapter than {self!r}: {document.placement.method}"
            )
        self.run.end()
        with torch.no_grad():
            for at, tensors in document.slots.items():
                self.tensors.branch(at).overwrite(tensors)
            for at, state in document.copies.items():
                self.tensors.copy_of(at).load_state_dict(state)
            for at, rows in document.rows.items():
                self.tensors.rows_at(at).copy_(rows)
            for at, bias in self.tensors.biases().items():
                bias.copy_(document.biases[at])
            self.tensors.take_buffers(document.buffers)
        if document.state is not None:
            self.run.restore_state(document.state)

    def _is_as(self, plan: placement.Placement, training: bool) -> bool:
        """Whether `plan` is this adapter's, but for what a member decides when a run begins and for ranks freed since."""
        mine, its = self.placement, plan
        if (list(mine.methods), mine.copies, mine.tokens) != (
            list(its.methods),
            its.copies,
            its.tokens,
        ) or mine.biases != its.biases:
            return False
        pairs = [(method, its.methods[path]) for path, method in mine.methods.items()] or [
            (mine.method, its.method)
        ]
        distinct = {(id(one), id(other)): (one, other) for one, other in pairs}
        return all(one.agrees_with(other, training) for one, other in distinct.values())

    def __repr__(self) -> str:
        return in_one_line(self)

    def __str__(self) -> str:
        return described(self)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = False,
    other_base: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Put a saved adapter, lorakin's or PEFT's, into `model`, and make it the active one.

    Args:
        model: the base model that the adapter was trained on.
        path: the adapter's directory, or, if there is none of that name, a hub id, `org/name`.
        name: the name it gets here; files carry none.
        trainable: go on training it, which freezes the base; otherwise no `requires_grad` changes.
        other_base: also if the adapter remembers a base with other weights than these.
        revision: the hub's branch, tag or commit.
        token: for the hub, instead of the one that `hf auth login` keeps.
        subfolder: where the adapter lies in the directory or the hub's repository.

    Raises:
        AdapterError: missing, unknown or misshapen tensors, unsupported settings, another base, or nothing that the hub
            gives. The model is then as it was before.
    """
    model = root_of(model)
    there = hub.adapter_directory(path, revision=revision, token=token, subfolder=subfolder)
    return placed(model, name, directory.read(there).match(model, other_base), trainable)


def placed(model: nn.Module, name: str, document: Document, trainable: bool = False) -> Adapter:
    """Put into `model` what was read from an adapter's files, as the active adapter."""
    adapter = Adapter(model, name, document.placement)
    if trainable:
        adapter.install(
            document.masters(),
            document.copies,
            rows=widened(document.rows),
            biases=document.bias_masters(),
        )
    else:
        adapter.install(
            document.slots, document.copies, document.buffers, document.rows, document.biases
        )
    if trainable:
        adapter.tensors.take_buffers(document.buffers)
        adapter.freeze_base()
    else:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return adapter
