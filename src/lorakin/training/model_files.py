"""What a model's directory must be before any library reads it: no file in it is trusted.

transformers makes the model that config.json describes, and then looks for its weights. So the
counts in the config are compared with the weights first, before anything takes memory.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakin.errors import ModelError, some
from lorakin.storage.pickles import is_plain
from lorakin.storage.schema import short_repr

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIGS = ("config.json", "generation_config.json")
PARSED = (
    CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json",
)  # fmt: skip
"""Files that loaders read as JSON objects."""
LARGEST_JSON = 2**26
COUNTED = re.compile(r"layer|depth|block|stage|label|expert", re.IGNORECASE)
MOST = 100_000
"""Keys of a config that count things which Python makes; and more than any model has."""
COPIES, MOST_COPIES = re.compile(r"num_beam|return_sequences"), 1000
"""Keys that say how many texts generation runs side by side; and more than anyone does."""
KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
SPREAD, SLACK = 16, 10**8
"""Most numbers for a byte of weights (8 of a bit each, and as many tied), and in a new head."""
BITSANDBYTES, PACKED = "bitsandbytes", re.compile(r"\.(quant_state\.|SCB$|absmax$)")
"""A quant_method, and what stands beside each weight that it has packed."""
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """How large the weights in a directory are: tensors, and bytes in all."""

    tensors: int
    bytes: int

    @property
    def most_tensors(self) -> int:
        """As many tensors as a model of it can have: ties, heads and experts count apart."""
        return 4 * self.tensors + 2000

    @property
    def most_numbers(self) -> int:
        """As many numbers as a model of it can have; see `SPREAD`."""
        return SPREAD * self.bytes + SLACK


def check_config(folder: Path) -> dict[str, Any]:
    """Returns the config of a model's directory, once its JSON files were checked.

    Raises:
        ModelError: no model's directory; a file that is damaged; a count that no model has; code
            that would be fetched.
    """
    for entry in sorted(folder.iterdir()):
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise ModelError(
                f"{entry} is neither a file nor a directory, so {folder} is not a model's"
            )
    parsed = {name: read_object(folder / name) for name in PARSED if (folder / name).is_file()}
    if CONFIG not in parsed:
        raise ModelError(f"{folder} is a directory without a config.json, so no transformers model")
    for name, content in parsed.items():
        if name in CONFIGS:
            check_values(content, str(folder / name))
    return parsed[CONFIG]


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Checks a config's values before a model is made of it.

    Refused are counts beyond `MOST`, implementations from the hub, and classes without names.

    Args:
        config: the config.
        where: its place, for messages.

    Raises:
        ModelError: such a value.
    """
    for key, value in _values(config):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (
            (COUNTED.search(key) and value > MOST) or (COPIES.search(key) and value > MOST_COPIES)
        ):
            raise ModelError(f"{where}: {key} is {float(value):g}, more than any model has")
        if key in KERNELS and isinstance(value, str) and "/" in value:
            raise ModelError(
                f"{where}: {key} is {value!r}, code from the hub, which is not run; leave the key "
                "out"
            )
    ends = config.get("eos_token_id")
    named = ends if isinstance(ends, list) else [ends] if ends is not None else []
    if not all(type(one) is int and -1 <= one < 2**31 for one in named):
        raise ModelError(
            f"{where}: eos_token_id is {str(ends)[:80]!r}, expected a token's number, or a list "
            "of them"
        )
    classes, labels = config.get("architectures"), config.get("id2label")
    if not (
        classes is None
        or (isinstance(classes, list) and all(isinstance(word, str) for word in classes))
    ):
        raise ModelError(f"{where}: architectures is {classes!r}, expected names of classes")
    if not (
        labels is None
        or (isinstance(labels, dict) and all(str(number).isdecimal() for number in labels))
    ):
        raise ModelError(
            f"{where}: id2label is {str(labels)[:80]}, expected a name for each number"
        )


