"""Compiles every variant of the Triton kernels for sm_80, sm_90 and sm_100, and lists what each
needs. No GPU is needed.

    python -m benchmarks.gpu_compile  # registers and spills, to results/gpu_compile.csv
    # instructions of inner loops, to results/gpu_instructions.csv
    python -m benchmarks.gpu_compile --instructions=true

Registers and spilled bytes are for each thread, as ptxas reports them. Shared memory is for each
block. The variants are those that the loss starts at GPT-2's size. This program runs the loss on
tensors without data, and records what it starts.

The second table has the elementwise kernels with the harmonic link and without a denominator. It
counts the instructions of the inner loop for each pair and coordinate. A packed instruction of
sm_100, such as FADD2, counts once. For sm_90 it has two lower bounds of the time at 8,192 x 50,304
x 768 on an H100 SXM or H200: for the operations in the formula, and for the compiled instructions.
Each is the time of the hardware unit that is busy longest.

`measured_ms` is from results/head_cuda.csv, with the kernels and the card there. For `tile` it is
the forward pass. For each of the two `gradient` kernels it is half of the additional time of the
backward pass, which includes `_slopes`.
"""

import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from analysis import tables
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import check
from base.files import result_file
from harmonic.backends import triton as gpu
from harmonic.precision import FLOAT32, SPLIT, Products

N, V, C = 8192, 50257, 768
# (kernel, options, root).
KERNELS: list[tuple[str, dict[str, float], float]] = [
    ("l2", {}, 0.5),
    ("l2", {}, 1.0),
    ("linf", {}, 1.0),
    ("lse", {"a": 10.0}, 1.0),
    ("canberra", {}, 1.0),
]
KERNELS += [("lp", {"p": p}, 1 / p) for p in (0.5, 1.0, 1.5, 2.0, 3.0, 2.5)]
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
PRODUCTS = [FLOAT32, SPLIT, Products("autocast", torch.bfloat16, torch.bfloat16)]
MEASURED = "results/head_cuda.csv"
SIZE = (8192, 50304, 768)  # The size in MEASURED.

# For an H100 SXM or H200: results per cycle of one multiprocessor of compute capability 9.0, from
# the table "Throughput of Native Arithmetic Instructions" in CUDA's guides.
# float: float32 additions and multiplications. compare: comparisons, minima, selections, integers
# and logic. special: rsqrt, log2 and exp2. issue: each of four schedulers starts one instruction of
# 32 threads per cycle. load: one load of 32 threads per cycle.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
RATES = {"issue": 128, "float": 128, "compare": 64, "special": 16, "load": 32}

# Classes of instructions, by the beginning of their names. All others are "other". MUFU is rsqrt,
# log2 and exp2.
CLASSES = {
    "float": ("FADD", "FMUL", "FFMA", "HFMA2"),
    "compare": ("FSETP", "FSEL", "FMNMX", "FSET", "SEL"),
    "special": ("MUFU",),
    "load": ("LDG", "LDS", "LDL", "STG", "STS", "STL"),
    "integer": ("I", "U", "LOP", "PLOP", "SHF", "LEA", "MOV", "VIADD", "F2I", "R2"),
}


@dataclass
class CompileConfig:
    """What to compile for"""

    archs: list[int] = field(default_factory=lambda: [80, 90, 100])
    """compute capabilities times ten"""
    instructions: bool = False
    """count the instructions of inner loops instead"""
    out: str | None = None
    """the CSV file; null = results/gpu_compile.csv or gpu_instructions.csv"""

    def table(self) -> Path:
        kind = "instructions" if self.instructions else "compile"
        return Path(self.out or f"results/gpu_{kind}.csv")


def cases() -> Iterator[tuple[SimpleNamespace, bool, bool, Products]]:
    """Yields every way to call `gpu.run`.

    It is (epilogue, whether there are terms or a bias, whether gradients are wanted, products).
    """

    def epilogue(kernel: str, options: dict, root: float, link: str) -> SimpleNamespace:
        return SimpleNamespace(
            kernel=kernel, options=options, link=link, factor=1.0, root=root, floor=1e-3
        )

    for gradients in (False, True):
        for link in ("harmonic", "softmax"):
            for kernel in KERNELS:
                # With these two roots the denominator is handled in different ways.
                rank_one = kernel[1].get("p") in (1.0, 1.5)
                for terms in [False, True] if rank_one else [False]:
                    for products in PRODUCTS if kernel[0] == "l2" else [FLOAT32]:
                        yield epilogue(*kernel, link), terms, gradients, products
        for terms in (False, True):
            for products in PRODUCTS:
                yield epilogue("dot", {}, 1.0, "control"), terms, gradients, products


