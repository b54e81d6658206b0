"""The rule of the rooms (design.md, section 5), read off the import statements of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mrla"
ORDER = ["files", "messages", "ops", "models", "data", "dense", "deploy", "train", "analysis", "cli"]
INSIDE = {
    "ops": ["", "kernels", "mixers"],
    "data": ["", "sources"],
    "models": ["", "zoo", "checkpoints"],
    "analysis": ["", "report", "benchmarking", "comparison", "evaluation", "explanation"],
}
"""The order within a room: its own files, then its folders."""
SIDE_BY_SIDE = {"dense", "deploy"}
EVERYWHERE = {"torch", "numpy", "timm", "jaxtyping", "mrla"}
OUTSIDE = {
    "files": set(),
    "messages": set(),
    "ops": {"numba", "llvmlite"},  # the second is the first's own code generator; both in kernels/cpu alone, see below
    "models": {"safetensors", "huggingface_hub", "torchvision"},
    "dense": {"torchvision"},
    "deploy": {"torchvision", "onnx", "onnxscript", "onnxruntime", "openvino"},
    "data": {"torchvision", "PIL", "pillow_heif", "sklearn", "pycocotools"},
    "train": {"lightning", "torchmetrics", "torchvision", "safetensors"},
    "analysis": {"scipy", "matplotlib", "jinja2", "bokeh", "captum", "lightning", "torchvision", "PIL"},
    "cli": {"jsonargparse", "rich", "yaml"},
    "": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first in ("__init__", "__main__") else first


def imports(path: Path) -> set[str]:
    """Full dotted names that a file imports, relative ones resolved."""
    found = set()
    package = ["mrla", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            found |= {".".join([*base, *(node.module or "").split("."), alias.name]) for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_those_to_its_left(path):
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "mrla" and len(parts) > 1 and parts[1] in ORDER and room:
            other = parts[1]
            assert other == room or ORDER.index(other) < ORDER.index(room), f"{path}: {room} must not import {other}"
            assert not {room, other} == SIDE_BY_SIDE, f"{path}: dense and deploy do not import each other"


def folder_of(module: str, room: str) -> str:
    """The folder of a room that a module or name in it is of; none for the room's own files."""
    _, _, *rest = module.split(".")
    return rest[0] if rest and rest[0] in INSIDE[room] else ""


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in INSIDE], ids=str)
def test_a_folder_imports_only_those_to_its_left(path):
    room = room_of(path)
    own = folder_of(".".join(["mrla", *path.relative_to(PACKAGE).with_suffix("").parts]), room)
    if path == PACKAGE / room / "__init__.py":
        return  # the room's door
    for name in imports(path):
        if name.startswith(f"mrla.{room}."):
            other = folder_of(name, room)
            order = INSIDE[room]
            assert order.index(other) <= order.index(own), f"{path}: {own or room} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_takes_only_the_outside_packages_it_is_allowed(path):
    allowed = EVERYWHERE | OUTSIDE[room_of(path)] | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imports(path) if name} <= allowed


def test_only_kernels_are_compiled():
    for path in FILES:
        if "cpu" not in path.parts:
            assert not {name.split(".")[0] for name in imports(path)} & {"numba", "llvmlite"}, path


def test_torchs_private_names_are_in_one_file():
    for path in FILES:
        if path == PACKAGE / "ops" / "torch_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
                private = any(
                    part.startswith("_") and not part.startswith("__") for part in ast.unparse(node).split(".")
                )
                assert not private, f"{path}: {ast.unparse(node)}"
        private = {name for name in imports(path) if name.startswith("torch.") and "._" in name}
        assert private <= {"torch.nn.modules.batchnorm._BatchNorm"}, f"{path}: {private}"


def test_no_room_is_called_utils():
    names = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not names & {"utils", "common", "core", "helpers", "misc"}


def test_no_file_carries_a_timm_module_name():
    import timm.models

    theirs = set(timm.models._registry._module_to_models) - {"resnets", "deits", "efficientnets", "pvts"}
    assert not {path.stem for path in (PACKAGE / "models").rglob("*.py")} & theirs


def test_no_public_function_has_the_name_of_a_room_or_file():
    import mrla

    names = {path.stem for path in FILES} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    public = {name for name in dir(mrla) if not name.startswith("_") and callable(getattr(mrla, name))}
    assert {
        "attach",
        "detach",
        "save",
        "load",
        "fit",
        "evaluate",
        "compare",
        "benchmark",
        "fuse",
        "explain",
        "prune",
    } <= public
    assert not public & names


def test_every_room_has_its_page():
    rooms = [PACKAGE / room for room in ORDER]
    rooms += [PACKAGE / room / folder for room, folders in INSIDE.items() for folder in folders]
    assert {path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(rooms)
    assert all((room / "README.md").is_file() for room in rooms)


def test_the_tree_and_its_imports():
    """Printed, so that ``pytest -s -k the_tree`` draws the package: each folder, and what it imports of the others."""
    folders = sorted({path.parent for path in FILES} - {PACKAGE}, key=lambda folder: folder.relative_to(PACKAGE).parts)
    rank = {folder: _rank(folder) for folder in folders}
    lines = []
    for folder in sorted(folders, key=lambda folder: rank[folder]):
        own = ".".join(["mrla", *folder.relative_to(PACKAGE).parts])
        used = {other for path in folder.glob("*.py") for other in _folders_of(imports(path), folders)} - {folder}
        names = sorted(("/".join(other.relative_to(PACKAGE).parts) for other in used), key=len)
        lines.append(f"{own:<32} {len(list(folder.glob('*.py'))):>3} files <- {', '.join(names) or 'nothing of ours'}")
        inner = {path for path in folder.glob("*.py") if path.name != "__init__.py"}  # a door names what is inside
        needed = {other for path in inner for other in _folders_of(imports(path), folders)} - {folder}
        later = {other for other in needed if rank[other] > rank[folder]}
        assert not later, f"{own} imports {later}, which stands to its right"
    print("", *lines, sep="\n")
    assert len(lines) == len(folders)


def _rank(folder: Path) -> tuple[int, int]:
    room, *inner = folder.relative_to(PACKAGE).parts
    order = INSIDE.get(room, [""])
    return ORDER.index(room), order.index(inner[0]) if inner and inner[0] in order else 0


def _folders_of(names: set[str], folders: list[Path]) -> set[Path]:
    """The folders of the package that full dotted names lie in."""
    found = set()
    for name in names:
        parts = name.split(".")
        for length in range(len(parts), 1, -1):
            if parts[0] == "mrla" and (folder := PACKAGE.joinpath(*parts[1:length])) in folders:
                found.add(folder)
                break
    return found


def test_import_is_light():
    heavy = {"lightning", "matplotlib", "sklearn", "scipy", "jsonargparse", "rich", "onnx", "numba", "torchmetrics"}
    code = "import sys, torch, timm; before = set(sys.modules); import mrla; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & {name.split(".")[0] for name in result.stdout.split()}
