"""How training scales: measured with one and two processes, and calculated for up to 64 GPUs.

    # about five minutes on 2 cores; writes results/scaling.csv and .png
    python -m benchmarks.scaling

Measured, with one thread for each process. In *strong* scaling the processes share the windows of
    an iteration. In *weak* scaling each process has as many windows as one process alone.
    Efficiency is tokens/s divided by (tokens/s of one process x number of processes). It is a
    median over rounds that alternate between all kinds.

Calculated: an iteration needs 6 N + attention operations for each token, at a given share of the
    peak of a GPU. It moves the bytes below between GPUs in rings. The bandwidth is the smaller one
    of the links inside a machine and of its network. There are two bounds. In the best case
    transfers overlap with computing as far as possible: DDP sends gradients during the backward
    pass, which is two thirds of the computing, and FSDP transfers during both passes. In the worst
    case nothing overlaps. With W processes, P parameters and M micro-batches the bytes are:

    ddp    2 (W - 1) / W * 4 P             float32 gradients, reduced once per iteration
    fsdp   (2 M + 1) (W - 1) / W * 4 P     weights, gathered twice per micro-batch, and gradients,
                                           scattered once
"""

import itertools
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from analysis import figures, tables
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError, too_small
from base.files import result_file
from model import Model, ModelConfig
from training.config import TrainConfig
from training.distributed import launcher
from training.metrics import read_metrics

COLUMNS = [
    "model",
    "how",
    "scaling",
    "processes",
    "tokens_per_s",
    "ms_computing",
    "ms_moving",
    "efficiency",
    "efficiency_without_overlap",
]


@dataclass
class ScalingConfig:
    """What to measure, and the machine to calculate"""

    rounds: int = 3
    """runs of each kind"""
    iters: int = 16
    """iterations of a run; the first 4 do not count"""
    dataset: str = "data/wiki"
    """a folder prepared with bpe:4096"""
    peak: float = 989e12
    """peak operations/s of a GPU (H100, dense bf16)"""
    mfu: float = 0.4
    """assumed share of the peak that a single GPU reaches"""
    per_node: int = 8
    """GPUs in a machine"""
    inside: float = 450e9
    """bytes/s that a GPU sends inside a machine (NVLink 4, each way)"""
    between: float = 400e9
    """bytes/s that a machine sends to another (eight 400 Gb/s adapters; rings use them all)"""
    ethernet: float = 12.5e9
    """bytes/s that a machine with one 100 Gb/s adapter sends to another"""
    out: str = "results/scaling.csv"
    """the table; the figure is written beside it"""

    def problems(self) -> list[str]:
        return too_small(self, rounds=1, iters=5)


# Kinds of measured runs: how, scaling and processes.
KINDS = (
    ("one", "strong", 1),
    ("ddp", "strong", 2),
    ("fsdp", "strong", 2),
    ("ddp", "weak", 2),
    ("fsdp", "weak", 2),
)


