"""The shape of what a model has learnt: its prototypes, input embedding and last hidden states.
Each of them is compared with what chance gives.

    python -m analysis.geometry out/a out/b --words="king city"

top2, top5            share of the variance in the first 2 and 5 principal components
for 90 %              number of principal components that hold 90 % of the variance
effective_rank        exp(entropy) of the singular values, which are divided by their sum
participation         participation ratio of the variances v: (sum v)^2 / sum v^2
mean_cosine           mean cosine of two rows: 0 if directions are spread evenly
radius                mean norm of a row
radius_frequency      rank correlation of a row's norm with the frequency of its token
parallelogram         loss of word relations such as man : woman = king : queen, 0 if they are exact
(shuffled)            the same loss with the second words of each relation shuffled

Each row is followed by a row named "chance". It has the same norms in random directions, and in
random order for radius_frequency. With several runs, a second table has the linear CKA of their
hidden states on the same text, layer by layer. Its "chance" has the states of one run in another
order. `--words` prints the nearest prototypes of words.
"""

import itertools
import math
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.stats import spearmanr

from analysis import figures, tables
from analysis.relations import RELATIONS, pairs
from analysis.runs import (
    ModelAnalysisConfig,
    Run,
    about,
    caution,
    check_finite,
    default_out,
    find_runs,
    note,
    numbered,
    publish,
    unequal_settings,
    unequal_training,
    windows,
    write_table,
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError
from harmonic import distance
from model import Model
from text.token_files import Data
from text.tokenizers import Tokenizer
from training.distributed import check_device
from training.objective import NEXT_TOKEN, Batches

# So many hidden states are measured.
STATES = 4096


@dataclass
class GeometryConfig(ModelAnalysisConfig):
    """Geometry"""

    words: str | None = None
    """words, separated by spaces or commas, whose nearest prototypes to print. A word of several
    tokens is shown by the last one, in brackets"""


def principal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The principal components of rows x (M, C), in float64.

    Returns: the centred rows (M, C), the variances of the components (C,), largest first, and their
        directions as columns (C, C).
    """
    x = x.detach().cpu().double()
    if not x.isfinite().all():
        raise UserError("the weights are not finite, because training has diverged")
    x = x - x.mean(0)
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    return x, variance.flip(0).clamp_min(0), directions.flip(1)


def spectrum(x: torch.Tensor) -> dict:
    """Measures of the principal components of rows x (M, C).

    Returns: top2, top5, components_90, effective_rank (Roy and Vetterli 2007) and
        participation_ratio, as at the top of this file. NaN if x is not finite.
    """
    if not x.isfinite().all():
        return dict.fromkeys(
            ("top2", "top5", "components_90", "effective_rank", "participation_ratio"), math.nan
        )
    _, variance, _ = principal(x)
    share = variance / variance.sum()
    singular = variance.sqrt() / variance.sqrt().sum()
    return {
        "top2": share[:2].sum().item(),
        "top5": share[:5].sum().item(),
        "components_90": int((share.cumsum(0) < 0.9).sum()) + 1,
        "effective_rank": torch.special.entr(singular).sum().exp().item(),
        "participation_ratio": (1 / share.square().sum()).item(),
    }


def mean_cosine(x: torch.Tensor) -> float:
    """The mean cosine of two different rows of x (M, C) (Ethayarajh 2019).

    It is 0 if directions are spread evenly, and 1 if all are the same.
    """
    unit = torch.nn.functional.normalize(x.detach().cpu().double(), dim=-1)
    return ((unit.sum(0).square().sum() - len(unit)) / (len(unit) * (len(unit) - 1))).item()


def matched_null(x: torch.Tensor) -> torch.Tensor:
    """Rows with the same norms as x (M, C), in random directions."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(noise, dim=-1) * x.detach().cpu().norm(
        dim=-1, keepdim=True
    )


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of a (N,) and b (N,)."""
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def word_tokens(tokenizer: Tokenizer, word: str) -> list[int]:
    """The tokens of a word that follows a space; none if it has a character that is no token."""
    try:
        return tokenizer.encode(f" {word}")
    except UserError:
        return []


def token_pairs(tokenizer: Tokenizer, relation: str) -> list[tuple[int, int]]:
    """The pairs of a relation as tokens. A word of several tokens is the last one.

    A pair is left out if both words have one token, if an earlier pair has one of its tokens in the
    same place, such as "est" for "largest" and "smallest", or if a word has no token.
    """
    kept: list[tuple[int, int]] = []
    for pair in pairs(relation):
        ids = [word_tokens(tokenizer, word) for word in pair]
        if not all(ids):
            continue
        first, second = (tokens[-1] for tokens in ids)
        if first != second and all(first != a and second != b for a, b in kept):
            kept.append((first, second))
    return kept


def parallelogram(x: torch.Tensor, tokenizer: Tokenizer) -> tuple[float, float, dict]:
    """The parallelogram loss of prototypes x (V, C), as in 2502.01628.

    It is |E_i + E_n - E_j - E_m| / sigma on the first 2 principal components, where sigma is the
    root of their variance. This is averaged over all pairs of pairs of a relation, and then over
    relations.

    Returns: the loss; the loss with the second words of each relation shuffled; the loss of each
        relation. The first two are NaN if no relation has two pairs.
    """
    rows, variance, directions = principal(x)
    plane = rows @ directions[:, :2] / variance[:2].sum().sqrt()
    found, null, rng = {}, [], random.Random(0)
    for name in RELATIONS:
        if len(kept := token_pairs(tokenizer, name)) < 2:
            continue
        first, second = (plane[list(tokens)] for tokens in zip(*kept, strict=True))
        both = torch.tensor(list(itertools.combinations(range(len(first)), 2)))

        def mean(offset: torch.Tensor, both: torch.Tensor = both) -> float:
            return (offset[both[:, 0]] - offset[both[:, 1]]).norm(dim=-1).mean().item()

        found[name] = mean(second - first)
        for _ in range(20):
            null.append(mean(second[rng.sample(range(len(second)), len(second))] - first))
    if not found:
        return math.nan, math.nan, found
    return sum(found.values()) / len(found), sum(null) / len(null), found


def linear_cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Linear centred kernel alignment of states a (N, C) and b (N, C') of the same tokens.

    It is 1 if one is a rotation and scaling of the other (Kornblith et al. 2019).
    """
    a, b = (x.cpu().double() - x.cpu().double().mean(0) for x in (a, b))
    return ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())).item()


