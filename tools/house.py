"""Measures the source: sizes of files and functions, documentation, circles of imports, tests.

python tools/house.py                      # a table for this checkout
python tools/house.py --json               # the same as JSON
python tools/house.py --log pytest.log     # adds how long the tests in this log took
git worktree add /tmp/then COMMIT && python tools/house.py /tmp/then
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx

Function = ast.FunctionDef | ast.AsyncFunctionDef
DIRECTIVE = re.compile(r"#\s*(noqa|fmt:|type:|pragma|ruff:)")


def figures(root: Path) -> dict[str, object]:
    """Returns the figures of `root`/src/lorakin and `root`/tests by name, in display order."""
    source = root / "src" / "lorakin"
    texts = {str(p.relative_to(source)): p.read_text() for p in sorted(source.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    tests = [path.read_text() for path in sorted((root / "tests").rglob("*.py"))]
    return {
        **sizes(texts, trees),
        **documentation(texts, trees),
        **structure(trees),
        "test functions": sum(
            function.name.startswith("test_")
            for text in tests
            for function in functions_in(ast.parse(text))
        ),
        "tests that pin prose (match=)": sum(len(re.findall(r"\bmatch=", t)) for t in tests),
    }


def sizes(texts: dict[str, str], trees: dict[str, ast.Module]) -> dict[str, object]:
    """How long files, functions and lines are."""
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    functions = [
        (length(function), f"{path}:{function.name}")
        for path, tree in trees.items()
        for function in functions_in(tree)
    ]
    lengths = [count for count, _ in functions]
    longest_file, longest_function = max(lines, key=lines.__getitem__), max(functions)
    return {
        "files": len(texts),
        "lines": sum(lines.values()),
        "lines of the median file": round(statistics.median(lines.values())),
        "lines of the longest file": f"{lines[longest_file]} ({longest_file})",
        "files above 350 lines": sum(count > 350 for count in lines.values()),
        "functions": len(functions),
        "lines of the median function": round(statistics.median(lengths)),
        "lines of a function, 90th percentile": round(statistics.quantiles(lengths, n=10)[8]),
        "lines of the longest function": "{} ({})".format(*longest_function),
        "functions above 60 lines": sum(count > 60 for count in lengths),
        "lines wider than 100 columns": sum(
            len(line) > 100 for text in texts.values() for line in text.splitlines()
        ),
    }


def documentation(texts: dict[str, str], trees: dict[str, ast.Module]) -> dict[str, object]:
    """How many public definitions have a docstring, and an example in it."""
    docstrings = [
        ast.get_docstring(definition) or ""
        for tree in trees.values()
        for definition in public_definitions(tree)
    ]
    return {
        "public definitions": len(docstrings),
        "of these with a docstring": sum(map(bool, docstrings)),
        "of these with an example": sum(">>>" in text for text in docstrings),
        "lines with a comment": sum(map(comments, texts.values())),
    }


def structure(trees: dict[str, ast.Module]) -> dict[str, object]:
    """Circles of imports, and class names that mean two things."""
    files = networkx.DiGraph()
    for path, tree in trees.items():
        files.add_edges_from((module_name(path), other) for other in imported(tree))
    files = files.subgraph(map(module_name, trees))
    rooms = networkx.DiGraph((room(one), room(other)) for one, other in files.edges)
    rooms.remove_nodes_from(["lorakin"])
    classes = Counter(
        node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    return {
        "circles of imports between files": circles(files),
        "circles of imports between rooms": circles(rooms),
        "public class names that stand twice": sorted(
            n for n, count in classes.items() if count > 1
        ),
    }


def functions_in(tree: ast.AST) -> Iterator[Function]:
    """All functions, including methods and nested functions."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    """The lines of a function without its docstring and decorators."""
    first, lines = function.body[0], function.end_lineno - function.lineno + 1
    docstring = ast.get_docstring(function) is not None
    return lines - (first.end_lineno - first.lineno + 1 if docstring else 0)


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Public classes and functions at the top of a module, and methods of public classes."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (f for f in node.body if isinstance(f, Function) and f.name[0] != "_")


def comments(text: str) -> int:
    """How many lines have a comment for readers; `# noqa` and its like are for tools."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and not DIRECTIVE.match(t.string) for t in tokens)


def module_name(path: str) -> str:
    """`report/page.py` → `lorakin.report.page`."""
    return ".".join(("lorakin", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def room(module: str) -> str:
    """`lorakin.report.page` → `lorakin.report`."""
    return ".".join(module.split(".")[:2])


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a file imports when it is imported, not later inside a function."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circles(graph: networkx.DiGraph) -> int:
    """How many groups of two or more modules import each other."""
    return sum(len(group) > 1 for group in networkx.strongly_connected_components(graph))


def test_minutes(log: str) -> dict[str, object]:
    """What the last line of a pytest log says: how many tests passed, and in how many minutes."""
    *_, (passed, seconds) = re.findall(r"(\d+) passed.* in ([\d.]+)s", log)
    return {"tests that passed": int(passed), "minutes of tests": round(float(seconds) / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--log", type=Path, help="what pytest printed")
    chosen = parser.parse_args()
    found = figures(chosen.root) | (test_minutes(chosen.log.read_text()) if chosen.log else {})
    if chosen.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:45} {', '.join(value) or '–' if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
