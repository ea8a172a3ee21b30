"""The five starts: they begin as the papers say, at the base model, and read PEFT's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import tiny_llama
from references import anchored, eva, lora_ga, lora_xs, olora, pissa

SHAPE = (12, 20)
ANCHORED: list[Any] = [
    lk.PiSSA(rank=4, alpha=6),
    lk.OLoRA(rank=4, alpha=6),
    lk.LoRAGA(rank=4, alpha=6),
]


def layer(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0])).double()


def initial_tensors(member: Any, model: nn.Module, **options: Any) -> dict[str, np.ndarray]:
    adapter = lk.adapt(model, member, targets="0", seed=0, **options)
    return {slot: t.detach().numpy() for slot, t in adapter.tensors.branch("0").tensors().items()}


def squared(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def output(model: Any, batch: Any) -> Tensor:
    return model(batch[0])


def batches(count: int = 3, tokens: int = 40) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(0, -2, SHAPE[1], dtype=torch.float64)

    def draw(size: int) -> Tensor:
        return torch.randn(tokens, size, generator=generator, dtype=torch.float64)

    return [(draw(SHAPE[1]) * spread, draw(SHAPE[0])) for _ in range(count)]


def close(one: Any, other: Any, rtol: float = 1e-9) -> None:
    scale = np.abs(np.asarray(other)).max()
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=rtol * scale)


def test_pissa_begins_with_the_principal_triplets() -> None:
    model = layer()
    initial = initial_tensors(lk.PiSSA(rank=4, alpha=6), model)
    W, (A, B) = (
        model[0].weight.detach().numpy(),
        pissa.start(model[0].weight.detach().numpy(), 4, 1.5),
    )
    close(initial["B"] @ initial["A"], B @ A)
    close(np.linalg.norm(initial["A"], axis=1), np.linalg.norm(A, axis=1))
    close(initial["up_0"] @ initial["down_0"], 1.5 * B @ A)
    assert np.linalg.norm(W - 1.5 * B @ A) < np.linalg.norm(W)


def test_pissa_with_a_randomised_svd() -> None:
    """On a spectrum that falls, few iterations come close; the draw is always the same."""
    models = [layer(), layer(), layer()]
    for model in models:
        U, _, Vt = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
        model[0].weight.data = U * 0.5 ** torch.arange(12.0, dtype=torch.float64) @ Vt
    members = [lk.PiSSA(rank=3), lk.PiSSA(rank=3, iterations=4), lk.PiSSA(rank=3, iterations=4)]
    exact, near, again = (initial_tensors(*each) for each in zip(members, models, strict=True))
    close(near["up_0"] @ near["down_0"], exact["up_0"] @ exact["down_0"], 1e-6)
    assert np.array_equal(near["A"], again["A"])


def test_olora_begins_with_the_qr() -> None:
    model = layer()
    initial = initial_tensors(lk.OLoRA(rank=4, alpha=6), model)
    A, B = olora.start(model[0].weight.detach().numpy(), 4)
    close(initial["B"] @ initial["A"], B @ A)
    close(initial["B"].T @ initial["B"], np.eye(4))
    close(initial["up_0"] @ initial["down_0"], 1.5 * B @ A)


def test_lora_xs_freezes_the_weights_singular_vectors() -> None:
    model = layer()
    adapter = lk.adapt(model, lk.LoRAXS(rank=4, alpha=6), targets="0", seed=0)
    tensors = {
        slot: t.detach().numpy() for slot, t in adapter.tensors.branch("0").tensors().items()
    }
    A, B = lora_xs.frozen(model[0].weight.detach().numpy(), 4)
    close(tensors["B"] @ tensors["A"], B @ A)
    assert 0 < np.abs(tensors["R"]).max() < 1e-4
    assert adapter.trainable_parameters == lora_xs.trained_parameters(4)


def test_lora_ga_begins_with_the_mean_gradients_triplets() -> None:
    model, data = layer(), batches()
    model[0].weight.requires_grad_(True)
    gradients = []
    for batch in data:
        model.zero_grad()
        squared(model, batch).backward()
        gradients.append(model[0].weight.grad.numpy().copy())
    model.zero_grad()
    initial = initial_tensors(lk.LoRAGA(rank=4, alpha=6), model, probe=data, loss=squared)
    A, B = lora_ga.start(lora_ga.triplets(lora_ga.mean_gradient(gradients), 4))
    close(np.abs(np.sum(initial["A"] * A, 1)), np.sum(A * A, 1))  # up to the sign of each triplet
    close(np.abs(np.sum(initial["B"] * B, 0)), np.sum(B * B, 0))


def test_lora_ga_looks_at_its_first_batches_alone_and_leaves_no_gradient() -> None:
    data = batches(4)
    some, all_of_it = (
        initial_tensors(lk.LoRAGA(rank=2, first_batches=2), model, probe=probe, loss=squared)
        for model, probe in ((layer(), data), (layer(), data[:2]))
    )
    assert np.array_equal(some["A"], all_of_it["A"])
    model = layer()
    initial_tensors(lk.LoRAGA(rank=2), model, probe=data, loss=squared)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_eva_begins_with_what_inputs_vary_along_most() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 16)).double()
    data = batches()
    seen: dict[str, list[np.ndarray]] = {"0": [], "2": []}
    for x, _ in data:
        seen["0"].append(x.numpy())
        seen["2"].append(model[:2](x).detach().numpy())
    adapter = lk.adapt(
        model, lk.EVA(rank=3, alpha=6, tau=0.9), targets=["0", "2"], probe=data,
        loss=output,
    )  # fmt: skip
    wanted = eva.start(seen, {"0": 3, "2": 3}, rho=2.0, tau=0.9)
    for path, A in wanted.items():
        branch = adapter.tensors.branch(path)
        close(branch.A.detach().numpy(), A, 1e-7)
        assert not branch.B.any()
        assert branch.method.parametrisation.scaling == pytest.approx(2.0)
    assert sum(len(A) for A in wanted.values()) == 6


def test_eva_leaves_out_what_explains_nothing_and_moves_ranks_to_what_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 16)).double()
    model[0].weight.data[:] = 0  # so that the second layer is given a constant
    adapter = lk.adapt(
        model, lk.EVA(rank=2, alpha=4), targets=["0", "1"], probe=batches(), loss=output
    )
    assert list(adapter.placement.methods) == ["0"]
    assert adapter.tensors.branch("0").A.shape == (4, 20)


@pytest.mark.parametrize("member", ANCHORED, ids=lambda m: m.word)
def test_an_anchored_start_is_the_base_and_trains_as_the_paper(member: Any) -> None:
    """To the bit at the start; then it is LoRA on the residual, in the reference's float64."""
    model, data = layer(), batches(1)
    (x, y), before = data[0], layer()(data[0][0])
    given = {"probe": data, "loss": squared} if member.needs & {"gradients"} else {}
    adapter = lk.adapt(model, member, targets="0", seed=0, **given)
    assert torch.equal(model(x), before)
    initial = {
        slot: t.detach().clone().numpy()
        for slot, t in adapter.tensors.branch("0").tensors().items()
    }
    assert adapter.trainable_parameters == anchored.trained_parameters(*SHAPE, 4)

    optimizer, losses = adapter.optimizer(torch.optim.AdamW, lr=1e-2, fused=False), []
    for _ in range(20):
        loss = squared(model, (x, y))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    W0, bias = (t.detach().numpy() for t in (layer()[0].weight, layer()[0].bias))
    A, B, wanted = anchored.train_anchored(
        x.numpy(), y.numpy(), W0, bias, initial["A"], initial["B"], 1.5, 20, 1e-2
    )
    close(losses, wanted)
    pair = adapter.tensors.pair_now("0")
    close(
        W0 + (pair.up @ pair.down).detach().numpy(),
        anchored.weight(W0, A, B, 1.5, initial["A"], initial["B"]),
    )


