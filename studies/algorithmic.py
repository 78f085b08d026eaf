"""The algorithmic tasks of the harmonic-loss paper (B, arXiv 2502.01628), with every head of the
language model. They show structure, data efficiency and grokking.

    # results/algorithmic.csv gets a row for each seed; call it again to resume
    python -m studies.algorithmic
    python -m studies.algorithmic --models=decoder
    python -m studies.algorithmic --tasks=lattice --only=cosine

Training and test examples are different, also in meaning: x + y and y + x are on the same side. All
seeds of a head are one batch, and torch.func computes their trunks together. Then each seed
computes its own loss, with the kernels of the language model. These are the stages:

    sweep      Learning rate x exponent. A head without an exponent sweeps the initial scale of its
               embedding. Every head has a grid. Up to EDGES further settings follow while the best
               one is on the edge. The score is the accuracy on test examples, with other seeds.
    main       All tasks and heads, with the setting that is best on addition, 20 seeds. Seeds that
               fail are counted, not dropped.
    fraction   The accuracy for different shares of training examples.
    grokking   Addition modulo 113 from 30 % of the examples, for longer.
    decoder    Addition modulo 31 with the language model's decoder instead of the MLP: a sweep and
               runs.
    tuned      The other tasks, and addition from half of the examples, with settings that a sweep
               on the same task and share chose, also by test accuracy.
"""

import itertools
import math
import operator
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.geometry import spectrum
from base.command_line import cli, parse
from base.errors import UserError, too_small
from base.files import write_whole
from harmonic import CONTROLS, DISTANCES, HarmonicHead, distance
from model import Model, ModelConfig
from studies.runner import Job, Row, Table, complete, run_name
from studies.search import Setting, number, search

# ---- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task with a table of examples."""

    tokens: int
    """size of the vocabulary"""
    examples: Callable[[], list]
    """returns all pairs (input tokens, target token)"""
    same: Callable[[tuple], tuple] = tuple
    """maps inputs to a key; inputs with the same key mean the same, and stay on one side"""
    most: int = 10**9
    """the most examples that a seed uses"""


def unordered(x: tuple) -> tuple:
    """A key that does not depend on the order of the inputs."""
    return tuple(sorted(x))


def addition(p: int) -> list:
    """(x, y) -> x + y modulo p."""
    return [((x, y), (x + y) % p) for x, y in itertools.product(range(p), repeat=2)]


def lattice(side: int = 5) -> list:
    """(a, b, c) -> d, the fourth corner of a parallelogram: d - c = b - a, with b, c not a."""
    points = list(itertools.product(range(side), repeat=2))
    found = []
    for a, b, c in itertools.product(points, repeat=3):
        d = (b[0] + c[0] - a[0], b[1] + c[1] - a[1])
        if d in points and a not in (b, c):
            found.append((tuple(points.index(z) for z in (a, b, c)), points.index(d)))
    return found


def equivalence(count: int = 40, modulus: int = 5) -> list:
    """(x, y) -> one of two more tokens, which tells whether x = y modulo 5."""
    pairs = itertools.product(range(count), repeat=2)
    return [((x, y), count + (x % modulus == y % modulus)) for x, y in pairs]


def family(people: int = 127) -> list:
    """(person, relation) -> person, in a complete binary tree.

    The tokens after the people are the relations: parent, grandparent and sibling.
    """
    parents = [((i, people), _parent(i)) for i in range(1, people)]
    siblings = [((i, people + 2), i + 1 if i % 2 else i - 1) for i in range(1, people)]
    grandparents = [((i, people + 1), _parent(_parent(i))) for i in range(3, people)]
    return parents + siblings + grandparents


def _parent(person: int) -> int:
    return (person - 1) // 2


def permutation(n: int = 4) -> list:
    """(a, b) -> the permutation that applies b and then a, for all permutations of n things."""
    every = list(itertools.permutations(range(n)))
    found = []
    for (i, a), (j, b) in itertools.product(enumerate(every), repeat=2):
        found.append(((i, j), every.index(tuple(a[k] for k in b))))
    return found


