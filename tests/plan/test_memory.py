"""Sizes in words."""

from __future__ import annotations

import re

import pytest

from lorakin.errors import SettingError
from lorakin.plan.memory import parse_memory, size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24e9),
        ("24GiB", 24 * 2**30),
        ("24000MB", 24e9),
        ("1.5 gib", 1.5 * 2**30),
        ("80g", 80e9),
    ],
)
def test_sizes(text: str, count: float) -> None:
    assert parse_memory(text) == count


def test_bytes_are_written_with_three_digits() -> None:
    counts = (0, 999, 1000, 12_345, 999_499, 999_500, 1_230_000_000, 5 * 10**15)
    assert [size(count) for count in counts] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 kB",
        "999 kB",
        "1 MB",
        "1.23 GB",
        "5000 TB",
    ]


@pytest.mark.parametrize("text", ["24", "GB", "much", "-3GB", "0GB", "24XB", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(SettingError, match=re.escape(repr(text))):
        parse_memory(text)
