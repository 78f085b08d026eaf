"""The settings of a run. Those of its model are in model.ModelConfig."""

import dataclasses
import re
import typing

from base.errors import too_small

# PyTorch counts the timeout of a process group in milliseconds, with 32 bits.
MOST_SECONDS = 2_000_000


def of_a_start(default: typing.Any) -> typing.Any:
    """A setting of one start of a run. A resumed run does not take it over."""
    return dataclasses.field(default=default, metadata={"of_a_start": True})


@dataclasses.dataclass
class TrainConfig:
    """The run"""

    dataset: str = "wiki"
    """a folder under data/, or a path"""
    tokenizer: str | None = None
    """the tokenizer of .bin files without meta.json, such as nanoGPT's"""
    batch_size: int = 12
    """windows in a micro-batch; an iteration has batch_size * gradient_accumulation_steps windows,
    for any number of processes"""
    gradient_accumulation_steps: int = 1
    """micro-batches in an iteration, over all processes together"""
    max_iters: int = 1000
    """iterations to train"""
    optimizer: typing.Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the trunk, AdamW for embeddings, prototypes, norms and
    biases"""
    learning_rate: float = 6e-4
    """peak learning rate"""
    head_learning_rate: float | None = None
    """peak learning rate of the prototypes and of an embedding that is tied to them; null =
    learning_rate"""
    lr_schedule: typing.Literal["cosine", "wsd", "constant"] = "cosine"
    """after the warm-up: a cosine down to min_lr; wsd (stable, then linear to min_lr over the last
    decay_iters iterations); or constant"""
    min_lr: float | None = None
    """learning rate at the end of the decay; null = learning_rate / 10"""
    warmup_iters: int = 100
    """iterations of linear warm-up"""
    lr_decay_iters: int | None = None
    """iteration at which the decay ends; null = max_iters"""
    decay_iters: int | None = None
    """iterations of the decay of lr_schedule=wsd; null = a fifth of the run"""
    weight_decay: float = 0.1
    """decay of weight matrices and embeddings"""
    prototype_decay: float | None = None
    """decay of the prototypes, which pulls them to the origin; null = weight_decay"""
    beta1: float = 0.9
    """AdamW's beta1"""
    beta2: float = 0.95
    """AdamW's beta2"""
    grad_clip: float = 1.0
    """clip the norm of the whole gradient at this; 0 = do not clip"""
    eval_interval: int = 200
    """iterations between evaluations (and checkpoints)"""
    eval_iters: int = 20
    """validation batches of batch_size windows. They are always the same, spread over the split"""
    log_interval: int = 10
    """iterations between console lines; metrics.jsonl has every iteration"""
    eval_only: bool = of_a_start(False)
    """evaluate once and stop"""
    init_from: str = of_a_start("scratch")
    """scratch; resume (from the newest checkpoint in out_dir); auto (resume if there is one); or
    a model to start from, as in --source"""
    source: str | None = of_a_start(None)
    """a model to start from: a name on the Hugging Face hub (gpt2, bert-base-uncased, OWNER/NAME),
    a folder in its format, nanoGPT's ckpt.pt, or a run's folder. If --head is not the model's own
    head, the new head is matched to the model's softmax"""
    out_dir: str = of_a_start("out/run")
    """the run's folder"""
    overwrite: bool = of_a_start(False)
    """delete the run that is in out_dir"""
    new_data_order: bool = of_a_start(False)
    """resume with another batch_size, gradient_accumulation_steps, seed or dataset. The order of
    windows changes, so some are read twice in this epoch and others not at all"""
    seed: int = 1337
    """determines weights, data order, noise and dropout"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    dtype: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the trunk (autocast); auto = bfloat16 on a GPU that has it, else float32.
    Distances are always float32"""
    compile: bool = True
    """compile the trunk with torch.compile (on a CPU this needs a C++ compiler)"""
    backend: typing.Literal["auto", "nccl", "gloo"] = "auto"
    """how processes communicate: auto = nccl on GPUs, gloo on CPUs"""
    parallel: typing.Literal["ddp", "fsdp"] = "ddp"
    """how processes share the model: ddp (each holds all of it) or fsdp (each holds a part of
    weights, gradients and optimiser)"""
    timeout: float = 600.0
    """seconds that a process waits for another process before it gives up"""
    activation_checkpointing: bool = False
    """compute the activations of each block again in the backward pass: less memory, about a third
    more time"""
    on_nan: typing.Literal["stop", "skip"] = "stop"
    """if a loss or gradient is not finite: stop the run, or skip the step (skip is slower on a GPU,
    because it reads the norm of every step)"""
    sample_interval: int = 0
    """iterations between samples of text, in the terminal and in metrics.jsonl; 0 = none"""
    profile: int = of_a_start(0)
    """record a trace of this many iterations in out_dir/profile, and on CUDA also of memory;
    0 = none"""
    verify_resume: bool = of_a_start(False)
    """a test instead of a training: make a run of about 20 iterations, kill and resume a second
    one, and say whether both are equal bit for bit"""
    tensorboard: bool = False
    """also log to TensorBoard, in out_dir/tensorboard"""
    wandb: bool = False
    """also log to Weights & Biases"""
    emissions: bool = True
    """measure energy with CodeCarbon (offline)"""
    emissions_country: str = "USA"
    """ISO 3166 alpha-3 code of the country whose electricity is used, for kg CO2e"""

    @property
    def windows(self) -> int:
        """The windows of an iteration, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def validation_windows(self) -> int:
        """The most windows of an evaluation. A short split has fewer."""
        return self.eval_iters * self.batch_size

    @property
    def decay_end(self) -> int:
        """The iteration at which the decay of the learning rate ends."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings, one sentence each."""
        found = self._range_problems()
        if self.parallel == "fsdp" and self.dtype == "float16":
            found.append("parallel=fsdp lacks the loss scaling of dtype=float16: use bfloat16")
        if self.parallel == "fsdp" and self.optimizer == "muon":
            found.append(
                "optimizer=muon needs whole matrices, and parallel=fsdp splits them: use"
                " --parallel=ddp or --optimizer=adamw"
            )
        if not self.out_dir:
            found.append("out_dir is empty: name a folder")
        if not re.fullmatch("[A-Z]{3}", self.emissions_country):
            found.append(
                f"emissions_country={self.emissions_country}: expected a code of three letters,"
                " such as USA, DEU or IND"
            )
        return found + self._schedule_problems()

    def _schedule_problems(self) -> list[str]:
        found, end = [], self.decay_end
        if self.lr_decay_iters is not None and end < self.warmup_iters:
            found.append(f"lr_decay_iters={end} ends before warmup_iters={self.warmup_iters}")
        if self.lr_schedule == "constant":
            for key in ("min_lr", "lr_decay_iters"):
                if getattr(self, key) is not None:
                    found.append(
                        f"{key}={getattr(self, key)} does nothing with lr_schedule=constant"
                    )
        if self.decay_iters is not None:
            if self.lr_schedule != "wsd":
                found.append(
                    f"decay_iters={self.decay_iters} is for lr_schedule=wsd, not {self.lr_schedule}"
                )
            elif self.decay_iters > max(0, end - self.warmup_iters):
                found.append(
                    f"decay_iters={self.decay_iters} does not fit between"
                    f" warmup_iters={self.warmup_iters} and iteration {end}, where the decay ends"
                )
        return found

    def _range_problems(self) -> list[str]:
        least = dict.fromkeys(
            ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters"), 1
        )
        least |= dict.fromkeys(("max_iters", "warmup_iters", "sample_interval", "profile"), 0)
        least |= {"log_interval": 1, "decay_iters": 1}
        found = too_small(self, **least) + self._sign_problems()
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                found.append(f"{key}={getattr(self, key)} is not in [0, 1)")
        if not 0 <= self.seed < 2**31:
            found.append(f"seed={self.seed} is not in 0..{2**31 - 1}")
        return found

    def _sign_problems(self) -> list[str]:
        found = []
        for key in ("learning_rate", "head_learning_rate", "timeout"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                found.append(f"{key}={getattr(self, key)} must be positive")
        found += too_small(self, weight_decay=0, prototype_decay=0, grad_clip=0, min_lr=0)
        if self.timeout > MOST_SECONDS:
            found.append(f"timeout={self.timeout:g} is above {MOST_SECONDS:,} seconds")
        return found
