"""Trains a language model with a harmonic head.

    python train.py configs/demo.yaml --head=manhattan --max_iters=200 --out_dir=out/manhattan
    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m.yaml --head=cosine
    python train.py --init_from=resume --out_dir=out/manhattan
    python train.py --init_from=gpt2 --head=cosine --dataset=openwebtext --out_dir=out/gpt2/swapped

Start with a YAML config, then override any setting with --key=value. docs/training.md describes the
run's folder.

Exit status:
    0               the run is trained
    2               the input is wrong, or there is too little memory; checkpoints stay
    3               a loss or gradient is not finite, also a validation loss
    4               the run is trained, but its last checkpoint could not be written
    129, 130,       stopped by SIGHUP, Ctrl-C, SIGUSR1 or SIGTERM, with a checkpoint of the last
    138, 143        iteration if the disk had room; a second Ctrl-C stops at once, without one
"""

import math
import signal
import sys

from base.loading import say_loading

if __name__ == "__main__":
    say_loading()  # The imports below take seconds.

import torch

from base.errors import UserError
from interop import pretrained
from model import Diverged, Model, ModelConfig
from text.token_files import Data, verify
from training import checkpoint, distributed
from training.config import TrainConfig
from training.distributed import Processes
from training.emissions import total
from training.evaluation import Evaluation, sample_text
from training.folder import RunFolder
from training.log import Log, NotFinite, conclude, introduce, not_finite
from training.optimizers import make_optimizer, set_learning_rate
from training.profiling import Profile
from training.run import Run
from training.schedule import learning_rate
from training.start import (
    check_machine,
    check_out_dir,
    compile_kernels,
    configure,
    differences,
    fit_to_data,
    precision,
    restore,
    start_processes,
)
from training.step import Progress, Step
from training.verify import verify_resume

MOST_SKIPPED = 100  # With --on_nan=skip, so many skipped iterations in a row stop the run.


def main() -> None:
    # Configuration. Everything is checked before anything is written.
    m, c, stored, source = configure(sys.argv[1:], pretrained.find)
    device = distributed.check_device(c.device)
    data = fit_to_data(m, c, source)
    check_machine(m, c, device)
    if c.verify_resume:
        verify_resume(sys.argv[1:], c, new=stored is None)
        return
    check_out_dir(c)
    compile_kernels(m, device)

    # Processes and data.
    p = start_processes(m, c, data, device, stored is not None)
    p.on_each_machine(lambda: verify(data))
    dtype, autocast, scaler = precision(c, p)
    evaluate = Evaluation(data, m, c, p, autocast)

    # The model: a new one, that of --source, or that of the newest checkpoint.
    torch.manual_seed(c.seed)
    model, of_source = make_model(m, c, data, p, source, evaluate)
    progress, resumed = Progress(), None
    if stored is not None:
        resumed = restore(c, data, p, model, scaler, differences(stored, m, c))
        progress = resumed.progress
        if progress.ended(c.max_iters) and not c.eval_only:
            done = f"{c.out_dir} is already trained to iteration {progress.iteration}"
            if p.main:
                print(f"{done}; raise --max_iters to train longer")
            return
    model.to(p.device)
    if c.compile:
        model.compile_blocks()
    wrapped = p.wrap(model, c.parallel)

    # The optimiser.
    optimizer = make_optimizer(model, c, p.kind)
    if resumed:
        checkpoint.load_optimizer(model, optimizer, resumed.folder)
    run = Run(
        m=m,
        c=c,
        data=data,
        processes=p,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        scaler=scaler,
        autocast=autocast,
        evaluate=evaluate,
        progress=progress,
        of_source=of_source,
    )
    folder = None if c.eval_only else RunFolder(run, resumed)
    p.barrier()
    introduce(run, dtype, resumed.differs if resumed else {})
    if folder is None:
        evaluate_only(run)
    else:
        train(run, folder)