@torch.inference_mode()
def layers(model: Model, data: Data, split: str) -> list[torch.Tensor]:
    """Hidden states of a split's text: a list of (N, C), with N about STATES.

    There is one entry for the output of each block, and a last one for what the head sees.
    """
    c = model.config
    seen: list[list[torch.Tensor]] = []  # The states of each batch.
    starts = windows(data, split, c.block_size, STATES // c.block_size)
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen[-1].append(out))
        for block in model.blocks
    ]
    # A BERT reads the text without masks here.
    for x, _ in Batches(data, NEXT_TOKEN, c.block_size).validation(starts, 16, split):
        seen.append([])
        seen[-1].append(model.hidden(x.to(model.tokens.weight.device)))
    for hook in hooks:
        hook.remove()
    return [
        torch.cat([part[i].flatten(0, 1) for part in seen]).cpu()
        for i in range(len(model.blocks) + 1)
    ]


def frequency(data: Data) -> torch.Tensor:
    """How often each token occurs in the first 4 M tokens of the training split: (vocab_size,)."""
    split = data.splits["train"]
    return torch.bincount(
        torch.from_numpy(split.read(0, min(split.tokens, 2**22))), minlength=data.vocab_size
    )[: data.vocab_size]


def measure(run: Run, model: Model, data: Data, states: torch.Tensor) -> list[dict]:
    """The rows of a run: prototypes, input embedding (if not tied) and hidden states.

    Each is followed by its row of chance. states: (N, C), those that the head sees.
    Raises: UserError if one of them is not finite.
    """
    tokenizer, counts, rows = data.load_tokenizer(), frequency(data), []
    real = model.head.prototypes().detach().cpu()
    what = {"prototypes": real}
    if not model.config.tie_weights:
        what["input embedding"] = model.tokens.weight.detach().cpu()[: len(real)]
    what["hidden states"] = states
    often = counts > 0
    order = torch.randperm(int(often.sum()), generator=torch.Generator().manual_seed(0))
    for name, x in what.items():
        check_finite(run, name, x)
        for chance in (False, True):
            y = matched_null(x) if chance else x
            row = {
                **about(run),
                "what": f"{name}, chance" if chance else name,
                **spectrum(y),
                "mean_cosine": mean_cosine(y),
            }
            row |= {
                "radius": y.norm(dim=-1).mean().item(),
                "radius_frequency": None,
                "parallelogram": None,
                "shuffled": None,
            }
            if name != "hidden states":
                norms = y.norm(dim=-1)[: len(counts)][often]
                row["radius_frequency"] = rank_correlation(
                    norms[order] if chance else norms, counts[often]
                )
                row["parallelogram"], row["shuffled"], _ = parallelogram(y, tokenizer)
            rows.append(row)
    return rows


