"""A base model with an adapter merged into it, read tensor by tensor, never whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakin.errors import AdapterError, ModelError
from lorakin.family import widened
from lorakin.inject import layer_kinds
from lorakin.inject.attachments import BIAS
from lorakin.inject.folding import weight_with_pairs
from lorakin.inject.ties import FLAG, Separation, groups
from lorakin.inject.trainable_tokens import ids_at
from lorakin.serving.other_files import copy_other_files, files_without_weights
from lorakin.serving.tensor_stream import BY_NAME, TensorKind, write_shard
from lorakin.storage import checksums
from lorakin.storage.directory import AdapterFiles
from lorakin.storage.fingerprint import difference, sample
from lorakin.training import loading, model_files
from lorakin.training.base_class import BaseClass, kind_for
from lorakin.training.model_files import INDEX, SINGLE


class NotStreamed(ModelError):
    """The base is not stored under the model's own names in safetensors: load it whole."""


class OutputTensor(NamedTuple):
    """A tensor of the merged model.

    Attributes:
        source: the base's file, and the tensor's name in it; None if the base does not store it.
        kind: the dtype and shape in the base; those of another tensor if the base lacks it.
        shard: the file that it is written to.
    """

    source: tuple[str, str] | None
    kind: TensorKind
    shard: str


