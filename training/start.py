"""The start of a run: its settings, checks of them, and the checkpoint that it resumes from.

Nothing here writes files.
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from base.command_line import known, parse, read_yaml, split_flags
from base.errors import UserError, check
from base.files import json_object
from base.output import listed, tell
from harmonic import HarmonicHead
from harmonic.compiled import load
from model import Model, ModelConfig
from text.token_files import Data, check_tokenizer, data_folder, has_tokenizer, load_data
from text.tokenizers import tokenizer_file
from training import checkpoint, distributed
from training.advice import gpu_multiplies_bfloat16
from training.config import TrainConfig
from training.data import split_problems
from training.distributed import Processes, shared_error, torchrun_process
from training.emissions import country_problem
from training.environment import kept_starts, other_windows
from training.metrics import check_loggers
from training.objective import objective_of
from training.step import Progress

REORDERED = (
    "in another data order it would read some windows twice in this epoch and others not at all;"
    " --new_data_order=true accepts that"
)

STARTED_AGAIN = "HARMONIC_STARTED_AGAIN"  # Set in a process that `compile_kernels` has started.


def configure(
    argv: list[str], find: Callable[[str], Any]
) -> tuple[ModelConfig, TrainConfig, dict | None, Any]:
    """Reads the config file, the flags, and the run or model to start from.

    find: finds the model that --init_from names; see `interop.pretrained.find`.
    Returns: the configurations of model and training, the stored settings of a resumed run or None,
        and the result of `find` or None.
    Raises: UserError that lists everything that is wrong.
    """
    switches = {
        f.name for c in (ModelConfig, TrainConfig) for f in fields(c) if f.type in (bool, "bool")
    }
    words, flags = split_flags(argv, switches)
    given = {**(read_yaml(words[0]) if words else {}), **dict(flags)}
    # `parse` reports what is no text.
    texts = {k: v for k, v in given.items() if isinstance(v, str) and v != "null"}
    out_dir = Path(texts.get("out_dir") or TrainConfig.out_dir)
    init_from, start = texts.get("init_from"), texts.get("source")
    if init_from not in (None, "scratch", "resume", "auto"):
        init_from, start = "scratch", init_from
    # If torchrun has restarted its processes (--max-restarts), resume the run that they began.
    if init_from in (None, "scratch") and begun_by_this_torchrun(out_dir):
        init_from = "auto"
        tell(
            f"note: a torchrun with the id {os.environ['TORCHELASTIC_RUN_ID']} began the run in"
            f" {out_dir}, so it is resumed. To start a new run, use another --rdzv_id or --out_dir"
        )
    resume = init_from == "resume" or (init_from == "auto" and bool(checkpoint.folders(out_dir)))
    base: dict | None = None
    source = None
    if start and not resume:
        source = _find(find, start, "init_from" if given.get("init_from") == start else "source")
        base = source.defaults(given)
    if resume:
        if not checkpoint.folders(out_dir):
            checkpoint.newest(out_dir)  # Raises the UserError.
        base = known(
            read_yaml(out_dir / "config.yaml"), out_dir / "config.yaml", ModelConfig, TrainConfig
        )
        base["out_dir"] = str(out_dir)  # The folder may have been moved.
    model, config = parse(argv, ModelConfig, TrainConfig, config_file=True, base=base)
    config.init_from, config.source = init_from or "scratch", start or config.source
    problems = start_problems(given, config, start)
    if resume and base is not None:
        problems += resume_problems(out_dir, base, model, config)
        if start and os.path.normpath(start) != os.path.normpath(base.get("source") or ""):
            problems.append(
                f"source={start} does nothing here, because {out_dir} is resumed: to start from"
                " that model, name another --out_dir"
            )
    check(problems)
    if source:
        check(source.problems(model) + ignored_by_a_swap(source, model, dict(flags)))
    return model, config, base if resume else None, source


def start_problems(given: dict, c: TrainConfig, start: str | None) -> list[str]:
    """Why a run cannot start from what it names. given: the settings of the command.

    start: the model that the command names, or None.
    """
    found, source = [], given.get("source")
    if (
        start
        and source not in (None, "null")
        and os.path.normpath(source) != os.path.normpath(start)
    ):
        found.append(
            f"init_from={start} and source={source} name two models to start from: leave one of"
            " them out, or set --source=null"
        )
    if start and c.overwrite and Path(c.out_dir).resolve() == Path(start).resolve():
        found.append(
            f"overwrite=true would delete {start}, from which the run starts: name another"
            " --out_dir"
        )
    if given.get("init_from") in ("resume", "auto") and "overwrite" in given and c.overwrite:
        found.append(
            f"overwrite=true deletes the run in {c.out_dir}, and init_from={given['init_from']}"
            " resumes it: leave one of them out"
        )
    return found


def ignored_by_a_swap(source: Any, model: ModelConfig, flags: dict) -> list[str]:
    """Why flags do nothing if the model to start from gets another head."""
    if model.head == source.head:
        return []
    return [
        f"{key}={flags[key]} does nothing: a swapped head has its own prototypes, which are matched"
        " to the old head"
        for key in ("tie_weights", "head_init_std")
        if flags.get(key, "false") != "false"
    ]


def _find(find: Callable[[str], Any], name: str, flag: str) -> Any:
    """`find(name)`. Its UserError names the flag that was used."""
    try:
        return find(name)
    except UserError as error:
        message = str(error).replace(f"init_from={name}", f"{flag}={name}", 1)
        raise UserError(message) from None


def resume_problems(
    out_dir: Path, base: dict, model: ModelConfig, config: TrainConfig
) -> list[str]:
    """Why a run with the stored settings `base` cannot be resumed with this configuration."""
    found = [
        f"cannot resume {out_dir} with {k}={_shown(v)}: the run has {k}={_shown(base[k])}"
        for k, v in vars(model).items()
        if k not in ModelConfig.free_settings() and k in base and v != base[k]
    ]
    if found:
        found.append(
            "a resumed run keeps its model: leave these settings and config files out, or start"
            f" from its weights with --init_from={out_dir} and another --out_dir"
        )
    if config.optimizer != (before := base.get("optimizer", config.optimizer)):
        found.append(
            f"cannot resume {out_dir} with optimizer={config.optimizer}: its checkpoint holds the"
            f" state of {before}. Start from its weights with --init_from={out_dir} and another"
            " --out_dir"
        )
    folder = data_folder(config.dataset)
    if config.dataset == base.get("dataset") and not folder.is_dir():
        found.append(
            f"no data folder {folder}, on which {out_dir} was trained: name its place on this"
            " machine with --dataset=FOLDER"
        )
    if config.new_data_order or config.eval_only:
        return found
    windows = base.get("batch_size", config.windows) * base.get("gradient_accumulation_steps", 1)
    if config.windows != windows:
        product = (
            f"batch_size={config.batch_size} *"
            f" gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
        found.append(
            f"cannot resume {out_dir} with {product} = {config.windows} windows an iteration: the"
            f" run has {windows}, and {REORDERED}"
        )
    if config.seed != base.get("seed", config.seed):
        found.append(
            f"cannot resume {out_dir} with seed={config.seed}: the run has seed={base['seed']}, and"
            f" {REORDERED}"
        )
    return found


def _shown(value: object) -> str:
    """A value as a user writes it."""
    return "null" if value is None else str(value)


def differences(base: dict, *configs: ModelConfig | TrainConfig) -> dict:
    """The settings that a resumed run changes: key -> [before, now]."""
    found = {}
    for config in configs:
        for f in fields(config):
            key, now = f.name, getattr(config, f.name)
            if key in base and "of_a_start" not in f.metadata and now != base[key]:
                found[key] = [base[key], now]
    return found


def begun_by_this_torchrun(out_dir: Path) -> bool:
    """Whether out_dir holds a run that an earlier start by the same torchrun began.

    environment.json has torchrun's id. Without --rdzv_id the id is always "none". Then this is true
    if the same process of torchrun has restarted its processes.
    """
    identity = os.environ.get("TORCHELASTIC_RUN_ID")
    try:
        stored = json_object((out_dir / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if identity is None or stored is None or stored.get("torchrun") != identity:
        return False
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    same = torchrun_process() in (stored.get("torchruns") or [])
    return identity != "none" or (same and restarts > 0)


def fit_to_data(model: ModelConfig, config: TrainConfig, source: Any) -> Data:
    """Loads the data and sets the sizes of the vocabulary. UserError lists what does not fit."""
    data = load_data(data_folder(config.dataset), config.tokenizer)
    config.tokenizer = data.tokenizer  # Stored with the run for sampling.
    rows = objective_of(model.arch).rows(data)
    problems = _missing(data, config) + split_problems(data, model.block_size)
    if config.sample_interval and objective_of(model.arch).masked:
        problems.append(
            f"sample_interval: arch={model.arch} is a masked language model and writes no text:"
            " leave --sample_interval out"
        )
    unreadable = source.reads(data) if source else None
    problems += filter(None, [unreadable])
    if model.real_vocab_size == 0 or (
        source and model.real_vocab_size == source.settings["real_vocab_size"]
    ):
        model.real_vocab_size = data.vocab_size
    if model.vocab_size == 0:
        model.vocab_size = 64 * math.ceil(rows / 64)  # GPUs are faster with multiples of 64.
    if model.vocab_size < rows:
        problems.append(_too_small(model.vocab_size, rows, data, source, unreadable is None))
    if model.doc_mask and model.eot_id is None:
        model.eot_id = data.eot_id
    if model.doc_mask and model.eot_id is not None and model.eot_id >= data.vocab_size:
        problems.append(
            f"eot_id={model.eot_id} is not a token of {data.tokenizer}, which has ids below"
            f" {data.vocab_size}: leave --eot_id out to use the data's, {data.eot_id}"
        )
    if not data.vocab_size <= model.real_vocab_size <= max(model.vocab_size, rows):
        problems.append(
            f"real_vocab_size={model.real_vocab_size} is not between the data's {data.vocab_size}"
            f" and vocab_size={model.vocab_size}"
        )
    check(problems)
    return data


def _too_small(vocab_size: int, rows: int, data: Data, source: Any, readable: bool) -> str:
    """Why a vocabulary has too few rows for the data, which needs `rows`, and what helps.

    readable: whether the tokens of `source` are those of the data.
    """
    fix = "leave --vocab_size out"
    if source and vocab_size == source.settings["vocab_size"]:
        fix = f"that is the size of {source.name}"
        if readable:
            more = 64 * math.ceil(rows / 64)
            fix += f". With --vocab_size={more} the tokens that it lacks get rows of zeros"
    mask = " and its mask token" if rows > data.vocab_size else ""
    return (
        f"vocab_size={vocab_size} is smaller than the data's {rows} ({data.tokenizer}{mask}): {fix}"
    )


def _missing(data: Data, config: TrainConfig) -> list[str]:
    """What a run needs beside token files and is not there: a tokenizer, packages, a country."""
    problems = check_loggers(config.tensorboard, config.wandb)
    if not has_tokenizer(data):
        problems.append(
            f"{data.folder} has no {tokenizer_file(data.tokenizer)}: prepare the folder again with"
            " prepare_openwebtext.py --overwrite=true"
        )
    measured = config.emissions and not config.eval_only
    if measured and (problem := country_problem(config.emissions_country)):
        problems.append(problem)
    return problems


def check_machine(m: ModelConfig, c: TrainConfig, device: str) -> None:
    """Raises UserError if compile=true has no C++ compiler, or head_impl no kernels."""
    _check_compiler(c, device)
    _check_kernels(m, device)


def _check_compiler(c: TrainConfig, device: str) -> None:
    if c.compile and device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "compile=true needs a C++ compiler on a CPU and none was found: install g++ (or set"
                " CXX), or use --compile=false"
            ) from None


def _check_kernels(m: ModelConfig, device: str) -> None:
    if m.head_impl in ("auto", "dense", "chunked"):
        return
    if device == "cuda":  # Not all processes of torchrun on the first GPU.
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    head = HarmonicHead(m.n_embd, 2, m.head, **m.head_arguments()).to(device)
    try:
        head.loss(torch.ones(1, m.n_embd, device=device), torch.zeros(1, device=device).long())
    except ValueError as error:
        raise UserError(f"head_impl={m.head_impl}: {error}") from None


def runs_train(words: list[str]) -> bool:
    """Whether a command line of Python runs train.py, by its name or as `-m train`."""
    as_module = ("-m", "train") in zip(words, words[1:], strict=False)
    return as_module or "train.py" in [Path(word).name for word in words]


def compile_kernels(m: ModelConfig, device: str) -> None:
    """Compiles the head's kernels for a CPU if Numba's cache has none, and starts again from there.

    In the process that compiles them, Numba's kernels round in another way than when they come from
    the cache. So without the new start, a run would not resume bit for bit on a new machine.
    A program that runs train.py inside its own process, such as a test, is not started again.
    """
    numba = load("numba") if device == "cpu" else None
    if numba is None or not runs_train(sys.orig_argv) or STARTED_AGAIN in os.environ:
        return
    head = HarmonicHead(m.n_embd, 8, m.head, **m.head_arguments())
    states = torch.ones(8, m.n_embd, requires_grad=True)
    slow = threading.Timer(1, tell, ["loading the head's kernels; each kind is compiled once"])
    slow.start()
    try:
        head.loss(states, torch.zeros(8, dtype=torch.long)).backward()
    finally:
        slow.cancel()
    if numba.compiled_here():
        tell("compiled the kernels; starting again with them")
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ[STARTED_AGAIN] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def check_out_dir(c: TrainConfig) -> None:
    """Raises UserError if out_dir holds another run, or is not a folder."""
    out_dir = Path(c.out_dir)
    holds_run = (out_dir / "config.yaml").exists() or (out_dir / "ckpt").exists()
    if c.init_from == "scratch" and not c.overwrite and holds_run:
        resume = ""
        if c.eval_only and c.source:
            return  # It writes nothing.
        if c.eval_only:
            raise UserError(
                f"{out_dir} holds a run: --init_from=resume evaluates it. To evaluate another"
                " model, name another --out_dir"
            )
        if checkpoint.folders(out_dir):
            resume = f"resume it with --init_from=resume --out_dir={out_dir}, "
        raise UserError(
            f"{out_dir} already holds a run: {resume}replace it with --overwrite=true, or name"
            " another --out_dir"
        )
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir={out_dir} is a file: name another --out_dir")


# What may differ between processes: places on their machines, and what to do at the start.
OWN = {f.name for f in fields(TrainConfig) if "of_a_start" in f.metadata}
OWN |= {"device", "dataset", "tokenizer", "emissions_country"}


def start_processes(
    m: ModelConfig, c: TrainConfig, data: Data, device: str, resume: bool
) -> Processes:
    """Joins the process group.

    resume: whether this process found a run to resume.
    Raises: UserError if the processes cannot share an iteration's windows, or differ in what they
        would train.
    """
    p = distributed.start(device, c.backend, c.timeout)
    settings = {k: v for k, v in {**vars(m), **vars(c)}.items() if k not in OWN}
    for name in ("train", "val"):
        settings[f"the data's {name}"] = data.splits[name].identity()[:12]
    every = p.gather((resume, settings, torchrun_process()))
    if len({resume for resume, *_ in every}) > 1:
        raise shared_error(
            f"the processes do not see the same {c.out_dir}: it must be on a disk that all"
            " machines share"
        )
    keys = dict.fromkeys(key for _, settings, _ in every for key in settings)
    values = {key: dict.fromkeys(str(s.get(key)) for _, s, _ in every) for key in keys}
    different = [f"{key} ({' and '.join(v)})" for key, v in values.items() if len(v) > 1]
    if different:
        raise shared_error(
            f"the processes would train with different settings: {listed(different)}. Start all"
            " machines with the same command and the same data"
        )
    if p.world > c.windows or (c.parallel == "fsdp" and c.windows % p.world):
        need = f"a multiple of {p.world}" if c.parallel == "fsdp" else f"at least {p.world}"
        raise shared_error(
            f"{p.world} processes cannot share {c.windows} windows an iteration (batch_size *"
            f" gradient_accumulation_steps): make that product {need}"
        )
    p.torchruns = sorted({torchrun for *_, torchrun in every})
    return p


def precision(
    c: TrainConfig, p: Processes
) -> tuple[str, contextlib.AbstractContextManager, torch.amp.GradScaler]:
    """The name of the trunk's type, its autocast, and the loss scaler of float16.

    Distances and weights are float32.
    """
    dtype = c.dtype
    if dtype == "auto":
        dtype = "bfloat16" if p.kind == "cuda" and gpu_multiplies_bfloat16() else "float32"
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(p.kind, getattr(torch, dtype))
    return dtype, autocast, torch.amp.GradScaler(p.kind, enabled=dtype == "float16")


@dataclass
class Restored:
    """What a resumed run begins with.

    folder: the checkpoint that was loaded.
    changed: the settings that this start changes, compared with the last start: key -> [before,
        now]. If the text is not that of the checkpoint, it has the keys `text` and `val_text`.
    differs: the same, but settings too are compared with the start that wrote the checkpoint.
    """

    progress: Progress
    folder: Path
    changed: dict
    differs: dict


def restore(
    c: TrainConfig,
    data: Data,
    p: Processes,
    model: Model,
    scaler: torch.amp.GradScaler,
    changed: dict,
) -> Restored:
    """Loads the newest good checkpoint.

    changed: the settings that this start changes, compared with the last start.
    Raises: UserError if there is none, or if the run was trained on another file or tokenizer.
    """
    out_dir = Path(c.out_dir)
    check_tokenizer(out_dir, data)
    folder = p.from_main(lambda: checkpoint.newest(out_dir))  # All processes load the same one.
    weights, manifest = checkpoint.read(folder)
    checkpoint.load_weights(model, weights)
    if manifest["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(manifest["scaler"])
    split = data.splits["train"]
    if manifest["data"] != split.identity() and not (c.new_data_order or c.eval_only):
        what = "is not the file it was trained on"
        if not split.sha256:
            what += " (and there is no meta.json)"
        raise UserError(f"cannot resume {out_dir}: {split.path} {what}, and {REORDERED}")
    texts = {
        "text": [manifest["data"], split.identity()],
        "val_text": [manifest.get("val_data"), data.splits["val"].identity()],
    }
    # Older checkpoints have no val_data.
    changed = changed | {k: both for k, both in texts.items() if both[0] not in (None, both[1])}
    this_start = {"iter": manifest["iter"], "changed": changed}
    # A start that was killed or refused may have changed settings, too.
    differs = p.from_main(lambda: kept_starts(out_dir, this_start))[-1]["changed"]
    windows = manifest.get("windows", c.validation_windows)
    same_windows = windows == c.validation_windows and not other_windows(differs)
    progress = Progress(
        iteration=manifest["iter"],
        best_loss=manifest["best_val_loss"] if same_windows else math.inf,
        evaluated=-1 if manifest["val_loss"] is None else manifest["iter"],
        skipped=manifest["skipped"],
        skipped_in_a_row=manifest.get("skipped_in_a_row", 0),
    )
    return Restored(progress, folder, changed, differs)
