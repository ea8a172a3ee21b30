"""`adapt`, which puts a new adapter into a model, and `importance`, LoRA-drop's probe."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorakin.adapter import Adapter
from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.family import GRADIENTS, INPUTS, Member, Method
from lorakin.family.weight import has_no_values
from lorakin.inject.activation_norms import importance_shares
from lorakin.inject.active_adapters import set_active
from lorakin.inject.adapted import module_at
from lorakin.inject.biases import initial_biases
from lorakin.inject.heads import new_heads
from lorakin.inject.layer_kinds import unadapted
from lorakin.inject.measuring import Loss, check_called, measure
from lorakin.inject.model_registry import adapters_in, root_of
from lorakin.inject.module_mode import in_mode
from lorakin.inject.placement import (
    Placement,
    choose_modules,
    initial_tensors,
    placement_with_settings,
)
from lorakin.inject.targets import ALL_LINEAR, Targets
from lorakin.inject.trainable_tokens import Tokens, base_rows
from lorakin.loop import float16_base


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
    """Puts a new adapter into `model`, which stays itself: same class, same names, same output.

    PEFT: `get_peft_model`, but `model` is changed in place and there is no wrapper.

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
            `[DoRA(rank=16), LoRAPlus()]`. PEFT: the config.
        targets: "all-linear" (every linear layer except the head); a name, glob or regular
            expression, or a list of them; or a function of (path, module). A name selects the
            modules whose path ends in it (PEFT: `target_modules`).
        name: the adapter's name (PEFT: `adapter_name`).
        exclude: patterns of modules to leave out (PEFT: `exclude_modules`).
        layers: only modules inside these repeated layers, such as [0, 1, -1] (PEFT:
            `layers_to_transform`).
        rank_pattern, alpha_pattern: regular expression → the rank or alpha of the modules whose
            path ends in a match, as in PEFT; the first that matches counts.
        modules_to_save: names of modules to train whole, such as a new head. The adapter trains a
            copy.
        rank_above: what to do if a rank is larger than a weight's smaller side: `refuse` it, or
            `clamp` it to that side with the same alpha, as `rank_pattern` would. A warning names
            the modules.
        trainable_tokens: ids of tokens whose rows in the input embedding, and in what is tied to
            it, are trained; or module's name → ids, such as
            {"embed_tokens": ids, "lm_head": ids} for a head that is not tied (PEFT:
            `trainable_token_indices`).
        bias: "lora_only" also trains the biases of the adapted modules, "all" those of the model.
            The adapter has copies of them; the base's stay as they are.
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
    selection: dict[str, Any] = {
        "exclude": exclude,
        "layer_indices": layers,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "modules_to_save": modules_to_save,
        "rank_above": rank_above,
        "trainable_tokens": trainable_tokens,
        "bias": bias,
    }
    if probe is not None and method.needed_probe is not None:
        shares = _importance(model, method, probe, targets, seed, selection, loss=loss)
        method = method.with_importance(shares)
    elif probe is not None and method.measured_member is None:
        if method.setting("importance") is None:
            raise SettingError(f"{method.words} looks at no data before it starts; leave probe out")
        raise SettingError(
            f"{method.words} was given importance and a probe that would find it; give one of them"
        )

    placement = choose_modules(model, method, targets, **selection)
    placement, measured = _measured(model, placement, probe, loss)
    adapter = _insert_new_adapter(model, name, placement, seed, dtype, measured)
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
    """Measures how much of the outputs' change each module makes, for `LoRADrop(importance=…)`.

    A pilot adapter, plain LoRA, is trained on `batches` for the member's `probe_epochs`, measured
    in eval mode and removed; the model is as it was before. LoRA-drop (arXiv 2402.07721) has
    I_k = g_k / Σ g with g_k = Σ ‖s·B_k A_k x‖² over the tokens x that are not padding.

    >>> import lorakin as lk, transformers
    >>> config = transformers.GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, n_positions=4)
    >>> model, ids = transformers.GPT2LMHeadModel(config), torch.tensor([[1, 2, 3]])
    >>> member = lk.LoRADrop(rank=1, keep=1, probe_epochs=1)
    >>> shares = lk.importance(model, member, [{"input_ids": ids, "labels": ids}])
    >>> len(shares), round(sum(shares.values()), 3)
    (4, 1.0)

    Args:
        model: see `adapt`.
        member: such as `LoRADrop(threshold=0.9)`, alone or with others.
        batches: what the model takes: mappings with `labels`, so that its output has a `loss`.
        targets, exclude, layers, rank_pattern, alpha_pattern, modules_to_save, rank_above,
            trainable_tokens, bias: see `adapt`.
        lr: the pilot's learning rate, by default the method's.
        loss: (model, batch) → loss, for models whose output has none.
        seed: the seed of the pilot's initial tensors.

    Returns:
        Path → importance, in the model's order; they sum to 1.

    Raises:
        SettingError: no member wants a probe, or there are no batches.
        StateError: the model has adapters.
    """
    selection = {
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
        root_of(model), Method.of(member), batches, targets, seed, selection, lr, loss
    )


