"""The study of heads: every distance with both links beside cross-entropy; the same model, tokens
and order, as many settings for each.

    python prepare_openwebtext.py --source=wikitext2 --tokenizer=bpe:4096 --out_dir=data/wikitext2
    python prepare_openwebtext.py --source=imdb --tokenizer=bpe:4096 --out_dir=data/imdb_bpe
    python -m studies.heads  # goes on where it stopped; results/heads.csv has a row for each run
    python -m studies.heads --config=configs/study_gpt2_124m.yaml --out=results/heads_gpt2.csv
    --workers=1 --nproc_per_node=8

Stage 1 sweeps learning rate and exponent of each family and link: 12 settings, then beyond the edge
    on which the winner lies (EDGES more settings at most), then two other scales of the prototypes
    at the start, then half a step of the exponent to either side of the best, then two more scales.
    cross_entropy and cosine_linear, which have no exponent, sweep the scale of their prototypes in
    its place, and at last half and quarter steps of the learning rate: as many settings. A further
    variant of a family takes 4 settings: its family's winner, and from there a step down in
    learning rate, half a step in exponent, and both. Stage 2 trains the winner of every family and
    link, of the controls and of the variants for longer: SEEDS seeds, variants one. They are not
    stage 1's seed, and their losses are those of the test split, which decides nothing. Stage 3
    takes the four best harmonic heads of stage 2 with their twins and cross_entropy elsewhere:
    BERT, Qwen, and GPT on IMDB. Stage 4 changes one thing at a time for the best head of each link
    and for cross_entropy (ABLATIONS), and doubles the exponent of the four best of each link, with
    every seed. Stage 5 measures what a token costs: COST_ITERS iterations of stage 2's heads, one
    after another with all threads, on a machine that does nothing else.

The softmax twin sweeps the scale that has the slope of the same exponents at the start
(`harmonic.default_scale`). Besides, euclidean_squared is swept under softmax alone (PENALTY).
"""

import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from analysis.geometry import spectrum
from analysis.gradients import stability
from base.command_line import cli, parse, read_yaml
from base.errors import UserError, check
from harmonic import IGNORE_INDEX
from model import Model
from studies.table import Table, beyond, commit, number
from text.token_files import data_folder, load_data
from training import checkpoint
from training.data import validation_windows
from training.distributed import launcher
from training.objective import batches_of
from training.telemetry import energy, read_metrics

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
VARIANTS = {  # a further variant: (its head, its flags, its family)
    "minkowski p=3": ("minkowski", {"head_p": 3.0}, "minkowski"),
    "mahalanobis_diagonal": ("mahalanobis_diagonal", {}, "mahalanobis"),
    "mahalanobis_cholesky": ("mahalanobis_cholesky", {}, "mahalanobis"),
    "hamming_gumbel": ("hamming_gumbel", {}, "hamming_soft"),
    "hamming_hard": ("hamming_hard", {}, "hamming_soft"),
    "chebyshev_smooth": ("chebyshev_smooth", {}, "chebyshev"),
    "canberra_robust": ("canberra_robust", {}, "canberra"),
    "canberra_weighted": (
        "canberra_weighted",
        {},
        "canberra",
    ),  # q = 1, which is bray_curtis_abs: no other q has a CPU kernel
    "bray_curtis_abs": ("bray_curtis_abs", {}, "bray_curtis"),
    "bray_curtis_normalized": ("bray_curtis_normalized", {}, "bray_curtis"),
}
FIRST = {(head, "") for head in (*CONTROLS, *FAMILIES, "euclidean_squared")}
LINKS = ("harmonic", "softmax")
# Squared distance under softmax is cross-entropy with a temperature and a norm penalty. Its
# harmonic link is euclidean's at twice the n.
PENALTY = ("euclidean_squared", "softmax")
RATES = (
    1 / 3,
    1,
    10 / 3,
)  # times the config's learning_rate: half a decade apart; more where a winner lies on the edge
MULTIPLES = (1 / 16, 1 / 4, 1, 4)  # of n_embd: the exponents
STDS = (0.01, 0.02, 0.05, 0.1)  # of the prototypes of a head without an exponent
OTHER_STDS, LAST_STDS = (
    (0.005, 0.1),
    (0.01, 0.05),
)  # of the others, whose grid has 0.02: far ones, and at last near ones
RATE_STEP, EXPONENT_STEP, STD_STEP = 10**0.5, 4, 2.0  # beyond an edge, and around a family's winner
EDGES = 4
FIRST_SEED, SEEDS = 1337, (1338, 1339, 1340)  # of stage 1; of the others
TEST_WINDOWS = 640  # of the test split, spread evenly
COST_ITERS = 50  # of stage 5
CHAMPIONS = 4
ELSEWHERE = ({"arch": "bert"}, {"arch": "qwen"}, {"dataset": "imdb_bpe"})
LONGER = "exponent x 2"  # stage 1's runs are short: asked of all champions of stage 2
ABLATIONS = {  # one thing changed: its flags; or a number of the winner's setting, and its factor
    "no clipping": {
        "grad_clip": 0.0
    },  # the norm that it clips at, 1, means something else to each head
    LONGER: ("exponent", 2.0),
    "untied": {"tie_weights": False},
    "no prototype decay": {"prototype_decay": 0.0},
    "learnt exponent": {"learn_exponent": True},
    "init x 4": ("init_std", 4.0),
    "init x 0.25": ("init_std", 0.25),
    "label smoothing": {"label_smoothing": 0.1},  # as A's and B's published code trains
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
    "stage",
    "dataset",
    "arch",
    "ablation",
    "head",
    "p",
    "q",
    "link",
    "exponent",
    "init_std",
    "learning_rate",
    "seed",
    "iters",
)


