"""Notes about settings that are allowed, but slow on this machine, or that do not fit together.

train.py prints them when it starts.
"""

import math
import os
from dataclasses import replace

import torch

from base.machine import cores, idle_cores
from base.output import duration
from harmonic import HEADS, HarmonicHead
from harmonic.compiled import load
from harmonic.distances import resolve
from model import ModelConfig
from text.token_files import Data
from training.config import TrainConfig
from training.data import other_tokenizer, split_warnings
from training.schedule import learning_rate

MANY_EPOCHS = 8  # A run that reads the text so many times gets a note.
COMPILING = 30  # Seconds to compile a small model on a CPU. Two cores of a Xeon took about 25.
# The most that compiling saves of an iteration's time. This is assumed, not measured.
SAVED = 0.2
PATIENCE = 30  # A CPU whose iterations take more seconds gets a note.
CPU_RATE = 2e10  # Operations per second of a core in training. A rough assumption.


def slow_settings(
    model: ModelConfig,
    config: TrainConfig,
    device: str,
    dtype: str,
    flops: float,
    iterations: int,
) -> list[str]:
    """Notes about settings that are far slower on this machine than others.

    Args:
        device: cpu, cuda or mps.
        dtype: of the trunk: float32, bfloat16 or float16.
        flops: floating-point operations of an iteration, over all processes.
        iterations: how many there will be.
    """
    found = []
    if device == "cpu":
        found += _slow_on_a_cpu(config, dtype, flops, iterations)
    if device == "cuda" and dtype == "float32" and (faster := _half_precision(config)):
        found.append(f"dtype=float32 leaves most of this GPU's speed unused: use --dtype={faster}")
    return found + _slow_heads(model, device, dtype)


def gpu_multiplies_bfloat16() -> bool:
    """Whether the GPU has instructions for bfloat16 (Ampere and later). Older ones emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _half_precision(c: TrainConfig) -> str | None:
    """The type with which the GPU's tensor cores multiply; None if it has none (before Volta)."""
    if gpu_multiplies_bfloat16():
        return "bfloat16"
    volta = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)
    return "float16" if volta and c.parallel != "fsdp" else None  # FSDP here has no loss scaler.


def other_gpus(c: TrainConfig, device: str) -> str | None:
    """A note if the energy will also be that of GPUs on which the run does not train."""
    used, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if not c.emissions or not device.startswith("cuda") or used >= there:
        return None
    return (
        f"energy will be that of all {there} GPUs here, and the run uses {used}: set"
        " CUDA_VISIBLE_DEVICES to measure only these"
    )


def uneven_shares(windows: int, processes: int) -> str | None:
    """A note if the processes get different numbers of an iteration's windows."""
    if not windows % processes:
        return None
    return (
        f"{windows} windows an iteration do not divide evenly among {processes} processes, so some"
        f" wait for others: {-(-windows // processes) * processes} windows would take as long"
    )


def _slow_on_a_cpu(config: TrainConfig, dtype: str, flops: float, iterations: int) -> list[str]:
    found, threads, available = [], torch.get_num_threads(), cores()
    each = flops / (CPU_RATE * threads * int(os.environ.get("WORLD_SIZE", 1)))
    if each > PATIENCE:
        found.append(
            f"an iteration is {flops:.0e} operations, about {duration(each)} on this CPU:"
            " configs/demo.yaml is a model for CPUs"
        )
    if dtype == "float16":
        found.append("dtype=float16 is slower than float32 on a CPU: use --dtype=float32")
    if dtype == "bfloat16" and not _multiplies_bfloat16():
        found.append(
            "this CPU has no bfloat16 instructions, so dtype=bfloat16 can be 20 times slower:"
            " use --dtype=float32"
        )
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1
    idle = idle_cores() if alone else math.nan
    if threads == 1 < available and idle > 0.7 * available:
        found.append(
            f"torch uses 1 thread of {available} cores: set OMP_NUM_THREADS={available}, or leave"
            " it unset"
        )
    if threads > 1 and idle < 0.7 * threads:
        found.append(
            f"other programs use this machine's cores. Beside them, {threads} threads can be many"
            f" times slower than fewer: try OMP_NUM_THREADS={max(1, round(idle))}"
        )
    if torch.cuda.is_available():
        found.append("this machine has a GPU, but the run is on the CPU: use --device=cuda")
    if config.compile and each * iterations * SAVED < COMPILING:
        found.append(
            f"compiling takes about {COMPILING} s before the first iteration. In such a short run"
            " it may not pay: use --compile=false"
        )
    return found


