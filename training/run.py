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
from training.objective import Batches
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
    batches: Batches
    processes: Processes
    model: Model
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: contextlib.AbstractContextManager
    gradients: Gradients
    evaluate: Evaluation
    progress: Progress
    work: Work
    of_source: dict[str, float]

    def say(self, *words: object, file: TextIO | None = None) -> None:
        """Prints in the main process only. See `base.output.say`."""
        if self.processes.main:
            say(*words, file=file)
