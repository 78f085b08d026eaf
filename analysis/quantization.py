"""What a head loses when its prototypes are rounded to a few bits.

    python -m analysis.quantization out/a out/b --bits="[8,4,3]"

Only the prototypes are rounded. Hidden states are those of the full model, even if its embedding is
tied to the prototypes. A group of coordinates shares one scale, |largest| / (2^(bits - 1) - 1), and
each coordinate is rounded to the nearest multiple of it (symmetric absmax quantisation, Dettmers et
al. 2022, arXiv 2208.07339, section 2). An error of a prototype in any direction changes a distance.
Only an error along the state changes a dot product.

loss        nats a token with rounded prototypes
increase    loss minus the loss with full prototypes
low, high   the 95 % interval of increase, from paired differences of windows
kl          KL divergence from the full head's probabilities to the rounded head's, in nats a token
same_best   share of tokens whose likeliest prediction stays the same
"""

import copy
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import figures, tables
from analysis.compare import difference
from analysis.runs import (
    ModelAnalysisConfig,
    about,
    check_finite,
    default_out,
    find_runs,
    head_styles,
    numbered,
    predictions,
    publish,
    with_float64,
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import too_small
from harmonic import HarmonicHead
from model import Model
from text.token_files import Data
from training.distributed import check_device

ROWS = 512  # Logits of so many states are held at a time.


@dataclass
class QuantizationConfig(ModelAnalysisConfig):
    """Heads with rounded prototypes"""

    bits: list[int] = field(default_factory=lambda: [8, 6, 4, 3])
    """bits of each coordinate, 2 to 16: the head is measured with each of these"""
    group: int | None = None
    """how many coordinates share a scale, such as 32; null = all coordinates of a prototype"""
    tokens: int = 16384
    """how many tokens of the split to score, in windows spread evenly over it"""

    def problems(self) -> list[str]:
        found = super().problems()
        found += [f"bits={bits} must be from 2 to 16" for bits in self.bits if not 2 <= bits <= 16]
        return found + too_small(self, group=1, tokens=1)


def rounded(w: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Rounds each number to the nearest of 2^bits - 1 multiples of its scale: (V, C) -> (V, C).

    group: how many coordinates of a row share a scale; the last group may be smaller. None = the
        whole row.
    """
    most = 2 ** (bits - 1) - 1
    parts = []
    for part in w.split(group or w.shape[1], dim=1):
        scale = part.abs().amax(1, keepdim=True) / most
        parts.append((part / scale.clamp_min(torch.finfo(w.dtype).tiny)).round() * scale)
    return torch.cat(parts, 1)


def with_rounded_prototypes(head: HarmonicHead, bits: int, group: int | None) -> HarmonicHead:
    """A copy of a head with rounded prototypes. Its strength, bias and map are not rounded."""
    copied = copy.deepcopy(head)
    with torch.no_grad():
        copied.weight.copy_(rounded(copied.weight, bits, group))
    return copied


@torch.inference_mode()
def compare(
    model: Model, data: Data, c: QuantizationConfig
) -> list[dict[str, float | int | str | None]]:
    """The rows of a run: one for the full head, and one for each number of bits."""
    heads = {bits: with_rounded_prototypes(model.head, bits, c.group) for bits in c.bits}
    losses: dict[int | None, list[Tensor]] = {key: [] for key in (None, *heads)}
    sums = {bits: torch.zeros(2, dtype=torch.float64) for bits in heads}
    tokens = 0
    for h, y, kept in predictions(model, data, c.split, c.tokens):
        windows = torch.arange(len(kept)).repeat_interleave(kept.sum(1))
        tokens += len(y)
        found: dict[int | None, list[Tensor]] = {key: [] for key in losses}
        for state, target in zip(h.split(ROWS), y.split(ROWS), strict=True):
            full = model.head(state).double().log_softmax(-1)
            found[None].append(-full.gather(1, target[:, None])[:, 0])
            for bits, head in heads.items():
                other = head(state).double().log_softmax(-1)
                found[bits].append(-other.gather(1, target[:, None])[:, 0])
                kl = (full.exp() * (full - other)).sum()
                same = (full.argmax(-1) == other.argmax(-1)).sum()
                sums[bits] += torch.stack([kl, same.double()]).cpu()
        count = kept.sum(1).clamp_min(1)
        for key, parts in found.items():
            total = torch.zeros(len(kept), dtype=torch.float64)
            losses[key].append(total.index_add_(0, windows, torch.cat(parts).cpu()) / count)
    windowed = {key: torch.cat(parts).numpy() for key, parts in losses.items()}
    rows: list[dict] = [{"bits": "full", "tokens": tokens, "loss": windowed[None].mean()}]
    for bits in heads:
        change = difference(windowed[bits], windowed[None])
        kl, same = (sums[bits] / tokens).tolist()
        rows.append(
            {"bits": bits, "tokens": tokens, "loss": windowed[bits].mean()}
            | {"increase": change.mean, "low": change.low, "high": change.high}
            | {"kl": kl, "same_best": same}
        )
    return rows


def draw(runs: list, rows: list[dict]) -> Figure:
    """The increase of the loss by bits, with its intervals. rows: of all runs."""
    figure = figures.figure(3.4)
    axes = figure.subplots()
    for run, style in zip(runs, head_styles(runs), strict=True):
        mine = [r for r in rows if r["run"] == run.name and "increase" in r]
        mine.sort(key=lambda r: r["bits"])
        bits, increases = [r["bits"] for r in mine], np.array([r["increase"] for r in mine])
        color, line = style["color"], style["linestyle"]
        name = figures.literal(run.name)
        axes.plot(bits, increases, marker="o", ms=3, label=name, color=color, ls=line)
        axes.fill_between(
            bits, [r["low"] for r in mine], [r["high"] for r in mine], color=color, alpha=0.15
        )
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_xticks(sorted({r["bits"] for r in rows if "increase" in r}))
    axes.set_xlabel("bits of a coordinate of a prototype")
    axes.set_ylabel("increase of the loss, nats a token")
    figures.legend_below(figure, [axes])
    return figure


def main() -> None:
    (c,) = parse(sys.argv[1:], QuantizationConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    device, out = with_float64(check_device(c.device)), default_out(c, runs, "quantization")
    rows = []
    for run in numbered(runs):
        model, _ = run.load(device, c.checkpoint)
        check_finite(run, "prototypes", model.head.prototypes())
        rows += [{**about(run), **row} for row in compare(model, run.data(), c)]
    print(
        tables.text(
            rows,
            [
                *("run", "head", "link", "bits", "tokens"),
                Column("loss", form=".4f"),
                *(Column(key, form="+.4f") for key in ("increase", "low", "high")),
                Column("kl", form=".4f"),
                Column("same_best", form=".1%"),
            ],
        )
    )
    publish(rows, out, lambda: draw(runs, rows))


if __name__ == "__main__":
    cli(main)
