"""Models that people already have: Hugging Face folders and hub names, nanoGPT's ckpt.pt, runs; and
the swap of their heads.

One table says which tensor of transformers' GPT-2, BERT, Qwen2 and Qwen3 is which of model.py;
`interop.export` reads it the other way. Weights come from safetensors. A pickle is read for
nanoGPT's checkpoints alone, by PyTorch's loader that executes nothing.
"""

import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from base.command_line import read_yaml
from base.errors import UserError, nearest
from harmonic import IGNORE_INDEX, HarmonicHead, match
from harmonic.match import ROWS
from model import Model, ModelConfig
from text.token_files import Data
from text.tokenizers import BPE_FILE, read_characters, rust_tokenizer, rust_vocabulary
from training import checkpoint
from training.objective import batches_of

SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
HUB = (
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "bert-base-uncased",
    "bert-large-uncased",
)  # names without an owner
ARCH = {"gpt2": "gpt", "bert": "bert", "qwen2": "qwen", "qwen3": "qwen"}
TRUNK = {
    "gpt": "transformer.",
    "bert": "bert.",
    "qwen": "model.",
}  # in front of a trunk's names, where there is a head too
LAYERS = {"gpt": "h", "bert": "encoder.layer", "qwen": "layers"}
HEADS = {"gpt": "lm_head", "bert": "cls.predictions.decoder", "qwen": "lm_head"}

# module of model.py: module of transformers (without TRUNK; in a block without LAYERS and its
# number); several are stacked in one of ours
MODULES = {
    "gpt": {
        "tokens": "wte",
        "positions": "wpe",
        "norm1": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "norm2": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "final_norm": "ln_f",
    },
    "bert": {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "norm2": "output.LayerNorm",
        "transform.0": "cls.predictions.transform.dense",
        "transform.2": "cls.predictions.transform.LayerNorm",
    },
    "qwen": {
        "tokens": "embed_tokens",
        "norm1": "input_layernorm",
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": "mlp.down_proj",
        "final_norm": "norm",
    },
}
FREE = (
    "block_size",
    "vocab_size",
    "real_vocab_size",
    "dropout",
    "label_smoothing",
    "doc_mask",
    "eot_id",
    "head_impl",
    "head_skip",
    "head_precision",
)
HEAD_KEY = re.compile(
    "(head|link|exponent|scale|learn_exponent|learn_scale)$|head_(?!dim)"
)  # what a swap changes
TABLES = ("tokens.weight", "head.weight", "head.bias")  # a row for each token
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}  # the last name of each is written
# What checkpoints hold besides: buffers of old versions, BERT's other heads
IGNORED = re.compile(
    r".*(\.attn\.(masked_)?bias|position_ids|inv_freq)|pooler\..*|cls\.(seq_relationship|predictions\.decoder\.bias).*"
)


# ---- names and layouts -------------------------------------------------------------------------


