"""The algorithmic tasks of the harmonic-loss paper (B), with every head of the language model:
structure, data efficiency, grokking.

    # goes on where it stopped: results/algorithmic.csv has a row for each seed
    python -m studies.algorithmic
    python -m studies.algorithmic --models=decoder
    python -m studies.algorithmic --tasks=lattice --only=cosine

Train and test share no example, nor one that says the same (x + y and y + x). All seeds of a head
are one run: the trunk computes them in one batch (torch.func), then each seed's head takes its own
loss, with the kernel that the language model takes. The stages are
    sweep      learning rate x exponent (heads without one: the scale of the embedding at the
               start), a grid for every head, and further settings (EDGES at most) as long as the
               best lies on its edge; judged by test examples, of other seeds than the rest
    main       every task and head with the setting that wins on addition, 20 seeds; a seed that
               fails is counted, not dropped
    fraction   accuracy against the share of examples trained on
    grokking   addition modulo 113 from 30 % of the examples, long
    decoder    addition modulo 31 with the language model's own decoder in place of the MLP: its
               sweep, and its runs
"""

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.geometry import spectrum
from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from harmonic import CONTROLS, DISTANCES, HarmonicHead, distance
from model import Model, ModelConfig
from studies.table import Table, complete, number, search

# ---- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """tokens: size of the vocabulary. examples: all (input tokens, target token). same: inputs of
    one key say the same thing, so that they stay on one side of the split. most: examples drawn for
    a seed, where there are more."""

    tokens: int
    examples: Callable
    same: Callable = tuple
    most: int = 10**9


def unordered(x: tuple) -> tuple:
    return tuple(sorted(x))


def addition(p: int) -> list:
    return [((x, y), (x + y) % p) for x in range(p) for y in range(p)]


def lattice(side: int = 5) -> list:
    """(a, b, c) -> d, the fourth corner of the parallelogram: d - c = b - a; b and c are not a."""
    points = list(itertools.product(range(side), repeat=2))
    found = []
    for a, b, c in itertools.product(points, repeat=3):
        d = (b[0] + c[0] - a[0], b[1] + c[1] - a[1])
        if d in points and a not in (b, c):
            found.append((tuple(points.index(z) for z in (a, b, c)), points.index(d)))
    return found


def equivalence(count: int = 40, modulus: int = 5) -> list:
    """(x, y) -> one of two further tokens: whether x = y modulo 5."""
    return [
        ((x, y), count + (x % modulus == y % modulus)) for x in range(count) for y in range(count)
    ]


def family(people: int = 127) -> list:
    """(person, relation) -> person in a complete binary tree; relations parent, grandparent,
    sibling follow the people."""
    parent, sibling = (lambda i: (i - 1) // 2), (lambda i: i + 1 if i % 2 else i - 1)
    found = [((i, people), parent(i)) for i in range(1, people)] + [
        ((i, people + 2), sibling(i)) for i in range(1, people)
    ]
    return found + [((i, people + 1), parent(parent(i))) for i in range(3, people)]


def permutation(n: int = 4) -> list:
    """(a, b) -> a after b, of all permutations of n things."""
    every = list(itertools.permutations(range(n)))
    return [
        ((i, j), every.index(tuple(a[k] for k in b)))
        for i, a in enumerate(every)
        for j, b in enumerate(every)
    ]


TASKS = {
    "addition": Task(31, lambda: addition(31), unordered),
    "lattice": Task(25, lattice, lambda x: (x[0], *sorted(x[1:])), most=1000),
    "permutation": Task(24, permutation),
    "equivalence": Task(42, equivalence, unordered),
    "family": Task(130, family),
    "addition113": Task(113, lambda: addition(113), unordered),
}


def split(task: Task, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (training examples (N, k + 1), test examples), rows of inputs and target: no key of `same`
    is on both sides."""
    rng = np.random.default_rng(seed)
    groups = {}
    for x, y in task.examples():
        groups.setdefault(task.same(x), []).append((*x, y))
    order = rng.permutation(len(groups))
    groups, found = list(groups.values()), ([], [])
    kept, seen = [], 0
    for i in order:
        if seen >= task.most:
            break
        kept.append(groups[i])
        seen += len(groups[i])
    for i, group in enumerate(kept):
        found[i >= round(fraction * len(kept))].extend(group)
    if not all(found):
        raise UserError(
            f"fraction {fraction} leaves {len(found[0])} training and {len(found[1])} test examples"
            f" of {seen}"
        )
    return np.array(found[0]), np.array(found[1])