def check(folder: Path) -> StoredTensor:
    """Checks a model's directory, as far as its files alone tell, and returns its size.

    Raises:
        ModelError: as `check_config`; or weights that are missing, damaged, outside of the
            directory, or no tensors.
    """
    packing = check_config(folder).get("quantization_config")
    if strange := [entry.name for entry in folder.iterdir() if DISTRIBUTED.fullmatch(entry.name)]:
        raise ModelError(
            f"{folder} holds a part of a distributed checkpoint ({strange[0]}); save the model "
            "whole"
        )
    files, index = weight_files(folder)
    if not files:
        raise ModelError(f"{folder} holds no weights: expected {SINGLE}, {INDEX} or {OLD_SINGLE}")
    at: dict[str, str] = {}
    for file in files:
        for key in tensors_in(file):
            if key in at:
                raise ModelError(f"{folder}: {key} stands in both {at[key]} and {file.name}")
            at[key] = file.name
    if lacking := [key for key, file in index.items() if at.get(key) != file]:
        raise ModelError(
            f"{folder}: its index says that {lacking[0]} is in {index[lacking[0]]}, which does "
            "not hold it"
        )
    if (
        isinstance(packing, dict)
        and packing.get("quant_method") == BITSANDBYTES
        and not any(map(PACKED.search, at))
    ):
        raise ModelError(
            f"{folder / CONFIG}: quantization_config says that bitsandbytes packed the weights, "
            "which are plain; leave it out, and say --quantize to have them in few bits"
        )
    return StoredTensor(len(at), sum(file.stat().st_size for file in files))


def weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """Returns the files with a model's weights, those that transformers takes, and their index.

    Raises:
        ModelError: an index that is damaged, or names files that are missing or outside.
    """
    for single, index in ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX)):
        if (folder / single).is_file():
            return [folder / single], {}
        if (folder / index).is_file():
            return _sharded(folder / index, Path(single).suffix)
    return [], {}


def _sharded(index: Path, suffix: str) -> tuple[list[Path], Mapping[str, str]]:
    weight_map = read_object(index, unique=True).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(f"{index} has no weight_map from tensors to files; is it a model's index?")
    names = sorted(set(weight_map.values()))
    if unsafe := [
        name for name in names if Path(name).name != name or "\\" in name or name.startswith(".")
    ]:
        raise ModelError(f"{index} names a file outside of its directory: {unsafe[0]!r}")
    if wrong_suffix := [name for name in names if not name.endswith(suffix)]:
        raise ModelError(f"{index} names {wrong_suffix[0]!r}, expected files that end in {suffix}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ModelError(
            f"{index} names files that are not there: {some(missing)}; fetch or copy the whole "
            "model"
        )
    return [index.parent / name for name in names], weight_map


def tensors_in(file: Path) -> Iterable[str]:
    """Returns the names of the tensors in a file of weights.

    Raises:
        ModelError: it is damaged, or holds something else.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}; is it cut off or damaged?") from None
    return _pickled(file)


def _pickled(file: Path) -> Iterable[str]:
    """Returns the names in a `.bin`, read without its numbers; nothing in it is run."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ModelError(
                        f"{file} is compressed, which no file of weights is; it may unfold "
                        "without end"
                    )
        content = torch.load(file, map_location="meta", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file} holds more than tensors, or is damaged; nothing in it is run"
        ) from None
    except Exception as error:  # torch's reader has every kind for a damaged file
        raise ModelError(
            f"{file} cannot be read as weights "
            f"({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(t, Tensor) and isinstance(key, str) for key, t in content.items()
    ):
        raise ModelError(
            f"{file} holds something else than tensors by name, so it is not a model's state_dict"
        )
    if strange := [key for key, t in content.items() if not is_plain(t)]:
        raise ModelError(
            f"{file}: tensor {short_repr(strange[0])} is not a plain dense tensor "
            f"({content[strange[0]].layout})"
        )
    storages = {
        storage._cdata: storage.nbytes()
        for t in content.values()
        if (storage := t.untyped_storage())
    }
    if sum(storages.values()) > file.stat().st_size:
        raise ModelError(
            f"{file} says that it holds more numbers than it has bytes for; is it cut off?"
        )
    return list(content)


def first_line(error: BaseException) -> str:
    """Returns an error's first line, with its class if the line alone says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if line and not isinstance(
        error, KeyError | IndexError | AttributeError | TypeError | AssertionError
    ):
        return line
    return f"{type(error).__name__} ({line})" if line else type(error).__name__


def read_object(path: Path, unique: bool = False) -> dict[str, Any]:
    """Returns a file's JSON object.

    Args:
        path: the file.
        unique: whether a key that stands twice is refused.

    Raises:
        ModelError: it is too large, no JSON, or no object.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(found)
        if unique and len(content) < len(found):
            raise ValueError("a key stands in it twice")
        return content

    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ModelError(f"{path} has {size:,} bytes, too many for a model's settings")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{path} cannot be read as JSON ({error}); is it cut off or damaged?"
        ) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _values(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every value in a config with its key, also in lists and in parts of the config."""
    waiting: list[tuple[str, Any]] = list(content.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items() if key not in ("id2label", "label2id") else ()
        elif isinstance(value, list):
            waiting += ((key, one) for one in value)
        else:
            yield key, value
