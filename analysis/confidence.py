"""Does a model know when it is wrong? Measures its calibration before and after temperature
scaling, and how well it detects text from another domain.

    python -m analysis.confidence out/a out/b --other="[imdb]"

ece           the expected calibration error (analysis/calibration.py), on every second window
temperature   the number that divides the logits, with the least loss on the other windows. For a
              harmonic head it divides the exponent
ece_scaled    ece at that temperature (Guo et al. 2017, arXiv 1706.04599, section 4.2)
auroc         how well a score tells windows of the run's own text from windows of another corpus,
              which is encoded with the run's tokenizer: 1 = always, 0.5 = as well as chance, below
              0.5 = the score is higher on the other corpus

Scores are means over the tokens of a window:

max           the largest probability (Hendrycks and Gimpel 2017, arXiv 1610.02136)
energy        the logsumexp of the logits (Liu et al. 2020, arXiv 2010.03759)
nearest       minus the distance to the nearest prototype, for distance heads only
loss          minus the loss, which needs the targets

_low and _high are ends of 95 % intervals. Those of ece are basic bootstraps of windows: twice the
estimate minus the quantiles. Those of auroc are DeLong's (`auroc_interval`).

Chance alone makes an ece larger than 0. ece_floor is what a perfectly calibrated model with the
same probabilities would have. An ece near it says nothing, and its interval may miss the truth.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from scipy.stats import mannwhitneyu, norm

from analysis import figures, tables
from analysis.calibration import calibration_error
from analysis.runs import (
    ModelAnalysisConfig,
    Run,
    about,
    check_finite,
    default_out,
    find_runs,
    head_styles,
    note,
    note_unknown,
    numbered,
    publish,
    windows,
    with_float64,
)
from analysis.tables import Column
from base.command_line import cli, parse
from base.errors import UserError, check, too_small
from model import Model
from text.token_files import Data, data_folder, load_data
from text.tokenizers import Tokenizer, same_tokens
from training.distributed import check_device

DRAWS = 500
FLOOR_DRAWS = 20
LEAST = 4  # The fewest windows of a text.
SCORES = ("max", "energy", "nearest", "loss")


@dataclass
class ConfidenceConfig(ModelAnalysisConfig):
    """Calibration and detection"""

    other: list[str] = field(default_factory=list)
    """prepared data of other domains: folders under data/, or paths. They may have another
    tokenizer"""
    windows: int = 64
    """how many windows of each text to score, spread evenly over its split. All logits of the run's
    own text are held in memory, so use fewer with a large vocabulary"""

    def problems(self) -> list[str]:
        return super().problems() + too_small(self, windows=LEAST)


@dataclass
class Scored:
    """The scores of B windows.

    logits: (B, T, V), or None if they were not kept. targets: (B, T). scores: name -> (B,).
    """

    logits: torch.Tensor | None
    targets: torch.Tensor
    scores: dict[str, np.ndarray]


def own_windows(data: Data, split: str, length: int, most: int) -> torch.Tensor:
    """Reads at most `most` windows of a split: (B, length + 1). UserError for fewer than LEAST."""
    tokens = data.splits[split]
    found = [tokens.read(start, length + 1) for start in windows(data, split, length, most)]
    return _stacked(found, data)


def encoded_windows(data: Data, own: Data, split: str, length: int, most: int) -> torch.Tensor:
    """Reads windows of other data, encoded with the tokenizer of `own`: (B, length + 1).

    Raises: UserError for fewer than LEAST windows.
    """
    theirs, words = data.load_tokenizer(), own.load_tokenizer()
    starts = windows(data, split, length, most)
    if same_tokens(theirs, words):
        return own_windows(data, split, length, most)
    found = []
    for start in starts:
        # A window may need many tokens of the other tokenizer, such as single characters.
        for count in (2 * length, 8 * length, 32 * length):
            ids = data.splits[split].read(start, count)
            mine = encoded(ids, theirs, words)[: length + 1]
            if len(mine) == length + 1:
                found.append(np.array(mine))
                break
    windowed = _stacked(found, data)
    note_unknown(words, windowed.numpy(), str(data.folder))
    return windowed


def encoded(ids: np.ndarray, theirs: Tokenizer, words: Tokenizer) -> list[int]:
    """Encodes ids of the tokenizer `theirs` with the tokenizer `words`. Ends of texts stay."""
    found: list[int] = []
    for i, part in enumerate(np.split(ids, np.flatnonzero(ids == theirs.eot_id))):
        if i:
            found.append(words.eot_id)
        found += words.encode(theirs.decode(part[part != theirs.eot_id].tolist()))
    return found


def _stacked(found: list[np.ndarray], data: Data) -> torch.Tensor:
    if len(found) < LEAST:
        raise UserError(
            f"{data.folder} has {len(found)} windows that are long enough, and {LEAST} are needed:"
            " prepare a longer split"
        )
    return torch.from_numpy(np.stack(found))


@torch.inference_mode()
def score(model: Model, x: torch.Tensor, keep_logits: bool = False) -> Scored:
    """Scores windows x (B, T + 1): T inputs, and the targets one token later.

    The result is on the CPU. All logits of a device may not fit into its memory.
    """
    head, kept = model.head, []
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    for window in x.to(model.tokens.weight.device):
        logits = head(model.hidden(window[None, :-1])[0])
        if keep_logits:
            kept.append(logits.float().cpu())
        logits = logits.double()
        log_p = logits.log_softmax(-1)
        scores["max"].append(log_p.amax(-1).exp().mean().item())
        scores["energy"].append(logits.logsumexp(-1).mean().item())
        scores["loss"].append(log_p.gather(1, window[1:, None]).mean().item())
        if not head.is_control:
            nearest = -logits.amax(-1) / float(head.strength)
            nearest = nearest.exp() if head.is_harmonic else nearest
            scores["nearest"].append(-nearest.mean().item())
    arrays = {name: np.array(values) for name, values in scores.items() if values}
    return Scored(torch.stack(kept) if kept else None, x[:, 1:], arrays)


def interval(statistic: Callable[..., float], *groups: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a statistic between 0 and 1, by the basic bootstrap (Davison and Hinkley
    1997, eq. 5.6). Each group of windows is drawn again separately."""
    rng = np.random.default_rng(0)
    found = [
        statistic(*(group[rng.integers(0, len(group), len(group))] for group in groups))
        for _ in range(DRAWS)
    ]
    low, high = 2 * statistic(*groups) - np.quantile(found, (0.975, 0.025))
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def auroc(own: np.ndarray, other: np.ndarray) -> float:
    """The probability that a window of `own` scores higher than one of `other`. Ties count half.

    own, other: the scores of windows, (N,) and (M,).
    """
    return float(mannwhitneyu(own, other).statistic / (len(own) * len(other)))


