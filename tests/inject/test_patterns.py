"""Patterns over paths: what `re` says of them, in a time that grows with the path and the pattern
alone.
"""

from __future__ import annotations

import random
import re
import time

import pytest

import lorakin as lk
from lorakin.inject import patterns
from lorakin.inject.layer_numbers import parse_layers
from lorakin.inject.linear_regex import NoPatternError, PatternError
from lorakin.inject.patterns import PathIndex, PatternValues, matches, resolve

ATOMS = [
    "a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\W", "a?", "b*", "a+", "(?:ab)", "(a|b)",
    "(?:a|)", "(?P<n>b)", "^", "$",
    r"\b", r"\B", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", "(?:ab*)*", "a{2}", "b{1,3}",
    "(?:a|b){2,3}", "a*?", "(?i:A)",
    "(?s:.)", r"\.", "1", r"\Z", r"\A", "(?:a*b?){0,2}", "[a-c1]", "(?!.*1)", "(?=.*[.])",
    "(?<=b.)", "(?:a??b)*?",
]  # fmt: skip
PATHS = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 3, 12)
    for name in (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
        "mlp",
        "input_layernorm",
    )
] + ["lm_head", "model.vision.blocks.1.attn.qkv", "model.embed_tokens"]
REAL = [
    r".*\.(q_proj|v_proj)", r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    "(.*)(q|k|v|o)_proj",
    r"model\.layers\.(?:0|12)\..*",
    r"(?:.*?(?:vision|image|language|text).*?(?:self_attn|attention|attn|mlp).*?(?:qkv|proj|linear).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|o_proj|gate_proj|down_proj)))",
]  # fmt: skip
"""As PEFT's users, ms-swift and Unsloth write them."""


def test_it_is_what_re_says() -> None:
    chance, found = random.Random(1), [0, 0]
    for _ in range(3000):
        pattern = "".join(chance.choice(ATOMS) for _ in range(chance.randint(1, 5)))
        pattern = f"({pattern})*" if chance.random() < 0.1 else pattern
        pattern = f"(?i){pattern}" if chance.random() < 0.1 else pattern
        pattern += "|" + chance.choice(ATOMS) if chance.random() < 0.2 else ""
        text = "".join(chance.choice("abAB1.\n") for _ in range(chance.randint(0, 8)))
        try:
            wanted = re.fullmatch(pattern, text) is not None
        except re.error:
            with pytest.raises(NoPatternError):
                matches(pattern, text)
            continue
        assert matches(pattern, text) == wanted, (pattern, text)
        found[wanted] += 1
    assert min(found) > 100


@pytest.mark.parametrize("pattern", REAL, ids=lambda pattern: pattern[:20])
def test_real_patterns_and_what_they_take(pattern: str) -> None:
    assert [matches(pattern, path) for path in PATHS] == [
        re.fullmatch(pattern, path) is not None for path in PATHS
    ]
    begun = time.perf_counter()
    for path in PATHS * 20:
        matches(pattern, path)
    assert (time.perf_counter() - begun) / len(PATHS * 20) < 0.005
    assert {matches(pattern, path) for path in PATHS} == {True, False}


@pytest.mark.parametrize("pattern", [r"(a)\1", "(a)?(?(1)b|c)", "(?>a)", "a*+", "(?P<x>a)(?P=x)"])
def test_what_needs_one_way_after_another_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        matches(pattern, "aa")
    with pytest.raises(lk.TargetError):
        matches(pattern, "aa")


def test_a_match_has_a_budget() -> None:
    begun = time.perf_counter()
    with pytest.raises(PatternError):
        matches("(?:(?!(?:(?!(?:.|.)*y).)*z).)*", "a" * 400)
    assert time.perf_counter() - begun < 1


def test_values_are_peft_s_rule() -> None:
    """`re.match(rf"(.*\\.)?({key})$", path)`, the first key that matches."""
    keys = [
        "q_proj", "^model.layers.0.self_attn.q_proj", r"^model\.layers\.3\.mlp",
        r"layers\.12\.mlp\.gate_proj", "layers.0.mlp",
        "mlp", ".*o_proj", "proj", r"[a-z]+_proj", "^lm", "(lm|x)_head", "", "^",
        r"blocks\.[0-9]\.attn\.qkv",
        "q_proj|embed_tokens",
    ]  # fmt: skip
    chance = random.Random(2)
    for _ in range(300):
        said = {key: n for n, key in enumerate(chance.sample(keys, 5))}
        values, there = PatternValues(said), PathIndex(PATHS)
        for path in PATHS:
            wanted = next(
                (n for key, n in said.items() if re.match(rf"(.*\.)?({key})$", path)), None
            )
            assert values.of(path, None) == resolve(said, path, None) == wanted, (said, path)
        for key in said:
            assert there.selects_any(key) == any(
                re.match(rf"(.*\.)?({key})$", path) for path in PATHS
            ), key


def test_a_key_is_a_pattern_by_itself() -> None:
    with pytest.raises(NoPatternError):
        resolve({"a)|(.*": 1}, "b", 0)


def test_too_many_and_too_long() -> None:
    with pytest.raises(PatternError, match="1,001"):
        patterns.check_all("rank_pattern", [f"a{n}|b" for n in range(1001)])
    with pytest.raises(PatternError, match="200,000"):
        matches("a|" * 100_000, "a")


@pytest.mark.parametrize(
    "text", ["0-99999999999", "0-999999999", "99999999999", "1" * 5000, "0-9999," * 2000, "²", "٣"]
)
def test_layers_that_no_model_has(text: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(lk.SettingError, match="layers"):
        parse_layers(text)
    assert time.perf_counter() - begun < 2
    assert parse_layers("0-3,8,-1,2") == [0, 1, 2, 3, 8, -1]
