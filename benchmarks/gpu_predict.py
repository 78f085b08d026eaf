"""Predicts the time of an iteration on one H100 SXM from numbers of operations and bytes.

    # prints a table, writes results/gpu_predicted.csv; reads results/gpu_instructions.csv
    python -m benchmarks.gpu_predict

Rows of gpt2_124m and qwen2_0.5b are one micro-batch of configs/. They include head and trunk,
forward and backward, and a share of the optimiser's step. Rows of head_8192 are the head alone, as
`python -m benchmarks.head` measures it.

`ratio` is the time divided by that of the same trunk with nanoGPT's head. `least_ratio` is a lower
bound: there the passes over pairs are as fast as memory, and elementwise kernels as fast as their
instructions. If results/gpu.csv has the row, `measured_ms` is its `step_ms`, from an H100 rather
than an H200. `quotient` is `measured_ms` divided by the prediction. A measured training step has
one micro-batch and one step of the optimiser, so that prediction includes a complete step.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from analysis import tables
from base.command_line import cli, parse
from base.files import result_file
from benchmarks.gpu_compile import CLOCK, MULTIPROCESSORS, RATES, SIZE

# The card
PEAK = 989e12  # Dense bfloat16 products, from NVIDIA's data sheet of the H100 SXM.
HALF = 650e12  # Assumed. Large products with bfloat16 operands reach 600 to 700e12.
FLOAT32 = 51e12  # Measured on an H200, which has the same float32 units (LOG.md: 49 to 54e12).
MEMORY = 0.9 * 3.35e12  # From the data sheet. Large copies reach nine tenths of it.
# Assumed: the MFU of good training loops with GPT-2 124M on an H100, counted as in PaLM (arXiv
# 2204.02311, appendix B).
TRUNK_MFU = 0.40
# The time of an elementwise kernel divided by the lower bound from its instructions. It was 1.1 to
# 1.7 for manhattan and canberra on an H200.
INSTRUCTIONS = 1.3

# Bytes for each pair of state and prototype, besides what the product itself reads and writes.
# bfloat16 logits are read for the maximum and for the sum. The gradient reads and overwrites them.
NANOGPT_COMPILED = 2 + 2 + 4
# A conversion to float32, log_softmax with two reads, its gradient, a conversion to bfloat16.
NANOGPT_EAGER = 6 + 12 + 8 + 6
TILE, SLOPES = 4, 8
# Slopes in one bfloat16 part.
AUTOCAST_SLOPES = 6

# Instructions for each pair in `_tile` and `_slopes` (split, harmonic link), compiled for sm_90.
# ISSUED assumes that they get 0.44 of the issue slots. Earlier versions of `_slopes` had 68 (dot)
# and 167 (l2) instructions. They took 2.2 and 5.2 ms for 8,192 x 50,304 pairs on an H200, which is
# 0.43 and 0.44.
PASSES: dict[str, tuple[float, float]] = {"dot": (41, 33), "l2": (84, 122)}
ISSUED = 0.44 * MULTIPROCESSORS * CLOCK * RATES["issue"]

# Maps of both operands, forward and backward.
# Bytes for each number of h and w: `Unit` forward, again in the backward pass, and backward.
COSINE_MAP = 8 + 8 + 12
# Seconds besides its products, measured on an H200: a factorisation in float64, and sums.
MAHALANOBIS_OTHER = 3.1e-3

# Bytes for each parameter: of a step of the optimiser, and of a micro-batch after the first, which
# reads two gradients and writes one.
OPTIMIZER = 28 + 12
ACCUMULATE = 12

CHUNK = 2**27  # The pairs of a chunk in harmonic/backends/triton.py.
GOALS = {"cross_entropy": 1.05, "euclidean": 1.3, "cosine": 1.3, "mahalanobis": 1.3}
ELEMENTWISE = {  # head -> its rows in results/gpu_instructions.csv.
    "chebyshev": ("linf l1 +kept", "maximum +kept"),
    "manhattan": ("sum l1", "l1"),
    "minkowski": ("sum three_halves", "three_halves"),
    "canberra": ("sum canberra", "canberra"),
}
NANOGPT, PLAIN = "nanoGPT's", "F.linear + F.cross_entropy"
NAMES = {NANOGPT: "loop in nanoGPT's manner"}  # Other names in results/gpu.csv.
COLUMNS = [
    "model",
    "head",
    "precision",
    "head_ms",
    "trunk_ms",
    "optimizer_ms",
    "iteration_ms",
    "ratio",
    "least_ratio",
    "goal",
    "meets",
]
COLUMNS += ["card", "measured_ms", "quotient"]


@dataclass
class PredictConfig:
    """Predictions"""

    instructions: str = "results/gpu_instructions.csv"
    """the table of `python -m benchmarks.gpu_compile --instructions=true`"""
    measured: str = "results/gpu.csv"
    """measurements, if there are any"""
    out: str = "results/gpu_predicted.csv"
    """the CSV file"""

    def problems(self) -> list[str]:
        there = Path(self.instructions).is_file()
        return [] if there else [f"--instructions={self.instructions} does not exist"]


@dataclass(frozen=True)
class Slack:
    """The assumptions of a prediction.

    instructions: a factor of the lower bound from instructions. passes: as PASSES.
    """

    instructions: float
    passes: dict[str, tuple[float, float]]


EXPECTED, LEAST = Slack(INSTRUCTIONS, PASSES), Slack(1.0, dict.fromkeys(PASSES, (0.0, 0.0)))


@dataclass(frozen=True)
class Work:
    """A micro-batch.

    trunk, parameters: the number of weights in the blocks, and in the whole model.
    accumulation: micro-batches for each step of the optimiser.
    baseline: the head that ratios are relative to. passes: its bytes for each pair.
    """

    name: str
    tokens: int
    prototypes: int
    width: int
    layers: int = 0
    length: int = 1024
    trunk: float = 0.0
    parameters: float = 0.0
    accumulation: int = 1
    baseline: str = NANOGPT
    passes: int = NANOGPT_COMPILED

    @property
    def pairs(self) -> int:
        return self.tokens * self.prototypes

    @property
    def chunks(self) -> int:
        return math.ceil(self.tokens / (CHUNK // self.prototypes))

    def product(self) -> float:
        """The operations of one product of all states with all prototypes."""
        return 2 * self.pairs * self.width

    def trunk_ms(self) -> float:
        """The time of the trunk, forward and backward."""
        operations = 6 * self.trunk + 12 * self.layers * self.width * self.length
        return 1000 * self.tokens * operations / (TRUNK_MFU * PEAK)

    def optimizer_ms(self, accumulation: int) -> float:
        """The share of a micro-batch in a step of the optimiser and in adding up gradients."""
        size = OPTIMIZER / accumulation + ACCUMULATE * (1 - 1 / accumulation)
        return 1000 * self.parameters * size / MEMORY


# GPT-2: 12 blocks of 12 C^2 weights, and a tied table. One GPU runs all 40 micro-batches of
# configs/gpt2_124m.yaml.
GPT2 = Work(
    "gpt2_124m",
    12 * 1024,
    50304,
    768,
    12,
    trunk=12 * 12 * 768**2,
    parameters=124.4e6,
    accumulation=40,
)
# Qwen2: a block has q and o of C^2, k and v of C x 128, and three matrices of C x 4,864. One GPU
# runs all 15 micro-batches of configs/qwen2_0.5b.yaml.
QWEN_BLOCK = 2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864
QWEN = Work(
    "qwen2_0.5b",
    4 * 1024,
    151936,
    896,
    24,
    trunk=24 * QWEN_BLOCK,
    parameters=494.0e6,
    accumulation=15,
)
HEAD = Work("head_8192", *SIZE, baseline=PLAIN, passes=NANOGPT_EAGER)


# Heads


def pass_ms(work: Work, size: int, instructions: float) -> float:
    """The time of a kernel that passes over all pairs once.

    size: bytes that it reads and writes for each pair. instructions: for each pair.
    """
    return 1000 * work.pairs * max(size / MEMORY, instructions / ISSUED)


def baseline_ms(work: Work) -> float:
    """The time of the baseline's head."""
    return 1000 * (3 * work.product() / HALF + work.pairs * work.passes / MEMORY)