def auroc_interval(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of `auroc`, NaN if a score is.

    It is that of DeLong et al. (1988, Biometrics 44, 837) on the scale of the logit. If the scores
    separate all windows, that has width 0, and this is a bound: k disjoint pairs of windows are
    independent. Each is in the wrong order with probability 1 - auroc, and none is, which happens
    with at least 5 % up to a probability of 1 - 0.05^(1/k), about 3/k (the rule of three, Hanley
    and Lippman-Hand 1983, JAMA 249, 1743). This bound is wider than DeLong's interval for a few
    pairs in the wrong order.
    """
    found = auroc(own, other)
    if math.isnan(found):
        return math.nan, math.nan
    if 0 < found < 1:
        order = (own[:, None] > other) + 0.5 * (own[:, None] == other)
        parts = order.mean(1), order.mean(0)
        deviation = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
        half = norm.ppf(0.975) * deviation / (found * (1 - found))
        low, high = expit([logit(found) - half, logit(found) + half])
        return float(low), float(high)
    most_wrong = 1 - 0.05 ** (1 / min(len(own), len(other)))
    return (1 - most_wrong, 1.0) if found == 1 else (0.0, most_wrong)


def best_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The temperature from 1/8 to 8 with the least loss of logits (N, V) and targets (N,)."""

    def loss(log_t: float) -> float:
        return torch.nn.functional.cross_entropy(logits / math.exp(log_t), targets).item()

    found = math.exp(minimize_scalar(loss, bounds=(-math.log(8), math.log(8)), method="bounded").x)
    if not 0.126 < found < 7.9:
        note(f"the best temperature is outside 1/8 to 8: {found:.3g} is used")
    return found


def error_of_windows(both: np.ndarray) -> float:
    """The expected calibration error of windows. both: (B, T, 2), confidence and correctness."""
    return calibration_error(both[..., 0].ravel(), both[..., 1].ravel())


def error_floor(confidence: np.ndarray) -> float:
    """The mean calibration error of tokens (N,) that are right exactly as often as they should."""
    rng = np.random.default_rng(0)
    draws = rng.random((FLOOR_DRAWS, len(confidence))) < confidence
    return float(np.mean([calibration_error(confidence, right) for right in draws]))


def calibration(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Fits the temperature on every second window. Measures the errors on the windows between them.

    logits: (B, T, V). targets: (B, T). Returns: the columns of the first table.
    """
    row = {"temperature": best_temperature(logits[::2].flatten(0, 1), targets[::2].flatten())}
    for name, divisor in (("ece", 1.0), ("ece_scaled", row["temperature"])):
        confidence, choice = (logits[1::2] / divisor).softmax(-1).max(-1)
        both = torch.stack([confidence, (choice == targets[1::2]).float()], -1).numpy()
        row[name] = error_of_windows(both)
        row[f"{name}_low"], row[f"{name}_high"] = interval(error_of_windows, both)
        if name == "ece":
            row["ece_floor"] = error_floor(both[..., 0].ravel())
    return row


def measure(run: Run, model: Model, data: Data, c: ConfidenceConfig) -> list[dict]:
    """The rows of a run: one of calibration, and one for each other text and score."""
    length = model.config.block_size
    x = own_windows(data, c.split, length, c.windows)
    own = score(model, x, keep_logits=True)
    assert own.logits is not None
    rows: list[dict] = [{**about(run), **calibration(own.logits, own.targets)}]
    own.logits = None  # Frees their memory.
    for name in c.other:
        other = load_data(data_folder(name))
        found = score(model, encoded_windows(other, data, c.split, length, c.windows))
        for kind, values in own.scores.items():
            pair = values, found.scores[kind]
            low, high = auroc_interval(*pair)
            rows.append(
                {**about(run), "other": other.folder.name, "score": kind}
                | {"auroc": auroc(*pair), "auroc_low": low, "auroc_high": high}
            )
    return rows


def draw(runs: list, rows: list[dict]) -> Figure:
    """Panels of the ECE before and after scaling, and of the AUROC of each score for each text."""
    others = list(dict.fromkeys(r["other"] for r in rows if "other" in r))
    figure = figures.figure(3.4)
    axes = figure.subplots(1, 1 + len(others), squeeze=False)[0]
    step = min(0.1, 0.7 / len(runs))
    for number, (run, style) in enumerate(zip(runs, head_styles(runs), strict=True)):
        place = step * number
        dot = {"color": style["color"], "marker": "o", "linestyle": "none"}
        if style["linestyle"] == figures.LINES["softmax"]:
            dot["markerfacecolor"] = "white"
        mine = [r for r in rows if r["run"] == run.name]
        for i, key in enumerate(("ece", "ece_scaled")):
            value = mine[0][key]
            low, high = mine[0][f"{key}_low"], mine[0][f"{key}_high"]
            axes[0].vlines(i + place, low, high, style["color"])
            axes[0].plot(i + place, value, **dot)
        for panel, other in zip(axes[1:], others, strict=True):
            found = [r for r in mine if r.get("other") == other]
            for r in found:
                at = SCORES.index(r["score"]) + place
                panel.vlines(at, r["auroc_low"], r["auroc_high"], style["color"])
                panel.plot(at, r["auroc"], **dot)
        axes[0].plot([], [], label=figures.literal(run.name), **dot)
    middle = step * (len(runs) - 1) / 2
    axes[0].set_xticks([middle, 1 + middle], ["before", "after"])
    axes[0].set_xlim(middle - 0.6, middle + 1.6)
    axes[0].set_xlabel("temperature scaling")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("expected calibration error")
    for panel, other in zip(axes[1:], others, strict=True):
        panel.set_xticks([at + middle for at in range(len(SCORES))], SCORES)
        panel.axhline(0.5, color=figures.GREY, linewidth=1, linestyle=":", label="chance")
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("score of a window")
        panel.set_ylabel(f"AUROC against {figures.literal(other)}")
    figures.legend_below(figure, axes)
    return figure


def main() -> None:
    (c,) = parse(sys.argv[1:], ConfidenceConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    check(
        [
            f"{run.path}: bert predicts masked tokens, and this analysis needs the next token"
            for run in runs
            if run.objective.masked
        ]
    )
    device, out = with_float64(check_device(c.device)), default_out(c, runs, "confidence")
    rows = []
    for run in numbered(runs):
        model, _ = run.load(device, c.checkpoint)
        check_finite(run, "prototypes", model.head.prototypes())
        rows += measure(run, model, run.data(), c)
    numbers = ["temperature", "ece_floor", "ece", "ece_low", "ece_high", "ece_scaled"]
    numbers += ["ece_scaled_low", "ece_scaled_high"]
    calibrated = [r for r in rows if "ece" in r]
    print(
        tables.text(calibrated, ["run", "head", "link", *(Column(n, form=".3f") for n in numbers)])
    )
    if any(r[f"{key}_high"] < r[key] for r in calibrated for key in ("ece", "ece_scaled")):
        note("chance makes an ece too large; its interval corrects that, so it may lie below it")
    if c.other:
        columns = [Column(key, form=".3f") for key in ("auroc", "auroc_low", "auroc_high")]
        detected = [r for r in rows if "auroc" in r]
        print(tables.text(detected, ["run", "head", "link", "other", "score", *columns]))
    publish(rows, out, lambda: draw(runs, rows))


if __name__ == "__main__":
    cli(main)
