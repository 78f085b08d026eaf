"""Trains heads on 0.6 to 20 million tokens, to see how they end and not only how they start.

    python prepare_openwebtext.py --source=wikitext2 --tokenizer=bpe:4096 --out_dir=data/wikitext2
    python prepare_openwebtext.py --source=wiki --tokenizer=bpe:4096 --out_dir=data/wiki
    python prepare_openwebtext.py --source=imdb --tokenizer=bpe:4096 --out_dir=data/imdb_bpe
    python -m studies.budget  # resumes; results/budget.csv has a row for each run

The list of runs is in order of priority. Wherever it is stopped, what is done is a smaller study
(--stages and --heads train a part of it):

    LONG heads   cross_entropy, cosine and its twin
        sweep        2 M tokens, seed 1337: three learning rates for every head; then, at the best,
                     half and twice the head's strength. The strength is the exponent, the exponent
                     to which a twin's scale is matched, or for heads without one the size of the
                     first prototypes. While the best setting is on the edge of what was tried, the
                     next one beyond it is tried, at most MOST times. The lowest validation loss
                     wins, and its setting is the head's at every budget.
        0.6M, 2M     three other seeds, which no earlier study has used
        6M, 20M      the first of these seeds; 20 M are 6.5 epochs
        6M           the two other seeds
        20M settings other strengths and rates than the sweep's, to see whether they serve here
        imdb         2 M tokens of film reviews, which decided nothing, three seeds
        cost         0.3 M tokens, one run at a time, to measure the energy of a token, three seeds
    other HEADS  sweep, 0.6M and 2M in the same way, then 6M with the first seed
    CONTROLS     sweep and 2M. They tell tail, normalisation and distance apart
    2M rate      cross_entropy with the learning rate of cosine, five seeds
    then for all
        6M, 20M      the two other seeds, where they are still missing (20M: LONG heads)
        0.6M, 2M     two more seeds
        imdb, wiki   2 M tokens of other corpora, three seeds
        cost         the energy of a token of the other heads
        dropout      20 M tokens with dropout 0.1, one seed of the LONG heads

Runs of one seed see the same tokens in the same order, so heads are compared pair by pair. The loss
that is reported is that of the test split, which decides nothing. imdb and wiki have none, and
their validation split decides nothing either.
"""

import math
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from analysis.calibration import calibration_error, examine
from analysis.geometry import spectrum
from analysis.gradients import stability
from analysis.intervals import mean_and_half
from analysis.tables import Column, Columns, interval, markdown
from base.command_line import cli, parse
from base.errors import nearest
from studies.heads import costs, test_loss
from studies.runner import Row, Table, Training, TrainingConfig, complete_trainings
from studies.search import next_setting, number
from text.token_files import data_folder, load_data
from training import checkpoint
from training.metrics import read_metrics