def product_ms(work: Work, kernel: str, precision: str, slack: Slack) -> float:
    """The time of a head of kernel l2 or dot, which multiply matrices."""
    products = {"float32": 3 / FLOAT32, "split": 9 / HALF, "autocast": 3 / HALF}[
        precision
    ] * work.product()
    parts = 2 if precision == "split" else 1
    # The prototypes' gradient of each chunk, and each product of a second part, is added to a sum.
    sums = work.chunks * parts * 12 * work.prototypes * work.width / MEMORY
    tile, slopes = slack.passes[kernel]
    passes = pass_ms(work, TILE, tile) + pass_ms(
        work, AUTOCAST_SLOPES if precision == "autocast" else SLOPES, slopes
    )
    return 1000 * (products + sums) + passes


def map_ms(work: Work, head: str, precision: str) -> float:
    """The time of the map of both operands, forward and backward."""
    numbers = (work.tokens + work.prototypes) * work.width
    if head == "cosine":
        return 1000 * numbers * COSINE_MAP / MEMORY
    if head == "mahalanobis":
        speed = {"float32": FLOAT32, "split": HALF / 3, "autocast": HALF}[precision]
        return 1000 * (3 * 2 * numbers * work.width / speed + MAHALANOBIS_OTHER)
    return 0.0


