"""Serves adapters with an existing engine: exports what it needs, and writes its command."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakin.errors import AdapterError, OutputError, SettingError
from lorakin.serving import gguf_base
from lorakin.serving.engine import ADAPTER, BASE, Engine, Launch, table
from lorakin.serving.engines import ENGINES
from lorakin.serving.export import export
from lorakin.serving.job import ExportRequest
from lorakin.serving.sources import is_fresh, report_in, sources_of
from lorakin.serving.targets import TARGETS, GGUFAdapter, PlainLoRA
from lorakin.serving.traits import Traits, traits_of
from lorakin.storage import directory, hub, paths
from lorakin.training.chat_templates import TEMPLATE
from lorakin.training.model_sources import located, source_of
from lorakin.training.speakers import names_of

SCRIPT = "serve.sh"


@dataclasses.dataclass(frozen=True)
class ServeRequest:
    """The options of `lorakin serve`, as `--help` describes them."""

    adapters: Sequence[str]
    out: str
    engine: str | None = None
    model: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    dtype: str | None = None
    engine_args: str = ""
    verify: bool = True
    other_base: bool = False
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Served:
    """What can be started.

    Attributes:
        engine: the engine.
        launch: what its command is made of.
        command: the command, to be run in the directory `out`.
        afterwards: commands to run there once the server answers.
        out: the directory with the exports and the script.
        rows: how each engine serves each adapter, or why it does not.
    """

    engine: Engine
    launch: Launch
    command: list[str]
    afterwards: list[list[str]]
    out: Path
    rows: list[dict[str, object]]

    def script(self) -> str:
        """Returns a shell script that runs the commands, wherever its directory is moved."""
        set_first = [f"{k}={shlex.quote(v)}" for k, v in self.environment.items()]
        lines = ["#!/bin/sh", 'cd "$(dirname "$0")" || exit 1']
        if self.afterwards:
            lines.append("# once the server answers, in another shell here:")
            lines += ["# " + " ".join([*set_first, shlex.join(words)]) for words in self.afterwards]
        return "\n".join([*lines, " ".join([*set_first, "exec", shlex.join(self.command)])]) + "\n"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the engine's programs are given."""
        return self.engine.environment(self.launch)

    def as_dict(self) -> dict[str, Any]:
        """Returns what the command prints as JSON."""
        return {
            "engine": self.engine.name,
            "command": self.command,
            "afterwards": self.afterwards,
            "environment": self.environment,
            "directory": str(self.out),
            "url": f"http://{self.launch.host}:{self.launch.port}",
            "ask": self.engine.asking(self.launch),
            "engines": self.rows,
        }


def prepare(request: ServeRequest) -> Served:
    """Exports what the engine needs into `request.out`, and writes its command as a script there.

    Exports that are still what they would be now are not made again.

    Raises:
        SettingError: no such engine, or it cannot serve these adapters, or is not installed.
        LorakinError: an export failed.
    """
    folders = _folders(request.adapters)
    base = _base_of(request, folders)
    all_traits = {name: traits_of(folder, base) for name, folder in folders.items()}
    engine, way = _chosen(request, all_traits)
    if request.dtype is not None and engine.targets[way] == PlainLoRA.name:
        raise SettingError(
            f"{engine.name} serves this beside the base as it is, so there is nothing to write in "
            f"--dtype {request.dtype}; leave it out"
        )
    if engine.targets[way] == GGUFAdapter.name:
        gguf_base.check(request.dtype)
    template = _template(engine, way, all_traits)
    extra = _words(request.engine_args)
    out = _directory(request.out)

    models = {}
    for name, folder in folders.items():
        inside = f"{name}-{engine.targets[way]}"
        _export(request, engine.targets[way], str(folder), base, out / inside)
        models[name] = inside
    if template is not None:
        (out / TEMPLATE).write_text(template, encoding="utf-8")
    launch = Launch(
        _base_for(request, engine, way, base, out),
        models,
        way,
        rank=max(traits.rank for traits in all_traits.values()),
        host=request.host,
        port=engine.port if request.port is None else request.port,
        template=TEMPLATE if template is not None else None,
    )
    command = [*engine.program.split(), *engine.command(launch), *extra]
    rows = table(all_traits, list(ENGINES.values()))
    served = Served(engine, launch, command, engine.afterwards(launch), out, rows)
    script = out / SCRIPT
    script.write_text(served.script(), encoding="utf-8")
    script.chmod(0o755)
    return served


def _words(engine_args: str) -> list[str]:
    try:
        return shlex.split(engine_args)
    except ValueError as error:
        raise SettingError(
            f"--engine-args {engine_args} cannot be split into words ({error}); close its quotes"
        ) from None


def _directory(out: str) -> Path:
    """Makes the directory `out`, if need be."""
    folder = paths.user_path(out, "--out", OutputError).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to --out {out}: {error.strerror}") from None
    return folder


def _folders(adapters: Sequence[str]) -> dict[str, Path]:
    """Returns the adapters' directories by the names under which they are served."""
    folders = {}
    for name, adapter in zip(names_of(adapters), adapters, strict=True):
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "adapter"
        if word in folders or word == BASE:
            raise SettingError(
                f"two adapters would be served as {word!r}; copy {adapter} to a directory of "
                "another name"
            )
        folders[word] = hub.adapter_directory(adapter)
    return folders