TASKS = {
    "addition": Task(31, lambda: addition(31), unordered),
    "lattice": Task(25, lattice, lambda x: (x[0], *sorted(x[1:])), most=1000),
    "permutation": Task(24, permutation),
    "equivalence": Task(42, equivalence, unordered),
    "family": Task(130, family),
    "addition113": Task(113, lambda: addition(113), unordered),
}


def split(task: Task, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples. Returns training (N, k + 1) and test (M, k + 1) examples.

    A row has k inputs and the target. No key of `same` is on both sides.
    Raises: UserError if a side is empty.
    """
    rng = np.random.default_rng(seed)
    by_key: dict[tuple, list[tuple]] = {}
    for x, y in task.examples():
        by_key.setdefault(task.same(x), []).append((*x, y))
    groups = list(by_key.values())
    kept, seen = [], 0
    for i in rng.permutation(len(groups)):
        if seen >= task.most:
            break
        kept.append(groups[i])
        seen += len(groups[i])
    cut = round(fraction * len(kept))
    train, test = (list(itertools.chain(*part)) for part in (kept[:cut], kept[cut:]))
    if not train or not test:
        raise UserError(
            f"fraction {fraction} leaves {len(train)} training and {len(test)} test examples of"
            f" {seen}"
        )
    return np.array(train), np.array(test)


def splits(task: Task, fraction: float, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`split` for S seeds, cut to the shortest: (S, N, k + 1) and (S, M, k + 1)."""
    found = []
    for sides in zip(*(split(task, fraction, seed) for seed in seeds), strict=True):
        shortest = min(map(len, sides))
        found.append(torch.as_tensor(np.stack([side[:shortest] for side in sides])))
    train, test = found
    return train, test


# ---- models ------------------------------------------------------------------------------------


class Solver(nn.Module):
    """A model whose forward has three uses, because functional_call can call nothing but forward.

    Token ids (N, k) -> hidden states (N, C). With targets (N,): hidden states -> the head's loss.
    With logits=True: hidden states -> logits.
    """

    width: int
    std: float
    """of the initial embedding"""
    decay: float
    head: HarmonicHead

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor | None = None, logits: bool = False
    ) -> torch.Tensor:
        if logits:
            return self.head(x)
        return self.hidden(x) if targets is None else self.head.loss(x, targets)


class MLP(Solver):
    """B's MLP: embeddings of width 16, a hidden layer of 100, and 16 outputs.

    The embeddings are also the prototypes.
    """

    width = 16
    # Gives initial embeddings of norm 1.
    std = 0.25
    decay = 0.01

    def __init__(self, tokens: int, inputs: int, init_std: float, **head: Any):
        super().__init__()
        self.head = HarmonicHead(self.width, tokens, init_std=init_std, **head)
        self.first, self.last = nn.Linear(inputs * self.width, 100), nn.Linear(100, self.width)

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        return self.last(F.silu(self.first(self.head.weight[idx].flatten(1))))


