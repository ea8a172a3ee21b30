"""The public face: `adapt` a model, and the `Adapter` it returns."""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lorakin.errors import AdapterError, LorakinWarning, SettingError, StateError
from lorakin.family import GRADIENTS, INPUTS, Member, Method, widened
from lorakin.family.pair import is_imagined
from lorakin.inject import placement
from lorakin.inject.activation_norms import energies
from lorakin.inject.adapted import module_at
from lorakin.inject.description import described, in_one_line
from lorakin.inject.eval_mode import in_mode
from lorakin.inject.measuring import check_called, measure
from lorakin.inject.mixed_batch import MixedBatch
from lorakin.inject.placement import Graft
from lorakin.inject.targets import ALL_LINEAR, Targets, new_heads
from lorakin.inject.tokens import Tokens, base_rows
from lorakin.loop import float16_base
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
Loss = Callable[[nn.Module, Any], torch.Tensor]
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
        self.begin(total_steps)
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
        if self.is_merged:
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
        self.end()
        with torch.no_grad():
            for at, tensors in document.slots.items():
                self.branch(at).overwrite(tensors)
            for at, state in document.copies.items():
                self.copy_of(at).load_state_dict(state)
            for at, rows in document.rows.items():
                self.rows_at(at).copy_(rows)
            for at, bias in self.biases().items():
                bias.copy_(document.biases[at])
            self.take_buffers(document.buffers)
        if document.state is not None:
            self.restore_state(document.state)

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


def adapt(
    model: nn.Module,
    member: Member | Sequence[Member] | Method,
    targets: Targets = ALL_LINEAR,
    *,
    name: str = "default",
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    rank_above: str = "refuse",
    trainable_tokens: Tokens | None = None,
    bias: str = "none",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    probe: Sequence[Any] | None = None,
    loss: Loss | None = None,
) -> Adapter:
    """Put a fresh adapter into `model`, which stays itself: same class, same names, same output until it is trained.

    The base is frozen; the new adapter is the active one (see `activate`). The adapter's tensors are float32 whatever
    the base's dtype (float64 on a float64 base) and take part in the forward in the base's dtype.

    Args:
        model: any module with linear, Conv1D, embedding or convolution layers.
        member: what to put in, such as `LoRA(rank=16, alpha=32)`, or members to combine: `[DoRA(rank=16), LoRAPlus()]`.
        targets: "all-linear" (every linear layer but the head); a name, glob or regular expression, or a list of
            them; or a function of (path, module). A name selects modules whose path ends in it.
        name: the adapter's name.
        exclude: patterns of modules to leave out.
        layers: only modules inside these repeated layers, e.g. [0, 1, -1].
        rank_pattern, alpha_pattern: regular expression → a rank or alpha of its own, as in PEFT; the first that
            matches the end of a module's path wins.
        modules_to_save: names of modules to train whole, such as a new head; the adapter trains a copy.
        rank_above: what becomes of a rank above a weight's smaller side: `refuse`, or `clamp`: such modules have that side as
            their rank, with the same alpha, as if `rank_pattern` said so; a warning names them.
        trainable_tokens: ids of tokens whose rows in the input embedding are trained, and in what is tied to it; or
            module's name → ids, such as {"embed_tokens": ids, "lm_head": ids} for a head that is not tied.
        bias: "lora_only" trains the biases of the adapted modules too, "all" those of the model. The adapter
            has its own of each, and the base's stay as they are.
        seed: draw the initial tensors from a generator of their own with this seed.
        dtype: another dtype for the adapter's tensors.
        probe: batches for a member that looks at data before it starts: LoRA-drop (see
            `lorakin.importance`), EVA, LoRA-GA.
        loss: (model, batch) → loss, for a probe of models whose output has none.

    Raises:
        SettingError: members that do not combine, a rank above a weight's smaller side, a name that is taken.
        TargetError: a pattern that selects nothing, or something that cannot be adapted.
        StateError: another adapter is merged at the moment.
    """
    model = placement.root_of(model)
    method = Method.of(member)
    places: dict[str, Any] = {
        "exclude": exclude,
        "layer_indices": layers,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": modules_to_save,
        "rank_above": rank_above,
        "trainable_tokens": trainable_tokens,
        "bias": bias,
    }
    if probe is not None and method.measuring is None and method.probe is None:
        given = method.setting("importance") is not None
        raise SettingError(
            f"{method.words} was given importance and a probe that would find it; give one of them"
            if given
            else f"{method.words} looks at no data before it starts; leave probe out"
        )
    if probe is not None and method.probe is not None:
        method = method.with_importance(_importance(model, method, probe, targets, seed, places))
    placed_on = placement.place(model, method, targets, **places)
    placed_on, measured = _measured(model, placed_on, probe, loss)
    adapter = _fresh(model, name, placed_on, seed, dtype, measured)
    if heads := new_heads(model, (*adapter.placement.methods, *adapter.placement.copies)):
        warnings.warn(
            f"the head of this {type(model).__name__} ({', '.join(heads)}) is frozen, and it looks new. An adapter does not "
            f"train it, nor does its file hold it. Train it whole, with modules_to_save={heads!r}",
            LorakinWarning,
            stacklevel=2,
        )
    return adapter


