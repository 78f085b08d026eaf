"""Losses and gradients are what they were when tests/harmonic/golden.npz was written, to 2e-6 of
float64.

    python tests/harmonic/test_golden.py --bits  # bit for bit, on the machine that wrote the file
    # after a new head: adds its cases, and leaves the others
    python tests/harmonic/test_golden.py --add
    # after a change that is meant to move them; say in the commit why
    python tests/harmonic/test_golden.py --write

Each case is a head, a link and a seed, which also picks the sizes, the reduction, padding and
ignored labels. The file holds a float64 loss and its gradients for each case, and for each
implementation that runs on a CPU the hash of its float32 results. Triton's kernels run in Triton's
interpreter, in a process of their own. Compare bits in a second run: compiled code is then read
from Numba's cache, and the code of a fresh compilation may sum in another order.
"""

import hashlib
import itertools
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent.parent.parent),
]

from conftest import script  # noqa: E402
from head_cases import FAST  # noqa: E402

from harmonic import CONTROLS, HEADS, harmonic_loss  # noqa: E402
from harmonic.distances import resolve  # noqa: E402

FILE = Path(__file__).with_name("golden.npz")
SIZES = ((7, 19, 13), (9, 23, 5), (6, 18, 17))  # states, prototypes, coordinates of each seed
REDUCTIONS = ("mean", "sum", "none")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = ("triton",) if INTERPRETED else ("dense", "chunked", "numba")
OPTIONS = {
    "minkowski": ({}, {"p": 0.5}, {"p": 2.7}, {"p": 3.0}),
    "canberra_weighted": ({}, {"q": 2.0}),
}


def cases():
    """Yields (key, head, link, options, seed)."""
    for name, seed in itertools.product(HEADS, range(len(SIZES))):
        for link in ("control",) if name in CONTROLS else ("harmonic", "softmax"):
            for options in OPTIONS.get(name, ({},)):
                key = "-".join([name, link, *(f"{k}{v:g}" for k, v in options.items()), str(seed)])
                yield key, name, link, options, seed


def losses(name, link, options, seed, impl, dtype, precision="float32"):
    """-> the loss and its gradients with respect to states, prototypes, strength, bias and trained
    parameters, as arrays."""
    n, v, c = SIZES[seed]
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(n, c, generator=g), 0.5 * torch.randn(v, c, generator=g)
    h[1, 0] = w[2, 0]  # a coordinate without a difference
    targets = torch.randint(v - 2, (n,), generator=g)
    targets[seed + 1] = -100
    leaves = {"h": h, "w": w}
    settings = {
        "reduction": REDUCTIONS[seed],
        "rows": v - seed,
        "training": True,
        "impl": impl,
        "precision": precision,
        **options,
    }
    if link != "control":
        leaves["scale" if link == "softmax" else "exponent"] = torch.tensor(2.0 + 3.0 * seed)
        settings["link"] = link
    if name == "cross_entropy":
        leaves["bias"] = torch.randn(v - seed, generator=g)
    for key, start in resolve(name, **options)[0].parameters(c).items():
        leaves[key] = start + 0.2 * torch.randn(start.shape, generator=g)
    leaves = {k: t.to(dtype).requires_grad_() for k, t in leaves.items()}
    torch.manual_seed(seed)  # of noise
    h, w = leaves["h"], leaves["w"]
    loss = harmonic_loss(
        h, w, targets, name, **settings, **{k: t for k, t in leaves.items() if k not in ("h", "w")}
    )
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=dtype).view(loss.shape)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream, allow_unused=True)
    found = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {k: t.numpy() for k, t in found.items() if t is not None}


def digest(arrays):
    """-0 and 0 are the same."""
    parts = (k.encode() + np.ascontiguousarray(a + 0).tobytes() for k, a in sorted(arrays.items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def supported(name, link, options, impl):
    """Whether there is a compiled kernel; the two others have all."""
    compiled = name in FAST and not (name == "canberra_weighted" and options)
    return compiled or impl in ("dense", "chunked")


def hashes(seeds=(0, 1, 2)):
    """Yields (key, implementation, precision, arrays)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for key, *case in cases():
            for impl in IMPLS:
                if case[3] not in seeds or not supported(*case[:3], impl):
                    continue
                split = impl != "dense" and resolve(case[0], **case[2])[0].kernel in ("l2", "dot")
                for precision in ("float32", "split") if split else ("float32",):
                    yield key, impl, precision, losses(*case, impl, torch.float32, precision)
    finally:
        torch.set_num_threads(threads)


def machine():
    """What may change the last bit."""
    model = next(
        (
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return (
        f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, numpy"
        f" {np.__version__}"
    )


def write(add):
    """add: keep what the file has."""
    stored = {}
    if FILE.exists() and (INTERPRETED or add):
        with np.load(FILE) as before:
            stored = dict(before)
    known = json.loads(str(stored.get("hashes", "{}")))
    for key, impl, precision, arrays in hashes():
        name = f"{key} {impl} {precision}"
        if not (add and name in known):
            known[name] = digest(arrays)
    if not INTERPRETED:
        for key, *case in cases():
            if add and f"{key} loss" in stored:
                continue
            # float64 would draw other noise, and has another floor at distance 0.
            same = case[0] in ("hamming_gumbel", "hamming_hard")
            dtype = torch.float32 if same else torch.float64
            for name, array in losses(*case, "chunked", dtype).items():
                stored[f"{key} {name}"] = array
    np.savez_compressed(FILE, **stored | {"hashes": json.dumps(known), "machine": machine()})


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


def compare(golden, exact=False):
    """Raises AssertionError for the first case that has moved."""
    known, moved = json.loads(str(golden["hashes"])), []
    few = INTERPRETED and not exact  # The interpreter is slow.
    for key, impl, precision, arrays in hashes([0] if few else [0, 1, 2]):
        name = f"{key} {impl} {precision}"
        if f"{key} loss" not in golden:
            continue  # A head that is newer than the file.
        if exact and digest(arrays) != known[name]:
            moved.append(name)
        for name, array in arrays.items():
            true = golden[f"{key} {name}"]
            # p < 1: slopes are unbounded at 0.
            allowed = 1e-4 if "p0.5" in key else 2e-4 if precision == "split" else 2e-6
            assert np.abs(array - true).max() <= allowed * max(1.0, np.abs(true).max()), (
                f"{name} of {key}, {impl}, {precision}"
            )
    assert not moved, f"{len(moved)} of {len(known)} differ in a bit: {', '.join(moved[:5])}"


def test_results_are_what_they_were(golden):
    compare(golden)


@pytest.mark.slow
def test_results_of_triton_are_what_they_were():
    pytest.importorskip("triton")
    done = script(__file__, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    if sys.argv[1:] in (["--write"], ["--add"]):
        write(add=sys.argv[1] == "--add")
    else:
        compare(dict(np.load(FILE)), exact=sys.argv[1:] == ["--bits"])
