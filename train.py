"""Trains a language model with a harmonic head.

    python train.py configs/demo.yaml --head=manhattan --max_iters=200 --out_dir=out/l1
    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m.yaml --head=cosine
    python train.py --init_from=resume --out_dir=out/l1
    python train.py --init_from=gpt2 --head=cosine --dataset=openwebtext --out_dir=out/gpt2/swapped

A config is a YAML file given first; flags are --key=value and override it. The run's folder is
described in README.md.

Exit status: 0 trained; 2 bad input, nothing lost; 3 a loss or gradient that is not finite; 4
    trained, but the last checkpoint could not be written; 130, 138, 143 stopped by Ctrl-C, SIGUSR1,
    SIGTERM, with a checkpoint.
"""

import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from interop import pretrained
from model import Model, ModelConfig, adamw
from text.token_files import Data, verify
from training import checkpoint, distributed
from training.config import TrainConfig
from training.data import predicted_count, training_batches
from training.distributed import Processes
from training.evaluation import Evaluation
from training.folder import open_folder
from training.log import Log, NotFinite, Work, introduce, not_finite
from training.schedule import learning_rate
from training.start import (
    check_compiler,
    check_out_dir,
    configure,
    differences,
    fit_to_data,
    go_on,
    start_processes,
)
from training.step import Gradients, Progress, Step
from training.telemetry import Emissions, Metrics, duration, environment
from training.verify import verify_resume

MOST_SKIPPED = 100  # iterations in a row, with --on_nan=skip


@dataclass
class Run:
    """All that the loop needs."""

    m: ModelConfig
    c: TrainConfig
    data: Data
    processes: Processes
    model: Model
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: contextlib.AbstractContextManager
    gradients: Gradients
    evaluate: Evaluation
    progress: Progress
    work: Work
    metrics: Metrics | None = None
    writer: checkpoint.Writer | None = None
    emissions: Emissions | None = None

    def say(self, *words, **how):
        """Prints, in the main process."""
        if self.processes.main:
            print(*words, **how)


def main():
    # Everything is checked before anything is written.
    m, c, stored, source = configure(sys.argv[1:], pretrained.find)
    device = distributed.check_device(c.device)
    data = fit_to_data(m, c, source)
    if c.compile:
        check_compiler(device)
    if c.verify_resume:
        longest = max(c.lr_decay_iters or c.max_iters, c.warmup_iters)
        return verify_resume(sys.argv[1:], longest, c.source)
    check_out_dir(c)

    p = start_processes(c, device, stored is not None)
    if p.local_rank == 0:
        verify(data)
    dtype, autocast, scaler = precision(c, p)
    evaluate = Evaluation(data, m, c, p, autocast)
    torch.manual_seed(c.seed)
    model, of_source = make_model(m, c, data, p, source, evaluate)
    progress, resumed = Progress(), None
    if stored is not None:
        progress, resumed = go_on(c, data, p, model, scaler)
        if progress.iteration >= c.max_iters and not c.eval_only:
            if p.main:
                print(
                    f"{c.out_dir} is already trained to iteration {progress.iteration};"
                    " raise --max_iters to go on"
                )
            return
    run = prepare(m, c, data, p, model, scaler, autocast, evaluate, progress, resumed)
    changed = differences(stored, m, c) if stored is not None else {}
    if p.main and not c.eval_only:
        began = {"environment": environment(p.device, p.world), "changed": changed}
        run.metrics, run.writer = open_folder(m, c, data, began, resumed, progress.iteration)
    p.barrier()
    if c.emissions and p.local_rank == 0 and not c.eval_only:  # one tracker a node
        node = int(os.environ.get("GROUP_RANK", 0))
        run.emissions = Emissions(Path(c.out_dir), c.emissions_country, node)
    introduce(run, dtype, changed)
    if c.eval_only:
        run.say(" ".join(f"{k} {v:.4f}" for k, v in evaluate(model).items()))
        return
    train(run, of_source)


# Before the loop


def precision(c: TrainConfig, p: Processes):
    """-> (the name of the trunk's type, its autocast, the scaler of float16). Distances and weights
    are float32."""
    kind, dtype = p.device.split(":")[0], c.dtype
    if dtype == "auto":
        has_bfloat16 = kind == "cuda" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if has_bfloat16 else "float32"
    autocast = contextlib.nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(kind, getattr(torch, dtype))
    return dtype, autocast, torch.amp.GradScaler(kind, enabled=dtype == "float16")


