"""Adapters in a model: it stays itself, adapters come and go, and nothing else's training changes."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama

MODELS = [tiny_llama, tiny_gpt2, tiny_bert]


@pytest.mark.parametrize("make", MODELS)
def test_the_base_stays_itself(make, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    model = make()
    cls, keys, before = type(model), set(model.state_dict()), model(ids).logits
    names = {name for name, _ in model.named_modules()}
    adapter = lk.adapt(model, lk.LoRA(rank=4))
    assert type(model) is cls
    assert keys <= set(model.state_dict()), "what was there keeps its key"
    assert all(".lorakin." in key for key in set(model.state_dict()) - keys)
    assert names <= {name for name, _ in model.named_modules()}
    assert all(
        isinstance(model.get_submodule(path), nn.Module) for path in adapter.placement.methods
    )
    assert torch.equal(model(ids).logits, before), "a fresh adapter is the identity to the bit"
    adapter.remove()
    assert not lk.adapters(model)
    assert set(model.state_dict()) == keys
    assert not any("Adapted" in type(module).__name__ for module in model.modules())
    assert "_lorakin" not in model.__dict__
    assert torch.equal(model(ids).logits, before)


def test_training_changes_the_adapter_and_nothing_else(ids: Tensor) -> None:
    model = tiny_llama()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    adapter = lk.adapt(model, lk.LoRA(rank=4))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.lorakin.default.{slot}" for path in adapter.placement.methods for slot in "AB"
    }
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    now = model.state_dict()
    assert all(torch.equal(now[key], t) for key, t in before.items())


def test_flags_of_the_base_come_back(ids: Tensor) -> None:
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    first = lk.adapt(model, lk.LoRA(rank=2), name="first")
    second = lk.adapt(model, lk.LoRA(rank=2), name="second")
    first.remove()
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lorakin." not in n)
    second.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_flags_of_what_merging_parts_come_back() -> None:
    model = tiny_llama(tied=True)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "embed_tokens"))
    adapter.merge(permanent=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(p.requires_grad for p in model.parameters())


def test_trainability_is_data(ids: Tensor) -> None:
    """Law 7: switching, disabling, merging and loading change no requires_grad."""
    model = tiny_llama()
    one = lk.adapt(model, lk.LoRA(rank=2), name="one")
    two = lk.adapt(model, lk.LoRA(rank=2), name="two")

    def flags() -> dict[str, bool]:
        return {name: p.requires_grad for name, p in model.named_parameters()}

    expected = flags()
    assert all(p.requires_grad for p in one.parameters() + two.parameters())
    lk.activate(model, "one")
    assert flags() == expected
    with one.disabled():
        assert flags() == expected
    one.merge()
    assert flags() == expected
    one.unmerge()
    lk.activate(model, [])
    assert flags() == expected


def test_loading_freezes_only_what_it_loads(tmp_path, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2))).save(tmp_path)
    model = tiny_llama()
    loaded = lk.load(model, tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lorakin." not in n), (
        "the base is as it was"
    )
    with pytest.raises(lk.SettingError, match="nothing to train; load it with trainable=True"):
        loaded.optimizer(lr=1e-3)
    again = lk.load(model, tmp_path, name="again", trainable=True)
    assert all(p.requires_grad for p in again.parameters())
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if ".lorakin.again" not in n
    )


def test_several_adapters_add_switch_stack_and_go(ids: Tensor) -> None:
    model = tiny_llama().double()
    base = model(ids).logits
    one = randomise(lk.adapt(model, lk.LoRA(rank=2), name="one"), seed=1)
    assert one.is_active
    y1 = model(ids).logits
    two = randomise(
        lk.adapt(model, lk.LoRA(rank=3), "q_proj", name="keys"), seed=2
    )  # a name like a dict's method
    assert not one.is_active, "the newest adapter is the active one"
    y2 = model(ids).logits
    lk.activate(model, ["one", "keys"])
    both = model(ids).logits
    assert min((both - y).abs().max() for y in (y1, y2, base)) > 1e-4
    with two.disabled():
        assert torch.equal(model(ids).logits, y1)
        with one.disabled():
            assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, both)
    lk.activate(model, [])
    assert torch.equal(model(ids).logits, base)
    lk.activate(model, "one")
    assert torch.equal(model(ids).logits, y1)
    assert set(lk.adapters(model)) == {"one", "keys"}
    one.remove()
    lk.activate(model, "keys")
    assert torch.equal(model(ids).logits, y2)
    two.remove()
    assert torch.equal(model(ids).logits, base)


def test_disabling_overlaps_and_leaves_nothing_stale(ids: Tensor) -> None:
    model = tiny_llama()
    base = model(ids).logits
    one = randomise(lk.adapt(model, lk.LoRA(rank=2), name="one"))
    y = model(ids).logits
    first, second = one.disabled(), one.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, base)
    second.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, y)
    with one.disabled():
        two = randomise(lk.adapt(model, lk.LoRA(rank=2), "q_proj", name="two"))
        with pytest.raises(lk.StateError, match="'one' is disabled at the moment"):
            one.merge()
    assert two.is_active
    assert not one.is_active
    two.remove()
    lk.activate(model, ["one", "one"])
    assert torch.equal(model(ids).logits, y), "named twice is active once"


def test_stacking_adds_the_changes() -> None:
    linear = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    base = linear(x)
    changes = []
    for name in "ab":
        randomise(lk.adapt(linear, lk.LoRA(rank=2), "0", name=name), seed=ord(name))
        changes.append(linear(x) - base)
    lk.activate(linear, ["a", "b"])
    torch.testing.assert_close(linear(x), base + changes[0] + changes[1])


def test_calls_that_the_state_forbids(ids: Tensor) -> None:
    model = tiny_llama()
    one = lk.adapt(model, lk.LoRA(rank=2), name="one")
    with pytest.raises(lk.SettingError, match="already has an adapter 'one'"):
        lk.adapt(model, lk.LoRA(rank=2), name="one")
    with pytest.raises(lk.SettingError, match="no adapter 'two' in the model; there are: 'one'"):
        lk.activate(model, "two")
    for name in ("half", "train"):
        with pytest.raises(lk.SettingError, match=f"cannot be called '{name}'"):
            lk.adapt(model, lk.LoRA(rank=2), name=name)
    for name in ("a.b", "", "a/b"):
        with pytest.raises(lk.SettingError, match="name must be text without"):
            lk.adapt(model, lk.LoRA(rank=2), name=name)
    one.merge()
    with pytest.raises(lk.StateError, match="'one' is merged; unmerge it before adding another"):
        lk.adapt(model, lk.LoRA(rank=2), name="two")
    with pytest.raises(lk.StateError, match="unmerge it before switching"):
        lk.activate(model, [])
    one.remove()
    with pytest.raises(lk.StateError, match="no longer in the model"):
        one.merge()


def test_a_failed_adapt_leaves_the_model_as_it_was(ids: Tensor) -> None:
    model = tiny_llama()
    keys, flags = set(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(lk.SettingError, match="rank 33.*model.layers.0.self_attn.q_proj.*32 × 32"):
        lk.adapt(model, lk.LoRA(rank=33))
    with pytest.raises(lk.SettingError, match="up_proj.*48 × 32.*32"):
        lk.adapt(model, lk.LoRA(rank=40), "up_proj")
    with pytest.raises(lk.TargetError):
        lk.adapt(model, lk.LoRA(rank=2), "nothing_like_it")
    assert set(model.state_dict()) == keys
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert "_lorakin" not in model.__dict__


def test_rank_and_alpha_of_their_own() -> None:
    model = tiny_llama()
    adapter = lk.adapt(
        model,
        lk.LoRA(rank=4, alpha=8, rslora=True),
        rank_pattern={"layers.0.self_attn.q_proj": 6, "q_proj": 5},
        alpha_pattern={"v_proj": 3},
    )
    members = adapter.placement.methods
    assert adapter.tensors.branch("model.layers.0.self_attn.q_proj").A.shape == (6, 32)
    assert adapter.tensors.branch("model.layers.1.self_attn.q_proj").A.shape == (5, 32)
    assert members["model.layers.0.self_attn.q_proj"].parametrisation.scaling == pytest.approx(
        8 / 6**0.5
    )
    assert members["model.layers.0.self_attn.v_proj"].parametrisation.scaling == pytest.approx(
        3 / 4**0.5
    )
    assert members["model.layers.0.mlp.up_proj"].parametrisation.scaling == pytest.approx(
        8 / 4**0.5
    )
    for part in ("proj", "layers.0", "self_attn"):  # a key is the end of the path, from a dot on
        with pytest.raises(lk.TargetError, match=f"rank_pattern: '{part}' matches none"):
            lk.adapt(tiny_llama(), lk.LoRA(rank=4), rank_pattern={part: 2})
    with pytest.raises(lk.TargetError, match="rank_pattern: 'q_prj' matches none"):
        lk.adapt(tiny_llama(), lk.LoRA(rank=4), rank_pattern={"q_prj": 2})
    with pytest.raises(lk.TargetError, match="not a regular expression"):
        lk.adapt(tiny_llama(), lk.LoRA(rank=4), alpha_pattern={"(": 2})


def test_modules_trained_whole(ids: Tensor) -> None:
    model = tiny_bert()
    base, head = model(ids).logits, model.classifier.weight.clone()
    adapter = lk.adapt(model, lk.LoRA(rank=2), "query", modules_to_save="classifier")
    assert torch.equal(model(ids).logits, base)
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        model(ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(ids).logits
    assert torch.equal(model.classifier.weight, head), "the base's own head is untouched"
    assert not torch.equal(adapter.tensors.copy_of("classifier").weight, head)
    with adapter.disabled():
        assert torch.equal(model(ids).logits, base)
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.classifier.weight, adapter.tensors.copy_of("classifier").weight)
    adapter.unmerge()
    assert torch.equal(model.classifier.weight, head)
    lk.adapt(model, lk.LoRA(rank=2), "query", modules_to_save=["classifier"], name="other")
    with pytest.raises(lk.SettingError, match="both train classifier whole"):
        lk.activate(model, ["default", "other"])
    with pytest.raises(lk.StateError, match="classifier"):
        lk.adapt(model, lk.LoRA(rank=1), "classifier", name="third")


def test_a_sequential_head(ids: Tensor) -> None:
    model = tiny_bert()
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))
    base = model(ids).logits
    adapter = lk.adapt(model, lk.LoRA(rank=2), "query", modules_to_save=["classifier"])
    assert torch.equal(model(ids).logits, base)
    randomise(adapter)
    trained = model(ids).logits
    with adapter.disabled():
        assert torch.equal(model(ids).logits, base)
    assert len(model.classifier) == 3
    assert isinstance(model.classifier[-1], nn.Linear)
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(ids).logits, trained, rtol=1e-4, atol=1e-5)
    adapter.remove()
    assert type(model.classifier) is nn.Sequential
    assert torch.equal(model(ids).logits, base)


def test_hooks_of_a_whole_module_run_once(ids: Tensor) -> None:
    model = tiny_bert()
    model.classifier.register_forward_hook(lambda module, x, out: out + 1)
    base = model(ids).logits
    lk.adapt(model, lk.LoRA(rank=2), "query", modules_to_save=["classifier"])
    assert torch.equal(model(ids).logits, base)


def test_tied_tensors_in_a_whole_module_train_once() -> None:
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    adapter = lk.adapt(
        nn.ModuleDict({"fc": nn.Linear(4, 4), "pair": pair}),
        lk.LoRA(rank=1),
        "fc",
        modules_to_save=["pair"],
    )
    held = [p for group in adapter.parameter_groups(lr=1.0) for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == 5
    assert adapter.trainable_parameters == 8 + 16 + 4 + 4


def test_whole_modules_are_copied_without_other_adapters(ids: Tensor) -> None:
    model = tiny_bert()
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
    lk.adapt(model, lk.LoRA(rank=2), "classifier.0", name="inner")
    outer = lk.adapt(model, lk.LoRA(rank=2), "query", modules_to_save=["classifier"], name="outer")
    assert not any("lorakin" in name for name, _ in outer.named_parameters())
    with pytest.raises(
        lk.SettingError,
        match="'inner' adapts classifier.0, inside classifier, which 'outer' trains whole",
    ):
        lk.activate(model, ["inner", "outer"])


def test_a_class_that_was_changed_after_adapting_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = lk.adapt(model, lk.LoRA(rank=2))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(lk.StateError, match="was changed after it was adapted"):
        adapter.remove()


def test_offloaded_layers_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama()
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(
        lk.TargetError, match="q_proj cannot be adapted: it is offloaded by Accelerate"
    ):
        lk.adapt(model, lk.LoRA(rank=2), "q_proj")


def test_only_a_head_can_be_trained(ids: Tensor) -> None:
    adapter = lk.adapt(tiny_bert(), lk.LoRA(), [], modules_to_save=["classifier"])
    assert adapter.trainable_parameters == 2 * 32 + 2


def test_deepcopy_and_pickle(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    y = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, y)
        other = lk.adapters(twin)["default"]
        assert other is not adapter
        assert other.model is twin
        randomise(other, seed=9)
        assert not torch.equal(twin(ids).logits, y)
        other.remove()
        assert torch.equal(model(ids).logits, y), "the copies share nothing"


def test_a_model_and_its_adapters_are_freed_together() -> None:
    model = tiny_llama()
    lk.adapt(model, lk.LoRA(rank=2))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_save_pretrained_writes_the_base_alone(tmp_path, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama()
    base = model(ids).logits
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    model.save_pretrained(tmp_path / "base")
    again, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert torch.equal(again(ids).logits, base)
    adapter.merge(permanent=True)
    y = model(ids).logits
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(type(model).from_pretrained(tmp_path / "merged")(ids).logits, y)


def test_a_state_dict_without_the_adapter_is_loud() -> None:
    model = tiny_llama()
    base = copy.deepcopy(model.state_dict())
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    with pytest.warns(
        lk.LorakinWarning, match=r"no tensors for 28 entries .*prepare_trainer\(trainer\)"
    ):
        model.load_state_dict(base, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())
        adapter.remove()
        model.load_state_dict(base)


def test_generate_and_the_cache(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)), 0.3)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    with adapter.disabled():
        assert not torch.equal(model.generate(ids, **settings), cached)
    adapter.merge()
    assert torch.equal(model.generate(ids, **settings), cached)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(ids: Tensor, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tiny_llama().train()
        adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
        if checkpointing:
            enable = (
                getattr(model, "activation_checkpointing_enable", None)
                or model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in adapter.parameters()]

    for with_it, without in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(with_it, without)


def test_dropout_is_redrawn_alike_under_checkpointing() -> None:
    linear = nn.Sequential(nn.Linear(6, 6)).train()
    randomise(lk.adapt(linear, lk.LoRA(rank=2, dropout=0.5), "0"))
    x = torch.randn(4, 6, requires_grad=True)
    torch.manual_seed(3)
    linear(x).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    torch.manual_seed(3)
    checkpoint(linear, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


def test_autocast(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
        torch.testing.assert_close(model(ids).logits.float(), exact, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_compile_makes_one_graph() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    x = torch.randn(5, 8)
    y = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with adapter.disabled():
        assert (compiled(x) - y).abs().max() > 1e-3, "switching off is seen by the compiled model"
    assert list(lk.adapters(compiled)) == ["default"]


def test_moving_the_model_moves_the_adapter() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(rank=2))
    model.to(torch.float64)
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    model.to("meta")
    assert {p.device.type for p in adapter.parameters()} == {"meta"}


def test_models_that_accelerate_spread_over_devices(ids: Tensor) -> None:
    """Accelerate's hooks call the forward that the module had when they were attached."""
    hooks = pytest.importorskip("accelerate.hooks")
    expected = tiny_llama()
    randomise(lk.adapt(expected, lk.LoRA(rank=2)))
    model = tiny_llama()
    base = model(ids).logits
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    adapter.remove()
    assert torch.equal(model(ids).logits, base)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(ids).logits, base)


