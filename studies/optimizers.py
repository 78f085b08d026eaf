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
OPTIMIZERS = ("adamw", "muon")
KEY = ("head", "link", "optimizer", "seed")
COLUMNS = [*KEY, "val_loss", "commit"]

# Seed -> validation loss.
Losses = dict[str, float]


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
            for optimizer in OPTIMIZERS:
                key = dict(head=head, link=link, optimizer=optimizer, seed=seed)
                found.append(Training(key, {**key, "emissions": False}))
    return found


def measure(folder: Path, key: dict) -> dict:
    losses = [m["val_loss"] for m in read_metrics(folder) if "val_loss" in m]
    return {"val_loss": f"{losses[-1]:.6f}"}


def summary(rows: list[Row]) -> str:
    """A line for each head: both losses, and differences paired by seed: between the optimisers,
    to cross_entropy and to the softmax twin under each of them."""
    losses: dict[tuple[str, str, str], Losses] = {}
    for row in rows:
        mine = losses.setdefault((row["head"], row["link"], row["optimizer"]), {})
        mine[row["seed"]] = number(row["val_loss"])
    lines = []
    for head, link in HEADS:
        adamw, muon = (losses.get((head, link, name), {}) for name in OPTIMIZERS)
        if not set(adamw) & set(muon):
            continue
        line: dict[str, object] = {"head": head, "seeds": len(set(adamw) & set(muon))}
        line["link"] = None if (head, link) == HEADS[0] else link  # A control has no link.
        line["difference"] = difference(muon, adamw)
        for name, found in zip(OPTIMIZERS, (adamw, muon), strict=True):
            line[name], _ = mean_and_half(list(found.values()))
            baseline = losses.get((*HEADS[0], name), {})
            if head != HEADS[0][0] and set(found) & set(baseline):
                line[f"{name}_less"] = difference(found, baseline)
            twin = losses.get((head, "softmax", name), {})
            if link == "harmonic" and set(found) & set(twin):
                line[f"{name}_twin"] = difference(found, twin)
        lines.append(line)
    return markdown(
        lines,
        [
            *("head", "link", "seeds"),
            *(Column(name, unit="nats", form=".4f") for name in OPTIMIZERS),
            Column("difference", "muon minus adamw"),
            *(Column(f"{name}_less", f"{name}, minus cross_entropy") for name in OPTIMIZERS),
            *(Column(f"{name}_twin", f"{name}, minus its twin") for name in OPTIMIZERS),
        ],
    )


def difference(found: Losses, other: Losses) -> str:
    """The mean difference of the seeds that both have, with its interval."""
    return interval(*mean_and_half([found[seed] - other[seed] for seed in found if seed in other]))


def main() -> None:
    (c,) = parse(sys.argv[1:], OptimizersConfig)
    table = Table(c.out, COLUMNS, KEY)
    complete_trainings(c, table, settings, measure)
    print(summary(table.rows))


if __name__ == "__main__":
    cli(main)
