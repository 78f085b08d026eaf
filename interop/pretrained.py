"""Reads existing models, and swaps their heads.

A model is a run, a folder in Hugging Face's format, a name on its hub, or nanoGPT's ckpt.pt.

`interop.formats` maps the tensors of transformers to those of model.py. Weights come from
safetensors. The only pickles that are read are nanoGPT's checkpoints. PyTorch's safe loader reads
them and executes nothing.
"""

import json
import pickle
import re
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from base.command_line import read_yaml
from base.errors import UserError, nearest
from harmonic import IGNORE_INDEX, HarmonicHead, match
from harmonic.match import ROWS
from interop.formats import FORMATS, GPT2, Format, format_of
from model import ARCHITECTURES, Model, ModelConfig
from text.token_files import Data
from text.tokenizers import BPE_FILE, read_characters, rust_tokenizer, rust_vocabulary
from training import checkpoint
from training.objective import batches_of

SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
# Models of the hub whose names have no owner.
HUB = (
    "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "bert-base-uncased", "bert-large-uncased"
)  # fmt: skip
# Settings that you may choose freely for a model with given weights.
FREE = ModelConfig.free_settings() | {
    "block_size",
    "vocab_size",
    "real_vocab_size",
    "label_smoothing",
    "doc_mask",
    "eot_id",
}
# Settings that describe the head. A swap changes them.
HEAD_KEY = re.compile("(head|link|exponent|scale|learn_exponent|learn_scale)$|head_(?!dim)")
TABLES = ("tokens.weight", "head.weight", "head.bias")  # These have a row for each token.
# Other tensors in checkpoints: buffers of old versions, and BERT's other heads.
IGNORED = re.compile(
    r".*(\.attn\.(masked_)?bias|position_ids|inv_freq)"
    r"|pooler\..*"
    r"|cls\.(seq_relationship|predictions\.decoder\.bias).*"
)
LISTED = 12  # A message lists at most so many problems.


# ---- names and layouts -------------------------------------------------------------------------


