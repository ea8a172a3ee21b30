"""Mixed batches give each row what its adapter alone would."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama
from lorakin.inject.model_registry import attachments_in

MEMBERS: dict[str, Any] = {
    "one": lk.LoRA(4, 8),
    "two": lk.LoRA(6, 6, rslora=True),
    "vera": lk.VeRA(rank=8),
    "dora": lk.DoRA(rank=2),
    "adalora": lk.AdaLoRA(initial_rank=5, target_rank=2),
    "delta": lk.DeltaLoRA(rank=2),
}


def filled(model: Any, names: Any = MEMBERS, **more: Any) -> Any:
    for seed, name in enumerate(names):
        adapter = randomise(lk.adapt(model, MEMBERS[name], name=name, **more), 0.3, seed)
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return model


@torch.no_grad()
def one_by_one(model: Any, names: list[str | None], call: Any) -> Tensor:
    rows = []
    for n, name in enumerate(names):
        lk.activate(model, [] if name is None else name)
        rows.append(call(slice(n, n + 1)))
    lk.activate(model, [])
    return torch.cat(rows)


ROWS: list[str | None] = ["two", None, "dora", "one", "vera", "one", "adalora", "delta", "two"]


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_each_row_uses_its_adapter(make: Any, length: int) -> None:
    model = filled(make().double())
    ids = torch.randint(3, 64, (len(ROWS), length), generator=torch.Generator().manual_seed(1))
    want = one_by_one(model, ROWS, lambda rows: model(ids[rows]).logits)
    with torch.no_grad(), lk.mixed_batch(model, ROWS):
        got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert len({tuple(row.flatten()[:4].tolist()) for row in want}) == len(ROWS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[1:2], want[1:2], rtol=0, atol=1e-10)


def test_in_half_precision_it_is_as_good_as_the_plain_way() -> None:
    ids = torch.randint(3, 64, (len(ROWS), 12), generator=torch.Generator().manual_seed(1))
    model = filled(tiny_llama())
    truth = one_by_one(model, ROWS, lambda rows: model(ids[rows]).logits).double()
    model = model.to(torch.bfloat16)
    plain = one_by_one(model, ROWS, lambda rows: model(ids[rows]).logits).double()
    for length in (12, 2):
        with torch.no_grad(), lk.mixed_batch(model, ROWS):
            mixed = model(ids[:, :length]).logits.double()
        wrong, bound = (
            float((logits - truth[:, :length]).norm()) for logits in (mixed, plain[:, :length])
        )
        assert wrong < 1.3 * bound


def test_generate_with_beams_and_several_sequences() -> None:
    model = filled(tiny_llama(), ["one", "dora"])
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 64, (3, 4), generator=torch.Generator().manual_seed(1))
    names: list[str | None] = ["dora", None, "one"]
    for settings in ({"num_beams": 3, "num_return_sequences": 2}, {}):
        settings = {**settings, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        want = one_by_one(model, names, lambda rows, s=settings: model.generate(ids[rows], **s))
        with lk.mixed_batch(model, names):
            got = model.generate(ids, **settings)
        assert torch.equal(got, want)


def test_classifiers_with_heads_of_their_own() -> None:
    model = filled(tiny_bert(), ["one", "two"], targets="query", modules_to_save=["classifier"])
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    names: list[str | None] = ["two", None, "one", "two"]
    want = one_by_one(model, names, lambda rows: model(ids[rows]).logits)
    with torch.no_grad(), lk.mixed_batch(model, names):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


def test_convolutions_and_embeddings() -> None:
    x = torch.linspace(-1, 1, 72).view(3, 3, 8)
    names: list[str | None] = ["one", None, "dora"]
    torch.manual_seed(0)
    layers = nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    net = filled(nn.Sequential(*layers), ["one", "dora"], targets=["0", "3"])
    want = one_by_one(net, names, lambda rows: net(x[rows]))
    with torch.no_grad(), lk.mixed_batch(net, names):
        torch.testing.assert_close(net(x), want, rtol=0, atol=1e-5)
    model = filled(tiny_llama(), ["one", "dora"], targets="embed_tokens")
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(1))
    want = one_by_one(model, names, lambda rows: model(ids[rows]).logits)
    with torch.no_grad(), lk.mixed_batch(model, names):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


def test_different_targets() -> None:
    model = tiny_llama()
    for name, targets in (("one", "q_proj"), ("two", "up_proj")):
        randomise(lk.adapt(model, MEMBERS[name], name=name, targets=targets), 0.3)
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(1))
    names: list[str | None] = ["two", "one", None]
    want = one_by_one(model, names, lambda rows: model(ids[rows]).logits)
    with torch.no_grad(), lk.mixed_batch(model, names):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


def test_it_trains_each_adapter_on_its_own_rows() -> None:
    ids = torch.randint(3, 64, (4, 5), generator=torch.Generator().manual_seed(1))
    names: list[str | None] = ["one", "two", None, "one"]
    grads = []
    for mixed in (True, False):
        model = tiny_llama().double()
        for seed, name in enumerate(("one", "two")):
            randomise(lk.adapt(model, MEMBERS[name], name=name), 0.3, seed)
        if mixed:
            with lk.mixed_batch(model, names):
                model(ids).logits.square().sum().backward()
        else:
            for n, name in enumerate(names):
                lk.activate(model, [] if name is None else name)
                if name is not None:
                    model(ids[n : n + 1]).logits.square().sum().backward()
        grads.append(
            [p.grad for name in ("one", "two") for p in lk.adapters(model)[name].parameters()]
        )
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_an_adapter_that_is_trained_between_two_batches_is_not_remembered() -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(2), name="one"), 0.3)
    ids = torch.arange(3, 8).view(1, -1)
    with torch.no_grad(), lk.mixed_batch(model, ["one"]):
        before = model(ids).logits
        randomise(adapter, 0.3, seed=9)
        assert not torch.allclose(model(ids).logits, before)


def test_contexts_nest_and_an_error_leaves_nothing_behind() -> None:
    model = filled(tiny_llama(), ["one", "two"])
    lk.activate(model, "one")
    ids = torch.arange(3, 13).view(2, -1)
    with torch.no_grad():
        plain = model(ids).logits
        with lk.mixed_batch(model, ["two", None]):
            outer = model(ids).logits
            with lk.mixed_batch(model, [None, None]):
                assert not torch.allclose(model(ids).logits, outer)
            torch.testing.assert_close(model(ids).logits, outer)
        with (
            pytest.raises(lk.SettingError, match="2 rows.* 3"),
            lk.mixed_batch(model, ["one"] * 3),
        ):
            model(ids)
        assert torch.equal(model(ids).logits, plain)


def test_inside_no_adapter_comes_or_goes_but_one_may_be_disabled() -> None:
    model = filled(tiny_llama(), ["one", "two"])
    one = lk.adapters(model)["one"]
    ids = torch.arange(3, 13).view(2, -1)
    with torch.no_grad(), lk.mixed_batch(model, ["one", "two"]):
        both = model(ids).logits
        for forbidden in (
            lambda: lk.adapt(model, lk.LoRA(2), name="three"),
            one.remove,
            one.merge,
            lambda: lk.activate(model, "one"),
        ):
            with pytest.raises(lk.StateError):
                forbidden()
        with one.disabled():
            off = model(ids).logits
        assert torch.equal(model(ids).logits, both)
        with lk.mixed_batch(model, [None, "two"]):
            torch.testing.assert_close(off, model(ids).logits)
    one.remove()


def test_autocast_other_precisions_and_positions_that_all_rows_share() -> None:
    ids = torch.randint(3, 64, (len(ROWS), 6), generator=torch.Generator().manual_seed(1))
    model = filled(tiny_llama())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = one_by_one(model, ROWS, lambda rows: model(ids[rows]).logits)
        for length in (6, 2):
            with lk.mixed_batch(model, ROWS):
                torch.testing.assert_close(
                    model(ids[:, :length]).logits, want[:, :length], rtol=0.05, atol=0.05
                )
    model = filled(tiny_gpt2(), ["one", "two"], targets=["wpe", "c_attn"])
    names: list[str | None] = ["two", None, "one", "two"]
    want = one_by_one(model, names, lambda rows: model(ids[rows]).logits)
    with torch.no_grad(), lk.mixed_batch(model, names):
        torch.testing.assert_close(model(ids[:4]).logits, want, rtol=0, atol=1e-5)


def test_one_context_again_and_others_left_in_another_order() -> None:
    model = filled(tiny_llama(), ["one", "two"])
    lk.activate(model, [])
    ids = torch.arange(3, 23).view(4, -1)
    first, second = (
        lk.mixed_batch(model, (name for name in ["one", "two", None, None])),
        lk.mixed_batch(model, ["two"] * 2),
    )
    with torch.no_grad():
        base = model(ids).logits
        with first:
            want = model(ids).logits
        with first:
            assert torch.equal(model(ids).logits, want)
            with pytest.raises(lk.StateError):
                first.__enter__()
        first.__enter__()
        second.__enter__()
        assert model(ids[:2]).logits.shape[0] == 2, "the inner one has other rows"
        first.__exit__(None, None, None)
        assert not torch.allclose(model(ids[:2]).logits, base[:2])
        copied = copy.deepcopy(model)
        second.__exit__(None, None, None)
        assert torch.equal(model(ids).logits, base) and torch.equal(copied(ids).logits, base)
        lk.activate(copied, "one")


def test_another_thread_is_kept_out() -> None:
    model = filled(tiny_llama(), ["one"])
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with lk.mixed_batch(model, ["one"]):
                pass
        except lk.StateError as error:
            errors.append(error)

    with lk.mixed_batch(model, ["one"]):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "another thread" in str(errors[0])
    assert all(attached.mixed_batch is None for attached in attachments_in(model))


class Gathering(nn.Module):
    """Calls a layer with other rows than the batch's, as routed experts are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)[:5])


def test_what_cannot_be_mixed() -> None:
    model = filled(tiny_llama(), ["one", "two"])
    with (
        pytest.raises(lk.SettingError, match="'three'"),
        lk.mixed_batch(model, ["three"]),
    ):
        pass
    for names in ("one", [], [3]):
        with pytest.raises(lk.SettingError):
            lk.mixed_batch(model, names)  # type: ignore[arg-type]
    lk.activate(model, "one")
    lk.adapters(model)["one"].merge()
    with pytest.raises(lk.StateError), lk.mixed_batch(model, ["one"]):
        pass
    gathering = Gathering()
    lk.adapt(gathering, lk.LoRA(2), targets="layer", name="one")
    with pytest.raises(lk.StateError, match="5 rows"), lk.mixed_batch(gathering, ["one", None]):
        gathering(torch.ones(2, 3, 4))