def importance(
    model: nn.Module,
    member: Member | Sequence[Member] | Method,
    batches: Sequence[Any],
    targets: Targets = ALL_LINEAR,
    *,
    lr: float | None = None,
    loss: Loss | None = None,
    seed: int | None = None,
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    rank_above: str = "refuse",
    trainable_tokens: Tokens | None = None,
    bias: str = "none",
) -> dict[str, float]:
    """What a member that chooses its modules by a probe goes by: each module's share of the change of the outputs.

    A plain pair is trained on `batches` for the member's `probe_epochs`, measured in eval mode and taken out again; the model
    is as it was before. For LoRA-drop: I_k = g_k / Σ g, g_k = Σ ‖s·B_k A_k x‖² over the tokens that are not padding.

    Args:
        model: see `adapt`.
        member: such as `LoRADrop(threshold=0.9)`, alone or with others.
        batches: what the model takes: mappings with `labels`, so that its output has a `loss`.
        targets, exclude, layers, rank_pattern, alpha_pattern, modules_to_save, rank_above, trainable_tokens, bias: see `adapt`.
        lr: learning rate of the probe.
        loss: (model, batch) → loss, for models whose output has none.
        seed: of the pair's initial tensors.

    Returns:
        Path → importance, in the model's order; for `LoRADrop(importance=…)`.

    Raises:
        SettingError: no member wants a probe; no batches.
        StateError: the model has adapters.
    """
    places = {
        "exclude": exclude,
        "layer_indices": layers,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": modules_to_save,
        "rank_above": rank_above,
        "trainable_tokens": trainable_tokens,
        "bias": bias,
    }
    return _importance(
        placement.root_of(model), Method.of(member), batches, targets, seed, places, lr, loss
    )