@pytest.mark.parametrize("member", [*ANCHORED, lk.LoRAXS(rank=4)], ids=lambda m: m.word)
def test_what_training_never_reached_is_said(member: Any, tmp_path: Path) -> None:
    model, data = layer(), batches(1)
    given = {"probe": data, "loss": squared} if member.needs & {"gradients"} else {}
    adapter = lk.adapt(model, member, targets="0", **given)
    with pytest.warns(lk.LorakinWarning, match="0"):
        adapter.save(tmp_path / "untrained")
    optimizer = adapter.optimizer(lr=1e-2)
    squared(model, data[0]).backward()
    optimizer.step()
    adapter.save(tmp_path / "trained")


def test_lora_plus_speeds_up_the_outputs_factor_where_nothing_starts_at_zero() -> None:
    adapter = lk.adapt(tiny_llama(), [lk.PiSSA(rank=2), lk.LoRAPlus(ratio=8)])
    branch = next(adapter.tensors.branch(path) for path in adapter.placement.methods)
    rates = {id(p): g["lr"] for g in adapter.parameter_groups(lr=1e-3) for p in g["params"]}
    assert rates[id(branch.B)] == pytest.approx(8e-3)
    assert rates[id(branch.A)] == pytest.approx(1e-3)
    assert id(branch.up_0) not in rates


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([lk.EVA(rank=2)], "probe=batches"),
        ([lk.LoRAGA(rank=2)], "probe=batches"),
        ([lk.LoRAGA(rank=7)], "most 6"),
        ([lk.PiSSA(rank=13)], "most 12"),
        ([lk.PiSSA(rank=2), lk.LoRADrop(importance={"0": 1.0})], "rest"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].word,
)
def test_what_a_start_cannot_do(members: list[Any], said: str) -> None:
    probe = (
        batches() if "probe" not in said and members[0].needs & {"inputs", "gradients"} else None
    )
    model = layer()
    with pytest.raises(lk.SettingError, match=said):
        lk.adapt(model, members, targets="0", probe=probe, loss=squared)
    assert type(model[0]) is nn.Linear


