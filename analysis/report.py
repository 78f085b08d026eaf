"""One self-contained HTML page that compares finished runs: results, curves, samples and what was
different.

    python -m analysis.report out/a out/b --out=report.html

The page is `report.html` beside this file with one JSON document put into it: it needs no network
and no other file. Losses are those that training measured on its fixed validation windows; `python
-m analysis.perplexity` scores a whole split.
"""

import dataclasses
import html
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from analysis.compare import compare, window_losses
from analysis.geometry import frequency, principal, spectrum
from analysis.runs import Run, caution, find_runs, texts_differ, writable
from base.command_line import cli, parse
from base.errors import UserError
from base.files import write_whole
from model import Model
from text.token_files import Data
from text.tokenizers import Tokenizer
from training.distributed import check_device
from training.telemetry import clock, energy, listed, read_metrics, timed

TEMPLATE = Path(__file__).with_name("report.html")
# Most points of a curve that the page holds; each knows the least, mean and greatest value of the
# iterations behind it
POINTS = 1000
PROMPTS = 2  # excerpts of the validation text that every run continues
PROMPT_CHARACTERS, TRUTH_CHARACTERS = (
    80,
    240,
)  # of an excerpt: what the runs see, and how the text really goes on
EXCERPT_TOKENS = 160  # enough for both with any tokenizer of words or their parts
MASK_EVERY = (
    7  # bert fills every seventh token (`how_sampled` says so), about the share that it learns on
)

# curves: metrics key, title, unit, whether it is noisy enough to be smoothed
CHARTS = [
    ("val_loss", "Validation loss", "nats/token", False),
    ("train_loss", "Training loss", "nats/token", True),
    ("grad_norm", "Gradient norm", "whole model, before clipping", True),
    ("grad_norm_head", "Gradient norm, head", "before clipping", True),
    ("grad_norm_trunk", "Gradient norm, trunk", "before clipping", True),
    ("prototype_radius", "Prototype radius", "mean Euclidean norm", False),
    ("target_distance_mean", "Distance to the target, mean", "in the head's own distance", True),
    ("target_distance_min", "Distance to the target, least", "in the head's own distance", True),
    (
        "kl_to_softmax",
        "KL to softmax",
        "nats, from the head to the softmax it linearises to",
        False,
    ),
    ("strength", "Learnt exponent or scale", "n or s", False),
    ("lr", "Learning rate", "", False),
]

MAPS, MAP_POINTS = (
    6,
    1500,
)  # maps of the best runs; prototypes on a map, those of the most frequent tokens

# columns of the summary: key, title, format, which value is best, and what must agree for the best
# to be marked
COLUMNS = [
    ("head", "head", "", None, None),
    ("strength", "exponent n / scale s", "", None, None),
    ("iterations", "iterations", ",", None, None),
    ("best_val_loss", "best val loss", ".4f", min, "losses"),
    ("perplexity", "perplexity", ",.1f", min, "losses"),
    ("bits_per_byte", "bits/byte", ".4f", min, "bits"),
    ("difference", "above the best (95 %)", "", None, None),
    ("components", "PCs for 90 %", "", None, None),
    ("kwh", "kWh", ".3g", min, "work"),
    ("co2", "g CO₂e", ".3g", min, "work"),
    ("tokens_per_s", "tokens/s", ",.0f", max, "work"),
    ("minutes", "minutes", ".1f", min, "work"),
]


@dataclass
class ReportConfig:
    """The report"""

    runs: list[str] = field(default_factory=list)
    """run folders"""
    out: str = "report.html"
    """the page"""
    dataset: str | None = None
    """prepared data of all runs, a folder under data/ or a path; null = where each run was
    trained"""
    samples: int = 1
    """texts that each run writes for each of two prompts; 0 = none"""
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
        least = {"samples": 0, "max_new_tokens": 1, "temperature": 0, "top_k": 1}
        return [
            f"{k}={getattr(self, k)} must be at least {low}"
            for k, low in least.items()
            if getattr(self, k) < low
        ]


