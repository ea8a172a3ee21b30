"""Hints for names that match nothing: what the user may have meant."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from lorakin.errors import LorakinWarning


def last_name(path: str) -> str:
    """Returns the last part of a path that is not a number.

    >>> last_name("model.layers.0.mlp.experts.3")
    'experts'
    """
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def near(pattern: str, paths: Iterable[str]) -> str:
    """Returns a hint at the names among `paths` that are most like `pattern`.

    >>> near("q_prj", ["q_proj", "dense"])
    'did you mean q_proj?'
    """
    paths = list(paths)
    names = list(dict.fromkeys([path.rsplit(".", 1)[-1] for path in paths] + paths))
    close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    last_names = list(dict.fromkeys(map(last_name, paths)))
    return f"names there are: {', '.join(last_names[:12])}{', …' if len(last_names) > 12 else ''}"


def warn_of_unknown_words(pattern: str, modules: Mapping[str, nn.Module]) -> None:
    """Warns of words in a regular expression that are in no path of the model.

    `gate_proj|up_proj|down_proj` finds only the down_proj of experts whose gate and up are one
    parameter. That would otherwise go unnoticed.
    """
    is_name_or_glob = re.fullmatch(r"[\w.*?-]*", pattern)
    if is_name_or_glob:
        return
    all_paths = " ".join(modules)
    words = re.findall(r"[A-Za-z_]\w{2,}", re.sub(r"\\.|\[[^]]*\]|\(\?P<\w+>", " ", pattern))
    unknown = [word for word in dict.fromkeys(words) if word not in all_paths]
    if not unknown:
        return

    names = sorted({last_name(path) for path in modules if path})
    described = []
    for word in unknown:
        close = [name for name in names if word.split("_")[0] in name.split("_")]
        described.append(f"{word!r} (there is {', '.join(close)})" if close else repr(word))
    warnings.warn(
        f"target {pattern!r} names {' and '.join(described)}, which no module has, so nothing "
        "there is adapted",
        LorakinWarning,
        stacklevel=5,
    )
