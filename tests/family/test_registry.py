"""A member from outside: CONTRIBUTING.md's examples, by decorator and by entry point."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import tiny_llama
from lorakin.cli.app import run as cli
from lorakin.family import Modifier, Slot, member_named, registry

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
EXAMPLE = EXAMPLES[0]


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_MEMBERS", dict(registry._MEMBERS))
    monkeypatch.setattr(registry, "_entry_points_loaded", False)


@pytest.fixture
def examples(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with CONTRIBUTING.md's examples, which their decorators have registered."""
    module: Any = types.ModuleType("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    for example in EXAMPLES:
        exec(example, vars(module))
    return module


@pytest.fixture
def gained(examples: Any) -> Any:
    """The class of CONTRIBUTING.md's first example."""
    return examples.Gained


@pytest.fixture
def package(
    tmp_path: Path, fresh_registry: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The same as an installed package, with an entry point and no import of it by anyone."""
    site = tmp_path / "site"
    info = site / "outside_member-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "outside_member.py").write_text(EXAMPLE.replace("@lk.register\n", ""))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-member\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("outside_member\n")
    (info / "entry_points.txt").write_text("[lorakin.members]\ngained = outside_member:Gained\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    importlib.invalidate_caches()
    yield site
    sys.modules.pop("outside_member", None)


def trained(members: Any, ids: Tensor) -> tuple[Any, lk.Adapter]:
    model = tiny_llama()
    adapter = lk.adapt(model, members, seed=0)
    optimizer = adapter.optimizer(lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapter


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Gained", {}),
        ("Strength", {"rank": 2}),
        ("LongestRows", {"rank": 2}),
        ("Clamped", {"rank": 2, "largest": 0.01}),
    ],
)
def test_each_example_trains_saves_and_loads(
    name: str, settings: dict[str, Any], examples: Any, ids: Tensor, tmp_path: Path
) -> None:
    member = getattr(examples, name)(**settings)
    before = tiny_llama()(ids).logits
    model, adapter = trained(member, ids)
    logits = model(ids).logits
    assert not torch.equal(logits, before)
    adapter.save(tmp_path)
    again = tiny_llama()
    assert lk.load(again, tmp_path).method.agrees_with(adapter.method)
    assert torch.equal(again(ids).logits, logits)
    adapter.remove()
    assert torch.equal(model(ids).logits, before)


def test_the_examples_do_what_they_say(examples: Any, ids: Tensor) -> None:
    """The start begins exactly at the base; the factor trains; the rule clamps every step."""
    model = tiny_llama()
    before = model(ids).logits
    lk.adapt(model, examples.LongestRows(rank=2))
    assert torch.equal(model(ids).logits, before)

    model, seen = tiny_llama(), {}
    adapter = lk.adapt(model, examples.InputDirections(rank=2), probe=[{"input_ids": ids}])
    assert torch.equal(model(ids).logits, before)
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.update(x=args[0])
    )
    model(ids)
    hook.remove()
    x = seen["x"].reshape(-1, seen["x"].shape[-1])
    A = adapter.tensors.branch("model.layers.1.mlp.down_proj").A
    want = torch.linalg.svd(x).Vh[:2]
    torch.testing.assert_close(A.T @ A, want.T @ want, rtol=0, atol=1e-4)

    def tensors(member: Any) -> dict[str, Tensor]:
        _, adapter = trained(member, ids)
        return dict(adapter.tensors.branch(next(iter(adapter.placement.methods))).tensors())

    assert tensors(examples.Strength(rank=2))["c"] != 1
    clamped = tensors(examples.Clamped(rank=2, largest=0.01))
    assert all(0 < clamped[slot].abs().max() <= 0.01 for slot in "AB")


def test_the_entry_point_of_contributing(examples: Any) -> None:
    lines = re.search(r"```toml\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert lines is not None
    [(group, entries)] = tomllib.loads(lines[1])["project"]["entry-points"].items()
    assert group == registry.GROUP
    assert {word: hasattr(examples, at.partition(":")[2]) for word, at in entries.items()} == {
        "gained": True
    }


def test_the_example_of_contributing(gained: Any, ids: Tensor, tmp_path: Path) -> None:
    """It trains, combines, saves and loads, here and in PEFT, without a change to lorakin."""
    model, adapter = trained([gained(), lk.LoRAPlus(ratio=8)], ids)
    branch = next(adapter.tensors.branch(path) for path in adapter.placement.methods)
    rates = {id(p): g["lr"] for g in adapter.parameter_groups(lr=1e-3) for p in g["params"]}
    assert [rates[id(branch.get_parameter(slot))] for slot in "ABg"] == pytest.approx(
        [1e-3, 8e-3, 1e-3]
    )

    adapter.save(tmp_path)
    again = tiny_llama()
    assert lk.load(again, tmp_path).method.words == "gained,lora+"
    assert torch.equal(again(ids).logits, model(ids).logits)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_second_gain_is_refused(gained: Any) -> None:
    with pytest.raises(lk.SettingError, match="gained and dora"):
        lk.adapt(tiny_llama(), [gained(), lk.DoRA()])


def test_its_word_is_its_own(gained: Any) -> None:
    assert member_named("gained") is gained
    other = type("Other", (gained,), {"word": "lora", "__module__": "elsewhere"})
    with pytest.raises(lk.SettingError, match="'lora'"):
        lk.register(other)
    with pytest.raises(lk.SettingError):
        lk.register(gained())


def test_a_member_says_what_it_decides() -> None:
    with pytest.raises(lk.SettingError, match="Silent"):
        type("Silent", (lk.DoRA.__mro__[1],), {"word": "silent"})


def test_tensors_that_no_slot_declares_are_refused(gained: Any) -> None:
    start = gained.start
    gained.start = lambda *given: {**start(*given), "more": torch.zeros(1)}
    with pytest.raises(lk.SettingError, match="'more'"):
        lk.adapt(tiny_llama(), gained())


def test_the_command_finds_a_package(
    package: Path, model_dir: str, ids: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It shows, plans, trains, compares (in other processes) and inspects a package's member."""
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"the cat sat on mat {n}"}) + "\n" for n in range(64))
    )
    common = ["--model", model_dir, "--data", str(data), "--batch-size", "4", "--dtype", "float32"]
    out = str(tmp_path / "trained")

    def run(*arguments: str) -> str:
        assert cli(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "gained" in run("methods")
    plan = json.loads(run("plan", "--model", model_dir, "--method", "gained", "--json"))
    assert plan["methods"][0]["trainable_parameters"] > 0
    run("train", *common, "--method", "gained", "--steps", "2", "--out", out)
    assert "gained" in run("inspect", out)
    compared = tmp_path / "compared"
    run(
        "compare", *common, "--methods", "gained", "--budget", "steps=4", "--seeds", "2",
        "--lr-sweep", "1e-2", "--out", str(compared),
    )  # fmt: skip
    rows = [json.loads(line) for line in (compared / "results.jsonl").read_text().splitlines()]
    assert any(row["trial"]["arm"] == "gained" and row["status"] == "done" for row in rows)


def test_files_of_a_package_that_is_not_there_name_it(
    package: Path, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = trained(member_named("gained")(), ids)
    adapter.save(tmp_path / "adapter")
    monkeypatch.setattr(
        registry, "_MEMBERS", {k: v for k, v in registry._MEMBERS.items() if k != "gained"}
    )
    with pytest.raises(lk.AdapterError, match="outside-member"):
        lk.load(tiny_llama(), tmp_path / "adapter")


def test_two_pairs_never_combine_whatever_they_decide(gained: Any) -> None:
    other = type("Other", (gained,), {"word": "other", "decides": {"something": "of its own"}})
    for pair in ([lk.LoRA(), other()], [other(), lk.VeRA()]):
        with pytest.raises(lk.SettingError, match="other"):
            lk.adapt(tiny_llama(), pair)


def test_a_member_is_checked_before_it_is_used(gained: Any) -> None:
    """An axis that is nearly one of ours, a class that is no frozen dataclass, slots that do not fit."""
    near = type("Near", (gained,), {"word": "near", "decides": {"paramtrisation": "typed wrongly"}})
    with pytest.raises(lk.SettingError, match="parametrisation"):
        lk.adapt(tiny_llama(), near())
    fewer = type(
        "Fewer", (gained,), {"word": "fewer", "slots": {**gained.slots, "h": gained.slots["g"]}}
    )
    with pytest.raises(lk.SettingError, match="'h'"):
        lk.adapt(tiny_llama(), fewer())
    wrong = {**gained.slots, "A": Slot((2, "inputs"))}
    with pytest.raises(lk.SettingError, match="'A'"):
        lk.adapt(tiny_llama(), type("Wrong", (gained,), {"word": "wrong", "slots": wrong})())

    class Thawed(lk.VeRA.__mro__[1]):  # type: ignore[misc]
        word = "thawed"
        dropout = 0.0

    with pytest.raises(lk.SettingError, match="frozen dataclass"):
        lk.adapt(tiny_llama(), Thawed())


def test_a_broken_package_troubles_nobody_else(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = package / "outside_member-1.0.dist-info" / "entry_points.txt"
    entry.write_text("[lorakin.members]\nbroken = not_there:Nope\n")
    importlib.invalidate_caches()
    with pytest.warns(lk.LorakinWarning, match="not_there"):
        assert member_named("lora") is lk.LoRA


def test_a_modifier_on_an_axis_of_its_own_acts_before_a_gain(examples: Any, ids: Tensor) -> None:
    model = tiny_llama()
    before = model(ids).logits
    adapter = lk.adapt(model, [lk.DoRA(rank=2), examples.Strength()])
    assert adapter.method.words == "strength,dora"
    assert torch.equal(model(ids).logits, before)


def test_a_start_that_is_not_as_declared_is_refused(gained: Any) -> None:
    start = gained.start
    gained.start = lambda *given: {slot: t + 1 for slot, t in start(*given).items()}
    with pytest.raises(lk.SettingError, match="'B'"):
        lk.adapt(tiny_llama(), gained())


def test_a_trained_slot_that_no_change_uses_is_named(gained: Any, ids: Tensor) -> None:
    gained.slots = {**gained.slots, "idle": Slot((1,))}
    start = gained.start
    gained.start = lambda *given: {**start(*given), "idle": torch.ones(1)}
    with pytest.warns(lk.LorakinWarning, match="idle"):
        trained(gained(), ids)


def test_a_setting_that_no_file_can_hold_is_refused_at_once(fresh_registry: None) -> None:
    @lk.register
    @dataclass(frozen=True)
    class Odd(Modifier):
        word: ClassVar[str] = "odd"
        decides: ClassVar[dict[str, str]] = {"odd": "an oddity"}
        paper: ClassVar[str] = "none"

        where: Path | None = None

    lk.adapt(tiny_llama(), Odd())
    with pytest.raises(lk.SettingError, match="where"):
        lk.adapt(tiny_llama(), Odd(Path("here")))


@dataclass(frozen=True)
class RankGate(lk.family.Parametrisation):
    """LoRA with a trained factor for each rank."""

    word: ClassVar[str] = "rank-gate"
    slots: ClassVar[dict[str, Slot]] = {
        "A": Slot(("rank", "inputs")),
        "B": Slot(("outputs", "rank"), starts_at_zero=True),
        "e": Slot(("rank",)),
    }
    rank: int = 4
    dropout: float = 0.0

    def start(self, module: Any, generator: Any, device: Any) -> dict[str, Tensor]:
        shape = module.shape
        A = torch.randn(self.rank, shape.inputs, generator=generator)
        return {"A": A, "B": torch.zeros(shape.outputs, self.rank), "e": torch.ones(self.rank)}

    def change(self, tensors: Any) -> Any:
        return lk.family.LowRank(tensors["B"] * tensors["e"], tensors["A"])


@pytest.mark.parametrize(
    "beside", [[], [lk.AdaLoRA(target_rank=2, start=1, finish=2)], [lk.DoRA()]]
)
def test_a_pair_with_a_factor_for_each_rank_is_loaded_again(
    beside: list[Any], fresh_registry: None, ids: Tensor, tmp_path: Path
) -> None:
    """A slot of one entry for each rank is no sign that ranks were freed."""
    lk.register(RankGate)
    model = tiny_llama()
    adapter = lk.adapt(model, [RankGate(), *beside], seed=0)
    optimizer = adapter.optimizer(lr=1e-2, total_steps=6)
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(tmp_path)
    again = tiny_llama()
    lk.load(again, tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    adapter.restore(tmp_path)


@pytest.mark.parametrize("how", ["a view of the weight", "expanded"])
def test_what_a_start_returns_is_copied(how: str, fresh_registry: None, ids: Tensor) -> None:
    """Else training would write into the base, or into memory that entries share."""

    @dataclass(frozen=True)
    class Careless(RankGate):
        word: ClassVar[str] = "careless"

        def start(self, module: Any, generator: Any, device: Any) -> dict[str, Tensor]:
            A = module.weight[: self.rank]
            if how == "expanded":
                A = torch.ones(1).expand(self.rank, module.shape.inputs)
            B = torch.zeros(1, 1).expand(module.shape.outputs, self.rank)
            return {"A": A, "B": B, "e": torch.ones(self.rank)}

    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = lk.adapt(model, Careless(), "q_proj")
    optimizer = adapter.optimizer(lr=0.1)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("word", ["", "a,b", "a b", "all", "-x", "A"])
def test_a_word_that_is_none_is_refused(word: str, fresh_registry: None) -> None:
    kind = type("Odd", (RankGate,), {"word": word, "decides": RankGate.decides})
    with pytest.raises(lk.SettingError):
        lk.register(kind)


@pytest.mark.parametrize("needs", [{"activations"}, {"inputs", "gradients"}])
def test_needs_that_nothing_can_meet_are_refused(needs: set[str]) -> None:
    with pytest.raises(lk.SettingError):
        type("Odd", (RankGate,), {"word": "odd", "needs": frozenset(needs)})


def test_a_rank_that_does_not_fit_is_refused() -> None:
    for rank in (0, 1000):
        with pytest.raises(lk.SettingError):
            lk.adapt(tiny_llama(), RankGate(rank=rank))


def test_a_start_with_nan_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(lk.SettingError):
        lk.adapt(model, lk.DoRA(rank=2), "q_proj")


def test_inputs_are_measured_on_each_batch_once(examples: Any, ids: Tensor) -> None:
    calls = []
    model = tiny_llama()
    model.register_forward_hook(lambda *_: calls.append(1))
    lk.adapt(model, examples.InputDirections(rank=2), probe=[{"input_ids": ids}] * 3)
    assert len(calls) == 3
    for probe in (3, [ids], ["a"]):
        with pytest.raises(lk.SettingError):
            lk.adapt(tiny_llama(), examples.InputDirections(rank=2), probe=probe)


@pytest.mark.parametrize("change", ["tuple", "swapped"])
def test_a_change_that_is_none_is_refused(change: str) -> None:
    @dataclass(frozen=True)
    class Odd(RankGate):
        word: ClassVar[str] = "odd"

        def change(self, tensors: Any) -> Any:
            up, down = tensors["B"], tensors["A"]
            return (up, down) if change == "tuple" else lk.family.LowRank(down.T, up.T)

    with pytest.raises(lk.SettingError):
        lk.adapt(tiny_llama(), Odd(), "k_proj")