def shown(value: float, digits: int = 5):
    """A number as the page's JSON holds it: rounded to some significant digits, or the name of one
    that is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else repr(value)


def thin(points: list[tuple[int, float]]) -> dict:
    """A curve of at most POINTS points: x, mean y, and lo and hi where a point stands for several.
    One that is not finite shows."""
    size = math.ceil(len(points) / POINTS)
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    values = [[y for _, y in b] for b in buckets]
    means = [sum(v) / len(v) for v in values]
    found = {"x": [b[len(b) // 2][0] for b in buckets], "y": [shown(m) for m in means]}
    if size > 1:
        for name, extreme in (("lo", min), ("hi", max)):
            found[name] = [
                shown(extreme(v) if math.isfinite(m) else m)
                for v, m in zip(values, means, strict=True)
            ]
    return found


def curves(metrics: list[dict]) -> dict:
    """metrics key -> curve, for the keys of CHARTS that the run has."""
    points = {key: [(m["iter"], m[key]) for m in metrics if key in m] for key, *_ in CHARTS}
    return {key: thin(values) for key, values in points.items() if values}


def prototype_map(model: Model, data: Data) -> dict:
    """The prototypes of the MAP_POINTS most frequent tokens on the first two principal components
    of all of them."""
    rows, variance, directions = principal(model.head.prototypes())
    words, share = data.load_tokenizer(), variance / variance.sum()
    tokens = frequency(data)[: len(rows)].argsort(descending=True)[:MAP_POINTS]
    plane = rows[tokens] @ directions[:, :2]
    return {
        "axes": [f"PC {i + 1} ({share[i]:.1%})" for i in range(2)],
        "x": [shown(v, 4) for v in plane[:, 0].tolist()],
        "y": [shown(v, 4) for v in plane[:, 1].tolist()],
        "tokens": [
            words.decode_token(t).strip() or repr(words.decode_token(t)) for t in tokens.tolist()
        ],
    }


def summary(run: Run, model: Model, metrics: list[dict]) -> dict:
    """COLUMNS key -> value, None where there is none."""
    evaluations = [m for m in metrics if "val_loss" in m]
    if not evaluations:
        raise UserError(f"{run.path}/metrics.jsonl has no validation loss yet")
    best = min(evaluations, key=lambda m: (math.isnan(m["val_loss"]), m["val_loss"]))
    used = energy(run.path)
    kwh, co2 = (used["energy_consumed"], 1000 * used["emissions"]) if used else (None, None)
    speeds = sorted(m["tokens_per_s"] for m in metrics if "tokens_per_s" in m)
    head = model.head
    return {
        "head": head.name + (", softmax link" if head.strength_name == "scale" else ""),
        "strength": None
        if head.is_control
        else f"{'n' if head.is_harmonic else 's'} = {float(head.strength):.4g}",
        "iterations": max(
            [m["iter"] for m in evaluations] + [m["iter"] + 1 for m in metrics if "train_loss" in m]
        ),
        "best_val_loss": best["val_loss"],
        "perplexity": best.get("perplexity"),
        "bits_per_byte": best.get("bits_per_byte"),
        "difference": None,
        "components": spectrum(model.head.prototypes())["components_90"],
        "kwh": kwh,
        "energy": used,
        "co2": co2,
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        "minutes": clock(metrics, run.tokens_per_iteration())[-1][0] / 60
        if timed(metrics)
        else None,
        "last_val_loss": evaluations[-1]["val_loss"],
    }


def summary_table(summaries: list[dict], agree: dict[str, bool]) -> dict:
    """The summary as texts, the best of each column marked where its kind of value may be
    compared."""
    rows = [[] for _ in summaries]
    for key, _, form, better, kind in COLUMNS:
        values = [s[key] for s in summaries]
        finite = [v for v in values if better and v is not None and math.isfinite(v)]
        best = better(finite) if len(values) > 1 and len(finite) > 0 and agree[kind] else None
        for row, v in zip(rows, values, strict=True):
            row.append(
                {
                    "text": "–" if v is None else format(v, form),
                    "best": best is not None and v == best,
                }
            )
    return {"columns": [title for _, title, *_ in COLUMNS], "rows": rows}


def paired(summaries: list[dict], losses: list) -> dict | None:
    """Puts differences to the best run, on the same windows, into the summaries -> what a picture
    of them needs."""
    if len(losses) < 2:
        return None
    best, found = compare(losses)
    for i, (s, d) in enumerate(zip(summaries, found, strict=True)):
        if i == best:
            s["difference"] = "the best"
        else:
            s["difference"] = "within noise: " if d.low <= 0 <= d.high else ""
            s["difference"] += (
                f"{d.mean:.3f} ({d.low:.3f} to {d.high:.3f}),"
                f" {f'p = {d.p:.3f}' if d.p >= 0.001 else 'p < 0.001'}"
            )
    return {
        "best": best,
        "windows": len(losses[0]),
        "rows": [[shown(v) for v in (d.mean, d.low, d.high)] for d in found],
    }


def energy_parts(used: dict) -> dict:
    """Wh of the processor, GPUs, memory, and what CodeCarbon's file does not assign."""
    parts = {k: used[f"{k}_energy"] for k in ("cpu", "gpu", "ram")}
    return {
        k: shown(1000 * v)
        for k, v in {
            **parts,
            "rest": max(0.0, used["energy_consumed"] - sum(parts.values())),
        }.items()
    }