def train(c: ScalingConfig, home: str, how: str, scaling: str, processes: int) -> float:
    """Runs train.py and returns the median of its tokens/s."""
    settings = dict(
        dataset=c.dataset,
        n_layer=4,
        n_head=6,
        n_embd=192,
        block_size=128,
        head="cosine",
        compile=False,
        batch_size=8,
        gradient_accumulation_steps=processes if scaling == "weak" else 1,
        max_iters=c.iters,
        eval_interval=10**6,
        eval_iters=1,
        log_interval=1,
        emissions=False,
        out_dir=f"{home}/run",
        overwrite=True,
    )
    if how != "one":
        settings["parallel"] = how
    flags = [f"--{k}={v}" for k, v in settings.items()]
    words = ["env", "OMP_NUM_THREADS=1", sys.executable, *launcher(processes), "train.py", *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train.py ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    speeds = [m["tokens_per_s"] for m in read_metrics(f"{home}/run") if "tokens_per_s" in m]
    return statistics.median(speeds[4:])


def measured(c: ScalingConfig) -> list[dict]:
    """A row for each of KINDS."""
    speeds: dict[tuple, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="scaling-") as home:
        for _ in tqdm(range(c.rounds), "measuring", disable=None):
            for kind, found in speeds.items():
                found.append(train(c, home, *kind))
    alone, rows = speeds["one", "strong", 1], []
    for (how, scaling, processes), found in speeds.items():
        speedup = statistics.median(a / b for a, b in zip(found, alone, strict=True))
        rows.append(
            {
                "model": "gpt, 4 layers, 192 wide",
                "how": how,
                "scaling": f"measured, {scaling}",
                "processes": processes,
                "tokens_per_s": f"{statistics.median(found):.0f}",
                "efficiency": f"{speedup / processes:.2f}",
            }
        )
    return rows


def calculated(c: ScalingConfig, name: str, how: str, network: str) -> list[dict]:
    """Rows for an iteration of a config (strong scaling), shared by 1 to 64 GPUs."""
    model_config, config = parse(
        [f"configs/{name}.yaml"], ModelConfig, TrainConfig, config_file=True
    )
    model_config.vocab_size = model_config.vocab_size or 50304  # GPT-2's, with padding.
    with torch.device("meta"):
        model = Model(model_config)
    windows = config.batch_size * config.gradient_accumulation_steps
    tokens = windows * model_config.block_size
    rows = []
    for world in (1, 2, 4, 8, 16, 32, 64):
        mine = math.ceil(windows / world)
        if world > windows or (how == "fsdp" and windows % world):  # train.py refuses these.
            continue
        computing = mine * model_config.block_size * model.flops_per_token() / (c.peak * c.mfu)
        bandwidth = c.inside if world <= c.per_node else min(c.inside, getattr(c, network))
        weights = 4 * model.parameter_count() * (world - 1) / world
        micro = math.ceil(mine / config.batch_size)
        moving = (2 * weights if how == "ddp" else (2 * micro + 1) * weights) / bandwidth
        hidden = 2 / 3 * computing if how == "ddp" else computing
        ideal = (
            windows * model_config.block_size * model.flops_per_token() / (c.peak * c.mfu) / world
        )
        rows.append(
            {
                "model": name,
                "how": how,
                "scaling": f"calculated, strong, {network}",
                "processes": world,
                "tokens_per_s": f"{tokens / (computing + max(0.0, moving - hidden)):.0f}",
                "ms_computing": f"{1e3 * computing:.2f}",
                "ms_moving": f"{1e3 * moving:.2f}",
                "efficiency": f"{ideal / (computing + max(0.0, moving - hidden)):.2f}",
                "efficiency_without_overlap": f"{ideal / (computing + moving):.2f}",
            }
        )
    return rows


def chart(rows: list[dict], path: Path) -> None:
    """Draws the calculated efficiency for each number of GPUs, with a panel for each model."""
    figure = figures.figure(3.8)
    panels = figure.subplots(1, 2, sharey=True)
    colors = {"ddp": figures.BLUE, "fsdp": figures.ORANGE}
    networks = {"between": ("8 x 400 Gb/s", "o-"), "ethernet": ("100 Gb/s", "s:")}
    # Where both are 1, the smaller marker of FSDP lies on DDP's.
    sizes = {"ddp": 7, "fsdp": 4}
    ticks = [1, 2, 4, 8, 16, 32, 64]
    for axes, name in zip(panels, ("gpt2_124m", "qwen2_0.5b"), strict=True):
        for (how, color), (network, (speed, line)) in itertools.product(
            colors.items(), networks.items()
        ):
            own = [r for r in rows if (r["model"], r["how"]) == (name, how)]
            own = [r for r in own if r["scaling"].endswith(network)]
            worlds = [int(r["processes"]) for r in own]
            best = [float(r["efficiency"]) for r in own]
            worst = [float(r["efficiency_without_overlap"]) for r in own]
            axes.fill_between(worlds, worst, best, color=color, alpha=0.15)
            label = f"{how.upper()}, {speed} for a machine"
            axes.plot(worlds, best, line, color=color, label=label, markersize=sizes[how])
        axes.set_xscale("log")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
        axes.set_xlim(0.85, 75)
        axes.set_xlabel("number of GPUs")
        axes.set_title(f"{name}: one iteration shared (calculated)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("efficiency: 1 loses no time")
    figures.legend_below(figure, panels, ncols=2)
    figures.save(figure, path)


def markdown(rows: list[dict]) -> str:
    """The table of measured rows in docs/multi_node.md."""
    shown = [
        {**r, "scaling": r["scaling"].removeprefix("measured, ")}
        for r in rows
        if r["scaling"].startswith("measured")
    ]
    speed = Column("tokens_per_s", "tokens/s")
    return tables.markdown(shown, ["processes", "how", "scaling", speed, "efficiency"])


def main() -> None:
    (c,) = parse(sys.argv[1:], ScalingConfig)
    out = result_file(c.out)
    rows = measured(c) + [
        row
        for name in ("gpt2_124m", "qwen2_0.5b")
        for how in ("ddp", "fsdp")
        for network in ("between", "ethernet")
        for row in calculated(c, name, how, network)
        if network == "between" or row["processes"] > c.per_node
    ]
    tables.write_csv(out, rows, COLUMNS)
    picture = out.with_suffix(".png")
    chart(rows, picture)
    print(tables.text(rows, COLUMNS))
    print(f"wrote {out} and {picture}")


if __name__ == "__main__":
    cli(main)
