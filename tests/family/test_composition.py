"""Members together: which pairs combine, why others do not, and that each one that does works."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import tiny_gpt2
from lorakin.family import FAMILY, Method, method_named, refusal_of_members
from lorakin.storage import directory

STEPS, STOP = 10, 5
WORDS = [member.word for member in FAMILY]
PAIRS = list(itertools.combinations(WORDS, 2))
STARTS = ("pissa", "olora", "lora-xs", "eva", "lora-ga")
REFUSED = {
    ("lora", "vera"): "where the pair comes from",
    ("lora", "adalora"): "leave it out",
    ("lora", "lora-xs"): "where the pair comes from",
    ("lora+", "lora-fa"): "learning rate",
    ("lora+", "lora-xs"): "lora-xs",
    ("lora-fa", "vera"): "random factor",
    ("lora-fa", "lora-xs"): "random factor",
    ("vera", "lora-xs"): "where the pair comes from",
    ("adalora", "lora-xs"): "leave it out",
    **{("vera", word): "vera" for word in STARTS if word != "lora-xs"},
    **{("adalora", word): "adalora" for word in ("pissa", "olora", "lora-ga")},
    **{("lora-drop", word): "rest=" for word in STARTS},
    **dict.fromkeys(itertools.combinations(STARTS, 2), "where the pair begins"),
}
TRIPLES = [
    ("lora-fa", "dora", "lora-drop"),
    ("lora-fa", "dora", "lora+"),
    ("dora", "lora+", "lora-drop"),
    ("vera", "dora", "lora+"),
    ("vera", "dora", "delta-lora"),
    ("dora", "adalora", "lora-fa"),
    ("dora", "adalora", "delta-lora"),
    ("adalora", "lora-drop", "lora+"),
    ("lora-drop", "dora", "delta-lora"),
    ("vera", "dora", "adalora", "lora-drop", "lora+", "delta-lora"),
    ("pissa", "dora", "lora-fa", "delta-lora"),
    ("eva", "adalora", "dora", "lora+"),
    ("lora-ga", "lora-drop", "dora"),
    ("lora-xs", "dora", "lora-drop", "delta-lora"),
]
LEGAL = [(word,) for word in WORDS] + [pair for pair in PAIRS if pair not in REFUSED] + TRIPLES


def members(words: tuple[str, ...]) -> list[Any]:
    kinds = {member.word: member for member in FAMILY}
    rest = {"rest": "frozen"} if set(words) & set(STARTS) else {}
    return [
        kinds[word](**kinds[word].test_settings, **(rest if word == "lora-drop" else {}))
        for word in words
    ]


def batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


def begin(
    words: tuple[str, ...], ids: Tensor, importance: Any = None, layers: int = 2
) -> tuple[Any, lk.Adapter, torch.optim.Optimizer]:
    """A tiny GPT-2 in float64 with the method in it; its layers are Conv1D."""
    model = tiny_gpt2(layers).double()
    method = Method.of(members(words))
    if method.needed_probe is not None and importance is not None:
        method = method.with_importance(importance)
    looks = method.needed_probe is not None or method.measured_member is not None
    adapter = lk.adapt(model, method, seed=0, probe=[batch(ids)] if looks else None)
    return model, adapter, adapter.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=STEPS)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    loss = model(**batch(ids)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


@pytest.mark.parametrize("pair", PAIRS, ids="×".join)
def test_the_table(pair: tuple[str, str]) -> None:
    one, other = (next(member for member in FAMILY if member.word == word) for word in pair)
    for first, second in ((one, other), (other, one)):
        reason = refusal_of_members(first, second)
        assert (reason is None) == (pair not in REFUSED)
        if reason is None:
            continue
        assert all(word in reason for word in pair), "it names both"
        assert REFUSED[pair] in reason
        with pytest.raises(lk.SettingError, match="do not combine"):
            lk.adapt(tiny_gpt2(), [first(), second()])


def test_what_two_cannot_a_third_may_make_sound() -> None:
    """LoRA+ with LoRA-FA has only B to speed up; with DoRA magnitudes keep the base rate."""
    adapter = lk.adapt(tiny_gpt2(), [lk.DoRA(rank=2), lk.LoRAFA(), lk.LoRAPlus(ratio=8)])
    rates = {
        id(p): group["lr"] for group in adapter.parameter_groups(lr=1e-3) for p in group["params"]
    }
    for name, parameter in adapter.named_parameters():
        slot = name.rpartition(".")[2]
        assert rates.get(id(parameter)) == (
            None if slot == "A" else pytest.approx(8e-3 if slot == "B" else 1e-3)
        )


def read_by_peft(folder: Path, trained: Tensor, ids: Tensor) -> None:
    """PEFT computes the same of the files, and so do we of PEFT's part alone."""
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(
        tiny_gpt2().double(), folder, autocast_adapter_dtype=False
    ).eval()
    torch.testing.assert_close(theirs(ids).logits, trained, rtol=1e-7, atol=1e-7)
    for name in ("lorakin.json", "lorakin.safetensors"):
        (folder / name).unlink(missing_ok=True)
    ours = tiny_gpt2().double()
    lk.load(ours, folder)
    torch.testing.assert_close(ours(ids).logits, trained, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("words", LEGAL, ids="×".join)
def test_what_is_legal_works(words: tuple[str, ...], ids: Tensor, tmp_path: Path) -> None:
    """Start at the base, falling loss, resume, save, load, PEFT, merge, plain pair, removal."""
    base = tiny_gpt2().double()
    before = base(ids).logits
    model, adapter, optimizer = begin(words, ids)
    away = (model(ids).logits - before).abs().max()
    assert away <= (1e-4 if "lora-xs" in words else 0), "a fresh adapter is the identity"
    losses = [step(model, optimizer, ids) for _ in range(STOP)]
    directory.save(adapter, tmp_path / "half")
    half = copy.deepcopy(optimizer.state_dict())
    losses += [step(model, optimizer, ids) for _ in range(STEPS - STOP)]
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(t, base.state_dict()[key])
        for key, t in model.state_dict().items()
        if "lorakin" not in key
    )
    trained = model(ids).logits
    assert (trained - before).abs().max() > 1e-4

    other, resumed, again = begin(words, ids, adapter.method.setting("importance"))
    resumed.restore(tmp_path / "half")
    again.load_state_dict(half)
    assert [step(other, again, ids) for _ in range(STEPS - STOP)] == losses[STOP:], (
        "resumed to the bit"
    )
    assert torch.equal(other(ids).logits, trained)

    adapter.save(tmp_path / "whole")
    for trainable in (False, True):
        fresh = tiny_gpt2().double()
        loaded = lk.load(fresh, tmp_path / "whole", trainable=trainable)
        torch.testing.assert_close(fresh(ids).logits, trained, rtol=1e-14, atol=1e-14)
        assert loaded.trainable_parameters == (adapter.trainable_parameters if trainable else 0)
        assert loaded.method.agrees_with(adapter.placement.method)

    read_by_peft(tmp_path / "whole", trained, ids)

    plain = tiny_gpt2().double()
    for path in adapter.placement.methods:
        pair = adapter.tensors.pair_now(path)
        weight = plain.get_submodule(path).weight
        with torch.no_grad():
            weight.copy_(pair.applied_to(weight.T).T)
    torch.testing.assert_close(plain(ids).logits, trained, rtol=1e-10, atol=1e-12)

    adapter.merge()
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-10, atol=1e-12)
    adapter.unmerge()
    with adapter.disabled():
        assert torch.equal(model(ids).logits, before)
    adapter.remove()
    assert torch.equal(model(ids).logits, before)