def _base_of(request: ServeRequest, folders: Mapping[str, Path]) -> str:
    """Returns the name of the one base of all adapters."""
    if request.model is not None:
        return request.model
    named = {
        name: directory.read(folder).config.get("base_model_name_or_path")
        for name, folder in folders.items()
    }
    for name, base in named.items():
        if not base or not isinstance(base, str):
            raise AdapterError(f"{name} does not say what its base model is; name it with --model")
    if len(set(named.values())) > 1:
        listed = ", ".join(f"{name}: {base}" for name, base in named.items())
        raise AdapterError(
            f"the adapters name different bases ({listed}), and a server has one; serve them "
            "apart, or name the base with --model"
        )
    return str(next(iter(named.values())))


def _chosen(request: ServeRequest, all_traits: Mapping[str, Traits]) -> tuple[Engine, str]:
    """Returns the engine, and the way in which it serves all of the adapters."""
    if request.engine is not None:
        if request.engine not in ENGINES:
            raise SettingError(
                f"--engine {request.engine} is unknown; choose from: {', '.join(ENGINES)}"
            )
        engine = ENGINES[request.engine]
        if not request.dry_run and engine.located() is None:
            raise SettingError(
                f"{engine.name} is not installed here; get it with: {engine.install}. Or write "
                "its command with --dry-run, to run it elsewhere"
            )
        return engine, _way(engine, all_traits)
    able = [engine for engine in ENGINES.values() if not _refusal(engine, all_traits)]
    if not able:
        reasons = "; ".join(
            f"{engine.name}: {_refusal(engine, all_traits)}" for engine in ENGINES.values()
        )
        raise SettingError(f"no engine can serve this ({reasons})")
    here = [engine for engine in able if engine.located() is not None]
    if not here and not request.dry_run:
        raise SettingError(
            "no engine that can serve this is installed here; get one of them, "
            + ", ".join(f"{engine.name} ({engine.install})" for engine in able)
            + "; or write a command with --engine and --dry-run, to run it elsewhere"
        )
    engine = (here or able)[0]
    return engine, _way(engine, all_traits)


def _way(engine: Engine, all_traits: Mapping[str, Traits]) -> str:
    if (reason := _refusal(engine, all_traits)) is not None:
        able = [e.name for e in ENGINES.values() if _refusal(e, all_traits) is None]
        instead = f"; take --engine {' or '.join(able)}" if able else ""
        raise SettingError(f"{engine.name} cannot serve this: {reason}{instead}")
    return _common_ways(engine, all_traits)[0]


def _common_ways(engine: Engine, all_traits: Mapping[str, Traits]) -> list[str]:
    """Returns the ways in which the engine serves all adapters in one server."""
    return [
        way
        for way in engine.targets
        if (len(all_traits) == 1 or way in engine.several)
        and all(way in engine.ways(traits) for traits in all_traits.values())
        and not (way == ADAPTER and len({t.template for t in all_traits.values()}) > 1)
    ]


def _refusal(engine: Engine, all_traits: Mapping[str, Traits]) -> str | None:
    """Returns why the engine cannot serve all adapters in one server; None if it can."""
    if _common_ways(engine, all_traits):
        return None
    for name, traits in all_traits.items():
        if not engine.ways(traits):
            return f"{name}: {engine.refusals(traits, list(engine.targets)[-1])[0]}"
    for name, traits in all_traits.items():
        if reasons := engine.refusals(traits, ADAPTER):
            return (
                f"{name} has to be merged ({reasons[0]}), and a merged model is alone in a server"
            )
    return "the adapters have different chat templates, and beside a base there is one"


def _template(engine: Engine, way: str, all_traits: Mapping[str, Traits]) -> str | None:
    """Returns the adapters' chat template, if the engine must be given it."""
    (template,) = {t.template for t in all_traits.values()} if way == ADAPTER else {None}
    return template


def _export(request: ServeRequest, to: str, adapter: str, base: str, out: Path) -> None:
    """Exports an adapter, unless a fresh export of it is there; an old one is replaced."""
    wanted = ExportRequest(
        adapter=adapter, to=to, out=str(out), model=base, portable=to == PlainLoRA.name,
        dtype=None if TARGETS[to].is_pairs else request.dtype, verify=request.verify,
        other_base=request.other_base,
    )  # fmt: skip
    if is_fresh(out, wanted, sources_of(Path(adapter), base)):
        return
    remove_old(out)
    export(wanted)


def remove_old(out: Path) -> None:
    """Removes an earlier export, and nothing else.

    Raises:
        OutputError: something else is there.
    """
    if not out.exists():
        return
    if out.is_symlink() or report_in(out) is None:
        raise OutputError(
            f"{out} is there and holds no export of lorakin's; move it, or choose another --out"
        )
    shutil.rmtree(out)


def _base_for(request: ServeRequest, engine: Engine, way: str, base: str, out: Path) -> str | None:
    """Returns the base as the engine loads it, from the directory `out`."""
    if way != ADAPTER:
        return None if engine.name != "transformers" else _linked(source_of(base), out)
    if engine.targets[way] != GGUFAdapter.name:
        return _linked(source_of(base), out)
    place = located(base)
    if Path(place).suffix == ".gguf" and request.dtype is None:
        return str(Path(place).resolve())
    folder = out / f"{BASE}-gguf"
    gguf_base.write(folder, base, request.dtype or "float16", remove_old)
    return f"{folder.name}/{gguf_base.FILE}"


def _linked(source: str, out: Path) -> str:
    """Returns a name for the base from `out`: a link to its directory, or its hub id."""
    if not Path(source).is_dir():
        return source
    link = out / BASE
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise OutputError(f"{link} is there; move it, or choose another --out")
    os.symlink(Path(source).resolve(), link)
    return BASE
