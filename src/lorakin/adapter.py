"""`Adapter`: one adapter in a model, for users: parameters, merging, scale, optimizers, files."""

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
from lorakin.inject.description import described, in_one_line
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.placement_difference import difference_in_words
from lorakin.loop.optimizer_hooks import follow_optimizer
from lorakin.loop.parameter_groups import check_attached, check_rates, parameter_groups
from lorakin.storage import directory, hub

FUSED: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
)
"""Optimizers that have a kernel of one pass over each tensor."""
O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741 - the conventional letter for "an optimizer class"


class Adapter(InsertedAdapter):
    """One named adapter in one model. `adapt` and `load` make it; `adapters` finds it again.

    Attributes:
        model: the model that it is in.
        name: its name there.
        method: the members, with what its run has decided.
        placement: which modules it adapts, and with what settings.
        tensors: its parameters, by module.
        effect: whether, how strongly and in which form it acts.
        run: how far its training has come.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=2), targets="0")
    >>> adapter.trainable_parameters
    20
    >>> adapter.remove()
    """

    # Its parameters.

    def parameters(self) -> list[nn.Parameter]:
        """Returns every parameter of the adapter once, frozen ones included.

        For an optimizer use `parameter_groups`.
        """
        return list({id(p): p for _, p in self.tensors.named_parameters()}.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every parameter as (`<path>.<slot>`, parameter), frozen ones included."""
        return self.tensors.named_parameters()

    def modules(self) -> list[nn.Module]:
        """Returns the modules that hold its parameters, one for each adapted path.

        Pass them to code that shards or moves the model and should leave them out, such as FSDP.
        """
        return self.tensors.modules()

    # How it acts.

    @property
    def is_active(self) -> bool:
        """Whether it is one of the active adapters; see `activate`."""
        return self.effect.is_active

    @property
    def is_merged(self) -> bool:
        """Whether it is folded into the weights."""
        return self.effect.is_merged

    def merge(self, *, permanent: bool = False) -> None:
        """Folds the adapter into the weights. The forward then costs what the base's does.

        PEFT: `merge_adapter`; with `permanent`, `merge_and_unload`. `unmerge` needs the base's
        parameters, so they are kept: one more copy of each adapted weight. With `permanent` they
        are not kept, and the adapter leaves the model, which is a plain model again. Merging a
        merged adapter does nothing.

        Raises:
            StateError: a merged weight would not be finite (then nothing is merged), the adapter is
                disabled, or another adapter would compute something else afterwards.
        """
        self.effect.merge(permanent=permanent)

    def unmerge(self) -> None:
        """Gives the base its parameters back, bit for bit (PEFT: `unmerge_adapter`)."""
        self.effect.unmerge()

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Switches the adapter off inside a `with` block, also while it is merged. Blocks nest.

        PEFT: `disable_adapter`.

        >>> import lorakin as lk
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> adapter = lk.adapt(model, lk.LoRA(rank=2), targets="0")
        >>> with adapter.disabled():
        ...     of_base = model(torch.ones(1, 6))
        """
        return self.effect.disabled()

    @property
    def scale(self) -> float:
        """The factor on the adapter's change: 1 at first, 0 for no change; any finite number.

        W = W0 + scale · (the adapter's weight − W0), in every adapted module, a gain included. It
        acts in inference, training and merging, but not on modules that are trained whole. It
        belongs to this model in memory: files do not hold it. Setting it on a merged adapter merges
        again. PEFT: `set_scale`, `scale_layer`.

        Raises:
            SettingError: the new value is no finite number.
            StateError: inside `mixed_batch`, or the adapter has moved the base weights in place.
        """
        return self.effect.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.effect.scale = scale

    def scaled(self, scale: float) -> contextlib.AbstractContextManager[None]:
        """Uses another scale inside a `with` block: `with adapter.scaled(0.5): …`. See `scale`."""
        return self.effect.scaled(scale)

    def remove(self) -> None:
        """Takes the adapter out of its model (PEFT: `delete_adapter`, `unload`).

        Merged weights are restored first. Removing the last adapter restores the modules' classes,
        the `requires_grad` flags and `save_pretrained` as they were.

        Raises:
            StateError: it was removed before, or the model is in a `mixed_batch`.
        """
        super().remove()

    # How it trains.

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters, those of modules trained whole included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def parameter_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Returns parameter groups for any torch optimizer, with the rates that the method needs.

        Weight decay does not act on the tensors that the method exempts (magnitudes, VeRA's
        vectors), nor on biases and normalisations of modules trained whole.

        Args:
            lr: the learning rate that the method's rates are multiples of.
            options: for every group, such as `weight_decay=0.01`.
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
        """Makes an optimizer of class `cls` over `parameter_groups`, and attaches it.

        torch's Adam, AdamW and SGD use their fused kernel unless you choose another.

        >>> import lorakin as lk
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> optimizer = lk.adapt(model, lk.LoRA(rank=2), targets="0").optimizer(lr=2e-4)
        >>> type(optimizer).__name__, optimizer.param_groups[0]["weight_decay"]
        ('AdamW', 0.0)

        Args:
            cls: any torch optimizer class.
            lr: see `parameter_groups`.
            total_steps: the optimizer steps of the run, for members that plan over it, such as
                AdaLoRA.
            options: for `cls`. `weight_decay` is 0 unless you give it, whatever the class's
                default: B starts at zero, and decay pulls it back there.

        Raises:
            SettingError: a member cannot be run like that.
        """
        if "weight_decay" in inspect.signature(cls).parameters:
            options.setdefault("weight_decay", 0.0)
        if cls in FUSED and not {"foreach", "differentiable"} & options.keys():
            devices = {parameter.device.type for parameter in self.parameters()}
            options.setdefault("fused", devices <= {"cpu", "cuda"})
        decay = {"weight_decay": options["weight_decay"]} if "weight_decay" in options else {}
        return self.attach(cls(self.parameter_groups(lr, **decay), **options), total_steps)

    def attach(self, optimizer: O, total_steps: int | None = None) -> O:
        """Checks an optimizer that you made, and begins a training run with it.

        You need to call nothing while training: members hook into the optimizer's steps.

        Returns:
            the optimizer.

        Raises:
            SettingError: it does not hold all of the adapter's trainable tensors, or a member
                cannot be run like that.
            StateError: its learning rates are not related to each other as the method needs.
        """
        check_attached(self, optimizer)
        self.run.begin(total_steps)
        follow_optimizer(optimizer)
        check_rates(self, optimizer)
        return optimizer

    def save(
        self, path: str | os.PathLike[str], *, notes: Mapping[str, object] | None = None
    ) -> Path:
        """Writes the adapter into the directory `path` in PEFT's layout: all of its files or none.

        PEFT: `save_pretrained`. It also writes a model card, README.md, unless there is one that a
        person wrote. It warns if the adapter, or a part of it, changes nothing because training
        never reached it.

        Args:
            path: the directory, made if it does not exist; an adapter in it is replaced.
            notes: more lines of the card, such as `{"Held-out loss": "2.31 before, 1.87 after"}`.

        Raises:
            StateError: a member did not do what it is for, such as an allocator that never ran.
            OutputError: the files cannot be written; an adapter that was there is intact.
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
        """Saves the adapter with its card into a repository of the Hugging Face hub.

        Args:
            repo_id: `org/name`, or `name` for one of yours; made if it does not exist.
            private: whether a repository made now is private; None takes the hub's default.
            token: the token to use instead of the one that `hf auth login` keeps.
            commit_message: the message of the commit.
            revision: the branch, made if it does not exist.
            notes: see `save`.

        Returns:
            huggingface_hub's CommitInfo: a text, the commit's address.

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
        """Overwrites the adapter's tensors in place with those saved in `path`.

        Optimizers keep holding the tensors, so this resumes a run. A file that PEFT wrote does not
        say how its adapter was trained, so only what it computes is compared: a plain pair can be
        restored into LoRA+, and this adapter's members keep their training state.

        Raises:
            AdapterError: the directory holds another adapter. Then nothing is overwritten.
            StateError: this adapter is merged.
        """
        if self.effect.is_merged:
            raise StateError(
                f"adapter {self.name!r} is merged; unmerge it before restoring it from {path}"
            )
        files = directory.read(Path(path))
        if (other := files.lorakin.rewritten) is not None:
            raise AdapterError(
                f"{path}: {other} is not the one that {directory.LORAKIN_JSON} was written with, "
                "so training cannot be resumed from it. To restore what PEFT's files say, without "
                f"what training remembers, remove {directory.LORAKIN_JSON}"
            )
        document = files.match(self.model)
        if difference := difference_in_words(
            document.placement, self.placement, training=files.lorakin_part is not None
        ):
            raise AdapterError(
                f"{path}: it holds another adapter than {self!r}: {difference}. To train the saved "
                "adapter instead, remove this one and call lorakin.load(model, "
                f"{str(path)!r}, trainable=True)"
            )
        self.run.end()
        with torch.no_grad():
            for module, tensors in document.slots.items():
                self.tensors.branch(module).overwrite(tensors)
            for module, state in document.whole_modules.items():
                self.tensors.copy_of(module).load_state_dict(state)
            for module, rows in document.rows.items():
                self.tensors.rows_at(module).copy_(rows)
            for module, bias in self.tensors.biases().items():
                bias.copy_(document.biases[module])
            self.tensors.take_buffers(document.buffers)
        if document.state is not None:
            self.run.restore_state(document.state)

    def __repr__(self) -> str:
        return in_one_line(self)

    def __str__(self) -> str:
        return described(self)