@dataclass
class Tensor:
    """One tensor of model.py in transformers' terms: its names, the rows of each, and whether they
    are stored transposed (Conv1D)."""

    shape: tuple
    names: list[str]
    rows: list[int]
    transposed: bool

    def shapes(self) -> list[tuple]:
        shapes = [(rows, *self.shape[1:]) for rows in self.rows]
        return [s[::-1] for s in shapes] if self.transposed else shapes

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = tensor.split(self.rows) if len(self.rows) > 1 else [tensor]
        return {
            n: (p.T if self.transposed else p).contiguous()
            for n, p in zip(self.names, parts, strict=True)
        }

    def join(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [tensors.pop(n).float() for n in self.names]
        parts = [p.T if self.transposed else p for p in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def layout(config: ModelConfig, conv1d: bool = True) -> dict[str, Tensor]:
    """Every tensor of a model: its name in model.py -> where it is in transformers, without TRUNK's
    prefix. conv1d: GPT-2's matrices are transposed (nanoGPT's are not)."""
    arch, width = config.arch, config.attention_width()
    stacked = {
        "attention.qkv": [config.n_head * width] + 2 * [(config.n_kv_head or config.n_head) * width]
    }
    with torch.device("meta"):
        own = checkpoint.own_weights(Model(config))
    found = {}
    for name, tensor in own.items():
        module, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"blocks\.(\d+)\.(.*)", module)
        transposed = bool(conv1d and arch == "gpt" and block and tensor.dim() == 2)
        if module.split(".")[0] == "head":
            theirs = (
                "cls.predictions.bias"
                if (arch, name) == ("bert", "head.bias")
                else HEADS[arch] + name.removeprefix("head")
            )
            found[name] = Tensor(tuple(tensor.shape), [theirs], [len(tensor)], False)
            continue
        theirs = MODULES[arch][block[2] if block else module]
        theirs = [theirs] if isinstance(theirs, str) else theirs
        before = f"{LAYERS[arch]}.{block[1]}." if block else ""
        rows = stacked.get(block[2], [len(tensor) // 2] * 2) if len(theirs) > 1 else [len(tensor)]
        found[name] = Tensor(
            tuple(tensor.shape), [f"{before}{t}.{kind}" for t in theirs], rows, transposed
        )
    return found


def convert(
    tensors: dict[str, torch.Tensor], config: ModelConfig, where: str, conv1d: bool = True
) -> dict[str, torch.Tensor]:
    """Tensors under transformers' names -> weights of Model(config). UserError listing what is
    missing, over, or of another shape."""
    table, trunk = layout(config, conv1d), TRUNK[config.arch]
    plain = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("_orig_mod.").removeprefix(trunk)
        name = name.replace(
            f"{HEADS[config.arch]}.table", f"{HEADS[config.arch]}.weight"
        )  # of a swapped model
        plain[re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))] = tensor
    expected = {n: s for t in table.values() for n, s in zip(t.names, t.shapes(), strict=True)}
    if config.tie_weights:  # the table lies where the input embedding is; a second copy is the same
        head, tokens = f"{HEADS[config.arch]}.weight", f"{MODULES[config.arch]['tokens']}.weight"
        if tokens in plain:
            first = plain.pop(tokens)
            if head in plain and not torch.equal(first, plain[head]):
                why = (
                    f"{tokens} and {head} differ, but its configuration ties them"
                    " (tie_word_embeddings)"
                )
                raise UserError(f"{where}: {why}")
            plain[head] = first
    lost = [n for n in expected if n not in plain]
    if lost and config.arch == "bert" and all(n.startswith("cls.predictions") for n in lost):
        lost = []  # an encoder alone: the head's transform starts anew
    over = [n for n in plain if n not in expected and not IGNORED.fullmatch(n)]
    wrong = [
        f"{n} is {tuple(plain[n].shape)}, expected {s}"
        for n, s in expected.items()
        if n in plain and tuple(plain[n].shape) != s
    ]
    problems = (
        [f"{n} is missing" for n in lost]
        + [f"{n} is not part of {config.arch}" for n in over]
        + wrong
    )
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(
            f"{where} does not hold the model that its configuration describes:"
            f" {'; '.join(problems[:12])}{more}"
        )
    return {name: t.join(plain) for name, t in table.items() if all(n in plain for n in t.names)}


# ---- finding and reading -----------------------------------------------------------------------


@dataclass
class Pretrained:
    """A model to start from."""

    name: str
    settings: dict  # the keys of ModelConfig that it determines
    longest: int  # the block size that it allows
    tokenizer: str | None  # the name of its own, None if unknown
    vocabulary: Path | None  # its tokenizer.json, where it has one
    weights: Callable  # ModelConfig -> its tensors by their names in model.py
    characters: str = ""  # those of the tokenizer char

    @property
    def head(self) -> str:
        return self.settings.get("head", "cross_entropy")

    def problems(self, config: ModelConfig) -> list[str]:
        """What of a configuration contradicts it."""
        free = {*FREE, "tie_weights"}
        if config.head != self.head:  # which replaces all of it
            free |= {key for key in self.settings if HEAD_KEY.match(key)}
        found = [
            f"{self.name} has {key}={value}, not {getattr(config, key)}"
            for key, value in self.settings.items()
            if key not in free and getattr(config, key) != value
        ]
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
                "head_precision=autocast: a matched head lives on small differences of large"
                " prototypes and needs float32"
            )
        if self.head not in ("cross_entropy", config.head):
            found.append(
                f"head={config.head}: a head is swapped for one of cross_entropy, and {self.name}"
                f" has {self.head}"
            )
        return found

    def reads(self, data: Data) -> str | None:
        """Why it cannot read the data's tokens, in words; None if it can. Where nothing tells, a
        note on stderr."""
        where = f"{data.folder} ({data.tokenizer})"
        if self.vocabulary:
            own, theirs = (
                rust_vocabulary(f)
                for f in (self.vocabulary, rust_tokenizer(data.tokenizer, data.folder))
            )
            if other := [token for token, i in theirs.items() if own.get(token) != i]:
                return (
                    f"{self.name} has another tokenizer than {where}: {len(other):,} tokens"
                    f" differ, such as {other[0]!r}"
                )
        elif (
            self.characters
            and data.tokenizer == "char"
            and self.characters != read_characters(data.folder).characters
        ):
            return f"{self.name} has other characters than {where}"
        elif self.tokenizer not in (None, data.tokenizer):
            return f"{self.name} has the tokenizer {self.tokenizer}, another than {where}"
        elif self.tokenizer is None:
            print(
                f"note: nothing says which tokenizer {self.name} was trained with; it gets the"
                f" tokens of {where}",
                file=sys.stderr,
            )
        return None

    def load(self, config: ModelConfig) -> Model:
        """Its model with its own head, and the block size, vocabulary and dropout of `config`."""
        own = ModelConfig(**self.settings)
        weights = self.weights(own)
        own = replace(own, **{key: getattr(config, key) for key in FREE})
        if "positions.weight" in weights:
            weights["positions.weight"] = weights["positions.weight"][: own.block_size]
        for name in TABLES:
            if name in weights:
                more = own.vocab_size - len(weights[name])
                weights[name] = F.pad(
                    weights[name], (0, 0, 0, more) if weights[name].dim() == 2 else (0, more)
                )
        with torch.device("meta"):  # no time and memory for numbers that are replaced
            model = Model(own)
        if new := [name for name in checkpoint.own_weights(model) if name not in weights]:
            print(f"{self.name} has no {', '.join(new)}: they start anew", file=sys.stderr)
            fresh = checkpoint.own_weights(Model(own))
            weights |= {name: fresh[name] for name in new}
        checkpoint.load_weights(model, weights, assign=True)
        return model


