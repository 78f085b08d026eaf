"""The analysis scripts on tiny runs: the sums against a loop that scores one token at a time, the
page, and what a user may get wrong."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import (
    bottleneck,
    confidence,
    explorer,
    figures,
    geometry,
    page,
    perplexity,
    quantization,
    report,
    summary,
    tables,
    theory,
)
from analysis.runs import (
    AnalysisConfig,
    Run,
    caution,
    changed,
    default_out,
    find_runs,
    lossy,
    note_unknown,
    unequal_settings,
    unequal_training,
    uneven,
)
from analysis.tables import Column
from base.command_line import cli, write_yaml
from base.errors import UserError
from base.files import writable
from model import Model, ModelConfig
from text.token_files import load_data
from text.tokenizers import copy_tokenizer, load_tokenizer, train_bpe, train_tokenizer
from training import checkpoint
from training.config import TrainConfig
from training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
TEXT = [
    f"The {a} of the {b} was a {c} day, and the {b} was {a}. "
    for a in ("king", "cat", "sea")
    for b in ("sun", "war")
    for c in ("good", "dark")
]


def prepare(folder: Path, vocab_size: int = 300, repeat: int = 1) -> Path:
    """A data folder with a trained tokenizer; val has a length that no window divides."""
    folder.mkdir(parents=True)
    train_bpe(TEXT, vocab_size, folder)
    words = load_tokenizer(f"bpe:{vocab_size}", folder)
    splits = {}
    for name, text in {
        "train": "".join(TEXT) * 3 * repeat,
        "val": "".join(TEXT[:7]) * repeat,
        "test": TEXT[8],
    }.items():
        ids = np.array([*words.encode(text), words.eot_id], "<u2")
        ids.tofile(folder / f"{name}.bin")
        splits[name] = {"file": f"{name}.bin", "tokens": len(ids), "bytes": len(text.encode())}
    meta = {
        "tokenizer": words.name,
        "vocab_size": words.vocab_size,
        "dtype": "uint16",
        "eot_id": words.eot_id,
        "mask_id": words.mask_id,
    }
    (folder / "meta.json").write_text(json.dumps(meta | {"splits": splits}))
    return folder


def evaluation(iteration: int, loss: float, bits: float, kl: float) -> dict:
    """The line of an evaluation in metrics.jsonl."""
    found = {"iter": iteration, "val_loss": loss, "perplexity": math.exp(loss)}
    return found | {"bits_per_byte": bits, "kl_to_softmax": kl}


def make_run(folder: Path, data: Path, iterations: int = 4, **settings) -> Path:
    """A run's folder as train.py leaves it, with random weights and made-up metrics."""
    folder.mkdir(parents=True)
    d = load_data(data)
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    sizes = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "vocab_size": 320,
        "real_vocab_size": d.vocab_size,
    }
    config = ModelConfig(**sizes | {k: v for k, v in settings.items() if k in names})
    training = TrainConfig(
        dataset=str(data),
        out_dir=str(folder),
        **{k: v for k, v in settings.items() if k not in names},
    )
    write_yaml(folder / "config.yaml", config, training)
    torch.manual_seed(len(folder.name))
    model = Model(config)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(folder, 2, checkpoint.snapshot(model, optimizer), {"val_loss": 1.0})
    torch.nn.init.normal_(model.head.weight, std=0.6)
    checkpoint.save(folder, iterations, checkpoint.snapshot(model, optimizer), {"val_loss": 2.0})
    lines = [evaluation(0, 6.0, 4.0, 0.03)]
    for i in range(iterations):
        lines.append(
            {
                "iter": i,
                "train_loss": 6 - i / iterations,
                "lr": 1e-3,
                "grad_norm": 2.0 + i % 2,
                "tokens_per_s": 100.0,
                "elapsed_s": 24 * (i + 1) / iterations,
            }
        )
    lines.append(evaluation(iterations, 5.0, 3.0, 0.04))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "emissions.csv").write_text(
        "duration,emissions,energy_consumed\n30,0.001,0.002\n30,0.002,0.003\n"
    )
    (folder / "environment.json").write_text(
        json.dumps(
            {"python": "3.11", "device": "cpu", "git_commit": "0123456789abcdef", "git_dirty": True}
        )
    )
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two data folders and four runs."""
    home = tmp_path_factory.mktemp("home")
    prepare(home / "data" / "small")
    prepare(home / "data" / "other", 290)
    make_run(home / "out" / "ce", home / "data" / "small")
    make_run(home / "out" / "cosine", home / "data" / "small", head="cosine", learning_rate=1e-3)
    make_run(home / "out" / "other", home / "data" / "other", head="manhattan")
    make_run(home / "out" / "bert", home / "data" / "small", arch="bert", head="euclidean")
    return home


def call(main, monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    main()


# windows and sums


@pytest.mark.parametrize("tokens", [2, 3, 16, 17, 18, 24, 25, 33, 100, 101])
@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_windows_score_every_token_but_the_first_once_and_with_enough_context(tokens, stride):
    block_size, scored = 16, []
    for start, skip in perplexity.sliding_windows(tokens, block_size, stride):
        targets = range(start + 1, start + min(block_size, tokens - 1) + 1)[skip:]
        assert targets, "a window that scores nothing"
        for t in targets:
            assert t - start >= min(t, block_size - stride)  # tokens of context
        scored += targets
    assert scored == list(range(1, tokens))


@pytest.mark.parametrize(
    ("name", "stride", "batch_size"),
    [("ce", 0, 16), ("cosine", 5, 3), ("ce", 16, 1), ("cosine", 1, 7)],
)
def test_likelihood_equals_a_loop_over_single_tokens(home, name, stride, batch_size):
    run = find_runs([home / "out" / name])[0]
    (model, _), data = run.load(), run.data()
    ids = torch.from_numpy(np.fromfile(data.folder / "val.bin", "<u2").astype(np.int64))
    size, step = 16, stride or 8
    nats = 0.0
    for t in range(1, len(ids)):  # the window that scores t is the first one whose end reaches it
        start = min(max(0, math.ceil((t - size) / step)) * step, len(ids) - 1 - size)
        logits = model(ids[None, start:t])[0][0, -1].double()
        nats -= logits.log_softmax(-1)[ids[t]].item()
    found, scored = perplexity.likelihood(model, data, "val", stride, batch_size)
    assert scored == len(ids) - 1
    assert found == pytest.approx(nats, rel=1e-6)


def test_a_split_shorter_than_a_window(home):
    run = find_runs([home / "out" / "ce"])[0]
    (model, _), data = run.load(), run.data()
    split = data.splits["test"]
    short = dataclasses.replace(data, splits={"test": dataclasses.replace(split, tokens=7)})
    ids = torch.from_numpy(split.read(0, 7))
    expected = torch.nn.functional.cross_entropy(
        model(ids[None, :-1])[0][0].double(), ids[1:], reduction="sum"
    ).item()
    assert perplexity.likelihood(model, short, "test") == (pytest.approx(expected, rel=1e-6), 6)


def test_bert_is_scored_on_its_fixed_masks(home):
    run = find_runs([home / "out" / "bert"])[0]
    (model, _), data = run.load(), run.data()
    first = perplexity.likelihood(model, data, "val", batch_size=3)
    again = perplexity.likelihood(model, data, "val", batch_size=5)
    windows = (data.splits["val"].tokens - 1) // 16
    assert first[1] == again[1] == 2 * windows  # 15 % of 16 tokens
    assert first[0] == pytest.approx(again[0], rel=1e-6)


def test_a_missing_split_is_told(home):
    run = find_runs([home / "out" / "ce"])[0]
    data = run.data()
    del data.splits["test"]
    with pytest.raises(UserError, match="has no split test"):
        perplexity.likelihood(run.load()[0], data, "test")


def test_not_a_number_is_not_hidden(home, tmp_path):
    run = find_runs([home / "out" / "ce"])[0]
    (model, _), data = run.load(), run.data()
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    assert math.isnan(perplexity.likelihood(model, data, "val")[0])
    row = {"run": "a", "head": "cosine", "split": "val"}
    row |= {"nats_per_token": math.nan, "bits_per_byte": math.nan}
    perplexity.draw([row, row | {"nats_per_token": 2.0, "bits_per_byte": 2.0}])


def test_perplexity_prints_a_table_and_writes_csv_and_chart(home, tmp_path, monkeypatch, capsys):
    call(
        perplexity.main,
        monkeypatch,
        home / "out/ce",
        home / "out/cosine",
        f"--out={tmp_path / 'p.csv'}",
        "--device=cpu",
    )
    printed, errors = capsys.readouterr()
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    data = load_data(home / "data/small")
    val = data.splits["val"]
    assert [r["run"] for r in rows] == ["ce", "cosine"] and [r["link"] for r in rows] == [
        "",
        "harmonic",
    ]
    for row in rows:
        nats = float(row["nats_per_token"])
        assert int(row["tokens"]) == val.tokens - 1 and row["stride"] == "8" and row["iter"] == "4"
        assert float(row["perplexity"]) == pytest.approx(math.exp(nats))
        assert float(row["bits_per_byte"]) == pytest.approx(
            nats * val.tokens / math.log(2) / val.bytes
        )
        assert f"{nats:.4f}" in printed
    assert len({len(line) for line in printed.splitlines()[:3]}) == 1  # aligned
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and "note" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.csv", "p.png"]


def test_best_checkpoint_and_default_place(home, tmp_path, monkeypatch):
    shutil.copytree(home / "out" / "ce", tmp_path / "ce")
    call(perplexity.main, monkeypatch, tmp_path / "ce", "--checkpoint=best", "--split=test")
    with open(tmp_path / "perplexity.csv", newline="") as file:
        assert next(csv.DictReader(file))["iter"] == "2"
    assert (tmp_path / "perplexity.png").is_file()


def test_the_place_of_the_data_is_checked_before_it_is_used(home):
    """Also for an analysis that reads no data."""
    for place, message in ((home / "nowhere", "no data folder"), (home / "out", "no token files")):
        with pytest.raises(UserError, match=message):
            find_runs([home / "out/ce"], weights=False, dataset=str(place))


def test_different_tokenizers_are_told(home, tmp_path, monkeypatch, capsys):
    call(
        perplexity.main,
        monkeypatch,
        home / "out/ce",
        home / "out/other",
        f"--out={tmp_path / 'p.csv'}",
    )
    assert "different tokenizers: only bits/byte may be compared" in capsys.readouterr().err
    ce, other = find_runs([home / "out/ce", home / "out/other"])
    longer = load_data(prepare(tmp_path / "longer", repeat=2))
    assert caution([ce, ce], [ce.data(), ce.data()]) is None
    assert unequal_training([ce, ce], [3, 3]) is None
    assert "same number of tokens" in unequal_training([ce, ce], [3, 4])
    config = dataclasses.replace(ce.config, learning_rate=0.5, warmup_iters=77)
    slow = dataclasses.replace(ce, config=config)
    assert unequal_settings([ce, ce]) is None
    assert f"also warmup_iters ({ce.config.warmup_iters} and 77)." in unequal_settings([ce, slow])
    flat = dataclasses.replace(ce.config, learning_rate=0.5, min_lr=0.5)
    assert "(10% of its peak and 100% of its peak)" in unequal_settings(
        [ce, dataclasses.replace(ce, config=flat)]
    )
    other_seed = dataclasses.replace(ce, config=dataclasses.replace(ce.config, seed=7))
    cosine = dataclasses.replace(
        ce, model_config=dataclasses.replace(ce.model_config, head="cosine")
    )
    both = f"{min(7, ce.config.seed)}/{max(7, ce.config.seed)}"
    assert unequal_settings([ce, other_seed]) is None  # two seeds of one head
    assert f"also seed ({both} and {ce.config.seed})." in unequal_settings([ce, other_seed, cosine])
    assert "different data: only bits/byte" in caution([ce, other], [ce.data(), longer])


# the report


class Page(HTMLParser):
    """Elements with their attributes, texts of script and style elements, and whether tags are
    balanced."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.scripts = [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("script", "style", "title"):
            self.scripts[self.open[-1][1].get("id", self.open[-1][0])] = data

    def document(self) -> dict:
        return json.loads(self.scripts["data"])