def test_a_module_whose_forward_is_shadowed_is_refused() -> None:
    model = tiny_llama()
    model.lm_head.forward = lambda x: x
    with pytest.raises(
        lk.StateError, match="lm_head cannot be adapted: its forward was replaced on the instance"
    ):
        lk.adapt(model, lk.LoRA(rank=2), ["q_proj", "lm_head"])
    assert not lk.adapters(model)


def test_a_module_that_was_replaced_is_noticed() -> None:
    model = tiny_llama(tied=False)
    adapter = lk.adapt(model, lk.LoRA(rank=2), ["embed_tokens", "q_proj"])
    model.resize_token_embeddings(70)
    with pytest.raises(
        lk.StateError,
        match=r"model.embed_tokens is now 32 × 70, .* made for 32 × 64: .* resize_token_embeddings",
    ):
        adapter.merge()
    model.model.embed_tokens = nn.Embedding(64, 32)
    with pytest.raises(
        lk.StateError, match=r"model.embed_tokens is no longer the module that was adapted"
    ):
        adapter.merge()
    adapter.remove()
    assert not lk.adapters(model)


@pytest.mark.parametrize("member", [lk.LoRA, "lora", None, [lk.LoRA], 3])
def test_a_member_is_an_instance(member) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(lk.SettingError, match=r"such as lk.LoRA\(rank=16\), not "):
        lk.adapt(tiny_llama(), member)


def test_one_name_through_two_roots_is_refused() -> None:
    model = tiny_llama()
    lk.adapt(model.model, lk.LoRA(rank=2))
    with pytest.raises(
        lk.StateError, match="already has an adapter 'default', put there through another part"
    ):
        lk.adapt(model, lk.LoRA(rank=2))


def test_the_seed_decides_the_draw() -> None:
    def draw(seed: int | None) -> Tensor:
        return lk.adapt(tiny_llama(), lk.LoRA(rank=2), seed=seed).parameters()[0]

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(draw(None), draw(None)), (
        "without one, torch's own seed, which tiny_llama sets"
    )


def test_the_repr_says_what_it_is() -> None:
    adapter = lk.adapt(tiny_llama(), lk.LoRA(rank=2))
    assert repr(adapter).startswith("Adapter('default', lora on LoRA(rank=2, alpha=32.0")
    assert "14 modules, " in repr(adapter) and repr(adapter).endswith("train, active)")
