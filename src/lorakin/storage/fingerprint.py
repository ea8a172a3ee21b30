"""What an adapter remembers of its base, so that it is not put on another one unnoticed.

`sums` has a checksum and a few sums of every base parameter; `base_config` what of the config
changes what the parameters compute. Beside them stands, as in earlier versions, a sample of every
parameter that is not trained whole: four numbers, evenly spread, the shape, and the narrowest dtype
that holds those numbers. It is not a hash alone, since a base in bfloat16 has other bits than in
float32 and is the same base.

- If numbers were rounded, the comparison allows for rounding, perhaps twice; otherwise only for the
  last digit written.
- If rows of a parameter are trained, the sample takes the others before the last of them: a resize
  fills new rows at random.
- The sample of a quantised layer has the numbers that its bits stand for, which are far from those
  that were quantised. All such layers are compared together, so that only another model shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.inject.adapted import module_at
from lorakin.inject.model_registry import original_parameters
from lorakin.inject.quantised import is_quantised, rows_of, shape_of
from lorakin.storage import base_config, sums, texts

NUMBERS, PACKED = 4, "packed"
LABELS = "labels"
SCALAR = "scalar"
"""In the place of a shape."""
ROUNDING = 8e-3
"""Relative: more than one step of bfloat16."""
DIGITS = 2e-4
"""Relative: what writing a number as text loses."""
NOTHING = 1e-6
"""Absolute: less than float16 holds."""
FEW_BITS = 0.5
"""Relative: rounding to four bits moves all layers together less; another model is 1.4 away."""
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)


def fingerprint(
    model: nn.Module, trained: Mapping[str, Sequence[int]] | None = None, again: bool = False
) -> dict[str, Any]:
    """The fingerprint of the base, for `lorakin.json`.

    Args:
        model: the base.
        trained: module's path → ids of the rows of its weight that the adapter trains.
        again: see `sums.of_all`.
    """
    own = {f"{path}.weight": ids for path, ids in (trained or {}).items()}

    def text_of(name: str, weight: Tensor) -> str | None:
        return _text(model, name, weight, own.get(name, ()))

    return {
        "class": type(model).__name__,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "name": getattr(model, "name_or_path", None) or None,
        "weights": {
            name: text
            for name, weight in original_parameters(model).items()
            if (text := text_of(name, weight))
        },
        "sums": sums.of_all(original_parameters(model), own, again),
        **texts.known(model),
        **base_config.known(model),
        **_labels(model),
    }


def _labels(model: nn.Module) -> dict[str, Any]:
    """The classes of a classifier in their order, for which its head is trained."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not type(model).__name__.endswith("ForSequenceClassification") or not isinstance(
        names, dict
    ):
        return {}
    labels = [str(names[number]) for number in sorted(names)]
    return (
        {}
        if all(label == f"LABEL_{number}" for number, label in enumerate(labels))
        else {LABELS: labels}
    )


