"""README.md, docs/ and results/ stay true: their commands parse, their links lead somewhere, their
tables are the measured ones, and one short chain of commands runs."""

import csv
import functools
import importlib
import json
import logging
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, script_here, text

from base import command_line
from base.command_line import parse
from model import Model, ModelConfig
from training.config import TrainConfig

RESULTS = sorted((ROOT / "results").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += RESULTS
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LAUNCHERS = ("make", "torchrun", "python", "lm_eval", "cp", "pytest", "source", "pip")


def page(name: str) -> str:
    return (ROOT / name).read_text()


def rows(name: str) -> list[dict]:
    with (ROOT / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def blocks(path: Path, language: str) -> list[str]:
    return [body for name, body in FENCED.findall(path.read_text()) if name == language]


def commands() -> list[tuple[str, str]]:
    """(page, command): lines of bash blocks, commands in other blocks and between backticks."""
    found = []
    for path in PAGES:
        lines = "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
        plain = "".join(blocks(path, "")).replace("\\\n", " ")
        lines += re.findall(
            r"^(?:\$ )?(?!python -m [\w.]+:)((?:python|make|torchrun) .*)$", plain, re.M
        )
        prose = FENCED.sub("", path.read_text())
        lines += re.findall(r"`((?:python|torchrun|make) [^`\n]+)`", prose)
        found += [(path.name, line) for line in lines if line.strip()]
    return found


class Parsed(Exception):
    """A command line has been read without a complaint."""


def check_script(words: list[str], monkeypatch):
    """Lets a script read its command line, and stops it there. Files need not exist."""
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    module = importlib.import_module(name)
    if name == "train":
        return check_training(words[1:])

    def read(argv, *schemas, **how):
        argv = ["configs/demo.yaml" if word == "my.yaml" else word for word in argv]
        parse(argv, *map(unchecked, schemas), **how)
        raise Parsed

    # Benchmarks import it when they run.
    holder = module if hasattr(module, "parse") else command_line
    with monkeypatch.context() as patched, pytest.raises(Parsed):
        patched.setattr(holder, "parse", read)
        patched.setattr(sys, "argv", [name, *words[1 + (words[0] == "-m") :]])
        module.main()


@functools.cache
def unchecked(schema):
    """A script's settings without its own checks, which look for files."""
    copy = make_dataclass(schema.__name__, (), bases=(schema,))
    copy.__doc__, copy.problems = "", no_problems
    return copy


def no_problems(_) -> list[str]:
    return []


def check_training(arguments: list[str]):
    """Reads the settings and checks them. Sizes a model on the hub's scale without allocating."""
    model, _ = parse(arguments, ModelConfig, TrainConfig, config_file=True)
    if any("gpt2_124m" in word or "qwen2_0.5b" in word for word in arguments):
        model.vocab_size = model.vocab_size or 50304
        with torch.device("meta"):
            assert Model(model).parameter_count() > 1e8


def test_every_command_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Building a parser takes longest.
    monkeypatch.setattr(command_line, "_parser", functools.cache(command_line._parser))
    targets = set(re.findall(r"^([\w-]+):", page("Makefile"), re.M))
    checked = set()
    for where, command in commands():
        words = shlex.split(command.partition(" #")[0])
        if words[0] == "torchrun" and "train.py" in words:
            words = ["python", *words[words.index("train.py") :]]
        assert words[0] in LAUNCHERS, (where, command)
        if words[0] == "make":
            assert set(words[1:]) <= targets, (where, command)
        if words[0] != "python" or words[1] == "-c" or words[1:3] == ["-m", "venv"]:
            continue
        if words[-1] == "--help" or words[1:] == ["-m", "analysis"]:
            continue
        try:
            check_script(words[1:], monkeypatch)
        except Exception as error:
            raise AssertionError(f"{where}: {command}") from error
        checked.add(words[2] if words[1] == "-m" else words[1])
    for name in ("prepare_openwebtext.py", "train.py", "sample.py", "analysis.report"):
        assert name in checked


@pytest.mark.parametrize("folder", ["analysis", "studies", "benchmarks", "interop"])
def test_a_folder_lists_its_scripts(folder):
    done = script_here("-m", folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    listed = done.stdout
    for path in (ROOT / folder).glob("*.py"):
        is_script = '\nif __name__ == "__main__":' in path.read_text()
        assert is_script == (f"python -m {folder}.{path.stem}\n    " in listed), path


def test_a_word_after_a_folder_is_refused():
    done = script_here("-m", "analysis", "report", "out/a")
    assert done.returncode == 2 and "write python -m analysis.report" in done.stderr


def test_every_flag_in_prose_exists():
    """`--flag` between backticks is a flag of some script that the pages speak of."""
    known = {"key", "help"}  # and those of torchrun
    known |= {"max-restarts", "rdzv_conf", "rdzv_id", "shutdown-timeout", "signals-to-handle"}
    for name in ("model", "sample", "prepare_openwebtext", "training.config"):
        known |= names_of(importlib.import_module(name))
    for room in ("analysis", "benchmarks", "interop", "studies"):
        for path in (ROOT / room).glob("*.py"):
            if "class " in path.read_text() and "Config" in path.read_text():
                known |= names_of(importlib.import_module(f"{room}.{path.stem}"))
    for path in PAGES:
        prose = FENCED.sub("", path.read_text())
        for flag in re.findall(r"`--([a-zA-Z][\w-]*)", prose):
            assert flag in known, (path.name, flag)


def names_of(module) -> set[str]:
    configs = (c for n, c in vars(module).items() if n.endswith("Config") and is_dataclass(c))
    return {f.name for c in configs for f in fields(c)}


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_and_anchors_lead_somewhere():
    for path in (*PAGES, ROOT / "CHANGELOG.md"):
        prose = FENCED.sub("", path.read_text())
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if link.startswith(("http://", "https://")):
                continue
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), (path.name, link)
            assert not anchor or anchor in anchors(target), (path.name, link)


def test_readme_is_short_and_names_every_page():
    readme = page("README.md")
    assert readme.count("\n") <= 150
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.name}" in readme or path.name == "reference.md", path.name
    pages = "".join(path.read_text() for path in PAGES)
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{path.name}" in pages, path.name


def test_blocks_of_python_compile():
    for path in PAGES:
        for block in blocks(path, "python"):
            if not path.name.startswith("add_a"):  # parts of a file
                compile(block, path.name, "exec")


def test_head_snippets_run(capsys):
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(snippet, {})
    assert "tensor([" in capsys.readouterr().out
    (snippet,) = blocks(ROOT / "docs/heads.md", "python")
    names = {}
    exec(snippet, names)
    assert names["logits"].shape == (3, 100)
    expected = torch.nn.functional.cross_entropy(names["logits"], names["targets"])
    torch.testing.assert_close(names["loss"], expected)
    torch.testing.assert_close(names["same"], expected)


def test_swap_save_and_load_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (snippet,) = (b for b in blocks(ROOT / "docs/interop.md", "python") if "load_swapped" in b)
    exec(snippet, {})
    assert "torch.Size([1, 3, 500])" in capsys.readouterr().out


def test_a_chain_of_commands_runs(tmp_path):
    """README's four lines for your own text, and a sample: with a tiny model."""
    path = tmp_path / "mytext.txt"
    path.write_text("\n\n".join(text(300)))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = blocks(ROOT / "README.md", "bash")
    (own,) = (b for b in lines if "data/mine" in b)
    (sample,) = (
        c for b in lines for c in b.splitlines() if "sample.py --out_dir=out/manhattan" in c
    )
    sample = sample.replace("out/manhattan", "out/mine/cosine-softmax") + " --max_new_tokens=3"
    for command in (*own.splitlines(), sample):
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "train.py":
            words += [f"--{key}={value}" for key, value in TINY.items()]
        if words[0] == "prepare_openwebtext.py":
            words = [w.replace("bpe:4096", "bpe:300") for w in words] + ["--num_proc=1"]
        done = script_here(*words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr[-2000:])
    assert (tmp_path / "report.html").is_file() and "The city of" in done.stdout
    recorded = (tmp_path / "out/mine/cosine-softmax/metrics.jsonl").read_text().splitlines()
    assert all("iter" in json.loads(line) for line in recorded)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse_and_explain_their_numbers(path):
    parse([str(path)], ModelConfig, TrainConfig, config_file=True)
    # How long the runs of studies.advise take is what its user says.
    keys = {"batch_size", "max_iters", "learning_rate"}
    for key in keys - ({"max_iters"} if path.name == "advise.yaml" else set()):
        assert key in yaml.safe_load(path.read_text())
    assert re.search(
        r"^(batch_size|gradient_accumulation_steps): .*#.*windows", path.read_text(), re.M
    )


def test_help_lists_every_key(monkeypatch, capsys):
    """In this process; one script for real."""
    for name in ("sample", "interop.export", "analysis.report", "analysis.perplexity"):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            module.main()
        assert capsys.readouterr().out.count("default: ") > 2
    done = script_here("train.py", "--help")
    assert done.stdout.startswith("usage: python train.py [CONFIG.yaml] [--key=value ...]\n")
    words = " ".join(done.stdout.split())
    assert "manhattan" in words and words.count("default: ") > 60
    assert "BERT or Qwen2 style (default: gpt)" in words
    assert "(gelu or gelu_tanh or null, default: null)" in words
    assert "type: " not in words and "Optional" not in words and "Union" not in words


def test_the_text_speaks_of_the_product_alone():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in tracked:
        if (
            name.endswith((".py", ".md", ".yaml", ".toml", ".txt", ".html"))
            and name != "tests/test_readme.py"
        ):
            assert str(ROOT.parent) + "/" not in page(name), name
    assert sys.version_info >= (3, 11)


def test_the_version_is_the_same_everywhere():
    from harmonic import __version__

    assert yaml.safe_load(page("CITATION.cff"))["version"] == __version__
    assert f"## [{__version__}]" in page("CHANGELOG.md")


def test_table_of_heads_is_the_codes():
    from harmonic.distances import HEADS, formula_table

    command = 'python -c "from harmonic.distances import formula_table; print(formula_table())"'
    assert formula_table() in page("docs/heads.md"), (
        f"paste the table there that this prints: {command}"
    )
    named = set(re.findall(r"`(\w+)`", page("harmonic/README.md")))
    assert not HEADS.keys() - named, "harmonic/README.md lists all heads"


def test_demo_numbers_are_the_measured_ones():
    *shown, small_start = rows("demo.csv")
    assert f"cross-entropy ends at {float(small_start['nats_per_token']):.3f}" in page("README.md")
    for row in shown:
        nats, perplexity, bits = (
            float(row[k]) for k in ("nats_per_token", "perplexity", "bits_per_byte")
        )
        assert f"| {nats:.3f} | {perplexity:.1f} | {bits:.3f} |" in page("README.md")


TABLE = re.compile(r"<!-- table: .*?<!-- end -->", re.S)
INTERVAL = re.compile(r"([+-]?)(\d+\.\d+)\s±\s(\d+\.\d+)")


def test_intervals_in_words_are_those_of_the_tables():
    """Of README.md and results/, with their signs if they have any. History quotes old numbers."""
    tables = "".join(found for path in RESULTS for found in TABLE.findall(path.read_text()))
    known = [(sign, float(mean), float(half)) for sign, mean, half in INTERVAL.findall(tables)]
    checked = 0
    for path in (ROOT / "README.md", *RESULTS):
        if path.name == "history.md":
            continue
        for sign, mean, half in INTERVAL.findall(TABLE.sub("", path.read_text())):
            form = f".{len(mean.partition('.')[2])}f"
            shown = {
                (format(m, form), format(h, form)) for s, m, h in known if not sign or s == sign
            }
            assert (mean, half) in shown, (path.name, sign, mean, half)
            checked += 1
    assert checked > 40


def test_benchmark_numbers_are_the_measured_ones():
    from benchmarks.head import markdown

    performance = page("docs/performance.md")
    for device in ("cpu", "cuda"):
        assert markdown(rows(f"head_{device}.csv")) in performance
    compiled = rows("gpu_compile.csv")
    assert f"{len(compiled)} compilations" in performance
    spilled = max(int(r["spill_stores"]) for r in compiled)
    assert f"at most {spilled} spilled bytes" in performance


def test_tables_of_the_performance_page_are_the_measured_ones():
    from benchmarks.precision import markdown

    assert markdown(rows("precision.csv")) in page("docs/performance.md")
    for r in rows("gpu_predicted.csv"):
        keys = ("head", "precision", "head_ms", "iteration_ms", "ratio", "least_ratio")
        if r["model"] == "gpt2_124m":
            cells = " | ".join(r[k] for k in keys)
            assert f"| {cells} |" in page("docs/performance.md")


def test_swap_numbers_are_the_measured_ones():
    from benchmarks.swap import markdown

    interop = page("docs/interop.md")
    assert markdown(rows("head_swap.csv")) in interop
    for number in ("2.1422", "4.4142"):
        assert page("results/harness.txt").count(number) == 2 == interop.count(f"| {number} |")


def header(path) -> str:
    return path.read_text().partition("\n")[0]


@pytest.mark.parametrize(
    ("head", "rows"),
    # cosine has two peers, which torch compiles.
    [("canberra", 1), pytest.param("cosine", 3, marks=pytest.mark.slow)],
)
def test_the_benchmark_runs(tmp_path, head, rows):
    words = ["benchmarks.head", head, "--sizes=16x50x8", "--rounds=1"]
    done = script_here("-m", *words, f"--out={tmp_path / 'b.csv'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.csv").read_text().count("\n") == 1 + rows
    assert header(tmp_path / "b.csv") == header(ROOT / "results/head_cpu.csv")
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_the_skip_benchmark_runs(tmp_path):
    words = ["benchmarks.skip", "--N=16", "--rounds=1", "--skips=1e-6,0.1"]
    done = script_here("-m", *words, f"--out={tmp_path / 's.csv'}")
    assert done.returncode == 0 and (tmp_path / "s.csv").read_text().count("\n") == 3, done.stderr
    assert header(tmp_path / "s.csv") == header(ROOT / "results/skip.csv")


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_the_notebook_shows_what_its_cells_print(monkeypatch, tmp_path):
    """Runs its code cells in one namespace. Losses may differ by what another machine rounds."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    from notebook import load, run_cells

    monkeypatch.chdir(tmp_path)
    quickstart = load(ROOT / "docs/quickstart.ipynb")
    cells = [c for c in quickstart["cells"] if c["cell_type"] == "code"]
    found = run_cells(quickstart)
    logging.disable(logging.NOTSET)
    for cell, outputs in zip(cells, found, strict=True):
        assert [o["output_type"] for o in outputs] == [o["output_type"] for o in cell["outputs"]]
        printed, stored = (
            "".join(line for o in shown for line in o.get("text", []))
            for shown in (outputs, cell["outputs"])
        )
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", stored)
        numbers = [[float(n) for n in NUMBER.findall(text)] for text in (printed, stored)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.01)
    pictures = [o for c in cells for o in c["outputs"] if "data" in o]
    assert pictures and sum(len(p["data"]["image/png"]) for p in pictures) < 150_000