def make_report(monkeypatch, out: Path, *words) -> Page:
    call(report.main, monkeypatch, *words, f"--out={out}", "--max_new_tokens=5", "--device=cpu")
    page = Page(out.read_text(encoding="utf-8"))
    assert not page.open
    return page


def marked(document: dict) -> set[str]:
    """The columns of the summary that have a best value."""
    columns, rows = document["summary"]["columns"], document["summary"]["rows"]
    return {c for row in rows for c, cell in zip(columns, row, strict=True) if cell["best"]}


def test_report_is_one_page_with_every_runs_data(home, tmp_path, monkeypatch, capsys):
    page = make_report(
        monkeypatch, tmp_path / "r.html", home / "out/ce", home / "out/cosine", "--samples=2"
    )
    d = page.document()
    assert [r["name"] for r in d["runs"]] == ["ce", "cosine"] and page.scripts["title"].startswith(
        "ce vs cosine"
    )
    assert d["runs"][0]["curves"]["train_loss"] == {"x": [0, 1, 2, 3], "y": [6.0, 5.75, 5.5, 5.25]}
    assert d["runs"][1]["curves"]["val_loss"] == {"x": [0, 4], "y": [6.0, 5.0]}
    cells = [
        dict(zip(d["summary"]["columns"], (c["text"] for c in row), strict=True))
        for row in d["summary"]["rows"]
    ]
    own = ("head", "exponent n / scale s", "above the best on this text (95 %)", "PCs for 90 %")
    assert {k: v for k, v in cells[0].items() if k not in own} == {
        k: v for k, v in cells[1].items() if k not in own
    }
    assert [c["head"] for c in cells] == ["cross_entropy", "cosine, harmonic link"] and cells[0][
        "exponent n / scale s"
    ] == "–"
    shown = {
        "exponent n / scale s": "n = 4",
        "iterations": "4",
        "best val loss": "5.0000",
        "bits/byte": "3.0000",
    }
    assert cells[1] == cells[1] | shown | {
        "kWh": "0.005",
        "g CO₂e": "3",
        "tokens/s": "100",
        "minutes": "0.4",
    }
    differences = [c["above the best on this text (95 %)"] for c in cells]
    assert differences.count("the best") == 1 and re.fullmatch(
        r"(within noise: )?[\d.]+ \(-?[\d.]+ to [\d.]+\), p (< )?[\d.]+", min(differences)
    )
    assert (
        d["paired"]["windows"] > 5
        and d["radar"] is None  # The runs are too short to rank their energy.
        and len(d["maps"]) == 2
    )
    assert set(d["maps"][0]["tokens"]) & {"king", "sun", "day"}
    assert [{x["key"]: x["values"]} for x in d["differences"]] == [
        {"head": ["cross_entropy", "cosine"]},
        {"link": ["–", "harmonic"]},
        {"learning_rate": ["0.0006", "0.001"]},
    ]
    assert len(d["samples"]) == 2 and all(
        len(texts) == 2 for s in d["samples"] for texts in s["runs"]
    )
    assert d["samples"][0]["runs"][0][0][0][1]  # some text
    few, twin = d["notes"]
    assert "has few documents (" in few and twin.startswith("No softmax twin of cosine")
    assert "commit 0123456789 with changes" in d["environments"][0]
    assert "run 2 of 2: cosine" in capsys.readouterr().err
    # Half a minute is too short for a best energy, and long enough for a best time.
    assert marked(d) >= {"minutes", "tokens/s"} and not marked(d) & {"kWh", "g CO₂e"}
    assert ("html", {"lang": "en"}) in page.elements
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]


