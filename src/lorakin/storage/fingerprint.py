"""The fingerprint of a base: what an adapter stores about it, so that loading refuses another one.

`checksums` has a checksum and a few sums of every base parameter, `base_config` the keys of the
config that change what the parameters compute, `tokenizer_fingerprint` the tokenizer. Besides, as
in earlier versions, there is a sample of every parameter that is not trained whole: four values,
evenly spread, the shape, and the narrowest dtype that holds those values. A hash alone would not
do, since a base in bfloat16 has other bits than in float32 and is the same base.

- If values were rounded, the comparison allows for rounding, perhaps twice; otherwise only for the
  last digit written.
- If rows of a parameter are trained, the sample takes the other rows before the last trained one: a
  resize fills new rows at random.
- The sample of a quantised layer has the values that its bits stand for, which are far from those
  that were quantised. All such layers are compared together, so that only another model shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.inject.adapted import module_at
from lorakin.inject.model_registry import original_parameters
from lorakin.inject.quantised import is_quantised, row_reader, shape_of
from lorakin.storage import base_config, checksums, tokenizer_fingerprint

Base = Mapping[str, Any]
"""A fingerprint, as it is in `lorakin.json`."""
SAMPLE_SIZE = 4
"""The number of values in a sample."""
PACKED = "packed"
"""The word for quantised layers, in the place of a dtype."""
LABELS = "labels"
SCALAR = "scalar"
"""The word for no dimensions, in the place of a shape."""
ROUNDING = 8e-3
"""Relative: more than one step of bfloat16."""
DIGITS = 2e-4
"""Relative: what writing a number as text loses."""
TINY = 1e-6
"""Absolute: less than float16 holds."""
FEW_BITS = 0.5
"""Relative: rounding to four bits changes all layers together by less; another model by 1.4."""
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)


def fingerprint(
    model: nn.Module,
    trained: Mapping[str, Sequence[int]] | None = None,
    reuse_unchanged: bool = False,
) -> dict[str, Any]:
    """Returns the fingerprint of the base, for `lorakin.json`.

    Args:
        model: the base.
        trained: module's path → ids of the rows of its weight that the adapter trains.
        reuse_unchanged: see `checksums.lines_of`.
    """
    trained_rows = {f"{path}.weight": ids for path, ids in (trained or {}).items()}
    parameters = original_parameters(model)
    samples = {
        name: _sample_in_model(model, name, weight, trained_rows.get(name, ()))
        for name, weight in parameters.items()
    }
    return {
        "class": type(model).__name__,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "name": getattr(model, "name_or_path", None) or None,
        "weights": {name: text for name, text in samples.items() if text},
        "sums": checksums.lines_of(parameters, trained_rows, reuse_unchanged),
        **tokenizer_fingerprint.fingerprint_of(model),
        **base_config.fingerprint_of(model),
        **_labels(model),
    }


def _labels(model: nn.Module) -> dict[str, Any]:
    """Returns the classes of a classifier in the order in which its head is trained."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    if not is_classifier or not isinstance(names, dict):
        return {}
    labels = [str(names[index]) for index in sorted(names)]
    has_names = any(label != f"LABEL_{index}" for index, label in enumerate(labels))
    return {LABELS: labels} if has_names else {}


