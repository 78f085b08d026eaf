"""The validation loss of a run: the same windows at every evaluation, whatever the processes."""

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

STATES = 256  # show how far the head is from a softmax
SAMPLED = 60  # tokens of a sample


class Evaluation:
    """The unsmoothed negative log likelihood of the fixed validation windows, summed over all
    processes and divided once. Draws nothing from training's random state."""

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
        self.windows = validation_windows(
            self.split.tokens, m.block_size, c.eval_iters * c.batch_size
        )
        # Every process runs as many batches, for FSDP gathers weights from all in each.
        self.rounds = math.ceil(math.ceil(len(self.windows) / processes.world) / self.batch_size)

    def __call__(self, model: Model) -> dict[str, float]:
        """val_loss (nats a token), perplexity, and bits_per_byte, kl_to_softmax and strength where
        there are such."""
        model.eval()
        with torch.no_grad(), self.autocast:
            total = self._sums(model)
            kl = self._distance_from_a_softmax(model)
            learnt = None if model.head.log_strength is None else float(model.head.strength)
        if isinstance(model, FSDPModule):
            # Without a backward pass nothing else frees the gathered weights.
            model.reshard()
        model.train()
        device = self.processes.device
        total = self.processes.reduce(total.to(device if device.startswith("cuda") else "cpu"))
        loss = (total[0] / total[1]).item()
        found = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
        if not self.batches.objective.masked:
            # the split's own tokens per byte: the windows are an even sample of it
            found["bits_per_byte"] = loss / math.log(2) * self.split.tokens / self.split.bytes
        if kl is not None:
            found["kl_to_softmax"] = kl
        if learnt is not None:
            found["strength"] = learnt
        return found

    def _sums(self, model: Model) -> torch.Tensor:
        """Of this process's windows: (loss, targets)."""
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
        few = self.windows[: max(1, STATES // self.m.block_size)]
        x, _ = next(self.batches.validation(few, len(few)))
        states = model.hidden(x.to(self.processes.device)).reshape(-1, self.m.n_embd)[:STATES]
        return softmax_linearization_kl(states, model.head)


@torch.compiler.set_stance("force_eager")  # Contexts of every length: compiled blocks do not pay.
def sample_text(
    model: Model, data: Data, autocast: contextlib.AbstractContextManager, seed: int
) -> str:
    """SAMPLED tokens of a document that the model begins. All processes call it.

    With one seed, samples of different iterations differ by the model alone. Training's random
    state is not touched.
    """
    tokenizer = data.load_tokenizer()
    model.eval()
    if isinstance(model, FSDPModule):
        # FSDP sets itself up in the root's first forward pass, and `generate` has none.
        with torch.no_grad(), autocast:
            model(torch.tensor([[tokenizer.start_id]], device=model.tokens.weight.device))
        model.unshard()
    with autocast:
        steps = model.generate([[tokenizer.start_id]], SAMPLED, seed=seed, top_k=200)
        ids = [token for (token,) in steps]
    if isinstance(model, FSDPModule):
        model.reshard()
    model.train()
    return tokenizer.decode(ids)
