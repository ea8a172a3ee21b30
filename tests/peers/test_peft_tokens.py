"""Real PEFT's trainable_token_indices: equal gradients and logits, and files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import lorakin as lk
from conftest import MEMBERS, randomise, tiny_gpt2, tiny_llama
from lorakin.inject.trainable_tokens import TokenRows

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning:peft")]

IDS = [6, 5]
SOME: list[Any] = [
    IDS,
    {"lm_head": IDS},
    {"embed_tokens": IDS, "lm_head": IDS},
    {"embed_tokens": IDS, "lm_head": [5, 7]},
]


@pytest.fixture
def ids(ids: Tensor) -> Tensor:
    ids[0, 1], ids[1, 2] = IDS
    return ids


def tiny_t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def theirs(model: Any, tokens: Any, **more: Any) -> Any:
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "trainable_token_indices": tokens,
        **more,
    }
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def trained(model: Any, ids: Tensor, steps: int = 3) -> Tensor:
    """The logits after a few steps over all that trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(input_ids=ids).logits


def files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", SOME, ids=str)
def test_training_is_pefts(tokens: Any, tied: bool, ids: Tensor, tmp_path: Path) -> None:
    other = theirs(tiny_llama(tied), tokens)
    other.save_pretrained(tmp_path)
    model = tiny_llama(tied).train()
    adapter = lk.load(model, tmp_path, trainable=True)
    other.train()
    torch.testing.assert_close(trained(model, ids, 4), trained(other, ids, 4), rtol=0, atol=2e-5)
    ours = {name: p for name, p in adapter.named_parameters() if name.endswith("rows")}
    assert ours and all(
        (p - tiny_llama(tied).model.embed_tokens.weight[0]).abs().max() > 0 for p in ours.values()
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", SOME, ids=str)
def test_we_load_their_files(tokens: Any, tied: bool, ids: Tensor, tmp_path: Path) -> None:
    other = theirs(tiny_llama(tied), tokens)
    want = trained(other, ids)
    other.save_pretrained(tmp_path)
    model = tiny_llama(tied)
    adapter = lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)
    adapter.merge(permanent=True)
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj"], "none"], ids=str)
@pytest.mark.parametrize("tokens", SOME, ids=str)
def test_they_load_ours(tokens: Any, targets: Any, tied: bool, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(tied)
    adapter = lk.adapt(model, lk.LoRA(rank=4), targets, trainable_tokens=tokens)
    randomise(adapter, 0.2)
    want = model(ids).logits
    adapter.save(tmp_path)
    config, _ = files(tmp_path)
    if targets == "none" and tokens == SOME[-1]:
        return  # PEFT has no adapter of rows alone that are others in each module
    assert config["peft_type"] == ("TRAINABLE_TOKENS" if targets == "none" else "LORA")
    other = peft.PeftModel.from_pretrained(tiny_llama(tied), tmp_path)
    torch.testing.assert_close(other(ids).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("word", [word for word in MEMBERS if word != "lora-drop"])
def test_they_load_ours_of_every_member(word: str, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, MEMBERS[word](), trainable_tokens=IDS)
    optimizer = adapter.optimizer(lr=1e-2, total_steps=6)
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = model(ids).logits
    adapter.save(tmp_path)
    other = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(other(ids).logits, want, rtol=0, atol=1e-5)


def test_what_a_file_holds(tmp_path: Path) -> None:
    adapter = randomise(lk.adapt(tiny_gpt2(), lk.LoRA(rank=2), trainable_tokens=IDS))
    adapter.save(tmp_path)
    config, tensors = files(tmp_path)
    assert config["trainable_token_indices"] == [5, 6]
    key = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"
    assert [name for name in tensors if "lora_" not in name] == [key]
    assert torch.equal(tensors[key], adapter.tensors.rows_at("transformer.wte"))


def test_tied_by_hand_they_get_both(ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), trainable_tokens=IDS), 0.2)
    assert adapter.placement.tokens["model.embed_tokens"].tied == ("lm_head",)
    want = model(ids).logits
    adapter.save(tmp_path)
    for load in (lk.load, peft.PeftModel.from_pretrained):
        base = tiny_llama(tied=False)
        base.lm_head.weight = base.model.embed_tokens.weight
        loaded = load(base, tmp_path)
        got = (base if isinstance(loaded, lk.Adapter) else loaded)(ids).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_pair_on_the_tied_head_is_refused(ids: Tensor, tmp_path: Path) -> None:
    theirs(tiny_llama(), IDS, target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path)
    with pytest.raises(lk.AdapterError, match="lm_head cannot have both"):
        lk.load(tiny_llama(), tmp_path)
    model = tiny_llama(tied=False)
    want = trained(other := theirs(model, IDS, target_modules=["q_proj", "lm_head"]), ids)
    other.save_pretrained(tmp_path)
    lk.load(untied := tiny_llama(tied=False), tmp_path)
    torch.testing.assert_close(untied(ids).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "tokens", [IDS, {"embed_tokens": IDS}, {"shared": IDS, "lm_head": IDS}], ids=str
)
def test_four_modules_of_one_weight(tokens: Any, ids: Tensor, tmp_path: Path) -> None:
    """Named by another than the input embedding, PEFT ties nothing; ours are then written one by one."""

    def logits(model: Any) -> Tensor:
        return model.eval()(input_ids=ids, decoder_input_ids=ids).logits

    other = theirs(tiny_t5(), tokens, target_modules=["q"])
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(other.named_parameters()):
            if "trainable_tokens" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                )
    other.save_pretrained(tmp_path / "theirs")
    lk.load(model := tiny_t5(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-5)
    adapter = randomise(
        lk.adapt(model := tiny_t5(), lk.LoRA(rank=2), ["q"], trainable_tokens=tokens), 0.2
    )
    assert (
        len(adapter.placement.tokens) == 1
        and len(next(iter(adapter.placement.tokens.values())).tied) == 3
    )
    adapter.save(tmp_path / "ours")
    for load in (lk.load, peft.PeftModel.from_pretrained):
        loaded = load(base := tiny_t5(), tmp_path / "ours")
        got = logits(base if isinstance(loaded, lk.Adapter) else loaded)
        torch.testing.assert_close(got, logits(model), rtol=0, atol=1e-5)


def test_ensured_ties_are_what_we_do_anyway(ids: Tensor, tmp_path: Path) -> None:
    other = theirs(tiny_llama(), IDS, ensure_weight_tying=True)
    want = trained(other, ids)
    other.save_pretrained(tmp_path)
    lk.load(model := tiny_llama(), tmp_path)
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_their_own_type(tied: bool, ids: Tensor, tmp_path: Path) -> None:
    other = peft.get_peft_model(tiny_llama(tied), peft.TrainableTokensConfig(token_indices=IDS))
    want = trained(other, ids)
    other.save_pretrained(tmp_path)
    model = tiny_llama(tied)
    adapter = lk.load(model, tmp_path)
    assert not adapter.placement.methods
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


def resized(tied: bool, folder: Path, seed: int, size: int = 67) -> Any:
    """A base from a directory, so that PEFT sees that it grew, with `size` rows, the new ones at random."""
    if not folder.exists():
        tiny_llama(tied, initializer_range=0.2).save_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    if size != 64:
        torch.manual_seed(seed)
        model.resize_token_embeddings(size, mean_resizing=False)
        for table in {
            id(t): t for t in (model.lm_head.weight, model.model.embed_tokens.weight)
        }.values():
            nn.init.normal_(table[64:].detach(), std=0.2)
    return model.eval()


NEW = [64, 65, 66]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [None, NEW, {"embed_tokens": NEW, "lm_head": NEW}], ids=str)
def test_their_resized_vocabulary(tokens: Any, tied: bool, ids: Tensor, tmp_path: Path) -> None:
    """PEFT's file holds the tables: the rows that a base filled otherwise come from there."""
    ids[0, :3] = torch.tensor(NEW)
    other = theirs(resized(tied, tmp_path / "base", 1), tokens)
    want = trained(other, ids)
    other.save_pretrained(tmp_path / "a")
    for seed in (1, 2):
        model = resized(tied, tmp_path / "base", seed)
        adapter = lk.load(model, tmp_path / "a")
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)
        assert set(NEW) >= {
            token for rows in adapter.placement.tokens.values() for token in rows.ids
        }
    with pytest.raises(lk.AdapterError, match=r"resize_token_embeddings\(67\)"):
        lk.load(resized(tied, tmp_path / "base", 1, 64), tmp_path / "a")
    with pytest.raises(lk.AdapterError, match="another base model"):
        lk.load(tiny_llama(tied, vocab_size=67, initializer_range=0.5), tmp_path / "a")


