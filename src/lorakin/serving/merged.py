"""A base model with an adapter folded in, tensor by tensor from files: never whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakin.errors import AdapterError, ModelError
from lorakin.family import widened
from lorakin.inject import layer_kinds
from lorakin.inject.attachments import BIAS
from lorakin.inject.folding import folded
from lorakin.inject.ties import FLAG, Parting, groups
from lorakin.inject.trainable_tokens import ids_at
from lorakin.serving.other_files import beside, copy_beside
from lorakin.serving.tensor_stream import BY_NAME, Kind, write_shard
from lorakin.storage import checksums
from lorakin.storage.directory import AdapterFiles
from lorakin.storage.fingerprint import difference, sample
from lorakin.training import loading, model_files
from lorakin.training.base_class import BaseClass, kind_for
from lorakin.training.model_files import INDEX, SINGLE


class NotStreamed(ModelError):
    """The base is not stored under the model's own names in safetensors: load it whole."""


class Merged(Mapping[str, Tensor]):
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
        kind: BaseClass | None = None,
        dtype: torch.dtype | None = None,
        other_base: bool = False,
    ) -> None:
        self.base, self.dtype, self.path = base, dtype, files.path
        config = _config(base)
        self.model = (kind or kind_for(files, config)).skeleton(config)
        self.config: Any = self.model.config
        self.contents = files.match(self.model, other_base)
        self.remembered = None if other_base else files.base
        self.names, self.kinds, self.shards = _where(base, self.model)
        self.is_sharded = not (base / SINGLE).is_file()
        beside(base)  # raises before anything is written, if a file cannot go along
        tokens = self.contents.placement.tokens
        # Parameter → path of the token rows that replace some of its rows.
        self.leaders = {
            f"{at}.weight": path for path, rows in tokens.items() for at in (path, *rows.tied)
        }
        self.trained = {f"{path}.weight": ids for path, ids in ids_at(tokens).items()}
        self._add_what_is_new()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, name: object) -> bool:
        return name in self.shards

    def __getitem__(self, name: str) -> Tensor:
        dtype, _ = self.kind(name)
        if (copied := self._copied(name)) is not None:
            return copied.to(dtype).contiguous()
        stored, path = self._stored(name), name.removesuffix(".weight")
        if (leader := self.leaders.get(name)) is not None:
            ids = torch.tensor(self.contents.placement.tokens[leader].ids)
            rows = self.contents.rows[leader].to(stored.dtype)
            return stored.index_copy(0, ids, rows).to(dtype).contiguous()
        if path in self.contents.placement.methods and name.endswith(".weight"):
            return self._folded(path, stored, dtype)
        return stored.to(dtype).contiguous()

    def kind(self, name: str) -> Kind:
        """Returns the dtype and shape of a tensor without reading it.

        A tensor that the base lacks has the dtype of the base's first tensor.
        """
        copied = self._copied(name)
        dtype, shape = self.kinds[name if name in self.kinds else next(iter(self.kinds))]
        dtype = self.dtype if self.dtype is not None and dtype.is_floating_point else dtype
        return dtype, shape if copied is None else tuple(copied.shape)

    def _copied(self, name: str) -> Tensor | None:
        """Returns what the adapter has in place of the base's tensor; None if it has nothing.

        That is a tensor of a module trained whole, a bias, or a buffer that training moved.
        """
        if name in self.contents.buffers:
            return self.contents.buffers[name]
        path, _, leaf = name.rpartition(".")
        if leaf == BIAS and path in self.contents.biases:
            return self.contents.biases[path]
        for path, state in self.contents.whole_modules.items():
            if name.startswith(path + "."):
                return state[name.removeprefix(path + ".")]
        return None

    def write(self, out: Path) -> None:
        """Writes the model into the directory `out`, with shards as the base has them."""
        copy_beside(self.base, out)
        config = json.dumps(self._written_config(), indent=2) + "\n"
        (out / "config.json").write_text(config, encoding="utf-8")
        total = 0
        for shard in sorted(set(self.shards.values())):
            names = [name for name, file in self.shards.items() if file == shard]
            kinds = {name: self.kind(name) for name in names}
            total += write_shard(out / shard, kinds, self.__getitem__)
        if self.is_sharded:
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(self.shards.items())),
            }
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _written_config(self) -> dict[str, Any]:
        """Returns the base's config.json, with what is different in the merged model."""
        config: dict[str, Any] = json.loads((self.base / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = [type(self.model).__name__]
        _say_untied(config, self.config, self.parting.configs)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        is_classifier = type(self.model).__name__.endswith("Classification")
        if is_classifier and "id2label" in self.config.to_diff_dict():
            config |= {key: getattr(self.config, key) for key in ("id2label", "label2id")}
        return config

    def _add_what_is_new(self) -> None:
        """Adds names that the base's files lack: those of new heads, and tied ones that part."""
        contents, last = self.contents, max(self.shards.values())
        changed = {f"{path}.weight" for path in contents.placement.methods} | self.leaders.keys()
        changed |= {
            f"{path}.{key}" for path, state in contents.whole_modules.items() for key in state
        }
        changed |= {f"{path}.{BIAS}" for path in contents.biases}

        tied = groups(self.model)
        self.parting = self._part(tied, changed, last)
        partners = {name for names in tied for name in names if self.shards.keys() & names.keys()}
        known = self.shards.keys() | changed | partners
        if lacking := sorted(dict(self.model.named_parameters()).keys() - known):
            raise NotStreamed(f"{self.base} does not store {lacking[0]} under the model's own name")

        for name in sorted(changed - self.shards.keys()):
            if name in self.leaders and name in partners:
                continue
            if name.removesuffix(".weight") in contents.placement.methods or name in self.leaders:
                raise NotStreamed(f"{self.base} does not store {name} under the model's own name")
            self.shards[name] = last

    def _part(self, tied: Sequence[Mapping[str, Any]], changed: set[str], last: str) -> Parting:
        """Gives the parameters that merging unties names of their own, in the file `last`."""
        parted = {
            name
            for names in tied
            if changed & names.keys() and not self._is_one_table(names)
            for name in names
        }
        parting = Parting.of(self.model, parted)
        for names in tied:
            source = next((name for name in names if name in self.names), None)
            if source is not None and parting.names & names.keys():
                for name in names:
                    self.names.setdefault(name, self.names[source])
                    self.kinds.setdefault(name, self.kinds[source])
                    self.shards.setdefault(name, last)
        for config in parting.configs:
            setattr(config, FLAG, False)
        parting.announce(stacklevel=4)
        return parting

    def _is_one_table(self, names: Iterable[str]) -> bool:
        """Returns whether the adapter trains the same rows in all these parameters: one table."""
        together = {self.leaders.get(name) for name in names}
        return len(together) == 1 and None not in together

    def _stored(self, name: str) -> Tensor:
        file, key = self.names[name]
        with _opened(self.base / file) as shard:
            tensor: Tensor = shard.get_tensor(key)
        ids = self.trained.get(name, ())
        here = {
            "weights": {name: text} if (text := sample(tensor, ids)) else {},
            "sums": checksums.lines_of({name: tensor}, {name: ids}),
        }
        if self.remembered and (apart := difference(self.remembered, here)):
            raise AdapterError(
                f"{self.path}: it is for another base model: {apart}. If this one is meant, say "
                "--other-base"
            )
        return tensor

    def _folded(self, path: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        module, method = self.model.get_submodule(path), self.contents.placement.methods[path]
        kind = layer_kinds.kind_of(module)
        assert kind is not None
        if (
            stored.shape != module.weight.shape
            or not stored.is_floating_point()
            or stored.element_size() < 2
        ):
            raise ModelError(
                f"{path} is stored as {stored.dtype}, {tuple(stored.shape)}, which is no plain "
                "weight of this model; an adapter is folded into the base before that is quantised"
            )
        matrix = kind.matrix(stored)
        pair = method.pair(widened(self.contents.slots[path]), kind.shape(module), matrix)
        return folded(stored, kind, module, [pair], path, dtype).contiguous()


def _say_untied(said: dict[str, Any], config: Any, untied: Sequence[Any]) -> None:
    """Writes into a config's dictionary which of it and its parts say that nothing is tied."""
    if any(config is one for one in untied):
        said[FLAG] = False
    for key, part in vars(config).items():
        if isinstance(said.get(key), dict) and hasattr(part, "to_dict"):
            _say_untied(said[key], part, untied)


def _config(base: Path) -> Any:
    model_files.check_config(base)
    with loading.as_model_error(f"model {base} cannot be loaded"):
        return loading.config(base)


def _where(
    base: Path, model: nn.Module
) -> tuple[dict[str, tuple[str, str]], dict[str, Kind], dict[str, str]]:
    """Returns where the base's tensors are, by the model's names.

    Returns:
        name → (file, name in the file); name → dtype and shape; name → the file to write it to.
    """
    stored_in = model_files.weight_files(base)[0]
    files = [file.name for file in stored_in if file.suffix == ".safetensors"]
    if not files:
        raise NotStreamed(f"{base} holds no {SINGLE} or {INDEX}")
    own, prefix = model.state_dict().keys(), f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, tuple[str, str]] = {}
    kinds: dict[str, Kind] = {}
    for file in files:
        with _opened(base / file) as shard:
            for key in shard.keys():  # noqa: SIM118 - not a mapping
                known = (key, prefix + key, key.removeprefix(prefix))
                name = next((name for name in known if name in own), key)
                stored = shard.get_slice(key)
                names[name] = file, key
                kinds[name] = BY_NAME[stored.get_dtype()], tuple(stored.get_shape())
    return names, kinds, {name: file for name, (file, _) in names.items()}


def _opened(path: Path) -> Any:
    """Opens a safetensors file of the base.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the base model's {path} cannot be read: {error}") from error