def variants() -> dict:
    """All kernels that `gpu.run` starts in `cases`.

    Returns: (kernel, its constants in words) -> arguments of `compiled`.
    """
    found: dict[tuple[str, str], tuple[Any, dict]] = {}

    def record(
        kernel: Any, grid: Any, warps: int, registers: int | None = None, **arguments: Any
    ) -> None:
        constants, signature, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            whole = isinstance(value, int)
            # A launch specialises on the same values.
            if parameter.is_constexpr or value is None or (whole and value == 1):
                constants[name], signature[name] = value, "constexpr"
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = "i32" if whole else "fp32"
            if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        found.setdefault(
            (kernel.__name__.strip("_"), words(constants, signature)),
            (source, {"num_warps": warps, "maxnreg": registers}),
        )

    launch, gpu.launch = gpu.launch, record
    try:
        for epilogue, terms, gradients, products in cases():
            control = epilogue.link == "control"
            u, v = (empty(N), empty(V)) if terms and not control else (None, None)
            bias = empty(V) if terms and control else None
            targets = torch.empty(N, dtype=torch.int64, device="meta")
            gpu.run(
                empty(N, C),
                empty(V, C),
                u,
                v,
                empty(),
                bias,
                targets,
                empty(N),
                epilogue,
                gradients,
                products,
            )
        x = empty(V, C).requires_grad_()
        torch.autograd.grad(gpu.Unit.apply(x), x, empty(V, C))
    finally:
        gpu.launch = launch
    return found


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def words(constants: dict, signature: dict) -> str:
    """A variant in words: "sum l1 harmonic root=1 +raw +u +v". + marks optional operands."""
    named = [constants[k] for k in ("MODE", "TERM", "SLOPE", "LINK") if constants.get(k)]
    named = [re.sub(r"^_|_(term|slope)$", "", getattr(value, "__name__", value)) for value in named]
    named += [f"root={constants['ROOT']:.3g}"] if "ROOT" in constants else []
    named += [
        text
        for stride, text in (("OTHER", "by rows"), ("OWN", "by prototypes"))
        if constants.get(stride) == 1
    ]
    named += [f"width={constants['WIDTH']}"] if "WIDTH" in constants else []
    there = [k for k, kind in signature.items() if kind != "constexpr"]
    named += [f"slopes={signature['high'].removeprefix('*')}"] if "high" in there else []
    optional = {
        "low": "low",
        "unit_x": "unit",
        "raw": "raw",
        "kept": "kept",
        "near": "near",
        "u": "u",
        "v": "v",
    }
    return " ".join(named + [f"+{word}" for k, word in optional.items() if k in there])


def build(source: Any, options: dict, arch: int) -> tuple[Any, str]:
    """The compiled kernel and the output of ptxas.

    It compiles even if the kernel is in the cache, because ptxas would report nothing then.
    """
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return kernel, log.getvalue()


def compiled(source: Any, options: dict, arch: int) -> dict:
    """Compiles a kernel. Returns registers, spill_stores, spill_loads (bytes) and shared_bytes."""
    kernel, log = build(source, options, arch)
    said = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    numbers = [int(re.findall(pattern, log)[0]) for pattern in said]
    names = ("registers", "spill_stores", "spill_loads", "shared_bytes")
    return dict(zip(names, (*numbers, kernel.metadata.shared)))


# Instructions


@dataclass(frozen=True)
class Elementwise:
    """An elementwise kernel.

    variant: without "by rows" and "by prototypes".
    needs: the operations of its formula for a pair and coordinate, by class. A multiplication and
        the addition of its product count as one. Signs and absolute values of operands are free.
    head: its name in MEASURED.
    """

    kernel: str
    variant: str
    needs: dict[str, int]
    head: str | None = None