def test_report_is_the_same_again(home, tmp_path, monkeypatch):
    for name in ("a", "b"):
        make_report(monkeypatch, tmp_path / name, home / "out/cosine", home / "out/bert")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_report_loads_nothing(home, tmp_path, monkeypatch):
    page = make_report(monkeypatch, tmp_path / "r.html", home / "out/ce")
    links = [
        a[k]
        for _, a in page.elements
        for k in ("src", "href", "srcset", "data", "action", "poster")
        if k in a
    ]
    assert links == ["data:,"]  # the icon, so that browsers ask for none
    assert not re.search(
        r"url\(|@import|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon|innerHTML",
        (tmp_path / "r.html").read_text(),
    )
    assert any("default-src 'none'" in a.get("content", "") for _, a in page.elements)


def test_report_escapes_what_comes_from_runs(home, tmp_path, monkeypatch):
    hostile = tmp_path / "<script>alert(1)<%script> & __DATA__"
    shutil.copytree(home / "out" / "ce", hostile)
    (hostile / "environment.json").write_text(
        json.dumps({"device": "</script><img src=x onerror=alert(1)>"})
    )
    page = make_report(monkeypatch, tmp_path / "r.html", hostile, home / "out/cosine")
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags
    d = page.document()
    assert (
        d["runs"][0]["name"] == hostile.name
        and "</script><img src=x onerror=alert(1)> | cpu" in dict(d["facts"]).values()
    )