def make_model(
    m: ModelConfig,
    c: TrainConfig,
    data: Data,
    p: Processes,
    source: pretrained.Pretrained | None,
    evaluate: Evaluation,
) -> tuple[Model, dict]:
    """Makes the model that training starts from.

    Returns: the model, and the validation results of `source` with its own head. These are empty if
        there is no source, or if it keeps its head.
    """
    if not source:
        return Model(m), {}
    model = source.load(m)
    if m.head == source.head:
        return model, {}
    found = evaluate(model.to(p.device))
    found = {f"source_{k}": v for k, v in found.items() if k in ("val_loss", "perplexity")}
    states = pretrained.states(model.eval(), data, c.seed, c.batch_size)
    kl = pretrained.swap(model, m, states)
    with torch.no_grad():  # All processes take the head that the main one has fitted.
        model.head.weight.copy_(p.from_main(lambda: model.head.weight.detach().cpu()))
        model.head.set_strength(p.from_main(lambda: float(model.head.strength)))
        model.head.built_strength = model.head.fixed_strength  # config.yaml has it.
    if p.main:
        print(
            f"{source.name} with its own head: val loss {found['source_val_loss']:.4f}, perplexity"
            f" {found['source_perplexity']:.4g}\n"
            f"its head swapped for {model.head.extra_repr()}, not tied to the embedding: KL"
            f" divergence from the old head {kl:.2g} nats a token on training text"
        )
    return model, found


def evaluate_only(run: Run) -> None:
    """Prints the validation results. Raises: SystemExit if the loss is not finite."""
    found = run.evaluate(run.model)
    run.say(" ".join(f"{k} {v:.4f}" for k, v in found.items()))
    if not math.isfinite(found["val_loss"]):
        run.processes.barrier()  # torchrun stops every process once one exits.
        sys.exit(3)


def train(run: Run, folder: RunFolder) -> None:
    """The training loop. It ends at max_iters, at a signal, or if a loss or gradient is not finite.

    Raises: SystemExit if the exit status is not 0.
    """
    c, p, at = run.c, run.processes, run.progress
    log = Log(run, folder)
    profile = Profile(folder.path / "profile", c.profile if p.main else 0, p.device)
    stopped, at_once, diverged = 0, False, None
    run.model.train()
    signals = distributed.StopSignals(p, c.timeout)
    try:
        while True:
            stopped = signals.agreed()
            if stopped:
                save_at_once(run, folder, log)
            else:
                report(run, folder, log)
            if stopped or at.iteration >= c.max_iters:
                break
            step = iterate(run)
            check_skipped(run, step, log)
            log.pending.append(step)
            at.iteration += 1
            if at.iteration % c.log_interval == 0:
                log.flush(at.iteration)
            log.leave_out(profile.step())
    except KeyboardInterrupt:  # the second Ctrl-C
        stopped, at_once = signal.SIGINT, True
    except NotFinite as error:
        diverged = error
    except UserError:  # The data was changed.
        diverged = save_if_alone(run, folder, log)
        if diverged is None:
            raise
    finally:
        try:
            profile.close()
            used = folder.close(wait=not at_once)
        finally:
            # Not earlier: a signal would kill the process while it writes a checkpoint.
            signals.restore()
    if not at_once:  # This waits for the others: torchrun stops every process once one exits.
        used = total(p.gather(used))
    conclude(run, folder, log, used, stopped, diverged)


def check_skipped(run: Run, step: Step, log: Log) -> None:
    """Raises NotFinite if too many iterations in a row were skipped."""
    if run.progress.skipped_in_a_row == MOST_SKIPPED:
        log.flush(run.progress.iteration)
        what = f"{MOST_SKIPPED} iterations in a row skipped"
        not_finite_ones = run.gradients.not_finite(step.squares)
        raise not_finite(run.progress.iteration, what, not_finite_ones)