@dataclass
class StudyConfig:
    """The study of heads"""

    config: str = "configs/study.yaml"
    """model, data and budget of stage 1"""
    out: str = "results/heads.csv"
    """the table; runs that it has are not repeated"""
    runs: str = "out/study"
    """where the runs' folders go"""
    stages: str = "12345"
    """which stages to run"""
    long_iters: int = 600
    """iterations of stages 2 to 4"""
    workers: int = 2
    """runs side by side, each on one CPU thread"""
    nproc_per_node: int = 1
    """processes of each run, for GPUs"""
    only: str | None = None
    """one head alone, such as cosine"""

    def problems(self) -> list[str]:
        found = [
            f"{k}={getattr(self, k)} must be at least 1"
            for k in ("long_iters", "workers", "nproc_per_node")
            if getattr(self, k) < 1
        ]
        if self.long_iters % 10:
            found.append(
                f"long_iters={self.long_iters} must be a multiple of 10: that many evaluations are"
                " spread over a run"
            )
        if not self.stages or set(self.stages) - set("12345"):
            found.append(f"stages={self.stages} is not made of 1, 2, 3, 4 and 5")
        names = sorted(
            {*FAMILIES, *CONTROLS, PENALTY[0], *(head for head, *_ in VARIANTS.values())}
        )
        if self.only not in (None, *names):
            found.append(f"only={self.only} is not a head of the study: {', '.join(names)}")
        return found


def setting(
    base: dict, head: str, link: str, rate: float, exponent=None, std=0.02, flags=None
) -> dict:
    """One run of stage 1: what tells it apart, as the texts of the table."""
    text = lambda x: "" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x)
    p, q = ((flags or {}).get(f"head_{k}") for k in "pq")
    values = (
        1,
        base["dataset"],
        base["arch"],
        None,
        head,
        p,
        q,
        link,
        exponent,
        float(std),
        float(rate),
        FIRST_SEED,
        base["max_iters"],
    )
    return dict(zip(KEY, map(text, values), strict=True))


class Rows(Table):
    columns, key = COLUMNS, KEY


def loss(row: dict) -> float:
    """A row's validation loss; what diverged is last."""
    return number(row["val_loss"])


def best(rows: list[dict]) -> dict:
    return min(rows, key=loss)