def make_model(m, c, data, p: Processes, source, evaluate: Evaluation) -> tuple[Model, dict]:
    """-> (the model at its start, the source's own results where its head was swapped)."""
    if not source:
        return Model(m), {}
    model = source.load(m)
    if m.head == source.head:
        return model, {}
    found = evaluate(model.to(p.device))
    found = {f"source_{k}": v for k, v in found.items() if k in ("val_loss", "perplexity")}
    states = pretrained.states(model.eval(), data, c.seed, c.batch_size)
    kl = pretrained.swap(model, m, states)
    with torch.no_grad():  # one choice for all processes
        model.head.weight.copy_(p.from_main(lambda: model.head.weight.detach().cpu()))
        model.head.set_strength(p.from_main(lambda: float(model.head.strength)))
    if p.main:
        print(
            f"{source.name} as it is: val loss {found['source_val_loss']:.4f}, perplexity"
            f" {found['source_perplexity']:.4g}\n"
            f"its head swapped for {model.head.extra_repr()}, not tied: KL {kl:.2g} nats a"
            " token on training text"
        )
    return model, found


def prepare(m, c, data, p, model, scaler, autocast, evaluate, progress, resumed) -> Run:
    """Puts the model on its device, compiles and wraps it, and makes its optimiser."""
    kind = p.device.split(":")[0]
    per_window = predicted_count(m.arch, m.block_size)
    slots = c.batch_size * c.gradient_accumulation_steps
    flops = model.flops_per_token(per_window / m.block_size)
    work = Work(slots * m.block_size, slots * per_window, flops)
    model.to(p.device).recompute = c.activation_checkpointing
    if c.compile:
        for block in model.blocks:  # all alike: one compilation
            block.compile(fullgraph=True)
    wrapped = p.wrap(model, c.parallel)
    betas = (c.beta1, c.beta2)
    optimizer = adamw(model, c.learning_rate, betas, c.weight_decay, c.prototype_decay, kind)
    if resumed:
        checkpoint.load_optimizer(model, optimizer, resumed)
    gradients = Gradients(model, p, sharded=p.world > 1 and c.parallel == "fsdp")
    trained = (model, wrapped, optimizer, scaler, autocast, gradients)
    return Run(m, c, data, p, *trained, evaluate, progress, work)


# The loop


def train(run: Run, of_source: dict):
    """Trains to max_iters, or until a signal or a number that is not finite; then exits."""
    c, p, at = run.c, run.processes, run.progress
    log = Log(c, p, run.gradients, run.work, run.metrics, run.say, at.iteration)
    log.scaled = run.scaler.is_enabled()
    first, stopped, at_once, strange = at.iteration, 0, False, None
    run.model.train()
    signals = distributed.StopSignals(p, c.timeout)
    try:
        while True:
            due = at.iteration % c.eval_interval == 0 or at.iteration == c.max_iters
            if due and at.iteration != at.evaluated:
                log.flush(at.iteration)
                report(run, of_source if at.iteration == 0 else {})
                log.restart_clock()
            stopped = signals.agreed()
            if stopped and at.iteration != at.evaluated and at.iteration > first:
                log.flush(at.iteration)
                save(run, None)
            if stopped or at.iteration >= c.max_iters:
                break
            step = iterate(run)
            if at.skipped_in_a_row == MOST_SKIPPED:
                log.flush(at.iteration)
                what = f"{MOST_SKIPPED} iterations in a row skipped"
                raise not_finite(at.iteration, what, run.gradients.not_finite(step.squares))
            log.pending.append(step)
            at.iteration += 1
            if at.iteration % c.log_interval == 0:
                log.flush(at.iteration)
    except KeyboardInterrupt:
        stopped, at_once = signal.SIGINT, True
    except NotFinite as error:
        strange = error
    finally:
        signals.restore()
        used = close(run, wait=not at_once)
    if not at_once:
        p.barrier()  # torchrun ends all when one has ended
    finish(run, time.perf_counter() - log.began, used, stopped, strange)


