"""Adapters on the Hugging Face hub: fetches the one that a name stands for, and uploads one.

huggingface_hub is imported only here, and only to fetch or upload: it comes with transformers, but
lorakin itself does not need it. A directory that exists is read without it.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lorakin.errors import AdapterError, LorakinError, LorakinWarning, OutputError, SettingError
from lorakin.storage import paths
from lorakin.storage.card import CARD, is_generated
from lorakin.storage.lorakin_part import CONFIG, LORAKIN_JSON, LORAKIN_TENSORS, OLD_TENSORS, TENSORS

FILES = (CONFIG, TENSORS, LORAKIN_JSON, LORAKIN_TENSORS, "recipe.yaml", "chat_template.jinja", CARD)
"""What is fetched, if it is there; `adapter_model.bin` only if there are no other tensors."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
ADAPTER_TENSORS = (TENSORS, OLD_TENSORS, LORAKIN_TENSORS)
LOG_IN = "log in with `hf auth login`, or give token= (HF_TOKEN on the command line)"
Token = str | bool | None


def adapter_directory(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: Token = None,
    subfolder: str | None = None,
) -> Path:
    """Returns the directory of an adapter: a local one, or one fetched into the hub's cache.

    Args:
        name: a directory; or, if there is none of that name, a hub id `org/name`.
        revision: a branch, tag or commit of the hub's repository.
        token: for the hub, instead of the one that `hf auth login` keeps.
        subfolder: where the adapter is in the directory or repository.

    Raises:
        SettingError: the subfolder leads out of the directory.
        AdapterError: the hub has no such adapter or does not give it; it cannot be reached and the
            cache lacks the adapter.
    """
    inside = _inside(subfolder)
    expanded = paths.user_path(name, "adapter", AdapterError)
    # `save` does not expand a `~`, so a directory of exactly this name comes first.
    path = Path(name) if Path(name).exists() else expanded
    if path.exists() or not isinstance(name, str) or not HUB_ID.fullmatch(name):
        if revision is not None:
            _warn(
                f"revision={revision!r} is not used: {name} is a path on this machine, and only "
                "the hub has revisions"
            )
        return path / inside
    return _fetched(name, revision, token, inside)


def _inside(subfolder: str | None) -> str:
    parts = PurePosixPath(subfolder or "")
    if parts.is_absolute() or ".." in parts.parts or "\\" in (subfolder or ""):
        raise SettingError(
            "subfolder must be a path inside the adapter's directory or repository, not "
            f"{subfolder!r}"
        )
    return "" if str(parts) == "." else str(parts)


def _fetched(name: str, revision: str | None, token: Token, inside: str) -> Path:
    """Returns the folder of the hub's cache with the adapter, after its files were fetched."""
    what = f"there is no adapter directory {name} on this machine, and the hub has none of that id"
    library = _library(f"there is no adapter directory {name}; to fetch it from the hub, install")

    def fetch(*files: str) -> Path:
        wanted = [glob.escape(f"{inside}/{file}" if inside else file) for file in files]
        snapshot = library.snapshot_download(
            name, revision=revision, token=token, allow_patterns=wanted
        )
        return Path(snapshot) / inside

    try:
        folder = fetch(*FILES)
        if (folder / CONFIG).is_file() and not (folder / TENSORS).is_file():
            folder = fetch(*FILES, OLD_TENSORS)
    # The hub's client has many errors; all of them mean that there is nothing to load.
    except Exception as error:
        raise AdapterError(f"{what}: {_reason(library, error, name, revision)}") from error
    if not (folder / CONFIG).is_file() or not (
        (folder / TENSORS).is_file() or (folder / OLD_TENSORS).is_file()
    ):
        raise AdapterError(
            f"{what}: {_without_adapter(library, folder, name, revision, token, inside)}"
        )
    if not (folder / LORAKIN_JSON).is_file() and not _is_listed(library, name, revision):
        _warn(
            f"{name} is taken from the cache, where another program put PEFT's files. Whether the "
            f"hub has {LORAKIN_JSON} too cannot be known offline, so the adapter is read from "
            "PEFT's files alone. Load it once while the hub can be reached"
        )
    return folder


