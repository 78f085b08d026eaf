"""`make gpu` without a GPU: its rehearsal, and that its first steps need nothing but PyTorch,
Triton and NumPy."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script

pytest.importorskip("triton")

from benchmarks import gpu, gpu_runner  # noqa: E402

# What PyTorch, Triton and NumPy are made of, and what they need.
BARE = [
    "torch",
    "torchgen",
    "functorch",
    "triton",
    "numpy",
    "numpy.libs",
    "typing_extensions.py",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
]
BARE += ["markupsafe", "fsspec", "filelock", "setuptools", "packaging"]


@pytest.mark.slow
def test_the_rehearsal(tmp_path, monkeypatch, capsys):
    """One step of each kind runs as on a GPU, and a second call finds its rows."""
    out = tmp_path / "gpu.csv"
    done = script("-m", "benchmarks.gpu", "--rehearse", f"--out={out}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = list(csv.DictReader(out.open()))
    assert {r["what"] for r in rows if r["status"] != "ok"} <= {
        "Liger",
        "F.linear_cross_entropy",
    }, rows  # a package, a version
    assert {r["step"] for r in rows} == {s.step for s in gpu.steps()}
    assert len(rows) == len(gpu.rehearsed()) and all(len(r["code"]) == 12 for r in rows)

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--list", f"--out={out}"])
    assert gpu.main() == 0
    assert capsys.readouterr().out.count(" s  done") == sum(r["status"] == "ok" for r in rows)


def test_a_table_of_another_version(tmp_path):
    (tmp_path / "gpu.csv").write_text("card,what\n")
    with pytest.raises(SystemExit, match="move it away"):
        gpu_runner.Table(tmp_path / "gpu.csv")


def test_needs_nothing_else(tmp_path):
    """An interpreter that sees only three packages imports the benchmark, and takes its first kinds
    of steps."""
    site = Path(torch.__file__).parent.parent
    for name in BARE:
        for path in [site / name, *site.glob(f"{name.removesuffix('.py')}-*.dist-info")]:
            if path.exists():
                (tmp_path / path.name).symlink_to(path)
    program = f"""
from benchmarks import gpu, gpu_runner
scale = gpu.rehearsal({str(tmp_path)!r})
assert float(gpu.check_kernel(scale, "cosine", "split")["loss_error"]) < 1e-5
assert float(gpu.measure_head(scale, "cosine", "float32")["loss_error"]) < 1e-5
assert "tokens_per_s" in gpu.measure_training(scale, "euclidean")
gpu.tell_packages()
step = next(s for s in gpu.steps() if s.step == "train.py")
print(gpu_runner.answer(step, scale)["note"])
"""
    environment = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pip install jsonargparse docstring-parser pyyaml safetensors tqdm psutil" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("needs jsonargparse")
