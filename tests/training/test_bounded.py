"""Strangers' templates end, or are ended."""

from __future__ import annotations

import threading
import time

import pytest

import lorakin as lk
from lorakin.training.bounded import bounded
from lorakin.training.templates import Template
from training.carried import tokenizer_of

ENDLESS = "".join("{% for " + name + " in range(99999) %}" for name in "abc") + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{{ 'x' * 10 ** 11 }}",
        "{{ 'x' | center(10 ** 11) }}",
        "{% set ns = namespace(x='x') %}{% for n in range(99) %}{% set ns.x = ns.x + ns.x %}{% "
        "endfor %}{{ ns.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_never_ends_is_refused(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lorakin.training.templates.bounded", lambda what: bounded(what, 0.5, 1 << 29)
    )
    begun = time.monotonic()
    with pytest.raises(lk.LorakinError):
        Template(tokenizer_of(template)).prompt([{"role": "user", "content": "a"}])
    assert time.monotonic() - begun < 10


def test_what_ends_in_time_is_left_alone() -> None:
    before = threading.active_count()
    for _ in range(100):
        with bounded("it", 0.05):
            pass
    time.sleep(0.1)  # nothing comes later
    assert threading.active_count() <= before + 1
    with pytest.raises(KeyError), bounded("it"):
        raise KeyError("its own")


def test_the_limit_is_given_back() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(lk.ModelError, match=r"0\.5"), bounded("it", 5, 1 << 29):
        bytearray(1 << 33)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