RATES = (1.5e-3, 3e-3, 6e-3)
SWEEP_SEED, SEEDS = 1337, (2001, 2002, 2003, 2004, 2005)
MOST = 3  # settings of a head beyond the edge
TOKENS = 1024  # an iteration
FEW = 3  # seeds of long runs
KEY = (
    "stage", "dataset", "tokens", "name", "exponent", "init_std", "learning_rate", "dropout", "seed"
)  # fmt: skip
COLUMNS = [
    *KEY, "val_loss", "best_val_loss", "test_loss", "bits_per_byte", "val_losses", "ece",
    "grad_norm_mean", "grad_norm_cv", "grad_spikes", "prototype_radius", "components_90",
    "effective_rank", "strength", "tokens_per_s", "joules_per_token", "seconds", "commit",
]  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A head and its strength.

    exponent: of the harmonic link, or the one to which the softmax link's scale is matched at the
        start. None for a head without one. init_std: of the first prototypes. These are where the
        sweep begins.
    """

    head: str
    link: str = "harmonic"
    exponent: float | None = None
    init_std: float = 0.02
    learn_scale: bool = False


HEADS = {
    "cross_entropy": Head("cross_entropy", init_std=0.05),
    "cosine": Head("cosine", exponent=16),
    "cosine softmax": Head("cosine", "softmax", 16),
    "euclidean": Head("euclidean", exponent=1024),
    "euclidean softmax": Head("euclidean", "softmax", 1024),
    "mahalanobis softmax": Head("mahalanobis", "softmax", 2048),
    "euclidean_squared softmax": Head("euclidean_squared", "softmax", 512),
}
CONTROLS = {
    "student_t": Head("student_t", exponent=1024),  # euclidean's HarMax without the pole
    "stablemax": Head("stablemax", init_std=0.05),  # a power-law tail without a distance
    # Cosines with a scale for each token, the norm of its prototype: 0.8 * sqrt(256) at the start.
    "nGPT": Head("cosine_scaled", init_std=0.8),
    "IsoMax+": Head("euclidean_normalized", "softmax", 32, learn_scale=True),
}
ALL = {**HEADS, **CONTROLS}
LONG = ("cross_entropy", "cosine", "cosine softmax")  # trained longest
# A head, what is changed of its setting in the longest runs, and the factor. The sweep gave cosine
# n = 64 and its twin 32, so two of these give one of them the strength of the other.
CHECKS = [
    ("cosine", "exponent", 0.5),
    ("cosine", "exponent", 2),
    ("cosine", "learning_rate", 2),
    ("cross_entropy", "learning_rate", 0.5),
    ("cosine softmax", "exponent", 2),
    ("cosine softmax", "learning_rate", 2),
]
STAGES = (
    "sweep", "0.6M", "2M", "2M rate", "6M", "20M", "20M settings", "imdb", "cost", "wiki", "dropout"
)  # fmt: skip
DATASETS = {"imdb": "imdb_bpe", "wiki": "wiki"}  # Other stages use wikitext2.
# Stages that compare settings or measure cost. They never see the test split.
UNTESTED = ("sweep", "20M settings", "cost")


@dataclass
class BudgetConfig(TrainingConfig):
    """The budget study"""

    config: str = "configs/budget.yaml"
    """the model; what a run changes are its flags"""
    out: str = "results/budget.csv"
    """the table; runs that it has are not repeated"""
    runs: str = "out/budget"
    """where the runs' folders go"""
    stages: str = ""
    """only runs of these stages, such as 6M,cost; empty = all"""
    heads: str = ""
    """only runs of these heads, such as 'cosine,cosine softmax'; empty = all"""

    def problems(self) -> list[str]:
        stages = [name for name in self.only_stages if name not in STAGES]
        heads = [name for name in self.only_heads if name not in ALL]
        wrong = [f"stages: unknown stage {name}{nearest(name, STAGES)}" for name in stages]
        wrong += [f"heads: unknown head {name}{nearest(name, ALL)}" for name in heads]
        return super().problems() + wrong

    @property
    def only_stages(self) -> list[str]:
        """The names in `stages`, or all stages."""
        return self.stages.split(",") if self.stages else list(STAGES)

    @property
    def only_heads(self) -> list[str]:
        """The names in `heads`, or all heads."""
        return self.heads.split(",") if self.heads else list(ALL)


