"""The validation loss of a run, over the same windows at every evaluation.

The windows do not depend on the number of processes.
"""

import contextlib
import math

import torch
from torch.distributed.fsdp import FSDPModule

from harmonic import IGNORE_INDEX, softmax_linearization_kl
from model import Model, ModelConfig
from text.token_files import Data
from training.config import TrainConfig
from training.data import validation_windows
from training.distributed import Processes
from training.objective import batches_of

STATES = 256  # On these, evaluation measures how far the head is from a softmax.
SAMPLED = 60  # Tokens in a sample of text.


class Evaluation:
    """The negative log likelihood of the fixed validation windows, without label smoothing.

    It is summed over all processes and divided once. The random state of training is not used.
    """

    def __init__(
        self,
        data: Data,
        m: ModelConfig,
        c: TrainConfig,
        processes: Processes,
        autocast: contextlib.AbstractContextManager,
    ):
        self.m, self.processes, self.autocast = m, processes, autocast
        self.batches = batches_of(data, m)
        self.split, self.batch_size = data.splits["val"], c.batch_size
        self.windows = validation_windows(self.split.tokens, m.block_size, c.validation_windows)
        # All processes run the same number of batches, because FSDP gathers weights from all.
        self.rounds = math.ceil(math.ceil(len(self.windows) / processes.world) / self.batch_size)

    def __call__(self, model: Model) -> dict[str, float]:
        """Evaluates: val_loss in nats per token, perplexity, and more if the model has it.

        Models that predict the next token have bits_per_byte. Harmonic heads of kernel l2 have
        kl_to_softmax (`softmax_linearization_kl`). Heads that learn their strength have strength.
        """
        model.eval()
        with torch.no_grad(), self.autocast:
            total = self._sums(model)
            kl = self._distance_from_a_softmax(model)
            learnt = None if model.head.log_strength is None else float(model.head.strength)
        if isinstance(model, FSDPModule):
            # Frees the gathered weights. In training the backward pass does that.
            model.reshard()
        model.train()
        device = self.processes.device
        total = self.processes.reduce(total.to(device if device.startswith("cuda") else "cpu"))
        loss = (total[0] / total[1]).item()
        found = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
        if not self.batches.objective.masked:
            # Uses the tokens per byte of the whole split, because windows are an even sample of it.
            found["bits_per_byte"] = loss / math.log(2) * self.split.tokens / self.split.bytes
        if kl is not None:
            found["kl_to_softmax"] = kl
        if learnt is not None:
            found["strength"] = learnt
        return found

    def _sums(self, model: Model) -> torch.Tensor:
        """The summed loss and the number of targets in this process's windows: (2,), float64."""
        share = self.processes.share(len(self.windows))
        batches = self.batches.validation(self.windows[share.start : share.stop], self.batch_size)
        length, total = self.m.block_size, torch.zeros(2, dtype=torch.float64)
        nothing = torch.zeros(1, length, dtype=torch.long), torch.full((1, length), IGNORE_INDEX)
        for _ in range(self.rounds):
            x, y = (t.to(self.processes.device) for t in next(batches, nothing))
            loss, targets = model(x, y, reduction="sum")[1].item(), (y != IGNORE_INDEX).sum().item()
            total += torch.tensor([loss, targets], dtype=torch.float64)
        return total

    def _distance_from_a_softmax(self, model: Model) -> float | None:
        if not model.head.has_linearization:
            return None
        few = self.windows[: max(1, STATES // self.m.block_size)]
        x, _ = next(self.batches.validation(few, len(few)))
        with torch.compiler.set_stance("force_eager"):  # This batch has a size of its own.
            states = model.hidden(x.to(self.processes.device))
        return softmax_linearization_kl(states.reshape(-1, self.m.n_embd)[:STATES], model.head)


def sample_text(
    model: Model, data: Data, autocast: contextlib.AbstractContextManager, seed: int
) -> str:
    """Generates the first SAMPLED tokens of a document. All processes call it.

    With the same seed, samples differ only because the model differs. The random state of training
    is not used.
    Raises: Diverged if a logit is not finite.
    """
    tokenizer = data.load_tokenizer()
    model.eval()
    try:
        # Eager, because each length would be compiled again.
        with autocast, torch.compiler.set_stance("force_eager"):
            if isinstance(model, FSDPModule):
                # FSDP initialises itself in the root's first forward pass, which `generate` does
                # not call.
                with torch.no_grad():
                    model(torch.tensor([[tokenizer.start_id]], device=model.tokens.weight.device))
                model.unshard()
            steps = model.generate([[tokenizer.start_id]], SAMPLED, seed=seed, top_k=200)
            ids = [token for (token,) in steps]
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()
        model.train()
    return tokenizer.decode(ids)