def similarity(runs: list[Run], states: list[list[torch.Tensor]]) -> list[dict]:
    """Rows with the linear CKA of each two runs, layer by layer, and its value by chance.

    If two runs have different numbers of layers, only what their heads see is compared.
    states: of each run, from `layers`.
    """
    rows = []
    for (a, x), (b, y) in itertools.combinations(zip(runs, states, strict=True), 2):
        order = torch.randperm(len(x[0]), generator=torch.Generator().manual_seed(0))
        for i in range(len(x)) if len(x) == len(y) else [-1]:
            layer = "head" if i in (-1, len(x) - 1) else i
            rows.append(
                {
                    "a": a.name,
                    "b": b.name,
                    "layer": layer,
                    "cka": linear_cka(x[i], y[i]),
                    "chance": linear_cka(x[i], y[i][order]),
                }
            )
    return rows


def neighbours(model: Model, tokenizer: Tokenizer, words: list[str]) -> str:
    """A table of the six nearest prototypes of each word, by the head's own distance.

    For a control they are nearest by cosine.
    """
    w, rows = model.head.prototypes().detach(), []
    for word in words:
        tokens = tokenizer.encode(f" {word}")
        i = tokens[-1]
        if model.head.is_control:
            order = torch.nn.functional.cosine_similarity(w[i : i + 1], w).argsort(descending=True)
        else:
            order = distance(w[i : i + 1], w, model.head.name, **model.head.geometry())[0].argsort()
        near = [tokenizer.decode_token(t) for t in order.tolist() if t != i][:6]
        piece = tokenizer.decode_token(i)
        # A word of several tokens has no prototype of its own, so that of its last token is shown.
        name = repr(piece) if len(tokens) == 1 else f"the end {piece!r} of {word!r}"
        rows.append({"word": name, "nearest": "  ".join(map(repr, near))})
    return tables.text(rows, ["word", "nearest"])


def coverage(data: Data) -> str:
    """A sentence on how many words of the relations have tokens of their own."""
    tokenizer = data.load_tokenizer()
    every = [pair for name in RELATIONS for pair in pairs(name)]
    kept = sum(len(token_pairs(tokenizer, name)) for name in RELATIONS)
    words = [word for pair in every for word in pair]
    whole = sum(len(word_tokens(tokenizer, word)) == 1 for word in words) / len(words)
    unsure = ": the parallelograms are mostly of pieces of words" if whole < 0.5 else ""
    return (
        f"{data.tokenizer}: {kept} of {len(every)} pairs of words have tokens of their own,"
        f" {whole:.0%} of the words are one token{unsure}"
    )


class Labels:
    """Writes words at points of a panel.

    A word that would cover an earlier one moves up or down to the nearest free place. A thin line
    then joins it to its point.
    """

    # A letter's width and a line's height as shares of the panel, at 8 points and 5 inches.
    LETTER, LINE = 0.012, 0.026

    def __init__(self, axes: Axes):
        self.axes = axes
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        self.width, self.height = right - left, top - bottom
        self.taken: list[tuple[float, float, float]] = []

    def add(self, point: list[float], word: str, color: str) -> None:
        """Writes a word at a point (x, y)."""
        x, y = point
        line = self.LINE * self.height
        steps = (sign * step * line / 4 for step in itertools.count() for sign in (1, -1))
        place = next(y + step for step in steps if self._is_free(x, y + step, word))
        self.taken.append((x, self._end(x, word), place))
        if place != y:
            self.axes.plot([x, x], [y, place], color=color, linewidth=0.4)
        halo = [withStroke(linewidth=2, foreground="white")]
        # Under the arrows, so that the halo hides no arrow's head.
        style: dict[str, Any] = dict(fontsize=8, path_effects=halo, zorder=2.5)
        self.axes.text(x + 0.006 * self.width, place, word, color=color, **style)

    def _end(self, x: float, word: str) -> float:
        return x + len(word) * self.LETTER * self.width

    def _is_free(self, x: float, y: float, word: str) -> bool:
        line, end = self.LINE * self.height, self._end(x, word)
        return not any(
            abs(y - other) < line and x < right and left < end for left, right, other in self.taken
        )