# A tile needs the difference and the operations on it. lse needs a maximum, and then a sum that
# computes the differences again. A gradient needs the difference, perhaps its sign, factors and the
# sum.
ELEMENTWISE = [
    Elementwise("tile", "sum l1", {"float": 2}, "manhattan"),
    Elementwise("tile", "sum half", {"float": 2, "special": 1}),
    Elementwise("tile", "sum three_halves", {"float": 2, "special": 1}, "minkowski"),
    Elementwise("tile", "sum square", {"float": 2}),
    Elementwise("tile", "sum cube", {"float": 3}),
    Elementwise("tile", "sum power", {"float": 3, "special": 2}),
    Elementwise("tile", "linf l1", {"float": 1, "compare": 1}, "chebyshev"),
    Elementwise("tile", "linf l1 +kept", {"float": 1, "compare": 2}),
    Elementwise("tile", "lse l1", {"float": 4, "compare": 1, "special": 1}, "chebyshev_smooth"),
    Elementwise("tile", "sum canberra", {"float": 3, "special": 1}, "canberra"),
    Elementwise("gradient", "l1", {"float": 3}, "manhattan"),
    Elementwise("gradient", "half", {"float": 4, "special": 1}),
    Elementwise("gradient", "three_halves", {"float": 3, "special": 1}, "minkowski"),
    Elementwise("gradient", "square", {"float": 2}),
    Elementwise("gradient", "cube", {"float": 3}),
    Elementwise("gradient", "power", {"float": 5, "special": 2}),
    Elementwise("gradient", "maximum +kept", {"float": 1, "compare": 1}, "chebyshev"),
    Elementwise("gradient", "smooth +kept", {"float": 5, "special": 1}, "chebyshev_smooth"),
    Elementwise("gradient", "canberra", {"float": 8, "special": 1}, "canberra"),
]


def find_elementwise(kernel: str, variant: str) -> Elementwise | None:
    """The entry for a variant, or None if it is not in the table of instructions."""
    plain = re.sub(r" (harmonic root=\S+|\+raw|by \w+)", "", variant)
    if "+raw" in variant and "linf" not in variant:  # The loop is the same without it.
        return None
    return next((e for e in ELEMENTWISE if (e.kernel, e.variant) == (kernel, plain)), None)


def disassemble(kernel: Any) -> str:
    """The SASS code of a kernel, with labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout


def innermost_loops(sass: str) -> list[list[str]]:
    """The names of instructions, such as "FADD", in each loop that contains no other loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line):
            names.append(found[1])
            target = re.search(r"BRA.*`\((\.L_\w+)\)", line)
            # A jump backwards, but not the jump to itself at the end of a kernel.
            if target and labels.get(target[1], len(names)) < len(names) - 1:
                loops.append((labels[target[1]], len(names)))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [names[first:last] for first, last in inner]


def main_loops(sass: str) -> list[list[str]]:
    """The unrolled loops over coordinates or rows.

    They are the longest loop with special functions, and the longest without.
    """
    loops = [loop for loop in innermost_loops(sass) if any(name.startswith("LDG") for name in loop)]
    kinds: dict[bool, list[list[str]]] = {}
    for loop in loops:
        special = any(name.startswith("MUFU") for name in loop)
        kinds.setdefault(special, []).append(loop)
    return [max(kind, key=len) for kind in kinds.values()]


def steps(loop: list[str], kernel: str, variant: str, warps: int) -> int:
    """How many steps of the source one pass of an unrolled loop makes, from its number of loads.

    In a step a thread loads one number for each of its rows, and four for its columns. Slopes that
    need `kept` load one more for each row. The gradient of a maximum loads no columns.
    """
    widths = {"64": 2, "128": 4}
    loaded = sum(widths.get(name.split(".")[-1], 1) for name in loop if name.startswith("LDG"))
    rows = gpu.BLOCK**2 // (32 * warps) // 4
    columns = 0 if variant.startswith("maximum") else 4
    step = (2 if kernel == "gradient" and "+kept" in variant else 1) * rows + columns
    assert loaded % step == 0, (
        f"{kernel} {variant} loads {loaded} numbers a turn, not a multiple of {step}: its blocks"
        " have another shape"
    )
    return loaded // step


def classify(name: str) -> str:
    return next((kind for kind, starts in CLASSES.items() if name.startswith(starts)), "other")


