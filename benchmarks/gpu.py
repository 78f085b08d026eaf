"""All measurements and checks that need a GPU, most important first, in one call.

    python -m benchmarks.gpu --minutes=9            # what `make gpu` runs
    python -m benchmarks.gpu --list                 # list the steps, their times, and what is done
    python -m benchmarks.gpu --only=kernels,head    # only some steps
    # tiny versions of all kinds on the CPU, to find mistakes without a GPU
    python -m benchmarks.gpu --rehearse

A step makes one row of results/gpu.csv. Its `code` is a hash of the library, model.py, train.py,
training/, base/machine.py and the file that measures it. A step is skipped if the table has its
row for this card and this code, or if it cannot end within --minutes. Steps run in other processes
(benchmarks/gpu_runner.py), so a step that crashes or hangs does not affect the others. Its row says
`failed` and why, and the exit status is 1. If a package or data is missing, the row says `absent`.
`kernels`, `head` and `train` need nothing but PyTorch, Triton and NumPy.

kernels   each head in each precision on the Triton kernels, both links: relative errors of losses
          and gradients against float64
head      the loss at GPT-2's size inside bfloat16 autocast, compared with F.linear +
          F.cross_entropy and other libraries: time, memory, errors of losses in nats, and errors
          of gradients relative to the largest entry (benchmarks/head.py)
train     an iteration of GPT-2 124M, compared with a loop like nanoGPT's (benchmarks/train_gpu.py)
train.py  the command itself on random tokens: its speed, float16, resuming
nccl      DistributedDataParallel and FSDP2 over NCCL in one process, and torchrun: with two GPUs it
          starts two processes with FSDP2, with one GPU a process that needs no NCCL
sample    sample.py with and without its cache of keys and values
study     short runs of heads at GPT-2's size, with several seeds, on the largest token files in
          data/
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from base.machine import cores
from benchmarks import head, train_gpu
from benchmarks.gpu_runner import PACKAGES, ROOT, Absent, Lanes, Step, Table, run, shown, version
from harmonic import HEADS, HarmonicHead

YARDSTICK, NANOGPT = "F.linear + F.cross_entropy", "loop in nanoGPT's manner"
FIRST = ["cross_entropy", "cosine", "euclidean"]
NEXT = ["mahalanobis", "manhattan", "chebyshev"]
SEEDS = (1338, 1339, 1340)


# Sizes


@dataclass(frozen=True)
class Check:
    """The size of a check of errors: numbers of states, prototypes and coordinates.

    One state in `every` has a target. The targets of the others are ignored.
    """

    states: int
    prototypes: int
    coordinates: int
    every: int


@dataclass(frozen=True)
class Scale:
    """The sizes, device and folders of all steps.

    flags: for train.py. small: for runs of train.py that only check correctness.
    """

    device: str
    home: str
    """an empty folder for runs"""
    # The second one is large enough for two chunks.
    checks: tuple[Check, ...] = (Check(133, 1021, 97, 2), Check(700, 200_003, 17, 11))
    head: tuple[int, int, int] = (8192, 50304, 768)
    rounds: int = 5
    train: train_gpu.Sizes = train_gpu.Sizes()
    config: tuple[str, ...] = ("configs/gpt2_124m.yaml",)
    study_config: tuple[str, ...] = ("configs/study_gpt2_124m.yaml",)
    flags: dict = field(default_factory=lambda: dict(batch_size=12, max_iters=40))
    small: dict = field(
        default_factory=lambda: dict(
            n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8, max_iters=20
        )
    )
    study: dict = field(
        default_factory=lambda: dict(batch_size=12, max_iters=300, warmup_iters=30, eval_iters=20)
    )
    compile: bool = True
    vocabulary: int = 50257
    new_tokens: int = 200
    data: str = "data"
    rehearse: bool = False


def rehearsal(home: str) -> Scale:
    """Tiny sizes on the CPU."""
    tiny = dict(
        n_layer=2,
        n_head=2,
        n_embd=64,
        block_size=32,
        batch_size=2,
        max_iters=4,
        learning_rate=1e-3,
        warmup_iters=1,
    )
    train = train_gpu.Sizes(
        "cpu", 2, 2, 64, 32, 500, 512, windows=2, compiler="eager", warm_up=1, group=2, seconds=0.0
    )
    return Scale(
        device="cpu",
        home=home,
        checks=(Check(13, 70, 10, 2),),
        head=(8, 128, 32),
        rounds=1,
        train=train,
        config=(),
        study_config=(),
        flags=tiny,
        small=tiny,
        study=tiny,
        compile=False,
        vocabulary=512,
        new_tokens=8,
        data=home,
        rehearse=True,
    )


# kernels


def largest_error(found: list, truth: list) -> float:
    """The largest error of any gradient, relative to the largest entry of the true gradient.

    The gradient of a single number, such as the exponent, is a sum over states that may cancel. So
    its size counts as at least 0.01 for each state.
    """
    states, errors = len(truth[0]), []
    for ours, exact in zip(found, truth, strict=True):
        size = exact.abs().max().clamp_min(0.01 * states if exact.numel() == 1 else 1e-30)
        errors.append((ours.double() - exact).abs().max() / size)
    return torch.stack(errors).max().item()  # NaN if any error is.


ALLOWED = {  # Relative errors, in addition to three times those of plain PyTorch in float32.
    "float32": {"loss": 1e-5, "gradient": 1e-3},
    "split": {"loss": 1e-5, "gradient": 1e-3},
    "autocast": {"loss": 0.05, "gradient": 0.1},
}


def loss_and_gradients(
    layer: HarmonicHead, h: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses (N,), and the gradients of their sum with respect to h and the head's parameters."""
    h = h.detach().requires_grad_()
    leaves = [h, *layer.parameters()]
    gradients = torch.autograd.grad(layer.loss(h, y, reduction="sum"), leaves)
    with torch.no_grad():
        return layer.loss(h, y, reduction="none"), list(gradients)


