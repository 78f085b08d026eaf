"""One page on which you look up a token and see its nearest prototypes in each run, side by side.

    python -m analysis.explorer out/a out/b --out=explorer.html
    python -m analysis.explorer out/a out/b --tokens=0        # all tokens, however many

For each run: the nearest prototypes under the run's own distance, the coordinates that contribute
most to each of these distances, and a map of the prototypes on their first two principal
components. A dot-product head has no distance: its nearest prototypes have the largest logit.

The page is `explorer.html` beside this file, with one JSON document put into it. It needs no
network and no other file. Everything it shows is computed here. `--tokens` limits which tokens you
can look up, and which prototypes can be their neighbours.
"""

import base64
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from analysis.geometry import frequency, principal
from analysis.page import write_page
from analysis.runs import Run, check_finite, find_runs
from base.command_line import cli, parse
from base.errors import UserError
from base.files import writable
from harmonic import HarmonicHead, contributions, harmonic_logits
from text.token_files import Data, tokenizer_folder
from text.tokenizers import Tokenizer, load_tokenizer, same_tokens
from training.distributed import check_device

TEMPLATE = Path(__file__).with_name("explorer.html")
# The page holds so many neighbours of each token, and coordinates of each pair.
NEIGHBOURS, COORDINATES = 20, 4
# The size of a chunk of distances: 64 MiB of float32.
CHUNK = 2**24