class StreamedMerge(Mapping[str, Tensor]):
    """Name → tensor of the merged model, as transformers names and stores it.

    Each tensor is read and folded when it is asked for.

    Raises:
        NotStreamed: the base is not stored under the model's own names in safetensors.
        AdapterError: the adapter does not fit the base.
    """

    def __init__(
        self,
        base: Path,
        files: AdapterFiles,
        base_class: BaseClass | None = None,
        dtype: torch.dtype | None = None,
        other_base: bool = False,
    ) -> None:
        self.base, self.dtype, self.path = base, dtype, files.path
        config = _config(base)
        self.model = (base_class or kind_for(files, config)).skeleton(config)
        self.config: Any = self.model.config
        self.document = files.match(self.model, other_base)
        self.fingerprint = None if other_base else files.base
        self.tensors = _stored_tensors(base, self.model)
        self.is_sharded = not (base / SINGLE).is_file()
        files_without_weights(base)  # raises before anything is written, if one cannot be copied
        tokens = self.document.placement.tokens
        # Parameter → path of the token rows that replace some of its rows.
        self.token_rows_of = {
            f"{table}.weight": path for path, rows in tokens.items() for table in (path, *rows.tied)
        }
        self.trained_ids = {f"{path}.weight": ids for path, ids in ids_at(tokens).items()}
        self._add_missing_tensors()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        dtype, _ = self.dtype_and_shape(name)
        if (replacement := self._replacement(name)) is not None:
            return replacement.to(dtype).contiguous()
        stored, path = self._stored(name), name.removesuffix(".weight")
        if (table := self.token_rows_of.get(name)) is not None:
            ids = torch.tensor(self.document.placement.tokens[table].ids)
            rows = self.document.rows[table].to(stored.dtype)
            return stored.index_copy(0, ids, rows).to(dtype).contiguous()
        if path in self.document.placement.methods and name.endswith(".weight"):
            return self._folded(path, stored, dtype)
        return stored.to(dtype).contiguous()

    def dtype_and_shape(self, name: str) -> TensorKind:
        """Returns the dtype and shape of a tensor without reading it.

        A tensor that the base lacks has the dtype of the base's first tensor.
        """
        replacement = self._replacement(name)
        dtype, shape = self.tensors[name].kind
        dtype = self.dtype if self.dtype is not None and dtype.is_floating_point else dtype
        return dtype, shape if replacement is None else tuple(replacement.shape)

    def _replacement(self, name: str) -> Tensor | None:
        """Returns what the adapter has in place of the base's tensor; None if it has nothing.

        That is a tensor of a module trained whole, a bias, or a buffer that training moved.
        """
        if name in self.document.buffers:
            return self.document.buffers[name]
        path, _, leaf = name.rpartition(".")
        if leaf == BIAS and path in self.document.biases:
            return self.document.biases[path]
        for path, state in self.document.whole_modules.items():
            if name.startswith(path + "."):
                return state[name.removeprefix(path + ".")]
        return None

    def write(self, out: Path) -> None:
        """Writes the model into the directory `out`, with shards as the base has them."""
        copy_other_files(self.base, out)
        config = json.dumps(self._written_config(), indent=2) + "\n"
        (out / "config.json").write_text(config, encoding="utf-8")
        total = 0
        weight_map = {name: tensor.shard for name, tensor in self.tensors.items()}
        for shard in sorted(set(weight_map.values())):
            names = [name for name, file in weight_map.items() if file == shard]
            kinds = {name: self.dtype_and_shape(name) for name in names}
            total += write_shard(out / shard, kinds, self.__getitem__)
        if self.is_sharded:
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _written_config(self) -> dict[str, Any]:
        """Returns the base's config.json, with what is different in the merged model."""
        config: dict[str, Any] = json.loads((self.base / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = [type(self.model).__name__]
        _write_untied(config, self.config, self.separation.configs)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        is_classifier = type(self.model).__name__.endswith("Classification")
        if is_classifier and "id2label" in self.config.to_diff_dict():
            config |= {key: getattr(self.config, key) for key in ("id2label", "label2id")}
        return config

    def _add_missing_tensors(self) -> None:
        """Adds tensors that the base's files lack: those of new heads, and tied ones that part."""
        document, last = self.document, max(tensor.shard for tensor in self.tensors.values())
        changed = {f"{path}.weight" for path in document.placement.methods}
        changed |= self.token_rows_of.keys()
        changed |= {
            f"{path}.{key}" for path, state in document.whole_modules.items() for key in state
        }
        changed |= {f"{path}.{BIAS}" for path in document.biases}

        tied = groups(self.model)
        self.separation = self._part(tied, changed, last)
        partners = {name for names in tied for name in names if self.tensors.keys() & names.keys()}
        available = self.tensors.keys() | changed | partners
        if lacking := sorted(dict(self.model.named_parameters()).keys() - available):
            raise NotStreamed(f"{self.base} does not store {lacking[0]} under the model's own name")

        any_kind = next(iter(self.tensors.values())).kind
        for name in sorted(changed - self.tensors.keys()):
            has_rows = name in self.token_rows_of
            if has_rows and name in partners:
                continue
            if has_rows or name.removesuffix(".weight") in document.placement.methods:
                raise NotStreamed(f"{self.base} does not store {name} under the model's own name")
            self.tensors[name] = OutputTensor(None, any_kind, last)

    def _part(self, tied: Sequence[Mapping[str, Any]], changed: set[str], last: str) -> Separation:
        """Gives the parameters that merging unties separate names, in the file `last`."""
        separated = {
            name
            for names in tied
            if changed & names.keys() and not self._is_one_table(names)
            for name in names
        }
        separation = Separation.of(self.model, separated)
        for names in tied:
            stored = next((self.tensors[name] for name in names if name in self.tensors), None)
            if stored is not None and separation.names & names.keys():
                for name in names:
                    self.tensors.setdefault(name, stored._replace(shard=last))
        for config in separation.configs:
            setattr(config, FLAG, False)
        separation.announce(stacklevel=4)
        return separation

    def _is_one_table(self, names: Iterable[str]) -> bool:
        """Returns whether the adapter trains the same rows in all these parameters: one table."""
        tables = {self.token_rows_of.get(name) for name in names}
        return len(tables) == 1 and None not in tables

    def _stored(self, name: str) -> Tensor:
        """Reads a tensor of the base, and checks it against the base's fingerprint."""
        source = self.tensors[name].source
        assert source is not None, name
        file, key = source
        with _opened(self.base / file) as shard:
            tensor: Tensor = shard.get_tensor(key)
        ids = self.trained_ids.get(name, ())
        fingerprint = {
            "weights": {name: text} if (text := sample(tensor, ids)) else {},
            "sums": checksums.lines_of({name: tensor}, {name: ids}),
        }
        if self.fingerprint and (problem := difference(self.fingerprint, fingerprint)):
            raise AdapterError(
                f"{self.path}: it is for another base model: {problem}. If this one is meant, give "
                "--other-base"
            )
        return tensor

    def _folded(self, path: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        module, method = self.model.get_submodule(path), self.document.placement.methods[path]
        layer_kind = layer_kinds.kind_of(module)
        assert layer_kind is not None
        if (
            stored.shape != module.weight.shape
            or not stored.is_floating_point()
            or stored.element_size() < 2
        ):
            raise ModelError(
                f"{path} is stored as {stored.dtype}, {tuple(stored.shape)}, which is not a plain "
                "weight of this model; merge the adapter into the base before that is quantised"
            )
        matrix = layer_kind.matrix(stored)
        pair = method.pair(widened(self.document.slots[path]), layer_kind.shape(module), matrix)
        return weight_with_pairs(stored, layer_kind, module, [pair], path, dtype).contiguous()


def _write_untied(fields: dict[str, Any], config: Any, untied: Sequence[Any]) -> None:
    """Sets tie_word_embeddings to false in the dictionaries of these configs, nested ones too."""
    if any(config is one for one in untied):
        fields[FLAG] = False
    for key, nested in vars(config).items():
        if isinstance(fields.get(key), dict) and hasattr(nested, "to_dict"):
            _write_untied(fields[key], nested, untied)


def _config(base: Path) -> Any:
    model_files.check_config(base)
    with loading.as_model_error(f"model {base} cannot be loaded"):
        return loading.config(base)


def _stored_tensors(base: Path, model: nn.Module) -> dict[str, OutputTensor]:
    """Returns the tensors of the base's files, by the model's names."""
    stored_in = model_files.weight_files(base)[0]
    files = [file.name for file in stored_in if file.suffix == ".safetensors"]
    if not files:
        raise NotStreamed(f"{base} holds no {SINGLE} or {INDEX}")
    model_names, prefix = model.state_dict().keys(), f"{getattr(model, 'base_model_prefix', '')}."
    tensors: dict[str, OutputTensor] = {}
    for file in files:
        with _opened(base / file) as shard:
            for key in shard.keys():  # noqa: SIM118 - not a mapping
                candidates = (key, prefix + key, key.removeprefix(prefix))
                name = next((name for name in candidates if name in model_names), key)
                stored = shard.get_slice(key)
                kind = BY_NAME[stored.get_dtype()], tuple(stored.get_shape())
                tensors[name] = OutputTensor((file, key), kind, file)
    return tensors


def _opened(path: Path) -> Any:
    """Opens a safetensors file of the base.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the base model's {path} cannot be read: {error}") from error