def check_kernel(scale: Scale, name: str, precision: str) -> dict:
    """The largest errors of one head in one precision over sizes and links.

    Raises: AssertionError if an error is larger than ALLOWED. Absent for a head without a Triton
        kernel.
    """
    links = ["harmonic", "softmax"] if not HEADS[name].is_control else ["harmonic"]
    allowed = ALLOWED[precision]
    loss_error = gradient_error = 0.0
    for check in scale.checks:
        for link in links:
            found = check_once(scale.device, check, name, link, precision)
            loss_error, gradient_error = (
                max(loss_error, found["loss"]),
                max(gradient_error, found["gradient"]),
            )
            assert found["ignored"] == 0, f"{link}: a state whose target is ignored has a gradient"
            for what, more in allowed.items():
                most = more + 3 * found[f"{what}, plain"]
                assert found[what] <= most, (
                    f"{link}, {check}: {what} error {found[what]:.1e}, allowed {most:.1e}"
                )
    return {"loss_error": f"{loss_error:.1e}", "gradient_error": f"{gradient_error:.1e}"}


def check_once(device: str, check: Check, name: str, link: str, precision: str) -> dict[str, float]:
    """The relative errors of `loss` and `gradient`, and those of plain PyTorch in float32.

    `ignored` is the largest gradient of a state whose target is ignored; it should be 0.
    """
    torch.manual_seed(0)
    V, control = check.prototypes, HEADS[name].is_control
    trained = {} if control else {"learn_scale" if link == "softmax" else "learn_exponent": True}
    layer = HarmonicHead(
        check.coordinates,
        V + 3,
        name,
        link=link,
        real_vocab_size=V,
        precision=precision,
        impl="triton",
        **trained,
    )
    layer.to(device).eval()  # So that there is no noise.
    h = torch.nn.functional.layer_norm(
        torch.randn(check.states, check.coordinates), (check.coordinates,)
    ).to(device)
    y = torch.randint(V, (check.states,), device=device)
    kept = torch.arange(check.states, device=device) % check.every == 0
    y[~kept] = -100

    try:
        with torch.autocast(device, torch.bfloat16):
            losses, gradients = loss_and_gradients(layer, h, y)
    except ValueError as error:  # The backend does not support this head.
        raise Absent(str(error)) from None
    dense = {}
    for dtype in (torch.float64, torch.float32):
        other = copy.deepcopy(layer).to(dtype)
        other.impl, other.precision = "dense", "float32"
        dense[dtype] = loss_and_gradients(other, h[kept].to(dtype), y[kept])
    (truth, true_gradients), (plain, plain_gradients) = dense.values()
    size = truth.abs().max().clamp_min(1)
    return {
        "loss": ((losses[kept].double() - truth).abs().max() / size).item(),
        "loss, plain": ((plain.double() - truth).abs().max() / size).item(),
        "gradient": largest_error([gradients[0][kept], *gradients[1:]], true_gradients),
        "gradient, plain": largest_error(plain_gradients, true_gradients),
        "ignored": gradients[0][~kept].abs().max().item(),
    }


