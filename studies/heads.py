"""The study of heads: every distance with both links, and cross-entropy.

All heads have the same model and the same tokens in the same order. The main ones have about
equally many settings, and variants of a family fewer.

    python prepare_openwebtext.py --source=wikitext2 --tokenizer=bpe:4096 --out_dir=data/wikitext2
    python prepare_openwebtext.py --source=imdb --tokenizer=bpe:4096 --out_dir=data/imdb_bpe
    # results/heads.csv gets a row for each run; call it again to resume
    python -m studies.heads
    python -m studies.heads --config=configs/study_gpt2_124m.yaml --out=results/heads_gpt2.csv \\
        --workers=1 --nproc_per_node=8

Stage 1 sweeps the learning rate and the exponent of each family and link, with one seed. It begins
    with a grid of 12 settings. While the winner is on the edge of the grid, the next setting beyond
    the edge follows (at most EDGES). Then come ROUNDS of settings around the winner: other initial
    scales of the prototypes, and half steps of the exponent. cross_entropy and cosine_linear have
    no exponent, and sweep the scale of their prototypes instead. Each further variant of a family
    gets 4 settings around the winner of its family.
Stage 2 trains the winners for longer with new seeds (SEEDS), and variants with one of them.
Stage 3 trains the four best harmonic heads of stage 2, their softmax twins and cross_entropy with
    other models and data: BERT, Qwen, and GPT on IMDB.
Stage 4 changes one thing at a time (ABLATIONS), for the best head of each link and for
    cross_entropy. For the four best heads of each link it doubles the exponent, with every seed.
Stage 5 measures the cost of a token. The heads of stage 2 train for COST_ITERS iterations, one
    after another, with all threads. Nothing else may run on the machine.

The losses of stages 2 to 4 are those of the test split, which is used for no decision. A softmax
twin sweeps the scales that match the exponents at the start (`harmonic.default_scale`).
euclidean_squared has only the softmax link (PENALTY).
"""

import functools
import itertools
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from analysis.geometry import spectrum
from analysis.gradients import stability
from base.command_line import cli, parse, read_yaml
from base.errors import check
from harmonic import IGNORE_INDEX
from model import Model
from studies.runner import Row, Table, Training, TrainingConfig, complete_trainings
from studies.search import beyond, number
from text.token_files import data_folder, load_data
from training import checkpoint
from training.data import validation_windows
from training.emissions import energy
from training.metrics import read_metrics
from training.objective import batches_of

FAMILIES = (
    "cosine",
    "euclidean",
    "manhattan",
    "minkowski",
    "mahalanobis",
    "hamming_soft",
    "chebyshev",
    "canberra",
    "bray_curtis",
)
CONTROLS = ("cross_entropy", "cosine_linear")
# Further variants: name -> (head, flags, family).
VARIANTS = {
    "minkowski p=3": ("minkowski", {"head_p": 3.0}, "minkowski"),
    "mahalanobis_diagonal": ("mahalanobis_diagonal", {}, "mahalanobis"),
    "mahalanobis_cholesky": ("mahalanobis_cholesky", {}, "mahalanobis"),
    "hamming_gumbel": ("hamming_gumbel", {}, "hamming_soft"),
    "hamming_hard": ("hamming_hard", {}, "hamming_soft"),
    "chebyshev_smooth": ("chebyshev_smooth", {}, "chebyshev"),
    "canberra_robust": ("canberra_robust", {}, "canberra"),
    # With q = 1 it equals bray_curtis_abs. No other q has a CPU kernel.
    "canberra_weighted": ("canberra_weighted", {}, "canberra"),
    "bray_curtis_abs": ("bray_curtis_abs", {}, "bray_curtis"),
    "bray_curtis_normalized": ("bray_curtis_normalized", {}, "bray_curtis"),
}
FIRST = {(head, "") for head in (*CONTROLS, *FAMILIES, "euclidean_squared")}
LINKS = ("harmonic", "softmax")
# The softmax of a squared distance is cross-entropy with a temperature and a norm penalty. The
# harmonic link of euclidean_squared is not needed: it is euclidean's with twice the n.
PENALTY = ("euclidean_squared", "softmax")

# Factors of the config's learning rate, half a decade apart.
RATES = (1 / 3, 1, 10 / 3)
# The exponents, as factors of n_embd.
MULTIPLES = (1 / 16, 1 / 4, 1, 4)
# Initial scales of the prototypes: for heads without an exponent, and for the others in the grid.
STDS, STD = (0.01, 0.02, 0.05, 0.1), 0.02
# Steps beyond an edge, and around a winner.
RATE_STEP, EXPONENT_STEP, STD_STEP = 10**0.5, 4, 2.0
EDGES = 4