class Sweep:
    """Stage 1 of one head and link: which settings are wanted, given what earlier ones gave.

    Args:
        base: the study's configuration, of which n_embd and learning_rate count. around: a
            variant's family's winner.
    """

    def __init__(
        self,
        table: Rows,
        head: str,
        link: str,
        base: dict,
        flags: dict | None = None,
        around: dict | None = None,
    ):
        self.table, self.head, self.link, self.base, self.flags, self.around = (
            table,
            head,
            link,
            base,
            flags or {},
            around,
        )

    def make(self, rate, second, std=None) -> dict:
        """second: the exponent, or a control's init_std."""
        if self.link == "control":
            return setting(self.base, self.head, self.link, rate, None, second, flags=self.flags)
        return setting(
            self.base,
            self.head,
            self.link,
            rate,
            float(second),
            0.02 if std is None else std,
            flags=self.flags,
        )

    def second(self, row: dict) -> float:
        return float(row["init_std" if self.link == "control" else "exponent"])

    def done(self, wanted: list[dict]) -> list[dict]:
        return [r for w in wanted if (r := self.table.find(w))]

    def top(self, wanted: list[dict]) -> dict | None:
        """The best of them, once all are done."""
        found = self.done(wanted)
        return best(found) if len(found) == len(wanted) else None

    def settings(self) -> list[dict]:
        """All settings that are known to be wanted by now, done or not."""
        if self.around:  # a variant
            rate, n, std = (
                float(self.around[k]) for k in ("learning_rate", "exponent", "init_std")
            )
            return [self.make(rate * a, n * b, std) for a in (1, RATE_STEP**-1) for b in (1, 0.5)]
        seconds = STDS if self.link == "control" else [x * self.base["n_embd"] for x in MULTIPLES]
        wanted = [
            self.make(rate * float(self.base["learning_rate"]), second)
            for rate, second in itertools.product(RATES, seconds)
        ]
        half = (STD_STEP if self.link == "control" else EXPONENT_STEP) ** 0.5
        for _ in range(EDGES):
            top = self.top(wanted)
            if top is None:
                return wanted
            place = lambda row: (self.second(row), float(row["learning_rate"]))
            further = beyond(
                place(top), [place(r) for r in self.done(wanted)], (half**2, RATE_STEP)
            )
            if further is None:
                break
            wanted.append(self.make(*further[::-1]))
        if self.link != "control" and (top := self.top(wanted)):
            wanted += [
                self.make(float(top["learning_rate"]), self.second(top), std) for std in OTHER_STDS
            ]
        if top := self.top(wanted):  # half a step to either side
            rate, second, std = (
                float(top["learning_rate"]),
                self.second(top),
                float(top["init_std"]),
            )
            wanted += [self.make(rate, second * x, std) for x in (half, 1 / half)]
        if self.link != "control" and (top := self.top(wanted)):
            wanted += [
                self.make(float(top["learning_rate"]), self.second(top), std) for std in LAST_STDS
            ]
        for step in (0.5, 0.25) if self.link == "control" else ():
            if top := self.top(wanted):
                wanted += [
                    self.make(float(top["learning_rate"]) * RATE_STEP**x, self.second(top))
                    for x in (step, -step)
                ]
        return wanted

    def winner(self) -> dict | None:
        """The best row, once all are done."""
        return self.top(self.settings())


def sweeps(table: Rows, base: dict) -> list[Sweep]:
    """All of stage 1 that can begin: variants wait for their family's winner."""
    families = {(head, link): Sweep(table, head, link, base) for head in FAMILIES for link in LINKS}
    found = [Sweep(table, head, "control", base) for head in CONTROLS]
    found += [Sweep(table, *PENALTY, base), *families.values()]
    for (head, flags, family), link in itertools.product(VARIANTS.values(), LINKS):
        if winner := families[family, link].winner():
            found.append(Sweep(table, head, link, base, flags, winner))
    return found


def wanted(table: Rows, c: StudyConfig, base: dict) -> list[dict]:
    """Every setting that is known to be wanted by now, done or not, in order: stages 1 and 2 of the
    families, then of further variants, stages 3 and 4, the variants' softmax twins, and stage 5."""

    def turn(s: dict) -> tuple:
        variant = (s["head"], s["p"]) not in FIRST
        return s["stage"] == "5", variant and s["link"] == "softmax", max(s["stage"], "2"), variant

    return sorted(plan(table, c, base), key=turn)


