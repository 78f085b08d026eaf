"""Functions are short, imports go one way, and no two files import each other."""

import ast
import functools
import graphlib
from pathlib import Path

from conftest import ROOT

LONGEST = 60  # lines of a function
KERNELS = ("harmonic/backends/numba.py", "harmonic/backends/triton.py")
# A room imports itself and what is before it in this list. A file at the top is a room of its own.
ROOMS = [
    {"harmonic", "base"},
    {"model", "text"},
    {"training"},
    {"interop", "analysis"},
    {"studies", "benchmarks"},
    {"train", "sample", "prepare_openwebtext"},
]
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """The syntax of every file of the rooms."""
    found = {}
    for room in HEIGHT:
        for path in [ROOT / f"{room}.py", *(ROOT / room).rglob("*.py")]:
            if path.is_file():
                found[path.relative_to(ROOT)] = ast.parse(path.read_bytes())
    return found


def module_of(path: Path) -> str:
    """`text.tokenizers` for text/tokenizers/__init__.py."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def modules() -> set[str]:
    return {module_of(path) for path in trees()}


def imports(path: Path, node: ast.AST) -> list[str]:
    """The modules that an import statement of a file names; none for any other statement."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        package = path.parts[: len(path.parts) - node.level]
        start = ".".join([*package, *filter(None, [node.module])])
    else:
        start = node.module
    names = [f"{start}.{alias.name}" for alias in node.names]
    return [name if name in modules() else start for name in names]


def test_functions_are_short():
    long = []
    for path, tree in trees().items():
        if str(path) in KERNELS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST:
                    long.append(f"{path}:{node.lineno} {node.name} has {lines} lines")
    assert not long


def test_imports_go_one_way():
    """Those inside of functions too. A script is never imported."""
    wrong = []
    for path, tree in trees().items():
        own = path.with_suffix("").parts[0]
        for node in ast.walk(tree):
            for name in imports(path, node):
                room = name.split(".")[0]
                later = room in HEIGHT and room != own and HEIGHT[room] >= HEIGHT[own]
                if later or room == "tests":
                    wrong.append(f"{path}:{node.lineno} imports {name}")
    assert not wrong


def test_no_files_import_each_other():
    """While they are loaded. An import inside of a function says there why it is not at the top."""
    needs = {}
    for path, tree in trees().items():
        names = (name for node in tree.body for name in imports(path, node))
        needs[module_of(path)] = set(names)
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the files