def test_report_shows_bert_fills(home, tmp_path, monkeypatch):
    d = make_report(monkeypatch, tmp_path / "r.html", home / "out/ce", home / "out/bert").document()
    generated, filled = d["samples"][0]["runs"]
    assert [p[0] for p in generated[0]] == ["new"]
    kinds = [p[0] for p in filled[0]]
    assert (
        len(kinds) == 16
        and set(kinds) <= {"given", "right", "wrong"}
        and [i for i, k in enumerate(kinds) if k != "given"] == [3, 10]
    )
    assert any("may not be compared" in note for note in d["notes"])
    assert not any(c["best"] for row in d["summary"]["rows"] for c in row[3:6])


def test_excerpts_show_where_a_document_ends(tmp_path):
    folder = prepare(tmp_path / "small")
    data = load_data(folder)
    words, ids = data.load_tokenizer(), np.fromfile(folder / "val.bin", "<u2")
    ids[8::9] = data.eot_id
    ids.tofile(folder / "val.bin")
    for prompt, truth in report.excerpts(load_data(folder)):
        assert report.BOUNDARY in prompt and report.BOUNDARY in truth
        # A run reads a real end of text there, and not the letters of the mark.
        read = report.excerpt_ids(words, prompt)
        assert read.count(data.eot_id) == prompt.count(report.BOUNDARY)
        assert words.decode(read) == prompt.replace(report.BOUNDARY, words.eot_text)


def test_report_compares_bits_per_byte_only_between_tokenizers(home, tmp_path, monkeypatch):
    d = make_report(
        monkeypatch, tmp_path / "r.html", home / "out/ce", home / "out/other"
    ).document()
    assert any("only bits/byte may be compared" in note for note in d["notes"])
    best = marked(d)
    # Windows of different tokens cannot be compared one by one, so chance may explain a difference.
    assert not best & {"bits/byte", "best val loss", "final val loss", "perplexity"}


def test_report_without_data_has_curves_and_says_so(home, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(home / "out" / "ce", tmp_path / "ce")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace(str(home / "data/small"), str(home / "data/gone"))
    )
    d = make_report(monkeypatch, tmp_path / "r.html", run).document()
    told = capsys.readouterr().err
    assert "No samples: no data folder" in told and d["samples"] == [] and d["runs"][0]["curves"]
    # What is missing, and what helps.
    assert str(home / "data/gone") in told and "--dataset=FOLDER" in told
    assert make_report(
        monkeypatch, tmp_path / "r.html", run, f"--dataset={home / 'data/small'}"
    ).document()["samples"]


def test_a_checkpoint_without_an_evaluation_is_not_compared(home, tmp_path, monkeypatch):
    """A run that was stopped: the loss in the table is not that of its weights."""
    run = shutil.copytree(home / "out" / "ce", tmp_path / "stopped")
    model, _ = find_runs([str(run)])[0].load()
    weights = checkpoint.snapshot(model, torch.optim.AdamW(model.parameters()))
    shutil.rmtree(run / "ckpt")
    checkpoint.save(run, 3, weights, {"val_loss": None})
    words = [run, home / "out" / "cosine", "--samples=0"]
    d = make_report(monkeypatch, tmp_path / "r.html", *words).document()
    assert any("stopped is not compared" in note and "no evaluation" in note for note in d["notes"])
    place = d["summary"]["columns"].index("above the best on this text (95 %)")
    assert not any("(" in str(row[place]) for row in d["summary"]["rows"])


def test_numbers_that_are_not_finite_show(home, tmp_path, monkeypatch):
    run = shutil.copytree(home / "out" / "ce", tmp_path / "ce")
    lines = read_metrics(run)
    lines[2] |= {"train_loss": "nan", "grad_norm": "inf"}
    lines[-1]["val_loss"] = "nan"
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    d = make_report(monkeypatch, tmp_path / "r.html", run, home / "out/cosine").document()
    assert d["runs"][0]["curves"]["train_loss"]["y"] == [6.0, "nan", 5.5, 5.25]
    cells = dict(zip(d["summary"]["columns"], d["summary"]["rows"][0], strict=True))
    assert cells["best val loss"]["text"] == "6.0000" and any(
        "ce diverged (its last validation loss is nan)" in note for note in d["notes"]
    )
    assert "inf" in d["runs"][0]["curves"]["grad_norm"]["y"]


def test_long_curves_are_thinned_and_keep_their_extremes():
    points = [(i, float(i % 7)) for i in range(123_456)]
    points[70_000] = (70_000, -50.0)
    points[90_000] = (90_000, math.nan)
    curve = report.thin(points)
    assert (
        len(curve["x"]) == len(curve["y"]) == len(curve["lo"]) == len(curve["hi"]) <= report.POINTS
    )
    numbers = {key: [v for v in curve[key] if v != "nan"] for key in ("y", "lo", "hi")}
    assert min(numbers["lo"]) == -50.0 and max(numbers["hi"]) == 6.0
    # The point that holds NaN is NaN.
    assert all(len(v) == len(curve["x"]) - 1 for v in numbers.values())
    assert all(2.4 < m < 3.2 for m in numbers["y"])
    assert report.thin(points[:3]) == {"x": [0, 1, 2], "y": [0.0, 1.0, 2.0]}


def test_a_tokenizer_that_loses_characters_is_named(home, capsys):
    runs = find_runs([home / "out/ce", home / "out/cosine"])
    data = [run.data() for run in runs]
    words = dataclasses.replace(data[1].load_tokenizer(), unk_id=3)
    other = dataclasses.replace(data[1], tokenizer="char")
    other.load_tokenizer = lambda: words
    assert lossy(data) == [] and lossy([data[0], other]) == ["char"]
    assert "char cannot write every text" in caution(runs, [data[0], other])
    note_unknown(words, np.array([1, 3, 2, 3]), "a text")
    note_unknown(data[0].load_tokenizer(), np.array([1, 3, 2, 3]), "a text")
    assert capsys.readouterr().err.count("50.0% of the tokens of a text are unknown") == 1


