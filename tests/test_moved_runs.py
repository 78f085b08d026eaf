"""Runs that another machine or another version has written: resumed, sampled, exported and
analysed."""

import shutil

import pytest
import yaml
from conftest import TINY, script_here

from training import checkpoint
from training.emissions import energy

READERS = {
    "resume": ("train.py", "--init_from=resume", "--max_iters=4", "--out_dir=RUN"),
    "start": (
        "train.py",
        "--init_from=RUN",
        "--eval_only",
        "--out_dir=new",
        "--dataset=DATA",
        "--compile=false",
    ),
    "sample": ("sample.py", "--out_dir=RUN", "--max_new_tokens=2", "--start=the"),
    "export": ("-m", "interop.export", "RUN", "--to=exported"),
    "perplexity": ("-m", "analysis.perplexity", "RUN"),
    "gradients": ("-m", "analysis.gradients", "RUN"),
}


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A run of two iterations."""
    folder = tmp_path_factory.mktemp("moved") / "run"
    flags = {**TINY, "dataset": tiny_data, "out_dir": folder, "head": "cosine", "device": "cpu"}
    done = script_here("train.py", *(f"--{key}={value}" for key, value in flags.items()))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def call(tiny_data, tmp_path):
    """call("sample.py", "--out_dir=RUN", ...) in tmp_path, where the run is `run`."""
    return lambda *words: script_here(
        *(str(word).replace("RUN", "run").replace("DATA", str(tiny_data)) for word in words),
        cwd=tmp_path,
    )


def copy(trained, tmp_path, **settings):
    """Copies the run to tmp_path/run, with other settings in its config.yaml; None removes one."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(trained, run)
    stored = yaml.safe_load((run / "config.yaml").read_text()) | settings
    (run / "config.yaml").write_text(
        yaml.safe_dump({k: v for k, v in stored.items() if v is not None})
    )
    return run


def test_a_run_is_resumed_where_it_lies_now(trained, call, tmp_path, tiny_data):
    """Its config.yaml names folders of another machine."""
    run = copy(trained, tmp_path, dataset="/elsewhere/tiny", out_dir=str(trained))
    done = call(*READERS["resume"])
    assert (
        done.returncode == 2
        and "no data folder /elsewhere/tiny" in done.stderr
        and "--dataset=FOLDER" in done.stderr
    )
    before = sorted(path.name for path in (trained / "ckpt").iterdir())
    (tmp_path / "out").mkdir()
    shutil.move(run, tmp_path / "out/run")  # the default out_dir, which the command need not name
    done = call("train.py", "--init_from=resume", "--max_iters=4", "--dataset=DATA")
    assert done.returncode == 0, done.stderr
    assert (
        f"note: resumed with dataset={tiny_data} (was /elsewhere/tiny), max_iters=4 (was 2)"
        in done.stderr
    )
    assert checkpoint.last(tmp_path / "out/run") == "iter_000004"
    assert sorted(path.name for path in (trained / "ckpt").iterdir()) == before
    assert yaml.safe_load((tmp_path / "out/run/config.yaml").read_text())["out_dir"] == "out/run"


@pytest.mark.parametrize("name", ["perplexity", "geometry"])
def test_an_analysis_takes_the_place_of_the_data(trained, call, tmp_path, name):
    copy(trained, tmp_path, dataset="/elsewhere/tiny")
    done = call("-m", f"analysis.{name}", "RUN")
    assert (
        done.returncode == 2
        and "no data folder /elsewhere/tiny" in done.stderr
        and "--dataset=FOLDER" in done.stderr
    )
    assert not list(tmp_path.glob("*.csv"))
    done = call("-m", f"analysis.{name}", "RUN", "--dataset=DATA")
    assert done.returncode == 0 and (tmp_path / f"{name}.csv").exists(), done.stderr


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_settings_of_another_version(trained, call, tmp_path, name, every):
    """One that is no more is ignored, one that was not yet known has its default, one that is no
    longer valid is named: each kind by a resumed run, one of them by each other reader in turn."""
    copy(trained, tmp_path, warp_speed=9, beta2=None, head_skip=None, emissions_country=None)
    done = call(*READERS[name])
    assert done.returncode == 0, done.stderr
    kinds = [("head", "hyperbolic"), ("n_layer", "three"), ("head_p", 3)]
    turn = list(READERS).index(name)
    for key, value in kinds if every or name == "resume" else kinds[turn % 3 :][:1]:
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)
        copy(trained, tmp_path, **{key: value})
        done = call(*READERS[name])
        message = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and str(value) in message, (
            key,
            done.stderr,
        )


def test_evaluation_reads_no_training_data_so_its_order_does_not_matter(trained, call, tmp_path):
    copy(trained, tmp_path)
    done = call(
        "train.py",
        "--init_from=resume",
        "--out_dir=RUN",
        "--eval_only",
        "--batch_size=8",
        "--seed=5",
    )
    assert done.returncode == 0 and "val_loss" in done.stdout, done.stderr


def test_a_run_that_begins_again_keeps_what_it_has_used(trained, call, tmp_path, tiny_data):
    """Killed before its first checkpoint, then `auto`; only --overwrite deletes what was
    measured."""
    run = copy(trained, tmp_path)
    shutil.rmtree(run / "ckpt")
    (run / "emissions.csv").write_text("duration,emissions,energy_consumed\n30,0.001,0.002\n")
    flags = [
        f"--{key}={value}"
        for key, value in {**TINY, "dataset": tiny_data, "out_dir": "run"}.items()
    ]
    done = call("train.py", *flags, "--init_from=auto")
    assert done.returncode == 0 and "starting again" in done.stdout, done.stderr
    assert energy(run)["energy_consumed"] == pytest.approx(0.002)
    assert call("train.py", *flags, "--overwrite=true").returncode == 0
    assert energy(run) is None
