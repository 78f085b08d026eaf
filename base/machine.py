"""What this machine has."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

# Peak bf16 FLOP/s without sparsity, from the vendors' data sheets. Keys are parts of the name that
# torch.cuda.get_device_name returns.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100-PCIE": 112e12,  # fp16
    "V100": 125e12,  # fp16
    "T4": 65e12,  # fp16
}
# Cards of another speed, and parts of a card, whose names contain a key of PEAK_FLOPS.
OTHER_CARDS = re.compile(r"Laptop|4090 D|3090 Ti|\bMIG\b|GRID|-\d+[ABCQ]\b")


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle_cores() -> float:
    """How many of the cores that this process may use are idle now. It looks for 0.1 s."""
    import psutil  # Not at the top: benchmarks.gpu runs on machines without it.

    used = psutil.cpu_percent(0.1, percpu=True)
    if hasattr(os, "sched_getaffinity"):
        used = [used[core] for core in os.sched_getaffinity(0) if core < len(used)]
    return sum(1 - percent / 100 for percent in used)


def peak_flops(device: str) -> float | None:
    """The peak bf16 FLOP/s of a CUDA device. None if it is unknown, so that no MFU is wrong."""
    import torch  # Not at the top: preparing a text does not need it.

    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    if OTHER_CARDS.search(name):
        return None
    known = (flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name))
    return next(known, None)


def processor() -> str:
    """The name of the processor, and its widest vector instructions that PyTorch uses."""
    import torch  # Not at the top: preparing a text does not need it.

    found, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        found = names[0].split(":")[1].strip() if names else found
    return f"{found}, {torch.backends.cpu.get_cpu_capability()}"


def installed(package: str) -> bool:
    """Whether a package is installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