def test_a_run_that_diverged_is_known_by_its_last_numbers(home):
    (run,) = find_runs([home / "out/ce"])
    rows = [{"iter": 0, "val_loss": 5.0}, {"iter": 0, "train_loss": 5.0, "grad_norm": 1.0}]
    assert summary.diverged(run, rows) is None
    rows += [{"iter": 1, "train_loss": 5.0, "grad_norm": math.inf}]
    assert summary.diverged(run, rows) == "its last gradient norm is inf"
    half = dataclasses.replace(run, config=dataclasses.replace(run.config, dtype="float16"))
    assert summary.diverged(half, rows) is None
    rows += [{"iter": 2, "train_loss": math.nan, "grad_norm": math.nan}]
    assert summary.diverged(half, rows) == "its last training loss is nan"


def test_no_two_lines_look_alike():
    heads = [("euclidean", "softmax"), ("euclidean", "softmax"), ("euclidean_squared", "softmax")]
    assert len({tuple(style.values()) for style in figures.head_styles(heads)}) == 3


@pytest.mark.parametrize("gap", [0.5, 0.001])
def test_a_loss_is_marked_only_if_the_windows_tell_it_apart(gap):
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 64))
    losses = [5 + gap * i + noise[i] for i in range(3)]
    summaries = [
        {column.key: None for column in summary.COLUMNS if hasattr(column, "key")}
        | {"best_val_loss": 5 + gap * i, "perplexity": 150.0 + i, "diverged": None}
        for i in range(3)
    ]
    agree = summary.Agreement(losses=True, work=False, energy=False, windows=True)
    table = summary.summary_table(summaries, agree, summary.paired(summaries, losses))
    marks = [[cell["best"] for cell in row] for row in table["rows"]]
    assert [any(row) for row in marks] == [gap > 0.1, False, False]
    assert summary.paired(summaries, [x[:1] for x in losses]) is None  # One window has no interval.
    summaries.append(dict(summaries[2], best_val_loss=math.nan, perplexity=math.nan))
    found = summary.paired(summaries, [*losses, np.full(64, math.nan)])
    table = summary.summary_table(summaries, agree, found)
    assert any(cell["best"] for cell in table["rows"][0]) == (gap > 0.1)
    # A run without losses may be a rival. The others are still compared.
    found = summary.paired(summaries, [*losses, None])
    assert found["noise"][3] and found["rows"][3] == ["nan"] * 3 and found["rows"][1][0] != "nan"
    for unknown in (found, None):
        table = summary.summary_table(summaries, agree, unknown)
        assert not any(cell["best"] for row in table["rows"] for cell in row)
    assert summary.paired(summaries, [losses[0], None, None, None]) is None
    # A run that diverged after a good checkpoint is no rival, and not the best.
    summaries[3]["diverged"] = "its last training loss is nan"
    found = summary.paired(summaries, [*losses, losses[0] - 1])
    assert found["best"] != 3 and not found["noise"][3]
    agree = summary.Agreement(losses=True, work=False, energy=False, windows=True)
    table = summary.summary_table(summaries, agree, found)
    assert any(cell["best"] for cell in table["rows"][0]) == (gap > 0.1)


def test_the_lead_says_only_what_the_windows_tell(home):
    runs, summaries = (
        find_runs([home / "out/ce", home / "out/cosine"]),
        [{"best_val_loss": 5.01, "diverged": None}, {"best_val_loss": 5.0, "diverged": None}],
    )
    agree = summary.Agreement(losses=True, work=True, energy=True, windows=True)

    def lead(rows, agree=agree):
        noise = [not isinstance(low, str) and low <= 0 for _, low, _ in rows or []]
        found = rows and {"best": 1, "rows": rows, "noise": noise}
        return summary.lead(runs, summaries, agree, [np.ones(3), np.ones(3)], found)

    clear = [[0.02, 0.01, 0.03], [0.0, 0.0, 0.0]]
    assert lead(None) == "" and "cosine has the lowest loss" in lead(clear)
    assert "0.020 nats/token below ce." in lead(clear)
    assert "This is one seed of each head" in lead(clear)
    assert "--head=cosine --link=softmax" in summary.without_twin(runs)
    twin = dataclasses.replace(runs[1].model_config, link="softmax")
    assert summary.without_twin([*runs, dataclasses.replace(runs[1], model_config=twin)]) is None
    assert summary.without_twin(runs[:1]) is None
    again = dataclasses.replace(runs[1], config=dataclasses.replace(runs[1].config, seed=2))
    assert "Some heads have only one seed" in summary.single_seeds([*runs, again])
    assert "one seed of each head" in summary.single_seeds([*runs, runs[1]])
    assert summary.single_seeds([runs[1], again]) is None
    assert "its difference to ce is within noise" in lead([[0.02, -0.01, 0.05], [0.0, 0.0, 0.0]])
    assert "0.0" not in lead([["nan", "nan", "nan"], [0.0, 0.0, 0.0]])
    compared, scored = {"best": 1, "rows": clear, "noise": [True, False]}, [None, np.ones(3)]
    assert "ce could not be compared." in summary.lead(runs, summaries, agree, scored, compared)
    unequal = dataclasses.replace(agree, unequal="they have not trained alike")
    assert lead(clear, unequal) == "These runs cannot be ranked: they have not trained alike."


@pytest.fixture
def diverged(monkeypatch):
    """The run `ce` loads as if it had diverged."""
    load, how = Run.load, {"what": "head"}

    def loaded(run, *words, **more):
        model, manifest = load(run, *words, **more)
        if run.name == "ce" and how["what"] == "head":
            model.head.weight.data[3] = math.nan
        elif run.name == "ce":
            model.final_norm.weight.data[3] = math.nan
        return model, manifest

    monkeypatch.setattr(Run, "load", loaded)
    return how