@dataclass(frozen=True)
class Move:
    """A step from a winner to another setting: factors, and perhaps another init_std."""

    rate: float = 1.0
    second: float = 1.0
    std: float | None = None


# Each round starts at the winner of all settings before it.
ROUNDS = (
    [Move(std=0.005), Move(std=0.1)],
    [Move(second=EXPONENT_STEP**0.5), Move(second=1 / EXPONENT_STEP**0.5)],
    [Move(std=0.01), Move(std=0.05)],
)
CONTROL_ROUNDS = (
    [Move(second=STD_STEP**0.5), Move(second=1 / STD_STEP**0.5)],
    [Move(rate=RATE_STEP**0.5), Move(rate=RATE_STEP**-0.5)],
    [Move(rate=RATE_STEP**0.25), Move(rate=RATE_STEP**-0.25)],
)
VARIANT_MOVES = [Move(rate, n) for rate in (1.0, RATE_STEP**-1) for n in (1.0, 0.5)]

# The seed of stage 1, and those of the other stages.
FIRST_SEED, SEEDS = 1337, (1338, 1339, 1340)
# The number of windows of the test split, spread evenly.
TEST_WINDOWS = 640
COST_ITERS = 50
CHAMPIONS = 4
ELSEWHERE = ({"arch": "bert"}, {"arch": "qwen"}, {"dataset": "imdb_bpe"})


@dataclass(frozen=True)
class Ablation:
    """One change: flags, or a factor for a column of the winner's setting."""

    flags: dict = field(default_factory=dict)
    column: str | None = None
    factor: float = 1.0


# Runs of stage 1 are short, so the exponent is tested again for all champions of stage 2.
LONGER = "exponent x 2"
ABLATIONS = {
    # Training clips gradients at a norm of 1, which affects each head differently.
    "no clipping": Ablation({"grad_clip": 0.0}),
    LONGER: Ablation(column="exponent", factor=2.0),
    "untied": Ablation({"tie_weights": False}),
    "no prototype decay": Ablation({"prototype_decay": 0.0}),
    "learnt exponent": Ablation({"learn_exponent": True}),
    "init x 4": Ablation(column="init_std", factor=4.0),
    "init x 0.25": Ablation(column="init_std", factor=0.25),
    # As the published code of A and B trains.
    "label smoothing": Ablation({"label_smoothing": 0.1}),
}
COLUMNS = [
    "stage", "dataset", "arch", "ablation", "head", "p", "q", "link", "exponent", "scale",
    "init_std", "learning_rate", "seed", "iters",
    "val_loss", "test_loss", "bits_per_byte", "val_losses", "grad_norm_mean", "grad_norm_cv",
    "grad_spikes", "grad_clipped",
    "prototype_radius", "pca_top2", "pca_components_90", "effective_rank", "kwh", "tokens_per_s",
    "joules_per_token", "seconds", "commit",
]  # fmt: skip
KEY = (
    "stage", "dataset", "arch", "ablation", "head", "p", "q", "link", "exponent",
    "init_std", "learning_rate", "seed", "iters",
)  # fmt: skip


@dataclass
class StudyConfig(TrainingConfig):
    """The study of heads"""

    out: str = "results/heads.csv"
    """the table; its runs are not repeated"""
    stages: str = "12345"
    """which stages to run"""
    long_iters: int = 600
    """iterations of stages 2 to 4"""
    only: str | None = None
    """only this head, such as cosine"""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.long_iters < 1 or self.long_iters % 10:
            found.append(
                f"long_iters={self.long_iters} must be a multiple of 10: a run is evaluated 10"
                " times"
            )
        if not self.stages or set(self.stages) - set("12345"):
            found.append(f"stages={self.stages} is not made of 1, 2, 3, 4 and 5")
        heads = [head for head, *_ in VARIANTS.values()]
        names = sorted({*FAMILIES, *CONTROLS, PENALTY[0], *heads})
        if self.only not in (None, *names):
            found.append(f"only={self.only} is not a head of the study: {', '.join(names)}")
        return found


# ---- what is to run ----------------------------------------------------------------------------


def loss(row: Row) -> float:
    """The validation loss of a row. It is infinite if the run diverged."""
    return number(row["val_loss"])


