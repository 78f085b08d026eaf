"""What a head changes besides the loss: calibration, detection of other text, rounded prototypes,
rare tokens and the shape of the prototypes, at the end of the runs of studies.budget.

    python prepare_openwebtext.py --source=imdb --tokenizer=bpe:4096 --out_dir=data/imdb_bpe
    python -m studies.ends  # resumes; results/ends.csv has a row for each measure of each run

Every run of at least 2 million tokens whose weights are in out/budget is measured. MEASURES lists
what is measured. Losses and calibration are of the test split. The other texts took part in no
tuning: film reviews (imdb), Wikipedia leads (wiki) and the Python code of the installed PyTorch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from analysis.confidence import auroc, calibration, encoded_windows, own_windows, score
from analysis.geometry import frequency, mean_cosine, parallelogram, rank_correlation, spectrum
from analysis.intervals import holm, mean_and_half, p_value, shown_p
from analysis.quantization import QuantizationConfig, compare
from analysis.runs import predictions
from analysis.tables import Column, interval, markdown
from base.command_line import cli, parse
from base.errors import UserError, too_small
from model import Model
from studies import budget
from studies.runner import Job, Row, Table, complete, run_name
from text.token_files import Data, data_folder, load_data
from text.tokenizers import Tokenizer
from training import checkpoint

STAGES = ("2M", "6M", "20M")
RATE_STAGE = "2M rate"  # cross_entropy with the learning rate of the distances
# Other texts, and their folders under data/. None is the code of PyTorch.
TEXTS = {"imdb": "imdb_bpe", "wiki": "wiki", "python": None}
SPLIT: Literal["val", "test"] = "test"
WINDOWS, TOKENS = 64, 16384
BITS = (8, 4, 3)
RARE = 0.1
KEY = ("stage", "name", "seed")
COLUMNS = [*KEY, "measure", "value", "commit"]
BASELINE = "cross_entropy"
# What each measure is, and how it is written.
MEASURES = {
    "ece": ("expected calibration error", ".4f"),
    "ece_scaled": ("the same after temperature scaling", ".4f"),
    "temperature": ("the temperature", ".3f"),
    "auroc_max_imdb": ("AUROC against imdb, largest probability", ".3f"),
    "auroc_energy_imdb": ("AUROC against imdb, energy", ".3f"),
    "auroc_nearest_imdb": ("AUROC against imdb, nearest prototype", ".3f"),
    "auroc_max_python": ("AUROC against Python code, largest probability", ".3f"),
    "auroc_energy_python": ("AUROC against Python code, energy", ".3f"),
    "auroc_nearest_python": ("AUROC against Python code, nearest prototype", ".3f"),
    "loss_imdb": ("loss on imdb, nats", ".4f"),
    "loss_wiki": ("loss on wiki, nats", ".4f"),
    "loss_python": ("loss on Python code, nats", ".4f"),
    "loss_frequent": ("test loss on frequent tokens, nats", ".4f"),
    "loss_rare": ("test loss on the rarest tokens, a tenth of the text, nats", ".4f"),
    "increase_8": ("loss added by prototypes of 8 bits, nats", ".5f"),
    "increase_4": ("loss added by prototypes of 4 bits, nats", ".4f"),
    "increase_3": ("loss added by prototypes of 3 bits, nats", ".4f"),
    "components_90": ("components for 90 % of the prototypes' variance", ".1f"),
    "mean_cosine": ("mean cosine of two prototypes", ".3f"),
    "radius_frequency": ("rank correlation of norm and frequency", ".3f"),
    "parallelogram": ("parallelogram loss", ".3f"),
    "shuffled": ("parallelogram loss with shuffled words", ".3f"),
}


@dataclass
class EndsConfig:
    """The ends of the budget study"""

    table: str = "results/budget.csv"
    """rows of studies.budget"""
    runs: str = "out/budget"
    """the folders of its runs"""
    out: str = "results/ends.csv"
    """the table; runs that it has are not measured again"""
    workers: int = 1
    """runs measured at the same time, each with one CPU thread"""

    def problems(self) -> list[str]:
        return too_small(self, workers=1)


def python_windows(words: Tokenizer, length: int, most: int) -> Tensor:
    """Windows from the middles of files of PyTorch, spread evenly over it: (most, length + 1)."""
    found, files = [], sorted(Path(torch.__file__).parent.rglob("*.py"))
    enough = [path for path in files if path.stat().st_size > 20 * length]
    for at in np.linspace(0, len(enough) - 1, most).astype(int):
        code = enough[at].read_text(encoding="utf-8")
        ids = words.encode(code[len(code) // 2 :])[: length + 1]
        found.append(np.array(ids))
    return torch.from_numpy(np.stack(found))


def other_windows(folder: str | None, own: Data, length: int) -> Tensor:
    """Windows of one of TEXTS, with the tokenizer of `own`: (WINDOWS, length + 1)."""
    if folder is None:
        return python_windows(own.load_tokenizer(), length, WINDOWS)
    return encoded_windows(load_data(data_folder(folder)), own, "val", length, WINDOWS)


def confidence(model: Model, data: Data) -> dict[str, float]:
    """Calibration on the test split, and detection and loss of each other text."""
    length = model.config.block_size
    own = score(model, own_windows(data, SPLIT, length, WINDOWS), keep_logits=True)
    assert own.logits is not None
    found = calibration(own.logits, own.targets)
    for name, folder in TEXTS.items():
        other = score(model, other_windows(folder, data, length))
        found[f"loss_{name}"] = -float(other.scores["loss"].mean())
        for kind, values in own.scores.items():
            found[f"auroc_{kind}_{name}"] = auroc(values, other.scores[kind])
    return found


def rare_tokens(counts: Tensor) -> Tensor:
    """The rarest tokens, which together are at most RARE of the text: counts (V,) -> (V,) bool."""
    order = counts.argsort(stable=True)
    share = counts[order].cumsum(0) / counts.sum()
    rare = torch.zeros(len(counts), dtype=torch.bool)
    rare[order[share <= RARE]] = True
    return rare


def by_frequency(model: Model, data: Data) -> dict[str, float]:
    """The test loss on rare targets (`rare_tokens` of the training text) and on all others."""
    losses, targets = [], []
    for h, y, _ in predictions(model, data, SPLIT, TOKENS):
        losses.append(model.head.loss(h, y, reduction="none"))
        targets.append(y)
    loss, rare = torch.cat(losses).double(), rare_tokens(frequency(data))[torch.cat(targets)]
    return {"loss_frequent": loss[~rare].mean().item(), "loss_rare": loss[rare].mean().item()}


def rounding(model: Model, data: Data) -> dict[str, float]:
    """What the test loss gains by prototypes with few bits."""
    c = QuantizationConfig(bits=list(BITS), tokens=TOKENS, split=SPLIT)
    rows = compare(model, data, c)[1:]
    return {f"increase_{row['bits']}": cast(float, row["increase"]) for row in rows}


def geometry(model: Model, data: Data) -> dict[str, float]:
    """The shape of the prototypes."""
    prototypes, counts = model.head.prototypes(), frequency(data)
    seen = counts > 0
    relations, shuffled, _ = parallelogram(prototypes, data.load_tokenizer())
    norms = prototypes.norm(dim=-1)[: len(counts)]
    return {
        "components_90": spectrum(prototypes)["components_90"],
        "mean_cosine": mean_cosine(prototypes),
        "radius_frequency": rank_correlation(norms[seen], counts[seen]),
        "parallelogram": relations,
        "shuffled": shuffled,
    }


@torch.no_grad()
def measure(folder: Path, dataset: str) -> list[dict]:
    """The rows of a run: one for each of MEASURES that its head has."""
    torch.set_num_threads(1)
    model, *_ = checkpoint.load_run(folder)
    data = load_data(data_folder(dataset))
    found: dict[str, float] = {}
    for part in (confidence, by_frequency, rounding, geometry):
        found |= part(model, data)
    return [{"measure": m, "value": f"{found[m]:.6g}"} for m in MEASURES if m in found]


def jobs(c: EndsConfig) -> list[Job]:
    """The runs of the budget study that are long enough and whose weights are here."""
    found = []
    for row in Table(c.table, budget.COLUMNS, budget.KEY).rows:
        folder = Path(c.runs) / run_name({key: row[key] for key in budget.KEY})
        if row["stage"] in (*STAGES, RATE_STAGE) and checkpoint.folders(folder):
            key = {name: row[name] for name in KEY}
            found.append(Job(key, measure, (folder, row["dataset"])))
    return found


def values(rows: list[Row], stage: str, name: str, measure: str) -> dict[str, float]:
    """A measure of a head at the end of a stage, by seed."""
    mine = (r for r in rows if (r["stage"], r["name"], r["measure"]) == (stage, name, measure))
    return {row["seed"]: float(row["value"]) for row in mine}


def differences(rows: list[Row], stage: str, name: str, measure: str) -> list[float]:
    """A head's measure minus that of cross_entropy, of each seed that both have."""
    mine, base = (values(rows, stage, head, measure) for head in (name, BASELINE))
    return [mine[seed] - base[seed] for seed in mine if seed in base]