def draw(maps: list[tuple]) -> Figure:
    """Maps of prototypes on their first two principal components, with relations as arrows.

    maps: for each run its name, prototypes (V, C) and tokenizer.
    """
    figure = figures.figure(5.0 * len(maps))
    panels = figure.subplots(len(maps), squeeze=False)[:, 0]
    shown = ("country: capital", "man: woman", "one: many")
    colors = (figures.BLUE, figures.VERMILLION, figures.GREEN)
    for axes, (name, x, tokenizer) in zip(panels, maps, strict=True):
        rows, variance, directions = principal(x)
        plane = rows @ directions[:, :2]
        axes.scatter(*plane.T, s=2, color="0.8", linewidths=0)
        labels = Labels(axes)
        for relation, color in zip(shown, colors, strict=True):
            arrow = {"arrowstyle": "->", "color": color, "lw": 1}
            for first, second in pairs(relation)[:3]:
                ids = [word_tokens(tokenizer, word) for word in (first, second)]
                if not all(ids):
                    continue
                tokens = [word[-1] for word in ids]
                a, b = plane[tokens].tolist()
                axes.annotate("", b, a, arrowprops=arrow)
                for place, word, token in zip((a, b), (first, second), tokens, strict=True):
                    piece = tokenizer.decode_token(token).strip()
                    whole = piece.casefold() == word.casefold()
                    labels.add(place, word if whole else f"{word} (…{piece})", color)
        share = variance / variance.sum()
        axes.set_xlabel(f"first principal component, {share[0]:.1%} of the variance")
        axes.set_ylabel(f"second, {share[1]:.1%}")
        axes.set_title(figures.literal(name))
    return figure


COLUMNS = (
    "run",
    "head",
    "link",
    "what",
    Column("top2", form=".1%"),
    Column("top5", form=".1%"),
    Column("components_90", "for 90 %"),
    Column("effective_rank", form=".1f"),
    Column("participation_ratio", "participation", ".1f"),
    Column("mean_cosine", form=".3f"),
    Column("radius", form=".3g"),
    Column("radius_frequency", form=".2f"),
    Column("parallelogram", form=".3f"),
    Column("shuffled", "(shuffled)", ".3f"),
)
CKA_COLUMNS = ("a", "b", "layer", Column("cka", form=".3f"), Column("chance", form=".3f"))


def main() -> None:
    (c,) = parse(sys.argv[1:], GeometryConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    device, out = check_device(c.device), default_out(c, runs, "geometry")
    data = [run.data() for run in runs]
    note(caution(runs, data, c.split))
    rows, maps, states, texts, iterations = [], [], [], [], []
    for run, d in zip(numbered(runs), data, strict=True):
        model, manifest = run.load(device, c.checkpoint)
        iterations.append(manifest["iter"])
        states.append(layers(model, d, c.split))
        rows += measure(run, model, d, states[-1][-1])
        maps.append((run.name, model.head.prototypes(), d.load_tokenizer()))
        if c.words:
            words = c.words.replace(",", " ").split()
            texts.append(f"\n{run.name}\n{neighbours(model, d.load_tokenizer(), words)}")
    note(unequal_training(runs, iterations))
    note(unequal_settings(runs))
    print(tables.text(rows, COLUMNS))
    print("".join(texts), end="\n" if texts else "")
    for d in {d.tokenizer: d for d in data}.values():
        print(coverage(d))
    alike = {
        (d.tokenizer, d.splits[c.split].tokens, run.model_config.block_size)
        for run, d in zip(runs, data, strict=True)
    }
    if len(alike) > 1:
        print(
            "note: hidden states are not compared (CKA), because the runs have different data,"
            " tokenizers or block_size",
            file=sys.stderr,
        )
    elif len(runs) > 1:
        cka = similarity(runs, states)
        print(tables.text(cka, CKA_COLUMNS))
        write_table(cka, out.with_name(f"{out.stem}_cka.csv"))
    publish(rows, out, lambda: draw(maps))


if __name__ == "__main__":
    cli(main)
