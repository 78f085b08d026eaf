"""Where a model's loss comes from: by position, by frequency of the token, by confidence, by
distance to the nearest prototype.

Part of `python -m analysis.perplexity --detail`. A distance head offers a confidence for nothing:
how near the nearest prototype is. The expected calibration error is the mean of |accuracy -
confidence| over BINS bins of the largest probability, weighted by their tokens (Guo et al. 2017).
"""

import math

import numpy as np
import torch

from analysis.runs import predictions
from text.token_files import Data

BINS, TOKENS, ROWS = 15, 32768, 256


@torch.inference_mode()
def examine(model, data: Data, split: str, tokens: int = TOKENS) -> dict[str, np.ndarray]:
    """About `tokens` tokens of a split, in windows side by side -> arrays of one number a token:
    nll (nats), position, target, confidence (largest probability), correct, nearest (distance to
    the nearest prototype; NaN for a control)."""
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


def calibration_error(tokens: dict[str, np.ndarray]) -> float:
    """The expected calibration error, 0 to 1; NaN of no token."""
    if not len(tokens["confidence"]):
        return math.nan
    rows = bins_of(tokens, "confidence", np.linspace(0, 1, BINS + 1))
    return sum(r["tokens"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / sum(
        r["tokens"] for r in rows
    )


def bins_of(tokens: dict[str, np.ndarray], by: str, edges: np.ndarray) -> list[dict]:
    """Means over the tokens whose `by` lies in [edges[i], edges[i + 1]); the last bin has its upper
    edge too. Empty bins are left out."""
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
    """Rows for all four questions. counts: how often each token occurs in the training text."""
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


def draw(rows: list[dict], figure):
    """Four panels: loss by position, frequency, distance; the reliability diagram."""
    figure.set_size_inches(15, 3.6)
    panels = figure.subplots(1, 4)
    titles = {
        "position": "by position in the window",
        "frequency": "by frequency in training",
        "nearest": "by distance to the nearest prototype",
    }
    runs = list(dict.fromkeys(r["run"] for r in rows))
    for axes, (by, title) in zip(panels, titles.items(), strict=False):
        for i, run in enumerate(runs):
            mine = [r for r in rows if r["run"] == run and r["by"] == by]
            x = [max(r["to"] - (by == "position"), 0.5) for r in mine]
            if by == "nearest":  # distances of different heads have nothing in common: by tenth
                x = range(1, len(mine) + 1)
            axes.plot(x, [r["nll"] for r in mine], marker=".", color=f"C{i}", label=run)
        axes.set_title(f"nats a token {title}", loc="left", fontsize=9)
        axes.set_xlabel(
            {
                "position": "token",
                "frequency": "occurrences, up to",
                "nearest": "tenth of the tokens, nearest first",
            }[by]
        )
        if by != "nearest":
            axes.set_xscale("log")
    last = panels[-1]
    last.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    for i, run in enumerate(runs):
        mine = [r for r in rows if r["run"] == run and r["by"] == "confidence"]
        last.plot(
            [r["confidence"] for r in mine],
            [r["accuracy"] for r in mine],
            marker=".",
            color=f"C{i}",
        )
    last.set_title("reliability: accuracy by confidence", loc="left", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
