"""Compares Muon and AdamW for several heads, with the demo's model and three seeds.

    make demo  # prepares data/wiki
    # results/optimizers.csv gets a row for each run; call it again to resume
    python -m studies.optimizers

First all runs have the demo's learning rate. Then each head has, with each optimiser, the best
rate of a sweep of its own: three rates with another seed, and beyond the edge while the best rate
is there, at most MOST times. The sweep and the reported losses are of the same validation text.

With Muon, the rate is also that of the AdamW which trains prototypes, embeddings, norms and biases.
Strengths (exponent, scale) are the defaults and are not swept.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from analysis.tables import Column, interval, markdown
from base.command_line import cli, parse
from studies.intervals import mean_and_half
from studies.runner import Row, Table, Training, TrainingConfig, complete_trainings
from studies.search import beyond, number, on_edge
from training.telemetry import read_metrics

RATE = 2e-3  # the demo's
RATES = (1e-3, 2e-3, 4e-3)
MOST = 2  # rates beyond the edge
SWEEP_SEED, SEEDS = 1337, (1338, 1339, 1340)
HEADS = (
    ("cross_entropy", "harmonic"),
    ("cosine", "harmonic"),
    ("cosine", "softmax"),
    ("euclidean", "harmonic"),
    ("euclidean", "softmax"),
)
OPTIMIZERS = ("adamw", "muon")
KEY = ("head", "link", "optimizer", "learning_rate", "seed")
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


def settings(table: Table) -> list[dict]:
    """Keys of the runs that are wanted by now, most important first. What needs a sweep is listed
    once that is done."""
    found = [
        key(head, optimizer, RATE, seed)
        for seed in SEEDS
        for head in HEADS
        for optimizer in OPTIMIZERS
    ]
    for head in sorted(HEADS, key=lambda head: head[1] == "softmax"):  # The twins come last.
        for optimizer in OPTIMIZERS:
            tried = sweep(table.rows, head, optimizer)
            runs = [key(head, optimizer, rate, SWEEP_SEED) for rate in tried]
            rate = best_rate(table.rows, head, optimizer)
            if rate is not None:
                runs += [key(head, optimizer, rate, seed) for seed in SEEDS]
            found += [run for run in runs if run not in found]
    return found


def key(head: tuple[str, str], optimizer: str, rate: float, seed: int) -> dict:
    """The key of a run."""
    name, link = head
    return dict(head=name, link=link, optimizer=optimizer, learning_rate=rate, seed=seed)


def sweep_losses(rows: list[Row], head: tuple[str, str], optimizer: str) -> dict[float, float]:
    """Learning rate -> validation loss, of a head's sweep."""
    return {
        float(row["learning_rate"]): number(row["val_loss"])
        for row in rows
        if row["seed"] == str(SWEEP_SEED)
        and (row["head"], row["link"]) == head
        and row["optimizer"] == optimizer
    }


def sweep(rows: list[Row], head: tuple[str, str], optimizer: str) -> list[float]:
    """The learning rates of a head's sweep, as far as they are known by now."""
    rates, losses = list(RATES), sweep_losses(rows, head, optimizer)
    for _ in range(MOST):
        if not set(rates) <= set(losses):
            break
        best = min(rates, key=losses.__getitem__)
        further = beyond((best,), [(rate,) for rate in rates], (2,))
        if further is None:
            break
        rates.append(further[0])
    return rates


def best_rate(rows: list[Row], head: tuple[str, str], optimizer: str) -> float | None:
    """The rate of the sweep with the lowest validation loss. None while runs are missing."""
    rates, losses = sweep(rows, head, optimizer), sweep_losses(rows, head, optimizer)
    return min(rates, key=losses.__getitem__) if set(rates) <= set(losses) else None


def training(run: dict) -> Training:
    """The run of train.py of a key. The rate falls to a tenth of its peak, as in the config."""
    return Training(run, {**run, "emissions": False})


def measure(folder: Path, key: dict) -> dict:
    losses = [m["val_loss"] for m in read_metrics(folder) if "val_loss" in m]
    return {"val_loss": f"{losses[-1]:.6f}"}


def same_rate(rows: list[Row]) -> str:
    """The table of the runs with the demo's learning rate."""
    return comparison(rows, {(head, name): RATE for head in HEADS for name in OPTIMIZERS})


def tuned(rows: list[Row]) -> str:
    """The table of the runs with the best learning rate of each head and optimiser."""
    rates = {(head, name): best_rate(rows, head, name) for head in HEADS for name in OPTIMIZERS}
    done = [which for which, rate in rates.items() if rate is not None]
    losses = [{(r,): loss for r, loss in sweep_losses(rows, *which).items()} for which in done]
    return f"{comparison(rows, rates)}\n\n{on_edge(losses, (2,))}"


def comparison(rows: list[Row], rates: Mapping[tuple[tuple[str, str], str], float | None]) -> str:
    """A line for each head: both losses, and differences paired by seed: between the optimisers,
    to cross_entropy and to the softmax twin under each of them.

    rates: the learning rate of each head and optimiser; runs with other rates are left out. A head
        has a line once it has all seeds with both optimisers.
    """
    losses: dict[tuple[tuple[str, str], str], Losses] = {}
    for row in rows:
        which = (row["head"], row["link"]), row["optimizer"]
        if row["seed"] != str(SWEEP_SEED) and float(row["learning_rate"]) == rates[which]:
            losses.setdefault(which, {})[row["seed"]] = number(row["val_loss"])
    lines = []
    for head, link in HEADS:
        adamw, muon = (losses.get(((head, link), name), {}) for name in OPTIMIZERS)
        if not len(adamw) == len(muon) == len(SEEDS):
            continue
        line: dict[str, object] = {"head": head, "seeds": len(SEEDS)}
        line["link"] = None if (head, link) == HEADS[0] else link  # A control has no link.
        line["difference"] = difference(muon, adamw)
        for name, found in zip(OPTIMIZERS, (adamw, muon), strict=True):
            line[f"{name}_rate"] = rates[(head, link), name]
            line[name], _ = mean_and_half(list(found.values()))
            baseline = losses.get((HEADS[0], name), {})
            if head != HEADS[0][0] and set(found) == set(baseline):
                line[f"{name}_less"] = difference(found, baseline)
            twin = losses.get(((head, "softmax"), name), {})
            if link == "harmonic" and set(found) == set(twin):
                line[f"{name}_twin"] = difference(found, twin)
        lines.append(line)
    if not lines:
        return "No head has finished its sweep and its seeds yet."
    return markdown(
        lines,
        [
            *("head", "link", "seeds"),
            *(Column(f"{name}_rate", f"rate, {name}", "g") for name in OPTIMIZERS),
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
    complete_trainings(c, table, lambda: [training(run) for run in settings(table)], measure)
    print(same_rate(table.rows), tuned(table.rows), sep="\n\n")


if __name__ == "__main__":
    cli(main)