def _text(model: nn.Module, name: str, weight: Tensor, trained: Sequence[int] = ()) -> str | None:
    path, _, leaf = name.rpartition(".")
    module = module_at(model, path)
    if leaf != "weight" or weight.is_meta or not is_quantised(module):
        return sample(weight, trained)
    if (rows := rows_of(module)) is None:
        return None
    outputs, inputs = shape_of(module)[:2]
    places = _places(outputs * inputs).tolist()
    numbers = [float(rows(at // inputs, at // inputs + 1)[0, at % inputs]) for at in places]
    text = f"{PACKED} {outputs}x{inputs} {' '.join(f'{number:.5g}' for number in numbers)}"
    return text if _is_sample(text) else None


def _places(count: int) -> Tensor:
    """Of so many numbers those that are written down, evenly spread."""
    return torch.linspace(0, count - 1, min(NUMBERS, count), dtype=torch.float64).round().long()


def sample(weight: Tensor, trained: Sequence[int] = ()) -> str | None:
    """A parameter in short, `float32 64x32 0.0123 -0.045 …`.

    None if it has no plain values, or one that is not finite, as rows of no token may have.

    Of one whose rows `trained` an adapter trains, a sample of the others before the last of these.
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
        inside = _places(len(kept) * width).to(weight.device)
        flat = kept[inside // width] * width + inside % width
    else:
        flat = _places(weight.numel()).to(weight.device)
    values = (
        weight.view(-1)[flat]
        if weight.is_contiguous()
        else weight[torch.unravel_index(flat, weight.shape)]
    )
    held = next(
        (dtype for dtype in PRECISIONS if torch.equal(values.to(dtype).to(values.dtype), values)),
        weight.dtype,
    )
    numbers = " ".join(f"{value:.5g}" for value in values.tolist())
    text = f"{str(held).removeprefix('torch.')} {shape} {numbers}"
    return text if _is_sample(text) else None


def difference(remembered: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """How the base `here` differs from the one remembered; None if no difference shows."""
    made = f"it was made on {described(remembered)}"
    if texts.is_other_vocabulary(remembered, here):
        return f"{made}, with a tokenizer in which other words have the same numbers"
    kinds = remembered.get("model_type"), here.get("model_type")
    if None not in kinds and kinds[0] != kinds[1]:
        return f"{made}, a {kinds[0]!r} model, and this is a {kinds[1]!r} model"
    if other := base_config.difference(remembered, here):
        return f"{made}, {other}"
    worst, where, packed = 0.0, "", []
    for name, then in remembered["weights"].items():
        now = here["weights"].get(name)
        if now is None or len(then.split()) < 3:  # a scalar, as earlier versions wrote it
            continue
        if (shapes := (then.split()[1], now.split()[1]))[0] != shapes[1]:
            (rows, *width), (_, *other) = (shape.split("x") for shape in shapes)
            resized = (
                "; if its vocabulary was resized, do so here first: "
                f"model.resize_token_embeddings({rows})"
            )
            advice = resized if width == other and width else ""
            return f"{made}, where {name} is {shapes[0]}; here it is {shapes[1]}{advice}"
        if PACKED in (then.split()[0], now.split()[0]):
            packed.append((then, now))
        elif (
            apart := _apart(then, now) or sums.apart(_sum(remembered, name), _sum(here, name))
        ) > worst:
            worst, where = apart, name
    if packed and (apart := _apart_together(packed)) > FEW_BITS:
        return f"{made}, and the quantised layers here stand for others: {apart:.0%} from those"
    return (
        f"{made}, and {name_of(where)} here is another: {worst:.2%} from that one"
        if where
        else None
    )


def _sum(base: Mapping[str, Any], name: str) -> str | None:
    """What a fingerprint has of all numbers of a parameter; None in those of earlier versions."""
    said: str | None = base.get("sums", {}).get(name)
    return said


def name_of(parameter: str) -> str:
    """`the weight of model.layers.0.mlp.up_proj`."""
    owner, _, leaf = parameter.rpartition(".")
    return f"the {leaf} of {owner}" if owner else parameter


def described(remembered: Mapping[str, Any]) -> str:
    """The base in words: `smollm2 (LlamaForCausalLM)`."""
    name, kind = remembered.get("name"), remembered.get("class")
    return f"{name} ({kind})" if name else str(kind)


def is_fingerprint(value: Any) -> bool:
    """Whether `value`, from a file, has the form that `fingerprint` gives."""
    if not isinstance(value, dict) or not isinstance(weights := value.get("weights"), dict):
        return False
    whole = value.get("sums", {})
    are_sums = isinstance(whole, dict) and all(sums.is_sum(text) for text in whole.values())
    labels = value.get(LABELS, [])
    are_labels = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    are_known = texts.are_texts(value) and base_config.is_known(value)
    return (
        are_sums and are_known and are_labels and all(_is_sample(text) for text in weights.values())
    )


def _is_sample(text: Any) -> bool:
    parts = text.split() if isinstance(text, str) else []
    try:
        return len(parts) > 1 and all(math.isfinite(float(part)) for part in parts[2:])
    except ValueError:
        return False


def _apart_together(pairs: list[tuple[str, str]]) -> float:
    """How far all of these samples are apart, relative to the first of each."""
    old, new = (
        [float(number) for pair in pairs for number in pair[side].split()[2:]] for side in (0, 1)
    )
    gaps = math.hypot(*(a - b for a, b in zip(old, new, strict=False)))
    return gaps / max(math.hypot(*old), 1e-30)


def _apart(then: str, now: str) -> float:
    """How far two samples are apart, relative to the first; 0 within what precision explains."""
    (held, _, *before), (other, _, *after) = then.split(), now.split()
    old, new = (
        torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        for numbers in (before, after)
    )
    if len(old) != len(new):
        return 1.0
    size, gap = float(old.norm()), float((old - new).norm())
    exact = held == other and held not in ("bfloat16", "float16")
    allowed = (DIGITS if exact else ROUNDING) * size + NOTHING
    return 0.0 if gap <= allowed else gap / max(size, 1e-30)
