"""Rehearses a deep model by three shallow ones: each further layer adds the same.

Memory and time grow along a line with the number of layers. Three depths show whether they do; if
not, the whole model is rehearsed.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from lorakin.adapting import adapt
from lorakin.errors import LorakinError
from lorakin.family import Method
from lorakin.plan.conditions import Conditions
from lorakin.plan.machine import Machine
from lorakin.plan.meta_model import with_assumed_importance
from lorakin.plan.rehearsal import (
    KINDS,
    PHASES,
    Rehearsed,
    frozen_seconds_whole,
    rehearse_whole,
)
from lorakin.plan.traced import Peak


def rehearse(conditions: Conditions, method: Method, machine: Machine) -> Rehearsed:
    """Rehearses a run; a deep model by three shallow ones, if their figures lie on a line.

    Raises:
        LorakinError: the method cannot run on this model with these settings.
    """
    depths = shallow_depths(conditions)
    # A probe chooses a share of the modules, rounded up, so its figures do not lie on a line.
    if depths is None or method.needed_probe is not None:
        return rehearse_whole(conditions, method, machine)
    counts = _counted(conditions, method)
    try:
        rehearsals = [
            rehearse_whole(shallow(conditions, depth), method, machine) for depth in depths
        ]
    except LorakinError as error:
        # Such as a pattern that selects nothing in so few layers; the whole model may have it.
        logging.getLogger(__name__).info("not planned by few layers: %s", error)
        return rehearse_whole(conditions, method, machine)
    first, second, _ = depths
    periods = (conditions.config.num_hidden_layers - first) // (second - first)
    result = extended(rehearsals, periods)
    if result is not None and (result.trainable_parameters, result.modules) == counts:
        return result
    return rehearse_whole(conditions, method, machine)


def frozen_seconds(conditions: Conditions, machine: Machine) -> float:
    """Returns the seconds of forward and backward of the frozen base alone."""
    depths = shallow_depths(conditions)
    if depths is None:
        return frozen_seconds_whole(conditions, machine)
    first, second, _ = depths
    one, two = (
        frozen_seconds_whole(shallow(conditions, depth), machine) for depth in (first, second)
    )
    further = int(conditions.config.num_hidden_layers) - first
    return one + further / (second - first) * (two - one)


def shallow_depths(conditions: Conditions) -> tuple[int, int, int] | None:
    """Returns three depths, from two layers on, that differ by one period of kinds of layers.

    None: the model is not deep enough, or only some layers are adapted.
    """
    count = getattr(conditions.config, "num_hidden_layers", None)
    if not isinstance(count, int) or conditions.layers is not None:
        return None
    lists = list(_per_layer(conditions.config).values())
    period = next(p for p in range(1, count + 1) if all(kinds[p:] == kinds[:-p] for kinds in lists))
    first = next(depth for depth in range(2, period + 2) if (count - depth) % period == 0)
    depths = first, first + period, first + 2 * period
    return depths if sum(depths) < count else None


def shallow(conditions: Conditions, depth: int) -> Conditions:
    """Returns the conditions with a model of `depth` layers."""
    config = copy.deepcopy(conditions.config)
    for name, kinds in _per_layer(config).items():
        setattr(config, name, kinds[:depth])
    config.num_hidden_layers = depth
    return dataclasses.replace(conditions, config=config)


def _per_layer(config: Any) -> dict[str, list[Any]]:
    """Returns the config's lists that have an entry for each layer."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }


def extended(rehearsals: Sequence[Rehearsed], periods: int) -> Rehearsed | None:
    """Returns the rehearsal that comes `periods` after the first of three equally spaced ones.

    None: a figure other than the seconds does not lie on a line.
    """
    one, two, three = (_figures(rehearsed) for rehearsed in rehearsals)
    keys = one.keys() | two.keys() | three.keys()
    if any(three[key] - two[key] != two[key] - one[key] for key in keys):
        return None
    line = {key: one[key] + periods * (two[key] - one[key]) for key in keys}

    def peak(phase: str) -> Peak:
        kinds = {kind: line[f"{phase}:kind:{kind}"] for kind in KINDS}
        return Peak(line[f"{phase}:total"], kinds, line[f"{phase}:small"])

    return Rehearsed(
        trainable_parameters=line["trainable"],
        adapter_bytes=line["adapter"],
        modules=line["modules"],
        peaks={phase: peak(phase) for phase in PHASES},
        seconds=rehearsals[0].seconds + periods * (rehearsals[1].seconds - rehearsals[0].seconds),
    )


def _figures(rehearsed: Rehearsed) -> collections.Counter[str]:
    figures = collections.Counter(
        trainable=rehearsed.trainable_parameters,
        adapter=rehearsed.adapter_bytes,
        modules=rehearsed.modules,
    )
    for phase in PHASES:
        peak = rehearsed.peaks[phase]
        figures.update({f"{phase}:total": peak.total, f"{phase}:small": peak.small_tensor_bytes})
        for kind in KINDS:
            figures[f"{phase}:kind:{kind}"] = peak.kinds.get(kind, 0)
    return figures


def _counted(conditions: Conditions, method: Method) -> tuple[int, int]:
    """Returns how many trainable parameters and adapted modules the whole model has."""
    model = conditions.model()
    arguments = conditions.adapt_arguments(model)
    adapter = adapt(model, with_assumed_importance(model, method, **arguments), **arguments)
    return adapter.trainable_parameters, len(adapter.placement.methods)
