"""Writes one HTML page that compares finished runs: results, curves, samples, different settings.

    python -m analysis.report out/a out/b --out=report.html

The page needs no network and no other file: it is analysis/report.html with one JSON document in
it. A run's loss is the one that training measured on its fixed validation windows, and its weights
are those of the best checkpoint. Differences are of up to 256 windows spread over the split.
analysis.perplexity scores a whole split.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analysis.compare import few_documents, window_losses
from analysis.geometry import frequency, principal
from analysis.page import write_page
from analysis.runs import Run, about, find_runs, numbered
from analysis.summary import (
    agreement,
    energy_parts,
    lead,
    paired,
    radar,
    short,
    summarize,
    summary_table,
)
from base.command_line import cli, parse
from base.errors import UserError, too_small
from base.files import writable
from model import Diverged, Model
from text.token_files import Data
from text.tokenizers import Tokenizer
from training.distributed import check_device
from training.metrics import read_metrics

TEMPLATE = Path(__file__).with_name("report.html")
# The most points of a curve. Each has the lowest, mean and highest value of its iterations.
POINTS = 1000
# The page has maps of so many of the best runs, with the prototypes of so many frequent tokens.
MAPS, MAP_POINTS = 6, 1500
# Every run continues so many excerpts of the validation text. It sees the first characters of an
# excerpt. The rest shows how the text really goes on.
PROMPTS, PROMPT_CHARACTERS, TRUTH_CHARACTERS = 2, 80, 240
# So many tokens are enough for an excerpt, if tokens are words or parts of words.
EXCERPT_TOKENS = 160
# Stands between two documents of an excerpt. Each run reads its own end-of-text token there.
BOUNDARY = "<|endoftext|>"
# bert predicts every seventh token here. That is about the share that it predicts in training.
MASK_EVERY = 7


@dataclass(frozen=True)
class Chart:
    """A curve of metrics.jsonl."""

    key: str
    title: str
    unit: str = ""
    noisy: bool = False
    """whether the page smooths it"""


CHARTS = (
    Chart("val_loss", "Validation loss", "nats/token"),
    Chart("train_loss", "Training loss", "nats/token", noisy=True),
    Chart("grad_norm", "Gradient norm", "whole model, before clipping", noisy=True),
    Chart("grad_norm_head", "Gradient norm, head", "before clipping", noisy=True),
    Chart("grad_norm_trunk", "Gradient norm, trunk", "before clipping", noisy=True),
    Chart("prototype_radius", "Prototype radius", "mean Euclidean norm"),
    Chart(
        "target_distance_mean", "Distance to the target, mean", "in the head's own distance", True
    ),
    Chart(
        "target_distance_min", "Distance to the target, least", "in the head's own distance", True
    ),
    Chart("kl_to_softmax", "KL to softmax", "nats, from the head to the softmax it linearises to"),
    Chart("strength", "Learnt exponent or scale", "n or s"),
    Chart("lr", "Learning rate"),
)


@dataclass
class ReportConfig:
    """The report"""

    runs: list[str] = field(default_factory=list)
    """run folders"""
    out: str = "report.html"
    """the file of the page"""
    dataset: str | None = None
    """prepared data of all runs: a folder under data/, or a path; null = the data that each run was
    trained on"""
    samples: int = 1
    """how many texts each run writes for each of two prompts; 0 = none"""
    max_new_tokens: int = 60
    """tokens of a sample"""
    temperature: float = 0.8
    """below 1 safer choices, above 1 more random ones; 0 = always the likeliest token"""
    top_k: int = 200
    """choose among the k likeliest tokens"""
    seed: int = 1337
    """the same seed gives the same samples"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def problems(self) -> list[str]:
        found = too_small(self, samples=0, max_new_tokens=1, temperature=0, top_k=1)
        if not 0 <= self.seed < 2**31:
            found.append(f"seed={self.seed} is not in 0..{2**31 - 1}")
        return found