def table(rows: list[Row], stage: str, heads: list[str], tested: bool, base: str = BASELINE) -> str:
    """A line for each measure: cross_entropy's mean, and the paired difference of each head.

    base: what cross_entropy is called. The other heads' values are of the seeds that it has too.
    tested: whether to show p of a t-test of the differences, with Holm's correction for all of the
        table. There is none if the difference is the same in every seed, but such a row counts
        as a test.
    """
    found = {(m, name): differences(rows, stage, name, m) for m in MEASURES for name in heads}
    p = holm(
        {
            key: p_value(pairs) if len(set(pairs)) > 1 else 1.0
            for key, pairs in found.items()
            if len(pairs) > 1
        }
    )
    common = seeds(rows, stage, BASELINE)
    lines: list[dict[str, object]] = []
    for measure, (words, form) in MEASURES.items():
        line: dict[str, object] = {"measure": words}
        for name in (BASELINE, *heads):
            mine = values(rows, stage, name, measure)
            own = [value for seed, value in mine.items() if seed in common]
            if pairs := found.get((measure, name)):
                line[name] = interval(*mean_and_half(pairs), f"+{form}")
                if tested and len(set(pairs)) > 1:
                    line[name] = f"{line[name]} (p {shown_p(p[measure, name])})"
            elif own:  # cross_entropy, or a measure that it does not have.
                line[name] = ("" if name == BASELINE else "is ") + format(np.mean(own), form)
        lines.append(line)
    others = [Column(name, f"{name} minus {base}") for name in heads]
    return markdown(lines, ["measure", Column(BASELINE, base), *others])