def _sample_in_model(
    model: nn.Module, name: str, weight: Tensor, trained: Sequence[int]
) -> str | None:
    """Returns the `sample` of a parameter, or of the values that a quantised one stands for."""
    path, _, leaf = name.rpartition(".")
    module = module_at(model, path)
    if leaf != "weight" or weight.is_meta or not is_quantised(module):
        return sample(weight, trained)
    if (rows := row_reader(module)) is None:
        return None
    outputs, inputs = shape_of(module)[:2]
    values = [
        float(rows(index // inputs, index // inputs + 1)[0, index % inputs])
        for index in _sampled_indices(outputs * inputs).tolist()
    ]
    text = f"{PACKED} {outputs}x{inputs} {' '.join(f'{value:.5g}' for value in values)}"
    return text if _is_sample(text) else None


def _sampled_indices(count: int) -> Tensor:
    """Returns the indices of the values that are written down, evenly spread over `count`."""
    return torch.linspace(0, count - 1, min(SAMPLE_SIZE, count), dtype=torch.float64).round().long()


def sample(weight: Tensor, trained: Sequence[int] = ()) -> str | None:
    """Returns a parameter in short, `float32 64x32 0.0123 -0.045 …`.

    It is None without plain values, or with one that is not finite, as rows of no token may have.

    If an adapter trains the rows `trained`, it is a sample of the others before the last of these.
    """
    weight = weight.detach()
    plain = (
        type(weight) is Tensor
        and not weight.is_meta
        and weight.is_floating_point()
        and weight.element_size() > 1
    )
    if not plain or not weight.numel():  # sharded, without values, quantised, empty
        return None
    shape = "x".join(map(str, weight.shape)) or SCALAR
    if trained:
        kept = torch.tensor(
            sorted(set(range(max(trained))) - set(trained)), dtype=torch.long, device=weight.device
        )
        if not len(kept):
            return None
        width = weight[0].numel()
        inside = _sampled_indices(len(kept) * width).to(weight.device)
        flat = kept[inside // width] * width + inside % width
    else:
        flat = _sampled_indices(weight.numel()).to(weight.device)
    values = (
        weight.view(-1)[flat]
        if weight.is_contiguous()
        else weight[torch.unravel_index(flat, weight.shape)]
    )
    narrowest = next(
        (dtype for dtype in PRECISIONS if torch.equal(values.to(dtype).to(values.dtype), values)),
        weight.dtype,
    )
    numbers = " ".join(f"{value:.5g}" for value in values.tolist())
    text = f"{str(narrowest).removeprefix('torch.')} {shape} {numbers}"
    return text if _is_sample(text) else None


def difference(remembered: Base, present: Base) -> str | None:
    """Returns how the base `present` differs from the one remembered; None if it does not."""
    for compare in COMPARISONS:
        if reason := compare(remembered, present):
            return f"it was made on {described(remembered)}{reason}"
    return None


def _other_vocabulary(remembered: Base, present: Base) -> str:
    if not tokenizer_fingerprint.is_other_vocabulary(remembered, present):
        return ""
    return ", with a tokenizer in which the same ids stand for other words"


def _other_model_type(remembered: Base, present: Base) -> str:
    then, now = remembered.get("model_type"), present.get("model_type")
    if then is None or now is None or then == now:
        return ""
    return f", a {then!r} model, and this is a {now!r} model"


def _other_config(remembered: Base, present: Base) -> str:
    reason = base_config.difference(remembered, present)
    return f", {reason}" if reason else ""


def _other_shape(remembered: Base, present: Base) -> str:
    for name, then, now in _samples_of_both(remembered, present):
        shape, shape_now = then.split()[1], now.split()[1]
        if shape == shape_now:
            continue
        rows, *width = shape.split("x")
        _, *width_now = shape_now.split("x")
        is_resized = bool(width) and width == width_now
        advice = (
            "; if its vocabulary was resized, do so here first: "
            f"model.resize_token_embeddings({rows})"
        )
        return f", where {name} is {shape}; here it is {shape_now}{advice * is_resized}"
    return ""


def _other_quantised_layers(remembered: Base, present: Base) -> str:
    packed = [
        (then, now)
        for _, then, now in _samples_of_both(remembered, present)
        if _is_packed(then) or _is_packed(now)
    ]
    distance = _joint_distance(packed)
    if distance <= FEW_BITS:
        return ""
    return f", and the quantised layers here stand for other values: {distance:.0%} from those"


def _other_values(remembered: Base, present: Base) -> str:
    worst, worst_name = 0.0, ""
    for name, then, now in _samples_of_both(remembered, present):
        if _is_packed(then) or _is_packed(now):
            continue
        distance = _sample_distance(then, now) or checksums.distance(
            _checksum_line(remembered, name), _checksum_line(present, name)
        )
        if distance > worst:
            worst, worst_name = distance, name
    if not worst_name:
        return ""
    return f", and {name_of(worst_name)} here is another: {worst:.2%} from that one"


COMPARISONS: tuple[Callable[[Base, Base], str], ...] = (
    _other_vocabulary,
    _other_model_type,
    _other_config,
    _other_shape,
    _other_quantised_layers,
    _other_values,
)
"""In this order. Each returns what differs, to follow the base's name; "" if nothing does."""


def _samples_of_both(remembered: Base, present: Base) -> Iterator[tuple[str, str, str]]:
    """Yields each parameter's name and its two samples, if both fingerprints have one."""
    for name, then in remembered["weights"].items():
        now = present["weights"].get(name)
        # Earlier versions wrote scalars without a shape.
        if now is not None and len(then.split()) >= 3:
            yield name, then, now


def _is_packed(text: str) -> bool:
    return text.split()[0] == PACKED


def _checksum_line(base: Base, name: str) -> str | None:
    """Returns the line of checksums of a parameter; None in fingerprints of earlier versions."""
    line: str | None = base.get("sums", {}).get(name)
    return line


def name_of(parameter: str) -> str:
    """Returns a parameter in words: `the weight of model.layers.0.mlp.up_proj`."""
    owner, _, leaf = parameter.rpartition(".")
    return f"the {leaf} of {owner}" if owner else parameter


def described(remembered: Mapping[str, Any]) -> str:
    """Returns the base in words: `smollm2 (LlamaForCausalLM)`."""
    name, kind = remembered.get("name"), remembered.get("class")
    return f"{name} ({kind})" if name else str(kind)


def is_fingerprint(value: Any) -> bool:
    """Returns whether a value from a file has the form that `fingerprint` gives."""
    if not isinstance(value, dict) or not isinstance(value.get("weights"), dict):
        return False
    lines, labels = value.get("sums", {}), value.get(LABELS, [])
    return (
        all(_is_sample(text) for text in value["weights"].values())
        and isinstance(lines, dict)
        and all(checksums.is_line(line) for line in lines.values())
        and isinstance(labels, list)
        and all(isinstance(label, str) for label in labels)
        and tokenizer_fingerprint.is_valid(value)
        and base_config.is_valid(value)
    )


def _is_sample(text: Any) -> bool:
    parts = text.split() if isinstance(text, str) else []
    try:
        return len(parts) > 1 and all(math.isfinite(float(part)) for part in parts[2:])
    except ValueError:
        return False


def _joint_distance(pairs: Sequence[tuple[str, str]]) -> float:
    """Returns how far all of these samples are apart, relative to the first of each."""
    old, new = (
        [float(number) for pair in pairs for number in pair[side].split()[2:]] for side in (0, 1)
    )
    gap = math.hypot(*(a - b for a, b in zip(old, new, strict=False)))
    return gap / max(math.hypot(*old), 1e-30)


def _sample_distance(then: str, now: str) -> float:
    """Returns how far two samples are apart, relative to the first; 0 if precision explains it."""
    (dtype, _, *before), (dtype_now, _, *after) = then.split(), now.split()
    old, new = (
        torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        for numbers in (before, after)
    )
    if len(old) != len(new):
        return 1.0
    size, gap = float(old.norm()), float((old - new).norm())
    is_exact = dtype == dtype_now and dtype not in ("bfloat16", "float16")
    allowed = (DIGITS if is_exact else ROUNDING) * size + TINY
    return 0.0 if gap <= allowed else gap / max(size, 1e-30)