@pytest.mark.parametrize(
    "analysis", [bottleneck, confidence, explorer, geometry, quantization, theory]
)
def test_a_run_that_diverged_is_named(home, tmp_path, monkeypatch, diverged, analysis):
    """Also with prototypes that are finite, where it is about hidden states."""
    with pytest.raises(UserError, match="out/ce has prototypes that are not finite.*Leave it out"):
        call(analysis.main, monkeypatch, home / "out/ce", f"--out={tmp_path}/x.csv")
    if analysis in (bottleneck, theory):
        diverged["what"] = "norm"
        with pytest.raises(UserError, match="out/ce has hidden states that are not finite"):
            call(analysis.main, monkeypatch, home / "out/ce", f"--out={tmp_path}/x.csv")


def test_a_run_that_diverged_is_on_the_page(home, tmp_path, monkeypatch, diverged):

    def unknown(*_):
        raise UserError("tokenizer char does not know 'F'")

    monkeypatch.setattr("analysis.report.continuations", unknown)
    report = make_report(monkeypatch, tmp_path / "r.html", home / "out/ce", home / "out/cosine")
    notes = report.document()["notes"]
    assert any("ce has weights that are not finite" in n for n in notes)
    assert any("cosine has no samples: tokenizer char does not know" in n for n in notes)


def test_runs_of_other_data_are_named(home, monkeypatch):
    runs = find_runs([home / "out/ce", home / "out/other"])
    assert "dataset (small and other)" in unequal_settings(runs)
    # Also if all are analysed on the same data.
    runs[1].config.dataset = runs[0].config.dataset
    assert "dataset (small and other)" in unequal_settings(runs)
    monkeypatch.chdir(home / "out/ce")
    assert default_out(AnalysisConfig(), find_runs(["."]), "x") == Path("../x.csv")


def test_energy_is_not_ranked_between_machines(home, tmp_path, monkeypatch):
    run = shutil.copytree(home / "out/ce", tmp_path / "elsewhere")
    (run / "environment.json").write_text(json.dumps({"device": "another"}))
    d = make_report(monkeypatch, tmp_path / "r.html", run, home / "out/cosine").document()
    assert any("different machines" in note for note in d["notes"])
    assert not marked(d) & {"kWh", "tokens/s", "minutes"} and not d["radar"]
    changed = {"batch_size": [4, 8], "gradient_accumulation_steps": [2, 1]}
    (run / "environment.json").write_text(json.dumps({"iter": 2, "changed": changed}))
    assert uneven(find_runs([run])[0]) is None
    changed["gradient_accumulation_steps"] = [1, 1]
    (run / "environment.json").write_text(json.dumps({"iter": 2, "changed": changed}))
    d = make_report(monkeypatch, tmp_path / "r.html", run, home / "out/cosine").document()
    assert any("iterations of another size" in note for note in d["notes"])
    assert not marked(d) & {"kWh", "tokens/s", "minutes"}
    runs = find_runs([home / "out/ce", home / "out/cosine"])
    usual = {"iterations": 4, "diverged": None, "minutes": 30.0, "speed_spread": 1.0}
    summaries = [usual] * 2
    found = summary.agreement(runs, None, summaries, [{"threads": 2}, {"threads": 1}], [])
    assert not found.work and any("or threads" in note for note in found.notes)
    earlier = [{"iter": 0, "threads": 1}, None, {"iter": 2, "changed": None, "threads": 2}]
    now = {"iter": 3, "threads": 2, "earlier": earlier}
    (run / "environment.json").write_text(json.dumps(now))
    runs[1] = find_runs([run])[0]
    for second, alike in ((0, True), (1, False)):  # The second start replaces the first.
        now["earlier"][2]["iter"] = second
        (run / "environment.json").write_text(json.dumps(now))
        found = summary.agreement(runs, None, summaries, [{"threads": 2}] * 2, [])
        assert found.work == alike
    runs = find_runs([home / "out/ce", home / "out/cosine"])
    found = summary.agreement(runs, None, [usual, usual | {"speed_spread": 1.4}], [{}, {}], [])
    assert not found.work and "The speed of cosine changed while it ran" in found.notes[-2]
    other = dataclasses.replace(runs[1].config, tokenizer="char", eval_iters=1)
    runs = [runs[0], dataclasses.replace(runs[1], config=other)]
    found = summary.agreement(runs, None, summaries, [{}, {}], [])
    assert not found.work and not found.losses
    assert {"Tokens of different tokenizers", "The runs have different validation windows"} <= {
        " ".join(note.split()[:n]) for note in found.notes for n in (4, 6)
    }


