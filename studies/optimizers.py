"""Compares Muon and AdamW for several heads, with the demo's model and three seeds.

    make demo  # prepares data/wiki
    # results/optimizers.csv gets a row for each run; call it again to resume
    python -m studies.optimizers

Each head has, with each optimiser, a sweep of its own with another seed: three learning rates, then
half and twice the head's strength at the best rate, then half and twice the rate at the best
strength. After each part at most MOST settings beyond the edge follow, while the best is there. The
strength is the exponent, the exponent to which a twin's scale is matched, or for cross_entropy the
size of the first prototypes. The sweep and the reported losses are of the same validation text.

With Muon, the rate is also that of the AdamW which trains prototypes, embeddings, norms and biases.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from analysis.intervals import holm, mean_and_half, p_value, shown_p
from analysis.tables import Column, interval, markdown
from base.command_line import cli, parse
from harmonic.links import resolve_exponent
from model import ModelConfig
from studies.runner import Row, Table, Training, TrainingConfig, complete_trainings
from studies.search import Setting, beyond, number
from training.config import TrainConfig
from training.metrics import read_metrics

RATES = (1e-3, 2e-3, 4e-3)
STEPS = (0.5, 2.0)  # from one strength or rate to the next
MOST = 3  # settings beyond an edge, in each part of the sweep
SWEEP_SEED, SEEDS = 1337, (1338, 1339, 1340)
HEADS = (
    ("cross_entropy", "harmonic"),
    ("cosine", "harmonic"),
    ("cosine", "softmax"),
    ("euclidean", "harmonic"),
    ("euclidean", "softmax"),
)
OPTIMIZERS = ("adamw", "muon")
WIDTH, INIT_STD = 192, 0.02  # of the demo's model
KEY = ("head", "link", "optimizer", "factor", "learning_rate", "seed")
COLUMNS = [*KEY, "val_loss", "commit"]

Head = tuple[str, str]  # name, link
# Seed -> validation loss.
Losses = dict[str, float]
# Rows, head, optimiser -> the settings of its sweep: `tried_rates` or `tried`.
Find = Callable[[list[Row], Head, str], list[Setting]]


@dataclass
class OptimizersConfig(TrainingConfig):
    """The study of optimisers"""

    config: str = "configs/demo.yaml"
    """model, data and budget of every run"""
    out: str = "results/optimizers.csv"
    """the table; its runs are not repeated"""
    runs: str = "out/optimizers"
    """folder of the runs"""

    def problems(self) -> list[str]:
        model, _ = parse([self.config], ModelConfig, TrainConfig, config_file=True)
        found = super().problems()
        if model.n_embd != WIDTH or model.head_init_std != INIT_STD:
            found.append(
                f"config={self.config}: the default strengths are those of n_embd={WIDTH} and"
                f" head_init_std={INIT_STD}"
            )
        return found


def settings(table: Table) -> list[dict]:
    """Keys of the runs that are wanted by now, most important first. What needs a sweep is listed
    once that is done."""
    found = []
    for find in (tried_rates, tried):
        for optimizer in OPTIMIZERS:
            for head in HEADS:
                sweep = find(table.rows, head, optimizer)
                runs = [key(head, optimizer, setting, SWEEP_SEED) for setting in sweep]
                best = winner(table.rows, head, optimizer, sweep)
                if best is not None:
                    runs += [key(head, optimizer, best, seed) for seed in SEEDS]
                found += [run for run in runs if run not in found]
    return found


def key(head: Head, optimizer: str, setting: Setting, seed: int) -> dict:
    """The key of a run. setting: the factor of the default strength, the learning rate."""
    (name, link), (factor, rate) = head, setting
    return dict(
        head=name, link=link, optimizer=optimizer, factor=factor, learning_rate=rate, seed=seed
    )


def sweep_losses(rows: list[Row], head: Head, optimizer: str) -> dict[Setting, float]:
    """Setting -> validation loss, of a head's sweep."""
    return {
        setting_of(row): number(row["val_loss"])
        for row in rows
        if row["seed"] == str(SWEEP_SEED) and which(row) == (head, optimizer)
    }


def setting_of(row: Row) -> Setting:
    return float(row["factor"]), float(row["learning_rate"])


def which(row: Row) -> tuple[Head, str]:
    """The head and the optimiser of a run."""
    return (row["head"], row["link"]), row["optimizer"]


def tried_rates(rows: list[Row], head: Head, optimizer: str) -> list[Setting]:
    """The settings of a head's sweep with the default strength, as far as they are known by now."""
    return extended(rows, head, optimizer, [(1.0, rate) for rate in RATES])


def tried(rows: list[Row], head: Head, optimizer: str) -> list[Setting]:
    """All settings of a head's sweep, as far as they are known by now: rates, then strengths at the
    best rate, then rates again at the best strength."""
    sweep = tried_rates(rows, head, optimizer)
    for axis in (0, 1):
        best = winner(rows, head, optimizer, sweep)
        if best is None:
            break
        near = [
            (best[0] * step, best[1]) if axis == 0 else (best[0], best[1] * step) for step in STEPS
        ]
        sweep = extended(rows, head, optimizer, [*sweep, *(s for s in near if s not in sweep)])
    return sweep


def extended(rows: list[Row], head: Head, optimizer: str, sweep: list[Setting]) -> list[Setting]:
    """The sweep, with settings beyond its edge while the best is there."""
    sweep = list(sweep)
    for _ in range(MOST):
        best = winner(rows, head, optimizer, sweep)
        further = best and beyond(best, sweep, (2, 2), fewest=2)
        if not further:
            break
        sweep.append(further)
    return sweep