def radar(summaries: list[dict], agree: dict[str, bool]) -> list[dict] | None:
    """The papers' three axes, 0 to 10, 10 the best of this page: best / value. None where they may
    not be compared."""
    axes = (
        ("performance", "bits_per_byte"),
        ("interpretability", "components"),
        ("sustainability", "kwh"),
    )
    if (
        len(summaries) < 2
        or not all(agree.values())
        or any(not s[key] or not math.isfinite(s[key]) for s in summaries for _, key in axes)
    ):
        return None
    best = {key: min(s[key] for s in summaries) for _, key in axes}
    return [
        {
            "axes": [a for a, _ in axes],
            "values": [shown(10 * best[key] / s[key], 3) for _, key in axes],
        }
        for s in summaries
    ]


def excerpts(data: Data) -> list[tuple[str, str]]:
    """Places of the validation text, evenly spread -> (prompt, how it goes on), each from the start
    of a word where there are words."""
    val, words = data.splits["val"], data.load_tokenizer()
    found = []
    for i in range(PROMPTS):
        ids = val.read((2 * i + 1) * val.tokens // (2 * PROMPTS), EXCERPT_TOKENS)
        text = words.decode(ids[ids != data.eot_id]).strip("\ufffd")
        text = text[text.find(" ") + 1 :]
        cut = text.rfind(" ", 0, PROMPT_CHARACTERS)
        cut = cut if cut > 0 else min(PROMPT_CHARACTERS, len(text) // 2)
        found.append((text[:cut], text[cut : cut + TRUTH_CHARACTERS].rsplit(" ", 1)[0]))
    return found


def continuations(
    model: Model, words: Tokenizer, eot_id: int, texts: list[tuple[str, str]], c: ReportConfig
) -> list[list[list]]:
    """What a run writes: for each excerpt `c.samples` texts, each a list of pieces [kind, text]."""
    prompts = [words.encode(prompt) or [eot_id] for prompt, _ in texts]
    rows = [p for p in prompts for _ in range(c.samples)]
    steps = model.generate(
        rows, c.max_new_tokens, temperature=c.temperature, top_k=c.top_k, seed=c.seed
    )
    written = zip(
        *tqdm(steps, total=c.max_new_tokens, desc="sampling", leave=False, disable=None),
        strict=True,
    )  # a row of tokens a prompt
    pieces = [
        [["new", words.decode([*p, *new])[len(words.decode(p)) :]]]
        for p, new in zip(rows, written, strict=True)
    ]
    return [pieces[i : i + c.samples] for i in range(0, len(pieces), c.samples)]


@torch.inference_mode()
def fills(model: Model, words: Tokenizer, texts: list[tuple[str, str]]) -> list[list[list]]:
    """What bert puts for masked words: for each excerpt one text of pieces [kind, text, truth],
    kind being given, right or wrong."""
    found = []
    for prompt, truth in texts:
        ids = torch.tensor(
            words.encode(prompt + truth)[: model.config.block_size],
            dtype=torch.long,
            device=model.tokens.weight.device,
        )
        if not len(ids):  # an excerpt without text
            found.append([[]])
            continue
        hidden = slice(MASK_EVERY // 2, None, MASK_EVERY)
        masked = ids.clone()
        masked[hidden] = words.mask_id
        guesses = ids.clone()
        guesses[hidden] = model(masked[None])[0][0, hidden].argmax(-1)
        names = [
            (words.decode_token(g), words.decode_token(t))
            for g, t in zip(guesses, ids, strict=True)
        ]
        kinds = [
            "given" if m != words.mask_id else "right" if g == t else "wrong"
            for m, g, t in zip(masked, guesses, ids, strict=True)
        ]
        found.append(
            [[[kind, guess, true] for kind, (guess, true) in zip(kinds, names, strict=True)]]
        )
    return found


def read_environment(run: Run) -> dict:
    """A run's environment.json, empty where it has none. UserError for one that is not a JSON
    object."""
    path = run.path / "environment.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is not JSON with keys and values: delete it, and the page leaves the machine"
            " out"
        )
    return found


def differences(runs: list[Run]) -> list[dict]:
    """Configuration keys that are not the same in all runs, but for their folders."""
    configs = [dataclasses.asdict(r.model_config) | dataclasses.asdict(r.config) for r in runs]
    texts = {
        k: ["null" if c[k] is None else str(c[k]) for c in configs]
        for k in configs[0]
        if k != "out_dir"
    }
    return [{"key": k, "values": values} for k, values in texts.items() if len(set(values)) > 1]


def together(values: list[str]) -> str:
    """The distinct values, in order."""
    return " | ".join(dict.fromkeys(values))


def collect(runs: list[Run], c: ReportConfig, device: str) -> dict:
    """Everything the page shows, as one JSON document."""
    notes, data, texts = [], None, []
    try:
        data = [run.data() for run in runs]
        texts = excerpts(data[0]) if c.samples else []
    except UserError as error:  # curves can be looked at where the data is not
        notes.append(f"No samples: {error}")
        print(f"note: {notes[0]}", file=sys.stderr)

    summaries, drawn, models, samples, maps, losses = [], [], [], [], [], []
    for i, run in enumerate(tqdm(runs, desc="runs", leave=False, disable=None)):
        metrics, (model, _), m = (
            read_metrics(run.path),
            run.load(device, "best"),
            run.model_config,
        )  # one run's at a time
        summaries.append(summary(run, model, metrics))
        drawn.append(curves(metrics))
        models.append(
            f"{m.arch}, {m.n_layer} layers, {m.n_embd} wide, context {m.block_size},"
            f" {model.parameter_count() / 1e6:.2f} M parameters"
        )
        if data:
            maps.append({"run": i, **prototype_map(model, data[i])})
            try:
                losses.append(window_losses(model, data[i]))
            except (
                UserError
            ) as error:  # a split that is too short to score does not keep anyone from the curves
                notes.append(f"{run.name} is not compared window by window: {error}")
                print(f"note: {notes[-1]}", file=sys.stderr)
        if texts:
            words = data[i].load_tokenizer()
            samples.append(
                fills(model, words, texts)
                if runs[i].objective.masked
                else continuations(model, words, data[i].eot_id, texts, c)
            )

    warning = (
        caution(runs, data)
        if data
        else "The runs' data was not found: nobody checked that losses may be compared"
        if len(runs) > 1
        else None
    )
    work = [
        (s["iterations"] * r.tokens_per_iteration()) for s, r in zip(summaries, runs, strict=True)
    ]
    same_windows = (
        len({(r.model_config.block_size, r.config.eval_iters * r.config.batch_size) for r in runs})
        == 1
    )
    environments = [read_environment(run) for run in runs]
    machines = {(e.get("device"), e.get("world_size")) for e in environments}
    last = [s["last_val_loss"] for s in summaries]
    notes += [
        f"Beware: the last validation loss of {r.name} is {v}."
        for r, v in zip(runs, last, strict=True)
        if not math.isfinite(v)
    ]
    if warning:
        notes.append(warning[0].upper() + warning[1:] + ".")
    if len(set(work)) > 1:
        notes.append(
            "The runs have not seen the same number of tokens: more training lowers a loss, and"
            " energy and time are not ranked."
        )
    if len(machines) > 1:
        notes.append("The runs ran on different machines: energy and time are not ranked.")
    if not same_windows:
        notes.append(
            "The runs have different validation windows (block_size, eval_iters or batch_size):"
            " small differences in loss mean nothing."
        )
    agree = {
        "losses": warning is None and same_windows,
        "bits": len({r.objective.masked for r in runs}) == 1
        and (not data or not texts_differ(data)),
        "work": len(set(work)) == 1 == len(machines),
    }
    same_size = (
        len({len(x) for x in losses}) == 1 and len({r.model_config.block_size for r in runs}) == 1
    )
    comparable = warning is None and len(losses) == len(runs) and same_size
    differences_to_best = paired(summaries, losses) if comparable else None
    steps = [f"{r.tokens_per_iteration():,}" for r in runs]
    sizes = [
        f"{r.config.dataset}, {d.tokenizer}, {d.splits['train'].tokens:,} training tokens"
        for r, d in zip(runs, data or [], strict=False)
    ]
    return {
        "title": " vs ".join(r.name for r in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        "lead": lead(runs, summaries, differences_to_best),
        "facts": [
            ["Data", together(sizes or [r.config.dataset for r in runs])],
            ["Model", together(models)],
            ["Tokens an iteration", together(steps)],
            ["Device", together([str(e.get("device", "unknown")) for e in environments])],
        ],
        "notes": notes,
        "summary": summary_table(summaries, agree),
        "charts": [
            {"key": k, "title": title, "unit": unit, "noisy": noisy}
            for k, title, unit, noisy in CHARTS
        ],
        "same_step": len(set(steps)) == 1,
        "runs": [
            {"name": r.name, "tokens_per_iteration": r.tokens_per_iteration(), "curves": found}
            for r, found in zip(runs, drawn, strict=True)
        ],
        "paired": differences_to_best,
        "radar": radar(summaries, agree),
        "maps": [
            maps[i]
            for i in sorted(
                sorted(range(len(maps)), key=lambda i: summaries[i]["best_val_loss"])[:MAPS]
            )
        ],
        "energy": [s["energy"] and energy_parts(s["energy"]) for s in summaries],
        "samples": [
            {"prompt": prompt, "truth": truth, "runs": [s[i] for s in samples]}
            for i, (prompt, truth) in enumerate(texts)
        ],
        "sampling": how_sampled(runs, c),
        "differences": differences(runs),
        "environments": [" · ".join(describe(e)) for e in environments],
    }


def how_sampled(runs: list[Run], c: ReportConfig) -> str:
    fills = any(r.objective.masked for r in runs)
    writes = any(not r.objective.masked for r in runs)
    text = "The best checkpoint of each run."
    text += (
        f" Text is drawn at temperature {c.temperature} from the {c.top_k} likeliest tokens, seed"
        f" {c.seed}."
        if writes
        else ""
    )
    return text + (
        " bert sees the text with every seventh token hidden and puts the likeliest; struck out is"
        " what the text has."
        if fills
        else ""
    )


def lead(runs: list[Run], summaries: list[dict], differences: dict | None) -> str:
    """The result in a sentence; none where runs may not be compared."""
    if not any(math.isfinite(s["best_val_loss"]) for s in summaries):
        return "No run has a finite validation loss."
    if len(runs) == 1:
        return (
            f"{runs[0].name} reaches a validation loss of {summaries[0]['best_val_loss']:.3f}"
            " nats/token."
        )
    if differences is None:
        return ""
    best, rows = differences["best"], differences["rows"]
    others = sorted(
        (mean, low, runs[i].name)
        for i, (mean, low, _) in enumerate(rows)
        if i != best and not isinstance(mean, str)
    )
    text = (
        f"{runs[best].name} has the lowest validation loss, {summaries[best]['best_val_loss']:.3f}"
        " nats/token"
    )
    if alike := [name for _, low, name in others if low <= 0]:
        return f"{text}, but these windows do not tell it apart from {listed(alike, 3)}."
    return text + (f", {others[0][0]:.3f} below {others[0][2]}." if others else ".")


def describe(environment: dict) -> list[str]:
    """An environment.json in a few words."""
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


def page(document: dict) -> str:
    """The template with the document in it. Nothing of the document can end the script element it
    stands in."""
    data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    values = {"TITLE": html.escape(document["title"]), "DATA": data}
    return re.sub(
        "__(TITLE|DATA)__", lambda found: values[found[1]], TEMPLATE.read_text(encoding="utf-8")
    )


def main():
    (c,) = parse(sys.argv[1:], ReportConfig, words="runs")
    runs = find_runs(c.runs, dataset=c.dataset)
    out, device = writable(Path(c.out)), check_device(c.device)
    text = page(collect(runs, c, device))
    write_whole(out, text)
    print(f"wrote {out}, {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli(main)
