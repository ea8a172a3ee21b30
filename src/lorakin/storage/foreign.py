"""Low-rank adapters that other libraries wrote, matched with a model of ours.

| format | one module's tensors in its file | s in W0 + s·B·A |
|---|---|---|
| loralib | `<path>.lora_A` (r, in), `.lora_B` (out, r); an embedding's (r, vocabulary), (dim, r) | alpha / r |
| – merged linear | `.lora_A` (g·r, in), `.lora_B` (out, r): g parts of the outputs, each with its own pair | alpha / r |
| – 2-d convolution | `.lora_A` (r·k, in·k), `.lora_B` (out·k, r·k), B·A taken as (out, in, k, k) | alpha / r |
| torchtune | `<path>.lora_a.weight` (r, in), `.lora_b.weight` (out, r), `.magnitude` (out) | alpha / r |
| mlx-lm | `<path>.lora_a` (in, r), `.lora_b` (r, out), `.m` (out) | `scale` |
| – embedding | `.lora_a` (vocabulary, r), `.lora_b` (r, dim) | `scale` |
| kohya, LyCORIS | `<prefix>_<path>.lora_down.weight` (r, in, kernel…), `.lora_up.weight` (out, r, 1…), | alpha / r |
| | `.alpha` (), `.dora_scale` (out, 1…); `<path>` has underscores for dots | |

loralib's alpha is in no file. torchtune's and mlx-lm's numbers are in `adapter_config.json`, as `lora_alpha` and as
`lora_parameters.scale`. Where kohya's file has no alpha, or 0, it is r.

torchtune names the modules of Llama its own way, and in most of its models the halves of a head alternate: row 2i of a
head's queries and keys is transformers' row i, row 2i + 1 is row i + head/2. mlx-lm up to 0.14 multiplied by scale·alpha/r;
from 0.15 on it wrote the same alpha and ignored it, and only from 0.19 on does `num_layers` tell the two apart. An embedding
that mlx-lm adapts is adapted as the head too if the two are tied. With magnitudes m all of them mean
(m / ‖W0 + s·B·A‖ by rows) · (W0 + s·B·A).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakin.errors import AdapterError, SettingError, some
from lorakin.family import Shape, all_finite, members
from lorakin.family.settings import is_finite_number
from lorakin.inject import layers
from lorakin.inject.layers import EmbeddingLayer
from lorakin.inject.targets import named_modules
from lorakin.storage import files
from lorakin.storage.json_files import read_json
from lorakin.storage.pickles import tensors_of

CONFIG = "adapter_config.json"
USUAL_NAMES = (
    "adapters.safetensors",
    "adapter_model.pt",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Slots = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What another library's file says about a model.

    `sites`: module path → `A` (r, inputs), `B` (outputs, r) and, if it has one, a magnitude `m` (outputs), in the file's
    dtype; `scales`: module path → s of the change s·B·A; `notes`: what the user should know.
    """

    format: str
    sites: dict[str, Slots]
    scales: dict[str, float]
    notes: list[str]