def elementwise_ms(
    work: Work, head: str, floors: dict[tuple[str, str], float], slack: Slack
) -> float:
    """The time of a head without matrix products. floors: (kernel, variant) -> ms at SIZE."""
    tile, gradient = ELEMENTWISE[head]
    floor = sum(
        ms
        for (kernel, variant), ms in floors.items()
        if (kernel, variant) in (("tile", tile), ("gradient", gradient))
    )
    share = work.pairs * work.width / math.prod(SIZE)
    return slack.instructions * floor * share + pass_ms(work, SLOPES, slack.passes["l2"][1])


def read_floors(path: str) -> dict[tuple[str, str], float]:
    """(kernel, variant without the link) -> ms for sm_90.

    For a gradient it is the sum of its two kernels.
    """
    floors: dict[tuple[str, str], float] = {}
    for row in tables.read_csv(path):
        if row["arch"] != "sm_90":
            continue
        words = [
            word
            for word in row["variant"].split()
            if word not in ("harmonic", "+raw", "by", "rows", "prototypes")
        ]
        key = row["kernel"], " ".join(word for word in words if not word.startswith("root="))
        floors[key] = floors.get(key, 0.0) + float(row["floor_instructions_ms"])
    return floors


def heads(
    work: Work, floors: dict[tuple[str, str], float], slack: Slack
) -> dict[tuple[str, str], float]:
    """(head, precision) -> ms. floors: from `read_floors`."""
    found = {
        (work.baseline, "autocast"): baseline_ms(work),
        ("cross_entropy", "autocast"): product_ms(work, "dot", "autocast", slack),
    }
    for precision in ("float32", "split", "autocast"):
        for head in ("euclidean", "cosine", "mahalanobis"):
            found[head, precision] = product_ms(work, "l2", precision, slack) + map_ms(
                work, head, precision
            )
    return found | {
        (head, "float32"): elementwise_ms(work, head, floors, slack) for head in ELEMENTWISE
    }


# The table


def read_measured(path: str) -> dict[tuple[str, str, str], tuple[str, float]]:
    """(step, head, precision) -> card and ms of the newest row in results/gpu.csv.

    It is empty if there is no such file.
    """
    found: dict[tuple[str, str, str], tuple[str, float]] = {}
    if not Path(path).is_file():
        return found
    rows = tables.read_csv(path)
    for card in ("H200", "H100"):
        for row in rows:
            if card in row.get("card", "") and row.get("step_ms"):
                key = row["step"], row["what"], row["precision"]
                found[key] = card, float(row["step_ms"])
    return found


def is_default(head: str, precision: str) -> bool:
    """Whether head_precision=auto is this precision, as in the training steps of gpu.csv."""
    if head in ("euclidean", "cosine", "mahalanobis"):
        return precision == "split"
    return True


def find_measured(work: Work, head: str, precision: str, known: dict) -> tuple[str, float] | None:
    """The measurement of a prediction, from `read_measured`, or None."""
    name = NAMES.get(head, head)
    if work is HEAD:
        return known.get(("head", name, precision))
    return known.get(("train", name, "")) if work is GPT2 and is_default(head, precision) else None


def table(work: Work, floors: dict[tuple[str, str], float], known: dict) -> list[dict]:
    """The rows of one model. floors: from `read_floors`. known: from `read_measured`."""
    rows, times, least = [], heads(work, floors, EXPECTED), heads(work, floors, LEAST)
    rest = work.trunk_ms() + work.optimizer_ms(work.accumulation)
    for (head, precision), head_ms in times.items():
        baseline = times[work.baseline, "autocast"] + rest
        ratio = (head_ms + rest) / baseline
        row = {
            "model": work.name,
            "head": head,
            "precision": precision,
            "head_ms": f"{head_ms:.1f}",
            "trunk_ms": f"{work.trunk_ms():.1f}",
        }
        row |= {
            "optimizer_ms": f"{work.optimizer_ms(work.accumulation):.2f}",
            "iteration_ms": f"{head_ms + rest:.1f}",
        }
        row |= {
            "ratio": f"{ratio:.2f}",
            "least_ratio": f"{(least[head, precision] + rest) / baseline:.2f}",
        }
        if work.layers and head in GOALS:
            meets = "yes" if ratio <= GOALS[head] else "no"
            row |= {"goal": f"{GOALS[head]}", "meets": meets}
        measured = find_measured(work, head, precision, known)
        if measured is not None:
            same = head_ms + work.trunk_ms() + work.optimizer_ms(1)
            row |= {
                "card": measured[0],
                "measured_ms": f"{measured[1]:.1f}",
                "quotient": f"{measured[1] / same:.2f}",
            }
        rows.append(row)
    return rows


def main() -> None:
    (c,) = parse(sys.argv[1:], PredictConfig)
    out = result_file(c.out)
    floors, known = read_floors(c.instructions), read_measured(c.measured)
    rows = [row for work in (GPT2, QWEN, HEAD) for row in table(work, floors, known)]
    print(tables.markdown(rows, COLUMNS))
    tables.write_csv(out, rows, COLUMNS)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