@dataclass
class Sweep:
    """Stage 1 of a head and link: the settings to run, given the results so far.

    A setting is a dict with the columns of KEY, as texts.
    """

    table: Table
    head: str
    link: str
    base: dict
    """the config of the study"""
    flags: dict = field(default_factory=dict)
    """the flags of a variant"""
    around: Row | None = None
    """the winner of a variant's family"""

    @property
    def is_control(self) -> bool:
        return self.link == "control"

    @property
    def second(self) -> str:
        """The second column that is swept. The first is the learning rate."""
        return "init_std" if self.is_control else "exponent"

    def make(self, rate: float, second: float, std: float = STD) -> Row:
        """A setting. second: the exponent, or the init_std of a control."""
        setting = {
            "stage": 1,
            "dataset": self.base["dataset"],
            "arch": self.base["arch"],
            "head": self.head,
            "p": self.flags.get("head_p"),
            "q": self.flags.get("head_q"),
            "link": self.link,
            "exponent": None if self.is_control else float(second),
            "init_std": float(second if self.is_control else std),
            "learning_rate": float(rate),
            "seed": FIRST_SEED,
            "iters": self.base["max_iters"],
        }
        return {name: _text(setting.get(name)) for name in KEY}

    def moved(self, row: Row, move: Move) -> Row:
        """The setting of a row after a move."""
        rate, second = self.place(row)
        std = float(row["init_std"]) if move.std is None else move.std
        return self.make(rate * move.rate, second * move.second, std)

    def place(self, row: Row) -> tuple[float, float]:
        """The learning rate of a row, and its exponent or init_std."""
        return float(row["learning_rate"]), float(row[self.second])

    def top(self, wanted: list[Row]) -> Row | None:
        """The best row of these settings; None if some have not run."""
        found = [row for setting in wanted if (row := self.table.find(setting))]
        return min(found, key=loss) if len(found) == len(wanted) else None

    def grid(self) -> list[Row]:
        """The first 12 settings."""
        rates = [rate * float(self.base["learning_rate"]) for rate in RATES]
        seconds = [multiple * self.base["n_embd"] for multiple in MULTIPLES]
        if self.is_control:
            seconds = list(STDS)
        return [self.make(rate, second) for rate, second in itertools.product(rates, seconds)]

    def next_beyond(self, top: Row, wanted: list[Row]) -> Row | None:
        """The next setting beyond the edge, if the winner is on it; else None."""
        rate, second = self.place(top)
        tried = [self.place(row)[::-1] for key in wanted if (row := self.table.find(key))]
        step = STD_STEP if self.is_control else EXPONENT_STEP
        further = beyond((second, rate), tried, (step, RATE_STEP))
        return self.make(further[1], further[0]) if further else None

    def settings(self) -> list[Row]:
        """All settings known so far, done or not."""
        if self.around:
            return [self.moved(self.around, move) for move in VARIANT_MOVES]
        wanted = self.grid()
        for _ in range(EDGES):
            top = self.top(wanted)
            if top is None:
                return wanted
            further = self.next_beyond(top, wanted)
            if further is None:
                break
            wanted.append(further)
        for moves in CONTROL_ROUNDS if self.is_control else ROUNDS:
            top = self.top(wanted)
            if top is None:
                return wanted
            wanted += [self.moved(top, move) for move in moves]
        return wanted

    def winner(self) -> Row | None:
        """The best row; None if some settings have not run."""
        return self.top(self.settings())


