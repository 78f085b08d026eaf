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
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from harmonic import IGNORE_INDEX, softmax_linearization_kl
from model import Model, ModelConfig, adamw
from training import checkpoint, distributed, pretrained
from training.advice import about_products, senseless_settings, slow_settings
from training.config import (
    TrainConfig,
    UserError,
    check,
    known,
    parse,
    read_yaml,
    split_flags,
    write_yaml,
)
from training.data import (
    data_folder,
    load_data,
    predicted_count,
    split_problems,
    training_batches,
    validation_batches,
    validation_windows,
    verify,
)
from training.distributed import local
from training.telemetry import (
    Emissions,
    Metrics,
    check_loggers,
    duration,
    environment,
    listed,
    norms,
    peak_flops,
    write_environment,
)
from training.tokenizer import copy_tokenizer
from training.verify import verify_resume

REORDERED = (
    "another order of the data would read some windows twice in this epoch and others not at all;"
    " --new_data_order=true accepts that"
)
STARTING = (
    "init_from",
    "source",
    "out_dir",
    "overwrite",
    "eval_only",
    "verify_resume",
    "new_data_order",
)  # of a start, not of a run


def configure(
    argv: list[str],
) -> tuple[ModelConfig, TrainConfig, dict | None, pretrained.Pretrained | None]:
    """Reads file, flags and what there is to start from -> (model config, training config, the
    stored config of a run that is resumed, the
    pretrained model)."""
    switches = {
        f.name for c in (ModelConfig, TrainConfig) for f in fields(c) if f.type in (bool, "bool")
    }
    words, flags = split_flags(argv, switches)
    given = {**(read_yaml(words[0]) if words else {}), **dict(flags)}
    out_dir, init_from = Path(given.get("out_dir") or TrainConfig.out_dir), given.get("init_from")
    start = given.get("source")
    if init_from not in (None, "scratch", "resume", "auto"):
        init_from, start = "scratch", init_from
    if init_from in (None, "scratch") and begun_by_this_torchrun(
        out_dir
    ):  # which has started its processes again: --max-restarts
        init_from = "auto"
    resume = init_from == "resume" or (init_from == "auto" and bool(checkpoint.folders(out_dir)))
    base = source = None
    if start and not resume:
        source = pretrained.find(start)
        base = source.settings
    if resume:
        if not checkpoint.folders(out_dir):
            checkpoint.newest(out_dir)  # says so
        base = known(
            read_yaml(out_dir / "config.yaml"), out_dir / "config.yaml", ModelConfig, TrainConfig
        )
        base["out_dir"] = str(out_dir)  # the folder may have been copied or renamed since
    model, config = parse(argv, ModelConfig, TrainConfig, config_file=True, base=base)
    config.init_from, config.source = init_from or "scratch", start or config.source
    if resume:
        check(resume_problems(out_dir, base, model, config))
    if source:
        check(source.problems(model))
    return model, config, base if resume else None, source


