"""The parts of a run in one dataclass."""

import contextlib
from dataclasses import dataclass
from typing import TextIO

import torch

from base.output import say
from model import Model, ModelConfig
from text.token_files import Data
from training.config import TrainConfig
from training.distributed import Processes
from training.evaluation import Evaluation
from training.step import Gradients, Progress, Work


@dataclass
class Run:
    """Everything that the loop of train.py needs.

    m, c: the configurations of the model and of training.
    wrapped: the model, wrapped so that its backward pass adds up gradients over the processes.
    of_source: results of the model that the run starts from, if its head was swapped.
    """

    m: ModelConfig
    c: TrainConfig
    data: Data
    processes: Processes
    model: Model
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: contextlib.AbstractContextManager
    evaluate: Evaluation
    progress: Progress
    of_source: dict[str, float]

    def __post_init__(self) -> None:
        c, p = self.c, self.processes
        self.batches = self.evaluate.batches
        self.work = Work.of(c, self.model, self.batches)
        self.gradients = Gradients(self.model, p, p.world > 1 and c.parallel == "fsdp")

    def say(self, *words: object, file: TextIO | None = None) -> None:
        """Prints in the main process only. See `base.output.say`."""
        if self.processes.main:
            say(*words, file=file)