@dataclass
class ExplorerConfig:
    """The explorer"""

    runs: list[str] = field(default_factory=list)
    """run folders; they need the same tokenizer"""
    out: str = "explorer.html"
    """the file of the page"""
    dataset: str | None = None
    """prepared data of all runs: a folder under data/, or a path; null = the data that each run was
    trained on"""
    tokens: int = 20_000
    """how many tokens the page has, the most frequent first; 0 = all"""
    checkpoint: Literal["newest", "best"] = "newest"
    """which checkpoint of each run"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def problems(self) -> list[str]:
        wrong = self.tokens < 0 or self.tokens == 1
        return [f"tokens={self.tokens} must be 0 or at least 2"] if wrong else []


@dataclass
class Neighbours:
    """The nearest prototypes of N prototypes, K of each, nearest first.

    places: (N, K), rows of the table. values: (N, K), distances, or logits of a dot-product head.
    coordinates: (N, K, M), those with the largest shares of the distance. shares: (N, K, M).
    """

    places: torch.Tensor
    values: torch.Tensor
    coordinates: torch.Tensor
    shares: torch.Tensor


@torch.inference_mode()
def neighbours(head: HarmonicHead, table: torch.Tensor, bar: tqdm) -> Neighbours:
    """Finds the nearest neighbours of each prototype among the others of a table (N, C).

    It works on a chunk of rows at a time. bar: counts the rows.
    """
    count, dim = table.shape
    kept, largest = min(NEIGHBOURS, count - 1), min(COORDINATES, dim)
    settings, parts = head.geometry(), []
    for rows in torch.arange(count, device=table.device).split(max(1, CHUNK // count)):
        # With an exponent of 1, the logit of a distance head is -log d.
        logits = harmonic_logits(table[rows], table, head.name, exponent=1.0, **settings)
        logits[torch.arange(len(rows)), rows] = -torch.inf
        best, places = logits.topk(kept)
        shares = contributions(table[rows][:, None], table[places], head.name, **settings)
        shares, coordinates = shares.topk(largest)
        values = best if head.is_control else (-best).exp()
        parts.append([part.cpu() for part in (places, values, coordinates, shares)])
        bar.update(len(rows))
    return Neighbours(*(torch.cat(part) for part in zip(*parts, strict=True)))


def packed(x: torch.Tensor, dtype: str) -> str:
    """The bytes of an array in base64, as the page reads them. dtype: little-endian, as "<u2"."""
    return base64.b64encode(x.numpy().astype(dtype).tobytes()).decode()


def fractions(x: torch.Tensor, top: int) -> torch.Tensor:
    """Numbers in [0, 1], rounded to whole numbers from 0 to `top`."""
    return (x * top).round().clamp(0, top)


def prototype_map(table: torch.Tensor, chosen: torch.Tensor) -> dict:
    """The chosen prototypes on the first two principal components of all prototypes.

    table: all of them, (V, C). chosen: rows of it. Each axis is scaled to 0..65,535.
    """
    rows, variance, directions = principal(table)
    plane = rows[chosen] @ directions[:, :2]
    low, high = plane.amin(0), plane.amax(0)
    plane = (plane - low) / (high - low).clamp_min(torch.finfo(plane.dtype).tiny)
    share = variance / variance.sum()
    return {
        "axes": [f"PC {i + 1} ({share[i]:.1%})" for i in range(2)],
        "x": packed(fractions(plane[:, 0], 65535), "<u2"),
        "y": packed(fractions(plane[:, 1], 65535), "<u2"),
    }


def measure_of(head: HarmonicHead) -> str:
    """What "nearest" means for a head, in sentences for the page."""
    distance = head.distance
    if head.is_control:
        text = (
            "This head has no distance. Its measure is a dot product: nearest means the largest"
            f" {distance.formula}. The share of a coordinate is its part of the sum of |h w|."
        )
        if distance.degree:
            text += " A long prototype is near to many tokens."
    else:
        text = f"Nearest means the smallest distance of two prototypes h and w: {distance.formula}."
    if distance.map is not None and distance.map.multiplies:  # It mixes coordinates.
        return f"{text} The share of a coordinate is its part of sum |d (P d)|, with d = h - w."
    if distance.has_squares:
        what = "the sum of squares" if distance.kernel == "l2" else "d^2"
        text += f" The share of a coordinate is its part of {what}."
    if distance.kernel == "linf":
        text += " The coordinate that attains the maximum has the whole share."
    if distance.kernel == "lse":
        text += " The share of a coordinate is its weight in the smooth maximum."
    if distance.map is not None:
        text += " Coordinates are counted after the head's map of both vectors."
    return text


def describe(run: Run, head: HarmonicHead, chosen: torch.Tensor, bar: tqdm) -> dict:
    """The part of the JSON document about one run. chosen: the tokens of the page.

    Raises: UserError if a prototype is not finite.
    """
    table = head.prototypes().detach().float()
    check_finite(run, "prototypes", table)
    found = neighbours(head, table[chosen.to(table.device)], bar)
    return {
        "name": run.name,
        "head": head.describe(),
        "unit": "logit" if head.is_control else "distance",
        "measure": measure_of(head),
        "dim": table.shape[1],
        "largest": found.shares.shape[-1],
        "neighbours": packed(found.places, "<u2" if len(chosen) <= 2**16 else "<u4"),
        "values": packed(found.values, "<f4"),
        "coordinates": packed(found.coordinates, "<u2"),
        # Most shares are small. Their square root makes better use of the 256 values of a byte.
        "shares": packed(fractions(found.shares.sqrt(), 255), "u1"),
        "map": prototype_map(table.cpu(), chosen),
    }


def one_tokenizer(runs: list[Run], data: list[Data]) -> Tokenizer:
    """The tokenizer of all runs. UserError if they differ, because ids mean other tokens then."""
    words = [
        load_tokenizer(d.tokenizer, tokenizer_folder(run.path, str(d.folder)))
        for run, d in zip(runs, data, strict=True)
    ]
    for run, other in zip(runs, words, strict=True):
        if not same_tokens(words[0], other):
            raise UserError(
                f"{runs[0].name} and {run.name} have different tokenizers, so they share no"
                " tokens to compare: make a page for each"
            )
    return words[0]


def collect(runs: list[Run], c: ExplorerConfig, device: str) -> dict:
    """Everything that the page shows, as one JSON document.

    Its arrays have a row for each token of the page. A neighbour is given as the number of its row.
    """
    data = [run.data() for run in runs]
    words = one_tokenizer(runs, data)
    vocab_size = min([words.vocab_size, *(run.model_config.real_vocab_size for run in runs)])
    counts = frequency(data[0])[:vocab_size]
    chosen = counts.argsort(descending=True, stable=True)[: c.tokens or None]
    documents = []
    with tqdm(total=len(runs) * len(chosen), desc="tokens", unit="", disable=None) as bar:
        for run in runs:
            # Only one model is in memory at a time.
            model, _ = run.load(device, c.checkpoint)
            documents.append(describe(run, model.head, chosen, bar))
    return {
        "title": " vs ".join(run.name for run in runs),
        "facts": [
            ["Tokens on this page", f"{len(chosen):,} of {vocab_size:,}"],
            ["Tokenizer", words.name],
            ["Counts from", f"{data[0].folder.name}, at most the first 4 M training tokens"],
            ["Checkpoint", f"the {c.checkpoint} one of each run"],
        ],
        "left_out": vocab_size - len(chosen),
        "kept": min(NEIGHBOURS, len(chosen) - 1),
        "tokens": [words.decode_token(t) for t in chosen.tolist()],
        "ids": packed(chosen, "<u4"),
        "counts": packed(counts[chosen], "<u4"),
        "runs": documents,
    }


def main() -> None:
    (c,) = parse(sys.argv[1:], ExplorerConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    out, device = writable(Path(c.out)), check_device(c.device)
    document = collect(runs, c, device)
    write_page(out, TEMPLATE, document["title"], document)


if __name__ == "__main__":
    cli(main)
