"""Bad input to train.py, and the notes about slow or senseless settings."""

import errno
import os
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, TINY, script

from base import machine
from base.errors import UserError
from harmonic import HarmonicHead
from model import ModelConfig
from text.token_files import load_data
from training import advice, distributed
from training.config import TrainConfig
from training.distributed import launcher


def test_tensorboard_and_wandb_ask_for_their_packages(train, tmp_path, monkeypatch):
    monkeypatch.setattr("training.metrics.installed", lambda package: False)
    status, _, err = train(tensorboard=True, wandb=True)
    assert (
        status == 2
        and "pip install tensorboard" in err
        and "pip install wandb" in err
        and not (tmp_path / "run").exists()
    )


BAD = {
    "unknown key": (dict(n_layr=3), ["n_layr: unknown key", "did you mean n_layer?"]),
    "negative theta": (dict(arch="qwen", rope_theta=-1), ["rope_theta=-1.0 must be positive"]),
    "negative std": (
        dict(head_init_std=-1, dropout=2),
        ["2 problems", "head_init_std=-1.0 must be positive", "dropout=2.0 is not in"],
    ),
    "huge timeout": (dict(timeout=1e300), ["timeout=1e+300 is above 2,000,000 seconds"]),
    "no numbers": (
        dict(learning_rate=".inf", grad_clip="1e400", max_iters="1:30"),
        [
            "3 problems",
            "learning_rate=.inf: expected a number",
            "grad_clip=1e400: expected a number",
            "max_iters=1:30: expected a whole",
        ],
    ),
    "no such source": (dict(source="nowhere/x"), ["source=nowhere/x"]),
    "unknown head": (dict(head="euclidian"), ["unknown head", "did you mean euclidean?"]),
    "another name": (dict(head="softmax"), ["unknown head", "did you mean cross_entropy?"]),
    "unknown arch": (dict(arch="gtp"), ["unknown arch", "did you mean gpt?"]),
    "unknown link": (dict(link="softmx"), ["unknown link", "did you mean softmax?"]),
    "wrong type": (dict(n_layer="three"), ["n_layer=three: expected a whole number"]),
    "wrong type, float": (dict(learning_rate="fast"), ["learning_rate=fast: expected a number"]),
    "wrong type, bool": (dict(compile="maybe"), ["compile=maybe: expected true or false"]),
    "several": (
        dict(n_layr=3, arch="gtp", learning_rate="x"),
        ["3 problems", "n_layr", "gtp", "learning_rate=x"],
    ),
    "n_embd and n_head": (dict(n_embd=15), ["n_embd=15 is not divisible by n_head=2"]),
    "n_head and n_kv_head": (
        dict(arch="qwen", n_head=8, n_kv_head=3),
        ["n_head=8 is not divisible by n_kv_head=3"],
    ),
    "block_size": (
        dict(block_size=10_000_000),
        ["block_size=10000000 is too long", "train.bin", "val.bin"],
    ),
    "no data": (dict(dataset="nowhere"), ["no data folder", "nowhere", "prepare_openwebtext.py"]),
    "no folder": (
        dict(dataset=__file__),
        ["test_settings.py is a file, not a data folder", "--out_dir=data/test_settings"],
    ),
    "home": (dict(dataset="~/nowhere"), [f"no data folder {Path.home()}/nowhere"]),
    "vocab_size": (dict(vocab_size=64), ["vocab_size=64 is smaller than the data's 300"]),
    "tokenizer": (dict(tokenizer="gpt2"), ["tokenizer=gpt2", "prepared with bpe:300"]),
    "eot_id": (
        dict(doc_mask=True, eot_id=9999),
        [
            "eot_id=9999 is not a token of bpe:300, which has ids below 300: leave --eot_id out"
            " to use the data's, 0"
        ],
    ),
    "resume and overwrite": (
        dict(init_from="auto", overwrite=True),
        ["overwrite=true deletes the run in run, and init_from=auto resumes it"],
    ),
    "resume nothing": (dict(init_from="resume", out_dir="empty"), ["empty holds no checkpoint"]),
    "exponent": (dict(head="cosine", exponent=-1), ["exponent must be a positive number"]),
    "exponent, text": (
        dict(head="cosine", exponent="dims"),
        ["exponent=dims: expected a number, dim/4, sqrt_dim, dim, 2dim or 4dim"],
    ),
    "useless option": (
        dict(head="manhattan", head_p=2),
        ["head_p=2 does nothing with head=manhattan"],
    ),
    "no cuda": (dict(device="cuda"), ["device=cuda: this machine has no CUDA device"]),
    "unknown device": (dict(device="gpu"), ["unknown device"]),
    "batch_size": (dict(batch_size=0), ["batch_size=0 must be at least 1"]),
    "learning_rate": (dict(learning_rate=0), ["learning_rate=0.0 must be positive"]),
    "max_iters": (dict(max_iters=-1), ["max_iters=-1"]),
    "min_lr": (dict(min_lr=-1), ["min_lr=-1.0 must be at least 0"]),
    "seed": (dict(seed=99999999999), ["seed=99999999999 is not in"]),
    "country": (dict(emissions_country="XX"), ["three letters"]),
    "unknown country": (
        dict(emissions=True, emissions_country="ZZZ"),
        ["emissions_country=ZZZ: CodeCarbon knows no such country"],
    ),
    "link of a control": (
        dict(head="cross_entropy", link="softmax"),
        ["link=softmax does nothing with head=cross_entropy"],
    ),
    "exponent of a control": (
        dict(head="cross_entropy", exponent=3),
        ["exponent=3.0 does nothing with head=cross_entropy: a control has no distance"],
    ),
    "scale of a harmonic link": (
        dict(head="cosine", scale=16),
        ["train.py: head=cosine: scale=16.0 is for the softmax link: set link=softmax too"],
    ),
    "names that are not read": (
        dict(head="cosin", link="sofmax", scale=16, max_iters=-5),
        ["3 problems", "did you mean cosine?", "did you mean softmax?", "max_iters=-5"],
    ),
    "rope of gpt": (dict(rope_theta=1e4), ["rope_theta=10000.0 is for arch=qwen"]),
    "meta device": (dict(device="meta"), ["unknown device"]),
    "out_dir under a file": (
        dict(out_dir="/dev/null/x"),
        ["out_dir=/dev/null/x cannot be written"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(train, tmp_path, case):
    flags, words = BAD[case]
    status, out, err = train(**flags)
    assert status == 2 and out == ""
    assert err.startswith("train.py: ") and "Traceback" not in err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer: [1", "is not YAML"),
        ("- 1\n- 2\n", "expected flat"),
        ("model:\n  n_layer: 2\n", "expected flat"),
        ("n_layers: 2\n", "did you mean n_layer?"),
        ("seed: 1\nn_layer: 2\nseed: 2\n", "seed is given 2 times"),
        ("<<: {seed: 1}\n<<: {n_layer: 2}\nnonsense: 1\n", "nonsense: unknown key"),
        ("wandb: !!map foo\n", "is not YAML"),
        ("5: 2\n", "5 is not the name of a setting"),
        ("tokenizer: 123\n", "tokenizer: YAML reads the value as 123, which is not a text"),
        ("sample_interval: 1:30\n", "sample_interval=1:30: expected a whole"),
        ("weight_decay: .inf\n", "weight_decay=.inf: expected a number"),
        ("n_layer: !!int\n", "is not YAML"),
        ("wandb: !!bool maybe\n", "is not YAML"),
        ("a: !!timestamp b\n", "is not YAML"),
        ("seed: " + 3000 * "[", "is nested too deeply"),
        ("init_from: true\n", "init_from: YAML reads the value as True"),
        ("head:\n", "head=null: unknown head"),
        ("wandb: 2024-01-01\n", "expected true or false"),
        (None, "no config file"),
    ],
)
def test_bad_config_file(train, tmp_path, text, words):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    status, _, err = train(str(path))
    assert status == 2 and words in err and not (tmp_path / "run").exists()


def test_a_config_file_that_cannot_be_read(train, tmp_path, monkeypatch):
    """A folder with its name is no suggestion for it."""
    (tmp_path / "c.yaml").mkdir()
    status, _, err = train("c.yaml")
    assert status == 2 and "no config file c.yaml" in err and "mean c.yaml" not in err
    (tmp_path / "d.yaml").write_text("")

    def closed(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_text", closed)
    status, _, err = train("d.yaml")
    assert status == 2 and "d.yaml cannot be read: Permission denied" in err


def test_two_positional_words(train):
    status, _, err = train(str(ROOT / "configs/demo.yaml"), "more")
    assert status == 2 and "unexpected word 'more'" in err


SLOW = [
    (dict(dtype="bfloat16"), {}, {}, "no bfloat16 instructions"),
    (dict(dtype="float16"), {}, {}, "float16 is slower than float32 on a CPU"),
    ({}, {}, dict(compile=True), "compiling takes"),
    (dict(flops=1e14), {}, {}, "configs/demo.yaml is a model for CPUs"),
    ({}, dict(head="euclidean", head_impl="dense"), {}, "head_impl=dense is slower"),
    ({}, dict(head="manhattan", head_impl="chunked"), {}, "head_impl=chunked is slower"),
    ({}, dict(head="canberra", head_skip=0.0), {}, "head_skip=0 computes"),
    (dict(device="xpu"), dict(head="canberra"), {}, "canberra has no compiled kernel here"),
    (
        {},
        dict(head="cosine", head_precision="split"),
        {},
        "without CUDA, head_precision=split is emulated",
    ),
    (
        dict(device="cuda"),
        dict(head="cosine", head_precision="float32"),
        {},
        "with head_precision=float32 the head does not use tensor cores",
    ),
]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(head="cosine"), "multiplies in float32"),
        (dict(head="cosine", head_precision="split"), "(split): nearly as exact as float32"),
        (
            dict(head="euclidean", head_precision="autocast"),
            "bfloat16: at n = 768 the loss of a token is off by up to 0.1 nats",
        ),
        (
            dict(head="cosine", link="softmax", head_precision="autocast"),
            "bfloat16: distances have relative errors of up to 4e-04",
        ),
        (dict(head="cross_entropy", head_precision="autocast"), "multiplies in bfloat16"),
        (dict(head="manhattan"), None),
    ],
)
def test_a_run_says_how_its_head_multiplies(settings, words):
    config = ModelConfig(n_embd=192, **settings)
    head = HarmonicHead(192, 5, config.head, **config.head_arguments())
    with torch.autocast("cpu", torch.bfloat16):
        found = advice.about_products(head)
    assert found is None if words is None else words in found