def plan(table: Rows, c: StudyConfig, base: dict) -> list[dict]:
    every = [s for s in sweeps(table, base) if c.only in (None, s.head)]
    found = [x for s in every for x in s.settings()] if "1" in c.stages else []
    winners = {
        (s.head, *s.flags.values(), s.link): (s, w)
        for s in every
        if (w := s.winner()) and math.isfinite(loss(w))
    }
    if "2" in c.stages:
        for seed in SEEDS:
            found += [
                again(w, c, stage=2, seed=seed)
                for s, w in winners.values()
                if not s.around or seed == SEEDS[0]
            ]
    if "5" in c.stages:
        found += [again(w, c, stage=5, iters=COST_ITERS) for _, w in winners.values()]
    if not all(
        key in winners
        for key in [("cross_entropy", "control"), *itertools.product(FAMILIES, LINKS)]
    ):
        return found
    best, best_twins = (
        champions(table, c, [winners[head, link][1] for head in FAMILIES]) for link in LINKS
    )
    if not best or not best_twins:
        return found
    baseline = winners["cross_entropy", "control"][1]
    if "3" in c.stages:
        for place in ELSEWHERE:
            for w in [baseline, *best]:
                found += [
                    again(winners[w["head"], link][1], c, stage=3, **place)
                    for link in (LINKS if w is not baseline else ["control"])
                ]
    if "4" in c.stages:
        ablated = [best[0], best_twins[0], baseline]
        for (name, change), w in itertools.product(
            ABLATIONS.items(), [*best, *best_twins, baseline]
        ):
            if w not in ablated and name != LONGER or w is baseline and "exponent" in name:
                continue
            changed = (
                {}
                if isinstance(change, dict)
                else {change[0]: f"{float(w[change[0]]) * change[1]:.6g}"}
            )
            seeds = SEEDS if name == LONGER else SEEDS[:1]
            found += [again(w, c, stage=4, ablation=name, seed=seed, **changed) for seed in seeds]
    return found


def again(row: dict, c: StudyConfig, **changes) -> dict:
    """The setting of a row for a long run, changed."""
    changes = {"seed": SEEDS[0], "iters": c.long_iters} | changes
    return {**{k: row[k] for k in KEY}, **{k: str(v) for k, v in changes.items()}}


def champions(table: Rows, c: StudyConfig, winners: list[dict]) -> list[dict]:
    """The best of these winners of stage 1 by their mean loss in stage 2; none as long as a run of
    theirs is missing."""
    runs = {
        i: [table.find(again(w, c, stage=2, seed=seed)) for seed in SEEDS]
        for i, w in enumerate(winners)
    }
    if not runs or None in itertools.chain(*runs.values()):
        return []
    return [winners[i] for i in sorted(runs, key=lambda i: sum(map(loss, runs[i])))[:CHAMPIONS]]


def folder(c: StudyConfig, s: dict) -> Path:
    return Path(c.runs) / "-".join(v for v in s.values() if v).replace(" ", "_")


def log(c: StudyConfig, s: dict) -> Path:
    """What the run of a setting prints."""
    return Path(f"{folder(c, s)}.log")


def side_by_side(c: StudyConfig, s: dict) -> int:
    """How many runs share the machine."""
    return 1 if s["stage"] == "5" else c.workers


