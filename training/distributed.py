"""The processes of a run: what they share, and how they stop together.

torchrun starts one process for each device. Without torchrun there is one process.
"""

import os
import re
import signal
import socket
import sys
import time
import traceback
import typing
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from base.command_line import cli, flush
from base.errors import UserError
from base.output import tell
from model import Model

T = TypeVar("T")
LESS_MEMORY = (
    "Make --batch_size smaller and --gradient_accumulation_steps and --eval_iters as much larger,"
    " set --activation_checkpointing=true, or train a smaller model. If the run has a checkpoint,"
    " --init_from=resume continues from there"
)
DEVICE_FILE = Path("/dev/nvidia0")  # On Linux, the driver's first GPU.
# Keeps every DistributedDataParallel until its process ends; see `run`.
_KEPT: list[DistributedDataParallel] = []


@dataclass
class Processes:
    """A process and its group: its rank among `world` processes, its rank on this machine
    (local_rank), and its device.

    torchruns: the torchrun of each machine; see `torchrun_process`.
    """

    rank: int
    local_rank: int
    world: int
    device: str
    torchruns: list[str] = field(default_factory=list)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's part of range(total). Parts are contiguous and differ by at most 1."""
        return range(self.rank * total // self.world, (self.rank + 1) * total // self.world)

    def reduce(self, values: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """The sum or minimum ("min") of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[op])
        return values

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """A small Python value of each process, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return self.device.split(":")[0]

    def from_main(self, make: Callable[[], T]) -> T:
        """Calls `make()` in the main process, and returns its result in all processes.

        Raises: a UserError of `make` in all processes.
        """
        value, error = _tried(make) if self.main else (None, None)
        if self.world > 1:
            both: list[Any] = [value, error]
            dist.broadcast_object_list(both)
            value, error = both
        if error is not None:
            raise shared_error(error)
        return typing.cast(T, value)

    def on_each_machine(self, do: Callable[[], object]) -> None:
        """Calls `do()` in one process of each machine. All processes raise its UserError."""
        error = _tried(do)[1] if self.local_rank == 0 else None
        for found in filter(None, self.gather(error)):
            raise shared_error(found)

    def wrap(self, model: Model, parallel: str) -> torch.nn.Module:
        """Wraps a model so that its gradients are those of all processes.

        parallel: "ddp" (DistributedDataParallel) or "fsdp" (FSDP2's fully_shard).
        """
        if self.world == 1:
            return model
        if parallel == "ddp":
            # Blocks are compiled one by one, so gradients are exchanged while earlier blocks still
            # compute theirs. By default PyTorch would cut each block in two for that.
            torch._dynamo.config.optimize_ddp = False
            _KEPT.append(
                DistributedDataParallel(
                    model,
                    device_ids=[self.local_rank] if self.kind == "cuda" else None,
                    gradient_as_bucket_view=True,  # No second copy of the gradients.
                )
            )
            return _KEPT[-1]
        mesh = dist.device_mesh.init_device_mesh(self.kind, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


def _tried(make: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `make()`, and the text of its UserError."""
    try:
        return make(), None
    except UserError as error:
        return None, str(error)


def shared_error(text: str) -> UserError:
    """A UserError that all processes raise."""
    error = UserError(text)
    error.shared = True
    return error


def torchrun_process() -> str:
    """The torchrun that has started this process: its machine and its process id."""
    return f"{socket.gethostname()} {os.getppid()}"


def torchrun_command(world: int) -> str:
    """How a user starts train.py with so many processes, as far as this process can know."""
    if world == 1:
        return "python"
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        return "torchrun, on each machine with the flags of before:"
    return f"torchrun --standalone --nproc_per_node={world}"


def synchronise(wrapped: torch.nn.Module, on: bool) -> None:
    """Sets whether the next backward pass adds up gradients over the processes."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = on
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(on)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds. Other tensors are returned as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def launcher(processes: int, *torchrun: str) -> list[str]:
    """The arguments between `python` and a script that start `processes` processes here.

    torchrun: more flags of torchrun.
    """
    if processes <= 1:
        return []
    count = f"--nproc_per_node={processes}"
    return ["-m", "torch.distributed.run", "--standalone", count, *torchrun]


def check_device(device: str) -> str:
    """The device to use; `auto` becomes cuda, mps or cpu. UserError for one that does not exist."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        if why := unusable_gpu():
            raise UserError(f"{why}: use --device=cpu to train on the CPU")
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device={device}: unknown device; use auto, cpu, cuda or mps") from None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device}: unknown device; use auto, cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        why = unusable_gpu() or "this machine has no CUDA device, or this PyTorch is for CPUs"
        raise UserError(f"device={device}: {why}; use --device=cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices, and the"
            f" last is cuda:{torch.cuda.device_count() - 1}"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device}: this machine has no MPS device; use --device=cpu")
    return device


def unusable_gpu() -> str | None:
    """Why PyTorch cannot use this machine's NVIDIA GPU, such as an old driver.

    None if there is no GPU, if CUDA_VISIBLE_DEVICES hides it, or if this PyTorch is for CPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not re.match(r"\d|GPU-|MIG-", visible.strip())
    if hidden or torch.version.cuda is None or not DEVICE_FILE.exists():
        return None
    why = "it does not say why"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        why = str(error).partition(" Please ")[0].rstrip(".")
    return f"PyTorch cannot use this machine's GPU ({why})"


def start(device: str, backend: str, timeout: float) -> Processes:
    """Joins the process group that torchrun describes in the environment, if there is one.

    torchrun sets RANK, LOCAL_RANK and WORLD_SIZE.
    timeout: seconds that a process waits for another one before it gives up.
    Raises: UserError for more processes than GPUs, nccl without CUDA, or an environment that
        another launcher than torchrun has set.
    """
    rank, local_rank, world = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            f"WORLD_SIZE={world} is set, but not MASTER_ADDR and MASTER_PORT: start the processes"
            " with torchrun"
        )
    if device.startswith("cuda") and world > 1:
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UserError(
                f"more processes than CUDA devices on this machine ({torch.cuda.device_count()}):"
                " lower --nproc_per_node"
            )
        device = f"cuda:{local_rank}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if world > 1:
        kind = device.split(":")[0]
        if backend == "nccl" and kind != "cuda":
            raise UserError("backend=nccl needs CUDA devices; use --backend=gloo")
        backend = ("nccl" if kind == "cuda" else "gloo") if backend == "auto" else backend
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store = _own_store(store, rank, world, timeout)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
            device_id=torch.device(device) if kind == "cuda" else None,
        )
    return Processes(rank, local_rank, world, device)


def _own_store(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """A new part of torchrun's key-value store, the same for all processes.

    When PyTorch 2.13's torchrun restarts processes it keeps its store. The new processes would
    connect to the addresses of dead ones. torchrun's count of restarts does not help, because each
    machine has its own. So rank 0 opens a new part. Every other rank leaves a random word in the
    newest part, and takes the part in which rank 0 has answered with that word.
    """
    if rank == 0:
        part = store.add("part", 1)
        for other in range(1, world):
            word = store.get(f"{part}/here/{other}")  # This waits for the other rank.
            store.set(f"{part}/answer/{other}", word.decode())
        return dist.PrefixStore(str(part), store)
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    while time.monotonic() < end:
        part = store.add("part", 0)
        store.set(f"{part}/here/{rank}", own)
        time.sleep(0.05)
        answer = f"{part}/answer/{rank}"
        if store.check([answer]) and store.get(answer) == own.encode():
            return dist.PrefixStore(str(part), store)
    raise TimeoutError(f"rank 0 did not answer rank {rank} within {timeout:g} seconds")


def _explain(main: Callable[[], object]) -> None:
    """Runs main. Too little memory, and a damaged file in the cache of torch.compile, become
    UserErrors."""
    try:
        main()
    except Exception as error:
        found = re.search(r"DefaultCPUAllocator: can't allocate memory.*?(\d+) bytes", str(error))
        if found or isinstance(error, torch.OutOfMemoryError):
            what = str(error).partition(". Of the allocated")[0]
            if found:
                what = f"out of memory: no room for a tensor of {int(found[1]) / 2**30:,.1f} GiB"
            raise UserError(f"{what}. {LESS_MEMORY}") from error
        found = re.search(r"ImportError: (\S+\.so): (file too short|invalid ELF)", str(error))
        if not found:
            raise
        raise UserError(
            f"{found[1]}, in the cache of torch.compile, is damaged ({found[2]}): a process was"
            " killed while it compiled. Delete the file and start again"
        ) from error


def run(main: Callable[[], object]) -> None:
    """Runs `cli(main)`. Under torchrun the process then ends without destroying process groups.

    Destroying them can hang forever in PyTorch 2.13. `~ProcessGroupGloo` holds the interpreter's
    lock, and joins a thread that waits for that lock.
    """
    if "RANK" not in os.environ:
        # With these flags the printed words are the result. Otherwise that is the run's folder.
        printing = ("--eval_only", "--verify_resume", "--help", "-h")
        prints = any(word.startswith(printing) for word in sys.argv)
        cli(lambda: _explain(main), prints=prints)
        return

    def named() -> None:  # Names the rank of an error.
        try:
            _explain(main)
        except UserError as error:
            # `cli` prints the error of local rank 0.
            elsewhere = os.environ.get("LOCAL_RANK") != "0"
            if elsewhere and dist.is_initialized() and not error.shared:
                print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
            raise

    status = 0
    try:
        cli(named, prints=False)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    flush()
    os._exit(status)


class StopSignals:
    """Makes all processes stop after the same step on Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP.

    SLURM and spot machines send SIGTERM and SIGUSR1. A terminal that closes sends SIGHUP, unless
    nohup has made this process ignore it. A second Ctrl-C raises KeyboardInterrupt at once.
    Under torchrun only the first Ctrl-C reaches the processes. If torchrun itself dies, they stop
    as after SIGTERM.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, processes: Processes, timeout: float):
        self.asked = 0  # The signal that this process received, or 0.
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            if processes.world > 1
            else None
        )
        self.pending: tuple[Any, torch.Tensor] | None = None  # A running reduction and its result.
        self.before = {
            s: signal.signal(s, self._ask)
            for s in self.SIGNALS
            if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN
        }

    def _ask(self, number: int, _: FrameType | None) -> None:
        if number == self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked or number == signal.SIGINT:
            self.asked = number
            if number == signal.SIGINT:
                tell("\nstopping after this step; Ctrl-C again stops at once")

    def agreed(self) -> int:
        """The signal that stops all processes now, or 0. Call it once per step.

        With several processes the answer is one step old, so that no process waits for the others.
        """
        if self.parent not in (None, os.getppid()) and not self.asked:
            self.asked = signal.SIGTERM
            tell("torchrun has died; stopping")
        if self.group is None:
            return self.asked
        answer = 0
        if self.pending:
            work, flag = self.pending
            work.wait()
            answer = int(flag)
        flag = torch.tensor(self.asked)
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag
        return answer

    def restore(self) -> None:
        """Puts the earlier signal handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