def read_foreign(path: Path, model: nn.Module, *, alpha: float | None = None) -> Foreign:
    """Read the adapter in the file or directory `path` and match it with `model`, which is left as it is.

    `alpha` is what the file does not say, for s = alpha / r; where the file says its scale, it must agree.

    Raises:
        AdapterError: a file that cannot be read, of no known format, of a kind that is no low-rank pair, damaged, or for
            another base model; or one that does not say its scale, without `alpha`.
        SettingError: `alpha` is no positive number.
    """
    if alpha is not None and (
        isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0 < alpha < math.inf)
    ):
        raise SettingError(f"alpha must be a positive number, not {alpha!r}")
    file = _file_at(path)
    config = read_json(file.parent / CONFIG) if (file.parent / CONFIG).exists() else {}
    source = _Source(str(file), _tensors(file), config, model, named_modules(model), alpha)
    return _reader(source)(source)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A file's tensors and the config beside it (empty if there is none), the model they are for, the user's alpha."""

    where: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    model: nn.Module
    modules: Mapping[str, nn.Module]
    alpha: float | None

    def error(self, message: str) -> AdapterError:
        return AdapterError(f"{self.where}: {message}")

    def split(self, endings: Mapping[str, str]) -> dict[str, Slots]:
        """The tensors by path and slot. `endings`: ending of a key → slot, the first two those of A and B."""
        sites: dict[str, Slots] = {}
        rest = []
        for key, tensor in self.tensors.items():
            ending = next((ending for ending in endings if key.endswith(f".{ending}")), None)
            if ending is None:
                rest.append(key)
            else:
                sites.setdefault(key.removesuffix(f".{ending}"), {})[endings[ending]] = tensor
        if rest:
            raise self.error(
                f"tensors that belong to nothing: {some(rest)}; the file is damaged or of another kind"
            )
        for path, slots in sites.items():
            if absent := [ending for ending in list(endings)[:2] if endings[ending] not in slots]:
                raise self.error(
                    f"{path} lacks {', '.join(absent)}; the file is damaged or incomplete"
                )
            if flat := [slot for slot in ("A", "B") if slots[slot].ndim < 2]:
                raise self.error(
                    f"{flat[0]} of {path} has shape {tuple(slots[flat[0]].shape)}, expected a matrix"
                )
        return sites

    def module(self, path: str) -> tuple[nn.Module, Shape]:
        """The module at `path`, and its weight as a matrix."""
        if path not in self.modules:
            raise self.error(
                f"it is for another base model: it adapts {path}, which this {type(self.model).__name__} does not have"
            )
        module = self.modules[path]
        if reason := layers.refusal(module):
            raise self.error(f"it adapts {path}, but that is {reason}")
        kind = layers.kind_of(module)
        assert kind is not None
        return module, kind.shape(module)

    def checked(self, path: str, slots: Slots) -> Slots:
        """The slots, in order, if they are a change of the weight at `path`: finite, dense and of its shape."""
        _, shape = self.module(path)
        A, B, m = slots["A"], slots["B"], slots.get("m")
        for slot, tensor in slots.items():
            if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
                raise self.error(
                    f"{slot} of {path} is {tensor.dtype} ({tensor.layout}), expected a dense floating tensor"
                )
            if not all_finite(tensor):
                raise self.error(f"{slot} of {path} holds NaN or infinity")
        fits = (
            A.ndim == B.ndim == 2 and (len(B), A.shape[1]) == shape[:2] and B.shape[1] == len(A) > 0
        )
        if not fits or (m is not None and tuple(m.shape) != shape[:1]):
            have = ", ".join(f"{slot} {tuple(t.shape)}" for slot, t in slots.items())
            raise self.error(
                f"{path} has {have}, as outputs × inputs, but its weight in this {type(self.model).__name__} is "
                f"{shape.outputs} × {shape.inputs}; the file is for another base model, or damaged"
            )
        return {slot: slots[slot].contiguous() for slot in ("A", "B", "m") if slot in slots}

    def scale(self, path: str, rank: int, said: Iterable[float]) -> float:
        """s for the module at `path`: one of those that the file may mean, `said`; `alpha` fills in or decides."""
        known = sorted(set(said))
        if self.alpha is None:
            if len(known) == 1:
                return known[0]
            if not known:
                raise self.error(
                    f"nothing here says alpha; give alpha=… as it was in training. The rank of {path} is {rank}, and the "
                    "change is alpha / rank · B·A"
                )
            either = " or ".join(f"alpha={s * rank:g}, a scale of {s:g}" for s in known)
            raise self.error(f"what it says can mean two scales; give {either}")
        given = self.alpha / rank
        if known and not any(math.isclose(given, s, rel_tol=1e-6) for s in known):
            said_alpha = " or ".join(f"{s * rank:g}" for s in known)
            raise self.error(
                f"alpha={self.alpha:g} was given, but for {path} of rank {rank} the file says {said_alpha}; leave alpha out"
            )
        return given

    def number(self, holder: Mapping[str, Any], name: str) -> float:
        """A number of the config."""
        value = holder[name]
        if not is_finite_number(value):
            raise self.error(f"its {CONFIG} says {name}={value!r}, expected a number")
        return value

    def tied(self, path: str) -> list[str]:
        """The other modules whose weight is that of the module at `path`."""
        weight = self.modules[path].weight
        return [
            other
            for other, m in self.modules.items()
            if other != path and getattr(m, "weight", None) is weight
        ]


def _reader(source: _Source) -> Callable[[_Source], Foreign]:
    """The reader of the format that the file's keys are of."""
    keys = list(source.tensors)
    if any(key.startswith("base_model.model.") for key in keys):
        raise source.error(
            "it is in PEFT's layout, which is read from its directory, as lorakin's own is"
        )
    if source.config.get("fine_tune_type") == "full":
        raise source.error(
            "a full fine-tune (fine_tune_type='full'), not an adapter; load it as a model"
        )
    for marks, reader in (
        (r".*\.(lora_[ab]\.weight|magnitude)", _torchtune),
        (r".*\.(lora_[ab]|m)", _mlx),
        (r".*\.lora_[AB]", _loralib),
        (FLAT.pattern, _kohya),
    ):
        if any(re.fullmatch(marks, key) for key in keys):
            return reader
    raise source.error(
        f"tensors of no known adapter format, such as {some(keys) or 'none at all'}; read are loralib's, torchtune's, "
        "mlx-lm's and kohya's or LyCORIS' files, and PEFT's as a directory"
    )


