"""Compares Muon and AdamW for several heads: the demo's model, three seeds, one learning rate.

    make demo  # prepares data/wiki
    # results/optimizers.csv gets a row for each run; call it again to resume
    python -m studies.optimizers

Muon's steps are scaled to the size of AdamW's (match_rms_adamw), so both use the demo's learning
rate. That rate was not tuned for an optimiser or a head. So the table compares optimisers, not
heads.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from analysis.tables import Column, interval, markdown
from base.command_line import cli, parse
from studies.intervals import mean_and_half
from studies.runner import Row, Table, Training, TrainingConfig, complete_trainings
from studies.search import number
from training.telemetry import read_metrics

SEEDS = (1338, 1339, 1340)
HEADS = (
    ("cross_entropy", "harmonic"),
    ("cosine", "harmonic"),
    ("cosine", "softmax"),
    ("euclidean", "harmonic"),
    ("euclidean", "softmax"),
)
KEY = ("head", "link", "optimizer", "seed")
COLUMNS = [*KEY, "val_loss", "tokens_per_s", "seconds", "commit"]


@dataclass
class OptimizersConfig(TrainingConfig):
    """The study of optimisers"""

    config: str = "configs/demo.yaml"
    """model, data and budget of every run"""
    out: str = "results/optimizers.csv"
    """the table; its runs are not repeated"""
    runs: str = "out/optimizers"
    """folder of the runs"""


def settings() -> list[Training]:
    """All runs of the study."""
    found = []
    for seed in SEEDS:
        for head, link in HEADS:
            for optimizer in ("adamw", "muon"):
                key = dict(head=head, link=link, optimizer=optimizer, seed=seed)
                found.append(Training(key, {**key, "emissions": False}))
    return found


def measure(folder: Path, key: dict) -> dict:
    """The result columns of a finished run."""
    metrics = read_metrics(folder)
    speeds = sorted(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)
    losses = [m["val_loss"] for m in metrics if "val_loss" in m]
    return {"val_loss": f"{losses[-1]:.6f}", "tokens_per_s": f"{speeds[len(speeds) // 2]:.5g}"}


def summary(rows: list[Row]) -> str:
    """A line for each head: both losses, and their difference paired by seed."""
    lines = []
    for head, link in HEADS:
        losses: dict[str, dict[str, float]] = {"adamw": {}, "muon": {}}
        for row in rows:
            if (row["head"], row["link"]) == (head, link):
                losses[row["optimizer"]][row["seed"]] = number(row["val_loss"])
        adamw, muon = losses["adamw"], losses["muon"]
        differences = [muon[seed] - adamw[seed] for seed in muon if seed in adamw]
        if not differences:
            continue
        line: dict[str, object] = {"head": head, "link": link, "seeds": len(differences)}
        for name, found in losses.items():
            line[name], _ = mean_and_half(list(found.values()))
        line["difference"] = interval(*mean_and_half(differences))
        lines.append(line)
    form = [Column(name, unit="nats", form=".4f") for name in ("adamw", "muon")]
    return markdown(lines, ["head", "link", "seeds", *form, Column("difference", unit="nats")])


def main() -> None:
    (c,) = parse(sys.argv[1:], OptimizersConfig)
    table = Table(c.out, COLUMNS, KEY)
    complete_trainings(c, table, settings, measure)
    print(summary(table.rows))


if __name__ == "__main__":
    cli(main)
