"""Figures about the source: how large its files and functions are, what is documented, what is named twice.

python tools/house.py                # a table of this checkout
python tools/house.py --json         # the same for a script
git worktree add /tmp/then COMMIT && python tools/house.py /tmp/then
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def figures(root: Path) -> dict[str, object]:
    """The figures of the package in `root`/src/lorakin, by name, in the order in which they are shown."""
    source = root / "src" / "lorakin"
    paths = sorted(source.rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in paths}
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    widths = [len(line) for path in paths for line in path.read_text().splitlines()]
    functions = {
        f"{p.relative_to(source)}:{f.name}": length(f)
        for p, tree in trees.items()
        for f in functions_of(tree)
    }
    public = [d for tree in trees.values() for d in public_definitions(tree)]
    documented = [ast.get_docstring(d) or "" for d in public]
    classes = Counter(
        node.name
        for t in trees.values()
        for node in ast.walk(t)
        if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    )
    longest = max(paths, key=lines.__getitem__)
    most = max(functions, key=functions.__getitem__)
    return {
        "files": len(paths),
        "lines": sum(lines.values()),
        "lines of the median file": round(statistics.median(lines.values())),
        "lines of the longest file": f"{lines[longest]} ({longest.relative_to(source)})",
        "files above 350 lines": sum(n > 350 for n in lines.values()),
        "functions": len(functions),
        "lines of the median function": round(statistics.median(functions.values())),
        "lines of a function, 90th percentile": round(
            statistics.quantiles(functions.values(), n=10)[8]
        ),
        "lines of the longest function": f"{functions[most]} ({most})",
        "functions above 60 lines": sum(n > 60 for n in functions.values()),
        "lines wider than 100 columns": sum(width > 100 for width in widths),
        "public definitions": len(public),
        "of these with a docstring": sum(bool(text) for text in documented),
        "of these with an example": sum(">>>" in text for text in documented),
        "comment lines": sum(comments(path) for path in paths),
        "circles of imports between files": len(circles(imports(trees, source))),
        "circles of imports between rooms": len(circles(rooms(imports(trees, source)))),
        "public class names that stand twice": sorted(name for name, n in classes.items() if n > 1),
        "test functions": sum(tests(path) for path in (root / "tests").rglob("test_*.py")),
        "tests that pin prose (match=)": sum(
            p.read_text().count("match=") for p in (root / "tests").rglob("*.py")
        ),
    }


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions, methods and nested ones too."""
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function's body and head, without its docstring."""
    first = function.body[0]
    docstring = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    assert function.end_lineno is not None and first.end_lineno is not None
    return (
        function.end_lineno
        - function.lineno
        + 1
        - (first.end_lineno - first.lineno + 1 if docstring else 0)
    )


def public_definitions(tree: ast.Module) -> Iterator[Definition]:
    """Classes and functions that others may use: at a module's top, and methods of public classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    inner
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef) and inner.name[0] != "_"
                )


def comments(path: Path) -> int:
    """How many lines hold nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return sum(
        token.type == tokenize.COMMENT and token.line.strip().startswith("#") for token in tokens
    )


def tests(path: Path) -> int:
    """How many test functions a file has."""
    return sum(
        function.name.startswith("test_") for function in functions_of(ast.parse(path.read_text()))
    )


def imports(trees: dict[Path, ast.Module], source: Path) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports when it is imported itself."""
    named = {dotted(path, source): tree for path, tree in trees.items()}
    return {
        name: {other for other in imported(tree) if other in named and other != name}
        for name, tree in named.items()
    }


def dotted(path: Path, source: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported at the top of a file, aside from what only type checkers see."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between the packages and files right under lorakin."""
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        room = found.setdefault(".".join(name.split(".")[:2]), set())
        room |= {".".join(other.split(".")[:2]) for other in others}
    return {room: others - {room, "lorakin"} for room, others in found.items() if room != "lorakin"}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of nodes that reach each other (strongly connected, more than one)."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        reach[start] = seen
    groups = {
        frozenset({n, *(m for m in reach[n] if n in reach.get(m, ()))})
        for n in graph
        if n in reach[n]
    }
    return [set(group) for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    found = figures(chosen.root)
    if chosen.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:45} {', '.join(value) or '–' if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
