"""Which tokens a model's loss comes from: by their position, their frequency, the model's
confidence, and the distance to the nearest prototype.

`python -m analysis.perplexity --detail` uses this. In a distance head, the distance to the nearest
prototype is a measure of confidence that needs no extra computation. The expected calibration error
puts tokens into BINS bins of the largest probability. It is the mean of |accuracy - confidence|
over the bins, weighted by their numbers of tokens (Guo et al. 2017).
"""

import math

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis import figures
from analysis.runs import predictions
from model import Model
from text.token_files import Data

BINS, TOKENS, ROWS = 15, 32768, 256


@torch.inference_mode()
def examine(model: Model, data: Data, split: str, tokens: int = TOKENS) -> dict[str, np.ndarray]:
    """Measures about `tokens` tokens of a split, in windows side by side.

    Returns: arrays (N,) with a number for each token. nll: its loss in nats. position: in its
        window. target: its id. confidence: the largest probability. correct: 1 if that is the
        target, else 0. nearest: the distance to the nearest prototype, NaN for a control.
    """
    head, found = model.head, []
    for h, y, kept in predictions(model, data, split, tokens):
        where = torch.arange(kept.shape[1]).expand(len(kept), -1)[kept]
        for state, target, position in zip(
            h.split(ROWS), y.cpu().split(ROWS), where.split(ROWS), strict=True
        ):
            logits = head(state)
            log_p = logits.log_softmax(-1).cpu()
            best, choice = log_p.max(-1)
            if head.is_control:
                nearest = torch.full((len(state),), math.nan)
            else:
                s = float(head.strength)
                nearest = logits.amax(-1).cpu() / -s
                nearest = nearest.exp() if head.is_harmonic else nearest
            columns = (
                -log_p.gather(1, target[:, None])[:, 0],
                position,
                target,
                best.exp(),
                choice == target,
                nearest,
            )
            found.append([column.double() for column in columns])
    names = ("nll", "position", "target", "confidence", "correct", "nearest")
    return {
        name: torch.cat(parts).numpy()
        for name, parts in zip(names, zip(*found, strict=True), strict=True)
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The expected calibration error of N tokens, from 0 to 1. NaN if there are none.

    confidence: (N,), the largest probability. correct: (N,), 1 if it was right, else 0.
    """
    if not len(confidence):
        return math.nan
    place = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    gaps = np.bincount(place, weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def bins_of(tokens: dict[str, np.ndarray], by: str, edges: np.ndarray) -> list[dict]:
    """Means over the tokens of each bin. Empty bins are left out.

    A bin has the tokens whose value of `by` lies in [edges[i], edges[i + 1]). The last bin includes
    its upper edge.
    tokens: from `examine`. by: one of its keys. Returns: a row for each bin.
    """
    place = np.clip(np.searchsorted(edges, tokens[by], "right") - 1, 0, len(edges) - 2)
    rows = []
    for i in range(len(edges) - 1):
        here = place == i
        if here.any():
            means = {
                key: float(tokens[key][here].mean()) for key in ("nll", "confidence", "correct")
            }
            row = {
                "by": by,
                "from": float(edges[i]),
                "to": float(edges[i + 1]),
                "tokens": int(here.sum()),
            }
            rows.append(
                {
                    **row,
                    "nll": means["nll"],
                    "confidence": means["confidence"],
                    "accuracy": means["correct"],
                }
            )
    return rows


def detail(tokens: dict[str, np.ndarray], counts: np.ndarray, block_size: int) -> list[dict]:
    """Rows of `bins_of` by position, frequency, confidence and nearest distance.

    tokens: from `examine`. counts (V,): how often each token occurs in the training text.
    """
    tokens = {**tokens, "frequency": counts[tokens["target"].astype(int)].astype(float)}
    powers = 2 ** np.arange(math.ceil(math.log2(block_size)) + 1)
    rows = bins_of(
        tokens, "position", np.unique([0, *powers[powers < block_size], block_size]).astype(float)
    )
    rows += bins_of(
        tokens,
        "frequency",
        np.array([0, *10.0 ** np.arange(0, math.ceil(math.log10(max(counts.max(), 1))) + 1)]),
    )
    rows += bins_of(tokens, "confidence", np.linspace(0, 1, BINS + 1))
    if len(tokens["nearest"]) and np.isfinite(tokens["nearest"]).all():
        rows += bins_of(
            tokens, "nearest", np.unique(np.quantile(tokens["nearest"], np.linspace(0, 1, 11)))
        )
    return rows


def draw(rows: list[dict]) -> Figure:
    """Four panels: the loss by position, frequency and distance, and a reliability diagram."""
    figure = figures.figure(5.8)
    panels = figure.subplots(2, 2)
    labels = {
        "position": ("loss, nats a token", "position in the window, tokens"),
        "frequency": ("loss, nats a token", "occurrences in training (first 4 M tokens), up to"),
        "nearest": (
            "loss, nats a token",
            "distance to the nearest prototype, tenths of the tokens",
        ),
        "confidence": ("accuracy (dotted: calibrated)", "confidence"),
    }
    heads = {row["run"]: (row["head"], row["link"]) for row in rows}
    styles = dict(zip(heads, figures.head_styles(list(heads.values())), strict=True))
    for axes, (by, (measure, label)) in zip(panels.flat, labels.items(), strict=True):
        for run, style in styles.items():
            mine = [row for row in rows if row["run"] == run and row["by"] == by]
            axes.plot(*_curve(by, mine), marker=".", label=figures.literal(run), **style)
        axes.set_ylabel(measure)
        axes.set_xlabel(label)
    panels[0, 0].set_xscale("log")
    panels[0, 1].set_xscale("log")
    panels[1, 1].plot([0, 1], [0, 1], color=figures.GREY, linewidth=0.8, linestyle=":")
    figures.legend_below(figure, panels.flat)
    return figure


def _curve(by: str, rows: list[dict]) -> tuple[list, list]:
    """The x and y of a panel's curve, from the bins of one run."""
    if by == "confidence":
        return [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
    losses = [row["nll"] for row in rows]
    if by == "nearest":
        # Distances of different heads have different units, so x is the tenth of the tokens.
        return list(range(1, len(rows) + 1)), losses
    # x is the last position, or number of occurrences, in the bin. A logarithmic axis cannot show
    # 0, so that is 0.5.
    return [max(row["to"] - 1, 0.5) for row in rows], losses