def begin(c: StudyConfig, s: dict) -> subprocess.Popen:
    """Starts the run of a setting."""
    flags = {
        "dataset": s["dataset"],
        "arch": s["arch"],
        "head": s["head"],
        "learning_rate": s["learning_rate"],
        "min_lr": float(s["learning_rate"]) / 10,
        "seed": s["seed"],
    }
    flags |= {"head_init_std": s["init_std"], "out_dir": folder(c, s), "overwrite": True}
    flags |= {f"head_{k}": s[k] for k in "pq" if s[k]}
    flags |= {"link": s["link"], "exponent": s["exponent"]} if s["link"] != "control" else {}
    if isinstance(change := ABLATIONS.get(s["ablation"]), dict):
        flags |= {
            "learn_scale" if s["link"] == "softmax" and key == "learn_exponent" else key: value
            for key, value in change.items()
        }
    if s["stage"] != "1":
        tenth = int(s["iters"]) // 10
        flags |= {
            "max_iters": s["iters"],
            "warmup_iters": tenth,
            "eval_interval": tenth,
            "emissions": True,
        }
    if s["stage"] == "5":
        flags |= {"eval_interval": s["iters"], "log_interval": 10}
    command = [
        sys.executable,
        *(launcher(c.nproc_per_node) if c.nproc_per_node > 1 else []),
        "train.py",
        c.config,
    ]
    folder(c, s).mkdir(parents=True, exist_ok=True)
    environment = (
        {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        if side_by_side(c, s) > 1
        else None
    )
    with open(log(c, s), "w") as file:
        return subprocess.Popen(
            [*command, *(f"--{k}={v}" for k, v in flags.items())],
            stdout=file,
            stderr=file,
            env=environment,
        )


@torch.no_grad()
def test_loss(model: Model, folder: Path) -> float:
    """Nats a token on TEST_WINDOWS windows of the data's test split; NaN where it has none."""
    data, m, device = (
        load_data(folder),
        model.config,
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    if "test" not in data.splits:
        return math.nan
    windows = validation_windows(data.splits["test"].tokens, m.block_size, TEST_WINDOWS)
    model, total, count = model.to(device), 0.0, 0
    for x, y in batches_of(data, m).validation(windows, 16, "test"):
        total, count = (
            total + model(x.to(device), y.to(device), reduction="sum")[1].item(),
            count + (y != IGNORE_INDEX).sum().item(),
        )
    return total / count


@torch.no_grad()
def result(c: StudyConfig, s: dict, status: int, seconds: float, sha: str) -> dict:
    """The row of a run that has ended; one that stopped with status 3, at a loss that is not
    finite, has no losses."""
    run, settings = folder(c, s), read_yaml(c.config)
    row = {**s, "seconds": f"{seconds:.1f}", "commit": sha}
    if status == 3:
        return row
    if status:
        raise UserError(f"{run} ended with status {status}:\n{log(c, s).read_text()[-2000:]}")
    metrics = read_metrics(run)
    losses = [m for m in metrics if "val_loss" in m]
    model, *_ = checkpoint.load_run(run)
    steady = stability(metrics, settings.get("grad_clip", 1.0))
    shape = spectrum(model.head.prototypes())
    speed = statistics.median(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)
    used = energy(run)
    row |= {
        "scale": "" if s["link"] != "softmax" else f"{float(model.head.strength):.6g}",
        "val_loss": f"{losses[-1]['val_loss']:.6f}",
        "test_loss": ""
        if s["stage"] in "15"
        else f"{test_loss(model, data_folder(s['dataset'])):.6f}",
        "bits_per_byte": f"{losses[-1].get('bits_per_byte', math.nan):.6f}",
        "val_losses": " ".join(
            f"{m['val_loss']:.4f}" for m in losses
        ),  # equally far apart, from before the first iteration
        "grad_norm_mean": f"{steady['mean']:.4g}",
        "grad_norm_cv": f"{steady['cv']:.4g}",
        "grad_spikes": f"{steady['spike_rate']:.4g}",
        "grad_clipped": f"{steady['clip_rate']:.4g}",
        "prototype_radius": f"{model.head.prototypes().norm(dim=-1).mean().item():.4g}",
        "pca_top2": f"{shape['top2']:.4g}",
        "pca_components_90": shape["components_90"],
        "effective_rank": f"{shape['effective_rank']:.4g}",
        "tokens_per_s": f"{speed:.5g}",
    }
    if used:  # each run is charged for the whole machine
        kwh = used["energy_consumed"] / side_by_side(c, s)
        row |= {
            "kwh": f"{kwh:.5g}",
            "joules_per_token": f"{3.6e6 * kwh / used['duration'] / speed:.5g}",
        }
    return row


def main():
    (c,) = parse(sys.argv[1:], StudyConfig)
    base = read_yaml(c.config)
    check(
        [
            f"{c.config} has no {key}"
            for key in ("n_embd", "learning_rate", "max_iters", "dataset", "arch")
            if key not in base
        ]
    )
    for place in ELSEWHERE if "3" in c.stages else ():  # told now, not after hours
        if "dataset" in place:
            load_data(data_folder(place["dataset"]))
    if c.workers > 1:
        torch.set_num_threads(1)  # the test loss is computed here, beside a run
    table = Rows(Path(c.out))
    sha = commit()
    running: list[tuple[dict, subprocess.Popen, float]] = []
    bar = tqdm(desc="runs", unit=" runs", disable=None)
    try:
        while True:
            known = wanted(table, c, base)
            under_way = [s for s, *_ in running]
            todo = [s for s in known if not table.find(s) and s not in under_way]
            bar.total, bar.n = len(known), len(known) - len(todo) - len(running)
            bar.refresh()
            while todo and len(running) < min(side_by_side(c, s) for s in [todo[0], *under_way]):
                running.append((todo[0], begin(c, todo[0]), time.monotonic()))
                under_way.append(todo.pop(0))
            if not running:
                break
            while all(process.poll() is None for _, process, _ in running):
                time.sleep(0.5)
            for item in [x for x in running if x[1].poll() is not None]:
                running.remove(item)
                s, process, began = item
                row = result(c, s, process.returncode, time.monotonic() - began, sha)
                table.add(row)
                tqdm.write(
                    f"{' '.join(v for v in s.values() if v)}: {row.get('val_loss', 'not finite')},"
                    f" {row['seconds']} s"
                )
    finally:
        for _, process, _ in running:
            process.terminate()  # torchrun passes it on to the processes that it started
        for _, process, _ in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        bar.close()


if __name__ == "__main__":
    cli(main)