def test_an_embedding_has_no_start() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8))
    with pytest.raises(lk.SettingError, match="embedding"):
        lk.adapt(model, lk.PiSSA(rank=2), targets=["0", "1"])


def test_a_method_without_a_start_takes_no_probe() -> None:
    with pytest.raises(lk.SettingError, match="lora"):
        lk.adapt(layer(), lk.LoRA(rank=2), targets="0", probe=batches())


def test_the_modules_that_see_one_input_share_what_is_found() -> None:
    """q, k and v of a Llama, and padding counts for nothing."""
    model = tiny_llama().double()
    ids = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    padded, cut = (
        lk.adapt(
            tiny_llama().double(), lk.EVA(rank=2, rho=1), targets=["q_proj", "k_proj"], probe=[b]
        )
        for b in (
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": ids[:, :30], "attention_mask": mask[:, :30]},
        )
    )
    del model
    for path in padded.placement.methods:
        torch.testing.assert_close(
            padded.tensors.branch(path).A, cut.tensors.branch(path).A, rtol=1e-6, atol=1e-8
        )
    q, k = (padded.tensors.branch(f"model.layers.0.self_attn.{name}_proj").A for name in "qk")
    assert torch.equal(q, k)


def test_a_start_needs_a_signal() -> None:
    """No gradient, no call of a module, NaN: said before anything is changed; nothing varies: no NaN."""
    x, y = batches(1)[0]
    still = lambda model, batch: model(batch[0]).sum() * 0.0  # noqa: E731
    for member, batch, run in (
        (lk.LoRAGA(rank=2), (x, y), still),
        (lk.LoRAGA(rank=2), (x * float("nan"), y), squared),
        (lk.EVA(rank=2), (x * float("nan"), y), output),
    ):
        model = layer()
        with pytest.raises(lk.SettingError, match="0"):
            lk.adapt(model, member, "0", probe=[batch], loss=run)
        assert type(model[0]) is nn.Linear
    model = nn.Sequential(layer()[0])
    lk.adapt(
        model, lk.EVA(rank=2, rho=1, whiten=True), "0", probe=[(torch.ones_like(x), y)], loss=output
    )
    assert model(x).isfinite().all()


def test_a_module_that_the_batches_never_call_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(20, 12), "spare": nn.Linear(20, 12)}).double()
    for member in (lk.EVA(rank=2, rho=1), lk.LoRAGA(rank=2)):
        with pytest.raises(lk.SettingError, match="spare"):
            lk.adapt(
                model, member, ["used", "spare"], probe=batches(),
                loss=lambda m, batch: m["used"](batch[0]).square().mean(),
            )  # fmt: skip


def test_other_adapters_are_not_measured_along() -> None:
    """The new adapter will be active alone."""
    plain, busy = layer(), layer()
    other = lk.adapt(busy, lk.LoRA(rank=2), "0", name="other")
    other.tensors.branch("0").B.data.fill_(1.0)
    initial = [
        initial_tensors(lk.LoRAGA(rank=2), model, probe=batches(), loss=squared, name="new")["A"]
        for model in (plain, busy)
    ]
    close(initial[1], initial[0])