def find(name: str) -> Pretrained:
    """What `--init_from` names: a run's folder, a folder in Hugging Face's format, nanoGPT's
    ckpt.pt, or a model on the hub.

    Raises: UserError for what is none of them, cannot be reached, or is a model that model.py does
        not have.
    """
    path = Path(name)
    if (path / "config.yaml").is_file():
        return _from_run(path)
    if path.is_dir():
        return _from_folder(path, name)
    if path.suffix == ".safetensors":
        raise UserError(f"init_from={name}: name the folder, which has config.json too")
    if path.is_file():
        return _from_nanogpt(path)
    if (
        name not in HUB
        and not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        or name.startswith((".", "out/"))
    ):
        raise UserError(
            f"init_from={name}: no such file or folder, and no"
            f" model{nearest(name, ['scratch', 'resume', 'auto', *HUB])}; "
            "other models of the hub are written OWNER/NAME"
        )
    return _from_folder(
        _download(name, ["config.json", "tokenizer.json"]),
        name,
        lambda: _download(name, SAFETENSORS),
    )


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, hub, access, disk: each raises its own
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(
            f"init_from={name}: neither a local folder nor to be had from the Hugging Face hub"
            f" ({type(error).__name__}: {reason}); "
            "where the hub is out of reach, copy the model's folder here and name its path"
        ) from None


def _from_run(path: Path) -> Pretrained:
    stored, folder = read_yaml(path / "config.yaml"), checkpoint.newest(path, (checkpoint.WEIGHTS,))
    settings = {k: v for k, v in stored.items() if k in ModelConfig.__dataclass_fields__}
    if lost := {"block_size", "vocab_size", "tokenizer"} - set(stored):
        raise UserError(f"{path}/config.yaml has no {', '.join(sorted(lost))}")
    vocabulary = path / BPE_FILE if (path / BPE_FILE).is_file() else None
    weights = lambda _: checkpoint.load_tensors(folder / checkpoint.WEIGHTS)
    characters = read_characters(path).characters if stored["tokenizer"] == "char" else ""
    return Pretrained(
        str(path),
        settings,
        settings["block_size"],
        stored["tokenizer"],
        vocabulary,
        weights,
        characters,
    )


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
    settings |= {"arch": "gpt", "real_vocab_size": settings["vocab_size"], "activation": "gelu"}
    tokenizer = "gpt2" if settings["vocab_size"] in (50257, 50304) else None
    weights = lambda own: convert(tensors, own, str(path), conv1d=False)
    return Pretrained(str(path), settings, settings["block_size"], tokenizer, None, weights)


def _from_folder(folder: Path, name: str, fetch: Callable | None = None) -> Pretrained:
    """fetch: gets the weights and returns their folder; None: they are in this one."""
    config = read_config(folder, name)
    settings, longest = settings_of(config, name)
    rows = settings["vocab_size"]
    by_rows = {("gpt", 50257): "gpt2", ("gpt", 50304): "gpt2", ("bert", 30522): "bert"}
    tokenizer = (
        "qwen"
        if settings["arch"] == "qwen" and rows > 151642
        else by_rows.get((settings["arch"], rows))
    )
    vocabulary = folder / BPE_FILE if (folder / BPE_FILE).is_file() else None
    weights = lambda own: convert(read_tensors(fetch() if fetch else folder, name), own, name)
    return Pretrained(name, settings, longest, tokenizer, vocabulary, weights)


