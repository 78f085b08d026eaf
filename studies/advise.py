"""Compares heads on your data, within your time: which one should you use?

    python -m studies.advise --dataset=wiki --minutes=10
    python -m studies.advise my.yaml --heads=cosine,manhattan --seeds=5 --minutes=60

As for train.py, start with a YAML config and override it with flags. The default is the small model
of configs/advise.yaml. cross_entropy always takes part. So does the softmax twin of every head: the
same distance without HarMax.

1. Timing: each head trains for a few iterations. Their speed tells how many fit into the time.
2. Sweep: each head trains with three learning rates, then with half and twice its strength. So all
   heads have equally many settings. The lowest validation loss wins. A head without an exponent
   sweeps the scale of its prototypes instead. There is one seed, and runs are half as long as in
   step 3.
3. Final runs: the best setting of each head trains with seeds that the sweep did not use. All heads
   see the same tokens in the same order, so they are compared seed by seed.

The study itself sets head, link, strength, seed, the number of iterations and the schedule. It
ignores what the config says about them. The minutes are only a plan, and no run is stopped to keep
them. Rows appear in out/advise/NAME.csv as runs end. Press Ctrl-C to stop, and call it again to
resume. With other settings or data it starts again.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from analysis import figures
from analysis.tables import Column, interval, markdown
from base.command_line import cli, parse, write_yaml
from base.errors import UserError, check, nearest, too_small
from harmonic import HEADS
from harmonic.distances import OTHER_NAMES
from harmonic.links import resolve_exponent
from model import ModelConfig
from studies.runner import Table, Training, TrainingConfig, complete_trainings
from studies.search import number, on_edge
from studies.verdict import BASELINE, Losses, conclude, differences
from text.token_files import Data, data_folder, load_data
from training import checkpoint
from training.config import TrainConfig
from training.data import split_problems
from training.metrics import read_metrics

DEFAULT = "configs/advise.yaml"
# Factors of the config's learning rate, and factors of a head's default strength.
RATES = (0.5, 1, 2)
STRENGTHS = (0.5, 2)
SETTINGS = len(RATES) + len(STRENGTHS)
SWEEP_SEED, FIRST_SEED = 1337, 1338
TIMED = 20  # Iterations.
# With fewer iterations in a final run, the ranking says little.
LEAST = 100
# The part of the time that is planned. Runs may be slower than the timing runs.
PLANNED = 0.9
# Settings of train.py that the study itself sets.
OF_A_HEAD = ("head", "link", "exponent", "scale", "learn_exponent", "learn_scale")
OF_A_RUN = (
    "seed", "max_iters", "warmup_iters", "min_lr", "lr_decay_iters", "decay_iters", "eval_interval",
    "log_interval", "eval_only", "out_dir", "overwrite", "sample_interval", "new_data_order",
    "verify_resume", "profile", "tensorboard", "wandb",
)  # fmt: skip
KEY = (
    "stage", "dataset", "setup", "name", "learning_rate", "exponent", "init_std", "seed",
    "iterations",
)  # fmt: skip
COLUMNS = [*KEY, "val_loss", "half_loss", "tokens_per_s", "seconds", "commit"]


@dataclass
class AdviseConfig:
    """The comparison"""

    minutes: float = 10
    """minutes for the whole study; runs are as long as fits into them"""
    heads: str = "cosine,euclidean"
    """heads to compare with cross_entropy, each with its softmax twin"""
    seeds: int = 3
    """final runs of each head"""
    out: str = "out/advise"
    """folder of the table, the figure and the runs"""
    workers: int = 2
    """runs side by side, each on one CPU thread; 1 is best for one GPU"""
    nproc_per_node: int = 1
    """processes of each run, for GPUs"""

    def problems(self) -> list[str]:
        found = too_small(self, seeds=3, workers=1, nproc_per_node=1)
        if not 0 < self.minutes < math.inf:
            found.append(f"minutes={self.minutes} must be positive")
        for name in self.names():
            if name not in HEADS:
                found.append(f"heads: unknown head {name}{nearest(name, HEADS, OTHER_NAMES)}")
        if not set(self.names()) - {BASELINE}:
            found.append(f"heads={self.heads} names nothing to compare with {BASELINE}")
        return found

    def names(self) -> list[str]:
        return [name.strip() for name in self.heads.split(",")]


@dataclass(frozen=True)
class Head:
    """A head and its link. A control has no link."""

    head: str
    link: str | None = None


@dataclass(frozen=True)
class Speed:
    """How long a run takes."""

    fixed: float
    """seconds to start, to compile and to evaluate"""
    iteration: float
    """seconds for an iteration"""


@dataclass(frozen=True)
class Costs:
    """Predicts the time of a study from the speed of each head."""

    speeds: list[Speed]
    spent: float
    """seconds of the timing runs"""
    workers: int
    seeds: int

    def minutes(self, iterations: int) -> float:
        """The --minutes with which final runs have this many iterations."""
        seconds = self.spent
        for speed in self.speeds:
            seconds += SETTINGS * (speed.fixed + speed.iteration * iterations / 2)
            seconds += self.seeds * (speed.fixed + speed.iteration * iterations)
        return seconds / self.workers / 60 / PLANNED

    def iterations(self, minutes: float) -> int:
        """The iterations of a final run that fit into the minutes. Even, as sweeps have half."""
        none = self.minutes(0)
        each = (self.minutes(1000) - none) / 1000
        return max(0, math.floor((minutes - none) / each / 2) * 2)


class Study:
    """The runs of a study, and the results that its table has so far."""

    def __init__(self, c: AdviseConfig, m: ModelConfig, t: TrainConfig, data: Data, table: Table):
        self.c, self.m, self.t, self.table = c, m, t, table
        self.heads = {BASELINE: Head(BASELINE)}
        for name in c.names():
            if HEADS[name].is_control:
                self.heads[name] = Head(name)
            else:
                self.heads[name] = Head(name, "harmonic")
                self.heads[f"{name} softmax"] = Head(name, "softmax")
        self.twins = {
            n: f"{n} softmax" for n, head in self.heads.items() if head.link == "harmonic"
        }
        self.dataset = data.folder.name
        # Two rows are comparable only if all of this is equal. The rest is in their key.
        same = [dataclasses.asdict(m), dataclasses.asdict(t), c.workers, c.nproc_per_node]
        same += [data.tokenizer, *(split.identity() for split in data.splits.values())]
        self.setup = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:8]
        self.tokens = t.batch_size * t.gradient_accumulation_steps * m.block_size

    def key(
        self, stage: str, name: str, iterations: int, setting: tuple[float, float], seed: int
    ) -> dict:
        """The key of a run. setting: learning rate, and a factor of the default strength."""
        rate, strength = setting
        head, width = self.heads[name], self.m.n_embd
        std, exponent = self.m.head_init_std, ""
        if head.link is None:
            # At GPT-2's width it is 0.02, as there. Narrower models need more for equal logits.
            std = 0.02 * math.sqrt(768 / width) * strength
        else:
            exponent = f"{resolve_exponent(head.head, width) * strength:.6g}"
        return {
            "stage": stage,
            "dataset": self.dataset,
            "setup": self.setup,
            "name": name,
            "learning_rate": f"{rate:.6g}",
            "exponent": exponent,
            "init_std": f"{std:.6g}",
            "seed": str(seed),
            "iterations": str(iterations),
        }

    def timing(self) -> list[dict]:
        """The keys of the timing runs."""
        setting = self.t.learning_rate, 1.0
        return [self.key("speed", name, TIMED, setting, SWEEP_SEED) for name in self.heads]

    def speeds(self) -> dict[str, Speed]:
        """The speed of each head. UserError if a timing run was not finite."""
        found = {}
        for key in self.timing():
            row = self.table.row(key)
            if not row["tokens_per_s"]:
                raise UserError(
                    f"{key['name']}: a loss was not finite within {TIMED} iterations: lower"
                    f" --learning_rate={self.t.learning_rate:g}"
                )
            iteration = self.tokens / float(row["tokens_per_s"])
            fixed = float(row["seconds"]) - TIMED * iteration
            found[key["name"]] = Speed(max(0.0, fixed), iteration)
        return found

    def costs(self) -> Costs:
        """The costs of this study, once the timing is done."""
        spent = sum(float(self.table.row(key)["seconds"]) for key in self.timing())
        return Costs(list(self.speeds().values()), spent, self.c.workers, self.c.seeds)

    def sweep(self, name: str, iterations: int) -> dict[tuple[float, float], float | None]:
        """The settings that are known so far -> their loss, or None if they have not run.

        They are three learning rates and, when these are done, two strengths.
        """

        def loss(setting: tuple[float, float]) -> float | None:
            row = self.table.find(self.key("sweep", name, iterations // 2, setting, SWEEP_SEED))
            return number(row["val_loss"]) if row else None

        found = {s: loss(s) for s in [(self.t.learning_rate * rate, 1.0) for rate in RATES]}
        if None not in found.values():
            rate, _ = _best(found)
            found |= {s: loss(s) for s in [(rate, strength) for strength in STRENGTHS]}
        return found

    def finals(self, name: str, iterations: int) -> list[dict]:
        """The final runs of a head whose sweep is done. Empty if no setting was finite."""
        found = self.sweep(name, iterations)
        best = _best(found)
        if found[best] == math.inf:
            return []
        seeds = range(FIRST_SEED, FIRST_SEED + self.c.seeds)
        return [self.key("final", name, iterations, best, seed) for seed in seeds]

    def wanted(self, iterations: int) -> list[dict]:
        """The keys of all runs known so far, most important first.

        Final runs are known only when the sweep of every head is done.
        """
        sweeps = {name: self.sweep(name, iterations) for name in self.heads}
        found = []
        for name, losses in sweeps.items():
            for setting in losses:
                found.append(self.key("sweep", name, iterations // 2, setting, SWEEP_SEED))
        if any(None in losses.values() for losses in sweeps.values()):
            return found
        finals = [self.finals(name, iterations) for name in self.heads]
        # All heads with one seed, then with the next.
        for keys in zip(*[keys for keys in finals if keys], strict=True):
            found += keys
        return found

    def training(self, key: dict) -> Training:
        """The run of train.py for a key."""
        head, iterations = self.heads[key["name"]], int(key["iterations"])
        flags = {
            "head": head.head,
            "head_init_std": key["init_std"],
            "learning_rate": key["learning_rate"],
            "seed": key["seed"],
            "max_iters": iterations,
            "warmup_iters": iterations // 10,
            "eval_interval": math.ceil(iterations / 2),
            "log_interval": max(1, iterations // 4),
        }
        if head.link:
            flags |= {"link": head.link, "exponent": key["exponent"]}
        return Training(key, flags)

    def losses(self, iterations: int, column: str = "val_loss") -> Losses:
        """The losses of the final runs."""
        found = {}
        for name in self.heads:
            rows = [self.table.row(key) for key in self.finals(name, iterations)]
            # A head whose sweep had no finite setting counts as failed.
            found[name] = {row["seed"]: number(row[column]) for row in rows} or {"": math.inf}
        return found


def _best(losses: dict[tuple[float, float], float | None]) -> tuple[float, float]:
    """The setting with the lowest loss."""
    known = {setting: loss for setting, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__)


def measure(run: Path, key: dict) -> dict:
    """The result columns of a finished run. This deletes its checkpoints."""
    metrics = read_metrics(run)
    losses = [m["val_loss"] for m in metrics if "val_loss" in m]
    speeds = [m["tokens_per_s"] for m in metrics if "tokens_per_s" in m]
    for folder in checkpoint.folders(run):
        shutil.rmtree(folder)
    return {
        "val_loss": f"{losses[-1]:.6f}",
        "half_loss": f"{losses[1]:.6f}",
        # The first quarter includes compilation.
        "tokens_per_s": f"{statistics.median(speeds[len(speeds) // 4 :]):.5g}",
    }


# ---- what it prints ----------------------------------------------------------------------------


def speed_table(speeds: dict[str, Speed]) -> str:
    """A line for each head: its speed."""
    rows = [
        {"head": name, "iteration": 1000 * speed.iteration, "fixed": speed.fixed}
        for name, speed in speeds.items()
    ]
    iteration = Column("iteration", "an iteration", ".0f", "ms")
    return markdown(rows, ["head", iteration, Column("fixed", "the rest of a run", ".1f", "s")])


def result_table(study: Study, iterations: int) -> str:
    """A line for each head, the best first, with the differences to cross_entropy and twin."""
    losses = study.losses(iterations)
    found = differences(losses, study.twins)
    rows = []
    for name in study.heads:
        row = {"head": name, "loss": statistics.fmean(losses[name].values())}
        keys = study.finals(name, iterations)
        if keys:
            runs = [study.table.row(key) for key in keys]
            speed = statistics.median(float(run["tokens_per_s"] or "nan") for run in runs)
            row |= {"rate": keys[0]["learning_rate"], "time": 1e6 / speed}
            if study.heads[name].link:
                row["strength"] = f"n = {keys[0]['exponent']}"
            else:
                row["strength"] = f"std = {keys[0]['init_std']}"
        for column, other in {"base": BASELINE, "twin": study.twins.get(name)}.items():
            if other is not None and (name, other) in found:
                difference = found[name, other]
                row[column] = interval(difference.mean, difference.half)
                row[f"{column}_p"] = difference.p
        rows.append(row)
    columns: list[Column | str] = [
        "head",
        Column("rate", "learning rate"),
        "strength",
        Column("loss", "validation loss", ".4f"),
        Column("base", f"minus {BASELINE}"),
        Column("base_p", "p", ".2g"),
        Column("twin", "minus its twin"),
        Column("twin_p", "p", ".2g"),
        Column("time", "a token", ".0f", "µs"),
    ]
    return (
        f"{markdown(sorted(rows, key=_loss), columns)}\n\n"
        f"Differences are in nats a token, with 95 % intervals, paired by seed. p is corrected for"
        f" {len(found)} comparisons (Holm), the intervals are not. n is the exponent, or the one"
        " that the twin's scale is matched to at the start. std is the scale of the prototypes at"
        f" the start. The time of a token is that of {study.c.workers} runs side by side."
    )


def _loss(row: dict) -> float:
    return row["loss"]


def conclusion(study: Study, iterations: int, costs: Costs) -> str:
    """The conclusion of the study, and what limits it."""
    tokens = iterations * study.tokens
    where = f"after {tokens / 1e6:.2g} M tokens of {study.dataset} ({study.c.seeds} seeds)"

    def minutes(seeds: int) -> float:
        return dataclasses.replace(costs, seeds=seeds).minutes(iterations)

    losses = study.losses(iterations)
    sentences = conclude(losses, study.twins, where, minutes)
    sentences.append("Early rankings can change with longer training.")
    now = differences(losses, study.twins)
    early = differences(study.losses(iterations, "half_loss"), study.twins)
    to_baseline = [pair for pair in now if pair[1] == BASELINE and pair in early]
    if to_baseline:
        best = min(to_baseline, key=lambda pair: now[pair].mean)
        sentences[-1] += (
            f" Halfway, {best[0]} minus {BASELINE} was {early[best].mean:+.3f}; at the end it is"
            f" {now[best].mean:+.3f}."
        )
    sentences.append(on_edge([study.sweep(name, iterations) for name in study.heads]))
    return "\n".join(sentences)


def draw(study: Study, iterations: int, path: Path) -> None:
    """The differences to cross_entropy with their intervals, and a tick for each seed."""
    found = differences(study.losses(iterations), study.twins)
    shown = [d for (_, other), d in found.items() if other == BASELINE]
    figure = figures.figure(1.0 + 0.4 * len(shown))
    axes = figure.subplots()
    for place, difference in enumerate(reversed(shown)):
        color = figures.head_color(study.heads[difference.head].head)
        is_twin = study.heads[difference.head].link == "softmax"
        axes.errorbar(
            difference.mean, place, xerr=difference.half, fmt="o", color=color, capsize=3,
            markerfacecolor="white" if is_twin else color,
        )  # fmt: skip
        axes.plot(difference.values, [place - 0.2] * len(difference.values), "|", color=color)
    axes.axvline(0, color=figures.GREY, linewidth=1)
    axes.set_yticks(range(len(shown)), [d.head for d in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel(f"validation loss minus {BASELINE}'s, nats a token (left is better)")
    tokens = iterations * study.tokens / 1e6
    axes.set_title(
        f"{study.dataset}, {tokens:.2g} M tokens: mean and 95 % interval of {study.c.seeds} seeds"
        " (|: a seed)"
    )
    figures.save(figure, path)


# ---- the command -------------------------------------------------------------------------------


def configure(argv: list[str]) -> tuple[AdviseConfig, ModelConfig, TrainConfig, Data]:
    """Reads the config file and the flags. Settings that the study sets get their defaults.

    Raises: UserError if they, or the data, are wrong.
    """
    if not argv or argv[0].startswith("-"):
        argv = [DEFAULT, *argv]
    given = [word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")]
    own = (*OF_A_HEAD, *OF_A_RUN)
    problems = [f"--{name}: the study sets it itself" for name in given if name in own]
    try:
        c, m, t = parse(argv, AdviseConfig, ModelConfig, TrainConfig, config_file=True)
    except UserError:
        check(problems)  # Such a flag may be the cause.
        raise
    if t.init_from != "scratch" or t.source:
        problems.append("the study trains from scratch: leave out init_from and source")
    check(problems)
    m = dataclasses.replace(m, **{name: getattr(ModelConfig, name) for name in OF_A_HEAD})
    t = dataclasses.replace(t, **{name: getattr(TrainConfig, name) for name in OF_A_RUN})
    # CodeCarbon would count the energy of all parallel runs for each of them.
    t.emissions = False
    for name in c.names():
        problems += dataclasses.replace(m, head=name).problems()
    check(problems)
    data = load_data(data_folder(t.dataset), t.tokenizer)
    check(split_problems(data, m.block_size))
    return c, m, t, data


def main() -> None:
    c, m, t, data = configure(sys.argv[1:])
    began, out = time.monotonic(), Path(c.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be a folder: {error.strerror}") from None
    table = Table(out / f"{data.folder.name}.csv", COLUMNS, KEY)
    study = Study(c, m, t, data, table)
    config = out / f"{study.dataset}-{study.setup}.yaml"
    write_yaml(config, m, t)
    how = TrainingConfig(
        str(config), str(table.path), str(out / "runs"), c.workers, c.nproc_per_node
    )

    # Timing.
    complete_trainings(how, table, lambda: [study.training(key) for key in study.timing()], measure)
    print(speed_table(study.speeds()))
    costs = study.costs()
    iterations = costs.iterations(c.minutes)
    if iterations < LEAST:
        raise UserError(
            f"--minutes={c.minutes:g} is enough for final runs of {iterations} iterations, and"
            f" fewer than {LEAST} say little: use --minutes={math.ceil(costs.minutes(LEAST))}, a"
            " smaller model or fewer heads"
        )
    tokens = iterations * study.tokens
    print(
        f"{len(study.heads)} heads x ({SETTINGS} settings + {c.seeds} seeds):"
        f" {iterations // 2} iterations each in the sweep, then {iterations} ({tokens:,} tokens),"
        f" in about {PLANNED * c.minutes:.3g} minutes with the timing"
    )

    # Sweep and final runs.
    complete_trainings(
        how, table, lambda: [study.training(key) for key in study.wanted(iterations)], measure
    )
    picture = table.path.with_suffix(".png")
    draw(study, iterations, picture)
    print(f"\n{result_table(study, iterations)}\n\n{conclusion(study, iterations, costs)}")
    print(f"wrote {table.path} and {picture}, {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    cli(main)