def test_an_alpha_of_its_own_that_pefts_form_would_lose(ids: Tensor, tmp_path: Path) -> None:
    """PEFT ignores alpha_pattern in an ADALORA file, so the pair is written instead."""
    peft = pytest.importorskip("peft")
    model = tiny_gpt2().double()
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4), alpha_pattern={"c_fc": 64})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.1)
    directory.save(adapter, tmp_path)
    for read in (
        lambda: peft.PeftModel.from_pretrained(
            tiny_gpt2().double(), tmp_path, autocast_adapter_dtype=False
        ).eval(),
        lambda: lk.load(tiny_gpt2().double(), tmp_path).model,
    ):
        torch.testing.assert_close(read()(ids).logits, model(ids).logits, rtol=1e-7, atol=1e-7)


def test_the_order_in_which_members_are_named_is_nothing() -> None:
    one, other = (
        Method.of([lk.LoRAPlus(), lk.DoRA(rank=4)]),
        Method.of([lk.DoRA(rank=4), lk.LoRAPlus()]),
    )
    assert one == other
    assert one.words == "lora+,dora"
    assert one.parametrisation == lk.LoRA(rank=4)


def test_what_members_say_about_their_pair() -> None:
    assert Method.of([lk.DoRA(rank=4), lk.LoRAFA(alpha=8)]).parametrisation == lk.LoRA(
        rank=4, alpha=8
    )
    assert Method.of([lk.LoRA(rank=4), lk.DoRA(rank=4)]).parametrisation == lk.LoRA(rank=4)
    for given, message in (
        (
            [lk.DoRA(rank=4), lk.LoRAFA(rank=8)],
            "rank=4.*rank=8|rank=8.*rank=4",
        ),
        ([lk.LoRA(rank=4), lk.DoRA(rank=8)], "rank=4.*rank=8"),
        ([lk.DoRA(), lk.DoRA()], "dora is given twice"),
        ([], "lk.LoRA"),
        (
            [lk.DoRA(), "lora+"],
            r"'lora\+'",
        ),
    ):
        with pytest.raises(lk.SettingError, match=message):
            Method.of(given)  # type: ignore[arg-type]