def winner(rows: list[Row], head: Head, optimizer: str, sweep: list[Setting]) -> Setting | None:
    """The setting with the lowest validation loss. None while runs are missing."""
    losses = sweep_losses(rows, head, optimizer)
    return min(sweep, key=losses.__getitem__) if set(sweep) <= set(losses) else None


def training(run: dict) -> Training:
    """The run of train.py of a key. The rate falls to a tenth of its peak, as in the config."""
    flags = {k: v for k, v in run.items() if k != "factor"} | {"emissions": False}
    name = "head_init_std" if run["head"] == "cross_entropy" else "exponent"
    return Training(run, flags | {name: run["factor"] * strength(run["head"])})


def strength(head: str) -> float:
    """The default strength: the size of cross_entropy's first prototypes, or an exponent."""
    return INIT_STD if head == "cross_entropy" else resolve_exponent(head, WIDTH)


def measure(folder: Path, key: dict) -> dict:
    losses = [m["val_loss"] for m in read_metrics(folder) if "val_loss" in m]
    return {"val_loss": f"{losses[-1]:.6f}"}


def tuned_rates(rows: list[Row]) -> str:
    """The table with the best learning rate of each head and optimiser, and default strengths."""
    return table_of(rows, tried_rates)


def tuned(rows: list[Row]) -> str:
    """The table with the best learning rate and strength of each head and optimiser."""
    return table_of(rows, tried)


def table_of(rows: list[Row], find: Find) -> str:
    """The table of the best settings, and how many of them lie on the edge of their sweep."""
    best = winners(rows, find)
    table = comparison(rows, best)
    if not best:
        return table
    edges = sum(beyond(best[run], find(rows, *run), (2, 2), fewest=2) is not None for run in best)
    note = f"{edges} of {len(best)} winners of the sweep lie on the edge of what was tried."
    return f"{table}\n\n{note}"


def winners(rows: list[Row], find: Find) -> dict[tuple[Head, str], Setting]:
    """The best setting of each sweep that is done."""
    found = {}
    for head in HEADS:
        for optimizer in OPTIMIZERS:
            best = winner(rows, head, optimizer, find(rows, head, optimizer))
            if best is not None:
                found[head, optimizer] = best
    return found


def final_losses(
    rows: list[Row], best: Mapping[tuple[Head, str], Setting]
) -> dict[tuple[Head, str], Losses]:
    """The losses at the best settings, of each head and optimiser that has all seeds."""
    losses: dict[tuple[Head, str], Losses] = {}
    for row in rows:
        if row["seed"] != str(SWEEP_SEED) and setting_of(row) == best.get(which(row)):
            losses.setdefault(which(row), {})[row["seed"]] = number(row["val_loss"])
    return {run: found for run, found in losses.items() if len(found) == len(SEEDS)}


def comparison(rows: list[Row], best: Mapping[tuple[Head, str], Setting]) -> str:
    """A line for each head: both losses, and differences paired by seed: between the optimisers,
    to cross_entropy and to the softmax twin under each of them.

    best: the setting of each head and optimiser; other runs are left out. What lacks a seed is
        left out too.
    """
    losses, lines = final_losses(rows, best), []
    p = {name: p_values(losses, name) for name in OPTIMIZERS}
    for head, link in HEADS:
        adamw, muon = (losses.get(((head, link), name), {}) for name in OPTIMIZERS)
        if not (adamw or muon):
            continue
        line: dict[str, object] = {"head": head, "seeds": len(SEEDS)}
        line["link"] = None if (head, link) == HEADS[0] else link  # A control has no link.
        if adamw and muon:
            line["difference"] = difference(muon, adamw)
        for name, found in zip(OPTIMIZERS, (adamw, muon), strict=True):
            if not found:
                continue
            factor, line[f"{name}_rate"] = best[(head, link), name]
            line[f"{name}_strength"] = factor * strength(head)
            line[name], _ = mean_and_half(list(found.values()))
            baseline = losses.get((HEADS[0], name), {})
            if (head, link) in p[name]:
                value = p[name][head, link]
                line[f"{name}_less"] = f"{difference(found, baseline)} (p {shown_p(value)})"
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
            *(Column(f"{name}_strength", f"n or size, {name}", ".4g") for name in OPTIMIZERS),
            *(Column(name, unit="nats", form=".4f") for name in OPTIMIZERS),
            Column("difference", "muon minus adamw"),
            *(Column(f"{name}_less", f"{name}, minus cross_entropy") for name in OPTIMIZERS),
            *(Column(f"{name}_twin", f"{name}, minus its twin") for name in OPTIMIZERS),
        ],
    )


def p_values(losses: dict[tuple[Head, str], Losses], optimizer: str) -> dict[Head, float]:
    """Of each head, whether it differs from cross_entropy: p of a paired t-test, with Holm's
    correction for the heads of this optimiser."""
    baseline = losses.get((HEADS[0], optimizer), {})
    found = {}
    for head in HEADS[1:]:
        mine = losses.get((head, optimizer), {})
        if baseline and mine:
            found[head] = p_value([mine[seed] - baseline[seed] for seed in baseline])
    return holm(found)


def difference(found: Losses, other: Losses) -> str:
    """The mean difference of the seeds that both have, with its interval."""
    return interval(*mean_and_half([found[seed] - other[seed] for seed in found if seed in other]))


def main() -> None:
    (c,) = parse(sys.argv[1:], OptimizersConfig)
    table = Table(c.out, COLUMNS, KEY)
    complete_trainings(c, table, lambda: [training(run) for run in settings(table)], measure)
    print(tuned_rates(table.rows), tuned(table.rows), sep="\n\n")


if __name__ == "__main__":
    cli(main)