def iterate(run: Run) -> Step:
    """One iteration: gradients of all windows of this process, clipped, and a step."""
    c, p, at = run.c, run.processes, run.progress
    # Noise is a pure function of (seed, iteration, rank): no random state needs saving, and
    # evaluation cannot disturb it.
    torch.manual_seed((c.seed * 1_000_003 + at.iteration) * 4096 + p.rank)
    step = Step.begin(p.device)
    step.lr = learning_rate(at.iteration, c)
    for group in run.optimizer.param_groups:
        group["lr"] = step.lr
    slots = c.batch_size * c.gradient_accumulation_steps
    place = (c.seed, at.iteration, p.share(slots), slots, c.batch_size)
    micro = list(training_batches(run.data, run.m.arch, run.m.block_size, *place))
    for j, (x, y) in enumerate(micro):
        distributed.synchronise(run.wrapped, j == len(micro) - 1)
        x, y = (to_device(t, p.device) for t in (x, y))
        with run.autocast:
            _, loss = run.wrapped(x, y, reduction="sum")
        # Gradients are averaged over processes, hence the factor.
        run.scaler.scale(loss * (p.world / run.work.targets)).backward()
        step.add(loss, run.model.target_distance)
    run.scaler.unscale_(run.optimizer)
    run.gradients.measure(step)
    skip = c.on_nan == "skip" and not run.scaler.is_enabled()
    if skip and not math.isfinite(step.norm.item()):
        at.skipped, at.skipped_in_a_row = at.skipped + 1, at.skipped_in_a_row + 1
    else:
        at.skipped_in_a_row = 0
        if c.grad_clip:
            run.gradients.clip(step.norm, c.grad_clip)
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    step.skipped = at.skipped
    return step


def to_device(x: torch.Tensor, device: str) -> torch.Tensor:
    """Without waiting, where the device allows it."""
    if device.startswith("cuda"):
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def report(run: Run, more: dict):
    """Evaluates, says so, and saves a checkpoint."""
    at = run.progress
    found = {**run.evaluate(run.model), **more}
    words = []
    for key, value in found.items():
        exact = key == "val_loss"
        words.append(f"val loss {value:.4f}" if exact else f"{key.replace('_', ' ')} {value:.4g}")
    run.say(f"iter {at.iteration}: " + "  ".join(words), flush=True)
    if run.metrics:
        run.metrics.write({"iter": at.iteration, **found})
    at.best_loss, at.evaluated = min(at.best_loss, found["val_loss"]), at.iteration
    if at.iteration > 0:
        save(run, found["val_loss"])


def save(run: Run, loss: float | None):
    """Takes a copy of everything and lets it be written while training goes on."""
    at = run.progress
    if run.writer:
        run.writer.wait()  # before there is another copy
    files = checkpoint.snapshot(run.model, run.optimizer, keep=run.processes.main)
    if not run.processes.main:
        return
    run.metrics.sync()
    counters = {
        "val_loss": loss,
        "best_val_loss": at.best_loss,
        "tokens": at.iteration * run.work.tokens,
        "skipped": at.skipped,
        "scaler": run.scaler.state_dict(),
        "data": run.data.splits["train"].identity(),
    }
    run.writer.save(at.iteration, files, counters)
    if run.emissions:
        run.emissions.flush()


# After the loop


def close(run: Run, wait: bool) -> tuple[float, float] | None:
    """Ends what is being written -> energy in kWh and emissions in kg, where they were measured."""
    if run.writer and wait:
        run.writer.wait()  # whatever ended the loop, what is being written is good
    if run.metrics:
        run.metrics.close()
    return run.emissions.stop() if run.emissions else None


def finish(run: Run, seconds: float, used, stopped: int, strange: NotFinite | None):
    """Says how the run ended, and exits with its status."""
    out_dir = Path(run.c.out_dir)
    energy = f", {used[0] * 1000:.2f} Wh, {used[1] * 1000:.2f} g CO2e" if used else ""
    if strange:
        run.say(strange, file=sys.stderr, flush=True)
        run.say(f"last good checkpoint: {checkpoint.last(out_dir)}", file=sys.stderr)
        sys.exit(3)
    if stopped:
        how = "no checkpoint was written yet"
        if checkpoint.manifests(out_dir):
            how = (
                f"go on from {checkpoint.last(out_dir)} with: python train.py --init_from=resume"
                f" --out_dir={out_dir}"
            )
        name = signal.Signals(stopped).name
        at = run.progress.iteration
        run.say(f"\n{name}: stopped at iteration {at}{energy}; {how}", file=sys.stderr)
        sys.exit(128 + stopped)
    best = run.progress.best_loss
    run.say(f"done: {out_dir}, best val loss {best:.4f}, {duration(seconds)}{energy}")
    if run.writer and run.writer.error:
        sys.exit(4)


if __name__ == "__main__":
    distributed.run(main)