def resume_problems(
    out_dir: Path, base: dict, model: ModelConfig, config: TrainConfig
) -> list[str]:
    """Why a run with the stored configuration `base` cannot be resumed with this one."""
    free = ("head_impl", "head_skip", "head_precision", "dropout")  # no part of the model
    found = [
        f"cannot resume {out_dir} with {k}={v}: the run has {k}={base[k]}"
        for k, v in vars(model).items()
        if k not in free and k in base and v != base[k]
    ]
    folder = data_folder(config.dataset)
    if config.dataset == base.get("dataset") and not folder.is_dir():
        found.append(
            f"no data folder {folder}, on which {out_dir} was trained: name its place on this"
            " machine with --dataset=FOLDER"
        )
    if config.new_data_order or config.eval_only:
        return found
    slots = config.batch_size * config.gradient_accumulation_steps
    before = base.get("batch_size", slots) * base.get("gradient_accumulation_steps", 1)
    if slots != before:
        product = (
            f"batch_size={config.batch_size} *"
            f" gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
        found.append(
            f"cannot resume {out_dir} with {product} = {slots} windows an iteration: the run has"
            f" {before}, and {REORDERED}"
        )
    if config.seed != base.get("seed", config.seed):
        found.append(
            f"cannot resume {out_dir} with seed={config.seed}: the run has seed={base['seed']}, and"
            f" {REORDERED}"
        )
    return found


def differences(base: dict, *configs) -> dict:
    """What a resumed run sets otherwise than it did: key -> [before, now]."""
    now = {k: v for config in configs for k, v in vars(config).items()}
    return {
        k: [base[k], v] for k, v in now.items() if k in base and k not in STARTING and v != base[k]
    }


def begun_by_this_torchrun(out_dir: Path) -> bool:
    """Whether out_dir holds a run that an earlier start of the same torchrun began. Its identity is
    in environment.json; where it has none
    of its own (--rdzv_id was not given), its count of restarts has to do."""
    identity, restarts = (
        os.environ.get("TORCHELASTIC_RUN_ID"),
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )
    try:
        stored = json.loads((out_dir / "environment.json").read_bytes())["torchrun"]
    except (OSError, ValueError, KeyError):
        return False
    return identity is not None and stored == identity and (identity != "none" or restarts > 0)


def fit_to_data(model: ModelConfig, config: TrainConfig, source: pretrained.Pretrained | None):
    """Loads the data and fills in the vocabulary -> Data. UserError listing what does not fit."""
    data = load_data(data_folder(config.dataset), config.tokenizer)
    config.tokenizer = data.tokenizer  # stored with the run, so that sampling knows it
    rows = data.rows(model.arch)
    problems = check_loggers(config.tensorboard, config.wandb)
    problems += split_problems(data, model.block_size)
    if source and (problem := source.reads(data)):
        problems.append(problem)
    if model.real_vocab_size == 0 or (
        source and model.real_vocab_size == source.settings["real_vocab_size"]
    ):
        model.real_vocab_size = data.vocab_size
    if model.vocab_size == 0:
        model.vocab_size = 64 * math.ceil(rows / 64)  # a multiple of 64 multiplies faster on GPUs
    if model.vocab_size < rows:
        problems.append(
            f"vocab_size={model.vocab_size} is smaller than the data's {rows}"
            f" ({data.tokenizer}{' and its mask token' if rows > data.vocab_size else ''})"
        )
    if model.doc_mask and model.eot_id is None:
        model.eot_id = data.eot_id
    if not data.vocab_size <= model.real_vocab_size <= max(model.vocab_size, rows):
        problems.append(
            f"real_vocab_size={model.real_vocab_size} is not between the data's {data.vocab_size}"
            f" and vocab_size={model.vocab_size}"
        )
    check(problems)
    return data


def check_compiler(device: str):
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "compile=true needs a C++ compiler on a CPU and none was found: install g++ (or set"
                " CXX), or use --compile=false"
            ) from None