def count_instructions(sass: str, kernel: str, variant: str, warps: int) -> dict[str, float]:
    """Instructions for each pair and coordinate, by class.

    "packed" are those of "float" that compute two results.
    """
    counts = dict.fromkeys((*CLASSES, "other", "packed"), 0.0)
    for loop in main_loops(sass):
        each = 1 / (steps(loop, kernel, variant, warps) * gpu.BLOCK**2 // (32 * warps))
        for name in loop:
            counts[classify(name)] += each
            counts["packed"] += each * bool(re.match(r"F(ADD|MUL|FMA)2", name))
    return counts


def least_ms(counts: dict) -> float:
    """The time, at SIZE, of the hardware unit that is busy longest."""
    classes = [*CLASSES, "other"]
    work = {kind: counts.get(kind, 0.0) for kind in classes}
    busy = {
        "issue": sum(work.values()),
        "float": work["float"] + counts.get("packed", 0.0),
        "special": work["special"],
    }
    # Integers and comparisons share a unit.
    busy |= {"load": work["load"], "compare": work["compare"] + work["integer"]}
    N, V, C = SIZE
    return max(
        1000 * N * V * C * busy[unit] / (rate * MULTIPROCESSORS * CLOCK)
        for unit, rate in RATES.items()
    )


def measured_ms(path: str) -> dict[tuple[str, str], float]:
    """(kernel, head) -> ms, from the file MEASURED if it exists."""
    found = {}
    for row in tables.read_csv(path) if Path(path).is_file() else ():
        here = (
            tuple(int(row[k]) for k in "NVC") == SIZE
            and row["impl"] == "ours"
            and row["dtype"] == "float32"
        )
        if here:
            forward, both = float(row["forward_seconds"]), float(row["forward_backward_seconds"])
            found["tile", row["head"]] = 1000 * forward
            found["gradient", row["head"]] = 1000 * (both - forward) / 2
    return found


def instruction_rows(archs: list[int]) -> list[dict]:
    """The table of instructions."""
    known, rows = measured_ms(MEASURED), []
    work = [(*name, *wanted, find_elementwise(*name)) for name, wanted in variants().items()]
    work = [(*item, arch) for item in work if item[-1] for arch in archs]
    for kernel, variant, source, options, entry, arch in tqdm(work, disable=None, leave=False):
        counts = count_instructions(
            disassemble(build(source, options, arch)[0]), kernel, variant, options["num_warps"]
        )
        row = {"kernel": kernel, "variant": variant, "arch": f"sm_{arch}"}
        row["instructions"] = f"{sum(counts.values()) - counts['packed']:.2f}"
        row |= {kind: f"{counts[kind]:.2f}" for kind in (*CLASSES, "other")}
        if arch == 90:
            formula, floor = least_ms(entry.needs), least_ms(counts)
            row |= {"floor_formula_ms": f"{formula:.1f}", "floor_instructions_ms": f"{floor:.1f}"}
            if (kernel, entry.head) in known:
                took = known[kernel, entry.head]
                row |= {"measured_ms": f"{took:.1f}", "ratio": f"{took / floor:.2f}"}
        rows.append(row)
    return rows


def main() -> None:
    (c,) = parse(sys.argv[1:], CompileConfig)
    if triton.knobs.runtime.interpret:
        check(["TRITON_INTERPRET is set: nothing would be compiled"])
    out = result_file(c.table())
    if c.instructions:
        rows = instruction_rows(c.archs)
        print(tables.markdown(rows, list(dict.fromkeys(key for row in rows for key in row))))
        tables.write_csv(out, rows)
        print(f"wrote {out}")
        return
    rows = []
    work = [(name, wanted, arch) for name, wanted in variants().items() for arch in c.archs]
    for (kernel, variant), (source, options), arch in tqdm(work, disable=None, leave=False):
        row = {"kernel": kernel, "variant": variant, "arch": f"sm_{arch}"}
        rows.append(row | compiled(source, options, arch))
    shown = [{**r, "spilled": r["spill_stores"] + r["spill_loads"]} for r in rows]
    shared = Column("shared_bytes", "shared")
    columns: tables.Columns = ["kernel", "variant", "arch", "registers", "spilled", shared]
    print(tables.text(shown, columns))
    spills = Counter(r["arch"] for r in rows if r["spill_stores"] or r["spill_loads"])
    print(
        f"{len(rows)} compiled; with spills: {dict(spills) or 'none'}; most registers:"
        f" {max(r['registers'] for r in rows)}"
    )
    tables.write_csv(out, rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