@dataclass
class Tensor:
    """A tensor of model.py, and the tensors of transformers that it is made of.

    names: of those tensors. rows: how many rows of ours each one has.
    transposed: whether they are stored transposed (Conv1D).
    """

    shape: tuple[int, ...]
    names: list[str]
    rows: list[int]
    transposed: bool

    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each tensor in transformers."""
        shapes = [(rows, *self.shape[1:]) for rows in self.rows]
        return [s[::-1] for s in shapes] if self.transposed else shapes

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Our tensor -> the tensors of transformers, by name."""
        found = {}
        parts = tensor.split(self.rows) if len(self.rows) > 1 else [tensor]
        for name, part in zip(self.names, parts, strict=True):
            found[name] = (part.T if self.transposed else part).contiguous()
        return found

    def join(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensors of transformers -> our tensor. They are removed from `tensors`."""
        parts = [tensors.pop(n).float() for n in self.names]
        parts = [p.T if self.transposed else p for p in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def layout(config: ModelConfig, conv1d: bool = True) -> dict[str, Tensor]:
    """Maps the name of each tensor in model.py to its place in transformers, without the trunk's
    prefix.

    conv1d: whether GPT-2's matrices are stored transposed. nanoGPT's are not.
    """
    form, width = format_of(config), config.attention_width()
    queries, keys = config.n_head * width, (config.n_kv_head or config.n_head) * width
    with torch.device("meta"):
        own = checkpoint.own_weights(Model(config))
    found = {}
    for name, tensor in own.items():
        module, kind = name.rsplit(".", 1)
        if module.split(".")[0] == "head":
            theirs = form.head + name.removeprefix("head")
            if name == "head.bias" and form.head_bias is not None:
                theirs = form.head_bias
            found[name] = Tensor(tuple(tensor.shape), [theirs], [len(tensor)], False)
            continue
        before = ""
        block = re.fullmatch(r"blocks\.(\d+)\.(.*)", module)
        if block:
            before, module = f"{form.layers}.{block[1]}.", block[2]
        parts = form.modules[module]
        if isinstance(parts, str):
            parts, rows = (parts,), [len(tensor)]
        elif module == "attention.qkv":
            rows = [queries, keys, keys]
        else:
            rows = [len(tensor) // len(parts)] * len(parts)
        names = [f"{before}{part}.{kind}" for part in parts]
        transposed = conv1d and form.conv1d and block is not None and tensor.dim() == 2
        found[name] = Tensor(tuple(tensor.shape), names, rows, transposed)
    return found


def convert(
    tensors: dict[str, torch.Tensor], config: ModelConfig, where: str, conv1d: bool = True
) -> dict[str, torch.Tensor]:
    """Tensors with transformers' names -> weights of Model(config).

    where: names the source in errors. conv1d: see `layout`.
    Raises: UserError that lists tensors that are missing, unknown or of another shape.
    """
    table, form = layout(config, conv1d), format_of(config)
    plain = {_plain_name(name, form): tensor for name, tensor in tensors.items()}
    if config.tie_weights:  # The input embedding is the table. A second copy has to be equal.
        head, tokens = f"{form.head}.weight", f"{form.modules['tokens']}.weight"
        if tokens in plain:
            first = plain.pop(tokens)
            if head in plain and not torch.equal(first, plain[head]):
                raise UserError(
                    f"{where}: {tokens} and {head} differ, but its configuration ties them"
                    " (tie_word_embeddings)"
                )
            plain[head] = first
    own_bias = f"{form.head}.bias"
    if form.head_bias is not None and not config.tie_weights and own_bias in plain:
        plain[form.head_bias] = plain.pop(own_bias)  # An untied BERT uses this one.
    if problems := _misfits(plain, table, form):
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(
            f"{where} does not hold the model that its configuration describes:"
            f" {'; '.join(problems[:LISTED])}{more}"
        )
    return {name: t.join(plain) for name, t in table.items() if all(n in plain for n in t.names)}


def _plain_name(name: str, form: Format) -> str:
    """The name of a tensor as in `layout`."""
    name = name.removeprefix("_orig_mod.").removeprefix(form.trunk)
    name = name.replace(f"{form.head}.table", f"{form.head}.weight")  # A swapped model.
    name = re.sub(r"\.beta$", ".bias", name)
    return re.sub(r"\.gamma$", ".weight", name)


def _misfits(tensors: dict[str, torch.Tensor], table: dict[str, Tensor], form: Format) -> list[str]:
    """Problems with tensors that are missing, unknown, or of another shape than in the table."""
    expected = {n: s for t in table.values() for n, s in zip(t.names, t.shapes(), strict=True)}
    lost = [n for n in expected if n not in tensors]
    if form.transform is not None:
        own = [n for n in expected if n.startswith(form.transform) and n != f"{form.head}.weight"]
        if set(own) <= set(lost) and all(n.startswith(form.transform) for n in lost):
            lost = []  # The encoder was saved alone. The head's transform gets new weights.
    found = [f"{n} is missing" for n in lost]
    for name in tensors:
        if name not in expected and not IGNORED.fullmatch(name):
            found.append(f"{name} is not part of {form.arch}")
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            found.append(f"{name} is {tuple(tensors[name].shape)}, expected {shape}")
    return found


# ---- finding and reading -----------------------------------------------------------------------


@dataclass
class Pretrained:
    """A model to start from."""

    name: str
    settings: dict  # The settings of ModelConfig that it determines.
    longest: int  # The largest block size that it allows.
    tokenizer: str | None  # The name of its tokenizer; None if unknown.
    vocabulary: Path | None  # Its tokenizer.json, if it has one.
    # A function from a ModelConfig to the tensors, by their names in model.py.
    weights: Callable[[ModelConfig], dict[str, torch.Tensor]]
    characters: str = ""  # The characters of the tokenizer char.

    @property
    def head(self) -> str:
        return self.settings.get("head", "cross_entropy")

    def defaults(self, given: Container[str]) -> dict:
        """The settings of a run that starts from this model, but for those that are given.

        A twin has an exponent or a scale, so the one that is given replaces the other.
        """
        found = dict(self.settings)
        for key, other in (("exponent", "scale"), ("scale", "exponent")):
            if key in given:
                found.pop(other, None)
        return found

    def problems(self, config: ModelConfig) -> list[str]:
        """The settings of a configuration that contradict this model, in words."""
        free = {*FREE, *self.free_strength(config), "tie_weights"}
        if config.head != self.head:  # The swap replaces all settings of the head.
            free |= {key for key in self.settings if HEAD_KEY.match(key)}
        found = [
            f"{self.name} has {key}={value}, not {getattr(config, key)}"
            for key, value in self.settings.items()
            if key not in free and getattr(config, key) != value
        ]
        if found:
            found.append(
                "a start from a model keeps its shape and head: leave these settings out, on the"
                " command line and in the config file"
            )
        if config.block_size > self.longest:
            found.append(
                f"block_size={config.block_size}: {self.name} reads at most {self.longest} tokens"
            )
        if config.vocab_size < self.settings["vocab_size"]:
            found.append(
                f"vocab_size={config.vocab_size}: {self.name} has {self.settings['vocab_size']}"
            )
        if config.head != self.head and config.head_precision == "autocast":
            found.append(
                "head_precision=autocast: a matched head needs float32, because its predictions"
                " depend on small differences between large prototypes"
            )
        if self.head not in ("cross_entropy", config.head):
            found.append(
                f"head={config.head}: only a model with cross_entropy can get another head, and"
                f" {self.name} has {self.head}"
            )
        return found

    def free_strength(self, config: ModelConfig) -> tuple[str, ...]:
        """The settings of n or s, which may change if the head stays and does not learn them."""
        learnt = self.settings.get("learn_exponent") or self.settings.get("learn_scale")
        return () if learnt or config.head != self.head else ("exponent", "scale")

    def reads(self, data: Data) -> str | None:
        """Why the model cannot read the tokens of the data, in words; None if it can.

        If the model's tokenizer is unknown, it prints a note on stderr.
        """
        where = f"{data.folder} ({data.tokenizer})"
        if self.vocabulary:
            own = rust_vocabulary(self.vocabulary)
            theirs = rust_vocabulary(rust_tokenizer(data.tokenizer, data.folder))
            if other := [token for token, i in theirs.items() if own.get(token) != i]:
                return (
                    f"{self.name} has another tokenizer than {where}: {len(other):,} tokens"
                    f" differ, such as {other[0]!r}"
                )
        elif self.characters and data.tokenizer == "char":
            if self.characters != read_characters(data.folder).characters:
                return f"{self.name} has other characters than {where}"
        elif self.tokenizer not in (None, data.tokenizer):
            return f"{self.name} has the tokenizer {self.tokenizer}, another than {where}"
        elif self.tokenizer is None:
            print(
                f"note: the tokenizer of {self.name} is unknown; it gets the tokens of {where}",
                file=sys.stderr,
            )
        return None

    def load(self, config: ModelConfig) -> Model:
        """The model with its own head. Block size, vocabulary and dropout are those of `config`."""
        own = ModelConfig(**self.settings)
        weights = self.weights(own)
        free = {*FREE, *self.free_strength(config)}
        own = replace(own, **{key: getattr(config, key) for key in free})
        if "positions.weight" in weights:
            weights["positions.weight"] = weights["positions.weight"][: own.block_size]
        for name in TABLES:
            if name in weights:
                more = (0, own.vocab_size - len(weights[name]))  # rows
                columns = (0, 0) * (weights[name].dim() - 1)
                weights[name] = F.pad(weights[name], columns + more)
        with torch.device("meta"):  # Saves time and memory for weights that are replaced.
            model = Model(own)
        if new := [name for name in checkpoint.own_weights(model) if name not in weights]:
            print(f"{self.name} has no {', '.join(new)}: they get new weights", file=sys.stderr)
            fresh = checkpoint.own_weights(Model(own))
            weights |= {name: fresh[name] for name in new}
        checkpoint.load_weights(model, weights, assign=True)
        return model


def find(name: str) -> Pretrained:
    """Finds the model that `--init_from` names.

    name: a run's folder, a folder in Hugging Face's format, nanoGPT's ckpt.pt, or a model on the
        Hugging Face hub.
    Raises: UserError for a name that is none of them, cannot be reached, or is a kind of model that
        model.py does not support.
    """
    path = Path(name)
    if (path / "config.yaml").is_file():
        return _from_run(path)
    if path.is_dir():
        return _from_folder(path, name, lambda: path)
    if path.suffix == ".safetensors":
        raise UserError(f"init_from={name}: name the folder, which has config.json too")
    if path.is_file():
        return _from_nanogpt(path)
    owned = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "out/"))
    if name not in HUB and not owned:
        raise UserError(
            f"init_from={name}: no such file or folder, and no"
            f" model{nearest(name, ['scratch', 'resume', 'auto', *HUB])}; "
            "other models of the hub are written OWNER/NAME"
        )
    folder = _download(name, ["config.json", "tokenizer.json"])
    return _from_folder(folder, name, lambda: _download(name, SAFETENSORS))


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # The network, the hub and the disk raise different errors.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(
            f"init_from={name}: there is no such local folder, and the Hugging Face hub gave none"
            f" ({type(error).__name__}: {reason}). "
            "Without the hub, copy the model's folder here and name its path"
        ) from None


def _from_run(path: Path) -> Pretrained:
    stored, folder = read_yaml(path / "config.yaml"), checkpoint.newest(path, (checkpoint.WEIGHTS,))
    if lost := {"block_size", "vocab_size", "tokenizer"} - set(stored):
        raise UserError(f"{path}/config.yaml has no {', '.join(sorted(lost))}")

    arch = ARCHITECTURES.get(stored.get("arch", ModelConfig.arch))
    rotary = arch is not None and arch.rotary

    def weights(_: ModelConfig) -> dict[str, torch.Tensor]:
        return checkpoint.load_tensors(folder / checkpoint.WEIGHTS)

    return Pretrained(
        name=str(path),
        settings={k: v for k, v in stored.items() if k in ModelConfig.__dataclass_fields__},
        # Rotary positions are computed, so there can be any number of them.
        longest=sys.maxsize if rotary else stored["block_size"],
        tokenizer=stored["tokenizer"],
        vocabulary=_vocabulary(path),
        weights=weights,
        characters=read_characters(path).characters if stored["tokenizer"] == "char" else "",
    )


def _vocabulary(folder: Path) -> Path | None:
    """The tokenizer.json of a folder, or None."""
    return folder / BPE_FILE if (folder / BPE_FILE).is_file() else None


def _from_nanogpt(path: Path) -> Pretrained:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(stored, dict):
            raise KeyError("model_args")
        arguments = stored["model_args"]
        settings = {
            key: arguments[key]
            for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
        }
        tensors = dict(stored["model"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"init_from={path} is not a checkpoint of nanoGPT, or holds more than tensors; nothing"
            f" in it was run ({reason})"
        ) from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"init_from={path} is not a checkpoint of nanoGPT: it has no {error}"
        ) from None
    rows = settings["vocab_size"]
    settings |= {"arch": GPT2.arch, "real_vocab_size": rows, "activation": "gelu"}

    def weights(own: ModelConfig) -> dict[str, torch.Tensor]:
        return convert(tensors, own, str(path), conv1d=False)

    return Pretrained(
        name=str(path),
        settings=settings,
        longest=settings["block_size"],
        tokenizer=GPT2.tokenizer_of(rows),
        vocabulary=None,
        weights=weights,
    )


def _from_folder(folder: Path, name: str, fetch: Callable[[], Path]) -> Pretrained:
    """A model in Hugging Face's format. fetch: gets the weights and returns their folder."""
    config = read_config(folder, name)
    form = FORMATS[config.model_type]
    settings, longest = settings_of(config, name)

    def weights(own: ModelConfig) -> dict[str, torch.Tensor]:
        return convert(read_tensors(fetch(), name), own, name)

    return Pretrained(
        name=name,
        settings=settings,
        longest=longest,
        tokenizer=form.tokenizer_of(settings["vocab_size"]),
        vocabulary=_vocabulary(folder),
        weights=weights,
    )


def read_config(folder: Path, name: str) -> Any:
    """The config.json of a folder as a configuration of transformers, with defaults filled in.

    Raises: UserError for a missing or wrong file, or a model that model.py does not support.
    """
    try:
        stored = json.loads((folder / "config.json").read_bytes())
        kind = str(stored["model_type"]).removeprefix("harmonic_")
    except OSError as error:
        raise UserError(
            f"init_from={name}: config.json: {error.strerror}; a run's folder or one in Hugging"
            " Face's format is needed"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"init_from={name}: config.json is wrong ({error})") from None
    if kind not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"init_from={name} is a model of type {kind}; supported types are {known}")
    from transformers import CONFIG_MAPPING  # Importing it takes seconds.

    try:
        return CONFIG_MAPPING[kind].from_dict({**stored, "model_type": kind})
    except Exception as error:  # Configuration classes raise different errors.
        raise UserError(
            f"init_from={name}: config.json is wrong ({' '.join(str(error).split())[:300]})"
        ) from None