def _loralib(source: _Source) -> Foreign:
    if biases := [key for key in source.tensors if key.rpartition(".")[2] == "bias"]:
        raise source.error(
            f"it trains biases ({some(biases)}), which this version does not implement"
        )
    found = Foreign("loralib", {}, {}, [])
    for path, slots in source.split({"lora_A": "A", "lora_B": "B"}).items():
        module, shape = source.module(path)
        A, B = slots["A"], slots["B"]
        rank, parts = len(A), len(A) // max(B.shape[1], 1)
        if kernel := _square_kernel(module, A, B):
            A, B, rank = _diagonal([A] * kernel), B.reshape(shape.outputs, -1), len(A) // kernel
            found.notes.append(
                f"{path}: loralib's convolution of rank {rank} is a pair of rank {len(A)} here"
            )
        elif parts > 1 and len(A) == parts * B.shape[1] and len(B) < shape.outputs:
            raise source.error(
                f"{path} is a merged linear layer with {parts} of its parts adapted; the file does not say which "
                "(enable_lora), so it is not read"
            )
        elif (
            parts > 1
            and len(A) == parts * B.shape[1]
            and len(B) == shape.outputs
            and len(B) % parts == 0
        ):
            B, rank = _diagonal(B.chunk(parts)), B.shape[1]
            found.notes.append(
                f"{path}: {parts} merged parts of rank {rank} are one pair of rank {len(A)} here"
            )
        if shape.lookup and source.tied(path):
            found.notes.append(
                f"{path}: the head that is tied to it stays the base's, as in loralib's training"
            )
        found.sites[path] = source.checked(path, {"A": A, "B": B})
        found.scales[path] = source.scale(path, rank, ())
    return found


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Matrices down a diagonal, zeros elsewhere."""
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def _square_kernel(module: nn.Module, A: Tensor, B: Tensor) -> int | None:
    """k > 1 if A (r·k, in·k) and B (out·k, r·k) are loralib's for this 2-d convolution of kernel k × k, else None.

    B·A is (out·k, in·k) and is read as (out, in, k, k). As our matrix (out, in·k·k) its row o is rows o·k … o·k+k-1 one
    after the other: B of those rows side by side, times k copies of A down a diagonal.
    """
    if not isinstance(module, nn.Conv2d):
        return None
    k = module.kernel_size[0]
    fits = module.kernel_size == (k, k) and (len(B), A.shape[1]) == (
        module.out_channels * k,
        module.in_channels * k,
    )
    return k if k > 1 and fits and len(A) == B.shape[1] and len(A) % k == 0 else None


TORCHTUNE_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
TORCHTUNE_ALTERNATES = {
    "llama": True,
    "mistral": True,
    "gemma": True,
    "gemma2": True,
    "qwen2": False,
}
"""model_type → whether the halves of a head alternate in torchtune's queries and keys."""


