"""Merging: the same output, and the base back to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_merge_and_unmerge(make, dtype: torch.dtype, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    model, exact = make().to(dtype), make().double()
    base = {key: t.clone() for key, t in model.state_dict().items()}
    exact.load_state_dict({key: t.double() for key, t in base.items()})
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=3)))
    randomise(lk.adapt(exact, lk.LoRA(rank=3)))
    y, truth = model(ids).logits, exact(ids).logits
    adapter.merge()
    assert adapter.is_merged
    merged = model(ids).logits
    assert merged.dtype == dtype
    assert (merged.double() - truth).abs().max() < 2.5 * (y.double() - truth).abs().max() + 3e-6
    assert (y.double() - truth).abs().max() < {torch.float64: 1e-12, torch.float32: 1e-5}.get(
        dtype, 0.2
    )
    adapter.unmerge()
    now = model.state_dict()
    assert all(torch.equal(now[key], t) for key, t in base.items()), "bit for bit"
    assert torch.equal(model(ids).logits, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_is_computed_wide_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 17, dtype=dtype))
    W = model[0].weight.detach().clone()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=3, alpha=6), "0"))
    site = adapter.tensors.branch("0")
    adapter.merge()
    exact = (W.double() + 2.0 * site.B.double() @ site.A.double()).detach()
    merged = model[0].weight.detach()
    if dtype in (torch.float16, torch.bfloat16):
        assert (merged != exact.to(dtype)).float().mean() < 0.01, (
            "all but ties are the nearest number there is"
        )
    else:
        torch.testing.assert_close(merged.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_one_by_one_is_all_at_once(ids: Tensor) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    adapters = [
        randomise(lk.adapt(model, lk.LoRA(rank=2), name=name), seed=n)
        for n, name in enumerate("abc")
    ]
    lk.activate(model, list("abc"))
    for adapter in adapters:
        adapter.merge()
    three = [model.get_submodule(path).weight.clone() for path in adapters[0].placement.methods]
    adapters[1].unmerge()
    adapters[1].merge()
    adapters[0].unmerge()
    adapters[0].merge()
    for weight, path in zip(three, adapters[0].placement.methods, strict=True):
        torch.testing.assert_close(model.get_submodule(path).weight, weight, rtol=1e-2, atol=1e-3)
    for adapter in adapters:
        adapter.unmerge()
    fresh = tiny_llama(dtype=torch.bfloat16)
    assert all(torch.equal(model.state_dict()[key], t) for key, t in fresh.state_dict().items())


def test_merging_is_wide_under_autocast_and_trainable_under_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=4), "0"))
    adapter.merge()
    weight = model[0].weight.clone()
    adapter.unmerge()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        adapter.merge()
    assert torch.equal(model[0].weight, weight)
    assert not model[0].weight.is_inference()


def test_merging_twice_is_merging_once_and_ignores_dropout(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2, dropout=0.5)))
    y = model.eval()(ids).logits
    model.train()
    adapter.merge()
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    adapter.merge()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-5, atol=1e-6)
    adapter.unmerge()
    adapter.unmerge()


def test_train_and_eval_change_no_weight(ids: Tensor) -> None:
    model = tiny_llama()
    randomise(lk.adapt(model, lk.LoRA(rank=2)))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    model.train().eval().train()
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())


def test_disabling_works_while_merged(ids: Tensor) -> None:
    model = tiny_llama()
    base = model(ids).logits
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    adapter.merge()
    merged = model(ids).logits
    with adapter.disabled():
        assert torch.equal(model(ids).logits, base)
        with adapter.disabled():
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base)
    assert adapter.is_merged
    assert torch.equal(model(ids).logits, merged)


def test_a_merge_that_would_not_be_finite_changes_nothing(ids: Tensor) -> None:
    model = tiny_llama()
    base = model(ids).logits
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    last = list(adapter.placement.methods)[-1]
    with torch.no_grad():
        adapter.tensors.branch(last).B[0, 0] = torch.inf
    with pytest.raises(lk.StateError, match=last):
        adapter.merge()
    assert not adapter.is_merged
    with adapter.disabled():
        assert torch.equal(model(ids).logits, base)
    half = nn.Sequential(nn.Linear(4, 4, dtype=torch.float16))
    big = lk.adapt(half, lk.LoRA(rank=1), "0")
    with torch.no_grad():
        big.tensors.branch("0").A.fill_(300)
        big.tensors.branch("0").B.fill_(300)
    with pytest.raises(lk.StateError, match="0"):
        big.merge()


def test_moving_while_merged_moves_what_is_set_aside(ids: Tensor) -> None:
    model = tiny_llama(tied=True)
    base = {key: t.clone() for key, t in model.state_dict().items()}
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), ["embed_tokens", "q_proj"]))
    adapter.merge()
    model.to(torch.float64)
    adapter.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(torch.equal(model.state_dict()[key], t.double()) for key, t in base.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter.merge()
    model.to("meta")
    adapter.unmerge()
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_memory_layouts_survive_a_merge(dimensions: int) -> None:
    torch.manual_seed(0)
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dimensions]
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    model = nn.Sequential(kind(4, 6, 3)).to(memory_format=layout)
    x = torch.randn(1, 4, *[5] * dimensions)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "0"))
    y = model(x)
    stride = model[0].weight.stride()
    adapter.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert model[0].weight.stride() == stride


def test_the_order_of_merging_leaves_no_trace(ids: Tensor) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    one, two = (
        randomise(lk.adapt(model, lk.LoRA(rank=2), name=name), seed=n)
        for n, name in enumerate("ab")
    )
    one.merge()
    two.merge()
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    with one.disabled():
        pass
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


def test_whole_modules_bring_their_buffers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    base = {key: t.clone() for key, t in model.state_dict().items()}
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "0", modules_to_save=["1"]))
    model.train()(torch.randn(16, 4) * 5 + 3)
    model.eval()
    x = torch.randn(3, 4)
    y = model(x)
    adapter.save(tmp_path)
    adapter.merge()
    torch.testing.assert_close(model(x), y)
    adapter.unmerge()
    assert all(torch.equal(model.state_dict()[key], t) for key, t in base.items())
    adapter.tensors.copy_of("1").reset_running_stats()
    adapter.restore(tmp_path)
    assert torch.equal(model(x), y)


def test_whole_modules_that_cannot_merge() -> None:
    model = tiny_bert()
    adapters = [
        lk.adapt(model, lk.LoRA(rank=2), "query", modules_to_save="classifier", name=name)
        for name in "ab"
    ]
    adapters[0].merge()
    with pytest.raises(lk.StateError, match="classifier"):
        adapters[1].merge()
    adapters[0].unmerge()
    with torch.no_grad():
        adapters[0].tensors.copy_of("classifier").weight[0, 0] = torch.nan
    with pytest.raises(lk.StateError, match="classifier"):
        adapters[0].merge()


def test_for_good(ids: Tensor) -> None:
    model = tiny_llama()
    keys = set(model.state_dict())
    one = randomise(lk.adapt(model, lk.LoRA(rank=2), name="one"))
    y = model(ids).logits
    two = lk.adapt(model, lk.LoRA(rank=2), name="two")
    two.merge()
    with pytest.raises(lk.StateError, match="'two'"):
        one.merge(permanent=True)
    two.remove()
    one.merge(permanent=True)
    assert set(model.state_dict()) == keys
    assert not lk.adapters(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-5, atol=1e-6)


def two(
    first: list[lk.LoRA], second: list[lk.LoRA]
) -> tuple[nn.Sequential, lk.Adapter, lk.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double()
    one = randomise(lk.adapt(model, first, ["0", "2"], name="one"), scale=0.5, seed=1)
    other = randomise(lk.adapt(model, second, ["0", "2"], name="other"), scale=0.5, seed=2)
    lk.activate(model, ["one", "other"])
    return model, one, other


KINDS = {
    "lora": [lk.LoRA(rank=2)],
    "vera": [lk.VeRA(rank=2)],
    "adalora": [lk.AdaLoRA(initial_rank=3, target_rank=2)],
    "delta-lora": [lk.DeltaLoRA(rank=2)],
    "dora": [lk.DoRA(rank=2)],
    "dora on vera": [lk.DoRA(), lk.VeRA(rank=2)],
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_for_good_beside_another_that_is_in_use(first: str, second: str) -> None:
    """A change that adds may stay; a gain needs the base's weight, which a merge takes away."""
    model, one, other = two(KINDS[first], KINDS[second])
    x = torch.randn(4, 8).double()
    expected = model(x)
    if second.startswith("dora"):
        with pytest.raises(lk.StateError, match="'other'"):
            one.merge(permanent=True)
        lk.activate(model, "one")
        with pytest.raises(lk.StateError, match=r"lorakin\.merge\(model, \['one', 'other'\]\)"):
            one.merge(permanent=True)
        lk.activate(model, ["one", "other"])
        assert torch.equal(model(x), expected), "nothing was changed"
        one.merge()
        torch.testing.assert_close(model(x), expected)
        one.unmerge()
        lk.merge(model, ["one", "other"])
        assert not lk.adapters(model)
    else:
        one.merge(permanent=True)
        assert list(lk.adapters(model)) == ["other"]
    torch.testing.assert_close(model(x), expected)
    if lk.adapters(model):
        other.merge(permanent=True)
    torch.testing.assert_close(model(x), expected)


