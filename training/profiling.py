"""`--profile=N` records where N iterations spend time and memory."""

import sys
import time
from pathlib import Path

import torch

from base.output import say

WAIT = 3  # Iterations to skip first, because they compile, fill caches and allocate memory.


class Profile:
    """Skips WAIT iterations, and records the next `iterations` into a folder. 0 records nothing."""

    def __init__(self, folder: Path, iterations: int, device: str):
        self.folder, self.iterations, self.done = folder, iterations, 0
        self.cuda = device.startswith("cuda")
        self.profiler: torch.profiler.profile | None = None

    def step(self) -> float:
        """Call it after each iteration. Returns the seconds that it took, to write files."""
        self.done += 1
        began = time.perf_counter()
        if self.iterations and self.done == WAIT:
            self._start()
        if self.profiler is not None and self.done >= WAIT + self.iterations:
            self.close()
        return time.perf_counter() - began

    def close(self) -> None:
        """Writes what was recorded, and prints where. A full disk does not stop training."""
        if self.iterations and self.done <= WAIT:
            say(f"no profile: it begins after {WAIT} iterations", file=sys.stderr)
        if self.profiler is None:
            return
        self.profiler.stop()
        try:
            if self.done > WAIT:
                self._write(self.profiler, self.done - WAIT)
        except OSError as error:
            say(f"the profile cannot be written: {error.strerror}", file=sys.stderr)
        if self.cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler, self.iterations = None, 0

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self.profiler = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True
        )
        self.profiler.start()

    def _write(self, profiler: torch.profiler.profile, recorded: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, memory = self.folder / "trace.json", self.folder / "memory.pickle"
        profiler.export_chrome_trace(str(trace))
        say(f"profile of {recorded} iterations: open {trace} at https://ui.perfetto.dev")
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(memory))
            say(f"memory of these iterations: open {memory} at https://pytorch.org/memory_viz")
