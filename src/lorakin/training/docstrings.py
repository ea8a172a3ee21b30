"""The demo's data: functions of Python's standard library and their one-line docstrings."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Write a one-line docstring for this Python function.\n\n"
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


def docstring_rows(max_code: int = 400, seed: int = 0) -> list[dict[str, str]]:
    """Returns rows of a prompt (a function without its docstring) and a completion (its summary).

    Kept are functions with a one-sentence summary of 12 to 160 characters, each once.

    Args:
        max_code: characters of the longest function.
        seed: draws the order.
    """
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if LEFT_OUT & set(path.parts) or any(part.startswith("test_") for part in path.parts):
            continue
        for code, docstring in _functions(path):
            if len(code) <= max_code:
                rows.setdefault(code, {"prompt": INSTRUCTION + code, "completion": docstring})
    shuffled = list(rows.values())
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return  # the library keeps a few files that are broken on purpose
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if 12 <= len(summary) <= 160 and ". " not in summary:
            node.body = node.body[1:]
            yield ast.unparse(node), summary
