"""Processes: one per device, started by torchrun; without torchrun, one."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.config import UserError


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

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def check_device(device: str) -> str:
    """The device that `auto` stands for: cuda, mps or cpu. UserError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device={device}: unknown device; use auto, cpu, cuda or mps") from None
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device}: unknown device; use auto, cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}: this machine has no CUDA device (or torch is a CPU build); use --device=cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device}: this machine has no MPS device; use --device=cpu")
    return device


def start(device: str, backend: str) -> Processes:
    """Joins the process group that torchrun describes in the environment (RANK, LOCAL_RANK, WORLD_SIZE), if there is one."""
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if device.startswith("cuda") and world > 1:
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"more processes than CUDA devices on this machine ({torch.cuda.device_count()}): lower --nproc_per_node")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    if world > 1:
        kind = device.split(":")[0]
        if backend == "nccl" and kind != "cuda":
            raise UserError("backend=nccl needs CUDA devices; use --backend=gloo")
        dist.init_process_group("nccl" if backend == "auto" and kind == "cuda" else "gloo" if backend == "auto" else backend)
    return Processes(rank, local_rank, world, device)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