def seeds(rows: list[Row], stage: str, name: str) -> set[str]:
    """The seeds of a head's runs that were measured after a stage."""
    return {row["seed"] for row in rows if (row["stage"], row["name"]) == (stage, name)}


def titled(
    rows: list[Row], stage: str, heads: list[str], tested: bool, base: str = BASELINE
) -> str:
    """A table with its title."""
    common = seeds(rows, stage, BASELINE)
    count = ", ".join(f"{name} {len(seeds(rows, stage, name) & common)}" for name in heads)
    title = f"After {stage.replace('M', ' million')} tokens. Seeds: {base} {len(common)}"
    return f"{title}; in common with it: {count}.\n\n{table(rows, stage, heads, tested, base)}"


def tables(rows: list[Row]) -> str:
    """Two tables of each stage that has runs of cross_entropy: with the heads that are trained
    longest, whose differences are tested, and with all others."""
    found = []
    for stage in STAGES:
        here = [name for name in budget.ALL if seeds(rows, stage, name) and name != BASELINE]
        for tested in (True, False):
            heads = [name for name in here if (name in budget.LONG) == tested]
            if heads and seeds(rows, stage, BASELINE):
                found.append(titled(rows, stage, heads, tested))
    return "\n\n".join(found) or "No runs yet."


def rate_table(rows: list[Row]) -> str:
    """Are these differences those of the learning rate? All runs are compared with cross_entropy at
    the learning rate of the distances. Its other runs are a column of their own."""
    if not seeds(rows, RATE_STAGE, BASELINE):
        return "No runs yet."
    own, found = f"{BASELINE} at its own rate", []
    for row in rows:
        if row["stage"] == RATE_STAGE:
            found.append({**row, "stage": "2M"})
        elif row["stage"] == "2M":
            found.append({**row, "name": own} if row["name"] == BASELINE else row)
    heads = [name for name in budget.HEADS if seeds(found, "2M", name) and name != BASELINE]
    return titled(found, "2M", [own, *heads], tested=False, base=f"{BASELINE} at their rate")


def main() -> None:
    (c,) = parse(sys.argv[1:], EndsConfig)
    for name in filter(None, ("wikitext2", *TEXTS.values())):
        load_data(data_folder(name))  # What is missing is told now, not after minutes.
    if not jobs(c):
        raise UserError(f"{c.runs} has no weights of a run of {c.table}: run studies.budget first")
    found = Table(c.out, COLUMNS, KEY)
    complete(found, lambda: jobs(c), c.workers, lambda rows: f"{len(rows)} measures")
    print(tables(found.rows))
    print(f"\nAre these differences those of the learning rate?\n\n{rate_table(found.rows)}")


if __name__ == "__main__":
    cli(main)