def _slow_heads(model: ModelConfig, device: str, dtype: str) -> list[str]:
    found, distance = [], HEADS[model.head]
    if distance.multiplies:
        # An inner product follows the trunk's type.
        faster = not distance.has_products or dtype != "float32"
        if device == "cuda" and model.head_precision == "float32" and faster:
            found.append(
                "with head_precision=float32 the head does not use tensor cores: use"
                " --head_precision=auto"
            )
        if device != "cuda" and model.head_precision == "split":
            found.append(
                "without CUDA, head_precision=split is emulated and slower than float32: use"
                " --head_precision=auto"
            )
    if not distance.multiplies and not _is_compiled(model, device) and device != "mps":
        found.append(
            f"the head {model.head} has no compiled kernel here and runs in plain PyTorch, which is"
            " many times slower (docs/add_a_distance.md)"
        )
    if model.head_impl in ("dense", "chunked") and _is_compiled(model, device):
        found.append(
            f"head_impl={model.head_impl} is slower than the compiled kernels and needs more"
            " memory: use --head_impl=auto"
        )
    # Matrix products skip nothing.
    if model.head_skip == 0 and device == "cpu" and not distance.multiplies:
        found.append(
            "head_skip=0 computes gradients that are too small to matter in float32. The default"
            " 1e-6 skips them"
        )
    return found


def about_products(head: HarmonicHead) -> str | None:
    """How the head multiplies matrices, in words. None for a distance without matrix products.

    Call it inside the run's autocast, which it depends on.
    """
    if not head.distance.multiplies:
        return None
    products = head.products()
    if products.name == "split":
        return "head multiplies in two half-precision parts (split): nearly as exact as float32"
    what = f"head multiplies in {str(products.inner).removeprefix('torch.')}"
    if products.name != "autocast" or head.is_control:
        return what
    # In bfloat16 an inner product is off by up to 4e-4 |h| |w|, a twentieth of eps. If h and w are
    # equally long, that is also the relative error of raw distances.
    distance, options = resolve(head.name, **head.options)
    power = float(head.strength) * distance.root(**distance.kernel_options(options))
    error = power * torch.finfo(products.inner).eps / 20
    if not head.is_harmonic:
        return (
            f"{what}: distances have relative errors of up to {error / power:.0e}."
            " --head_precision=auto is nearly as exact as float32"
        )
    return (
        f"{what}: at n = {float(head.strength):.4g} the loss of a token is off by up to {error:.1g}"
        " nats if prototypes are as long as"
        " states. --head_precision=auto is nearly as exact as float32"
    )


