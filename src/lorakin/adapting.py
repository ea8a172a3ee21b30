"""Putting a fresh adapter into a model: `adapt`, and what a member looks at before it starts."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorakin.adapter import Adapter
from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.family import GRADIENTS, INPUTS, Member, Method
from lorakin.family.weight import has_no_values
from lorakin.inject import placement
from lorakin.inject.activation_norms import importance_shares
from lorakin.inject.active_adapters import set_active
from lorakin.inject.adapted import module_at
from lorakin.inject.biases import initial_biases
from lorakin.inject.measuring import check_called, measure
from lorakin.inject.model_registry import adapters_in, root_of
from lorakin.inject.module_mode import in_mode
from lorakin.inject.targets import ALL_LINEAR, Targets, new_heads
from lorakin.inject.trainable_tokens import Tokens, base_rows
from lorakin.loop import float16_base

Loss = Callable[[nn.Module, Any], torch.Tensor]
"""(model, batch) → loss."""


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
    """Puts a fresh adapter into `model`, which stays itself: same class, same names, same output.

    The base is frozen, and the new adapter is the active one (see `activate`). Its tensors are
    float32 whatever the base's dtype is (float64 on a float64 base); the forward uses them in the
    base's dtype.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    >>> adapter = lk.adapt(model, [lk.DoRA(rank=2), lk.LoRAPlus(ratio=8)], targets=["0", "1"])
    >>> adapter.method.words
    'lora+,dora'

    Args:
        model: any module with linear, Conv1D, embedding or convolution layers.
        member: such as `LoRA(rank=16, alpha=32)`, or several to combine:
            `[DoRA(rank=16), LoRAPlus()]`.
        targets: "all-linear" (every linear layer except the head); a name, glob or regular
            expression, or a list of them; or a function of (path, module). A name selects the
            modules whose path ends in it (PEFT: `target_modules`).
        name: the adapter's name.
        exclude: patterns of modules to leave out (PEFT: `exclude_modules`).
        layers: only modules inside these repeated layers, such as [0, 1, -1] (PEFT:
            `layers_to_transform`).
        rank_pattern, alpha_pattern: regular expression → a rank or alpha of its own, as in PEFT;
            the first that matches the end of a module's path wins.
        modules_to_save: names of modules to train whole, such as a new head. The adapter trains a
            copy.
        rank_above: what to do with a rank above a weight's smaller side: `refuse` it, or `clamp`
            it to that side with the same alpha, as `rank_pattern` would. A warning names the
            modules.
        trainable_tokens: ids of tokens whose rows in the input embedding, and in what is tied to
            it, are trained; or module's name → ids, such as
            {"embed_tokens": ids, "lm_head": ids} for a head that is not tied.
        bias: "lora_only" also trains the biases of the adapted modules, "all" those of the model.
            The adapter has its own copies; the base's stay as they are.
        seed: draw the initial tensors from a generator with this seed.
        dtype: another dtype for the adapter's tensors.
        probe: batches for a member that looks at data before it starts. LoRA-drop trains a short
            pilot on them (see `lorakin.importance`); EVA and LoRA-GA measure them.
        loss: (model, batch) → loss, for a probe of models whose output has none.

    Raises:
        SettingError: members do not combine, a rank is above a weight's smaller side, a name is
            taken, or a member needs a probe and has none.
        TargetError: a pattern selects nothing, or something that cannot be adapted.
        StateError: another adapter is merged at the moment.
    """
    model = root_of(model)
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
    if probe is not None and method.measured_member is None and method.needed_probe is None:
        given = method.setting("importance") is not None
        raise SettingError(
            f"{method.words} was given importance and a probe that would find it; give one of them"
            if given
            else f"{method.words} looks at no data before it starts; leave probe out"
        )
    if probe is not None and method.needed_probe is not None:
        method = method.with_importance(
            _importance(model, method, probe, targets, seed, places, loss=loss)
        )
    placed_on = placement.choose_modules(model, method, targets, **places)
    placed_on, measured = _measured(model, placed_on, probe, loss)
    adapter = _fresh(model, name, placed_on, seed, dtype, measured)
    if heads := new_heads(model, (*adapter.placement.methods, *adapter.placement.whole_modules)):
        warnings.warn(
            f"the head of this {type(model).__name__} ({', '.join(heads)}) is frozen, and it looks "
            "new. An adapter does not train it, nor does its file hold it. Train it whole, with "
            f"modules_to_save={heads!r}",
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
    """Measure how much of the outputs' change comes from each module, for `LoRADrop(importance=…)`.

    A plain pair is trained on `batches` for the member's `probe_epochs`, measured in eval mode and
    taken out again; the model is as it was before. LoRA-drop (arXiv 2402.07721) has
    I_k = g_k / Σ g with g_k = Σ ‖s·B_k A_k x‖² over the tokens x that are not padding.

    Args:
        model: see `adapt`.
        member: such as `LoRADrop(threshold=0.9)`, alone or with others.
        batches: what the model takes: mappings with `labels`, so that its output has a `loss`.
        targets, exclude, layers, rank_pattern, alpha_pattern, modules_to_save, rank_above,
            trainable_tokens, bias: see `adapt`.
        lr: the learning rate of the probe.
        loss: (model, batch) → loss, for models whose output has none.
        seed: of the pair's initial tensors.

    Returns:
        Path → importance, in the model's order; they sum to 1.

    Raises:
        SettingError: no member wants a probe, or there are no batches.
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
    return _importance(root_of(model), Method.of(member), batches, targets, seed, places, lr, loss)


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
    probe = method.needed_probe
    try:
        batches = list(batches)
    except TypeError:
        raise SettingError(f"a probe needs a list of batches, not {batches!r}") from None
    if probe is None:
        raise SettingError(
            f"{method.words} does not choose its modules by a probe, so there is nothing to measure"
        )
    if not batches:
        raise SettingError("a probe needs batches, and there are none")
    if loss is None and not all(
        isinstance(batch, Mapping) and "labels" in batch for batch in batches
    ):
        raise SettingError(
            "a probe's batches must be mappings with labels, so that the model's output has a "
            "loss; or give loss="
        )
    if there := adapters_in(model):
        raise StateError(
            f"the probe needs the model to itself, but adapter {next(iter(there))!r} is in it; "
            "remove that first"
        )
    pilot = _fresh(
        model, "probe", placement.choose_modules(model, method.for_probe(), targets, **places), seed
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
        return importance_shares(pilot, batches, probe.normalised, loss)
    finally:
        pilot.remove()


def _measured(
    model: nn.Module,
    placed_on: placement.Placement,
    batches: Sequence[Any] | None,
    loss: Loss | None,
) -> tuple[placement.Placement, Mapping[str, Any]]:
    """What the member that starts by data found, and the placement that follows from it."""
    method = placed_on.method
    member = method.measured_member
    if member is None:
        return placed_on, {}
    targets = {path: placement.target_of(module_at(model, path)) for path in placed_on.methods}
    if all(has_no_values(target.weight) for target in targets.values()):
        return placed_on, {}
    if batches is None:
        raise SettingError(
            f"{member.word} looks at {' and '.join(sorted(member.needs))} on data before it "
            "starts, and there are none: call adapt(…, probe=batches)"
        )
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise SettingError("probe must be a list of batches; give [batch] for a single one")
    collector = member.collector(targets, placed_on.methods)
    of = GRADIENTS if GRADIENTS in member.needs else INPUTS
    with _base_alone(model):
        measure(model, list(targets), collector, of, list(batches), loss, member.batches)
    found = collector.results()
    if missed := [path for path in targets if path not in found]:
        raise SettingError(
            f"{member.word} saw nothing of {missed[0]}: the model did not call it on these "
            "batches; leave it out with exclude"
        )
    return placement.rearranged(placed_on, member.settings_found(found, placed_on.methods)), found


@contextlib.contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Without the model's other adapters inside: the new one will be active alone."""
    active = [name for name, one in adapters_in(model).items() if one.effect.is_active]
    if active:
        set_active(model, [])
    try:
        yield
    finally:
        if active:
            set_active(model, active)


def _fresh(
    model: nn.Module,
    name: str,
    plan: placement.Placement,
    seed: int | None,
    dtype: torch.dtype | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Adapter:
    """A new adapter with this placement, in the model, whose base is frozen."""
    adapter = Adapter(model, name, plan)
    rows = base_rows(model, plan.tokens, dtype)
    biases = initial_biases(model, plan.biases, dtype)
    adapter.install(
        placement.initial_tensors(model, plan, _generator(seed), dtype, measured),
        rows=rows,
        biases=biases,
    )
    adapter.freeze_base()
    for path in plan.methods:
        adapter.tensors.branch(path).remember_start()
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