def learning_rate(iteration: int, c: TrainConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate to min_lr (nanoGPT's schedule)."""
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    low = c.learning_rate / 10 if c.min_lr is None else c.min_lr
    if iteration < c.warmup_iters:
        return c.learning_rate * (iteration + 1) / (c.warmup_iters + 1)
    if iteration >= end:
        return low
    return low + 0.5 * (
        1 + math.cos(math.pi * (iteration - c.warmup_iters) / (end - c.warmup_iters))
    ) * (c.learning_rate - low)


def main():
    # configuration: everything is checked before anything is written
    m, c, stored, source = configure(sys.argv[1:])
    resume = stored is not None
    device = distributed.check_device(c.device)
    out_dir = Path(c.out_dir)
    data = fit_to_data(m, c, source)
    if c.compile:
        check_compiler(device)
    if c.verify_resume:
        return verify_resume(
            sys.argv[1:], max(c.lr_decay_iters or c.max_iters, c.warmup_iters), c.source
        )
    if (
        c.init_from == "scratch"
        and not c.overwrite
        and ((out_dir / "config.yaml").exists() or (out_dir / "ckpt").exists())
    ):
        go_on = (
            f"go on with --init_from=resume --out_dir={out_dir}, "
            if checkpoint.folders(out_dir)
            else ""
        )
        raise UserError(
            f"{out_dir} already holds a run: {go_on}replace it with --overwrite=true, or name"
            " another --out_dir"
        )
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir={out_dir} is a file")

    # processes: each takes its share of an iteration's windows
    p = distributed.start(device, c.backend, c.timeout)
    device, kind = p.device, p.device.split(":")[0]
    slots = c.batch_size * c.gradient_accumulation_steps
    if p.world > slots or (c.parallel == "fsdp" and slots % p.world):
        raise UserError(
            f"{p.world} processes share {slots} windows an iteration (batch_size *"
            " gradient_accumulation_steps): "
            + ("raise one of them" if p.world > slots else "parallel=fsdp needs equal shares")
        )
    if len(set(p.gather(resume))) > 1:
        raise UserError(
            f"the processes do not see the same {out_dir}: it has to lie where all machines see it"
        )
    if p.local_rank == 0:
        verify(data)
    mine = p.share(slots)
    targets_per_window = predicted_count(m.arch, m.block_size)
    targets = slots * targets_per_window  # of an iteration, over all processes
    say = print if p.main else lambda *_, **__: None

    # precision: autocast for the trunk, float32 for distances and weights
    dtype = (
        c.dtype
        if c.dtype != "auto"
        else "bfloat16"
        if kind == "cuda" and torch.cuda.is_bf16_supported()
        else "float32"
    )
    autocast = (
        contextlib.nullcontext()
        if dtype == "float32"
        else torch.autocast(kind, getattr(torch, dtype))
    )
    scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16")

    # evaluation
    sharded = p.world > 1 and c.parallel == "fsdp"
    val = data.splits["val"]
    windows = validation_windows(val.tokens, m.block_size, c.eval_iters * c.batch_size)
    rounds = math.ceil(
        math.ceil(len(windows) / p.world) / c.batch_size
    )  # the same in all processes: fsdp's work together

    def evaluate(model: Model) -> dict:
        """The unsmoothed negative log likelihood of the fixed validation windows, summed over all
        processes and divided once."""
        model.eval()
        share = p.share(len(windows))
        total = torch.zeros(2, dtype=torch.float64)
        batches = validation_batches(
            data, m.arch, m.block_size, windows[share.start : share.stop], c.batch_size
        )
        nothing = (
            torch.zeros(1, m.block_size, dtype=torch.long),
            torch.full((1, m.block_size), IGNORE_INDEX),
        )
        with torch.no_grad(), autocast:
            for _ in range(rounds):
                x, y = (t.to(device) for t in next(batches, nothing))
                total += torch.tensor(
                    [model(x, y, reduction="sum")[1].item(), (y != IGNORE_INDEX).sum().item()],
                    dtype=torch.float64,
                )
            few = windows[
                : max(1, 256 // m.block_size)
            ]  # 256 states show how far the head is from a softmax
            x, _ = next(validation_batches(data, m.arch, m.block_size, few, len(few)))
            kl = softmax_linearization_kl(
                model.hidden(x.to(device)).reshape(-1, m.n_embd)[:256], model.head
            )
            strength = None if model.head.log_strength is None else model.head.strength.item()
        if isinstance(model, FSDPModule):
            model.reshard()  # what no backward pass does here
        model.train()
        total = p.reduce(total.to(device if kind == "cuda" else "cpu"))
        loss = (total[0] / total[1]).item()
        found = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
        if m.arch != "bert":  # masked prediction gives no likelihood of a text
            # the split's own tokens per byte: the windows are an even sample of it
            found["bits_per_byte"] = loss / math.log(2) * val.tokens / val.bytes
        if kl is not None:
            found["kl_to_softmax"] = kl
        if strength is not None:
            found["strength"] = strength
        return found

    # model and optimiser
    torch.manual_seed(c.seed)
    of_source = {}
    if not source:
        model = Model(m)
    else:
        model = source.load(m)
        if m.head != source.head:
            model.to(device)
            of_source = {
                f"source_{k}": v
                for k, v in evaluate(model).items()
                if k in ("val_loss", "perplexity")
            }
            kl = pretrained.swap(
                model, m, pretrained.states(model.eval(), data, c.seed, c.batch_size)
            )
            with torch.no_grad():  # one choice for all processes
                model.head.weight.copy_(p.from_main(lambda: model.head.weight.detach().cpu()))
                model.head.set_strength(p.from_main(lambda: float(model.head.strength)))
            say(
                f"{source.name} as it is: val loss {of_source['source_val_loss']:.4f}, perplexity"
                f" {of_source['source_perplexity']:.4g}"
            )
            say(
                f"its head swapped for {model.head.extra_repr()}, not tied: KL {kl:.2g} nats a"
                " token on training text"
            )
    iteration, best_loss, evaluated, skipped = 0, math.inf, -1, 0
    if resume:
        folder = p.from_main(lambda: checkpoint.newest(out_dir))  # one choice for all processes
        weights, manifest = checkpoint.read(folder)
        checkpoint.load_weights(model, weights)
        if manifest["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(manifest["scaler"])
        iteration, best_loss, skipped = (
            manifest["iter"],
            manifest["best_val_loss"],
            manifest["skipped"],
        )
        evaluated = -1 if manifest["val_loss"] is None else iteration
        if manifest["data"] != data.splits["train"].identity() and not (
            c.new_data_order or c.eval_only
        ):
            what = "is not the file it was trained on" + (
                "" if data.splits["train"].sha256 else " (and there is no meta.json)"
            )
            raise UserError(
                f"cannot resume {out_dir}: {data.splits['train'].path} {what}, and {REORDERED}"
            )
        if iteration >= c.max_iters and not c.eval_only:
            say(
                f"{out_dir} is already trained to iteration {iteration}; raise --max_iters to go on"
            )
            return
    about = (
        f"{m.arch}, {m.n_layer} layers, {m.n_embd} wide, {model.parameter_count() / 1e6:.2f} M"
        f" parameters, head {model.head.extra_repr()}\n"
        f"data {data.folder}: {data.splits['train'].tokens:,} training tokens, {data.tokenizer}; "
        f"an iteration is {slots * m.block_size:,} tokens ({slots} windows of {m.block_size})\n"
        f"{p.world} process{'es' if p.world > 1 else ''} on"
        f" {device}{f' ({c.parallel})' if p.world > 1 else ''}, {dtype}"
        f"{', compiled' if c.compile else ''}"
    )
    with autocast:
        products = about_products(model.to(device).head)
    flops_per_token = model.flops_per_token(targets_per_window / m.block_size)
    changed = differences(stored, m, c) if resume else {}
    model.recompute = c.activation_checkpointing
    if c.compile:
        for block in model.blocks:  # all alike: one compilation
            block.compile(fullgraph=True)
    wrapped = p.wrap(model.to(device), c.parallel)
    optimizer = adamw(
        model, c.learning_rate, (c.beta1, c.beta2), c.weight_decay, c.prototype_decay, kind
    )
    if resume:
        checkpoint.load_optimizer(model, optimizer, folder)
        del weights
    names, parameters = zip(*model.named_parameters(), strict=True)
    of_head = torch.tensor([name.startswith("head.") for name in names], device=device)

    # the run's folder
    metrics = writer = emissions = None
    if p.main and not c.eval_only:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            if resume:
                checkpoint.set_aside(out_dir, folder)
            else:
                if c.init_from == "auto" and (out_dir / "config.yaml").exists():
                    say(f"{out_dir} holds no checkpoint yet: beginning again")
                for name in ("ckpt", "tensorboard"):
                    shutil.rmtree(out_dir / name, ignore_errors=True)
                for name in ("config.yaml", "metrics.jsonl"):
                    (out_dir / name).unlink(missing_ok=True)
                if (
                    c.init_from == "scratch"
                ):  # auto keeps what an earlier start of the same run has used
                    for path in (out_dir / "environment.json", *out_dir.glob("emissions*.csv*")):
                        path.unlink(missing_ok=True)
            copy_tokenizer(c.tokenizer, data.folder, out_dir)
            write_yaml(
                out_dir / "config.yaml",
                m,
                replace(
                    c, init_from="scratch", overwrite=False, eval_only=False, new_data_order=False
                ),
            )
            write_environment(out_dir, environment(device, p.world), iteration, changed)
            metrics = Metrics(out_dir, iteration, c.tensorboard, c.wandb, {**vars(m), **vars(c)})
        except OSError as error:
            raise UserError(f"out_dir={out_dir} cannot be written: {error.strerror}") from None
        writer = checkpoint.Writer(out_dir)
    p.barrier()
    if c.emissions and p.local_rank == 0 and not c.eval_only:  # one tracker a node
        emissions = Emissions(out_dir, c.emissions_country, int(os.environ.get("GROUP_RANK", 0)))
    say(about if products is None else f"{about}\n{products}")
    notes = (
        [
            "resumed with"
            f" {', '.join(f'{k}={now} (was {before})' for k, (before, now) in changed.items())}"
        ]
        if changed
        else []
    )
    if not c.eval_only:
        flops = flops_per_token * (c.max_iters - iteration) * slots * m.block_size
        notes += slow_settings(m, c, kind, dtype, flops) + senseless_settings(m, c, data)
    for note in notes:
        say(f"note: {note}", file=sys.stderr)

    def save(loss: float | None):
        """Takes a copy of everything and lets it be written while training goes on."""
        if writer:
            writer.wait()  # before there is another copy
        files = checkpoint.snapshot(model, optimizer, keep=p.main)
        if p.main:
            metrics.sync()
            counters = {
                "val_loss": loss,
                "best_val_loss": best_loss,
                "tokens": iteration * slots * m.block_size,
                "skipped": skipped,
            }
            writer.save(
                iteration,
                files,
                {
                    **counters,
                    "scaler": scaler.state_dict(),
                    "data": data.splits["train"].identity(),
                },
            )
            if emissions:
                emissions.flush()

    if c.eval_only:
        say(" ".join(f"{k} {v:.4f}" for k, v in evaluate(model).items()))
        return

    # Of each iteration since the last line: device scalars, the gradient norm of each parameter
    pending = []
    began = clock = time.perf_counter()
    first = iteration

    def flush():
        """Moves the pending rows off the device, adds them up over the processes and writes
        them."""
        nonlocal pending, clock
        if not pending:
            return
        rows = torch.stack([row for row, *_ in pending])
        rows = rows.double().cpu() if kind == "mps" else rows.double()
        own = rows[:, 0].tolist()  # waits for the device
        now = time.perf_counter()
        sums, least = p.reduce(rows[:, :2].contiguous()), p.reduce(rows[:, 2].contiguous(), "min")
        table = torch.cat((sums, least[:, None], rows[:, 3:]), 1).tolist()
        speed = len(pending) * slots * m.block_size / (now - clock)
        mfu = speed * flops_per_token / (peak * p.world) if peak else None
        for j, (loss, distance, nearest, norm, norm_head, norm_trunk, radius, lr) in enumerate(
            table
        ):
            record = {
                "iter": iteration - len(table) + j,
                "train_loss": loss / targets,
                "lr": lr,
                "grad_norm": norm,
                "grad_norm_head": norm_head,
                "grad_norm_trunk": norm_trunk,
                "prototype_radius": radius,
            }
            if not model.head.is_control:
                record |= {
                    "target_distance_min": nearest,
                    "target_distance_mean": distance / targets,
                }
            if c.on_nan == "skip":
                record["skipped"] = pending[j][2]
            record |= {"tokens_per_s": speed, "elapsed_s": now - began}
            if mfu is not None:
                record["mfu"] = mfu
            if metrics:
                metrics.write(record)
            if c.on_nan == "stop" and (
                not math.isfinite(loss) or (not math.isfinite(norm) and not scaler.is_enabled())
            ):
                ranks = [r for r, x in enumerate(p.gather(own[j])) if not math.isfinite(x)]
                where = [
                    name
                    for name, x in zip(names, pending[j][1].tolist(), strict=True)
                    if not math.isfinite(x)
                ]
                what = (
                    f"loss {loss / targets}" if not math.isfinite(loss) else f"gradient norm {norm}"
                )
                give_up(
                    record["iter"], f"{what}{f' on rank {listed(ranks)}' if ranks else ''}", where
                )
        eta = (now - began) / (iteration - first) * (c.max_iters - iteration)
        say(
            "iter"
            f" {iteration:>{len(str(c.max_iters))}}/{c.max_iters}"
            f"  loss {record['train_loss']:.4f}  lr {record['lr']:.2e}"
            f"  grad norm {record['grad_norm']:.3f}  {speed:,.0f}"
            f" tokens/s{'' if mfu is None else f'  mfu {mfu:.1%}'}  ETA {duration(eta)}"
            f"{f'  {skipped} skipped' if skipped else ''}",
            flush=True,
        )
        pending, clock = [], time.perf_counter()

    def give_up(i: int, what: str, where: list[str]):
        """Stops all processes because of what is not finite: they all come here, for they all see
        the same sums."""
        gradients = f"; gradients that are not finite: {listed(where)}" if where else ""
        say(f"stopped: {what} at iteration {i}{gradients}", file=sys.stderr, flush=True)
        if writer:
            writer.wait()
        say(f"last good checkpoint: {checkpoint.last(out_dir)}", file=sys.stderr)
        p.barrier()  # torchrun ends all when one has ended
        sys.exit(3)

    # the loop
    peak = peak_flops(device)
    model.train()
    signals = distributed.StopSignals(p, c.timeout)
    in_a_row, at_once = 0, False
    try:
        while True:
            if (
                iteration % c.eval_interval == 0 or iteration == c.max_iters
            ) and iteration != evaluated:
                flush()
                found = {**evaluate(model), **(of_source if iteration == 0 else {})}
                say(
                    f"iter {iteration}: "
                    + "  ".join(
                        f"{k.replace('_', ' ')} {v:.4g}" if k != "val_loss" else f"val loss {v:.4f}"
                        for k, v in found.items()
                    ),
                    flush=True,
                )
                if metrics:
                    metrics.write({"iter": iteration, **found})
                best_loss, evaluated = min(best_loss, found["val_loss"]), iteration
                if iteration > 0:
                    save(found["val_loss"])
                clock = time.perf_counter()
            stopped = signals.agreed()
            if stopped and iteration != evaluated and iteration > first:
                flush()
                save(None)
            if stopped or iteration >= c.max_iters:
                break

            # noise is a pure function of (seed, iteration, rank): no random state needs saving,
            # evaluation cannot disturb it
            torch.manual_seed((c.seed * 1_000_003 + iteration) * 4096 + p.rank)
            lr = learning_rate(iteration, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            row = torch.zeros(8, device=device)
            row[2] = math.inf
            micro = list(
                training_batches(
                    data, m.arch, m.block_size, c.seed, iteration, mine, slots, c.batch_size
                )
            )
            for j, (x, y) in enumerate(micro):
                distributed.synchronise(wrapped, j == len(micro) - 1)
                if kind == "cuda":
                    x, y = (
                        x.pin_memory().to(device, non_blocking=True),
                        y.pin_memory().to(device, non_blocking=True),
                    )
                else:
                    x, y = x.to(device), y.to(device)
                with autocast:
                    _, loss = wrapped(x, y, reduction="sum")
                scaler.scale(
                    loss * (p.world / targets)
                ).backward()  # gradients are averaged over processes, hence the factor
                row[0] += loss.detach()
                if model.target_distance is not None and len(model.target_distance):
                    row[1] += model.target_distance.sum()
                    row[2] = torch.minimum(row[2], model.target_distance.min())
            scaler.unscale_(optimizer)
            with torch.no_grad():
                gradients = [local(q.grad) for q in parameters]
                table = local(model.head.weight)
                before = (
                    p.rank * -(-len(model.head.weight) // p.world) if sharded else 0
                )  # rows that other processes hold
                here = min(max(model.head.real_vocab_size - before, 0), len(table))
                radius = table[:here].norm(dim=-1).sum()
                squares = torch.cat((norms(gradients).square(), radius[None]))
                if sharded:
                    p.reduce(squares)
                squares, radius = squares[:-1], squares[-1] / model.head.real_vocab_size
                parts = (
                    squares,
                    torch.where(of_head, squares, 0.0),
                    torch.where(of_head, 0.0, squares),
                )
                norm, norm_head, norm_trunk = (s.sum().sqrt() for s in parts)
                row[3:7] = torch.stack((norm, norm_head, norm_trunk, radius))
                row[7] = lr
                if (
                    c.on_nan == "skip"
                    and not scaler.is_enabled()
                    and not math.isfinite(norm.item())
                ):
                    skipped, in_a_row = skipped + 1, in_a_row + 1
                    if in_a_row == 100:
                        flush()
                        give_up(
                            iteration,
                            "100 iterations in a row skipped",
                            [n for n, s in zip(names, squares, strict=True) if not s.isfinite()],
                        )
                else:
                    in_a_row = 0
                    if c.grad_clip:
                        torch._foreach_mul_(gradients, (c.grad_clip / (norm + 1e-6)).clamp(max=1.0))
                    scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            pending.append((row, squares, skipped))
            iteration += 1
            if iteration % c.log_interval == 0:
                flush()
    except KeyboardInterrupt:
        stopped, at_once = signal.SIGINT, True
    finally:
        signals.restore()
        if writer and not at_once:
            writer.wait()  # whatever ended the loop, what is being written is good
        if metrics:
            metrics.close()
        used = emissions.stop() if emissions else None
    if not at_once:
        p.barrier()  # torchrun ends all when one has ended
    energy = f", {used[0] * 1000:.2f} Wh, {used[1] * 1000:.2f} g CO2e" if used else ""
    if stopped:
        how = (
            f"go on from {checkpoint.last(out_dir)} with: python train.py --init_from=resume"
            f" --out_dir={out_dir}"
        )
        if not checkpoint.manifests(out_dir):
            how = "no checkpoint was written yet"
        say(
            f"\n{signal.Signals(stopped).name}: stopped at iteration {iteration}{energy}; {how}",
            file=sys.stderr,
        )
        sys.exit(128 + stopped)
    say(
        f"done: {out_dir}, best val loss {best_loss:.4f},"
        f" {duration(time.perf_counter() - began)}{energy}"
    )
    if writer and writer.error:
        sys.exit(4)


if __name__ == "__main__":
    distributed.run(main)