@pytest.mark.parametrize(("tied", "size"), [(True, 67), (False, 67), (True, 128), (False, 128)])
def test_our_resized_vocabulary(tied: bool, size: int, ids: Tensor, tmp_path: Path) -> None:
    """The rows that the adapter trains, and any after them, are no part of what its base is known by."""
    ids[0, :3] = torch.tensor(NEW)
    model = resized(tied, tmp_path / "base", 1, size)
    adapter = lk.adapt(
        model, lk.LoRA(rank=4), trainable_tokens={"embed_tokens": NEW, "lm_head": NEW}
    )
    want = trained(model, ids)
    adapter.save(tmp_path / "a")
    other = resized(tied, tmp_path / "base", 2, size)
    lk.load(other, tmp_path / "a")
    torch.testing.assert_close(other(ids).logits[..., :67], want[..., :67], rtol=0, atol=1e-5)
    with pytest.raises(
        lk.AdapterError, match=rf"token 66 of .* 64 rows.*resize_token_embeddings\({size}\)"
    ):
        lk.load(resized(tied, tmp_path / "base", 1, 64), tmp_path / "a")
    changed = resized(tied, tmp_path / "base", 1, size)
    with torch.no_grad():
        changed.model.embed_tokens.weight[:64] += 0.1
    with pytest.raises(lk.AdapterError, match="another"):
        lk.load(changed, tmp_path / "a")