def test_for_good_beside_a_gain_elsewhere() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    randomise(lk.adapt(model, lk.LoRA(rank=2), "0", name="one"))
    randomise(lk.adapt(model, lk.DoRA(rank=2), "1", name="other"))
    lk.activate(model, ["one", "other"])
    x = torch.randn(2, 8)
    expected = model(x)
    lk.adapters(model)["one"].merge(permanent=True)
    torch.testing.assert_close(model(x), expected)


def test_several_for_good_are_all_or_none() -> None:
    model, one, other = two(KINDS["dora"], KINDS["dora"])
    weights = [model[0].weight, model[2].weight]
    with pytest.raises(lk.SettingError, match="'two'.*'one', 'other'"):
        lk.merge(model, ["one", "two"])
    with torch.no_grad():
        other.tensors.branch("2").B[0, 0] = torch.inf
    with pytest.raises(lk.StateError, match="2"):
        lk.merge(model, ["one", "other"])
    assert not one.is_merged
    assert [model[0].weight, model[2].weight] == weights
    lk.merge(model, [])
    assert len(lk.adapters(model)) == 2


@pytest.mark.parametrize("permanent", [False, True])
def test_nothing_is_merged_beside_a_base_that_moved(permanent: bool) -> None:
    moving = [lk.DeltaLoRA(rank=2, update="in_place", start_step=1)]
    model, one, other = two(KINDS["lora"], moving)
    x = torch.randn(4, 8).double()
    optimizer = other.optimizer(lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model(x)
    with pytest.raises(lk.StateError, match="'other'"):
        one.merge(permanent=permanent)
    lk.merge(model, ["one", "other"])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_what_is_inside_a_module_trained_whole_is_not_merged_beside_it(order: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    base = {key: t.clone() for key, t in model.state_dict().items()}
    adapters = {
        "a": lk.adapt(model, lk.LoRA(rank=2), "1", modules_to_save="0", name="a"),
        "b": lk.adapt(model, lk.LoRA(rank=2), "0.1", name="b"),
    }
    for adapter in adapters.values():
        randomise(adapter)
    first, second = (adapters[name] for name in order)
    first.merge()
    with pytest.raises(lk.StateError, match="'b'.*0.1.*'a'"):
        second.merge()
    first.unmerge()
    assert all(torch.equal(model.state_dict()[key], t) for key, t in base.items())
    adapters["a"].merge(permanent=True)
    assert all(key.startswith(("0", "1")) for key in model.state_dict())


def test_tied_embeddings_come_apart_while_merged(tmp_path, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    """An adapter on the input embedding leaves the output embedding that shares its weight."""
    model = tiny_llama(tied=True)
    head = model.lm_head.weight.clone()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), ["embed_tokens", "q_proj"]))
    y = model(ids).logits
    adapter.merge()
    assert torch.equal(model.lm_head.weight, head)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        type(model).from_pretrained(tmp_path)(ids).logits, y, rtol=1e-5, atol=1e-6
    )
    adapter.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(model(ids).logits, y)


def test_merging_leaves_an_untouched_tie_alone(tmp_path, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama(tied=True)
    randomise(lk.adapt(model, lk.LoRA(rank=2))).merge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
