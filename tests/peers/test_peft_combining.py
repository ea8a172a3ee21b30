"""`combine` beside PEFT's `add_weighted_adapter`: the same changes, for each of its words."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning:peft")]

WEIGHTS = {"a": 0.7, "b": 1.2, "c": -0.3}
OURS: dict[str, dict[str, Any]] = {
    "linear": {"on": "factors"},
    "cat": {},
    "svd": {"rank": 6},
    "ties": {"how": "ties", "density": 0.3, "on": "factors"},
    "magnitude_prune": {"how": "magnitude_prune", "density": 0.3, "on": "factors"},
    "dare_linear": {"how": "dare_linear", "density": 0.6, "on": "factors", "seed": 7},
    "dare_ties": {"how": "dare_ties", "density": 0.6, "on": "factors", "seed": 7},
    "ties_svd": {"how": "ties", "density": 0.3, "rank": 6},
    "magnitude_prune_svd": {"how": "magnitude_prune", "density": 0.3, "rank": 6},
    "dare_linear_svd": {"how": "dare_linear", "density": 0.6, "rank": 6, "seed": 7},
    "dare_ties_svd": {"how": "dare_ties", "density": 0.6, "rank": 6, "seed": 7},
}
"""PEFT's word, and what it is here."""


def theirs(model: Any, folders: dict[str, Any], word: str, **more: Any) -> Any:
    """PEFT's model of these adapters, and in it the new one, active."""
    names = list(folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, folders[names[0]], adapter_name=names[0])
        for name in names[1:]:
            wrapped.load_adapter(folders[name], adapter_name=name)
        inject = wrapped.base_model.inject_adapter

        def then_seeded(*args: Any, **kwargs: Any) -> None:
            inject(*args, **kwargs)
            torch.manual_seed(7)  # what it drew for the new adapter's start counts for nothing

        wrapped.base_model.inject_adapter = then_seeded
        wrapped.add_weighted_adapter(names, [WEIGHTS[name] for name in names], "new", word, **more)
        wrapped.set_adapter("new")
    return wrapped


@torch.no_grad()
def changes(before: Any, after: Any) -> dict[str, Tensor]:
    return {
        key: after[key] - weight
        for key, weight in before.items()
        if not torch.equal(after[key], weight) and "lora" not in key
    }


def llama() -> Any:
    return tiny_llama(tied=False).double()


def gpt2() -> Any:
    return tiny_gpt2().double()


CASES = [
    (make, word, elect, targets)
    for make, targets in (
        (llama, ["q_proj", "v_proj", "down_proj"]),
        (llama, ["embed_tokens", "q_proj"]),
        (gpt2, ["c_attn"]),
    )
    for word in OURS
    for elect in (("total", "frequency") if "ties" in word else (None,))
    # on embeddings and Conv1D PEFT draws over the transposed change
    if not (
        word.startswith("dare")
        and word.endswith("svd")
        and (make is gpt2 or "embed_tokens" in targets)
    )
]


@torch.no_grad()
@pytest.mark.parametrize(("make", "word", "elect", "targets"), CASES)
def test_each_of_pefts_words(
    make: Callable[[], Any], word: str, elect: str | None, targets: list[str], tmp_path: Any
) -> None:
    model = make()
    base = {key: t.clone() for key, t in model.state_dict().items()}
    folders = {}
    for seed, name in enumerate(WEIGHTS):
        randomise(lk.adapt(model, lk.LoRA(4, 4 + seed), targets, name=name), 0.3, seed)
        folders[name] = lk.adapters(model)[name].save(tmp_path / name)
    combined, _ = lk.combine(model, WEIGHTS, **OURS[word], elect=elect)
    combined.merge(permanent=True)
    for adapter in lk.adapters(model).values():
        adapter.remove()
    more: dict[str, Any] = {
        "density": OURS[word].get("density"),
        "svd_rank": OURS[word].get("rank"),
    }
    more = {key: value for key, value in more.items() if value} | {
        "majority_sign_method": elect or "total"
    }
    wrapped = theirs(make(), folders, word, **more)
    merged = wrapped.merge_and_unload().state_dict()
    ours, want = changes(base, model.state_dict()), changes(base, merged)
    assert ours.keys() == want.keys() and len(ours) >= 2
    for key, change in want.items():
        torch.testing.assert_close(ours[key], change, rtol=0, atol=2e-6 * float(change.abs().max()))


@torch.no_grad()
def test_peft_reads_what_was_combined(ids: Tensor, tmp_path: Any) -> None:
    model = tiny_llama()
    for seed, name in enumerate("ab"):
        randomise(lk.adapt(model, lk.LoRA(4 + seed, 8), name=name), 0.3, seed)
    combined, _ = lk.combine(model, {"a": 1, "b": 1}, how="ties", density=0.3, rank=5)
    want = model(ids).logits
    read = peft.PeftModel.from_pretrained(
        copy.deepcopy(tiny_llama()), combined.save(tmp_path / "out")
    )
    torch.testing.assert_close(read(ids).logits, want, rtol=0, atol=1e-5)
