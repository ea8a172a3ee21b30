"""The arms: each method at one fair size, with the controls that it calls for."""

from __future__ import annotations

from typing import Any

import pytest

from lorakin.compare import arms
from lorakin.compare.arms import CONTROL, MEMBER, REFERENCE, Arm, arms_of, limits_of
from lorakin.errors import SettingError
from lorakin.family import FAMILY, Parametrisation, method_named
from lorakin.family.method_words import methods_of


def made(
    words: list[str], given: dict[str, Any] | None = None, dropout: float = 0.0, steps: int = 40
) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(words, (8, 2.0), steps, given or {}, dropout)}


@pytest.mark.parametrize("member", FAMILY, ids=lambda m: m.word)
def test_every_member_runs_for_a_few_steps_at_one_scale(member: Any) -> None:
    method = made([member.word], steps=8)[member.word].method(8)
    if method.setting("alpha") is not None:
        assert method.parametrisation.scaling == pytest.approx(2.0, rel=1e-5)  # type: ignore[attr-defined]


def test_sizes_are_fair_in_each_member_s_own_terms() -> None:
    found = made([member.word for member in FAMILY])
    sizes = {name: arm.method(40) for name, arm in found.items() if arm.kind in (MEMBER, REFERENCE)}
    for word in ("lora", "lora+", "lora-fa", "dora", "lora-drop", "delta-lora"):
        assert (sizes[word].setting("rank"), sizes[word].setting("alpha")) == (8, 16.0)
    assert sizes["adalora"].setting("target_rank") == 8  # the budget at the end is a plain pair's
    assert sizes["adalora"].setting("initial_rank") == 12
    assert sizes["vera"].setting("rank") == 256  # a drawn pair's rank is another thing
    assert (
        sizes["delta-lora"].setting("start_step") == 10
    )  # a run of 40 steps would never reach its own 500
    assert (
        made(["delta-lora"], steps=10_000)["delta-lora"].method(10_000).setting("start_step") == 500
    )


def test_each_control_is_what_its_arm_comes_to_under_adam() -> None:
    found = made(["lora+", "delta-lora", "dora,lora+"], {"ratio": 4.0})
    controls = {arm.explains: arm for arm in found.values() if arm.kind == CONTROL}
    assert controls.keys() == {"lora+", "delta-lora", "dora,lora+"}
    for explained, words, alpha in (
        ("lora+", "lora", 64.0),
        ("delta-lora", "lora", 48.0),
        ("dora,lora+", "dora", 64.0),
    ):
        control = controls[explained]
        assert (
            control.words,
            control.method(40).setting("alpha"),
            control.method(40).setting("rank"),
        ) == (words, alpha, 8)


def test_a_member_without_rank_and_scale_is_taken_as_it_is() -> None:
    """Such as the one in CONTRIBUTING.md."""

    class Gained(Parametrisation):
        setting_names = classmethod(lambda cls: frozenset({"dropout"}))

    assert Gained.comparable_settings(8, 2.0, 40) == {}


def test_plain_lora_is_always_there_and_first() -> None:
    found = arms_of(["vera"], (8, 2.0), 40, {}, 0.0)
    assert [(arm.name, arm.kind) for arm in found] == [("lora", REFERENCE), ("vera", MEMBER)]
    assert [arm.name for arm in arms_of(["vera", "lora"], (8, 2.0), 40, {}, 0.0)] == [
        "lora",
        "vera",
    ]


def test_what_does_not_combine_is_left_out_with_its_reason() -> None:
    found = made(["lora-fa,lora+", "adalora,dora"])
    assert "lora-fa" in found["lora-fa,lora+"].refused
    assert found["adalora,dora"].refused == ""
    assert found["adalora,dora"].method(40).setting("target_rank") == 8


def test_dropout_goes_to_those_that_can_have_it() -> None:
    found = made(["dora", "delta-lora"], dropout=0.1)
    assert found["lora"].method(40).dropout == found["dora"].method(40).dropout == 0.1
    assert found["delta-lora"].method(40).dropout == 0
    assert "dropout" in found["delta-lora"].about
    assert found["lora-no-dropout"].method(40).dropout == 0
    assert found["lora-no-dropout"].kind == CONTROL
    assert found["lora-alpha-x3"].method(40).dropout == 0  # as the arm that it explains
    assert "lora-no-dropout" not in made(["dora"])


def test_settings_go_to_the_methods_that_have_them() -> None:
    found = made(["lora+", "vera"], {"ratio": 8.0, "d_init": 0.2})
    assert found["lora+"].method(40).setting("ratio") == 8.0
    assert found["vera"].method(40).setting("d_init") == 0.2
    with pytest.raises(SettingError, match="'ratoi'"):
        made(["lora+"], {"ratoi": 8.0})


@pytest.mark.parametrize("word", ["lora", "adalora", "vera", "dora"])
def test_the_largest_rank_within_the_budget(word: str) -> None:
    """Counted by the formulas for one 64 × 48 weight, without a model."""
    count = {
        "lora": lambda m: m.setting("rank") * (64 + 48),
        "dora": lambda m: m.setting("rank") * (64 + 48) + 64,
        "adalora": lambda m: m.setting("initial_rank") * (64 + 48 + 1),
        "vera": lambda m: m.setting("rank") + 64,
    }[word]
    arm = made([word])[word].sized(count, 1000, 40)
    assert not arm.refused
    assert count(arm.method(40)) <= 1000
    name = "initial_rank" if word == "adalora" else "rank"
    more = method_named(
        word, arm.settings(40) | {name: arm.settings(40)[name] + (1 if word != "adalora" else 2)}
    )
    assert count(more) > 1000
    assert "rank 1 " in made([word])[word].sized(count, 40, 40).refused


def test_limits() -> None:
    plain = made([])["lora"]
    found = {arm.name: arm for arm in limits_of(plain, ["a.b"], classifier=True)}
    assert list(found) == [arms.BASE, arms.HEAD, arms.FULL]
    assert found[arms.BASE].lr is None
    assert found[arms.FULL].recipe["modules_to_save"] == ["a.b"]
    assert found[arms.FULL].recipe["dtype"] == "float32"
    assert arms.HEAD not in {arm.name for arm in limits_of(plain, ["a.b"], classifier=False)}


def test_methods() -> None:
    assert methods_of("all") == [member.word for member in FAMILY]
    assert methods_of("dora, vera;adalora,dora") == ["dora", "vera", "adalora,dora"]
    for text, match in (
        ("", "''"),
        ("dora dora", "dora"),
        ("doar", "'dora'"),
    ):
        with pytest.raises(SettingError, match=match):
            methods_of(text)
