"""Muon, the prototypes' own learning rate, and the schedules."""

import json

import pytest
import torch
from conftest import TINY, script

from model import Model, ModelConfig
from training.config import TrainConfig
from training.distributed import launcher
from training.optimizers import make_optimizer, set_learning_rate
from training.schedule import learning_rate


def build(**settings):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_embd=16, block_size=8, vocab_size=64)
    return Model(ModelConfig(**sizes, **settings))


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        (dict(arch="gpt"), {"attention.qkv.weight": [16, 16, 16]}),
        (
            dict(arch="qwen", n_kv_head=2),
            {"attention.qkv.weight": [16, 8, 8], "mlp.up.weight": [64, 64]},
        ),
    ],
)
def test_muon_takes_the_parts_of_a_fused_weight_as_matrices(settings, fused):
    """Against PyTorch's Muon on the separate matrices."""
    model = build(**settings)
    assert all(sum(rows) == len(model.blocks[0].get_parameter(n)) for n, rows in fused.items())
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", learning_rate=0.01), "cpu")
    parts = {}  # the same matrices, cut apart
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2:
            rows = fused.get(name.split(".", 1)[1], [len(p)])
            parts[name] = [torch.nn.Parameter(q.clone()) for q in p.detach().split(rows)]
    matrices = [q for many in parts.values() for q in many]
    reference = torch.optim.Muon(
        matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        give_gradients(model, step)
        for name, many in parts.items():
            gradient = model.blocks.get_parameter(name).grad
            for q, part in zip(many, gradient.split([len(q) for q in many]), strict=True):
                q.grad = part.clone()
        optimizer.step()
        reference.step()
    for name, many in parts.items():
        assert torch.equal(model.blocks.get_parameter(name), torch.cat(many)), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_prototypes_have_their_own_rate(optimizer):
    c = TrainConfig(optimizer=optimizer, learning_rate=1e-3, head_learning_rate=4e-3)
    model = build(tie_weights=False, head="mahalanobis")
    made = make_optimizer(model, c, "cpu")
    set_learning_rate(made, 5e-4)
    rates = {id(p): g["lr"] for g in made.param_groups for p in g["params"]}
    assert rates.keys() == {id(p) for p in model.parameters()}
    assert rates.pop(id(model.head.weight)) == 2e-3 and set(rates.values()) == {5e-4}


def test_wsd_runs_of_all_lengths_share_their_stable_part():
    """Warm-up and plateau do not depend on the horizon; the decay is linear to min_lr."""
    short, long = (
        TrainConfig(lr_schedule="wsd", max_iters=n, warmup_iters=10, decay_iters=20, min_lr=0.0)
        for n in (100, 500)
    )
    assert [learning_rate(i, short) for i in range(81)] == [
        learning_rate(i, long) for i in range(81)
    ]
    assert learning_rate(80, short) == short.learning_rate == learning_rate(480, long)
    assert learning_rate(90, short) == pytest.approx(short.learning_rate / 2)
    assert learning_rate(100, short) == 0.0
    constant = TrainConfig(lr_schedule="constant", max_iters=100, warmup_iters=10)
    assert learning_rate(99, constant) == constant.learning_rate > learning_rate(5, constant)


def test_wrong_settings_are_named():
    def problems(**settings):
        return TrainConfig(**settings).problems()

    assert "parallel=fsdp splits them" in problems(optimizer="muon", parallel="fsdp")[0]
    assert "decay_iters=5 is for lr_schedule=wsd" in problems(decay_iters=5)[0]
    assert (
        "decay_iters=95 does not fit"
        in problems(lr_schedule="wsd", max_iters=100, warmup_iters=10, decay_iters=95)[0]
    )


def test_samples_and_a_profile_change_nothing(train, tmp_path):
    """A sample is written, and again at the iteration from which a run is resumed."""
    settings = dict(max_iters=6, eval_interval=3, lr_decay_iters=6, dropout=0.1)
    assert train(out_dir="plain", **settings)[0] == 0
    status, out, err = train(out_dir="looked", sample_interval=3, profile=1, **settings)
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "looked/metrics.jsonl").open()]
    samples = [r for r in lines if "sample" in r]
    assert [r["iter"] for r in samples] == [0, 3, 6] and repr(samples[0]["sample"]) in out
    losses = [r["train_loss"] for r in lines if "train_loss" in r]
    plain = [json.loads(line) for line in (tmp_path / "plain/metrics.jsonl").open()]
    assert losses == [r["train_loss"] for r in plain if "train_loss" in r]
    assert "ui.perfetto.dev" in out
    assert json.load((tmp_path / "looked/profile/trace.json").open())["traceEvents"]
    status, _, err = train(arch="bert", out_dir="masks", sample_interval=3)
    assert status == 2 and "masked language model" in err


def test_settings_of_a_resumed_run_that_its_state_does_not_fit(train):
    assert train(max_iters=2, eval_interval=2, optimizer="muon")[0] == 0
    status, _, err = train(init_from="resume", max_iters=4, optimizer="adamw")
    assert status == 2 and "its checkpoint holds the state of muon" in err
    status, _, err = train(head="student_t", head_impl="numba", out_dir="none")
    assert status == 2 and "head_impl=numba" in err
    status, _, err = train(lr_schedule="constant", min_lr=1e-4, out_dir="none")
    assert status == 2 and "min_lr=0.0001 does nothing" in err


def test_the_default_decay_of_wsd_does_not_reach_into_the_warm_up():
    c = TrainConfig(lr_schedule="wsd", max_iters=110, warmup_iters=100)
    rates = [learning_rate(i, c) for i in range(101)]
    assert rates == sorted(rates)


def test_a_profile_that_training_cuts_short_is_written(train, tmp_path):
    status, out, _ = train(max_iters=5, profile=10)
    assert status == 0 and "profile of 2 iterations" in out
    assert (tmp_path / "run/profile/trace.json").is_file()
    assert "profile: 0" in (tmp_path / "run/config.yaml").read_text()
    assert "it begins after 3 iterations" in train(max_iters=3, profile=1, out_dir="short")[2]


@pytest.mark.slow
def test_samples_of_sharded_models(tiny_data, tmp_path):
    """At the start, and at the iteration from which a run is resumed."""
    flags = {**TINY, "dataset": tiny_data, "parallel": "fsdp", "sample_interval": 2}
    for start, most in (("scratch", 2), ("resume", 4)):
        settings = {**flags, "max_iters": most, "eval_interval": 2, "init_from": start}
        words = [f"--{k}={v}" for k, v in settings.items()]
        done = script(*launcher(2), "train.py", *words, f"--out_dir={tmp_path / 'run'}")
        assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [r["iter"] for r in lines if "sample" in r] == [0, 2, 4]