def _text(value: object) -> str:
    """A value as a text of the table."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def sweeps(table: Table, base: dict) -> list[Sweep]:
    """All sweeps of stage 1 that can start. Variants wait for the winner of their family."""
    families = {}
    for head, link in itertools.product(FAMILIES, LINKS):
        families[head, link] = Sweep(table, head, link, base)
    found = [Sweep(table, head, "control", base) for head in CONTROLS]
    found += [Sweep(table, *PENALTY, base), *families.values()]
    for (head, flags, family), link in itertools.product(VARIANTS.values(), LINKS):
        if winner := families[family, link].winner():
            found.append(Sweep(table, head, link, base, flags, winner))
    return found


class Plan:
    """The settings of all stages, given the rows of the table."""

    def __init__(self, table: Table, c: StudyConfig, base: dict):
        """base: the config of the study."""
        self.table, self.c = table, c
        self.sweeps = [s for s in sweeps(table, base) if c.only in (None, s.head)]
        # (head, options if any, link) -> (sweep, winner).
        self.winners: dict[tuple, tuple[Sweep, Row]] = {}
        for s in self.sweeps:
            winner = s.winner()
            if winner and math.isfinite(loss(winner)):
                self.winners[s.head, *s.flags.values(), s.link] = s, winner

    def settings(self) -> list[Row]:
        """All settings known so far, done or not, in order.

        First come stages 1 and 2 of the families, then of further variants, then stages 3 and 4,
        then the softmax twins of variants, and last stage 5.
        """
        stages = {
            "1": self.stage_one,
            "2": self.stage_two,
            "3": self.stage_three,
            "4": self.stage_four,
            "5": self.stage_five,
        }
        found = []
        for stage, settings in stages.items():
            if stage in self.c.stages:
                found += settings()
        return sorted(found, key=_turn)

    def stage_one(self) -> list[Row]:
        return [setting for s in self.sweeps for setting in s.settings()]

    def stage_two(self) -> list[Row]:
        found = []
        for seed in SEEDS:
            for s, winner in self.winners.values():
                if not s.around or seed == SEEDS[0]:
                    found.append(self.again(winner, stage=2, seed=seed))
        return found

    def stage_three(self) -> list[Row]:
        if not self.champions:
            return []
        heads = [(winner["head"], link) for winner in self.champions["harmonic"] for link in LINKS]
        found = []
        for place in ELSEWHERE:
            for key in (("cross_entropy", "control"), *heads):
                found.append(self.again(self.winners[key][1], stage=3, **place))
        return found

    def stage_four(self) -> list[Row]:
        if not self.champions:
            return []
        best, best_twins = self.champions["harmonic"], self.champions["softmax"]
        found = []
        for name, ablation in ABLATIONS.items():
            rows = [*best, *best_twins] if name == LONGER else [best[0], best_twins[0]]
            if "exponent" not in name:
                # cross_entropy has no exponent.
                rows.append(self.winners["cross_entropy", "control"][1])
            for row in rows:
                changed: dict[str, object] = {}
                if ablation.column:
                    value = float(row[ablation.column]) * ablation.factor
                    changed = {ablation.column: f"{value:.6g}"}
                for seed in SEEDS if name == LONGER else SEEDS[:1]:
                    changed |= {"stage": 4, "ablation": name, "seed": seed}
                    found.append(self.again(row, **changed))
        return found

    def stage_five(self) -> list[Row]:
        return [self.again(w, stage=5, iters=COST_ITERS) for _, w in self.winners.values()]

    @functools.cached_property
    def champions(self) -> dict[str, list[Row]] | None:
        """Link -> the CHAMPIONS best heads by their mean loss in stage 2.

        None while one of these runs, or the winner of cross_entropy, is missing.
        """
        families = list(itertools.product(FAMILIES, LINKS))
        if not self.winners.keys() >= {("cross_entropy", "control"), *families}:
            return None
        means = {}
        for key in families:
            winner = self.winners[key][1]
            settings = [self.again(winner, stage=2, seed=seed) for seed in SEEDS]
            runs = [row for setting in settings if (row := self.table.find(setting))]
            if len(runs) < len(settings):
                return None
            means[key] = sum(map(loss, runs))
        found = {}
        for link in LINKS:
            losses = {head: means[head, link] for head in FAMILIES}
            order = sorted(losses, key=losses.__getitem__)
            found[link] = [self.winners[head, link][1] for head in order[:CHAMPIONS]]
        return found

    def again(self, row: Row, **changes: object) -> Row:
        """The setting of a row for a long run, with changes."""
        changes = {"seed": SEEDS[0], "iters": self.c.long_iters} | changes
        return {name: str(changes.get(name, row[name])) for name in KEY}


def _turn(setting: Row) -> tuple:
    """The place of a setting in the order of `Plan.settings`."""
    variant = (setting["head"], setting["p"]) not in FIRST
    late = variant and setting["link"] == "softmax"
    return setting["stage"] == "5", late, max(setting["stage"], "2"), variant


# ---- one run -----------------------------------------------------------------------------------


def training(s: Row) -> Training:
    """The run of train.py for a setting."""
    rate = s["learning_rate"]
    flags = {
        "dataset": s["dataset"],
        "arch": s["arch"],
        "head": s["head"],
        "learning_rate": rate,
        "min_lr": float(rate) / 10,
        "seed": s["seed"],
        "head_init_std": s["init_std"],
    }
    flags |= {f"head_{name}": s[name] for name in "pq" if s[name]}
    if s["link"] != "control":
        flags |= {"link": s["link"], "exponent": s["exponent"]}
    if s["ablation"]:
        flags |= ABLATIONS[s["ablation"]].flags
        if s["link"] == "softmax" and "learn_exponent" in flags:
            flags["learn_scale"] = flags.pop("learn_exponent")
    if s["stage"] != "1":
        tenth = int(s["iters"]) // 10
        flags |= {"max_iters": s["iters"], "warmup_iters": tenth, "eval_interval": tenth}
        flags["emissions"] = True
    if s["stage"] == "5":
        flags |= {"eval_interval": s["iters"], "log_interval": 10}
    return Training(s, flags, alone=s["stage"] == "5")


@torch.no_grad()
def test_loss(model: Model, folder: Path) -> float:
    """The loss in nats per token on TEST_WINDOWS windows of the test split; NaN without one."""
    data, m = load_data(folder), model.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "test" not in data.splits:
        return math.nan
    windows = validation_windows(data.splits["test"].tokens, m.block_size, TEST_WINDOWS)
    model, total, count = model.to(device), 0.0, 0
    for x, y in batches_of(data, m).validation(windows, 16, "test"):
        total += model(x.to(device), y.to(device), reduction="sum")[1].item()
        count += int((y != IGNORE_INDEX).sum())
    return total / count


@torch.no_grad()
def measure(c: StudyConfig, run: Path, s: Row) -> dict:
    """The result columns of a finished run."""
    if c.workers > 1:
        # Another run uses the other threads.
        torch.set_num_threads(1)
    metrics = read_metrics(run)
    losses = [m for m in metrics if "val_loss" in m]
    model, settings, _ = checkpoint.load_run(run)
    prototypes = model.head.prototypes()
    steady = stability(metrics, settings["grad_clip"])
    shape = spectrum(prototypes)
    row = {
        "val_loss": f"{losses[-1]['val_loss']:.6f}",
        "bits_per_byte": f"{losses[-1].get('bits_per_byte', math.nan):.6f}",
        # At equal intervals, starting before the first iteration.
        "val_losses": " ".join(f"{m['val_loss']:.4f}" for m in losses),
        "grad_norm_mean": f"{steady['mean']:.4g}",
        "grad_norm_cv": f"{steady['cv']:.4g}",
        "grad_spikes": f"{steady['spike_rate']:.4g}",
        "grad_clipped": f"{steady['clip_rate']:.4g}",
        "prototype_radius": f"{prototypes.norm(dim=-1).mean().item():.4g}",
        "pca_top2": f"{shape['top2']:.4g}",
        "pca_components_90": shape["components_90"],
        "effective_rank": f"{shape['effective_rank']:.4g}",
    }
    if s["link"] == "softmax":
        row["scale"] = f"{float(model.head.strength):.6g}"
    if s["stage"] not in ("1", "5"):
        row["test_loss"] = f"{test_loss(model, data_folder(s['dataset'])):.6f}"
    return row | costs(run, metrics, beside=1 if s["stage"] == "5" else c.workers)


def costs(run: Path, metrics: list[dict], beside: int) -> dict:
    """Speed and energy of a run. beside: how many runs ran in parallel.

    CodeCarbon measures the whole machine for each parallel run, so energy is divided by `beside`.
    """
    speed = statistics.median(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)
    row = {"tokens_per_s": f"{speed:.5g}"}
    used = energy(run)
    if used:
        kwh = used["energy_consumed"] / beside
        row["kwh"] = f"{kwh:.5g}"
        row["joules_per_token"] = f"{3.6e6 * kwh / used['duration'] / speed:.5g}"
    return row


def main() -> None:
    (c,) = parse(sys.argv[1:], StudyConfig)
    base = read_yaml(c.config)
    needed = ("n_embd", "learning_rate", "max_iters", "dataset", "arch")
    check([f"{c.config} has no {key}" for key in needed if key not in base])
    if "3" in c.stages:
        # Missing data is reported now, not after hours.
        for place in ELSEWHERE:
            if "dataset" in place:
                load_data(data_folder(place["dataset"]))
    table = Table(c.out, COLUMNS, KEY)

    def wanted() -> list[Training]:
        return [training(s) for s in Plan(table, c, base).settings()]

    complete_trainings(c, table, wanted, functools.partial(measure, c))
    if set("34") & set(c.stages) and not Plan(table, c, base).champions:
        print(
            f"stages 3 and 4 need the best heads of stage 2, and {c.out} lacks some of them: run"
            " stages 1 and 2 of all heads first (without --only)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli(main)