class Decoder(Solver):
    """The language model's GPT: one layer, width 32, tied. The last token gives the answer."""

    width = 32
    std = 0.02
    # As in studies of grokking (Power et al. 2022).
    decay = 1.0

    def __init__(self, tokens: int, inputs: int, name: str, init_std: float, **head: Any):
        super().__init__()
        sizes: dict[str, Any] = dict(
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
    def head(self) -> HarmonicHead:  # type: ignore[override]  # nobody sets it
        # A property, because functional_call cannot handle a submodule with two names.
        return self.model.head

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        # torch.func can batch only this kernel.
        with sdpa_kernel(SDPBackend.MATH):
            return self.model.hidden(idx)[:, -1]


MODELS: dict[str, type[Solver]] = {"mlp": MLP, "decoder": Decoder}


class Stack:
    """Models that differ only in their weights and exponents, and are trained together."""

    def __init__(self, models: list[Solver]):
        self.models = models
        # The parameters of all models, each (S, ...).
        self.parameters, _ = stack_module_state(models)
        self.trunk = vmap(lambda p, x: functional_call(models[0], p, (x,)))
        weight = models[0].head.weight
        table = next(k for k, p in models[0].named_parameters() if p is weight)
        self.prototypes = self.parameters[table]

    def losses(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """A loss for each model. x: (S, N, k), y: (S, N)."""
        return self._heads(x, lambda s: {"targets": y[s]})

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of all models: (S, N, k) -> (S, N, V)."""
        return torch.stack(self._heads(x, lambda s: {"logits": True}))

    def _heads(self, x: torch.Tensor, options: Callable[[int], dict]) -> list[torch.Tensor]:
        h = self.trunk(self.parameters, x)
        found = []
        for s, model in enumerate(self.models):
            own = {name: p[s] for name, p in self.parameters.items()}
            found.append(functional_call(model, own, (h[s],), options(s)))
        return found

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """AdamW. Only matrices decay."""
        decayed: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for name, p in self.parameters.items():
            is_matrix = p.dim() > 2 and "distance_parameters" not in name
            (decayed if is_matrix else others).append(p)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.models[0].decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)

    @torch.no_grad()
    def scores(self, examples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The accuracy (S,) and mean loss (S,) on examples (S, N, k + 1), without noise."""
        x, y = examples[..., :-1], examples[..., -1]
        for model in self.models:
            model.eval()
        logits = self.logits(x)
        for model in self.models:
            model.train()
        loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(-1)
        return (logits.argmax(-1) == y).double().mean(-1), loss


@dataclass
class Curves:
    """The results of S seeds at E evaluations."""

    prototypes: torch.Tensor
    """(S, V, C), after training"""
    steps: list[int]
    train: torch.Tensor
    """accuracy (E, S)"""
    test: torch.Tensor
    loss: torch.Tensor
    """test loss (E, S)"""
    path: torch.Tensor | None
    """the first seed's prototypes over time (E, V, C)"""


def train(
    models: list[Solver],
    data: tuple[torch.Tensor, torch.Tensor],
    rate: float,
    steps: int,
    every: int,
    keep: bool = False,
) -> Curves:
    """Trains all models with full batches, each on its own examples.

    Args:
        data: training (S, N, k + 1) and test (S, M, k + 1) examples.
        every: steps between evaluations.
        keep: whether to store the prototypes of the first model at each evaluation.
    """
    stack = Stack(models)
    optimizer = stack.optimizer(rate)
    train_x, train_y = data[0][..., :-1], data[0][..., -1]
    evaluated, scores, path = [], [], []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            accuracy, loss = stack.scores(data[1])
            scores.append((stack.scores(data[0])[0], accuracy, loss))
            evaluated.append(step)
            if keep:
                path.append(stack.prototypes[0].detach().clone())
        if step < steps:
            optimizer.zero_grad()
            sum(stack.losses(train_x, train_y), torch.zeros(())).backward()
            optimizer.step()
    known, accuracy, loss = (torch.stack(values) for values in zip(*scores, strict=True))
    return Curves(
        prototypes=stack.prototypes.detach(),
        steps=evaluated,
        train=known,
        test=accuracy,
        loss=loss,
        path=torch.stack(path) if path else None,
    )


def reached(steps: list[int], accuracy: torch.Tensor, level: float) -> list[float]:
    """For each seed, the first step with an accuracy (E, S) of at least `level`, or NaN."""
    found = []
    for column in accuracy.T.tolist():
        passed = (step for step, value in zip(steps, column, strict=True) if value >= level)
        found.append(next(passed, math.nan))
    return found


# ---- the study ---------------------------------------------------------------------------------

# These heads are not in the papers.
OTHERS = ("student_t", "euclidean_normalized", "stablemax", "cosine_scaled")
HEADS = [(name, "control") for name in CONTROLS if name not in OTHERS]
HEADS += [(name, "harmonic") for name in DISTANCES if name not in ("euclidean_squared", *OTHERS)]
# The softmax twins of some heads separate the effect of HarMax from that of the geometry. The twin
# of euclidean_squared is cross-entropy with a temperature and a norm penalty. Its harmonic link is
# left out, because it is euclidean's with another exponent.
HEADS += [(name, "softmax") for name in ("euclidean", "euclidean_squared", "manhattan", "cosine")]
FEW = [
    ("cross_entropy", "control"),
    *itertools.product(("euclidean", "manhattan", "cosine"), ("harmonic", "softmax")),
]
# The grid. A multiple is a factor of the width and gives the exponent. For a head without an
# exponent it is a factor of the model's std.
RATES, MULTIPLES = (3e-3, 1e-2, 3e-2), (1 / 16, 1 / 4, 1.0)
# Steps beyond the grid, and how many of them at most.
RATE_STEP, MULTIPLE_STEP, EDGES = 10**0.5, 4, 6
COLUMNS = [
    "stage", "task", "model", "head", "link", "multiple", "exponent", "scale", "init_std",
    "learning_rate", "fraction", "seed",
    "examples", "steps", "train_accuracy", "test_accuracy", "test_loss", "train_90", "train_99",
    "test_90", "test_99", "top2",
    "seconds", "commit",
]  # fmt: skip
KEY = ("stage", "task", "model", "head", "link", "fraction")


@dataclass(frozen=True)
class Batch:
    """Runs of one job: all seeds of a head, or its sweep."""

    stage: str
    task: str
    model: str
    head: str
    link: str
    fraction: float
    steps: int
    seeds: int
    """the number of seeds"""

    def key(self) -> Row:
        return {name: str(getattr(self, name)) for name in KEY}


@dataclass
class AlgorithmicConfig:
    """The algorithmic tasks"""

    out: str = "results/algorithmic.csv"
    """the table; its rows are not computed again, even with other seeds or steps, so name another
    table for other settings"""
    runs: str = "out/algorithmic"
    """folder of the curves and embeddings, from which the pictures are drawn"""
    tasks: str = "addition lattice permutation"
    """tasks of the main stage, separated by spaces; also equivalence and family"""
    models: str = "mlp"
    """also decoder, for the stage of that name and its sweep"""
    only: str | None = None
    """only this head, such as cosine"""
    seeds: int = 20
    """seeds of the main stage"""
    steps: int = 500
    """steps of the main stage; the MLP's sweep has half as many, the decoder's sweep twice, and
    grokking and the decoder four times as many"""
    workers: int = 2
    """processes, each with one CPU thread"""

    def problems(self) -> list[str]:
        found = too_small(self, seeds=1, steps=1, workers=1)
        for name, known in (("tasks", TASKS), ("models", MODELS)):
            for word in getattr(self, name).split():
                if word not in known:
                    found.append(f"{name}: unknown {word}; choose from {', '.join(known)}")
        if self.only not in (None, *(head for head, _ in HEADS)):
            found.append(f"only={self.only} is not a head: {', '.join(dict(HEADS))}")
        return found


def batches(c: AlgorithmicConfig) -> list[Batch]:
    """All batches of the study, in order."""
    few_seeds, decoders = max(1, c.seeds // 5), [h for h in FEW if h[0] != "manhattan"]
    found = [Batch("sweep", "addition", "mlp", *h, 0.8, c.steps // 2, 2) for h in HEADS]
    found += [Batch("sweep", "addition", "decoder", *h, 0.8, 2 * c.steps, 1) for h in decoders]
    for task in c.tasks.split():
        found += [Batch("main", task, "mlp", *h, 0.8, c.steps, c.seeds) for h in HEADS]
    for h in decoders:
        found.append(Batch("decoder", "addition", "decoder", *h, 0.8, 4 * c.steps, few_seeds))
    for h, i in itertools.product(FEW, range(1, 10)):
        found.append(Batch("fraction", "addition", "mlp", *h, i / 10, c.steps, few_seeds))
    for h in FEW:
        found.append(Batch("grokking", "addition113", "mlp", *h, 0.3, 4 * c.steps, few_seeds))
    for task, h in itertools.product(c.tasks.split(), FEW):
        share = 0.5 if task == "addition" else 0.8
        found.append(Batch("sweep", task, "mlp", *h, share, c.steps // 2, 2))
        found.append(Batch("tuned", task, "mlp", *h, share, c.steps, c.seeds))
    return [b for b in found if b.model in c.models.split() and c.only in (None, b.head)]


@torch.no_grad()
def match_scale(head: HarmonicHead, h: torch.Tensor, exponent: float) -> None:
    """Sets the scale of a softmax twin so that both links have the same slope at the start.

    The slopes are equal at the median distance between the states h (N, C) and the prototypes. The
    default scale would assume layer-normalised states, which these models do not have.
    """
    distances = distance(h, head.prototypes(), head.name, **head.geometry())
    head.set_strength(exponent / distances.median().item())


def make(batch: Batch, multiple: float, seed: int) -> Solver:
    """A new model. multiple: gives the exponent, as a factor of the width; see RATES.

    A softmax twin gets the scale that matches this exponent. A control gets an init_std instead,
    with the multiple as a factor of the model's std.
    """
    task, kind = TASKS[batch.task], MODELS[batch.model]
    torch.manual_seed(seed)
    head: dict[str, Any] = {"name": batch.head, "init_std": kind.std}
    if batch.link == "control":
        head["init_std"] = kind.std * multiple
    else:
        head |= {"exponent": kind.width * multiple, "link": batch.link}
    examples = torch.tensor([x for x, _ in task.examples()])
    model = kind(task.tokens, examples.shape[1], **head)
    if batch.link == "softmax":
        match_scale(model.head, model.hidden(examples[:1000]), head["exponent"])
    return model


def rows_of(
    batch: Batch,
    rate: float,
    multiples: list[float],
    seeds: list[int],
    evaluations: int = 50,
    keep: bool = False,
) -> tuple[list[dict], Curves]:
    """Trains one run for each pair of multiple and seed. Returns their rows and curves."""
    began = time.perf_counter()
    models = [make(batch, multiple, seed) for multiple, seed in zip(multiples, seeds, strict=True)]
    data = splits(TASKS[batch.task], batch.fraction, seeds)
    every = max(1, batch.steps // evaluations)
    curves = train(models, data, rate, batch.steps, every, keep)
    seconds = (time.perf_counter() - began) / len(seeds)
    found = []
    for i, seed in enumerate(seeds):
        row = batch.key() | {
            "learning_rate": f"{rate:.6g}",
            "seed": seed,
            "steps": batch.steps,
            **strengths(batch, multiples[i], models[i]),
            "examples": data[0].shape[1],
            "train_accuracy": f"{curves.train[-1, i]:.4f}",
            "test_accuracy": f"{curves.test[-1, i]:.4f}",
            "test_loss": f"{curves.loss[-1, i]:.4f}",
            "top2": f"{spectrum(curves.prototypes[i])['top2']:.4f}",
            "seconds": f"{seconds:.2f}",
        }
        for side, accuracy in (("train", curves.train), ("test", curves.test)):
            for level in (0.9, 0.99):
                step = reached(curves.steps, accuracy[:, i : i + 1], level)[0]
                row[f"{side}_{round(100 * level)}"] = "" if math.isnan(step) else step
        found.append(row)
    return found, curves


def strengths(batch: Batch, multiple: float, model: Solver) -> dict:
    """The columns that a multiple determines."""
    kind, control = MODELS[batch.model], batch.link == "control"
    return {
        "multiple": f"{multiple:.6g}",
        "exponent": "" if control else f"{kind.width * multiple:.6g}",
        "scale": f"{model.head.strength:.6g}" if batch.link == "softmax" else "",
        "init_std": f"{kind.std * (multiple if control else 1):.6g}",
    }


def sweep(batch: Batch) -> list[dict]:
    """Trains all settings of a head. Those with the same learning rate are trained together."""
    rows = []

    def costs(settings: list[Setting]) -> list[tuple[float, float]]:
        found = []
        for rate, group in itertools.groupby(settings, key=operator.itemgetter(1)):
            pairs = list(itertools.product([m for m, _ in group], range(batch.seeds)))
            multiples, seeds = (list(values) for values in zip(*pairs, strict=True))
            new, _ = rows_of(batch, rate, multiples, seeds, evaluations=1)
            rows.extend(new)
            found += [cost(new[k : k + batch.seeds]) for k in range(0, len(new), batch.seeds)]
        return found

    grid: list[Setting] = [(m, rate) for rate, m in itertools.product(RATES, MULTIPLES)]
    search(grid, (MULTIPLE_STEP, RATE_STEP), EDGES, costs)
    return rows


def run(batch: Batch, chosen: tuple[float, float] | None, folder: str) -> list[dict]:
    """A job: a sweep, or all seeds of a head. The curves of the seeds are written to `folder`.

    chosen: (learning rate, multiple) of the seeds.
    """
    torch.set_num_threads(1)
    if batch.stage == "sweep":
        return sweep(batch)
    assert chosen is not None, "the sweep comes first"
    rate, multiple = chosen
    # The sweep used other seeds.
    seeds = [100 + i for i in range(batch.seeds)]
    multiples = [multiple] * batch.seeds
    rows, curves = rows_of(batch, rate, multiples, seeds, keep=batch.stage == "main")
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = {
        "steps": torch.as_tensor(curves.steps),
        "train": curves.train,
        "test": curves.test,
        "prototypes": curves.prototypes,
        "path": curves.path,
    }
    write_whole(curves_file(folder, batch.key()), lambda path: torch.save(kept, path))
    return rows


def curves_file(folder: str, key: Row) -> Path:
    """Where a job writes its curves."""
    return Path(folder) / f"{run_name(key)}.pt"


def cost(rows: list[dict]) -> tuple[float, float]:
    """The cost of a setting in a sweep: (minus the mean test accuracy, the mean test loss)."""
    accuracy = np.mean([float(r["test_accuracy"]) for r in rows])
    return -float(accuracy), float(np.mean([number(r["test_loss"]) for r in rows]))


def swept(rows: list[Row]) -> dict[tuple, dict]:
    """The results of sweeps: (task, share of examples, model, head, link) -> {(multiple, learning
    rate): cost}."""
    groups: dict[tuple, dict[Setting, list[Row]]] = {}
    for r in rows:
        if r["stage"] == "sweep":
            setting = float(r["multiple"]), float(r["learning_rate"])
            kind = r["task"], float(r["fraction"]), r["model"], r["head"], r["link"]
            sweep = groups.setdefault(kind, {})
            sweep.setdefault(setting, []).append(r)
    found = {}
    for key, settings in groups.items():
        found[key] = {setting: cost(mine) for setting, mine in settings.items()}
    return found


def wanted(table: Table, c: AlgorithmicConfig) -> list[Job]:
    """The jobs that can start. A head waits for its sweep with the same model."""
    sweeps = swept(table.rows)
    found = []
    for batch in batches(c):
        chosen = None
        if batch.stage != "sweep":
            kind = ("addition", 0.8)
            if batch.stage == "tuned":
                kind = (batch.task, batch.fraction)
            chosen = choice(sweeps.get((*kind, batch.model, batch.head, batch.link)))
            if chosen is None:
                continue
        found.append(Job(batch.key(), run, (batch, chosen, c.runs)))
    return found


def choice(sweep: dict | None) -> tuple[float, float] | None:
    """The best (learning rate, multiple) of a sweep; None if it is not done."""
    if not sweep:
        return None
    multiple, rate = min(sweep, key=sweep.__getitem__)
    return rate, multiple


def told(rows: list[dict]) -> str:
    """What is printed about a finished job."""
    good = sum(float(r["test_accuracy"]) >= 0.99 for r in rows)
    return f"{good} of {len(rows)} at 99 % of the test, {rows[0]['seconds']} s a run"


def main() -> None:
    (c,) = parse(sys.argv[1:], AlgorithmicConfig)
    table = Table(c.out, COLUMNS, KEY)
    complete(table, lambda: wanted(table, c), c.workers, told)


if __name__ == "__main__":
    cli(main)