def splits(task: Task, fraction: float, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for several seeds, cut to the shortest: (S, N, k + 1) and (S, M, k + 1)."""
    pairs = [split(task, fraction, seed) for seed in seeds]
    return tuple(
        torch.as_tensor(np.stack([p[i][: min(len(q[i]) for q in pairs)] for p in pairs]))
        for i in (0, 1)
    )


# ---- models ------------------------------------------------------------------------------------


class Solver(nn.Module):
    """Token ids (N, k) -> hidden states (N, C); with targets (N,), hidden states -> the head's
    loss; with logits, -> logits."""

    def forward(self, x, targets=None, logits=False):
        if logits:
            return self.head(x)
        return self.hidden(x) if targets is None else self.head.loss(x, targets)


class MLP(Solver):
    """B's: the tokens' embeddings (16 each), which are the prototypes too, one hidden layer of 100,
    16 out."""

    width = 16
    std = 0.25  # of the embedding at the start: vectors of norm 1
    decay = 0.01

    def __init__(self, tokens: int, inputs: int, init_std: float, **head):
        super().__init__()
        self.head = HarmonicHead(self.width, tokens, init_std=init_std, **head)
        self.first, self.last = nn.Linear(inputs * self.width, 100), nn.Linear(100, self.width)

    def hidden(self, idx):
        return self.last(F.silu(self.first(self.head.weight[idx].flatten(1))))


class Decoder(Solver):
    """The language model's GPT, one layer, 32 wide, tied; the answer is read at the last token."""

    width = 32
    std = 0.02
    decay = 1.0  # as studies of grokking have it (Power et al. 2022)

    def __init__(self, tokens: int, inputs: int, name: str, init_std: float, **head):
        super().__init__()
        sizes = dict(
            arch="gpt",
            n_layer=1,
            n_head=4,
            n_embd=self.width,
            block_size=inputs,
            vocab_size=tokens,
            real_vocab_size=tokens,
        )
        self.model = Model(ModelConfig(**sizes, head=name, head_init_std=init_std, **head))

    @property
    def head(self):  # a submodule of two names would confuse functional_call
        return self.model.head

    def hidden(self, idx):
        with sdpa_kernel(SDPBackend.MATH):  # the one that torch.func batches
            return self.model.hidden(idx)[:, -1]


MODELS = {"mlp": MLP, "decoder": Decoder}


def train(
    models: list[Solver], data, rate: float, steps: int, every: int, keep: bool = False
) -> dict:
    """Trains all models, alike but for their weights and exponents, each on its own examples, full
    batch, AdamW.

    Args:
        data: (S, N, k + 1) training and (S, M, k + 1) test examples. every: steps between
            evaluations. keep: embeddings over time too.
    Returns: steps (E,), train and test accuracy and test loss (E, S), prototypes (S, V, C), and
        with keep `path` (E, V, C) of the first.
    """
    parameters, _ = stack_module_state(models)
    own = lambda s: {k: v[s] for k, v in parameters.items()}
    hidden = vmap(lambda p, x: functional_call(models[0], p, (x,)))
    (train_x, train_y), (test_x, test_y) = ((d[..., :-1], d[..., -1]) for d in data)
    decayed = [
        p for k, p in parameters.items() if p.dim() > 2 and "distance_parameters" not in k
    ]  # a stack of matrices
    others = [p for p in parameters.values() if not any(p is q for q in decayed)]
    groups = [
        {"params": decayed, "weight_decay": models[0].decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    table = next(k for k, p in models[0].named_parameters() if p is models[0].head.weight)
    found = {"steps": [], "train": [], "test": [], "loss": [], "path": []}

    def scores(x, y):  # without noise
        h = hidden(parameters, x)
        logits = torch.stack(
            [functional_call(m, own(s), (h[s],), {"logits": True}) for s, m in enumerate(models)]
        )
        return logits, (logits.argmax(-1) == y).double().mean(-1)

    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            for m in models:
                m.eval()
            with torch.no_grad():
                logits, accuracy = scores(test_x, test_y)
                found["loss"].append(
                    F.cross_entropy(logits.transpose(1, 2), test_y, reduction="none").mean(-1)
                )
                found["test"].append(accuracy)
                found["train"].append(scores(train_x, train_y)[1])
                found["steps"].append(step)
                if keep:
                    found["path"].append(parameters[table][0].clone())
            for m in models:
                m.train()
        if step == steps:
            break
        h = hidden(parameters, train_x)
        loss = sum(functional_call(m, own(s), (h[s], train_y[s])) for s, m in enumerate(models))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curves = {k: torch.stack(found[k]) for k in ("train", "test", "loss")}
    return curves | {
        "steps": found["steps"],
        "prototypes": parameters[table].detach(),
        "path": found["path"],
    }


def reached(steps: list[int], accuracy: torch.Tensor, level: float) -> list[float]:
    """The first of the steps at which each seed's accuracy (E, S) is at least `level`; NaN where it
    never is."""
    return [
        next((s for s, a in zip(steps, column.tolist()) if a >= level), math.nan)
        for column in accuracy.T
    ]


# ---- the study ---------------------------------------------------------------------------------

# hamming_hard has a surrogate's gradient; all the others are as in the language model. The twins of
# some tell HarMax from the geometry; euclidean_squared, whose harmonic link is euclidean's, has its
# softmax: cross-entropy with a temperature and a norm penalty.
HEADS = [(name, "control") for name in CONTROLS] + [
    (name, "harmonic") for name in DISTANCES if name != "euclidean_squared"
]
HEADS += [(name, "softmax") for name in ("euclidean", "euclidean_squared", "manhattan", "cosine")]
FEW = [
    ("cross_entropy", "control"),
    *itertools.product(("euclidean", "manhattan", "cosine"), ("harmonic", "softmax")),
]
RATES, MULTIPLES = (
    (3e-3, 1e-2, 3e-2),
    (1 / 16, 1 / 4, 1.0),
)  # of the width (exponent) or of the model's std (heads without one)
RATE_STEP, MULTIPLE_STEP, EDGES = 10**0.5, 4, 6  # beyond the grid
COLUMNS = [
    "stage", "task", "model", "head", "link", "multiple", "exponent", "scale", "init_std",
    "learning_rate", "fraction", "seed",
    "examples", "steps", "train_accuracy", "test_accuracy", "test_loss", "train_90", "train_99",
    "test_90", "test_99", "top2",
    "seconds", "commit",
]  # fmt: skip
JOB = ("stage", "task", "model", "head", "link", "fraction")


@dataclass(frozen=True)
class Job:
    """One batch of runs. steps and seeds: how many."""

    stage: str
    task: str
    model: str
    head: str
    link: str
    fraction: float
    steps: int
    seeds: int

    def key(self) -> tuple:
        return tuple(str(getattr(self, k)) for k in JOB)


class Rows(Table):
    columns, key = COLUMNS, JOB


@dataclass
class AlgorithmicConfig:
    """The algorithmic tasks"""

    out: str = "results/algorithmic.csv"
    """the table; what it has is not repeated, with however many seeds and steps: name another one
    for other settings"""
    runs: str = "out/algorithmic"
    """where curves and embeddings go, which the pictures are drawn of"""
    tasks: str = "addition lattice permutation"
    """tasks of the main stage, with spaces between: also equivalence, family"""
    models: str = "mlp"
    """also decoder: the stage of that name and its sweep"""
    only: str | None = None
    """one head alone, such as cosine"""
    seeds: int = 20
    """seeds of the main stage"""
    steps: int = 500
    """steps of the main stage; the sweep of the MLP takes half, that of the decoder twice, grokking
    and the decoder four times as many"""
    workers: int = 2
    """processes, each on one CPU thread"""

    def problems(self) -> list[str]:
        found = [
            f"{k}={getattr(self, k)} must be at least 1"
            for k in ("seeds", "steps", "workers")
            if getattr(self, k) < 1
        ]
        found += [
            f"tasks: unknown {t}; choose from {', '.join(TASKS)}"
            for t in self.tasks.split()
            if t not in TASKS
        ]
        found += [
            f"models: unknown {m}; choose from {', '.join(MODELS)}"
            for m in self.models.split()
            if m not in MODELS
        ]
        if self.only not in (None, *(head for head, _ in HEADS)):
            found.append(f"only={self.only} is not a head: {', '.join(dict(HEADS))}")
        return found


def jobs(c: AlgorithmicConfig) -> list[Job]:
    """Everything, in order; the sweep of a model comes before what it decides."""
    few_seeds, decoders = max(1, c.seeds // 5), [h for h in FEW if h[0] != "manhattan"]
    found = [Job("sweep", "addition", "mlp", *h, 0.8, c.steps // 2, 2) for h in HEADS]
    found += [Job("sweep", "addition", "decoder", *h, 0.8, 2 * c.steps, 1) for h in decoders]
    found += [
        Job("main", task, "mlp", *h, 0.8, c.steps, c.seeds)
        for task in c.tasks.split()
        for h in HEADS
    ]
    found += [
        Job("decoder", "addition", "decoder", *h, 0.8, 4 * c.steps, few_seeds) for h in decoders
    ]
    found += [
        Job("fraction", "addition", "mlp", *h, i / 10, c.steps, few_seeds)
        for h in FEW
        for i in range(1, 10)
    ]
    found += [Job("grokking", "addition113", "mlp", *h, 0.3, 4 * c.steps, few_seeds) for h in FEW]
    return [j for j in found if j.model in c.models.split() and c.only in (None, j.head)]


@torch.no_grad()
def match_scale(head: HarmonicHead, h: torch.Tensor, exponent: float):
    """Gives a softmax twin the scale whose slope is the exponent's at the median distance between
    the states h (N, C) and the prototypes that its model starts with: the default is made for
    layer-normalised states."""
    head.set_strength(
        exponent / distance(h, head.prototypes(), head.name, **head.geometry()).median().item()
    )


def make(job: Job, multiple: float, seed: int) -> Solver:
    """multiple: of the width, the exponent (a twin's scale matches it); where there is none, of the
    model's std, init_std."""
    task, kind = TASKS[job.task], MODELS[job.model]
    torch.manual_seed(seed)
    control = job.link == "control"
    head = {} if control else {"exponent": kind.width * multiple, "link": job.link}
    examples = torch.tensor([x for x, _ in task.examples()])
    model = kind(
        task.tokens,
        examples.shape[1],
        name=job.head,
        init_std=kind.std * (multiple if control else 1),
        **head,
    )
    if job.link == "softmax":
        match_scale(model.head, model.hidden(examples[:1000]), head["exponent"])
    return model


def rows_of(
    job: Job, rate: float, multiples: list[float], seeds: list[int], evaluations=50, keep=False
) -> tuple[list[dict], dict]:
    """Runs a batch: one run for each pair of a multiple and a seed -> its rows and its curves."""
    began, task, kind = time.perf_counter(), TASKS[job.task], MODELS[job.model]
    models = [make(job, multiple, seed) for multiple, seed in zip(multiples, seeds, strict=True)]
    data = splits(task, job.fraction, seeds)
    curves = train(models, data, rate, job.steps, every=max(1, job.steps // evaluations), keep=keep)
    spent = time.perf_counter() - began
    times = {
        f"{side}_{round(100 * a)}": reached(curves["steps"], curves[side], a)
        for side in ("train", "test")
        for a in (0.9, 0.99)
    }
    found = []
    for i, seed in enumerate(seeds):
        row = dict(zip(JOB, job.key(), strict=True)) | {
            "learning_rate": f"{rate:.6g}",
            "seed": seed,
            "steps": job.steps,
        }
        control = job.link == "control"
        row |= {
            "multiple": f"{multiples[i]:.6g}",
            "exponent": "" if control else f"{kind.width * multiples[i]:.6g}",
        }
        row |= {"scale": f"{models[i].head.strength:.6g}" if job.link == "softmax" else ""}
        row |= {
            "init_std": f"{kind.std * (multiples[i] if control else 1):.6g}",
            "examples": data[0].shape[1],
        }
        row |= {
            "train_accuracy": f"{curves['train'][-1, i]:.4f}",
            "test_accuracy": f"{curves['test'][-1, i]:.4f}",
        }
        row |= {
            "test_loss": f"{curves['loss'][-1, i]:.4f}",
            "top2": f"{spectrum(curves['prototypes'][i])['top2']:.4f}",
        }
        row |= {k: "" if math.isnan(v[i]) else v[i] for k, v in times.items()} | {
            "seconds": f"{spent / len(seeds):.2f}"
        }
        found.append(row)
    return found, curves


def run(job: Job, chosen: tuple[float, float] | None, folder: str) -> list[dict]:
    """A job in a process of its own: all of a sweep, or the seeds of one setting, whose curves are
    kept in `folder`."""
    torch.set_num_threads(1)
    if job.stage == "sweep":
        rows = []

        def costs(settings):
            found = []
            for rate, group in itertools.groupby(settings, key=lambda s: s[1]):  # one batch
                pairs = [(multiple, seed) for multiple, _ in group for seed in range(job.seeds)]
                rows.extend(
                    new := rows_of(job, rate, *map(list, zip(*pairs, strict=True)), evaluations=1)[
                        0
                    ]
                )
                found += [cost(new[k : k + job.seeds]) for k in range(0, len(new), job.seeds)]
            return found

        search(
            [(m, rate) for rate in RATES for m in MULTIPLES],
            (MULTIPLE_STEP, RATE_STEP),
            EDGES,
            costs,
        )
        return rows
    rate, multiple = chosen
    seeds = [100 + i for i in range(job.seeds)]  # not those of the sweep
    rows, curves = rows_of(job, rate, [multiple] * job.seeds, seeds, keep=job.stage == "main")
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = {
        k: torch.as_tensor(curves[k]) if k == "steps" else curves[k]
        for k in ("steps", "train", "test", "prototypes")
    }
    kept["path"] = torch.stack(curves["path"]) if curves["path"] else None
    write_whole(Path(folder) / ("-".join(job.key()) + ".pt"), lambda path: torch.save(kept, path))
    return rows


def cost(rows: list[dict]) -> tuple[float, float]:
    """Of a setting's rows in a sweep: (less the mean test accuracy, the mean test loss), of which
    the lowest is best."""
    return -float(np.mean([float(r["test_accuracy"]) for r in rows])), float(
        np.mean([number(r["test_loss"]) for r in rows])
    )


def scored(
    rows: list[dict], model: str, head: str, link: str
) -> dict[tuple[float, float], tuple[float, float]]:
    """(multiple, learning rate) of a sweep's settings -> their costs."""
    found = {}
    for r in rows:
        if (r["stage"], r["model"], r["head"], r["link"]) == ("sweep", model, head, link):
            found.setdefault((float(r["multiple"]), float(r["learning_rate"])), []).append(r)
    return {setting: cost(mine) for setting, mine in found.items()}


def choice(rows: list[dict], model: str, head: str, link: str) -> tuple[float, float] | None:
    """(learning rate, multiple) of the best setting of a sweep; None where it is not done."""
    found = scored(rows, model, head, link)
    return min(found, key=found.get)[::-1] if found else None


def main():
    (c,) = parse(sys.argv[1:], AlgorithmicConfig)
    table, todo = Rows(Path(c.out)), jobs(c)
    waves = [[vars(j) for j in todo if (j.stage == "sweep") == first] for first in (True, False)]
    call = lambda job: (
        run,
        Job(**job),
        choice(table.rows, job["model"], job["head"], job["link"]),
        c.runs,
    )
    good = lambda rows: sum(float(r["test_accuracy"]) >= 0.99 for r in rows)
    complete(
        table,
        waves,
        call,
        lambda rows: (
            f"{good(rows)} of {len(rows)} at 99 % of the test, {rows[0]['seconds']} s a run"
        ),
        c.workers,
    )


if __name__ == "__main__":
    cli(main)