def _importance(
    model: nn.Module,
    method: Method,
    batches: Sequence[Any],
    targets: Targets,
    seed: int | None,
    places: Mapping[str, Any],
    lr: float | None = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    probe = method.probe
    try:
        batches = list(batches)
    except TypeError:
        raise SettingError(f"a probe needs a list of batches, not {batches!r}") from None
    if probe is None:
        raise SettingError(
            f"{method.words} does not choose its modules by a probe, so there is nothing to probe for"
        )
    if not batches:
        raise SettingError("a probe needs batches, and there are none")
    if loss is None and not all(
        isinstance(batch, Mapping) and "labels" in batch for batch in batches
    ):
        raise SettingError(
            "a probe's batches must be mappings with labels, so that the model's output has a loss; or give loss="
        )
    if there := placement.grafts(model):
        raise StateError(
            f"the probe needs the model to itself, but adapter {next(iter(there))!r} is in it; remove that first"
        )
    pilot = _fresh(
        model, "probe", placement.place(model, method.for_probe(), targets, **places), seed
    )
    try:
        check_called(model, pilot.placement.methods)
        optimizer: torch.optim.Optimizer = pilot.optimizer(
            lr=pilot.placement.method.learning_rate if lr is None else lr
        )
        scaler = float16_base.loss_scaler(model)
        float16_base.leave_unscaling_to_the_scaler([optimizer] if scaler.is_enabled() else [])
        with in_mode(model, training=True):
            for _ in range(probe.epochs):
                for batch in batches:
                    scaler.scale(
                        model(**batch).loss if loss is None else loss(model, batch)
                    ).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
        return energies(pilot, batches, probe.normalised, loss)
    finally:
        pilot.remove()


def _measured(
    model: nn.Module,
    placed_on: placement.Placement,
    batches: Sequence[Any] | None,
    loss: Loss | None,
) -> tuple[placement.Placement, Mapping[str, Any]]:
    """What the member that starts by data found, by path, and the placement that follows from it."""
    method = placed_on.method
    member = method.measuring
    if member is None:
        return placed_on, {}
    targets = {path: placement.target_of(module_at(model, path)) for path in placed_on.methods}
    if all(is_imagined(target.weight) for target in targets.values()):
        return placed_on, {}
    if batches is None:
        raise SettingError(
            f"{member.word} looks at {' and '.join(sorted(member.needs))} on data before it starts, and "
            "there are none: call adapt(…, probe=batches)"
        )
    collector = member.collector(targets, placed_on.methods)
    of = GRADIENTS if GRADIENTS in member.needs else INPUTS
    paths, most = list(placed_on.methods), member.batches
    measure(model, paths, collector, of, list(batches), loss, most)
    found = collector.found()
    return placement.rearranged(placed_on, member.settings_by(found, placed_on.methods)), found


def _fresh(
    model: nn.Module,
    name: str,
    plan: placement.Placement,
    seed: int | None,
    dtype: torch.dtype | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Adapter:
    """A new adapter by this plan, in the model, whose base is frozen."""
    adapter = Adapter(model, name, plan)
    rows, biases = (
        base_rows(model, plan.tokens, dtype),
        placement.start_of(model, plan.biases, dtype),
    )
    adapter.install(
        placement.fresh(model, plan, _generator(seed), dtype, measured), rows=rows, biases=biases
    )
    adapter.freeze_base()
    for path in plan.methods:
        adapter.branch(path).remember_start()
    adapter.is_fresh = True
    return adapter


def _generator(seed: int | None) -> torch.Generator | None:
    if seed is None:
        return None
    try:
        return torch.Generator().manual_seed(operator.index(seed))
    except (TypeError, RuntimeError, OverflowError):
        raise SettingError(
            f"seed must be a whole number of at most 64 bits, not {seed!r}"
        ) from None


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
    model = placement.root_of(model)
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
        adapter.take_buffers(document.buffers)
        adapter.freeze_base()
    else:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return adapter


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in `model`, by name."""
    return {
        name: graft
        for name, graft in placement.grafts(placement.root_of(model)).items()
        if isinstance(graft, Adapter)
    }


def merge(model: nn.Module, names: str | Sequence[str]) -> None:
    """Fold these adapters into the weights for good, all at once, as if all were in use; they leave the model.

    `adapter.merge(permanent=True)` is this for one adapter. Several DoRAs go together only like this: each of their gains is
    over the base's own weight, and the first one merged would change that for the next.

    Raises:
        SettingError: an unknown name.
        StateError: a merged weight would not be finite, an adapter is disabled, another one is merged, two do not go together,
            or one that stays has a gain over a weight that would change. Nothing is merged then.
    """
    placement.merge(placement.root_of(model), names)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use exactly these adapters; several add up, `[]` leaves the base alone. Changes no `requires_grad`.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole, or its bias.
        StateError: an adapter is merged.
    """
    placement.activate(placement.root_of(model), names)


def mixed_batch(
    model: nn.Module, names: Iterable[str | None]
) -> contextlib.AbstractContextManager[None]:
    """`with mixed_batch(model, ["a", None, "b"]): model(…)`: row n uses the adapter `names[n]` alone, None being the base.

    Also in `generate`: a batch of k times as many rows, as beams make, takes each name k times in a row. Any method's adapters
    go together. For inference the pairs of a linear layer are stacked when it is first called, and kept while nothing in them
    trains: do not change their tensors inside. Contexts nest, and one may be entered again; one thread at a time. Training
    works too, if the backward pass is inside. Modules must have the batch as their first dimension.

    Args:
        model: holds the adapters, none of them merged.
        names: one for each row of the batch.

    Raises:
        SettingError: an unknown name; in the forward, a batch whose rows are no multiple of the names.
        StateError: an adapter is merged or has moved the base weights, or another thread is in such a context; inside, adding,
            removing, merging or switching adapters; in the forward, a module whose rows are not the batch's.
    """
    return MixedBatch(placement.root_of(model), names)
