"""README.md stays true: its commands run (smaller), its tables are the code's, its snippets
work."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, script, script_here, text

README = (ROOT / "README.md").read_text()
COMMANDS = [
    c
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for c in block.strip().splitlines()
]
# what makes a training command small enough for a test
SMALL = [
    "--n_layer=1",
    "--eval_iters=1",
    "--batch_size=2",
    "--gradient_accumulation_steps=1",
    "--max_iters=2",
    "--compile=false",
]
# needs GPUs, other machines or the hub: its flags are checked, and that the config builds a model
CHECKED_ONLY = ("gpt2_124m", "qwen2_0.5b", "--source=openwebtext", "--nnodes", "--init_from=gpt2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a fresh clone's: data/ and out/ are made by README's own commands, in order."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "results").mkdir()
    (folder / "folder").mkdir()
    (folder / "a.txt").write_text("\n\n".join(text(20)))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text(20, 1)))
    (folder / "folder/c.txt").write_text("\n\n".join(text(20, 2)))
    (folder / "prompt.txt").write_text("A city")
    return folder


def test_readme_has_commands_of_every_script():
    joined = "\n".join(COMMANDS)
    for script_name in (
        "make demo",
        "make test",
        "prepare_openwebtext.py",
        "train.py",
        "torchrun",
        "sample.py",
        "analysis.report",
    ):
        assert script_name in joined
    assert all(
        path.name in README
        for path in (ROOT / "configs").glob("*.yaml")
        if path.name != "bert_base.yaml"
    )


def test_commands_run_in_order(place):
    """One test, for each command needs what the ones before it made."""
    for source in ("demo/cross_entropy", "demo/cosine"):  # what `make demo` would have made
        prepare(place)
        head = "cross_entropy" if "entropy" in source else "cosine"
        run(
            place,
            [
                "train.py",
                "configs/demo.yaml",
                f"--head={head}",
                f"--out_dir=out/{source}",
                *SMALL,
                "--emissions=false",
            ],
        )
    for command in COMMANDS:
        words = shlex.split(command)
        if "--verify_resume" in words or words[0] == "lm_eval":
            continue  # tests/test_train.py and test_export.py run them
        if words[0] == "make":
            assert (
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode
                == 0
            )
            continue
        launcher = []
        if words[0] == "torchrun":
            split = words.index("train.py")
            launcher, words = (
                ["-m", "torch.distributed.run", *words[1:split]],
                ["python", *words[split:]],
            )
        assert words[0] == "python", command
        arguments = words[1:]
        if any(mark in command for mark in CHECKED_ONLY):
            check(arguments)
        elif arguments[0] == "prepare_openwebtext.py":
            run(place, [*arguments, "--max_documents=60", "--num_proc=1", "--overwrite=true"])
        elif arguments[0] == "train.py":
            # The model is the stored one's: only the length is cut.
            stored = "--init_from=resume" in arguments
            run(
                place,
                [
                    *launcher,
                    *arguments,
                    *([] if stored else SMALL[:-2]),
                    f"--max_iters={4 if stored else 2}",
                    "--emissions=false",
                ],
            )
        elif arguments[0] == "sample.py":
            run(place, [*arguments, "--max_new_tokens=3"])
        else:
            run(place, arguments)
    assert (place / "report.html").is_file() and (place / "out/demo/perplexity.csv").is_file()


def prepare(place):
    if not (place / "data/wiki").is_dir():
        run(
            place,
            [
                "prepare_openwebtext.py",
                "--source=wiki",
                "--tokenizer=bpe:4096",
                "--max_documents=60",
                "--num_proc=1",
            ],
        )


def run(place, words):
    if "torch.distributed.run" in words:
        done = script(*(str(ROOT / w) if w == "train.py" else w for w in words), cwd=place)
    else:
        done = script_here(*words, cwd=place)
    assert done.returncode == 0, (words, done.stderr[-2000:])


def check(arguments):
    """Parses the flags, and sizes the model without allocating it."""
    from base.command_line import parse
    from model import Model, ModelConfig
    from training.config import TrainConfig

    if arguments[0] == "prepare_openwebtext.py":
        from prepare_openwebtext import PrepareConfig

        parse(arguments[1:], PrepareConfig, words="source")
        return
    model, _ = parse(
        [str(ROOT / a) if a.endswith(".yaml") else a for a in arguments[1:]],
        ModelConfig,
        TrainConfig,
        config_file=True,
    )
    model.vocab_size = model.vocab_size or 50304
    with torch.device("meta"):
        assert Model(model).parameter_count() > 1e8


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse_and_explain_their_numbers(path):
    from base.command_line import parse
    from model import ModelConfig
    from training.config import TrainConfig

    parse([str(path)], ModelConfig, TrainConfig, config_file=True)
    for key in ("batch_size", "max_iters", "learning_rate"):
        assert key in yaml.safe_load(path.read_text())
    assert re.search(
        r"^(batch_size|gradient_accumulation_steps): .*#.*windows", path.read_text(), re.M
    )


def test_table_of_heads_is_the_codes():
    from harmonic.distances import formula_table

    assert formula_table() in README


def test_demo_numbers_are_the_measured_ones():
    import csv

    for row in csv.DictReader((ROOT / "results/demo.csv").open()):
        nats, perplexity, bits = (
            float(row[k]) for k in ("nats_per_token", "perplexity", "bits_per_byte")
        )
        assert f"| {nats:.3f} | {perplexity:.1f} | {bits:.3f} |" in README


def test_snippets_work():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (use,) = (b for b in blocks if b.startswith("from harmonic import HarmonicHead"))
    names = {"n_embd": 8, "vocab_size": 20, "h": torch.randn(3, 8), "targets": torch.arange(3)}
    exec(use, names)
    assert names["logits"].shape == (3, 20)
    torch.testing.assert_close(
        names["loss"], torch.nn.functional.cross_entropy(names["logits"], names["targets"])
    )


def test_help_lists_every_key():
    for words in (["-m", "interop.export"], ["-m", "interop.lm_eval"]):
        assert script_here(*words, "--help").stdout.count("(type:") > 2
    for words in (
        ["train.py"],
        ["sample.py"],
        ["prepare_openwebtext.py"],
        ["-m", "analysis.report"],
        ["-m", "analysis.perplexity"],
    ):
        done = script_here(*words, "--help")
        assert done.returncode == 0 and "--out" in done.stdout and done.stdout.count("(type:") > 5
    assert "manhattan" in script_here("train.py", "--help").stdout


def test_the_text_speaks_of_the_product_alone():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in tracked:
        if (
            name.endswith((".py", ".md", ".yaml", ".toml", ".txt", ".html"))
            and name != "tests/test_readme.py"
        ):
            content = (ROOT / name).read_text()
            assert str(ROOT.parent) + "/" not in content, name
    assert sys.version_info >= (3, 11)


def test_benchmark_numbers_are_the_measured_ones():
    import csv

    from benchmarks.head import markdown

    for device in ("cpu", "cuda"):
        assert (
            markdown(list(csv.DictReader((ROOT / f"results/head_{device}.csv").open()))) in README
        )
    compiled = list(csv.DictReader((ROOT / "results/gpu_compile.csv").open()))
    assert f"{len(compiled)} compilations" in README
    assert f"at most {max(int(r['spill_stores']) for r in compiled)} spilled bytes" in README


def test_tables_of_the_performance_page_are_the_measured_ones():
    import csv

    from benchmarks.precision import markdown

    page = (ROOT / "docs" / "performance.md").read_text()
    assert markdown(list(csv.DictReader((ROOT / "results/precision.csv").open()))) in page
    predicted = [
        r
        for r in csv.DictReader((ROOT / "results/gpu_predicted.csv").open())
        if r["model"] == "gpt2_124m"
    ]
    for r in predicted:
        cells = (
            r[k] for k in ("head", "precision", "head_ms", "iteration_ms", "ratio", "least_ratio")
        )
        assert f"| {' | '.join(cells)} |" in page


def test_swap_numbers_are_the_measured_ones():
    import csv

    from benchmarks.swap import markdown

    assert markdown(list(csv.DictReader((ROOT / "results/head_swap.csv").open()))) in README
    for number in ("2.1422", "4.4142"):
        assert (
            (ROOT / "results/harness.txt").read_text().count(number)
            == 2
            == README.count(f"| {number} |")
        )


def header(path) -> str:
    return path.read_text().partition("\n")[0]


def test_the_benchmark_runs(tmp_path):
    done = script(
        "-m",
        "benchmarks.head",
        "cosine",
        "canberra",
        "--sizes=16x50x8",
        "--rounds=1",
        f"--out={tmp_path / 'b.csv'}",
    )
    # Two heads, two peers of cosine.
    assert done.returncode == 0 and (tmp_path / "b.csv").read_text().count("\n") == 5, done.stderr
    assert header(tmp_path / "b.csv") == header(ROOT / "results/head_cpu.csv")
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_the_skip_benchmark_runs(tmp_path):
    done = script(
        "-m",
        "benchmarks.skip",
        "--N=16",
        "--rounds=1",
        "--skips=1e-6,0.1",
        f"--out={tmp_path / 's.csv'}",
    )
    assert done.returncode == 0 and (tmp_path / "s.csv").read_text().count("\n") == 3, done.stderr
    assert header(tmp_path / "s.csv") == header(ROOT / "results/skip.csv")
