"""A conversation: its history as transformers would send it, its commands, and Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from conftest import interruptible, randomise
from lorakin.training.chat import COMMANDS, Chat
from lorakin.training.reading import read_rows
from lorakin.training.sampling import Sampling
from lorakin.training.speakers import load_speakers
from training.test_endings import rigged

TURNS = ["the cat", "what did the dog", "who is it"]


@pytest.fixture(scope="module")
def folders(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    made = []
    for seed, name in enumerate(("one", "two")):
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
        folder = tmp_path_factory.mktemp("adapters") / name
        randomise(lk.adapt(model, lk.LoRA(rank=2)), 0.3, seed).save(folder)
        made.append(str(folder))
    return made


class Said:
    """A chat, and what it said and noted."""

    def __init__(self, model: str, adapters: list[str], tokens: int = 6, **more: Any) -> None:
        self.shown: list[str] = []
        self.notes: list[str] = []
        speakers = load_speakers(
            model, adapters, base=True, dtype="float32", chat_template=more.pop("template", True)
        )
        system = more.pop("system", None)
        self.chat = Chat(
            speakers, Sampling(tokens, **more), system, self.shown.append, self.notes.append
        )

    def say(self, *lines: str) -> list[str]:
        self.shown.clear()
        for line in lines:
            self.chat.say(line)
        return "".join(self.shown).splitlines()


def theirs(model: Any, tokenizer: Any, messages: list[dict[str, str]], tokens: int = 6) -> str:
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]  # fmt: skip
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())


@pytest.mark.parametrize("system", [None, "be good"])
def test_the_history_is_sent_as_transformers_sends_it(
    model_dir: str, folders: list[str], system: str | None
) -> None:
    said = Said(model_dir, folders[:1], system=system)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    lk.load(model, folders[0])
    tokenizer = said.chat.speaker.tokenizer
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        reply = theirs(model, tokenizer, messages)
        assert said.say(text) == [reply]
        messages.append({"role": "assistant", "content": reply})


def test_a_turn_computes_only_what_is_new(model_dir: str, folders: list[str]) -> None:
    said = Said(model_dir, folders[:1])
    lengths: list[int] = []
    hook = lambda module, args, given: lengths.append(given["input_ids"].shape[1])  # noqa: E731
    said.chat.base.model.register_forward_pre_hook(hook, with_kwargs=True)
    for line, is_whole in (
        ("the cat", True),
        ("a", False),
        ("/base", None),
        ("who", True),
        ("a", False),
    ):
        asked = [*said.chat.messages, {"role": "user", "content": line}]
        prompt = said.chat._request(said.chat.speaker, asked).ids
        lengths.clear()
        said.say(line)
        assert is_whole is None or (lengths[0] == len(prompt)) == is_whole
        assert is_whole is not False or lengths[0] <= 6


def test_the_adapter_is_switched_off_on_and_for_another(model_dir: str, folders: list[str]) -> None:
    said = Said(model_dir, folders)
    asked = [{"role": "user", "content": "the cat"}]
    tokenizer = said.chat.speaker.tokenizer
    want = []
    for folder in (folders[0], None, folders[0], folders[1], None, folders[1]):
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
        if folder is not None:
            lk.load(model, folder)
        want.append(theirs(model, tokenizer, asked))
    switches = ["/help", "/base", "/base", "/adapter two", "/base", "/base"]
    assert [said.say("/reset", line, "the cat")[0] for line in switches] == want
    assert len(set(want)) == 3

    before = list(said.chat.messages)
    assert said.say("/compare") == [want[1], want[0], want[3]]
    assert said.chat.messages == before
    with pytest.raises(lk.SettingError, match="one, two"):
        said.say("/adapter three")


def test_what_is_saved_is_read_by_train(model_dir: str, folders: list[str], tmp_path: Path) -> None:
    said = Said(model_dir, folders, system="be good")
    file = tmp_path / "chats.jsonl"
    said.say("the cat", "who is it", f"/save {file}", "/reset", "/system", "a dog", f"/save {file}")
    rows = read_rows(str(file))
    assert rows.formats == ["messages"]
    first, second = (record.content.messages for record in rows.records)  # type: ignore[union-attr]
    assert [m["role"] for m in first] == ["system", *["user", "assistant"] * 2]
    assert next(m["content"] for m in second) == "a dog"
    file.write_text(file.read_text()[:-1])
    with pytest.raises(lk.DataError):
        said.say(f"/save {file}")


def test_a_base_without_a_template_continues_text(model_dir: str, tmp_path: Path) -> None:
    said = Said(model_dir, [], template=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = said.chat.base.tokenizer
    for text in TURNS[:2]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert said.say(text) == [tokenizer.decode(out, skip_special_tokens=True).strip()]
    assert len([note for note in said.notes if "no chat template" in note]) == 1
    with pytest.raises(lk.SettingError):
        said.say("/system be good")
    said.say(f"/save {tmp_path / 'said.jsonl'}")
    assert read_rows(str(tmp_path / "said.jsonl")).formats == ["prompt/completion"]


@pytest.mark.parametrize(
    "line",
    ["/fly", "/adapter", "/adapter one", "/base", "/save", "/compare", "/save nothing.jsonl"],
)
def test_what_cannot_be_done(model_dir: str, line: str) -> None:
    with pytest.raises(lk.SettingError):
        Said(model_dir, []).say(line)


def test_a_path_is_no_command(model_dir: str) -> None:
    said = Said(model_dir, [])
    said.say("/usr/bin is what", "  ", "/quit")
    assert [m["content"] for m in said.chat.messages[:1]] == ["/usr/bin is what"]
    assert said.chat.has_ended


def test_every_command_is_in_the_help(model_dir: str) -> None:
    said = Said(model_dir, [])
    said.say("/help")
    assert all(f"/{word}" in "\n".join(said.notes) for word in COMMANDS)


@pytest.fixture
def endless(tmp_path: Path, tokenizer: Any) -> str:
    """A model that never ends."""
    folder = tmp_path / "endless"
    model = rigged(tokenizer, tokenizer.convert_tokens_to_ids("cat"))
    with torch.no_grad():
        model.lm_head.weight[:, 0] = model.lm_head.weight[:, 1]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_ctrl_c_stops_the_answer(endless: str) -> None:
    said = Said(endless, [], tokens=5000)

    def interrupt(text: str) -> None:
        said.shown.append(text)
        if "".join(said.shown).count("cat") == 3:
            signal.raise_signal(signal.SIGINT)

    said.chat.show = interrupt
    before = signal.getsignal(signal.SIGINT)
    (answer,) = said.say("who")
    assert set(answer.split()) == {"cat"} and len(answer) < 100
    assert said.chat.messages[-1] == {"role": "assistant", "content": answer}
    assert said.notes[-1] == "(stopped)"
    assert signal.getsignal(signal.SIGINT) is before


def test_through_a_pipe(endless: str, folders: list[str]) -> None:
    """A real process: Ctrl-C stops its answer, and the next line is answered."""
    command = [sys.executable, "-m", "lorakin", "chat", "-m", endless, "--max-new-tokens=100000"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    for _ in range(2):
        process.stdin.write("who\n")
        process.stdin.flush()
        assert process.stdout.read(3) == "cat"
        process.send_signal(signal.SIGINT)
        while process.stdout.read(1) != "\n":
            pass
    out, errors = process.communicate("/fly\nwho\n", timeout=60)
    assert process.returncode == 2
    assert out == "" and "/help" in errors and errors.count("(stopped)") == 2
