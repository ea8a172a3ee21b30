"""Answers in batches, drawn, stopped, and of several adapters, compared with transformers' own `generate` on one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy import stats

import lorakin as lk
from conftest import WORDS, randomise, tiny_gpt2, tiny_llama
from lorakin.training.contents import PlainText
from lorakin.training.generate import answer, answers
from lorakin.training.models import Loaded, load_model
from lorakin.training.prompts import Prompt
from lorakin.training.sampling import GumbelNoise, Sampling
from lorakin.training.speakers import Speaker, load_speakers
from lorakin.training.streaming import Streamer
from training.carried import tokenizer_of

ASKED = ["the cat", "what did the dog run on the mat over", "a", "who is it the bird flew slow"]


def prompts(texts: Sequence[str] = ASKED) -> list[Prompt]:
    return [Prompt(n, f"row {n}", {}, PlainText(text, "")) for n, text in enumerate(texts)]


def said(
    speakers: Sequence[Speaker], sampling: Sampling, batch_size: int, texts: Sequence[str] = ASKED
) -> dict[tuple[int, str], str]:
    asked = [(prompt, speaker) for prompt in prompts(texts) for speaker in speakers]
    return {
        (request.number, request.speaker.name): text
        for batch in answers(asked, sampling, batch_size)
        for request, text in batch
    }


def theirs(model: Any, tokenizer: Any, text: str, tokens: int) -> str:
    """What transformers answers to one prompt."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())


@pytest.fixture
def saved(model_dir: str, tmp_path: Path) -> Callable[..., str]:
    """Saves an adapter that changes much, and gives its directory."""

    def save(name: str, method: Any, seed: int, **where: Any) -> str:
        base = where.pop("base", model_dir)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapter = lk.adapt(model, method, **where)
        randomise(adapter, 0.3, seed).save(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_answer_as_transformers_does(model_dir: str, batch_size: int) -> None:
    (speaker,) = load_speakers(model_dir, [], dtype="float32")
    model, tokenizer = speaker.model, speaker.tokenizer
    got = said([speaker], Sampling(max_new_tokens=7), batch_size)
    assert list(dict(sorted(got.items())).values()) == [
        theirs(model, tokenizer, text, 7) for text in ASKED
    ]


@pytest.mark.parametrize("biases", ["none", "all"])
def test_adapters_side_by_side_answer_as_each_alone(
    tmp_path: Path, tokenizer: Any, saved: Callable[..., str], biases: str
) -> None:
    """Biases act on all rows alike, so such adapters are switched instead of mixed."""
    model_dir = str(tmp_path / "biased")
    tiny_llama(eos_token_id=1, initializer_range=0.3, attention_bias=True).save_pretrained(
        model_dir
    )
    tokenizer.save_pretrained(model_dir)
    folders = [
        saved("one", lk.LoRA(rank=2), 1, base=model_dir),
        saved("two", lk.DoRA(rank=3), 2, base=model_dir, bias=biases),
    ]
    speakers = load_speakers(model_dir, folders, base=True, dtype="float32")
    assert [speaker.name for speaker in speakers] == ["base", "one", "two"]
    got = said(speakers, Sampling(max_new_tokens=6), 5)
    for name, folder in zip(("base", "one", "two"), (None, *folders), strict=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
        if folder is not None:
            lk.load(model, folder)
        for number, text in enumerate(ASKED):
            assert got[number, name] == theirs(model, speakers[0].tokenizer, text, 6)
    assert len(set(got.values())) > len(ASKED)


def test_each_adapter_answers_in_its_own_template(
    model_dir: str, saved: Callable[..., str]
) -> None:
    folders = [saved("one", lk.LoRA(rank=2), 1), saved("two", lk.LoRA(rank=2), 2)]
    template = "{% for m in messages %}one {{ m['content'] }} two {% endfor %}"
    Path(folders[0], "chat_template.jinja").write_text(template)
    speakers = load_speakers(model_dir, folders, base=True, dtype="float32")
    base, one, two = (speaker.tokenizer.decode(speaker.prompt("cat")) for speaker in speakers)
    assert one == "one cat two"
    assert base == two == "<|user|> cat <|end|> <|assistant|>"


def test_draws_do_not_depend_on_the_batch(model_dir: str) -> None:
    (speaker,) = load_speakers(model_dir, [], dtype="float32")
    texts = ["the cat"] * 3 + ASKED
    sampling = Sampling(max_new_tokens=6, temperature=1.5, top_p=0.9, seed=3)
    alone, together = (said([speaker], sampling, size, texts) for size in (1, 7))
    assert alone == together
    assert len({alone[n, "base"] for n in range(3)}) > 1  # the same prompt, drawn three times
    other = Sampling(max_new_tokens=6, temperature=1.5, top_p=0.9, seed=4)
    assert said([speaker], other, 7, texts) != together
    assert (
        answer(speaker.loaded, "the cat", max_new_tokens=6, temperature=1.5, top_p=0.9, seed=3)
        == alone[0, "base"]
    )


def test_noise_draws_from_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, -float("inf")]])
    noise = GumbelNoise(0, range(4000))
    drawn = noise(torch.zeros(4000, 1), scores.expand(4000, -1)).argmax(-1)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[4] == 0
    expected = scores[0, :4].softmax(0).double() * 4000
    assert (
        stats.chisquare(counts[:4].numpy(), expected.numpy() / expected.sum().item() * 4000)[1]
        > 1e-3
    )