def _importance(
    model: nn.Module,
    method: Method,
    batches: Sequence[Any],
    targets: Targets,
    seed: int | None,
    selection: Mapping[str, Any],
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
    if present := adapters_in(model):
        raise StateError(
            f"the probe needs the model to itself, but adapter {next(iter(present))!r} is in it; "
            "remove that first"
        )
    placement = choose_modules(model, method.for_probe(), targets, **selection)
    pilot = _insert_new_adapter(model, "probe", placement, seed)
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
                    value = model(**batch).loss if loss is None else loss(model, batch)
                    scaler.scale(value).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
        return importance_shares(pilot, batches, probe.normalised, loss)
    finally:
        pilot.remove()


def _measured(
    model: nn.Module,
    placement: Placement,
    batches: Sequence[Any] | None,
    loss: Loss | None,
) -> tuple[Placement, Mapping[str, Any]]:
    """Measures data for the member that starts by them, EVA or LoRA-GA.

    Returns:
        the placement with the ranks that the member has chosen, and what it has found, by path.
    """
    member = placement.method.measured_member
    if member is None:
        return placement, {}
    modules = {path: unadapted(module_at(model, path)) for path in placement.methods}
    if all(has_no_values(module.weight) for module in modules.values()):
        return placement, {}
    if batches is None:
        raise SettingError(
            f"{member.word} looks at {' and '.join(sorted(member.needs))} on data before it "
            "starts, and there are none: call adapt(…, probe=batches)"
        )
    if isinstance(batches, Mapping | torch.Tensor | str) or not isinstance(batches, Iterable):
        raise SettingError(
            "probe must be a list of batches, and a single batch [batch]; it is a "
            f"{type(batches).__name__}"
        )
    collector = member.collector(modules, placement.methods)
    of = GRADIENTS if GRADIENTS in member.needs else INPUTS
    with _base_alone(model):
        measure(model, list(modules), collector, of, list(batches), loss, member.batches)
    results = collector.results()
    if uncalled := [path for path in modules if path not in results]:
        raise SettingError(
            f"{member.word} saw nothing of {uncalled[0]}: the model did not call it on these "
            "batches; leave it out with exclude"
        )
    settings = member.settings_found(results, placement.methods)
    return placement_with_settings(placement, settings), results


@contextlib.contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Deactivates the model's other adapters inside a `with` block: the new one will be alone."""
    active = [name for name, adapter in adapters_in(model).items() if adapter.effect.is_active]
    if active:
        set_active(model, [])
    try:
        yield
    finally:
        if active:
            set_active(model, active)


def _insert_new_adapter(
    model: nn.Module,
    name: str,
    placement: Placement,
    seed: int | None,
    dtype: torch.dtype | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Adapter:
    """Puts a new adapter with this placement into the model, and freezes the base."""
    adapter = Adapter(model, name, placement)
    rows = base_rows(model, placement.tokens, dtype)
    biases = initial_biases(model, placement.biases, dtype)
    tensors = initial_tensors(model, placement, _generator(seed), dtype, measured)
    adapter.install(tensors, rows=rows, biases=biases)
    adapter.freeze_base()
    for path in placement.methods:
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
