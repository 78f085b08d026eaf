"""Processes: one per device, started by torchrun; without torchrun, one. What they share, and how
they stop together."""

import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from base.command_line import cli
from base.errors import UserError
from model import Model

T = TypeVar("T")
# A DistributedDataParallel lives as long as its process: see `run`.
_KEPT: list[DistributedDataParallel] = []


@dataclass
class Processes:
    """rank of world processes, local_rank on this node, and the device they were given."""

    rank: int
    local_rank: int
    world: int
    device: str

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's part of range(total): contiguous, sizes differing by at most one."""
        return range(self.rank * total // self.world, (self.rank + 1) * total // self.world)

    def reduce(self, values: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Adds (or takes the minimum of) a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[op])
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """A small Python value of every process, by rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make()` returns in the main process, in all of them."""
        value: list[Any] = [make() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(value)
        return value[0]

    def wrap(self, model: Model, parallel: str) -> torch.nn.Module:
        """The model whose gradients are those of all processes: DistributedDataParallel, or FSDP2's
        fully_shard of blocks and root."""
        if self.world == 1:
            return model
        kind = self.device.split(":")[0]
        if parallel == "ddp":
            _KEPT.append(
                DistributedDataParallel(
                    model, device_ids=[self.local_rank] if kind == "cuda" else None
                )
            )
            return _KEPT[-1]
        mesh = dist.device_mesh.init_device_mesh(kind, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


def synchronise(wrapped: torch.nn.Module, on: bool) -> None:
    """Whether the next backward pass of a wrapped model adds its gradients up over the
    processes."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = on
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(on)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that lies here; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def launcher(processes: int, *torchrun: str) -> list[str]:
    """The arguments between `python` and a script that start this many processes on this machine.
    torchrun: more of torchrun's flags."""
    return (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
        if processes > 1
        else []
    )


def check_device(device: str) -> str:
    """The device that `auto` stands for: cuda, mps or cpu. UserError for a device that is not
    there."""
    if device == "auto":
        return (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device={device}: unknown device; use auto, cpu, cuda or mps") from None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device}: unknown device; use auto, cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device={device}: this machine has no CUDA device (or torch is a CPU build); use"
            " --device=cpu"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices, counted"
            " from 0"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device}: this machine has no MPS device; use --device=cpu")
    return device


def start(device: str, backend: str, timeout: float) -> Processes:
    """Joins the process group that torchrun describes in the environment (RANK, LOCAL_RANK,
    WORLD_SIZE), if there is one. Processes that wait for another one longer than `timeout` seconds
    give up."""
    rank, local_rank, world = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if device.startswith("cuda") and world > 1:
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UserError(
                f"more processes than CUDA devices on this machine ({torch.cuda.device_count()}):"
                " lower --nproc_per_node"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if world > 1:
        kind = device.split(":")[0]
        if backend == "nccl" and kind != "cuda":
            raise UserError("backend=nccl needs CUDA devices; use --backend=gloo")
        backend = ("nccl" if kind == "cuda" else "gloo") if backend == "auto" else backend
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store = _own_store(store, rank, world, timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
    return Processes(rank, local_rank, world, device)


def _own_store(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """A part of torchrun's store that no earlier start of these processes has used.

    PyTorch 2.13's torchrun keeps its store when it restarts processes, and the new ones would
    connect to the addresses of the dead. Its count of restarts tells starts apart on one machine
    only: each machine has its own. So rank 0 opens a new part, and the others go by the number of
    the part in which rank 0 answers them with the word they left there.
    """
    if rank == 0:
        part = store.add("part", 1)
        for other in range(1, world):
            word = store.get(f"{part}/here/{other}")  # waits for it
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


def run(main: Callable[[], object]) -> None:
    """`cli(main)`. Under torchrun the process then ends at once, without taking its process groups
    apart: PyTorch 2.13 can hang for ever there, for `~ProcessGroupGloo` joins a thread that waits
    for the interpreter's lock while its caller holds that lock."""
    if "RANK" not in os.environ:
        cli(main)
        return

    def tell() -> None:
        try:
            main()
        except UserError as error:
            # `cli` speaks for local rank 0.
            if dist.is_initialized() and os.environ.get("LOCAL_RANK") != "0":
                print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
            raise

    status = 0
    try:
        cli(tell)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class StopSignals:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (SLURM and spot machines send them) into a stop after the
    current step, on all processes alike.

    A second Ctrl-C raises KeyboardInterrupt at once. (Under torchrun only the first reaches the
    processes.)
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, processes: Processes, timeout: float):
        self.asked = 0  # the signal that came to this process
        self.group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            if processes.world > 1
            else None
        )
        self.pending: tuple[Any, torch.Tensor] | None = None  # a reduction, and what it fills
        self.before = {s: signal.signal(s, self._ask) for s in self.SIGNALS}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if number == self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = number
            if number == signal.SIGINT:
                print(
                    "\nstopping after this step; Ctrl-C again stops at once",
                    file=sys.stderr,
                    flush=True,
                )

    def agreed(self) -> int:
        """The signal that stops all processes now, or 0. Called once a step. With several processes
        the answer is that of the step before, so that none waits for the others."""
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
        for number, handler in self.before.items():
            signal.signal(number, handler)