def thin(points: list[tuple[int, float]]) -> dict:
    """Reduces a curve to at most POINTS points.

    points: (x, y) in the order of x.
    Returns: x and the mean y of each point. If points stand for several, also the lowest (lo) and
        highest y (hi). A mean that is not finite stays so.
    """
    size = math.ceil(len(points) / POINTS)
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    values = [[y for _, y in b] for b in buckets]
    means = [sum(v) / len(v) for v in values]
    found = {"x": [b[len(b) // 2][0] for b in buckets], "y": [short(m) for m in means]}
    if size > 1:
        for name, extreme in (("lo", min), ("hi", max)):
            found[name] = [
                short(extreme(v) if math.isfinite(m) else m)
                for v, m in zip(values, means, strict=True)
            ]
    return found


def curves(metrics: list[dict]) -> dict:
    """The curves of a run: key of metrics.jsonl -> curve, for the keys of CHARTS that it has."""
    found = {}
    for chart in CHARTS:
        points = [(m["iter"], m[chart.key]) for m in metrics if chart.key in m]
        if points:
            found[chart.key] = thin(points)
    return found


def prototype_map(model: Model, data: Data) -> dict:
    """The prototypes of the MAP_POINTS most frequent tokens, on the first two principal components
    of all prototypes."""
    rows, variance, directions = principal(model.head.prototypes())
    words, share = data.load_tokenizer(), variance / variance.sum()
    tokens = frequency(data)[: len(rows)].argsort(descending=True)[:MAP_POINTS]
    plane = rows[tokens] @ directions[:, :2]
    return {
        "axes": [f"PC {i + 1} ({share[i]:.1%})" for i in range(2)],
        "x": [short(v, 4) for v in plane[:, 0].tolist()],
        "y": [short(v, 4) for v in plane[:, 1].tolist()],
        "tokens": [
            words.decode_token(t).strip() or repr(words.decode_token(t)) for t in tokens.tolist()
        ],
    }


def excerpts(data: Data) -> list[tuple[str, str]]:
    """Takes PROMPTS excerpts, evenly spread over the validation text.

    Returns: (prompt, how the text goes on) of each. BOUNDARY stands between two documents. Prompts
        begin with a whole word, if the text has spaces.
    """
    val, words = data.splits["val"], data.load_tokenizer()
    found = []
    for i in range(PROMPTS):
        ids = val.read((2 * i + 1) * val.tokens // (2 * PROMPTS), EXCERPT_TOKENS)
        documents = np.split(ids, np.flatnonzero(ids == data.eot_id))
        texts = [words.decode(part[part != data.eot_id]) for part in documents]
        text = BOUNDARY.join(texts).strip("\ufffd")
        text = text[text.find(" ") + 1 :]
        cut = text.rfind(" ", 0, PROMPT_CHARACTERS)
        cut = cut if cut > 0 else min(PROMPT_CHARACTERS, len(text) // 2)
        found.append((text[:cut], text[cut : cut + TRUTH_CHARACTERS].rsplit(" ", 1)[0]))
    return found


def excerpt_ids(words: Tokenizer, text: str) -> list[int]:
    """The ids of an excerpt, with the tokenizer's end-of-text token at each BOUNDARY."""
    return words.encode_prompt(text.replace(BOUNDARY, words.eot_text))


def continuations(
    model: Model, words: Tokenizer, eot_id: int, texts: list[tuple[str, str]], c: ReportConfig
) -> list[list[list]]:
    """What a run writes after each excerpt: c.samples texts, each a list of pieces [kind, text]."""
    prompts = [excerpt_ids(words, prompt) or [eot_id] for prompt, _ in texts]
    rows = [p for p in prompts for _ in range(c.samples)]
    steps = model.generate(
        rows, c.max_new_tokens, temperature=c.temperature, top_k=c.top_k, seed=c.seed
    )
    steps = tqdm(steps, total=c.max_new_tokens, desc="sampling", leave=False, disable=None)
    pieces = []
    for prompt, new in zip(rows, zip(*steps, strict=True), strict=True):
        text = words.decode([*prompt, *new])
        pieces.append([["new", text[len(words.decode(prompt)) :]]])
    return [pieces[i : i + c.samples] for i in range(0, len(pieces), c.samples)]


@torch.inference_mode()
def predicted_tokens(
    model: Model, words: Tokenizer, texts: list[tuple[str, str]]
) -> list[list[list]]:
    """What bert predicts for the masked tokens of each excerpt.

    Returns: for each excerpt one text, a list of pieces [kind, text, truth]. kind is "given" for a
        token that bert sees, else "right" or "wrong".
    """
    found: list[list[list]] = []
    for prompt, truth in texts:
        ids = torch.tensor(
            excerpt_ids(words, prompt + truth)[: model.config.block_size],
            dtype=torch.long,
            device=model.tokens.weight.device,
        )
        if not len(ids):
            # The excerpt has no text.
            found.append([[]])
            continue
        hidden = slice(MASK_EVERY // 2, None, MASK_EVERY)
        masked = ids.clone()
        masked[hidden] = words.mask_id
        guesses = ids.clone()
        guesses[hidden] = model(masked[None])[0][0, hidden].argmax(-1)
        pieces = []
        for seen, guess, true in zip(masked.tolist(), guesses.tolist(), ids.tolist(), strict=True):
            kind = "given"
            if seen == words.mask_id:
                kind = "right" if guess == true else "wrong"
            pieces.append([kind, words.decode_token(guess), words.decode_token(true)])
        found.append([pieces])
    return found


def read_environment(run: Run) -> dict:
    """A run's environment.json, or {} if it has none. UserError if it is not a JSON object."""
    path = run.path / "environment.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is not JSON with keys and values: delete it. The page will not name the"
            " run's machine then"
        )
    return found


def differences(runs: list[Run]) -> list[dict]:
    """The settings that differ between runs, except out_dir, with the value of each run."""
    # A control has no link, whatever its config says.
    configs = [
        dataclasses.asdict(r.model_config)
        | dataclasses.asdict(r.config)
        | {"link": about(r)["link"] or "–"}
        for r in runs
    ]
    texts = {
        k: ["null" if c[k] is None else str(c[k]) for c in configs]
        for k in configs[0]
        if k != "out_dir"
    }
    return [{"key": k, "values": values} for k, values in texts.items() if len(set(values)) > 1]


def together(values: list[str]) -> str:
    """The distinct values as one text, in the order of their first appearance."""
    return " | ".join(dict.fromkeys(values))


@dataclass
class Entry:
    """What the page has of one run."""

    summary: dict
    curves: dict
    model: str
    """the size of its model, in words"""
    map: dict | None = None
    """its map of prototypes; None if the run's data was not found"""
    losses: np.ndarray | None = None
    """its losses of validation windows, (windows,); None if the data is missing or too short"""
    samples: list = field(default_factory=list)
    """what it writes after each excerpt; empty if there are no excerpts"""
    notes: list[str] = field(default_factory=list)
    """sentences on what could not be done"""

    def cannot(self, sentence: str) -> None:
        """Adds a note, and prints it."""
        self.notes.append(sentence)
        print(f"note: {sentence}", file=sys.stderr)


def examine(
    run: Run, data: Data | None, texts: list[tuple[str, str]], c: ReportConfig, device: str
) -> Entry:
    """Loads a run's best checkpoint and measures what the page shows. texts: from `excerpts`.

    data: None if it was not found.
    """
    metrics, m = read_metrics(run.path), run.model_config
    model, manifest = run.load(device, "best")
    size = (
        f"{m.arch}, {m.n_layer} layers, {m.n_embd} wide, context {m.block_size},"
        f" {model.parameter_count() / 1e6:.2f} M parameters"
    )
    entry = Entry(summarize(run, model, metrics), curves(metrics), size)
    if data is None:
        return entry
    if not all(weight.isfinite().all() for weight in model.parameters()):
        entry.cannot(f"{run.name} has weights that are not finite, because training has diverged")
        entry.samples = [[] for _ in texts]
        return entry
    entry.map = prototype_map(model, data)
    try:
        if manifest["val_loss"] is None:
            raise UserError(
                f"its only checkpoint, of iteration {manifest['iter']}, has no evaluation, so its"
                " loss in the table is that of an earlier iteration"
            )
        entry.losses = window_losses(model, data)
    except UserError as error:
        # The page still has the curves if the split is too short to score.
        entry.cannot(f"{run.name} is not compared window by window: {error}")
    if not texts:
        return entry
    try:
        words = data.load_tokenizer()
        if run.objective.masked:
            entry.samples = predicted_tokens(model, words, texts)
        else:
            entry.samples = continuations(model, words, data.eot_id, texts, c)
    except (UserError, Diverged) as error:
        entry.cannot(f"{run.name} has no samples: {error}")
        entry.samples = [[] for _ in texts]
    return entry


def collect(runs: list[Run], c: ReportConfig, device: str) -> dict:
    """Everything that the page shows, as one JSON document."""
    notes: list[str] = []
    data: list[Data] | None = None
    texts: list[tuple[str, str]] = []
    try:
        data = [run.data() for run in runs]
        texts = excerpts(data[0]) if c.samples else []
    except UserError as error:
        # The page still has the curves if the data is missing.
        notes.append(f"No samples: {error}")
        print(f"note: {notes[0]}", file=sys.stderr)

    # Only one model is in memory at a time.
    entries = []
    each: list[Data | None] = [*data] if data else [None] * len(runs)
    for run, d in zip(numbered(runs), each, strict=True):
        entries.append(examine(run, d, texts, c, device))
    notes += [sentence for entry in entries for sentence in entry.notes]
    summaries = [entry.summary for entry in entries]
    losses = [entry.losses for entry in entries]
    environments = [read_environment(run) for run in runs]
    agree = agreement(runs, data, summaries, environments, losses)
    to_best = paired(summaries, losses) if agree.windows and not agree.unequal else None
    if to_best and data and (few := few_documents(data[0], "val")):
        notes.append(f"{few[0].upper()}{few[1:]}.")
    steps = [run.tokens_per_iteration() for run in runs]
    return {
        "title": " vs ".join(r.name for r in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        "lead": lead(runs, summaries, agree, losses, to_best),
        "facts": [
            ["Data", together(corpora(runs, data))],
            ["Model", together([entry.model for entry in entries])],
            ["Tokens an iteration", together([f"{count:,}" for count in steps])],
            ["Device", together([str(e.get("device", "unknown")) for e in environments])],
        ],
        "notes": notes + agree.notes,
        "summary": summary_table(summaries, agree, to_best),
        "charts": [dataclasses.asdict(chart) for chart in CHARTS],
        "same_step": len(set(steps)) == 1,
        "runs": [
            {"name": run.name, "tokens_per_iteration": count, "curves": entry.curves}
            for run, count, entry in zip(runs, steps, entries, strict=True)
        ],
        "paired": to_best,
        "radar": radar(summaries, agree),
        "maps": maps(entries),
        "energy": [s["energy"] and energy_parts(s["energy"]) for s in summaries],
        "samples": [
            {"prompt": prompt, "truth": truth, "runs": [entry.samples[i] for entry in entries]}
            for i, (prompt, truth) in enumerate(texts)
        ],
        "sampling": how_sampled(runs, texts, c),
        "differences": differences(runs),
        "environments": [" · ".join(describe(e)) for e in environments],
    }


def maps(entries: list[Entry]) -> list[dict]:
    """The maps of the MAPS best runs that have one, in the order of the runs."""
    mapped = {i: entry.map for i, entry in enumerate(entries) if entry.map}
    losses = {i: entries[i].summary["best_val_loss"] for i in mapped}
    best = sorted(mapped, key=lambda i: (math.isnan(losses[i]), losses[i]))[:MAPS]
    return [{"run": i, **mapped[i]} for i in sorted(best)]


def corpora(runs: list[Run], data: list[Data] | None) -> list[str]:
    """The data that each run was trained on, in words."""
    if data is None:
        return [run.config.dataset for run in runs]
    return [
        f"{run.config.dataset}, {d.tokenizer}, {d.splits['train'].tokens:,} training tokens"
        for run, d in zip(runs, data, strict=True)
    ]


def how_sampled(runs: list[Run], texts: list[tuple[str, str]], c: ReportConfig) -> str:
    """How the samples were made, in sentences. texts: from `excerpts`."""
    text = "Samples come from the best checkpoint of each run."
    if any(BOUNDARY in prompt + truth for prompt, truth in texts):
        text += f" {BOUNDARY} stands where one document of the text ends and the next begins."
    if any(not r.objective.masked for r in runs):
        text += (
            f" Text is drawn at temperature {c.temperature} from the {c.top_k} likeliest tokens,"
            f" seed {c.seed}."
        )
    if any(r.objective.masked for r in runs):
        text += (
            " bert sees the text with every seventh token masked, and predicts these tokens. If a"
            " prediction is wrong, the text's own token follows it, struck out."
        )
    return text


def describe(environment: dict) -> list[str]:
    """The versions, commit, platform and command of an environment.json, one text each."""
    versions = [f"{k} {v}" for k, v in (environment.get("versions") or {}).items()]
    commit = environment.get("git_commit")
    git = (
        [f"commit {commit[:10]}{' with changes' if environment.get('git_dirty') else ''}"]
        if commit
        else []
    )
    rest = [
        f"python {environment.get('python', '?')}",
        *versions,
        *git,
        str(environment.get("platform", "")),
        str(environment.get("command", "")),
    ]
    return [text for text in rest if text]


def main() -> None:
    (c,) = parse(sys.argv[1:], ReportConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    out, device = writable(Path(c.out)), check_device(c.device)
    document = collect(runs, c, device)
    write_page(out, TEMPLATE, document["title"], document)


if __name__ == "__main__":
    cli(main)