def _torchtune(source: _Source) -> Foreign:
    config: Any = getattr(source.model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in TORCHTUNE_ALTERNATES:
        raise source.error(
            f"torchtune's file for a model of type {model_type!r}; read are those for {', '.join(TORCHTUNE_ALTERNATES)}"
        )
    found = Foreign("torchtune", {}, {}, [])
    for name, slots in source.split(
        {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "m"}
    ).items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer and layer[2] in TORCHTUNE_NAMES:
            path = f"model.layers.{layer[1]}.{TORCHTUNE_NAMES[layer[2]]}"
        elif name == "output":
            path = "lm_head"
        else:
            raise source.error(
                f"tensors that belong to nothing: {name} is no module that torchtune adapts in {model_type}"
            )
        slots = source.checked(path, slots)
        if TORCHTUNE_ALTERNATES[model_type] and path.endswith((".q_proj", ".k_proj")):
            head = (
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
            slots |= {slot: _halves_together(t, head) for slot, t in slots.items() if slot != "A"}
        rank = len(slots["A"])
        if "r" in source.config and source.number(source.config, "r") != rank:
            raise source.error(
                f"{name} has rank {rank}, but its {CONFIG} says r={source.config['r']}"
            )
        said = (
            [source.number(source.config, "lora_alpha") / rank]
            if "lora_alpha" in source.config
            else []
        )
        found.sites[path], found.scales[path] = slots, source.scale(path, rank, said)
    return found


def _halves_together(rows: Tensor, head: int) -> Tensor:
    """`rows` (heads · head, …) with each head's even rows before its odd ones."""
    return rows.view(-1, head // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _mlx(source: _Source) -> Foreign:
    settings = source.config.get("lora_parameters", {})
    if not isinstance(settings, dict):
        raise source.error(f"its {CONFIG} says lora_parameters={settings!r}, expected an object")
    with_gain = [member.word for member in members() if "gain" in member.decides]
    gained = (
        source.config.get("fine_tune_type") in with_gain or source.config.get("use_dora") is True
    )
    found = Foreign("mlx-lm", {}, {}, [])
    for path, slots in source.split({"lora_a": "A", "lora_b": "B", "m": "m"}).items():
        if slots["A"].ndim != 2 or slots["B"].ndim != 2:
            raise source.error(
                f"{path} is a layer of experts, {tuple(slots['A'].shape)}, which this version does not read"
            )
        if gained and "m" not in slots:
            raise source.error(
                f"{path} lacks m, but its {CONFIG} says that magnitudes were trained"
            )
        module, _ = source.module(path)
        embedding = layers.kind_of(module) is EmbeddingLayer
        if embedding and "m" in slots:
            raise source.error(
                f"{path} is an embedding with a magnitude for each word, not each output: another method"
            )
        found.sites[path] = source.checked(path, slots | {"A": slots["A"].T, "B": slots["B"].T})
        found.scales[path] = source.scale(
            path, slots["A"].shape[1], _mlx_scales(source, settings, slots["A"].shape[1])
        )
        for head in source.tied(path) if embedding else []:
            found.sites[head] = source.checked(head, {"A": slots["B"], "B": slots["A"]})
            found.scales[head] = found.scales[path]
            found.notes.append(f"{path}: {head} is tied to it and changes with it, as in mlx-lm")
    return found


def _mlx_scales(source: _Source, settings: Mapping[str, Any], rank: int) -> set[float]:
    """What the config can mean: none without a scale, two in the years when an alpha was there and then ignored."""
    if "scale" not in settings:
        return set()
    scale = source.number(settings, "scale")
    if "alpha" in settings and "num_layers" not in source.config:
        return {scale, scale * (source.number(settings, "alpha") / rank)}
    return {scale}


FLAT = re.compile(
    r"(?P<model>lora_(?:unet|te\d?|transformer|prior_unet)|lycoris)_(?P<path>[^.]+)\.(?P<rest>.+)"
)
ANOTHER_METHOD = {
    "lora_mid": "a Tucker decomposition (LoCon with lora_mid)",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "diff": "a full difference of the weights",
    "a1.": "GLoRA",
    "on_input": "(IA)³",
    "w_norm": "trained norms",
}


def _kohya(source: _Source) -> Foreign:
    """Of a file for several models, the part that fits this one."""
    by_model: dict[str, dict[str, Tensor]] = {}
    rest = []
    for key, tensor in source.tensors.items():
        if part := FLAT.fullmatch(key):
            by_model.setdefault(part["model"], {})[key.removeprefix(f"{part['model']}_")] = tensor
        else:
            rest.append(key)
    if rest:
        raise source.error(
            f"tensors that belong to nothing: {some(rest)}; the file is damaged or of another kind"
        )
    paths = _flat_paths(source)
    found: dict[str, Foreign] = {}
    errors: dict[str, AdapterError] = {}
    for model, tensors in by_model.items():
        try:
            found[model] = _kohya_part(dataclasses.replace(source, tensors=tensors), paths)
        except AdapterError as error:
            errors[model] = error
    if len(found) > 1:
        raise source.error(
            f"its parts {' and '.join(found)} both fit this model; keep one of them in the file"
        )
    if not found:
        raise errors[
            max(
                errors,
                key=lambda model: sum(key.partition(".")[0] in paths for key in by_model[model]),
            )
        ]
    ((model, fitting),) = found.items()
    for other, reason in errors.items():
        fitting.notes.append(
            f"the {len(by_model[other])} tensors of {other} were left out, as another model's: {reason}"
        )
    return fitting


def _flat_paths(source: _Source) -> dict[str, list[str]]:
    """The paths of the modules that can be meant by a name with underscores for dots."""
    paths: dict[str, list[str]] = {}
    clip = (
        "text_model" not in source.modules
    )  # transformers 5 no longer has it in a CLIPTextModel; the files do
    for path, module in source.modules.items():
        if layers.kind_of(module) is not None:
            flat = path.replace(".", "_")
            for name in (flat, f"text_model_{flat}") if clip else (flat,):
                paths.setdefault(name, []).append(path)
    return paths


def _kohya_part(source: _Source, paths: Mapping[str, list[str]]) -> Foreign:
    for key in source.tensors:
        what = next(
            (
                what
                for start, what in ANOTHER_METHOD.items()
                if key.partition(".")[2].startswith(start)
            ),
            None,
        )
        if what:
            raise source.error(f"{key} is of {what}, which is no low-rank pair and not read")
    found = Foreign("kohya/LyCORIS", {}, {}, [])
    endings = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "m"}
    for name, slots in source.split(endings).items():
        if name not in paths:
            raise source.error(
                f"it is for another base model: it adapts {name}, but this {type(source.model).__name__} has no layer of that "
                "name, with underscores for dots"
            )
        if len(paths[name]) > 1:
            raise source.error(
                f"{name} can mean {' or '.join(paths[name])} in this {type(source.model).__name__}"
            )
        (path,) = paths[name]
        module, shape = source.module(path)
        if shape.lookup:
            raise source.error(
                f"it adapts {path}, an embedding, for which kohya's format has no form"
            )
        rank, alpha = len(slots["A"]), slots.pop("alpha", torch.zeros(()))
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha):
            raise source.error(f"{name}.alpha is {alpha.tolist()}, expected one number")
        if "m" in slots and slots["m"].shape != (shape.outputs, *(1 for _ in slots["m"].shape[1:])):
            raise source.error(
                f"{name}.dora_scale has shape {tuple(slots['m'].shape)}: magnitudes along the inputs are another method's, "
                f"expected one for each of the {shape.outputs} outputs"
            )
        kernel, own = slots["A"].shape[2:], tuple(getattr(module, "kernel_size", ()))
        if kernel != own and not math.prod(kernel) == math.prod(own) == 1:
            raise source.error(
                f"{name}.lora_down.weight has a kernel of {tuple(kernel)}, but that of {path} is {own}"
            )
        flat = {slot: t.flatten(1) for slot, t in slots.items() if slot != "m"}
        found.sites[path] = source.checked(
            path, flat | ({"m": slots["m"].flatten()} if "m" in slots else {})
        )
        found.scales[path] = source.scale(path, rank, [float(alpha) / rank or 1.0])
    return found


def _file_at(path: Path) -> Path:
    """The file of tensors that `path` is, or that the directory holds."""
    if not path.exists():
        raise AdapterError(f"there is no file or directory {path}")
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES))
    usual = [path / name for name in USUAL_NAMES if path / name in files]
    if not usual and len(files) != 1:
        raise AdapterError(
            f"{path} holds {some(file.name for file in files) or 'no file of tensors'}; name the adapter's file"
        )
    return (usual or files)[0]


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix not in (".safetensors", *PICKLES):
        raise AdapterError(
            f"{file} is no file of tensors; expected .safetensors, {', '.join(PICKLES)}"
        )
    if file.suffix != ".safetensors":
        return tensors_of(file)
    try:
        return safetensors.torch.load_file(files.regular(file))
    except (SafetensorError, OSError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{file}: its tensors cannot be read ({error})") from None
