"""What is installed and what is given on: every file by its hash, actions by their commit, licences with what they cover."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lorakin.report import page

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"audioop-lts"}
"""For Python 3.13 alone; it needs nothing."""
SECTIONS = ("train", "cpu", "torch", "cuda", "kernels", "test", "docs", "deepspeed")


def locked(section: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> version and hashes."""
    text = (ROOT / "constraints.txt").read_text()
    (body,) = re.findall(rf"^# {section}\n(.*?)^# end$", text, re.MULTILINE | re.DOTALL)
    found = {}
    for entry in re.split(r"\n(?=\S)", body.strip()):
        name, version = re.match(r"([a-z0-9-]+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        found[name] = (version, re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry))
    return found


def test_every_package_has_a_version_and_hashes() -> None:
    text = (ROOT / "constraints.txt").read_text()
    everything = {name: entry for section in SECTIONS for name, entry in locked(section).items()}
    assert (
        len(everything) + 2
        == sum(len(locked(section)) for section in SECTIONS)
        == text.count("==")
        > 90
    ), "torch and triton twice"
    assert locked("cpu")["torch"][0] == locked("torch")["torch"][0] + "+cpu"
    assert all(hashes for _, hashes in everything.values())
    assert text.count("--hash") == sum(
        len(hashes) for section in SECTIONS for _, hashes in locked(section).values()
    )
    models = [
        line for line in (ROOT / "models.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in models)


def test_every_package_takes_the_first_python_of_each_kind() -> None:
    """Debian 12 has 3.11.2, on which a package for 3.11.5 cannot be installed."""
    looked = 0
    for section in ("train", "test", "docs"):
        for name in locked(section).keys() - ELSEWHERE:
            try:
                takes = metadata.metadata(name).get("Requires-Python") or ""
            except metadata.PackageNotFoundError:  # of another platform, or the site's
                continue
            looked += 1
            assert all(f"3.{minor}.0" in SpecifierSet(takes) for minor in (11, 12, 13)), name
    assert looked > 60


ASKED = [("train", {"train"}), ("test", {"train", "quantised", "test"}), ("docs", {"docs"})]


@pytest.mark.parametrize(("section", "extras"), ASKED)
def test_the_lock_has_all_that_is_asked_for(section: str, extras: set[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    there = locked("train") | locked("torch") | (locked("test") if section != "train" else {})
    there |= locked(section)
    asked = [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != "lorakin":
            assert name in there, f"{requirement} is not in constraints.txt: make lock"
            assert requirement.specifier.contains(there[name][0]), (
                f"{requirement}, but constraints.txt has {there[name][0]}"
            )
    for name in there.keys() - locked("docs").keys() - ELSEWHERE:  # the site's is not here
        for inner in map(Requirement, metadata.requires(name) or ()):
            if (
                inner.marker is None or inner.marker.evaluate({"extra": ""})
            ) and not inner.name.startswith(("nvidia", "cuda")):
                known = there | locked("cuda")
                assert canonicalize_name(inner.name) in known, f"{name} needs {inner}: make lock"


def test_the_makefile_installs_nothing_else() -> None:
    recipe = (ROOT / "Makefile").read_text()
    installs = re.findall(r"\$\(PIP\) (.*)", recipe)
    assert len(installs) == 3
    assert all(
        "--require-hashes" in line or line == "--no-build-isolation --editable ."
        for line in installs
    )
    assert "--no-deps" in re.search(r"^PIP := .*", recipe, re.MULTILINE)[0]  # type: ignore[index]


def test_actions_are_pinned_and_may_only_read() -> None:
    for file in (ROOT / ".github" / "workflows").iterdir():
        text = file.read_text()
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
        assert "permissions" not in str(yaml.safe_load(text)["jobs"])
        uses = re.findall(r"uses: (.*)", text)
        assert uses
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", line) for line in uses)


def test_licences_go_with_what_they_cover() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    assert "Vega" in (ROOT / "NOTICE").read_text()
    html = page.render("Title", "nothing", [])
    for words in (
        "Copyright (c) 2015-2023, University of Washington Interactive Data Lab",
        "Redistributions of source code must retain the above copyright notice",
        "Copyright 2010-2026 Mike Bostock",
        "THE SOFTWARE IS PROVIDED &#34;AS IS&#34; AND THE AUTHOR DISCLAIMS ALL WARRANTIES",
    ):
        assert words in html
    named = (ROOT / "src/lorakin/report/assets/licences.txt").read_text()
    assert all(
        re.search(rf"\b{name}\b", named)
        for name in ("vega", "vega-lite", "vega-embed", "d3-scale", "semver", "fast-json-patch")
    )