def iterate(run: Run) -> Step:
    """One iteration: forward and backward for all windows of this process, clip, step."""
    c, p, at = run.c, run.processes, run.progress
    # Noise is a pure function of (seed, iteration, rank): no random state needs saving, and
    # evaluation cannot disturb it.
    torch.manual_seed((c.seed * 1_000_003 + at.iteration) * 4096 + p.rank)
    step = Step.begin(p.device)
    step.lr = learning_rate(at.iteration, c)
    set_learning_rate(run.optimizer, step.lr)
    here = p.share(c.windows)
    micro = list(run.batches.training(c.seed, at.iteration, here, c.windows, c.batch_size))
    for j, (x, y) in enumerate(micro):
        distributed.synchronise(run.wrapped, j == len(micro) - 1)
        x, y = (to_device(t, p.device) for t in (x, y))
        with run.autocast:
            _, loss, distance = run.wrapped(
                x, y, "sum", with_distance=True, recompute=c.activation_checkpointing
            )
        # Gradients are averaged over processes, hence the factor.
        run.scaler.scale(loss * (p.world / run.work.targets)).backward()
        step.add(loss, distance)
    run.scaler.unscale_(run.optimizer)
    run.gradients.measure(step)
    # Under float16 a gradient may overflow, and then the scale is lowered.
    may_skip = c.on_nan == "skip" or run.scaler.is_enabled()
    if may_skip and not math.isfinite(step.norm.item()):
        at.skipped, at.skipped_in_a_row = at.skipped + 1, at.skipped_in_a_row + 1
    else:
        at.skipped_in_a_row = 0
        if c.grad_clip:
            run.gradients.clip(step.norm, c.grad_clip)
        run.scaler.step(run.optimizer)
    run.scaler.update()  # If `unscale_` met a gradient that is not finite, this lowers the scale.
    run.optimizer.zero_grad(set_to_none=True)
    step.skipped = at.skipped
    return step


def to_device(x: torch.Tensor, device: str) -> torch.Tensor:
    """Copies a tensor to the device. On CUDA it does not wait for the copy."""
    if device.startswith("cuda"):
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def save_at_once(run: Run, folder: RunFolder, log: Log) -> None:
    """Saves a checkpoint without an evaluation, if the newest one lacks iterations."""
    at = run.progress
    if at.iteration not in (at.evaluated, log.first):
        log.flush(at.iteration)
        folder.save(run, None)


def save_if_alone(run: Run, folder: RunFolder, log: Log) -> NotFinite | None:
    """Saves as `save_at_once`. Does nothing if there are other processes, because these may be in
    another iteration.

    Returns: the error if a loss or gradient since the last line is not finite, else None.
    """
    if run.processes.world > 1:
        return None
    try:
        save_at_once(run, folder, log)
    except NotFinite as error:
        return error
    return None


def report(run: Run, folder: RunFolder, log: Log) -> None:
    """Does what is due before an iteration: prints a sample of text, evaluates and saves."""
    c, at = run.c, run.progress
    due = at.iteration % c.eval_interval == 0 or at.iteration == c.max_iters
    due = due and at.iteration != at.evaluated
    sample = c.sample_interval and at.iteration % c.sample_interval == 0
    if due or sample:
        log.flush(at.iteration)
    if sample:
        write_sample(run, folder)
    if due:
        evaluate_and_save(run, folder)
    if due or sample:
        log.restart_clock()


def write_sample(run: Run, folder: RunFolder) -> None:
    """Prints a sample of text, or that the weights have diverged, which --on_nan handles."""
    at = run.progress
    try:
        text = sample_text(run.model, run.data, run.autocast, run.c.seed)
    except Diverged as error:
        run.say(f"iter {at.iteration}: no sample: {error}")
        return
    run.say(f"iter {at.iteration}: {text!r}")
    folder.write({"iter": at.iteration, "sample": text})


def evaluate_and_save(run: Run, folder: RunFolder) -> None:
    """Evaluates, prints the results, and saves a checkpoint unless training is still to begin.

    If the loss is not finite, none is saved: it would take the place of a good one.
    Raises: NotFinite if the validation loss is not finite, with --on_nan=skip only at the end.
    """
    at = run.progress
    found = run.evaluate(run.model)
    loss = found["val_loss"]
    if at.iteration == 0:
        found |= run.of_source
    words = [f"val loss {loss:.4f}"]
    words += [f"{k.replace('_', ' ')} {v:.4g}" for k, v in found.items() if k != "val_loss"]
    run.say(f"iter {at.iteration}: " + "  ".join(words))
    folder.write({"iter": at.iteration, **found})
    at.evaluated = at.iteration
    if not math.isfinite(loss):
        if run.c.on_nan == "stop" or at.iteration == run.c.max_iters:
            raise not_finite(at.iteration, f"validation loss {loss}", [])
        return
    if at.iteration > 0 or run.c.max_iters == 0:
        at.best_loss = min(at.best_loss, loss)
        folder.save(run, loss)


if __name__ == "__main__":
    distributed.run(main)
