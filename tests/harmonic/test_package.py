"""The package by itself: what importing it starts, a wheel in a fresh environment, and a distance
that is added."""

import re
import shutil

import pytest
from conftest import ROOT, script

DOCUMENT = ROOT / "docs/add_a_distance.md"


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


def test_a_distance_is_added_as_documented(tmp_path):
    """The entry and the formula of docs/add_a_distance.md, in a copy of the package: the tests of
    all heads pass for it, unedited."""
    for folder in ("harmonic", "tests/harmonic"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    entry, formula = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    for name, place, text in (
        ("distances.py", "DISTANCES = {\n", entry),
        ("reference.py", "def distance(", None),
    ):
        path = tmp_path / "harmonic" / name
        source = path.read_text()
        assert source.count(place) == 1
        path.write_text(source.replace(place, place + entry if text else f"{formula}\n\n{place}"))
    command = re.search(r"python (-m pytest .* -k \w+)", DOCUMENT.read_text()).group(1)
    done = script(
        *command.split(),
        "-q",
        "-p",
        "no:cacheprovider",
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 30, done.stdout[-3000:]


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