def test_idle_cores_are_those_of_the_process(monkeypatch):
    used = [100.0, 30.0, 0.0, 50.0]
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: used)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2}, raising=False)
    assert machine.idle_cores() == pytest.approx(1.7)


@pytest.mark.parametrize(("call", "model", "config", "words"), SLOW)
def test_slow_settings_are_named(monkeypatch, call, model, config, words):
    """On a CPU without bfloat16; the defaults are silent, and so is a long compiled run."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True}
    )
    monkeypatch.setattr(advice, "cores", lambda: torch.get_num_threads())
    monkeypatch.setattr(advice, "idle_cores", lambda: 8)
    usual = dict(device="cpu", dtype="float32", flops=1e10, iterations=1)
    assert advice.slow_settings(ModelConfig(), TrainConfig(compile=False), **usual) == []
    assert (
        advice.slow_settings(ModelConfig(), TrainConfig(), **{**usual, "iterations": 10**6}) == []
    )
    no_matter = ModelConfig(head="cross_entropy", head_impl="dense", head_skip=0.0)
    assert advice.slow_settings(no_matter, TrainConfig(compile=False), **usual) == []
    (found,) = advice.slow_settings(
        ModelConfig(**model), TrainConfig(**{"compile": False, **config}), **{**usual, **call}
    )
    assert words in found
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(advice, "cores", lambda: 8)

    def notes():
        return advice.slow_settings(ModelConfig(), TrainConfig(compile=False), **usual)

    assert "1 thread of 8 cores" in notes()[0]
    monkeypatch.setattr(advice, "idle_cores", lambda: 1.2)
    assert notes() == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert "other programs use" in notes()[0] and "OMP_NUM_THREADS=1" in notes()[0]


def test_a_gpu_has_notes_on_half_precision_and_on_other_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for emulated, half, used, count in ((True, "float16", "1", 1), (False, "bfloat16", "8", 0)):
        has = lambda including_emulation, emulated=emulated: including_emulation or not emulated  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", has)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", used)
        found = advice.slow_settings(ModelConfig(), TrainConfig(), "cuda", "float32", 1e10, 1)
        assert f"use --dtype={half}" in found[0]
        note = advice.other_gpus(TrainConfig(), "cuda:0")
        assert (note or "").count(
            "energy will be that of all 8 GPUs here, and the run uses"
        ) == count


SENSELESS = [
    (
        dict(max_iters=60, warmup_iters=50),
        "warmup_iters=50 is half or more of max_iters=60: use about 6",
    ),
    (dict(max_iters=40, warmup_iters=50), "warmup_iters=50 is all of max_iters=40"),
    (dict(lr_decay_iters=5000), "lr_decay_iters=5000 is far beyond max_iters=1000"),
    (dict(lr_decay_iters=100), "lr_decay_iters=100 is before max_iters=1000"),
    (dict(eval_interval=2000), "eval_interval=2000 is beyond max_iters=1000"),
    (dict(log_interval=2000), "log_interval=2000 is beyond max_iters=1000"),
    (dict(min_lr=1.0), "min_lr=1 is above learning_rate=0.0006"),
    (dict(eval_iters=10**6), "more windows than val has"),
]


@pytest.mark.parametrize(("config", "words"), SENSELESS)
def test_senseless_settings_are_named(tiny_data, config, words):
    data, model = load_data(tiny_data), ModelConfig(block_size=16)
    usual = {"max_iters": 1000, "lr_decay_iters": None, "eval_iters": 1, "batch_size": 4}
    assert advice.senseless_settings(model, TrainConfig(**usual), data) == []
    given = {**usual, **config}
    found = [
        note
        for note in advice.senseless_settings(model, TrainConfig(**given), data)
        if not note.startswith("eval_interval=200 ")
    ]
    assert len(found) == 1 and words in found[0]
    assert (
        "so its loss is mostly noise"
        in advice.senseless_settings(ModelConfig(block_size=512), TrainConfig(**usual), data)[0]
    )


def test_a_text_that_is_read_often_and_a_rate_that_rises_are_named(train, tiny_data):
    tokens = load_data(tiny_data).splits["train"].tokens
    iterations = 9 * tokens // (TINY["batch_size"] * TINY["block_size"])
    words = "reads the training text 9 times"
    for times, named in ((1, True), (2, False)):
        config = TrainConfig(batch_size=TINY["batch_size"], max_iters=iterations // times)
        model = ModelConfig(block_size=TINY["block_size"])
        notes = advice.senseless_settings(model, config, load_data(tiny_data))
        assert any(words in note for note in notes) == named
    train(head="cosine", max_iters=4, warmup_iters=1)
    rises = "because its decay now ends at iteration"
    assert rises not in train(init_from="resume", max_iters=4, learning_rate=None)[2]
    assert f"{rises} 40" in train(init_from="resume", max_iters=40, eval_interval=40)[2]
    # At the end of a short warm-up the rate rises by itself.
    train(head="cosine", max_iters=2, warmup_iters=2, out_dir="early", lr_decay_iters=90)
    resume = dict(init_from="resume", out_dir="early", max_iters=3, lr_decay_iters=90)
    assert "the learning rate rises" not in train(**resume, warmup_iters=2)[2]
    faster = train(**resume | {"max_iters": 4}, warmup_iters=2, learning_rate=0.9)[2]
    assert "the learning rate rises from" in faster


def test_a_small_start_of_cross_entropy_is_named():
    def notes(optimizer="adamw", **settings):
        model = ModelConfig(**{"head": "cross_entropy", "n_embd": 192, **settings})
        return advice.small_start(model, TrainConfig(optimizer=optimizer))

    assert "head_init_std=0.02 may be small" in notes()[0]
    others = (dict(head="cosine"), dict(n_embd=768), dict(head_init_std=0.05), dict(arch="bert"))
    assert not any([*(notes(**other) for other in others), notes(optimizer="muon")])


def test_a_damaged_data_folder(train, tiny_data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_data, folder)
    (folder / "train.bin").write_bytes(b"\0\0")
    status, _, err = train(dataset=str(folder))
    assert status == 2 and "truncated" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA A40-8Q", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla V100S-PCIE-32GB", None),
    ],
)
def test_the_peak_of_a_gpu_is_its_own(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert machine.peak_flops("cuda:0") == peak


def test_a_gpu_that_pytorch_cannot_use_is_named(monkeypatch, tmp_path):
    """With an old driver. No error if the GPU is hidden, or if this PyTorch is for CPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(distributed, "DEVICE_FILE", tmp_path)

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old. Please update it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"GPU \(The NVIDIA .* is too old\).* --device=cpu"):
            distributed.check_device(device)
    assert distributed.check_device("cpu") == "cpu"
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert distributed.check_device("auto") in ("cpu", "mps")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert distributed.check_device("auto") in ("cpu", "mps")


def test_windows_that_do_not_divide_among_processes_are_named():
    assert advice.uneven_shares(480, 8) is None
    assert "divide evenly among 8 processes" in advice.uneven_shares(60, 8)
    assert "64 windows would take as long" in advice.uneven_shares(60, 8)


@pytest.mark.slow
def test_more_processes_than_windows(tiny_data, tmp_path):
    settings = {**TINY, "dataset": tiny_data, "batch_size": 1, "out_dir": tmp_path / "run"}
    flags = [f"--{k}={v}" for k, v in settings.items()]
    done = script(*launcher(2), "train.py", *flags)
    assert (
        done.returncode != 0
        and "2 processes cannot share 1 windows" in done.stderr
        and not (tmp_path / "run").exists()
    )