class Plan:
    """The runs of these heads that are wanted, given what the table holds by now."""

    def __init__(self, table: Table, heads: Iterable[str] = tuple(ALL)):
        self.table, self.heads = table, set(heads)

    def settings(self) -> list[dict]:
        """Keys of runs, most important first. What needs a sweep is listed once that is done."""
        first, early, late = SEEDS[:1], SEEDS[:FEW], SEEDS[FEW:]
        others = [name for name in HEADS if name not in LONG]
        found = self.sweep(LONG)
        if not self.done(found):
            return found
        found += self.runs("0.6M", 0.6, early, LONG)
        found += self.runs("2M", 2.0, early, LONG)
        found += self.runs("6M", 6.0, first, LONG)
        found += self.runs("20M", 20.0, first, LONG)
        found += self.runs("6M", 6.0, early[1:], LONG)
        found += [self.changed(*check) for check in CHECKS if check[0] in self.heads]
        found += self.runs("imdb", 2.0, early, LONG)
        found += self.runs("cost", 0.3, early, LONG)
        swept = self.sweep(others)
        found += swept
        if not self.done(swept):
            return found
        found += self.runs("0.6M", 0.6, early, others)
        found += self.runs("2M", 2.0, early, others)
        found += self.runs("6M", 6.0, first, others)
        swept = self.sweep(CONTROLS)
        found += swept
        if not self.done(swept):
            return found
        found += self.runs("2M", 2.0, early, CONTROLS)
        rate = self.winner("cosine")["learning_rate"]
        found += self.runs("2M rate", 2.0, SEEDS, ["cross_entropy"], learning_rate=rate)
        found += self.runs("6M", 6.0, early[1:], others)
        found += self.runs("20M", 20.0, early[1:], LONG)
        found += self.runs("0.6M", 0.6, late, HEADS)
        found += self.runs("2M", 2.0, late, ALL)
        found += self.runs("imdb", 2.0, early, others)
        found += self.runs("cost", 0.3, early, [*others, *CONTROLS])
        found += self.runs("wiki", 2.0, early, HEADS)
        found += self.runs("dropout", 20.0, first, LONG, dropout=0.1)
        return found

    def done(self, keys: list[dict]) -> bool:
        return all(self.table.find(key) for key in keys)

    def sweep(self, names: Iterable[str]) -> list[dict]:
        """The settings of these heads that are to be tried, as far as they are known by now."""
        return [key for name in names if name in self.heads for key in self.tried(name)]

    def tried(self, name: str) -> list[dict]:
        """Learning rates, then strengths at the best rate, then what lies beyond an edge."""
        found = [{**base(name), "learning_rate": rate} for rate in RATES]
        if not self.done(found):
            return found
        best, column = min(found, key=self.loss), strength(name)
        found += [{**best, column: best[column] * factor} for factor in (0.5, 2)]
        for _ in range(MOST):
            if not self.done(found):
                break
            best = min(found, key=self.loss)
            settings = [(key[column], key["learning_rate"]) for key in found]
            further = next_setting((best[column], best["learning_rate"]), settings)
            if further is None:
                break
            found.append({**best, column: further[0], "learning_rate": further[1]})
        return found

    def winner(self, name: str) -> dict:
        """The setting with the best validation loss of a head's sweep, which is done."""
        return min(self.tried(name), key=self.loss)

    def loss(self, key: dict) -> float:
        """The validation loss of a run that the table has."""
        return number(self.table.row(key)["val_loss"])

    def changed(self, name: str, column: str, factor: float) -> dict:
        """A head's longest run with another setting than its sweep's best."""
        (run,) = self.runs("20M settings", 20.0, SEEDS[:1], [name])
        value = run[column] * factor
        return {**run, column: int(value) if value == int(value) else value}  # 32, not 32.0

    def runs(
        self,
        stage: str,
        tokens: float,
        seeds: Iterable[int],
        names: Iterable[str],
        **changes: object,
    ) -> list[dict]:
        """Every seed with every head at its best setting, seed by seed. tokens: millions."""
        return [
            {
                **self.winner(name),
                "stage": stage,
                "dataset": dataset(stage),
                "tokens": tokens,
                "seed": seed,
                **changes,
            }
            for seed in seeds
            for name in names
            if name in self.heads
        ]


def strength(name: str) -> str:
    """The column of a head's strength."""
    return "init_std" if ALL[name].exponent is None else "exponent"


def dataset(stage: str) -> str:
    """The prepared data that a stage trains on."""
    return DATASETS.get(stage, "wikitext2")


def base(name: str) -> dict:
    """The key of a head's run in the sweep; `Plan.tried` sets its learning rate."""
    exponent = ALL[name].exponent
    return {
        "stage": "sweep",
        "dataset": dataset("sweep"),
        "tokens": 2.0,
        "name": name,
        "exponent": "" if exponent is None else exponent,
        "init_std": ALL[name].init_std,
        "learning_rate": math.nan,
        "dropout": 0.0,
        "seed": SWEEP_SEED,
    }


def training(key: dict) -> Training:
    """The run of train.py of a key."""
    head, iterations = ALL[key["name"]], round(key["tokens"] * 1e6 / TOKENS)
    flags = {
        "head": head.head,
        "head_init_std": key["init_std"],
        "dataset": key["dataset"],
        "learning_rate": key["learning_rate"],
        "dropout": key["dropout"],
        "seed": key["seed"],
        "max_iters": iterations,
        "warmup_iters": iterations // 10,
        "eval_interval": math.ceil(iterations / 20),
        "init_from": "auto",
        "overwrite": False,
    }
    alone = key["stage"] == "cost"
    if alone:
        flags["emissions"] = True
    if head.exponent is not None:
        flags |= {"link": head.link, "exponent": key["exponent"]}
        flags |= {"learn_scale": head.learn_scale}
    return Training(key, flags, alone=alone)