def settings_of(config: Any, name: str) -> tuple[dict[str, Any], int]:
    """The settings of ModelConfig for a configuration of transformers, and the largest block size.

    Raises: UserError that lists settings that model.py does not support.
    """
    form = FORMATS[config.model_type]
    if wrong := form.problems(config):
        raise UserError(f"init_from={name}: model.py does not have {', '.join(wrong)}")
    settings = form.read(config)
    head = dict(getattr(config, "harmonic", None) or {})  # An export of a harmonic head has this.
    if head:
        settings["head"] = head.pop("name", None)
        settings["real_vocab_size"] = head.pop("real_vocab_size", settings["vocab_size"])
    for key, value in head.items():
        settings[key if key in ModelConfig.__dataclass_fields__ else f"head_{key}"] = value
    return settings, form.longest(config)


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a folder.

    Raises: UserError for a corrupt file, a missing file, or a folder that has only pickles.
    """
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file() and not (folder / files[0]).is_file():  # As in transformers.
        try:
            files = sorted(
                {Path(file).name for file in json.loads(index.read_bytes())["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"init_from={name}: {index.name} is wrong ({error})") from None
    if lost := [file for file in files if not (folder / file).is_file()]:
        pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        why = (
            f"; {', '.join(pickles)} is a pickle, which could run anything: convert it to"
            " safetensors"
            if pickles
            else ""
        )
        raise UserError(f"init_from={name} has no {', '.join(lost)}{why}")
    return {k: v for file in files for k, v in checkpoint.load_tensors(folder / file).items()}


# ---- swapping the head -------------------------------------------------------------------------


@torch.no_grad()
def states(model: Model, data: Data, seed: int, batch_size: int) -> torch.Tensor:
    """Hidden states of training text, the input of the head: (N, C), N at least 8 * ROWS."""
    c, found = model.config, []
    batches, device = batches_of(data, c), model.tokens.weight.device
    windows = max(batch_size, -(-8 * ROWS // batches.objective.predicted(c.block_size)))
    for x, y in batches.training(seed, 0, range(windows), windows, batch_size):
        found.append(model.hidden(x.to(device))[(y != IGNORE_INDEX).to(device)])
    return torch.cat(found)


@torch.no_grad()
def swap(model: Model, config: ModelConfig, states: torch.Tensor) -> float:
    """Gives a model the head of `config`, matched to its old softmax (`harmonic.match`).

    The head gets its own prototypes, which are not tied to the input embedding. `config` changes
    too: it gets the exponent or scale that was found.

    Returns: the mean KL(old || new) of the predictions on the states, in nats per token.
    """
    config.tie_weights = False
    old = model.head
    arguments = dict(real_vocab_size=config.real_vocab_size or None, **config.head_arguments())
    model.head = HarmonicHead(config.n_embd, config.vocab_size, config.head, **arguments).to(
        states.device
    )
    kl = match(model.head, states, old.weight, old.bias)
    if model.head.strength_name is not None:
        config.scale, config.exponent = None, None
        setattr(config, model.head.strength_name, float(model.head.strength))
    model.config = config
    return kl