def read_config(folder: Path, name: str):
    """A folder's config.json as transformers' configuration, defaults filled in. UserError for what
    model.py does not have."""
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
    if kind not in ARCH:
        raise UserError(f"init_from={name} is a model of type {kind}: known are {', '.join(ARCH)}")
    from transformers import CONFIG_MAPPING  # takes seconds to import

    try:
        return CONFIG_MAPPING[kind].from_dict({**stored, "model_type": kind})
    except Exception as error:  # each configuration class validates in its own way
        raise UserError(
            f"init_from={name}: config.json is wrong ({' '.join(str(error).split())[:300]})"
        ) from None


def settings_of(config, name: str) -> tuple[dict, int]:
    """transformers' configuration -> (the keys of ModelConfig, the longest block size). UserError
    listing what model.py does not do."""
    arch = ARCH[config.model_type]
    rope = getattr(config, "rope_parameters", None) or {}
    required = {
        "gpt": dict(
            layer_norm_epsilon=1e-5,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
        "bert": dict(
            layer_norm_eps=1e-12, type_vocab_size=2, is_decoder=False, add_cross_attention=False
        ),
        "qwen": dict(
            hidden_act="silu", rms_norm_eps=1e-6, use_sliding_window=False, attention_bias=False
        ),
    }[arch]
    wrong = [
        f"{key}={getattr(config, key)} (only {value})"
        for key, value in required.items()
        if getattr(config, key, value) != value
    ]
    activation = getattr(config, "activation_function", None) or config.hidden_act
    if arch != "qwen" and activation not in ACTIVATIONS:
        wrong.append(f"the activation {activation} (only {', '.join(ACTIVATIONS)})")
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rope_type={rope['rope_type']} (only default)")
    if wrong:
        raise UserError(f"init_from={name}: model.py does not have {', '.join(wrong)}")
    longest = config.max_position_embeddings
    settings = {
        "arch": arch,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_embd": config.hidden_size,
        "intermediate_size": (config.n_inner or 0) if arch == "gpt" else config.intermediate_size,
        "block_size": min(longest, 1024)
        if arch == "qwen"
        else longest,  # rotary positions need no table: any length below will do
        "vocab_size": config.vocab_size,
        "real_vocab_size": config.vocab_size,
        "tie_weights": bool(config.tie_word_embeddings),
        "bias": config.model_type != "qwen3",
        "activation": ACTIVATIONS.get(activation),
    }
    if arch == "qwen":
        settings |= {
            "n_kv_head": 0
            if config.num_key_value_heads == config.num_attention_heads
            else config.num_key_value_heads,
            "rope_theta": float(rope.get("rope_theta", 10000.0)),
            "qk_norm": config.model_type == "qwen3",
        }
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        settings["head_dim"] = (
            0 if width * config.num_attention_heads == config.hidden_size else width
        )
    head = dict(getattr(config, "harmonic", None) or {})  # an export of a harmonic head
    if head:
        settings |= {
            "head": head.pop("name", None),
            "real_vocab_size": head.pop("real_vocab_size", config.vocab_size),
        }
        settings |= {
            key if key in ModelConfig.__dataclass_fields__ else f"head_{key}": value
            for key, value in head.items()
        }
    return settings, longest


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files. UserError for a damaged file, a missing shard,
    or a folder with pickles alone."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
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
    """Hidden states of training text in front of a model's head: (N, C), at least 8 ROWS of
    them."""
    c, found = model.config, []
    batches, device = batches_of(data, c), model.tokens.weight.device
    windows = max(batch_size, -(-8 * ROWS // batches.objective.predicted(c.block_size)))
    for x, y in batches.training(seed, 0, range(windows), windows, batch_size):
        found.append(model.hidden(x.to(device))[(y != IGNORE_INDEX).to(device)])
    return torch.cat(found)


@torch.no_grad()
def swap(model: Model, config: ModelConfig, states: torch.Tensor) -> float:
    """Gives a model the head of `config`, with prototypes of its own that are matched to its
    softmax (`harmonic.match`).

    `config` is changed: it gets the exponent (or scale) that was found, and its head and input
    embedding are not tied.
    Returns: the KL divergence from the model's predictions on the states in nats per token.
    """
    config.tie_weights = False
    old = model.head
    arguments = dict(real_vocab_size=config.real_vocab_size or None, **config.head_arguments())
    model.head = HarmonicHead(config.n_embd, config.vocab_size, config.head, **arguments).to(
        states.device
    )
    kl = match(model.head, states, old.weight, old.bias)
    if not model.head.is_control:
        config.scale, config.exponent = None, None
        setattr(config, model.head.strength_name, float(model.head.strength))
    model.config = config
    return kl