@torch.no_grad()
def measure(run: Path, key: dict) -> dict:
    """The other columns of a run that has ended. Its weights stay, but for those of UNTESTED."""
    torch.set_num_threads(1)
    metrics = read_metrics(run)
    losses = [m for m in metrics if "val_loss" in m]
    model, *_ = checkpoint.load_run(run)
    prototypes, steady = model.head.prototypes(), stability(metrics, 1.0)
    shape, folder = spectrum(prototypes), data_folder(key["dataset"])
    seen = examine(model, load_data(folder), "val")
    speeds = sorted(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)
    row = {
        "val_loss": f"{losses[-1]['val_loss']:.6f}",
        "best_val_loss": f"{min(m['val_loss'] for m in losses):.6f}",
        "bits_per_byte": f"{losses[-1]['bits_per_byte']:.6f}",
        # Equally far apart, from before the first iteration.
        "val_losses": " ".join(f"{m['val_loss']:.4f}" for m in losses),
        "ece": f"{calibration_error(seen['confidence'], seen['correct']):.5f}",
        "grad_norm_mean": f"{steady['mean']:.4g}",
        "grad_norm_cv": f"{steady['cv']:.4g}",
        "grad_spikes": f"{steady['spike_rate']:.4g}",
        "prototype_radius": f"{prototypes.norm(dim=-1).mean().item():.4g}",
        "components_90": shape["components_90"],
        "effective_rank": f"{shape['effective_rank']:.4g}",
        "strength": "" if model.head.is_control else f"{float(model.head.strength):.6g}",
        "tokens_per_s": f"{speeds[len(speeds) // 2]:.5g}",
    }
    untested = key["stage"] in UNTESTED
    if not untested:
        # Nothing was chosen on the validation split of data that has no test split.
        held_out = "test" in load_data(folder).splits
        row["test_loss"] = f"{test_loss(model, folder):.6f}" if held_out else row["val_loss"]
    if key["stage"] == "cost":
        row |= costs(run, metrics, beside=1)
        del row["kwh"]  # It counts the start and the compilation too.
    for checkpoint_folder in checkpoint.folders(run)[: None if untested else -1]:
        shutil.rmtree(checkpoint_folder)
    return row


def summary(rows: list[Row]) -> str:
    """A line for each stage and head: the mean test loss, and the difference to cross_entropy's,
    paired by seed."""
    cells = []
    for stage in dict.fromkeys(row["stage"] for row in rows if row["stage"] not in UNTESTED):
        here = [row for row in rows if row["stage"] == stage]
        base = {r["seed"]: number(r["test_loss"]) for r in here if r["name"] == "cross_entropy"}
        for name in ALL:
            runs = {r["seed"]: number(r["test_loss"]) for r in here if r["name"] == name}
            if runs:
                mean, _ = mean_and_half(list(runs.values()))
                pairs = [runs[seed] - base[seed] for seed in runs if seed in base]
                line = {"stage": stage, "head": name, "seeds": len(runs), "test loss": mean}
                if pairs and name != "cross_entropy":
                    line["difference"] = interval(*mean_and_half(pairs))
                cells.append(line)
    columns: Columns = [
        "stage",
        "head",
        "seeds",
        Column("test loss", form=".4f", unit="nats"),
        Column("difference", "minus cross_entropy"),
    ]
    return markdown(cells, columns)


def main() -> None:
    (c,) = parse(sys.argv[1:], BudgetConfig)
    for name in dict.fromkeys(dataset(stage) for stage in c.only_stages):
        load_data(data_folder(name))  # What is missing is told now, not after hours.
    table = Table(c.out, COLUMNS, KEY)
    plan = Plan(table, c.only_heads)

    def wanted() -> list[Training]:
        return [training(key) for key in plan.settings() if key["stage"] in c.only_stages]

    complete_trainings(c, table, wanted, measure)
    print(summary(table.rows))


if __name__ == "__main__":
    cli(main)