# head


def measure_head(scale: Scale, name: str, precision: str, peer: str | None = None) -> dict:
    """Measures forward, forward and backward, and the memory besides inputs and gradients.

    The ratio is the time of forward and backward divided by that of the yardstick, measured
    alternately.
    """
    case = head.Case(scale.head, scale.device, "bfloat16", precision)
    found = head.measure(case, name, peer, scale.rounds)
    loss, *gradients = case.errors(name, peer)
    return {
        "forward_ms": f"{1000 * float(found['forward_seconds']):.3f}",
        "step_ms": f"{1000 * float(found['forward_backward_seconds']):.3f}",
        "ratio": found["forward_backward_ratio"],
        "peak_mib": found["peak_mib"],
        "loss_error": f"{loss:.1e}",
        "gradient_error": f"{max(gradients):.1e}",
    }


def measure_peer(scale: Scale, peer: str) -> dict:
    """`measure_head` for another implementation of cross-entropy."""
    if peer == YARDSTICK:
        head.PEERS["cross_entropy", peer] = lambda h, w, y: torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(h, w), y
        )
    elif ("cross_entropy", peer) not in head.PEERS:
        try:
            head.add_gpu_peer(peer)
        except (ImportError, AttributeError, KeyError) as error:
            raise Absent(f"{peer} cannot be imported: {error}") from None
    return measure_head(scale, "cross_entropy", "autocast", peer)


# train


def measure_training(scale: Scale, name: str) -> dict:
    """Measures an iteration with one head, or of the plain loop."""
    torch.compiler.reset()  # So that it compiles as in a new process.
    loop = train_gpu.Nanogpt(scale.train) if name == NANOGPT else train_gpu.Ours(scale.train, name)
    return train_gpu.measure(scale.train, loop)


# train.py, sample.py, torchrun


def script(scale: Scale, *words: str, torchrun: bool = False) -> str:
    """Runs `python WORDS...` and returns all that it printed.

    A rehearsal runs it in this process, because PyTorch is imported here already.
    Raises: RuntimeError, with the last lines, if the exit status is not 0.
    """
    if scale.rehearse and not torchrun:
        printed, status = here(words)
    else:
        processes = f"--nproc_per_node={min(2, max(1, torch.cuda.device_count()))}"
        launcher = ["-m", "torch.distributed.run", "--standalone", processes] if torchrun else []
        command = [sys.executable, *launcher, *words]
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        printed, status = done.stdout, done.returncode
    if status:
        raise RuntimeError(
            f"{words[0]} ended with status {status}: {' / '.join(printed.splitlines()[-5:])}"
        )
    return printed