def test_top_p_draws_from_the_nucleus_alone() -> None:
    scores = torch.tensor([[3.0, 2.9, 0.0, -1.0]]).expand(500, -1)
    processed = scores
    for processor in Sampling(temperature=1.0, top_p=0.8).processors(range(500)):
        processed = processor(torch.zeros(500, 1), processed)
    assert set(processed.argmax(-1).tolist()) == {0, 1}


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.5}, {"top_p": 0.0, "temperature": 1.0}, {"stop": [""]}, {"max_new_tokens": 0}],
    ids=str,
)
def test_settings_that_mean_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(lk.SettingError):
        Sampling(**settings)


def test_a_stop_text_ends_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    made = tokenizer_of(None, "</s>", merges=True)
    model = tiny_llama(tied=False, vocab_size=len(made), eos_token_id=None)
    loaded = Loaded(model, made, "tiny", "float32")
    drawn: dict[str, Any] = {"max_new_tokens": 12, "temperature": 3.0, "seed": 1}
    whole = answer(loaded, "the cat", **drawn)
    stop = whole[5:7]
    until = whole[: whole.index(stop)].strip()
    assert until and len(until) < len(whole) - 2
    assert answer(loaded, "the cat", **drawn, stop=[stop, "never"], stream=True) == until
    assert capsys.readouterr().out == f"{until}\n"


@pytest.mark.parametrize(
    "pieces", [["  He", "llo wor", "ld ST", "OP and"], list(" Hello world STOP")]
)
def test_what_may_be_a_stop_is_held_back(pieces: list[str], tokenizer: Any) -> None:
    shown: list[str] = []
    streamer = Streamer(tokenizer, ["STOP"], shown.append)
    for piece in pieces:
        streamer.on_finalized_text(piece)
    assert "S" not in "".join(shown)
    streamer.on_finalized_text("", stream_end=True)
    assert "".join(shown) == "Hello world\n"


def test_what_was_no_stop_after_all_is_shown(tokenizer: Any) -> None:
    shown: list[str] = []
    streamer = Streamer(tokenizer, ["STOP"], shown.append)
    for piece in ("a ST", "AY", " ST"):
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert "".join(shown) == "a STAY ST\n"


def test_a_row_near_the_last_position_does_not_shorten_others(tokenizer: Any) -> None:
    """GPT-2 has 64 positions; the answers to short prompts are as long beside a long one."""
    model = tiny_gpt2()
    model.generation_config.eos_token_id = None
    speaker = Speaker.of(Loaded(model, tokenizer, "tiny", "float32"))
    texts = ["the cat", " ".join(["cat"] * 50), "a"]
    alone, together = (said([speaker], Sampling(max_new_tokens=30), n, texts) for n in (1, 3))
    assert alone == together
    with pytest.raises(lk.ModelError):
        said([speaker], Sampling(), 3, [" ".join(["cat"] * 70)])


def test_a_system_message_needs_a_template(model_dir: str) -> None:
    loaded = load_model(model_dir, "float32")
    speaker = Speaker.of(loaded)
    ids = speaker.prompt("cat", "be good")
    assert speaker.tokenizer.decode(ids).startswith("<|system|> <unk> good")
    assert "good" in WORDS
    with pytest.raises(lk.DataError, match="chat template"):
        answer(loaded, "cat", chat_template=False, system="be good")
    assert loaded.tokenizer.chat_template is not None


def test_an_adapter_twice() -> None:
    with pytest.raises(lk.SettingError, match="twice"):
        load_speakers("smollm2", ["a", "a"])
