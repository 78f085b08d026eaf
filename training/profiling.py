"""`--profile=N`: where the time and the memory of N iterations go."""

from pathlib import Path

import torch

WAIT = 3  # iterations before the first that is recorded: compilation, caches, allocations


class Profile:
    """Records N iterations, after WAIT others, into files of a folder. N = 0: nothing."""

    def __init__(self, folder: Path, iterations: int, device: str):
        self.folder, self.iterations, self.done = folder, iterations, 0
        self.cuda = device.startswith("cuda")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True
        )

    def step(self) -> None:
        """To be called after each iteration. Prints where the files are when they are written."""
        self.done += 1
        if self.iterations and self.done == WAIT:
            self.profiler.start()
            if self.cuda:
                torch.cuda.memory._record_memory_history()
        if self.iterations and self.done == WAIT + self.iterations:
            self.profiler.stop()
            self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, memory = self.folder / "trace.json", self.folder / "memory.pickle"
        self.profiler.export_chrome_trace(str(trace))
        print(f"profile of {self.iterations} iterations: open {trace} at https://ui.perfetto.dev")
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(memory))
            torch.cuda.memory._record_memory_history(enabled=None)
            print(f"memory of these iterations: open {memory} at https://pytorch.org/memory_viz")