def test_methods_by_their_words() -> None:
    assert method_named("dora, lora+", {"rank": 8, "ratio": 4}) == Method.of(
        [lk.DoRA(rank=8), lk.LoRAPlus(ratio=4, rank=8)]
    )
    assert method_named("vera,dora", {"rank": 8}).parametrisation == lk.VeRA(rank=8)
    assert method_named("vera,adalora", {"rank": 8, "target_rank": 2}).parametrisation == lk.VeRA(
        rank=8
    )
    for words, settings, message in (
        (
            "lora",
            {"ratio": 4},
            r"'ratio'.*lora\+",
        ),
        (
            "lora,dorra",
            {},
            "'dorra'.*'dora'",
        ),
        ("LoRA+", {}, r"'LoRA\+'.*'lora\+'"),
        ("dora,", {}, "'dora,'"),
        ("vera", {"alpha": 8}, "'vera'.*'alpha'"),
        ("adalora,dora", {"rank": 8}, "initial_rank"),
    ):
        with pytest.raises(lk.SettingError, match=message):
            method_named(words, settings)


def test_a_probe_is_on_the_methods_own_pair() -> None:
    for given, pair in (
        ([lk.LoRADrop(rank=4, alpha=8), lk.DoRA()], lk.LoRA(rank=4, alpha=8)),
        ([lk.LoRADrop(), lk.AdaLoRA(initial_rank=6, alpha=9)], lk.LoRA(rank=6, alpha=9)),
        ([lk.LoRADrop(), lk.VeRA(rank=5), lk.DeltaLoRA(start_step=1)], lk.VeRA(rank=5)),
        ([lk.LoRADrop(), lk.DeltaLoRA()], lk.LoRA(rank=8, alpha=16)),
    ):
        probe = Method.of(given).for_probe()
        assert probe.parametrisation == pair
        assert probe.needed_probe is None
        assert {member.word for member in probe.modifiers} == {
            m.word for m in given if m.word == "dora"
        }


def test_the_usual_learning_rate() -> None:
    rates = {member.word: Method.of(member()).learning_rate for member in FAMILY}
    assert rates == pytest.approx(
        {"lora": 2e-4, "lora+": 1e-4, "lora-fa": 2e-4, "vera": 2e-3, "dora": 1e-4,
         "adalora": 5e-4, "lora-drop": 2e-4, "delta-lora": 2e-4, "pissa": 2e-4, "olora": 2e-4,
         "lora-xs": 2e-3, "eva": 2e-4, "lora-ga": 2e-4}
    )  # fmt: skip
    assert Method.of([lk.VeRA(), lk.DoRA()]).learning_rate == pytest.approx(1e-3)
