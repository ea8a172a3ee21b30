"""An adapter that a run trains further, and what its files decide of the recipe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from lorakin.adapter import Adapter
from lorakin.errors import SettingError, some
from lorakin.family import Method, method_named
from lorakin.loading import insert_document
from lorakin.storage import directory, hub
from lorakin.storage.peft.reading import parsed_files
from lorakin.switching import activate
from lorakin.training.chat_templates import TEMPLATE, remembered_template
from lorakin.training.models import Loaded
from lorakin.training.recipe import Recipe
from lorakin.training.reference_adapter import REFERENCE
from lorakin.training.with_adapter import check_fits, labels_of, recipe_labels

OF_THE_PAIR = ("rank", "alpha", "dropout", "rslora")
OF_THE_PLACES = (
    "targets",
    "exclude",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "rank_above",
    "trainable_tokens",
    "bias",
)
"""Fields of a recipe that say where a new adapter goes, so an adapter from files has no use for."""


@dataclasses.dataclass(frozen=True)
class StartingAdapter:
    """An adapter to train further: the user's name for it, and its files."""

    name: str
    files: directory.AdapterFiles

    @functools.cached_property
    def method(self) -> Method:
        """The method that its files say."""
        files = self.files
        part, where = files.lorakin_part, str(files.path)
        return parsed_files(files.config, files.tensors, part, None, where).method

    def check(self, given: Mapping[str, Any]) -> None:
        """Checks that settings which the user gave do not contradict the files.

        Raises:
            SettingError: one does.
        """
        own = self.method
        of_method = {"method": own.words} | {name: own.setting(name) for name in OF_THE_PAIR}
        of_method |= {name: own.setting(name) for name in given.get("settings") or {}}
        flat = {**given, **(given.get("settings") or {})}
        if flat.get("method") is not None:
            flat["method"] = method_named(flat["method"], {}).words
        for name in of_method:
            value = flat.get(name)
            if value is not None and value != of_method[name]:
                raise SettingError(
                    f"{name} {value} contradicts --adapter {self.name}, where {name} is "
                    f"{of_method[name]}: leave it out, or train a new adapter without --adapter"
                )
        for name in OF_THE_PLACES:
            if given.get(name):
                raise SettingError(
                    f"{name} cannot be chosen with --adapter {self.name}, whose files say which "
                    "modules are adapted: leave it out, or train a new adapter without --adapter"
                )

    def decide(self, recipe: Recipe) -> Recipe:
        """Returns a recipe with what the files decide.

        Raises:
            SettingError: the recipe says something else.
        """
        self.check(_given(recipe))
        labels = self._labels(recipe.labels)
        template = recipe.chat_template
        if template is True and remembered_template(self.files.path) is not None:
            template = str(self.files.path / TEMPLATE)
        decided: dict[str, Any] = {name: self.method.setting(name) for name in OF_THE_PAIR}
        decided |= {"method": self.method.words, "labels": labels, "chat_template": template}
        return dataclasses.replace(recipe, **decided)

    def _labels(self, given: list[str] | None) -> list[str] | None:
        """Returns a classifier's classes, in the order of its head; None for other models.

        Raises:
            SettingError: the recipe gives others, or files that name none hold a head for tokens.
        """
        named = recipe_labels(self.files)
        own = named or labels_of(self.files)
        if named is None and given is not None and (own is None or len(own) == len(given)):
            return given
        if given is not None and given != own:
            raise SettingError(
                f"--adapter {self.name} has the classes {some(own or ['none'])}, and the recipe "
                f"says {some(given)}: leave labels out"
            )
        if own is None and self.files.config.get("task_type") == "TOKEN_CLS":
            raise SettingError(
                f"--adapter {self.name} does not name its classes: give them to the recipe, as "
                "labels, in the order of its head"
            )
        return own

    def place(self, loaded: Loaded) -> Adapter:
        """Puts the adapter into its base, to be trained.

        Raises:
            AdapterError: it is another base's.
            ModelError: the base lacks weights that the adapter does not hold either.
        """
        check_fits(loaded, self.files)
        document = self.files.match(loaded.model)
        return insert_document(loaded.model, "default", document, trainable=True)

    def place_reference(self, loaded: Loaded) -> None:
        """Puts a frozen copy of the adapter beside the one to be trained, which is placed next.

        Raises:
            AdapterError, ModelError: as for `place`.
        """
        check_fits(loaded, self.files)
        insert_document(loaded.model, REFERENCE, self.files.match(loaded.model))
        activate(loaded.model, [])


def read_start(name: str | None) -> StartingAdapter | None:
    """Reads the adapter in a directory or on the hub; None for none.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    return (
        None if name is None else StartingAdapter(name, directory.read(hub.adapter_directory(name)))
    )


def _given(recipe: Recipe) -> dict[str, Any]:
    """Returns the settings of a recipe that are not the defaults."""
    plain = Recipe(model=recipe.model, data=recipe.data, out=recipe.out)
    names = ("method", "settings", *OF_THE_PAIR, *OF_THE_PLACES)
    values = {name: getattr(recipe, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(plain, name)}
