"""How much of the gradient of the logits reaches the hidden state during training, for each head.

    make demo  # prepares data/wiki
    python -m studies.bottleneck  # writes results/bottleneck.csv; call it again to resume

Each head trains the demo's model to iteration 20, from there to 60, and so on. The schedule does
not depend on these stages, so this is one run that is measured five times. analysis/bottleneck.py
defines the share.
"""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from analysis import figures
from analysis.bottleneck import gradient_shares
from analysis.runs import find_runs, predictions
from analysis.tables import Column, markdown
from base.command_line import cli, parse
from base.errors import UserError
from harmonic import CONTROLS
from model import ModelConfig
from studies.runner import Job, Row, Table, TrainingConfig, complete
from training.config import TrainConfig

STAGES = (20, 60, 150, 300, 500)
TOKENS = 64
WIDTH, VOCABULARY = 192, 4096  # of the demo's model and data
HEADS = (
    ("cross_entropy", "harmonic"),
    ("cosine", "harmonic"),
    ("cosine", "softmax"),
    ("euclidean", "harmonic"),
    ("euclidean", "softmax"),
    ("student_t", "harmonic"),
    ("stablemax", "harmonic"),
    ("cosine_scaled", "harmonic"),
)
KEY = ("head", "link")
COLUMNS = [*KEY, "iter", "val_loss", "share", "commit"]


@dataclass
class BottleneckStudyConfig(TrainingConfig):
    """The study of the bottleneck"""

    config: str = "configs/demo.yaml"
    """model, data and budget of every run"""
    out: str = "results/bottleneck.csv"
    """the table; its heads are not trained again"""
    runs: str = "out/bottleneck"
    """folder of the runs"""

    def problems(self) -> list[str]:
        model, _ = parse([self.config], ModelConfig, TrainConfig, config_file=True)
        found = super().problems()
        if model.n_embd != WIDTH:
            found.append(
                f"config={self.config}: n_embd={model.n_embd}, but the rows of the table are of"
                f" {WIDTH}"
            )
        if self.nproc_per_node != 1:
            found.append("nproc_per_node: each run of this study is one process")
        return found


def stages(c: BottleneckStudyConfig, head: str, link: str) -> list[dict]:
    """Trains a head stage by stage. Returns a row for each stage. UserError if training fails."""
    torch.set_num_threads(1)
    folder, rows = Path(c.runs) / f"{head}-{link}", []
    flags = dict(head=head, link=link, emissions=False, eval_interval=max(STAGES))
    if head == "cross_entropy":
        flags["head_init_std"] = 0.05  # as in the demo
    for stage in STAGES:
        flags |= dict(max_iters=stage, lr_decay_iters=max(STAGES))
        words = [f"--{name}={value}" for name, value in flags.items()]
        start = ["--overwrite=true"] if stage == STAGES[0] else ["--init_from=resume"]
        command = [sys.executable, "train.py", c.config, f"--out_dir={folder}", *words, *start]
        one = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"} if c.workers > 1 else {}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one})
        if done.returncode:
            raise UserError(f"{folder} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        (run,) = find_runs([str(folder)])
        model, manifest = run.load()
        found = [(h, y) for h, y, _ in predictions(model, run.data(), "val", 16 * TOKENS)]
        h, y = (torch.cat(parts) for parts in zip(*found, strict=True))
        every = torch.linspace(0, len(h) - 1, TOKENS).long()
        share = gradient_shares(model.head, h[every], y[every]).mean()
        loss = f"{manifest['val_loss']:.6f}"
        rows.append({"iter": stage, "val_loss": loss, "share": f"{share:.4f}"})
    return rows


def summary(rows: list[Row]) -> str:
    """A line for each head: its share at each stage, and its validation loss at the end."""
    lines = []
    for head, link in HEADS:
        mine = [r for r in rows if (r["head"], r["link"]) == (head, link)]
        if mine:
            line: dict[str, object] = {"head": head, "val_loss": float(mine[-1]["val_loss"])}
            line["link"] = None if head in CONTROLS else link
            lines.append(line | {r["iter"]: float(r["share"]) for r in mine})
    if not lines:
        return "No head is done yet."
    columns = [Column(str(stage), title=f"iteration {stage}", form=".3f") for stage in STAGES]
    loss = Column("val_loss", "validation loss at the end", ".4f", "nats")
    return markdown(lines, ["head", "link", *columns, loss])


def draw(rows: list[Row], path: Path) -> None:
    """Draws the shares along training, and that of a random subspace."""
    figure = figures.figure(3.6)
    axes = figure.subplots()
    for (head, link), style in zip(HEADS, figures.head_styles(list(HEADS)), strict=True):
        mine = [r for r in rows if (r["head"], r["link"]) == (head, link)]
        steps, shares = [int(r["iter"]) for r in mine], [float(r["share"]) for r in mine]
        name = head if head in CONTROLS else f"{head}, {link}"
        axes.plot(steps, shares, label=name, color=style["color"], ls=style["linestyle"])
    random = math.sqrt(WIDTH / VOCABULARY)
    axes.axhline(random, color="0.5", lw=1, ls=":", label="a random subspace")
    axes.set_ylim(0, None)
    axes.set_xlabel("iteration")
    axes.set_ylabel("share of the gradient that reaches h")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figures.save(figure, path)


def main() -> None:
    (c,) = parse(sys.argv[1:], BottleneckStudyConfig)
    table = Table(c.out, COLUMNS, KEY)

    def wanted() -> list[Job]:
        return [Job({"head": h, "link": k}, stages, (c, h, k)) for h, k in HEADS]

    complete(table, wanted, c.workers, lambda rows: f"share {rows[-1]['share']} at the end")
    print(summary(table.rows))
    draw(table.rows, Path(c.out).with_suffix(".png"))


if __name__ == "__main__":
    cli(main)
