"""The formats of transformers' GPT-2, BERT, Qwen2 and Qwen3: what model.py's settings and tensors
are called there.

`interop.pretrained` reads models with this table, and `interop.export` writes them with it.
"""

import sys
from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any

from base.errors import UserError
from model import ModelConfig

# A name in transformers: the name in model.py. If two names mean the same, exports use the last.
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
WRITTEN = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
# Rotary positions have no table that limits the block size. By default it is at most this.
ROTARY_BLOCK = 1024


@dataclass(frozen=True)
class Format:
    """One kind of model of transformers.

    In its config.json:
        model_type: its value there. model: the class.
        arch, qk_norm: the settings of model.py for such a model.
        keys: maps a key of ModelConfig to the key there. dropouts: the keys for `dropout`.
        activation_key: the key for the activation; None if there is only one activation.
        activation: the activation of the published models.
        required: settings for which model.py supports only this value.
        constant: settings that an export adds.
        repeated: keys that an export adds, each with the value of another key.
        rotary: whether it has rotary positions. Such models also have grouped heads.
    Its tensors:
        trunk: prefix of all names except the head's. layers: prefix of the number of a block.
        modules: maps a module of model.py to the module there, without these prefixes. If there are
            several there, ours has their rows one below the other.
        conv1d: whether the matrices of blocks are stored transposed.
        head, head_bias: names of the output layer.
        transform: prefix of the tensors that are missing if an encoder was saved without its head.
    Its tokens:
        masked: whether it is a masked language model.
        tokenizer: the tokenizer of models whose number of rows is in `tokenizer_rows`.
    """

    model_type: str
    model: str
    arch: str
    keys: dict[str, str]
    dropouts: tuple[str, ...]
    required: dict[str, Any]
    trunk: str
    layers: str
    modules: dict[str, str | tuple[str, ...]]
    tokenizer: str
    tokenizer_rows: Container[int]
    head: str = "lm_head"
    head_bias: str | None = None
    transform: str | None = None
    constant: dict[str, Any] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)
    activation_key: str | None = None
    activation: str | None = None
    conv1d: bool = False
    masked: bool = False
    qk_norm: bool = False
    rotary: bool = False

    @property
    def auto_class(self) -> str:
        """The Auto class that loads it."""
        return "AutoModelForMaskedLM" if self.masked else "AutoModelForCausalLM"

    @property
    def task(self) -> str:
        """The name of its pipeline."""
        return "fill-mask" if self.masked else "text-generation"

    def tokenizer_of(self, rows: int) -> str | None:
        """The name of the tokenizer of a model with this number of rows; None if unknown."""
        return self.tokenizer if rows in self.tokenizer_rows else None

    def longest(self, config: Any) -> int:
        """The largest block size of a model."""
        return getattr(config, self.keys["block_size"])

    def problems(self, config: Any) -> list[str]:
        """The settings of a configuration of transformers that model.py does not support."""
        found = [
            f"{key}={getattr(config, key)} (only {value})"
            for key, value in self.required.items()
            if getattr(config, key, value) != value
        ]
        if self.activation_key is not None:
            activation = getattr(config, self.activation_key)
            if activation not in ACTIVATIONS:
                found.append(f"the activation {activation} (only {', '.join(ACTIVATIONS)})")
        rope_type = _rope(config).get("rope_type", "default")
        if rope_type != "default":
            found.append(f"rope_type={rope_type} (only default)")
        return found

    def read(self, config: Any) -> dict[str, Any]:
        """The settings of ModelConfig that a configuration of transformers determines."""
        found: dict[str, Any] = {"arch": self.arch}
        found |= {ours: getattr(config, theirs) for ours, theirs in self.keys.items()}
        found["intermediate_size"] = found["intermediate_size"] or 0  # GPT-2's is None.
        found["real_vocab_size"] = found["vocab_size"]
        found["tie_weights"] = bool(found["tie_weights"])
        found["bias"] = not self.qk_norm
        found["activation"] = None
        if self.activation_key is not None:
            found["activation"] = ACTIVATIONS[getattr(config, self.activation_key)]
        if self.rotary:
            found["block_size"] = min(found["block_size"], ROTARY_BLOCK)
            if found["n_kv_head"] == found["n_head"]:
                found["n_kv_head"] = 0
            width = getattr(config, "head_dim", None) or found["n_embd"] // found["n_head"]
            found["head_dim"] = 0 if width * found["n_head"] == found["n_embd"] else width
            found["rope_theta"] = float(_rope(config).get("rope_theta", 10000.0))
            found["qk_norm"] = self.qk_norm
        return found

    def write(self, c: ModelConfig) -> dict[str, Any]:
        """The settings of a configuration of transformers for this ModelConfig."""
        found = {theirs: getattr(c, ours) for ours, theirs in self.keys.items()}
        found[self.keys["intermediate_size"]] = c.mlp_width()
        found |= dict.fromkeys(self.dropouts, c.dropout)
        found |= self.constant
        found |= {key: found[same] for key, same in self.repeated.items()}
        if self.activation_key is not None:
            activation = c.activation or self.activation
            assert activation is not None
            found[self.activation_key] = WRITTEN[activation]
        if self.rotary:
            found[self.keys["n_kv_head"]] = c.n_kv_head or c.n_head
            found["head_dim"] = c.attention_width()
            found["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_theta}
        return found


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


SHARED = {"vocab_size": "vocab_size", "tie_weights": "tie_word_embeddings"}
SIZES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
    "block_size": "max_position_embeddings",
    **SHARED,
}

GPT2 = Format(
    model_type="gpt2",
    model="GPT2LMHeadModel",
    arch="gpt",
    keys={
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "intermediate_size": "n_inner",
        "block_size": "n_positions",
        **SHARED,
    },
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    activation_key="activation_function",
    activation="gelu_tanh",
    required={
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    # llama.cpp's converter reads the older name.
    repeated={"n_ctx": "n_positions"},
    trunk="transformer.",
    layers="h",
    modules={
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
    conv1d=True,
    tokenizer="gpt2",
    tokenizer_rows=(50257, 50304),
)

BERT = Format(
    model_type="bert",
    model="BertForMaskedLM",
    arch="bert",
    keys=SIZES,
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    activation_key="hidden_act",
    activation="gelu",
    required={
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "is_decoder": False,
        "add_cross_attention": False,
    },
    constant={"pad_token_id": None},
    trunk="bert.",
    layers="encoder.layer",
    modules={
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
    head="cls.predictions.decoder",
    head_bias="cls.predictions.bias",
    transform="cls.predictions",
    masked=True,
    tokenizer="bert",
    tokenizer_rows=(30522,),
)

QWEN2 = Format(
    model_type="qwen2",
    model="Qwen2ForCausalLM",
    arch="qwen",
    keys={**SIZES, "n_kv_head": "num_key_value_heads"},
    dropouts=("attention_dropout",),
    required={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    rotary=True,
    trunk="model.",
    layers="layers",
    modules={
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
    tokenizer="qwen",
    tokenizer_rows=range(151643, sys.maxsize),
)

QWEN3 = replace(QWEN2, model_type="qwen3", model="Qwen3ForCausalLM", qk_norm=True)

FORMATS = {form.model_type: form for form in (GPT2, BERT, QWEN2, QWEN3)}


def format_of(c: ModelConfig) -> Format:
    """The format in which a model of model.py is exported. UserError for an architecture that
    transformers does not have."""
    for form in FORMATS.values():
        if (form.arch, form.qk_norm) == (c.arch, c.qk_norm):
            return form
    raise UserError(f"arch={c.arch} has no format of transformers: see FORMATS in {__name__}")