def test_new_rows_that_are_not_trained_are_missed(tmp_path: Path) -> None:
    model = resized(False, tmp_path / "base", 1)
    randomise(lk.adapt(model, lk.LoRA(rank=4), trainable_tokens=NEW)).save(tmp_path / "a")
    with pytest.raises(
        lk.AdapterError, match=r"lm_head here is another.*Rows that a resize added are random"
    ):
        lk.load(resized(False, tmp_path / "base", 2), tmp_path / "a")


def edited(folder: Path, config: dict[str, Any] | None = None, **tensors: Any) -> None:
    old, held = files(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**old, **(config or {})}))
    held = {key: tensors.get(key.rpartition(".")[2], tensor) for key, tensor in held.items()}
    safetensors.torch.save_file(
        {key: t for key, t in held.items() if t is not None}, folder / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        ({"trainable_token_indices": [5]}, torch.zeros(2, 32), "shape"),
        ({"trainable_token_indices": [5, "a"]}, torch.zeros(2, 32), "token_indices"),
        ({"trainable_token_indices": [5, -1]}, torch.zeros(2, 32), "token_indices"),
        (
            {"trainable_token_indices": [5, 99]},
            torch.zeros(2, 32),
            r"resize_token_embeddings\(100\)",
        ),
        ({"trainable_token_indices": 5}, torch.zeros(2, 32), "token_indices"),
        ({"trainable_token_indices": None}, torch.zeros(2, 32), "does not name"),
        ({"trainable_token_indices": {"other": [5, 6]}}, torch.zeros(2, 32), "does not name"),
        ({}, torch.zeros(2, 31), "shape"),
        ({}, torch.full((2, 32), float("nan")), "finite"),
        ({}, torch.zeros(2, 32, dtype=torch.int32), "finite"),
        ({}, None, "the file has no rows"),
    ],
)
def test_files_that_do_not_fit_together(
    config: Any, rows: Any, message: str, tmp_path: Path
) -> None:
    theirs(tiny_llama(), IDS).save_pretrained(tmp_path)
    edited(tmp_path, config, trainable_tokens_delta=rows)
    model = tiny_llama()
    with pytest.raises(lk.AdapterError, match=message):
        lk.load(model, tmp_path)
    assert not lk.adapters(model)


def test_the_last_of_a_token_that_stands_twice_counts(ids: Tensor, tmp_path: Path) -> None:
    other = theirs(tiny_llama(), [5, 6, 5])
    other.save_pretrained(tmp_path)
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    edited(tmp_path, trainable_tokens_delta=rows)
    model = tiny_llama()
    adapter = lk.load(model, tmp_path)
    assert adapter.placement.tokens == {"model.embed_tokens": TokenRows((5, 6), ("lm_head",))}
    assert torch.equal(adapter.tensors.rows_at("model.embed_tokens"), rows[[2, 1]])
    other = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=1e-5)
