"""A merged model's generation_config.json: the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from lorakin.errors import ModelError
from lorakin.training.base_class import own_class
from lorakin.training.endings import stop_ids
from lorakin.training.models import config_of, load_tokenizer

FILE = "generation_config.json"


def write_stop_ids(folder: Path) -> None:
    """Lets the model in `folder` end an answer at the end of a turn too, as it was trained to.

    generation_config.json then names all ids that end an answer: those that it named, the
    tokenizer's end of text, and what closes an assistant's turn in its chat template. The rest of
    the file stays; it is made if the base had none. A model that does not generate, or has no
    tokenizer, is not changed.

    Raises:
        ModelError: the base's generation_config.json cannot be read.
    """
    config = config_of(str(folder))
    cls = own_class(config)
    if cls is None or not cls.can_generate():
        return
    try:
        tokenizer = load_tokenizer(str(folder))
    except ModelError:
        return
    settings, content = _settings(folder, config)
    ids = stop_ids(tokenizer, settings)
    eos = settings.eos_token_id
    if ids and ids != (eos if isinstance(eos, list) else [eos]):
        content["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _settings(folder: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the generation config, and what its file holds or would hold."""
    path = folder / FILE
    if not path.is_file():
        settings = transformers.GenerationConfig.from_model_config(config)
        return settings, json.loads(settings.to_json_string(use_diff=True))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return transformers.GenerationConfig.from_dict(content), content
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"the base model's {FILE} cannot be read: {error}") from error