def here(words: tuple[str, ...]) -> tuple[str, int]:
    """Runs a script in this process. Returns what it printed and its exit status."""
    printed, argv, status = io.StringIO(), sys.argv, 0
    try:
        with (
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = argv
    return printed.getvalue(), status


def train(
    scale: Scale, out_dir: str, config: tuple[str, ...], torchrun: bool = False, **flags: object
) -> list[dict]:
    """Runs train.py and returns the lines of its metrics.jsonl."""
    folder = Path(scale.home, out_dir)
    settings: dict[str, object] = dict(
        dataset=f"{scale.home}/tokens",
        gradient_accumulation_steps=1,
        eval_interval=10**6,
        eval_iters=1,
        warmup_iters=1,
    )
    settings |= dict(
        emissions=False,
        device=scale.device,
        compile=scale.compile,
        dtype="bfloat16",
        out_dir=folder,
    )
    settings |= flags
    script(
        scale,
        "train.py",
        *config,
        *(f"--{key}={value}" for key, value in settings.items()),
        torchrun=torchrun,
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(metrics: list[dict]) -> dict:
    """The cells of a run: its last validation loss, and its median speed.

    The first third of the iterations does not count for the speed.
    """
    losses = [m["val_loss"] for m in metrics if "val_loss" in m]
    steps = [m for m in metrics if "tokens_per_s" in m]
    steps = steps[len(steps) // 3 :]
    if not all(isinstance(x, float) and math.isfinite(x) for x in losses):
        raise FloatingPointError(f"validation losses {losses}")
    row = {
        "val_loss": f"{losses[-1]:.4f}",
        "tokens_per_s": f"{statistics.median(m['tokens_per_s'] for m in steps):.0f}",
    }
    if "mfu" in steps[0]:
        row["mfu"] = f"{statistics.median(m['mfu'] for m in steps):.3f}"
    return row


def run_train(scale: Scale, name: str) -> dict:
    """train.py as a process, with token files, logging and the checkpoint at the end."""
    return results(train(scale, f"train-{name}", scale.config, head=name, **scale.flags))


def run_float16(scale: Scale) -> dict:
    """train.py with dtype=float16, which needs loss scaling."""
    return results(
        train(
            scale,
            "float16",
            scale.config,
            head="cosine",
            **scale.small | dict(dtype="float16", compile=False),
        )
    )


def run_resume(scale: Scale) -> dict:
    """Compares a run that is stopped halfway and resumed with an uninterrupted one.

    loss_error is the difference of their validation losses.
    """
    most = scale.small["max_iters"]
    settings = scale.small | dict(head="euclidean", compile=False, lr_decay_iters=most)
    whole = train(scale, "whole", scale.config, **settings)
    train(scale, "parts", scale.config, **settings | dict(max_iters=most // 2))
    settings = dict(
        dataset=f"{scale.home}/tokens",
        init_from="resume",
        out_dir=f"{scale.home}/parts",
        max_iters=most,
    )
    script(scale, "train.py", *(f"--{key}={value}" for key, value in settings.items()))
    parts = [
        json.loads(line)
        for line in Path(scale.home, "parts", "metrics.jsonl").read_text().splitlines()
    ]
    row, resumed = results(whole), results(parts)
    difference = abs(float(row["val_loss"]) - float(resumed["val_loss"]))
    assert difference < 1e-3, (
        f"the loss is {row['val_loss']} in one go and {resumed['val_loss']} when resumed"
    )
    return {**row, "loss_error": f"{difference:.1e}"}


def run_torchrun(scale: Scale) -> dict:
    """torchrun with one process, or with two if there are two GPUs."""
    backend = "nccl" if scale.device == "cuda" else "gloo"
    flags = scale.small | dict(compile=False, backend=backend, parallel="fsdp", head="cosine")
    return results(train(scale, "torchrun", scale.config, torchrun=True, **flags))


def run_wrapped(scale: Scale, how: str) -> dict:
    """Checks three iterations under DistributedDataParallel or FSDP2, in a group of one process.

    The losses must be those of the unwrapped model. train.py does not wrap a model for one process,
    so this function does.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():  # It is never destroyed, because that can hang.
        dist.init_process_group(
            "nccl" if scale.device == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    s = scale.train
    losses: dict[str, list[float]] = {}
    small = train_gpu.Sizes(s.device, 2, 2, 64, s.length, s.vocabulary, s.rows, 2, "eager")
    for kind in ("alone", how):
        loop = train_gpu.Ours(small, "cosine")
        model: torch.nn.Module = loop.model
        if kind == "DDP":
            model = DistributedDataParallel(model, device_ids=[0] if s.device == "cuda" else None)
        elif kind == "FSDP2":
            mesh = dist.device_mesh.init_device_mesh(s.device, (1,))
            for block in loop.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[kind] = []
        for _ in range(3):
            with loop.autocast:
                _, loss = model(loop.x, loop.y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[kind].append(loss.item())
    difference = max(abs(a - b) for a, b in zip(losses["alone"], losses[how], strict=True))
    assert difference < 1e-2, f"the losses are {losses}"
    return {"loss_error": f"{difference:.1e}"}


def run_doc_mask(scale: Scale, arch: str) -> dict:
    """Compares FlexAttention within documents, compiled and not, with a dense mask.

    It compares losses and gradients in float32, at a length that is not a multiple of a block.
    """
    import model as decoder

    length = scale.small["block_size"] * 4 - 24  # Not a multiple of a block.
    flags: dict[str, Any] = dict(
        n_layer=2,
        n_head=4,
        n_embd=4 * 64,
        block_size=length,
        vocab_size=scale.vocabulary,
        doc_mask=True,
        eot_id=0,
        dropout=0.0,
    )
    if arch == "qwen":
        flags["n_kv_head"] = 2
    config = decoder.ModelConfig(arch=arch, **flags)
    torch.manual_seed(0)
    plain = decoder.Model(config).to(scale.device)
    tokens = torch.randint(scale.vocabulary, (2, length + 1), device=scale.device)
    tokens[:, length // 3] = tokens[:, length // 2] = 0  # Ends of documents.
    found = {}
    for way, flex, compiled in (
        ("dense", False, False),
        ("flex", True, False),
        ("compiled", True, scale.compile),
    ):
        chosen = decoder.uses_flex_attention if flex else lambda *_: False
        with mock.patch.object(decoder, "uses_flex_attention", chosen):
            used = torch.compile(plain) if compiled else plain
            _, loss = used(tokens[:, :-1], tokens[:, 1:])
            found[way] = (
                loss.item(),
                *(g.double() for g in torch.autograd.grad(loss, list(plain.parameters()))),
            )
    errors = []
    for way in ("flex", "compiled"):
        for a, b in zip(found[way][1:], found["dense"][1:], strict=True):
            errors.append(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item())
    assert max(errors) < 1e-3, f"the largest gradient error is {max(errors):.1e}"
    difference = abs(found["compiled"][0] - found["dense"][0])
    assert difference < 1e-4, f"the losses are {[values[0] for values in found.values()]}"
    return {"loss_error": f"{difference:.1e}", "gradient_error": f"{max(errors):.1e}"}


def run_sample(scale: Scale) -> dict:
    """sample.py with a new model: tokens per second with the cache.

    The ratio is this speed divided by the speed without the cache.
    """
    train(
        scale,
        "sample",
        scale.config,
        head="cosine",
        **scale.flags | dict(max_iters=1, compile=False),
    )
    speeds = {}
    for cached in (True, False):
        words = [
            f"--out_dir={scale.home}/sample",
            f"--max_new_tokens={scale.new_tokens}",
            f"--cache={cached}",
            f"--device={scale.device}",
        ]
        printed = script(scale, "sample.py", "--start=The", *words)
        last = next(line for line in reversed(printed.splitlines()) if line.endswith(" tokens/s"))
        speeds[cached] = float(last.split()[-2].replace(",", ""))
    return {"tokens_per_s": f"{speeds[True]:.0f}", "ratio": f"{speeds[True] / speeds[False]:.2f}"}


# study


def run_study(scale: Scale, name: str, seed: int) -> dict:
    """A short run of the study's configuration on the largest token files in data/."""
    folders = [
        path.parent
        for path in Path(ROOT, scale.data).glob("*/meta.json")
        if (path.parent / "train.bin").is_file()
    ]
    if not folders:
        raise Absent(f"no token files under {scale.data}/: prepare_openwebtext.py makes them")
    folder = max(folders, key=lambda path: (path / "train.bin").stat().st_size)
    flags = scale.study | dict(head=name, seed=seed, dataset=folder)
    row = results(train(scale, f"study-{name}-{seed}", scale.study_config, **flags))
    return {**row, "note": f"{folder.name}, {flags['max_iters']} iterations"}


# The list of steps


def precisions(name: str) -> list[str]:
    """The precisions that change something for a head."""
    return ["split", "float32", "autocast"] if HEADS[name].multiplies else ["float32"]


def kernel_steps() -> list[Step]:
    names = dict.fromkeys([*FIRST, *NEXT, *HEADS])
    pairs = [(name, precision) for name in names for precision in precisions(name)]
    return [
        Step("kernels", name, 30, check_kernel, (name, how), precision=how, beside=True)
        for name, how in pairs
    ]


def head_steps(names: list[str]) -> list[Step]:
    pairs = [(name, precision) for name in names for precision in precisions(name)]
    return [
        Step("head", name, 20, measure_head, (name, how), "benchmarks/head.py", precision=how)
        for name, how in pairs
    ]


def peer_steps() -> list[Step]:
    names = [YARDSTICK, "F.linear_cross_entropy", *head.GPU_PEERS]
    return [
        Step("head", name, 20, measure_peer, (name,), "benchmarks/head.py", precision="autocast")
        for name in names
    ]


def training_steps(names: list[str]) -> list[Step]:
    seconds = {NANOGPT: 90}  # It takes longer to compile, because it is compiled as one graph.
    file = "benchmarks/train_gpu.py"
    return [
        Step(
            "train",
            name,
            seconds.get(name, 60),
            measure_training,
            (name,),
            file,
            speed_over=NANOGPT,
        )
        for name in names
    ]


def steps() -> list[Step]:
    """All steps, most important first."""
    needs = tuple(PACKAGES)
    found = [
        *kernel_steps(),
        *head_steps(FIRST),
        *peer_steps(),
        *head_steps(["manhattan", "chebyshev"]),
    ]
    found += training_steps([NANOGPT, *FIRST])
    found += [
        Step("train.py", name, 70, run_train, (name,), needs=needs, speed_over=NANOGPT)
        for name in FIRST[:2]
    ]
    found += [
        Step("doc_mask", arch, 60, run_doc_mask, (arch,), "model.py") for arch in ("gpt", "qwen")
    ]
    found += [Step("nccl", how, 20, run_wrapped, (how,)) for how in ("DDP", "FSDP2")]
    found += [Step("nccl", "torchrun", 30, run_torchrun, needs=needs)]
    found += [
        Step("train.py", "float16", 30, run_float16, needs=needs),
        Step("train.py", "resume", 75, run_resume, needs=needs),
    ]
    found += [Step("sample", "cosine", 75, run_sample, needs=needs)]
    found += training_steps(NEXT)
    found += head_steps([name for name in HEADS if name not in (*FIRST, "manhattan", "chebyshev")])
    found += [
        Step("study", f"{name}, seed {seed}", 100, run_study, (name, seed), needs=needs)
        for seed in SEEDS
        for name in FIRST
    ]
    return found


def rehearsed() -> list[Step]:
    """One or a few steps of each kind, run in parallel. Their times mean nothing."""
    kernels = [("euclidean", "split"), ("cross_entropy", "autocast"), ("manhattan", "float32")]
    wanted = {("train", name) for name in (NANOGPT, "cosine")} | {
        ("train.py", name) for name in ("cosine", "float16", "resume")
    }
    wanted |= {("head", name) for name in ("cosine", YARDSTICK, "F.linear_cross_entropy", "Liger")}
    wanted.add(("doc_mask", "qwen"))
    wanted |= {("nccl", name) for name in ("DDP", "FSDP2", "torchrun")} | {
        ("sample", "cosine"),
        ("study", f"cosine, seed {SEEDS[0]}"),
    }
    found = [
        s
        for s in steps()
        if (s.step, s.what) in wanted or (s.step == "kernels" and s.arguments in kernels)
    ]
    found.sort(key=lambda s: s.what != "torchrun")  # The longest step comes first.
    return [replace(s, beside=True) for s in found]


# The command


def make_tokens(scale: Scale) -> None:
    """Writes random tokens as a prepared folder.

    Their tokenizer is one of characters, which needs no package and no network.
    """
    folder, generator = Path(scale.home, "tokens"), np.random.default_rng(0)
    folder.mkdir()
    splits = {}
    for name, count in (("train", 2_000_000), ("val", 100_000)):
        generator.integers(scale.vocabulary - 1, size=count, dtype=np.uint16).tofile(
            folder / f"{name}.bin"
        )
        splits[name] = {"file": f"{name}.bin", "tokens": count, "bytes": count}
    characters = "".join(chr(32 + i) for i in range(scale.vocabulary - 1))
    (folder / "characters.json").write_text(
        json.dumps({"characters": characters, "unknown": False})
    )
    meta = {
        "tokenizer": "char",
        "vocab_size": scale.vocabulary,
        "dtype": "uint16",
        "splits": splits,
    }
    (folder / "meta.json").write_text(
        json.dumps({**meta, "eot_id": scale.vocabulary - 1, "mask_id": scale.vocabulary})
    )


def tell_packages() -> None:
    """Prints which packages of the scripts are missing, and how to install them."""
    print(
        f"torch {version('torch')}, triton {version('triton') or 'absent'}, numpy"
        f" {version('numpy')}"
    )
    missing = " ".join(PACKAGES[p] for p in PACKAGES if importlib.util.find_spec(p) is None)
    print(
        f"train.py and sample.py also need {', '.join(PACKAGES.values())}:"
        f" {'missing ' + missing if missing else 'all there'}"
    )
    if missing:
        print(f"  with a network:  python -m pip install {missing}")
        print(
            "  without one, copy wheels/ from a machine that has one:  python -m pip download"
            f" --no-deps -d wheels {missing}"
        )
        print(
            "  (for another Python add: --only-binary=:all:"
            f" --python-version=3.{sys.version_info.minor}), and here"
        )
        print(f"  python -m pip install --no-index --no-deps --find-links=wheels {missing}")
    print(
        "the step head also measures these packages, if they are installed: liger-kernel,"
        " cut-cross-entropy, quack-kernels",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="skip steps that cannot end within this time (default: 9)",
    )
    parser.add_argument("--only", help="names of steps, separated by commas")
    parser.add_argument(
        "--out",
        type=Path,
        help="the table; default results/gpu.csv, or out/gpu_rehearsal.csv for a rehearsal",
    )
    parser.add_argument("--rehearse", action="store_true", help="run tiny versions on the CPU")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    c = parser.parse_args()
    if c.only and (strange := set(c.only.split(",")) - {s.step for s in steps()}):
        parser.error(
            f"--only: unknown steps {', '.join(sorted(strange))}; there are"
            f" {', '.join(dict.fromkeys(s.step for s in steps()))}"
        )
    if not c.rehearse and not c.list and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --rehearse runs all steps on the CPU")
    measured = ROOT / "results/gpu.csv"
    c.out = c.out or (ROOT / "out/gpu_rehearsal.csv" if c.rehearse else measured)
    if c.rehearse and c.out.resolve() == measured:
        parser.error(f"--out={c.out}: a rehearsal measures nothing, so it does not go there")
    c.out.parent.mkdir(parents=True, exist_ok=True)
    return c


def main() -> int:
    began = time.monotonic()
    c = arguments()
    tell_packages()
    gpu = torch.cuda.is_available() and not c.rehearse
    card = torch.cuda.get_device_name() if gpu else "cpu"
    table = Table(c.out)
    chosen = [
        s
        for s in (rehearsed() if c.rehearse else steps())
        if not c.only or s.step in c.only.split(",")
    ]
    done = [
        s
        for s in chosen
        if (row := table.find({"card": card, **s.key()})) and row["status"] == "ok"
    ]
    if c.list:
        for s in chosen:
            print(
                f"{s.step:9}{s.what:34}{s.precision:9}{s.seconds:4}"
                f" s{'  done' if s in done else ''}"
            )
        return 0
    print(f"{card}: {len(chosen)} steps, of which {c.out} has {len(done)}", flush=True)
    most = 2 if c.rehearse else max(1, min(8, cores() // 2))
    about = {"card": card, "torch": version("torch"), "triton": version("triton")}
    # So that SIGTERM also ends the processes below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if c.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # For processes that are started from now on.
    with tempfile.TemporaryDirectory(prefix="gpu-") as home:
        scale = rehearsal(home) if c.rehearse else Scale("cuda", home)
        make_tokens(scale)
        lanes = Lanes(scale, most)
        try:
            rows = run(
                deque(s for s in chosen if s not in done),
                lanes,
                table,
                about,
                began + 60 * c.minutes,
            )
        finally:
            lanes.stop()
    kept = [row for s in chosen if (row := table.find({"card": card, **s.key()}))]
    print(
        f"\n{shown(kept)}\n\n{card}: {len(rows)} steps in {time.monotonic() - began:.0f} s; the"
        f" table is {c.out}"
    )
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