def test_settings_that_a_resume_changed_are_named(home, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(home / "out/ce", tmp_path / "ce")
    changes = {"learning_rate": [5e-3, 2e-3], "batch_size": [4, 8], "text": ["a", "b"]}
    changes |= {"seed": [2, 1]}
    # No step of this start is left.
    lost = {"iter": 2, "changed": {"seed": [1, 2], "learning_rate": [1e-3, 5e-3]}}
    now = {"iter": 4, "changed": {}, "earlier": [lost, {"iter": 2, "changed": changes}]}
    (run / "environment.json").write_text(json.dumps(now))
    sentence = (
        "ce was resumed with other settings: learning_rate=0.002 from iteration 2 on (0.001"
        " before), another training text from iteration 2 on"
    )
    assert f"{sentence}." in make_report(monkeypatch, tmp_path / "r.html", run).document()["notes"]
    assert sentence in capsys.readouterr().err
    # A decay that begins after the fork is no change. A longer one is.
    for before, found in ("constant", None), ("cosine", "lr_schedule=wsd from iteration 4"):
        config = dataclasses.replace(
            find_runs([run])[0].config,
            **dict(lr_schedule="wsd", max_iters=8, decay_iters=2, warmup_iters=0),
        )
        changed_to = {"lr_schedule": [before, "wsd"], "max_iters": [4, 8], "decay_iters": [None, 2]}
        now = {"iter": 4, "changed": changed_to}
        (run / "environment.json").write_text(json.dumps(now))
        said = changed(dataclasses.replace(find_runs([run])[0], config=config))
        assert said is None if found is None else found in said


def test_energy_is_ranked_between_runs_that_are_long_enough(home):
    runs = find_runs([home / "out/ce", home / "out/cosine"])
    for minutes, ranked in ((summary.RANKED_MINUTES, True), (4.9, False), (None, False)):
        summaries = [
            {"iterations": 4, "diverged": None, "minutes": m, "bits_per_byte": m or 1.0}
            | {"components": 9, "kwh": 2.0, "speed_spread": 1.2}
            for m in (30.0, minutes)
        ]
        agree = summary.agreement(runs, None, summaries, [{}, {}], [])
        assert agree.work == (minutes is not None) and agree.energy == ranked
        found = summary.radar(summaries, dataclasses.replace(agree, losses=True))
        assert (found is not None) == ranked
        if ranked:
            assert [r["values"] for r in found] == [[1.67, 10, 10], [10, 10, 10]]


# what a user may get wrong


@pytest.mark.parametrize("main", [perplexity.main, report.main])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one run's folder or more"),
        (["{home}/out/cosin"], "no run {home}/out/cosin; did you mean {home}/out/cosine?"),
        (["{home}/nowhere/a"], "no run {home}/nowhere/a"),
        (["{home}/data/small"], "has no config.yaml"),
        (["{tmp}"], "is not a run's folder: it holds the runs {tmp}/config, {tmp}/damaged, "),
        (["{home}/out/ce", "{home}/out/ce"], "is named twice"),
        (["{tmp}/empty"], "holds no checkpoint"),
        (["{tmp}/damaged"], "does not match its sha256"),
        (
            ["{tmp}/config"],
            "{tmp}/config: config.yaml: head=cosin: unknown head; did you mean cosine?",
        ),
        (["{home}/out/ce", "--out={tmp}/no/p.csv"], "the folder {tmp}/no does not exist"),
        (["{home}/out/ce", "--device=tpux"], "unknown device"),
        (["{home}/out/ce", "--sead=1"], "unknown key"),
    ],
)
def test_bad_input_is_one_clear_message_and_nothing_is_written(
    home, tmp_path, monkeypatch, main, words, message
):
    for name in ("empty", "damaged", "config"):
        shutil.copytree(home / "out" / "ce", tmp_path / name)
    shutil.rmtree(tmp_path / "empty" / "ckpt")
    for path in tmp_path.glob("damaged/ckpt/*/model.safetensors"):
        path.write_bytes(path.read_bytes() + b"x")
    (tmp_path / "config/config.yaml").write_text("head: cosin\n")
    before = sorted(tmp_path.rglob("*"))
    filled = [w.format(home=home, tmp=tmp_path) for w in words]
    out = [] if any(w.startswith("--out") for w in words) else [f"--out={tmp_path / 'x.csv'}"]
    with pytest.raises(UserError, match=re.escape(message.format(home=home, tmp=tmp_path))):
        call(main, monkeypatch, *filled, *out)
    assert sorted(tmp_path.rglob("*")) == before


MEASURE = (
    "ann", "gpu_compile", "gpu_predict", "head", "linear_export", "parity", "precision",
    "report_page", "sampling", "scaling", "skip", "swap", "train_speed",
)  # fmt: skip


@pytest.mark.parametrize("name", [*(f"benchmarks.{name}" for name in MEASURE), "studies.toy"])
def test_a_benchmark_checks_its_file_before_it_measures(tmp_path, monkeypatch, name):
    main = pytest.importorskip(name).main
    with pytest.raises(UserError, match="the folder .*no does not exist"):
        call(main, monkeypatch, f"--out={tmp_path}/no/x.csv")


