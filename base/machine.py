"""What this machine has."""

import os


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