def _is_compiled(model: ModelConfig, device: str) -> bool:
    """Whether compiled kernels make the head faster on this device.

    For the dot product of controls they do not: PyTorch is as fast.
    """
    distance, options = resolve(model.head, **model.head_options())
    if distance.kernel == "dot":
        return False
    if device == "cuda":
        return load("triton") is not None
    numba = load("numba") if device == "cpu" else None
    if numba is None:
        return False
    return (
        distance.kernel == "l2"
        or numba.find(distance.kernel, distance.kernel_options(options)) is not None
    )


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions. True if torch cannot tell."""
    try:
        has = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # This torch is older.
        return True
    return has.get("architecture") != "x86_64" or bool(
        has.get("avx512_bf16") or has.get("amx_bf16")
    )


def rising_rate(c: TrainConfig, iteration: int, changed: dict) -> str | None:
    """A note if a resumed run continues at a higher learning rate than it had, else None.

    changed: settings that it changes, key -> [before, now].
    """
    earlier = {key: old for key, (old, _) in changed.items() if key in vars(c)}
    before = learning_rate(iteration, replace(c, **earlier))
    now = learning_rate(iteration, c)
    if now <= 1.05 * before:
        return None
    rises = f"the learning rate rises from {before:.2g} to {now:.2g}"
    if not {"max_iters", "lr_decay_iters", "decay_iters"} & set(changed):
        return rises
    return (
        f"{rises}, because its decay now ends at iteration {c.decay_end}: the loss may rise at"
        " first. To plan for more iterations, set --lr_decay_iters at the first start"
    )


def senseless_settings(model: ModelConfig, c: TrainConfig, data: Data) -> list[str]:
    """Notes about numbers that make no sense with another setting, or with the data."""
    found, end = split_warnings(data, model.block_size) + other_tokenizer(data), c.decay_end
    epochs = c.max_iters * c.windows * model.block_size / data.splits["train"].tokens
    if epochs > MANY_EPOCHS:
        found.append(
            f"max_iters={c.max_iters} reads the training text {epochs:.0f} times: watch whether the"
            " validation loss rises, or lower --max_iters"
        )
    if 0 < c.max_iters <= 2 * c.warmup_iters and c.warmup_iters > 1:
        half = "all" if c.warmup_iters >= c.max_iters else "half or more"
        found.append(
            f"warmup_iters={c.warmup_iters} is {half} of max_iters={c.max_iters}: use about"
            f" {max(1, c.max_iters // 10)}"
        )
    if end > 2 * c.max_iters > 0:
        found.append(
            f"lr_decay_iters={end} is far beyond max_iters={c.max_iters}: the learning rate hardly"
            " falls"
        )
    if 0 < end < c.max_iters:
        found.append(
            f"lr_decay_iters={end} is before max_iters={c.max_iters}: later iterations are at the"
            " lowest learning rate"
        )
    if c.eval_interval > c.max_iters > 0:
        found.append(
            f"eval_interval={c.eval_interval} is beyond max_iters={c.max_iters}: only the start and"
            " the end are evaluated"
        )
    if c.log_interval > c.max_iters > 0:
        found.append(
            f"log_interval={c.log_interval} is beyond max_iters={c.max_iters}: training is"
            " reported only at evaluations"
        )
    if c.min_lr is not None and c.min_lr > c.learning_rate:
        found.append(
            f"min_lr={c.min_lr:g} is above learning_rate={c.learning_rate:g}: the rate rises"
        )
    if model.doc_mask and data.eot_id is not None and model.eot_id != data.eot_id:
        found.append(
            f"eot_id={model.eot_id} is another token than the data's end of text, {data.eot_id}:"
            " documents are masked at that token"
        )
    windows = (data.splits["val"].tokens - 1) // model.block_size
    if c.validation_windows > windows:
        found.append(
            f"eval_iters={c.eval_iters} * batch_size={c.batch_size} are more windows than val has:"
            f" all {windows:,} are used"
        )
    return found


def small_start(model: ModelConfig, config: TrainConfig) -> list[str]:
    """A note about the first prototypes of cross_entropy, for models in which 0.05 was measured to
    be better. For a run that starts from random weights."""
    if (
        model.arch == "gpt"
        and model.head == "cross_entropy"
        and model.head_init_std == 0.02
        and 128 <= model.n_embd <= 256
        and config.optimizer == "adamw"
    ):
        return [
            "head_init_std=0.02 may be small for cross_entropy at this width: in runs of 0.2 to 2"
            " million tokens, 0.05 was 0.1 to 0.3 nats better (docs/heads.md)"
        ]
    return []
