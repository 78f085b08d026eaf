"""Trains a language model with a harmonic head.

    python train.py configs/demo.yaml --head=manhattan --max_iters=200 --out_dir=out/l1
    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m.yaml --head=cosine
    python train.py --init_from=resume --out_dir=out/l1

A config is a YAML file given first; flags are --key=value and override it. The run's folder is described in README.md.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from harmonic import softmax_linearization_kl
from model import Model, ModelConfig, adamw
from training import checkpoint, distributed
from training.config import TrainConfig, UserError, check, cli, parse, read_yaml, split_flags, write_yaml
from training.data import data_folder, load_data, masked_count, training_batches, validation_batches, validation_windows
from training.telemetry import Emissions, Metrics, check_loggers, duration, environment, peak_flops
from training.tokenizer import BPE_FILE


def configure(argv: list[str]) -> tuple[ModelConfig, TrainConfig, bool]:
    """Reads file, flags and, when resuming, the stored run -> (model config, training config, whether to resume)."""
    switches = {f.name for c in (ModelConfig, TrainConfig) for f in fields(c) if f.type in (bool, "bool")}
    words, flags = split_flags(argv, switches)
    given = {**(read_yaml(words[0]) if words else {}), **dict(flags)}
    out_dir, init_from = Path(given.get("out_dir") or TrainConfig.out_dir), given.get("init_from")
    resume = init_from == "resume" or (init_from == "auto" and bool(checkpoint.manifests(out_dir)))
    base = None
    if resume:
        checkpoint.newest(out_dir)  # complains when there is none
        base = read_yaml(out_dir / "config.yaml")
    model, config = parse(argv, ModelConfig, TrainConfig, config_file=True, base=base)
    if resume:
        free = ("head_impl", "head_skip", "head_precision", "dropout")  # no part of the weights
        now = {**{k: v for k, v in vars(model).items() if k not in free}, "dataset": config.dataset}
        check([f"cannot resume {out_dir} with {k}={v}: the run has {k}={base[k]}" for k, v in now.items() if k in base and v != base[k]])
    return model, config, resume


def fit_to_data(model: ModelConfig, config: TrainConfig):
    """Loads the data and fills in the vocabulary -> Data. UserError listing what does not fit."""
    data = load_data(data_folder(config.dataset), config.tokenizer)
    config.tokenizer = data.tokenizer  # stored with the run, so that sampling knows it
    rows = data.rows(model.arch)
    problems = check_loggers(config.tensorboard, config.wandb)
    for name in ("train", "val"):
        if data.splits[name].tokens <= model.block_size:
            problems.append(
                f"block_size={model.block_size} is longer than the data: {data.splits[name].path} has {data.splits[name].tokens:,} tokens"
            )
    if model.vocab_size == 0:
        model.vocab_size = 64 * math.ceil(rows / 64)  # a multiple of 64 multiplies faster on GPUs
    if model.vocab_size < rows:
        problems.append(
            f"vocab_size={model.vocab_size} is smaller than the data's {rows}"
            f" ({data.tokenizer}{' and its mask token' if rows > data.vocab_size else ''})"
        )
    if model.real_vocab_size == 0:
        model.real_vocab_size = data.vocab_size
    if not data.vocab_size <= model.real_vocab_size <= max(model.vocab_size, rows):
        problems.append(
            f"real_vocab_size={model.real_vocab_size} is not between the data's {data.vocab_size} and vocab_size={model.vocab_size}"
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
                "compile=true needs a C++ compiler on a CPU and none was found: install g++ (or set CXX), or use --compile=false"
            ) from None


def learning_rate(iteration: int, c: TrainConfig) -> float:
    """Linear warm-up, then a cosine from learning_rate to min_lr (nanoGPT's schedule)."""
    end = c.max_iters if c.lr_decay_iters is None else c.lr_decay_iters
    low = c.learning_rate / 10 if c.min_lr is None else c.min_lr
    if iteration < c.warmup_iters:
        return c.learning_rate * (iteration + 1) / (c.warmup_iters + 1)
    if iteration >= end:
        return low
    return low + 0.5 * (1 + math.cos(math.pi * (iteration - c.warmup_iters) / (end - c.warmup_iters))) * (c.learning_rate - low)


def main():
    # configuration: everything is checked before anything is written
    m, c, resume = configure(sys.argv[1:])
    device = distributed.check_device(c.device)
    out_dir = Path(c.out_dir)
    data = fit_to_data(m, c)
    if c.compile:
        check_compiler(device)
    if c.init_from == "scratch" and not c.overwrite and ((out_dir / "config.yaml").exists() or (out_dir / "ckpt").exists()):
        go_on = f"go on with --init_from=resume --out_dir={out_dir}, " if checkpoint.manifests(out_dir) else ""
        raise UserError(f"{out_dir} already holds a run: {go_on}replace it with --overwrite=true, or name another --out_dir")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir={out_dir} is a file")

    # processes: each takes its share of an iteration's windows
    p = distributed.start(device, c.backend)
    device, kind = p.device, p.device.split(":")[0]
    slots = c.batch_size * c.gradient_accumulation_steps
    if p.world > slots:
        raise UserError(
            f"{p.world} processes share {slots} windows an iteration (batch_size * gradient_accumulation_steps): raise one of them"
        )
    mine = p.share(slots)
    targets_per_window = masked_count(m.block_size) if m.arch == "bert" else m.block_size
    targets = slots * targets_per_window  # of an iteration, over all processes
    say = print if p.main else lambda *_, **__: None

    # precision: autocast for the trunk, float32 for distances and weights
    dtype = c.dtype if c.dtype != "auto" else "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(kind, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16")

    # model and optimiser
    torch.manual_seed(c.seed)
    model = Model(m).to(device)
    optimizer = adamw(model, c.learning_rate, (c.beta1, c.beta2), c.weight_decay, c.prototype_decay, kind)
    iteration, best_loss, evaluated = 0, math.inf, -1
    if resume:
        folder = checkpoint.newest(out_dir)
        weights, state, manifest = checkpoint.read(folder)
        checkpoint.load_weights(model, weights)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        iteration, best_loss, evaluated = manifest["iter"], manifest["best_val_loss"], manifest["iter"]
        del weights, state
        if iteration >= c.max_iters and not c.eval_only:
            say(f"{out_dir} is already trained to iteration {iteration}; raise --max_iters to go on")
            return
    if c.compile:
        model.trunk = torch.compile(model._trunk, fullgraph=True)
    ddp = DistributedDataParallel(model, device_ids=[p.local_rank] if kind == "cuda" else None) if p.world > 1 else model
    head_parameters = list(model.head.parameters())
    trunk_parameters = [q for q in model.parameters() if all(q is not h for h in head_parameters)]

    # the run's folder
    metrics = emissions = None
    if p.main and not c.eval_only:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out_dir={out_dir} cannot be made: {error.strerror}") from None
        if not resume:
            for name in ("ckpt", "tensorboard"):
                shutil.rmtree(out_dir / name, ignore_errors=True)
            for name in ("config.yaml", "environment.json", "metrics.jsonl", *(f.name for f in out_dir.glob("emissions*.csv"))):
                (out_dir / name).unlink(missing_ok=True)
        if (data.folder / BPE_FILE).is_file():  # so that the run can be sampled wherever it is
            shutil.copyfile(data.folder / BPE_FILE, out_dir / BPE_FILE)
        write_yaml(out_dir / "config.yaml", m, replace(c, init_from="scratch", overwrite=False, eval_only=False))
        (out_dir / "environment.json").write_text(json.dumps(environment(device, p.world), indent=2))
        metrics = Metrics(out_dir, iteration, c.tensorboard, c.wandb, {**vars(m), **vars(c)})
    p.barrier()
    if c.emissions and p.local_rank == 0 and not c.eval_only:  # one tracker a node
        emissions = Emissions(out_dir, c.emissions_country, int(os.environ.get("GROUP_RANK", 0)))

    say(
        f"{m.arch}, {m.n_layer} layers, {m.n_embd} wide, {model.parameter_count() / 1e6:.2f} M parameters, head {model.head.extra_repr()}\n"
        f"data {data.folder}: {data.splits['train'].tokens:,} training tokens, {data.tokenizer}; "
        f"an iteration is {slots * m.block_size:,} tokens ({slots} windows of {m.block_size})\n"
        f"{p.world} process{'es' if p.world > 1 else ''} on {device}, {dtype}{', compiled' if c.compile else ''}"
    )
    val = data.splits["val"]
    windows = validation_windows(val.tokens, m.block_size, c.eval_iters * c.batch_size)

    def evaluate() -> dict:
        """The unsmoothed negative log likelihood of the fixed validation windows, summed over all processes and divided once."""
        model.eval()
        share = p.share(len(windows))
        total = torch.zeros(2, dtype=torch.float64)
        kl = None
        with torch.no_grad(), autocast:
            for x, y in validation_batches(data, m.arch, m.block_size, windows[share.start : share.stop], c.batch_size):
                x, y = x.to(device), y.to(device)
                total += torch.tensor([model(x, y, reduction="sum")[1].item(), (y != -1).sum().item()], dtype=torch.float64)
            if p.main:  # 256 states show how far the head is from a softmax
                few = windows[: max(1, 256 // m.block_size)]
                x, _ = next(validation_batches(data, m.arch, m.block_size, few, len(few)))
                kl = softmax_linearization_kl(model.hidden(x.to(device)).reshape(-1, m.n_embd)[:256], model.head)
        model.train()
        total = p.reduce(total.to(device if kind == "cuda" else "cpu"))
        loss = (total[0] / total[1]).item()
        found = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
        if m.arch != "bert":  # masked prediction gives no likelihood of a text
            # the split's own tokens per byte: the windows are an even sample of it
            found["bits_per_byte"] = loss / math.log(2) * val.tokens / val.bytes
        if kl is not None:
            found["kl_to_softmax"] = kl
        if model.head.log_strength is not None:
            found["strength"] = model.head.strength().item()
        return found

    def save(loss: float):
        if p.main:
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            checkpoint.save(
                out_dir, iteration, model, state, {"val_loss": loss, "best_val_loss": best_loss, "tokens": iteration * slots * m.block_size}
            )
            if emissions:
                emissions.flush()
        p.barrier()

    if c.eval_only:
        say(" ".join(f"{k} {v:.4f}" for k, v in evaluate().items()))
        return distributed.stop()

    pending = []  # one row of device scalars for each iteration since the last line
    began = clock = time.perf_counter()
    first = iteration

    def flush():
        """Moves the pending rows off the device, adds them up over the processes and writes them."""
        nonlocal pending, clock
        if not pending:
            return
        now = time.perf_counter()
        table = torch.stack(pending).double().cpu() if kind == "mps" else torch.stack(pending).double()
        sums, least = p.reduce(table[:, :2].contiguous()), p.reduce(table[:, 2].contiguous(), "min")
        table = torch.cat((sums, least[:, None], table[:, 3:]), 1).tolist()
        speed = len(pending) * slots * m.block_size / (now - clock)
        mfu = speed * model.flops_per_token() / (peak * p.world) if peak else None
        for i, (loss, distance, nearest, norm, norm_head, norm_trunk, radius, lr) in enumerate(table, iteration - len(table)):
            record = {
                "iter": i,
                "train_loss": loss / targets,
                "lr": lr,
                "grad_norm": norm,
                "grad_norm_head": norm_head,
                "grad_norm_trunk": norm_trunk,
                "prototype_radius": radius,
            }
            if model.head.kind != "control":
                record |= {"target_distance_min": nearest, "target_distance_mean": distance / targets}
            record |= {"tokens_per_s": speed, "elapsed_s": now - began}
            if mfu is not None:
                record["mfu"] = mfu
            if metrics:
                metrics.write(record)
            if not math.isfinite(loss) or (not math.isfinite(norm) and not scaler.is_enabled()):
                last = [f.name for f in checkpoint.manifests(out_dir)][-1:]
                what = f"loss {loss / targets}" if not math.isfinite(loss) else f"gradient norm {norm}"
                say(f"stopped: {what} at iteration {i}; last good checkpoint: {last[0] if last else 'none'}", file=sys.stderr)
                distributed.stop()
                sys.exit(3)
        eta = (now - began) / (iteration - first) * (c.max_iters - iteration)
        say(
            f"iter {iteration:>{len(str(c.max_iters))}}/{c.max_iters}  loss {record['train_loss']:.4f}  lr {record['lr']:.2e}"
            f"  grad norm {record['grad_norm']:.3f}  {speed:,.0f} tokens/s{'' if mfu is None else f'  mfu {mfu:.1%}'}  ETA {duration(eta)}",
            flush=True,
        )
        pending, clock = [], time.perf_counter()

    # the loop
    peak = peak_flops(device)
    model.train()
    try:
        while True:
            if (iteration % c.eval_interval == 0 or iteration == c.max_iters) and iteration != evaluated:
                flush()
                found = evaluate()
                say(
                    f"iter {iteration}: "
                    + "  ".join(f"{k.replace('_', ' ')} {v:.4g}" if k != "val_loss" else f"val loss {v:.4f}" for k, v in found.items()),
                    flush=True,
                )
                if metrics:
                    metrics.write({"iter": iteration, **found})
                best_loss = min(best_loss, found["val_loss"])
                if iteration > 0:
                    save(found["val_loss"])
                clock = time.perf_counter()
            if iteration >= c.max_iters:
                break

            # noise is a pure function of (seed, iteration, rank): no random state needs saving, evaluation cannot disturb it
            torch.manual_seed((c.seed * 1_000_003 + iteration) * 4096 + p.rank)
            lr = learning_rate(iteration, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            row = torch.zeros(8, device=device)
            row[2] = math.inf
            micro = list(training_batches(data, m.arch, m.block_size, c.seed, iteration, mine, slots, c.batch_size))
            for j, (x, y) in enumerate(micro):
                if p.world > 1:
                    ddp.require_backward_grad_sync = j == len(micro) - 1
                if kind == "cuda":
                    x, y = x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
                else:
                    x, y = x.to(device), y.to(device)
                with autocast:
                    _, loss = ddp(x, y, reduction="sum")
                scaler.scale(loss * (p.world / targets)).backward()  # DDP averages over processes, hence the factor
                row[0] += loss.detach()
                if model.target_distance is not None:
                    row[1] += model.target_distance.sum()
                    row[2] = torch.minimum(row[2], model.target_distance.min())
            scaler.unscale_(optimizer)
            norm_head, norm_trunk = (
                torch.nn.utils.get_total_norm([q.grad for q in qs if q.grad is not None]) for qs in (head_parameters, trunk_parameters)
            )
            norm = torch.hypot(norm_head, norm_trunk)
            if c.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), c.grad_clip, norm)
            with torch.no_grad():
                row[3:] = torch.stack(
                    (norm, norm_head, norm_trunk, model.head.prototypes().norm(dim=-1).mean(), torch.tensor(lr, device=device))
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            pending.append(row)
            iteration += 1
            if iteration % c.log_interval == 0:
                flush()
    except KeyboardInterrupt:
        kept = [f.name for f in checkpoint.manifests(out_dir)][-1:]
        resume_command = f"python train.py --init_from=resume --out_dir={out_dir}"
        how = f"go on from {kept[0]} with: {resume_command}" if kept else "no checkpoint was written yet"
        say(f"\ninterrupted at iteration {iteration}; {how}", file=sys.stderr)
        sys.exit(130)
    finally:
        used = emissions.stop() if emissions else None
        if metrics:
            metrics.close()
    energy = f", {used[0] * 1000:.2f} Wh, {used[1] * 1000:.2f} g CO2e" if used else ""
    say(f"done: {out_dir}, best val loss {best_loss:.4f}, {duration(time.perf_counter() - began)}{energy}")
    distributed.stop()


if __name__ == "__main__":
    cli(main)
