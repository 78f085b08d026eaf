"""Compiles every variant of the Triton kernels for sm_80, sm_90 and sm_100, without a GPU, and lists what each needs.

    python -m benchmarks.gpu_compile

Registers and spilled bytes are a thread's, as ptxas reports them; shared memory is a block's. The variants are those that the loss starts
at GPT-2's size, as this records them while it runs on tensors without data. Writes a CSV.
"""

import contextlib
import io
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.head import write
from harmonic.kernels import gpu
from training.config import check, cli, parse

N, V, C = 8192, 50257, 768
# kernel, options, root
KERNELS = [("l2", {}, 0.5), ("l2", {}, 1.0), ("linf", {}, 1.0), ("lse", {"a": 10.0}, 1.0), ("canberra", {}, 1.0)]
KERNELS += [("lp", {"p": p}, 1 / p) for p in (0.5, 1.0, 1.5, 2.0, 3.0, 2.5)]
TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}


@dataclass
class CompileConfig:
    """What to compile for"""

    archs: list[int] = field(default_factory=lambda: [80, 90, 100])
    """compute capabilities, times ten"""
    out: str = "results/gpu_compile.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        folder = Path(self.out).parent
        return [] if folder.is_dir() else [f"--out={self.out}: the folder {folder} does not exist"]


def cases():
    """-> (epilogue, rank-one terms or a control's bias, gradients) of every way to call `gpu.run`."""

    def epilogue(kernel, options, root, link):
        return SimpleNamespace(kernel=kernel, options=options, link=link, factor=1.0, root=root, floor=1e-3)

    for gradients in (False, True):
        for link in ("harmonic", "softmax"):
            for kernel in KERNELS:
                rank_one = kernel[1].get("p") in (1.0, 1.5)  # the two ways a denominator meets a root
                yield from ((epilogue(*kernel, link), terms, gradients) for terms in ([False, True] if rank_one else [False]))
        for terms in (False, True):
            yield epilogue("dot", {}, 1.0, "control"), terms, gradients


def variants() -> dict:
    """(kernel, its constants in words) -> what `compiled` reads, of every kernel that `run` starts in one of `cases`."""
    found = {}

    def record(kernel, grid, warps, registers=None, **arguments):
        constants, signature, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            whole = isinstance(value, int)
            if parameter.is_constexpr or value is None or (whole and value == 1):  # as a launch specialises
                constants[name], signature[name] = value, "constexpr"
                continue
            signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" if whole else "fp32"
            if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        found.setdefault((kernel.__name__.strip("_"), words(constants, signature)), (source, {"num_warps": warps, "maxnreg": registers}))

    launch, gpu.launch = gpu.launch, record
    try:
        for epilogue, terms, gradients in cases():
            control = epilogue.link == "control"
            u, v = (empty(N), empty(V)) if terms and not control else (None, None)
            bias = empty(V) if terms and control else None
            targets = torch.empty(N, dtype=torch.int64, device="meta")
            gpu.run(empty(N, C), empty(V, C), u, v, empty(), bias, targets, empty(N), epilogue, gradients)
    finally:
        gpu.launch = launch
    return found


def empty(*shape):
    return torch.empty(shape, device="meta")


def words(constants: dict, signature: dict) -> str:
    """Such as "sum l1 harmonic root=1 +raw +u +v": with those optional operands."""
    named = [constants[k] for k in ("MODE", "TERM", "SLOPE", "LINK") if constants.get(k)]
    named = [re.sub(r"^_|_(term|slope)$", "", getattr(value, "__name__", value)) for value in named]
    named += [f"root={constants['ROOT']:.3g}"] if "ROOT" in constants else []
    named += [text for stride, text in (("OTHER", "by rows"), ("OWN", "by prototypes")) if constants.get(stride) == 1]
    return " ".join(named + [f"+{k}" for k in ("raw", "kept", "near", "u", "v") if signature.get(k, "constexpr") != "constexpr"])


def compiled(source, options: dict, arch: int) -> dict:
    """-> registers, spill_stores, spill_loads (bytes), shared_bytes. Always compiles: ptxas reports nothing for what a cache holds."""
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    numbers = [int(re.search(pattern, log.getvalue())[1]) for pattern in said]
    return dict(zip(("registers", "spill_stores", "spill_loads", "shared_bytes"), (*numbers, kernel.metadata.shared)))


def main():
    (c,) = parse(sys.argv[1:], CompileConfig)
    check(["TRITON_INTERPRET is set: nothing would be compiled"] if triton.knobs.runtime.interpret else [])
    rows = []
    work = [(name, wanted, arch) for name, wanted in variants().items() for arch in c.archs]
    for (kernel, variant), wanted, arch in tqdm(work, disable=None, leave=False):
        rows.append({"kernel": kernel, "variant": variant, "arch": f"sm_{arch}", **compiled(*wanted, arch)})
    width = max(len(r["variant"]) for r in rows)
    print(f"{'kernel':<9} {'variant':<{width}} {'arch':<6} registers  spilled  shared")
    for r in rows:
        spilled = r["spill_stores"] + r["spill_loads"]
        print(f"{r['kernel']:<9} {r['variant']:<{width}} {r['arch']:<6} {r['registers']:>9} {spilled:>8} {r['shared_bytes']:>7}")
    spills = Counter(r["arch"] for r in rows if r["spill_stores"] or r["spill_loads"])
    print(f"{len(rows)} compiled; with spills: {dict(spills) or 'none'}; most registers: {max(r['registers'] for r in rows)}")
    write(rows, c.out)


if __name__ == "__main__":
    cli(main)
