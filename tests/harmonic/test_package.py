"""The package by itself: what importing it starts, a wheel in a fresh environment, and a distance
that is added."""

import re
import shutil
import textwrap

import pytest
import torch
from conftest import ROOT, script

from harmonic import DISTANCES, HEADS

DOCUMENT = ROOT / "docs/add_a_distance.md"
LAST = "def distance(name: str) -> Callable[..., Tensor]:"  # of reference.py


def test_importing_starts_no_backend():
    """Neither Numba, nor CUDA, nor the Triton backend; and nothing else of this repository.

    No script starts torch._dynamo, which takes as long to import as PyTorch itself.
    """
    code = """
import sys, harmonic, torch
others = ("numba", "model", "training", "harmonic.backends.numba", "harmonic.backends.triton")
print([name for name in others if name in sys.modules], torch.cuda.is_initialized())
import train, sample, prepare_openwebtext, analysis.report
print("torch._dynamo" in sys.modules)
"""
    done = script("-c", code)
    assert done.stdout.split() == ["[]", "False", "False"], done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path):
    """A copy of the package and its tests."""
    for folder in ("harmonic", "tests/harmonic"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def add(path, text, after="", before=""):
    """Adds text to a file, after or before a line that it has once."""
    source, line = path.read_text(), after or before
    assert source.count(f"\n{line}\n") == 1
    path.write_text(source.replace(line, f"{line}\n{text}" if after else f"{text}\n\n{line}"))


def passed(folder, *command):
    """The number of tests that passed in a copy. None may fail."""
    quiet = ("-q", "-p", "no:cacheprovider")
    done = script(*command, *quiet, cwd=folder, env={"PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stdout[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


def test_a_distance_is_added_as_documented(copied):
    """The entry and the formula of docs/add_a_distance.md: the tests of all heads pass for it,
    unedited."""
    entry, formula, _ = re.findall(r"^```python\n(.*?)```", DOCUMENT.read_text(), re.S | re.M)
    add(copied / "harmonic/distances.py", entry, after="DISTANCES = {")
    add(copied / "harmonic/reference.py", formula, before=LAST)
    command = re.search(r"python (-m pytest .* -k \w+)", DOCUMENT.read_text()).group(1)
    assert passed(copied, *command.split()) > 30


def test_a_distance_is_added_by_a_program_as_documented(monkeypatch):
    *_, program = re.findall(r"^```python\n(.*?)```", DOCUMENT.read_text(), re.S | re.M)
    for table in (DISTANCES, HEADS):  # The entry is taken out again after the test.
        monkeypatch.setitem(table, "hellinger", None)
        del table["hellinger"]
    found = {}
    exec(program, found)
    h, w = torch.randn(3, 32), found["head"].weight
    d = (h.softmax(-1).sqrt()[:, None] - w.softmax(-1).sqrt()).square().sum(-1)
    torch.testing.assert_close(found["head"](h), -32 * d.log(), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_is_added_as_documented(copied, compiled):
    """The kernel of the same page, with and without its functions for Numba."""
    row, code, call = re.findall(r"^    ```python\n(.*?)    ```", DOCUMENT.read_text(), re.S | re.M)
    entry = '"log1p": Distance("sum log(1 + |h-w|)", "log1p", degree=None, source="ours"),'
    formula = "def log1p(h: Tensor, w: Tensor) -> Tensor:\n    return (h - w).abs().log1p().sum(-1)"
    add(copied / "harmonic/kernels.py", row, after="KERNELS = {")
    add(copied / "harmonic/distances.py", entry, after="DISTANCES = {")
    add(copied / "harmonic/reference.py", formula, before=LAST)
    if compiled:
        add(copied / "harmonic/backends/numba.py", textwrap.dedent(code), before="COMPILED = {")
        add(copied / "harmonic/backends/numba.py", call, after="COMPILED = {")
    assert passed(copied, "-m", "pytest", "tests/harmonic", "-k", "log1p or golden") > 30


@pytest.mark.slow
def test_a_wheel_is_built_and_used(tmp_path):
    """Its README's lines run, with nothing of this repository on the path."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    shutil.copytree(
        ROOT / "harmonic", source / "harmonic", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = script("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=source)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("harmonic_head-*.whl")
    installed = script("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    assert installed.returncode == 0, installed.stderr[-2000:]
    readme = (ROOT / "harmonic/README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    code = "from importlib.metadata import version\nimport harmonic\n" + example
    code += "print(harmonic.__file__, harmonic.__version__, version('harmonic-head'))"
    done = script("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr[-2000:]
    place, version, stated = done.stdout.split()[-3:]
    assert place.startswith(str(site)) and version == stated
    assert (site / "harmonic/py.typed").exists() and (site / "harmonic/backends/triton.py").exists()
