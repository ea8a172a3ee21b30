"""The house's laws, held by reading the source: no member's name outside family/, imports one way, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lorakin
from lorakin.family import FAMILY, Method

SOURCE = Path(lorakin.__file__).parent
ROOMS = [
    "errors",
    "family",
    "kernels",
    "inject",
    "loop",
    "storage",
    "adapter",
    "adapting",
    "switching",
    "loading",
    "conversion",
    "combined",
    "public",
    "terminal",
    "waiting",
    "library_logs",
    "training",
    "plan",
    "serving",
    "compare",
    "report",
    "ui",
    "cli",
    "__main__",
]
"""From the ground up: a room may import only those before it."""
PEFT_TABLE = SOURCE / "storage" / "peft" / "formats.py"


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        return
    own = ROOMS.index(room(path))
    for name in imported(ast.parse(path.read_text())):
        if name.startswith("lorakin."):
            other = name.split(".")[1]
            assert other in ROOMS and ROOMS.index(other) <= own, (
                f"{path} imports {name}, a room above it"
            )


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_lower_rooms_need_only_torch_and_safetensors(path: Path) -> None:
    allowed = {
        "errors": set(),
        "family": {"torch"},
        "kernels": {"torch", "triton", "liger_kernel"},
        "inject": {"torch"},
        "loop": {"torch"},
        "storage": {"torch", "safetensors"},
        "adapter": {"torch"},
        "adapting": {"torch"},
        "switching": {"torch"},
        "loading": {"torch"},
        "conversion": {"torch"},
        "combined": {"torch"},
    }
    if path == SOURCE / "__init__.py" or room(path) not in allowed:
        return
    import sys

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module"
        ):  # an optional one, said in docs
            optional = {"hub.py": "huggingface_hub", "renamed.py": "transformers"}.get(
                path.name, "none"
            )
            assert ast.literal_eval(node.args[0]).split(".")[0] == optional, path
    for name in imported(tree):
        top = name.split(".")[0]
        assert top in {"lorakin", *sys.stdlib_module_names} | allowed[room(path)], (
            f"{path} imports {name}"
        )


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_member_is_known_by_name_outside_the_family(path: Path) -> None:
    if path in (SOURCE / "public.py", PEFT_TABLE) or room(path) == "family":
        return
    tree = ast.parse(path.read_text())
    defaults = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)
    }  # `method: str = "lora"`
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert name not in {member.__name__ for member in FAMILY}, (
                f"{path}:{node.lineno} names {name}"
            )
        if isinstance(node, ast.Constant) and id(node) not in defaults:
            assert node.value not in {member.word for member in FAMILY}, (
                f"{path}:{node.lineno} compares with {node.value!r}"
            )


@pytest.mark.parametrize("path", sorted((SOURCE / "family").glob("*.py")), ids=lambda p: p.name)
def test_a_member_is_short_enough_to_read_beside_its_paper(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (350)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(line, ast.Pass) for line in node.body), (
                f"{path}:{node.lineno}"
            )


def test_every_member_is_public_and_says_where_it_comes_from() -> None:
    for member in FAMILY:
        assert getattr(lorakin, member.__name__) is member
        assert "arXiv" in member.paper
        assert Method.of(member()).learning_rate > 0


LOADERS = {
    "from_pretrained", "from_config", "get_config_dict", "load_dataset", "load_from_disk", "snapshot_download",
    "hf_hub_download", "cached_file", "torch.load", "pickle.load", "pickle.loads", "pipeline",
}  # fmt: skip
"""Calls that read what a stranger made, and could run code in it."""
DOORS = {
    "training/loading.py": {
        "from_pretrained",
        "from_config",
        "get_config_dict",
        "snapshot_download",
        "cached_file",
    },
    "training/model_files.py": {"torch.load"},
    "storage/pickles.py": {"torch.load"},
    "storage/hub.py": {"snapshot_download", "hf_hub_download"},
}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_what_strangers_made_is_loaded_in_one_place(path: Path) -> None:
    where = path.relative_to(SOURCE).as_posix()
    allowed = DOORS.get(where, {"load_dataset"} if where == "training/data_files.py" else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        called = {name, name.rpartition(".")[2]} & LOADERS
        assert called <= allowed, (
            f"{path}:{node.lineno} calls {name}; call lorakin.training.loading instead"
        )
        said = {word.arg: word.value for word in node.keywords}
        if "torch.load" in called:
            assert ast.unparse(said["weights_only"]) == "True", f"{path}:{node.lineno}"
        trusts = said.get("trust_remote_code")
        assert trusts is None or ast.unparse(trusts) == "False", f"{path}:{node.lineno} trusts code"


def test_the_door_trusts_no_code() -> None:
    from lorakin.training import loading

    assert loading.NO_CODE == {"trust_remote_code": False}
    tree = ast.parse((SOURCE / "training" / "loading.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [
        node
        for node in calls
        if getattr(node.func, "attr", "") in ("from_pretrained", "from_config")
    ]
    assert loads and all("NO_CODE" in ast.unparse(node) for node in loads)