def test_a_device_is_no_result_and_a_link_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match=f"--out={path} is a (named pipe|device)"):
            writable(path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("no/target")
    with pytest.raises(UserError, match="a link that cannot be followed"):
        writable(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot be written"):
        tables.write_csv(tmp_path / "loop", [{"a": 1}])
    with pytest.raises(UserError, match="the folder .*no does not exist"):
        writable(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to("target")
    tables.write_csv(tmp_path / "link", [{"a": 1}])
    assert (tmp_path / "link").is_symlink() and "1" in (tmp_path / "target").read_text()


def test_a_folder_whose_name_is_no_utf8(home, tmp_path):
    shutil.copytree(home / "out/ce", tmp_path / "caf\udce9")
    (run,) = find_runs([str(tmp_path / "caf\udce9")])
    tables.write_csv(tmp_path / "a.csv", [{"run": run.name}])
    assert run.name == "caf\ufffd" and run.load()


def test_a_result_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    """The disk is full when the computation is over."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("base.files.fsync", full)
    path = tmp_path / "result"
    for write in (
        lambda: tables.write_csv(path, [{"a": 1}]),
        lambda: figures.save(figures.figure(1), path),
        lambda: page.write_page(path, Path(report.__file__).with_suffix(".html"), "title", {}),
    ):
        with pytest.raises(UserError, match="result cannot be written: No space left on device"):
            write()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="result cannot be written"):
        tables.append_csv(path, [{"a": 1}], ["a"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split=tset"], "unknown split; did you mean test?"),
        (["--stride=17"], "stride=17 is longer than block_size=16"),
        (["--stride=-1"], "stride=-1 must be at least 0"),
        (["--batch_size=0"], "batch_size=0 must be at least 1"),
        (["--checkpoint=last"], "unknown checkpoint"),
        (["--out={tmp}/p.png"], "p.png must end in .csv"),
    ],
)
def test_perplexity_bad_settings(home, tmp_path, monkeypatch, words, message):
    with pytest.raises(UserError, match=re.escape(message.format(home=home))):
        call(
            perplexity.main,
            monkeypatch,
            home / "out/ce",
            f"--out={tmp_path / 'p.csv'}",
            *(w.format(tmp=tmp_path) for w in words),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", None, "has no metrics.jsonl"),
        (
            "metrics.jsonl",
            '{"iter": 0, "val_loss": 1.0, "perplexity": 2.7}\n{"iter": 1, "tr\n{"iter": 2}\n',
            "line 2 is not a metrics record",
        ),
        ("metrics.jsonl", '{"iter": 0, "train_loss": 1.0}\n', "has no validation loss yet"),
        (
            "emissions.csv",
            "a,b\n1,2\n",
            r"is not a CodeCarbon table \(line 2: no energy_consumed\)",
        ),
        (
            "emissions.csv",
            "energy_consumed,emissions\n1,2\n3,4,5\n",
            r"line 3: more cells than the header",
        ),
        ("environment.json", "{", "is not JSON"),
        ("environment.json", "[1]", "is not JSON with keys and values"),
    ],
)
def test_report_damaged_runs(home, tmp_path, monkeypatch, file, content, message):
    run = shutil.copytree(home / "out" / "ce", tmp_path / "ce")
    (run / file).unlink() if content is None else (run / file).write_text(content)
    with pytest.raises(UserError, match=message):
        call(report.main, monkeypatch, run, f"--out={tmp_path / 'r.html'}", "--samples=0")
    assert not (tmp_path / "r.html").exists()


def test_a_run_of_train(tmp_path, monkeypatch, capsys):
    """The whole way: what train.py writes, both scripts read."""
    data, run = prepare(tmp_path / "data" / "small"), tmp_path / "out" / "run"
    sizes = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2".split()
    sizes += "--max_iters=3 --warmup_iters=1 --eval_iters=2".split()
    words = [
        "train.py",
        *sizes,
        "--head=cosine",
        "--compile=false",
        f"--dataset={data}",
        f"--out_dir={run}",
        "--emissions=false",
        "--device=cpu",
    ]
    trained = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    call(perplexity.main, monkeypatch, run)
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["run", "cosine", "harmonic"]
    d = make_report(monkeypatch, tmp_path / "r.html", run).document()
    curves = {
        "val_loss",
        "train_loss",
        "grad_norm",
        "grad_norm_head",
        "grad_norm_trunk",
        "prototype_radius",
        "target_distance_mean",
    }
    assert set(d["runs"][0]["curves"]) == curves | {"target_distance_min", "kl_to_softmax", "lr"}
    assert d["summary"]["rows"][0][2]["text"] == "3"  # iterations


def test_a_mistake_is_a_message_and_exit_status_2(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analysis/report.py", str(home / "out" / "cosin")])
    with pytest.raises(SystemExit) as stopped:
        cli(report.main)
    assert stopped.value.code == 2
    assert capsys.readouterr() == (
        "",
        f"python -m analysis.report: no run {home}/out/cosin; did you mean {home}/out/cosine?\n",
    )


# tables


def test_one_table_as_text_and_as_markdown():
    rows = [
        {"head": "euclidean", "loss": 1.23456, "n": None, "note": "a|b"},
        {"head": "cosine", "loss": "-2.5", "n": 28, "rate": math.nan},
    ]
    columns = ["head", Column("loss", "val loss", ".3f", "nats"), Column("n"), "note", "rate"]
    assert tables.text(rows, columns) == (
        "head       val loss, nats   n  note  rate\n"
        "euclidean           1.235   -  a|b      -\n"
        "cosine             -2.500  28  -      nan"
    )
    assert tables.markdown(rows, columns) == (
        "| head | val loss, nats | n | note | rate |\n"
        "| --- | ---: | ---: | --- | ---: |\n"
        "| euclidean | 1.235 | - | a\\|b | - |\n"
        "| cosine | -2.500 | 28 | - | nan |"
    )
    assert tables.interval(0.0123, 0.003) == "+0.012 ± 0.003"
    assert tables.interval(0.0123, math.nan) == "+0.012"


def test_a_csv_file_is_written_appended_to_and_refused(tmp_path):
    path, columns = tmp_path / "t.csv", ["a", Column("b", "B", ".2f")]
    tables.write_csv(path, [{"a": 1}, {"b": 2.5, "c": "left out"}], columns)
    assert path.read_bytes() == b"a,b\r\n1,\r\n,2.5\r\n"
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    tables.append_csv(path, [{"a": "x,y"}], columns)
    assert tables.read_csv(path, columns)[1:] == [{"a": "", "b": "2.5"}, {"a": "x,y", "b": ""}]
    with pytest.raises(UserError, match=r"t.csv has other columns \(a, b\)"):
        tables.read_csv(path, ["b", "a"])
    path.write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match="line 3 has not as many cells"):
        tables.read_csv(path)


def test_a_tokenizer_of_the_same_name_that_is_another_is_refused(tiny_data, tmp_path):
    """Its ids are valid, but stand for other tokens: every number would be wrong without a word."""
    run = make_run(tmp_path / "run", tiny_data)
    copy_tokenizer("bpe:300", tiny_data, run)
    shutil.copytree(tiny_data, tmp_path / "other")
    (found,) = find_runs([str(run)], dataset=str(tmp_path / "other"))
    assert found.data().vocab_size == 300
    train_tokenizer("bpe:300", ["quick brown foxes jump over lazy dogs " * 40], tmp_path / "other")
    with pytest.raises(UserError, match="its ids stand for other tokens"):
        found.data()