def _without_adapter(
    library: Any, folder: Path, name: str, revision: str | None, token: Token, inside: str
) -> str:
    """Returns why a repository has no adapter where it was looked for, and where it has some."""
    lacks = CONFIG if not (folder / CONFIG).is_file() else TENSORS
    if not _is_listed(library, name, revision):
        return (
            f"it cannot be asked now, and its cache holds a part without {lacks}; load it once "
            "while the hub can be reached"
        )
    try:
        files = library.HfApi(token=token).list_repo_files(name, revision=revision)
    except Exception:  # the list only makes the error message better
        files = []
    others = sorted(
        str(PurePosixPath(file).parent) for file in files if PurePosixPath(file).name == CONFIG
    )
    where = f"in its subfolder {inside}" if inside else "at its top"
    advice = "is the id an adapter's?"
    if lacks == CONFIG and others:
        named = ", ".join(repr("" if other == "." else other) for other in others[:5])
        advice = f"it has adapters in {named}; choose one with subfolder="
    elif lacks == CONFIG and "config.json" in files:
        advice = "it holds a whole model; load that with transformers"
    return f"its repository has no {lacks} {where}; {advice}"


def _is_listed(library: Any, name: str, revision: str | None) -> bool:
    """Returns whether the cache knows the repository's files; True with clients that cannot say."""
    listing = getattr(library, "get_cached_repo_tree", None)
    if listing is None:
        return True
    try:
        listing(name, revision=revision)
    except Exception:
        return False
    return True


def upload(
    save: Callable[[Path], Any],
    name: str,
    *,
    private: bool | None = None,
    token: Token = None,
    commit_message: str | None = None,
    revision: str | None = None,
    stale: Sequence[str] = ADAPTER_TENSORS,
) -> Any:
    """Uploads what `save` writes into the hub's repository `name`, made if need be.

    The files replace those of an adapter that was there: of the files that the patterns `stale`
    name, those that `save` does not write are deleted. A README.md that a person wrote stays.

    Returns:
        The hub client's CommitInfo, text that is the commit's address.

    Raises:
        OutputError: no token, no rights, no network, or a name that the hub does not take.
    """
    library = _library(f"to upload to {name!r}, install", OutputError)
    api = library.HfApi(token=token, library_name="lorakin")
    with tempfile.TemporaryDirectory(prefix="lorakin-") as temporary:
        folder = Path(temporary)
        save(folder)
        try:
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(name, branch=revision, exist_ok=True)
            if api.file_exists(name, CARD, revision=revision):
                card = Path(api.hf_hub_download(name, CARD, revision=revision))
                if not is_generated(card.read_text(encoding="utf-8", errors="replace")):
                    (folder / CARD).unlink()
            return api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message or "Upload adapter with lorakin",
                revision=revision,
                delete_patterns=list(stale),
            )
        except Exception as error:  # the hub's client has many, as above
            raise OutputError(
                f"cannot upload to {name!r}: {_reason(library, error, name, revision)}"
            ) from error


def check_login(name: str) -> None:
    """Asks the hub whether it knows the token, so that nothing is read or written in vain.

    Raises:
        OutputError: there is no token, the hub refuses it, or the hub cannot be reached.
    """
    library = _library(f"to upload to {name!r}, install", OutputError)
    try:
        library.HfApi(library_name="lorakin").whoami()
    except Exception as error:  # the hub's client has many, as above
        raise OutputError(
            f"cannot upload to {name!r}: {_reason(library, error, name, None)}"
        ) from error


def _library(purpose: str, error: type[LorakinError] = AdapterError) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise error(f"{purpose} huggingface_hub: pip install huggingface_hub") from None


def _reason(library: Any, error: BaseException, name: str, revision: str | None) -> str:
    """Returns what an error of the hub's client means, and what to do, in a sentence."""
    errors = library.errors
    cause = (
        error.__cause__
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
        else error
    )
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        page = f"{library.constants.ENDPOINT}/{name}"
        return f"{name} is gated; ask for access on its page ({page}), then {LOG_IN}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"its repository has no revision {revision!r}; name a branch, a tag or a commit"
    if isinstance(cause, errors.LocalTokenNotFoundError) or "Invalid user token" in str(cause):
        return f"the hub needs a valid token; {LOG_IN}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {name}, or it is private and the token may not see it; check "
            f"the id, or {LOG_IN}"
        )
    if status in (401, 403):
        return f"the hub refuses ({status}): the token is missing or has no such rights; {LOG_IN}"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, and the cache does not hold it whole; unset that, or give a "
            "directory"
        )
    if status is not None:
        message = getattr(cause, "server_message", None) or _first_line(cause)
        later = "; try again later" if status >= 500 else ""
        return f"the hub answered {status} ({_first_line(message)}){later}"
    if isinstance(
        cause, (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    ) or _is_of_the_network(cause):
        reason = _first_line(cause)
        return f"the hub cannot be reached ({reason}); check the network, or give a directory"
    return f"{_first_line(cause)} ({type(cause).__name__})"


def _is_of_the_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "requests",
        "urllib3",
    )


def _first_line(text: object) -> str:
    lines = str(text).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(text).__name__


def _warn(message: str) -> None:
    warnings.warn(message, LorakinWarning, stacklevel=4)
