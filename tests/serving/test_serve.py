"""`lorakin serve`: what each engine can serve, its exact command, and real servers that answer as `lorakin generate` does."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorakin as lk
from conftest import randomise
from lorakin.cli.app import run
from lorakin.errors import LorakinError, OutputError, SettingError
from lorakin.serving.engine import ADAPTER, MERGED
from lorakin.serving.engines import ENGINES
from lorakin.serving.serve import Served, ServeRequest, prepare
from lorakin.serving.traits import Traits
from lorakin.training.models import load_model
from peers import llama_server
from serving.gguf_models import tiny

PROMPT, TOKENS = "the quick brown fox", 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """A base and three adapters of it: two that are plain LoRA, and one with a gain."""
    home = tmp_path_factory.mktemp("serve")
    tiny("llama").save_pretrained(home / "model")
    for file in words.iterdir():
        (home / "model" / file.name).write_bytes(file.read_bytes())
    made = {"french": lk.LoRA(rank=4), "legal": lk.VeRA(rank=12), "dora": lk.DoRA(rank=4)}
    for seed, (name, member) in enumerate(made.items()):
        model = load_model(str(home / "model"), "float32").model
        randomise(lk.adapt(model, member), seed=seed, scale=0.3).save(home / name)
    return home


def prepared(home: Path, *names: str, **options: Any) -> Served:
    request = {"out": str(home / "served"), "dry_run": True, "verify": False, **options}
    return prepare(ServeRequest([str(home / name) for name in names], **request))


class TestTable:
    """What each engine can serve."""

    @pytest.mark.parametrize(
        ("traits", "ways"),
        [
            (Traits(8), "adapter adapter adapter adapter merged merged"),
            (Traits(8, has_gain=True), "merged merged merged merged merged merged"),
            (Traits(8, tokens=("embed",)), "merged merged merged merged merged merged"),
            (Traits(8, has_biases=True), "merged merged merged merged merged merged"),
            (Traits(8, other_layers=("conv",)), "merged merged merged merged merged merged"),
            (Traits(520), "merged adapter adapter adapter merged merged"),
            (Traits(8, template="t"), "adapter adapter merged adapter merged merged"),
            (Traits(8, whole_modules=("score",), generates=False), "merged no no no no no"),
            (Traits(8, is_encoder_decoder=True, has_gguf_base=False), "no no no no no no"),
            (Traits(8, has_gguf_base=False), "adapter adapter adapter no no merged"),
        ],
    )
    def test_ways(self, traits: Traits, ways: str) -> None:
        found = [(engine.ways(traits) or ["no"])[0] for engine in ENGINES.values()]
        assert " ".join(found) == ways

    def test_every_refusal_has_a_reason(self) -> None:
        hard = Traits(520, True, ("head",), ("embed",), True, ("conv",), False, True, False, "t")
        for engine in ENGINES.values():
            assert len(engine.refusals(hard, ADAPTER)) == sum(
                ADAPTER in limit.ways for limit in engine.limits
            )
            assert all(engine.refusals(hard, ADAPTER)) and engine.install

    def test_of_an_adapter(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["serve", str(home / "dora"), "--out", str(home / "table"), "--engine", "vllm"]
        assert run([*words, "--dry-run", "--no-verify", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert [row["served"] for row in said["engines"]] == [MERGED] * 6
        assert "DoRA" in said["engines"][0]["reasons"][0]
        assert said["url"] == "http://127.0.0.1:8000"


class TestCommands:
    """The exact commands, with what they read."""

    def test_vllm(self, home: Path) -> None:
        served = prepared(home, "french", "legal", engine="vllm", port=8123)
        assert shlex.join(served.command) == (
            "vllm serve base --served-model-name base --enable-lora --max-lora-rank 16 --max-loras 2 "
            "--lora-modules french=french-lora legal=legal-lora --host 127.0.0.1 --port 8123"
        )
        configs = [
            json.loads((served.out / f"{name}-lora" / "adapter_config.json").read_text())
            for name in ("french", "legal")
        ]
        assert [config["r"] for config in configs] == [8, 16]
        assert (served.out / "base").resolve() == (home / "model").resolve()
        merged = prepared(home, "dora", engine="vllm", engine_args="--max-model-len 64")
        assert shlex.join(merged.command) == (
            "vllm serve dora-merged --served-model-name dora --host 127.0.0.1 --port 8000 "
            "--max-model-len 64"
        )

    def test_sglang_and_tgi(self, home: Path) -> None:
        served = prepared(home, "french", "legal", engine="sglang", host="0.0.0.0")
        assert shlex.join(served.command) == (
            "python -m sglang.launch_server --model-path base --served-model-name base --enable-lora "
            "--lora-paths french=french-lora legal=legal-lora --max-loras-per-batch 3 "
            "--host 0.0.0.0 --port 30000"
        )
        served = prepared(home, "french", "legal", engine="tgi")
        assert shlex.join(served.command) == (
            "text-generation-launcher --model-id base --lora-adapters "
            "french=french-lora,legal=legal-lora --hostname 127.0.0.1 --port 3000"
        )

    def test_ollama(self, home: Path) -> None:
        served = prepared(home, "french", "dora", engine="ollama", dtype="q8_0")
        assert served.command == ["ollama", "serve"]
        assert served.environment == {"OLLAMA_HOST": "127.0.0.1:11434"}
        assert [words[2] for words in served.afterwards] == ["french", "dora"]
        for words in served.afterwards:
            assert (served.out / words[-1]).read_text().startswith("FROM ./model.gguf")

    def test_llama_cpp_with_one_adapter(self, home: Path) -> None:
        served = prepared(home, "french", engine="llama.cpp")
        assert shlex.join(served.command) == (
            "llama-server --model base-gguf/model.gguf --alias french --lora "
            "french-gguf/adapter.gguf --jinja --host 127.0.0.1 --port 8080"
        )

    def test_llama_cpp_with_several(self, home: Path) -> None:
        served = prepared(home, "french", "legal", engine="llama.cpp")
        assert shlex.join(served.command) == (
            "llama-server --model base-gguf/model.gguf --alias base --lora-scaled "
            "french-gguf/adapter.gguf:0,legal-gguf/adapter.gguf:0 --no-cache-prompt --jinja --host 127.0.0.1 "
            "--port 8080"
        )

    def test_a_template_of_the_adapters_own(self, home: Path, tmp_path: Path) -> None:
        for name in ("french", "legal"):
            (tmp_path / name).mkdir()
            for file in (home / name).iterdir():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / "french" / "chat_template.jinja").write_text("{{ messages }}")
        with pytest.warns(lk.LorakinWarning, match="chat template"):
            served = prepared(tmp_path, "french", engine="vllm")
        assert "--chat-template chat_template.jinja" in shlex.join(served.command)
        assert (served.out / "chat_template.jinja").read_text() == "{{ messages }}"
        with pytest.raises(SettingError, match="templates"):
            prepared(tmp_path, "french", "legal", engine="vllm")
        assert prepared(tmp_path, "french", "legal", engine="transformers").launch.way == MERGED


class TestExports:
    """What is exported, and when it is exported again."""

    def test_a_fresh_export_is_kept_and_an_old_one_replaced(
        self, home: Path, tmp_path: Path
    ) -> None:
        def times() -> dict[str, int]:
            files = (tmp_path / "out").rglob("*.*f*")
            return {
                str(f.relative_to(tmp_path)): f.stat().st_mtime_ns for f in files if f.is_file()
            }

        options = {"engine": "llama.cpp", "out": str(tmp_path / "out")}
        prepared(home, "french", "legal", **options)
        first = times()
        assert len([name for name in first if name.endswith(".gguf")]) == 3
        prepared(home, "french", "legal", **options)
        kept = times()
        assert {k: v for k, v in first.items() if "gguf" in k} == {
            k: v for k, v in kept.items() if "gguf" in k
        }
        prepared(home, "french", "legal", dtype="float32", **options)
        changed = times()
        different = [name for name in first if changed[name] != first[name]]
        assert [name for name in different if name.endswith(".gguf")] == [
            "out/base-gguf/model.gguf"
        ]

    def test_what_is_not_ours_stays(self, home: Path, tmp_path: Path) -> None:
        mine = tmp_path / "out" / "french-lora"
        mine.mkdir(parents=True)
        (mine / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match="french-lora"):
            prepared(home, "french", engine="vllm", out=str(tmp_path / "out"))
        assert (mine / "thesis.txt").read_text() == "mine"


class TestRefusals:
    """One sentence, exit code 2, before anything is written."""

    @pytest.mark.parametrize(
        ("names", "options", "expected"),
        [
            (["french"], {"engine": "exllama"}, ["exllama", "vllm"]),
            (["french"], {"engine": "tgi", "dry_run": False}, ["tgi", "container", "--dry-run"]),
            (["french", "dora"], {"engine": "vllm"}, ["dora", "merged", "transformers"]),
            (["french"], {"engine": "vllm", "dtype": "float16"}, ["--dtype"]),
            (["french"], {"engine": "llama.cpp", "dtype": "int3"}, ["int3"]),
            (["french"], {"engine": "vllm", "engine_args": "--x 'y"}, ["--x 'y", "quotes"]),
            (["french", "french"], {"engine": "vllm"}, ["twice"]),
            (["none"], {"engine": "vllm"}, ["none"]),
        ],
    )
    def test_refused(
        self,
        home: Path,
        tmp_path: Path,
        names: list[str],
        options: dict[str, Any],
        expected: list[str],
    ) -> None:
        with pytest.raises(LorakinError) as caught:
            prepared(home, *names, out=str(tmp_path / "out"), **options)
        assert caught.value.exit_code == 2
        assert all(word in str(caught.value) for word in expected), str(caught.value)
        assert not list((tmp_path / "out").glob("*"))

    def test_no_adapter(self, tmp_path: Path) -> None:
        assert run(["serve", "--out", str(tmp_path)]) == 2


class TestStart:
    """An engine is run in the foreground."""

    @pytest.fixture
    def programs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return folder

    def program(self, folder: Path, name: str, text: str) -> None:
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(0o755)

    def test_the_first_that_is_installed(
        self, home: Path, programs: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.program(
            programs, "vllm", "import os, sys; print(os.getcwd(), *sys.argv[1:]); sys.exit(7)"
        )
        words = ["serve", str(home / "french"), "--out", str(home / "served"), "--no-verify"]
        assert run(words) == 7
        said = capfd.readouterr().out
        assert f"{home / 'served'} serve base --served-model-name base --enable-lora" in said

    def test_models_are_made_once_the_server_answers(
        self, home: Path, programs: Path, tmp_path: Path
    ) -> None:
        log = tmp_path / "log"
        self.program(
            programs,
            "ollama",
            "import os, socket, sys, time\n"
            f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            "if sys.argv[1] == 'serve':\n"
            "    host, _, port = os.environ['OLLAMA_HOST'].partition(':')\n"
            "    time.sleep(0.3)\n"
            "    server = socket.create_server((host, int(port)))\n"
            f"    while open({str(log)!r}).read().count('create') < 2: time.sleep(0.05)\n",
        )
        words = ["serve", str(home / "french"), "-a", str(home / "dora"), "--engine", "ollama"]
        words += ["--out", str(home / "served"), "--no-verify", "--port", str(free_port())]
        assert run(words) == 0
        assert log.read_text().splitlines() == [
            "serve",
            "create french -f french-gguf-merged/Modelfile",
            "create dora -f dora-gguf-merged/Modelfile",
        ]

    def test_a_server_that_ends_at_once(self, home: Path, programs: Path) -> None:
        self.program(programs, "ollama", "import sys; sys.exit(1)")
        words = ["serve", str(home / "french"), "--engine", "ollama", "--out", str(home / "served")]
        assert run([*words, "--no-verify", "--port", str(free_port())]) == 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def running(served: Served, *folders: Path) -> Iterator[str]:
    """The engine, started by its script; its address."""
    path = os.pathsep.join(
        [*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    log = served.out / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["sh", str(served.out / "serve.sh")],
            stdout=file,
            stderr=file,
            env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )
    url = f"http://127.0.0.1:{served.launch.port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health").read()
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def answer(url: str, **more: Any) -> str:
    """What a server says to the prompt, in the chat template."""
    messages = [{"role": "user", "content": PROMPT}]
    body = {"messages": messages, "temperature": 0, "max_tokens": TOKENS, **more}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    reply = json.loads(urllib.request.urlopen(request, timeout=120).read())
    # The last character may be a part of one, which llama.cpp leaves out.
    return str(reply["choices"][0]["message"]["content"]).strip().rstrip("\ufffd")


@pytest.fixture(scope="module")
def said(home: Path) -> dict[str, str]:
    """What `lorakin generate` says, with the base and with each adapter."""
    from lorakin.training.answer_rows import answer_side_by_side
    from lorakin.training.sampling import Sampling
    from lorakin.training.speakers import load_speakers

    given = [str(home / name) for name in ("french", "legal", "dora")]
    speakers = load_speakers(str(home / "model"), given, base=True, dtype="float32")
    said = answer_side_by_side(speakers, PROMPT, Sampling(TOKENS), None)
    assert len(set(said.values())) == 4
    return {name: text.strip().rstrip("\ufffd") for name, text in said.items()}


@pytest.mark.peer
@pytest.mark.skipif(
    ENGINES["transformers"].located() is None, reason=ENGINES["transformers"].install
)
def test_transformers_answers_as_generate_does(home: Path, said: dict[str, str]) -> None:
    names = ("french", "dora")
    served = prepared(home, *names, engine="transformers", port=free_port())
    with running(served) as url:
        assert answer(url, model="base") == said["base"]
        for name in names:
            assert answer(url, model=served.launch.models[name]) == said[name]


@pytest.mark.peer
@pytest.mark.skipif(llama_server.available() is not None, reason=str(llama_server.available()))
def test_llama_cpp_answers_as_generate_does(
    home: Path, said: dict[str, str], tmp_path: Path
) -> None:
    llama_server.put_into(tmp_path)
    served = prepared(
        home, "french", "legal", engine="llama.cpp", port=free_port(), dtype="float32"
    )
    with running(served, tmp_path) as url:
        assert answer(url) == said["base"]
        for number, name in enumerate(("french", "legal")):
            assert answer(url, lora=[{"id": number, "scale": 1}]) == said[name]
            # With a prompt cache, and with --lora-init-without-apply, this would be another answer.
            assert answer(url) == said["base"]
