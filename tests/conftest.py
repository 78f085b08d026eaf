"""Small prepared data and helpers to run the scripts as a user does, in this process or as real
ones."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure():
    """A shell's background job ignores Ctrl-C, and so would all that the tests start."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


WORDS = "the a small old king river house film music red blue city war light".split()
WORDS += "sings saw made near with and of in was".split()


def text(documents: int, seed: int = 0) -> list[str]:
    """Documents of random words with a bigram structure that a tiny model can learn."""
    import random

    rng = random.Random(seed)
    out = []
    for _ in range(documents):
        i, words = rng.randrange(len(WORDS)), []
        for _ in range(60):
            words.append(WORDS[i])
            i = (i * 3 + rng.choice((1, 2, 5))) % len(WORDS)
        out.append(" ".join(words) + ".")
    return out


def script(*words, cwd=ROOT, env=None, **kw):
    """Runs `python WORDS...` as a user would -> CompletedProcess with text output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **kw,
    )


def script_here(*words, cwd=ROOT):
    """The same in this process, which has imported torch already: a new one takes seconds to."""
    import torch

    arguments, out, err, status = [str(w) for w in words], io.StringIO(), io.StringIO(), 0
    module, argv, threads = arguments[0] == "-m", sys.argv, torch.get_num_threads()
    torch.set_num_threads(1)  # As in `script`: with another number, last bits differ.
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            sys.argv = arguments[module:]
            if module:
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A prepared folder: bpe:300 on 300 documents of about 80 tokens."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "text.jsonl"
    import json

    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in text(300)))
    out = folder / "tiny"
    done = script_here(
        "prepare_openwebtext.py",
        f"--source={source}",
        "--tokenizer=bpe:300",
        f"--out_dir={out}",
        "--num_proc=1",
        "--val_fraction=0.1",
    )
    assert done.returncode == 0, done.stderr
    return out


TINY = dict(
    n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, max_iters=2, warmup_iters=1,
    eval_iters=2, eval_interval=100,
    log_interval=1, compile=False, emissions=False, learning_rate=1e-3,
)  # fmt: skip


def start_training(tmp_path, tiny_data, processes=1, torchrun=(), saved=True, **flags):
    """A real training process in a process group of its own, once it has a checkpoint (or, not
    `saved`, metrics) -> Popen."""
    from training import checkpoint
    from training.distributed import launcher

    settings = {
        **TINY,
        "dataset": tiny_data,
        "max_iters": 100_000,
        "eval_interval": 20,
        "out_dir": tmp_path / "run",
        **flags,
    }
    process = subprocess.Popen(
        [
            sys.executable,
            *launcher(processes, *torchrun),
            "train.py",
            *(f"--{k}={v}" for k, v in settings.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (
        checkpoint.manifests(tmp_path / "run")
        if saved
        else (tmp_path / "run/metrics.jsonl").exists()
    ):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


@pytest.fixture
def train(tiny_data, tmp_path, monkeypatch, capsys):
    """train(head="cosine", ...) -> (exit status, stdout, stderr), run in this process with tiny
    settings; words may be a config file."""
    import train as script_module
    from base import command_line

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.advice.idle_cores", lambda: 1.0)  # It looks for 0.1 s.

    def run(*words, **flags):
        settings = {"dataset": str(tiny_data), "out_dir": "run", **TINY, **flags}
        arguments = [f"--{k}={v}" for k, v in settings.items() if v is not None]
        monkeypatch.setattr(sys, "argv", ["train.py", *words, *arguments])
        capsys.readouterr()
        command_line._note_once.cache_clear()  # each run is a process of its own to a user
        status = 0
        try:
            command_line.cli(script_module.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
