"""The documentation says what is there: pages, links, code, commands and names. `make docs` builds it; this needs no mkdocs."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorakin as lk
from conftest import tiny_llama
from lorakin.family import FAMILY
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import FIELDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OF_THE_ROOT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]


def tool(name: str) -> Any:
    """A script of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = tool("docs_site")


def blocks(page: Path, language: str, mark: str = "") -> list[str]:
    """Fenced code of this language, also inside tabs and lists; with `mark`, only what follows that line."""
    start = rf"^{re.escape(mark)}\n" if mark else ""
    found = re.findall(
        rf"{start}^( *)```{language}\n(.*?)^\1```$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [textwrap.dedent(code) for _, code in found]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def in_nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [
        page
        for inner in (entry.values() if isinstance(entry, dict) else entry)
        for page in in_nav(inner)
    ]


def test_every_page_is_in_the_navigation_once() -> None:
    pages = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(pages) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


# links


def anchors(page: Path) -> set[str]:
    """What a link to this page may end with: its headings, and what the site generates there."""
    text = re.sub(
        r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(
            r"[-\s]+",
            "-",
            re.sub(r"[^\w\s-]", "", words.encode("ascii", "ignore").decode()).strip().lower(),
        )
        found.add(slug if slug not in found else f"{slug}_1")
    found |= set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    if "<!-- generated: commands -->" in text:
        found |= {f"lorakin-{command}" for command in SITE.click_commands()}
    return found


@pytest.mark.parametrize("page", PAGES + OF_THE_ROOT, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(
        r"`[^`\n]*`",
        "",
        re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL),
    )
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


# code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles_and_imports_what_there_is(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorakin"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "lk"
            ):
                assert node.attr in lk.__all__, ast.unparse(node)


RUNNABLE = [page for page in PAGES if blocks(page, "python", "<!-- run -->")]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
@pytest.mark.filterwarnings("default")
def test_marked_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 12).unsqueeze(0)
    for code in blocks(page, "python", "<!-- run -->"):
        names: dict[str, Any] = {
            "lk": lk,
            "torch": torch,
            "copy": copy,
            "model": tiny_llama(),
            "another_model": tiny_llama(),
            "input_ids": ids,
            "batches": [{"input_ids": ids, "labels": ids}] * 2,
        }
        exec(compile(code, name_of(page), "exec"), names)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [
        line
        for line in lines
        if re.search(r"(^|-m )lorakin ", line) and "…" not in line and "--help" not in line
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_have_the_options_that_the_pages_use(page: Path) -> None:
    known = SITE.click_commands()
    for line in commands(page):
        command, *arguments = shlex.split(
            re.sub(r".*?(^|-m )lorakin ", "", line, count=1), comments=True
        )
        known[command].make_context(
            f"lorakin {command}", arguments
        )  # raises on an option that it does not have


# reference


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    assert sorted(re.findall(r"^::: lorakin\.(\w+)$", page, re.MULTILINE)) == sorted(lk.__all__)
    (shown,) = re.findall(r"members: \[(.*)\]", page)
    assert not [name for name in shown.split(", ") if not hasattr(lk.Adapter, name)]


def test_every_error_is_in_its_table() -> None:
    page = (DOCS / "reference" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+Error)` \| `(\w+)` \| .* \| (\d) \|$", page, re.MULTILINE)
    found = {name: getattr(lk, name) for name, _, _ in rows}
    assert set(found) == {
        name for name in lk.__all__ if name.endswith("Error") and name != "LorakinError"
    }
    assert all(found[name].__mro__[2].__name__ == builtin for name, builtin, _ in rows)
    assert all(found[name].exit_code == int(code) for name, _, code in rows)


def test_what_is_generated_is_whole() -> None:
    marks = [mark for page in PAGES for mark in SITE.MARK.findall(page.read_text())]
    assert sorted(marks) == sorted(SITE.PARTS)
    assert re.findall(r"^## lorakin (\S+)$", SITE.commands(), re.MULTILINE) == list(
        SITE.click_commands()
    )
    assert re.findall(r"^\| `(\w+)` \|", SITE.recipe_keys(), re.MULTILINE) == [
        *Recipe.__dataclass_fields__
    ]
    assert re.findall(r"^\| `(\S+)` \|", SITE.members(), re.MULTILINE) == [
        member.word for member in FAMILY
    ]
    assert SITE.combinations().count("| `") == 2 * len(FAMILY)


def test_recipes_and_their_translations_have_keys_that_exist() -> None:
    for page in (DOCS / "howto" / "from-others.md", DOCS / "reference" / "recipe.md"):
        ours = [recipe for recipe in map(yaml.safe_load, blocks(page, "yaml")) if "model" in recipe]
        assert ours
        for recipe in ours:
            Recipe(**recipe | {"lr": float(recipe["lr"])})
    table = (
        (DOCS / "howto" / "from-others.md")
        .read_text()
        .partition("| LLaMA-Factory |")[2]
        .partition("\n\n")[0]
    )
    keys = {
        key
        for row in table.splitlines()[2:]
        for key in re.findall(r"`([a-z_]+)[:`]", row.split("|")[2])
    }
    assert len(keys) > 20
    assert keys - FIELDS <= {"float16", "int8"}


# methods


def test_each_member_has_a_page_with_a_picture_and_a_command() -> None:
    pages = re.findall(
        r"^\| \[[\w+-]+\]\(([\w-]+)\.md\) \|",
        (DOCS / "methods" / "index.md").read_text(),
        re.MULTILINE,
    )
    assert len(pages) == len(FAMILY)
    for page, member in zip(pages, FAMILY, strict=True):
        text = (DOCS / "methods" / f"{page}.md").read_text()
        assert f"../pictures/{page}.svg" in text
        assert f"lk.{member.__name__}(" in text
        assert member.word == "lora" or f"--method {member.word}" in text
        assert member.paper.rpartition("arXiv ")[2] in text


def test_the_pictures_are_as_drawn() -> None:
    draw = tool("draw")
    for name in draw.DRAWINGS:
        assert (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == draw.drawn(
            name
        ), "run tools/draw.py"
