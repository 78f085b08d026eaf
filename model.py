"""The model in one file: GPT, BERT and Qwen blocks under a swappable unembedding
(harmonic.HarmonicHead).

    gpt    GPT-2 (Radford et al. 2019): pre-LayerNorm, learned positions, tanh GELU, causal.
    bert   BERT (Devlin et al. 2018): post-LayerNorm, learned positions, token types, erf GELU,
           bidirectional; a transform before the head, which is computed at masked positions only.
    qwen   Qwen2 (arXiv 2407.10671): RMSNorm, rotary positions, grouped key/value heads, SwiGLU,
           bias on Q, K, V only; with qk_norm the Qwen3 style (RMSNorm on Q and K per head, no
           bias).

Shapes: B batch, T time, C = n_embd, H heads, D = head_dim (C / H), V = vocab_size rows, of which
    the first real_vocab_size are tokens.
"""

import copy
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from harmonic import EXPONENTS, HEADS, IGNORE_INDEX, HarmonicHead
from harmonic.distances import OTHER_NAMES, resolve

# Tokens along a side of a block in FlexAttention's masks. Its kernels' tiles divide 128.
MASK_BLOCK = 128

# Cosines and sines of rotary positions.
Rope = tuple[torch.Tensor, torch.Tensor]
# Which pairs of tokens may attend.
Mask = torch.Tensor | BlockMask


@dataclass(frozen=True)
class Architecture:
    """What GPT-2, BERT and Qwen2 do differently. Everything else in this file is the same for all.

    causal: a token sees itself and what is before it. Otherwise it sees the whole window, and the
        model is trained by masked language modelling.
    norm: a function (width, whether it has a bias) -> a normalisation layer.
    norm_after: norms stand after each residual sum, and one after the embedding. Otherwise they
        stand before attention and MLP, and one before the head.
    rotary: positions are rotations of queries and keys. Otherwise they are a learned embedding.
    gated: the MLP is SwiGLU. Otherwise its activation is a GELU.
    gelu: the `approximate` of PyTorch's GELU, "none" or "tanh".
    out_bias: the output projection of attention has a bias too.
    token_types: an embedding of two kinds of tokens is added.
    transform: a linear layer, a GELU and a norm stand before the head.
    head_bias: the dot product of the cross-entropy head has a bias.
    scaled_residual: the layers that add to the residual stream start with weights that are divided
        by sqrt(2 n_layer).
    """

    causal: bool
    norm: Callable[[int, bool], nn.Module]
    norm_after: bool = False
    rotary: bool = False
    gated: bool = False
    gelu: str = "none"
    out_bias: bool = True
    token_types: bool = False
    transform: bool = False
    head_bias: bool = False
    scaled_residual: bool = False


ARCHITECTURES = {
    "gpt": Architecture(
        causal=True,
        norm=lambda width, bias: nn.LayerNorm(width, eps=1e-5, bias=bias),
        gelu="tanh",
        scaled_residual=True,
    ),
    "bert": Architecture(
        causal=False,
        norm=lambda width, bias: nn.LayerNorm(width, eps=1e-12, bias=bias),
        norm_after=True,
        token_types=True,
        transform=True,
        head_bias=True,
    ),
    "qwen": Architecture(
        causal=True,
        norm=lambda width, bias: nn.RMSNorm(width, eps=1e-6),
        rotary=True,
        gated=True,
        out_bias=False,
    ),
}


# Fields of ModelConfig carry two kinds of marks in their metadata, which other files read.


def free(default: Any) -> Any:
    """A setting that does not change what the weights mean. A run can resume with another value."""
    return field(default=default, metadata={"free": True})


def head_option(name: str) -> Any:
    """A setting that is the option `name` of some distances. None means the option's default."""
    return field(default=None, metadata={"head_option": name})


@dataclass
class ModelConfig:
    """The model"""

    arch: Literal[*ARCHITECTURES] = "gpt"  # type: ignore[valid-type]
    """blocks: GPT-2, BERT or Qwen2 style"""
    n_layer: int = 12
    """number of blocks"""
    n_head: int = 12
    """attention heads"""
    n_kv_head: int = 0
    """key/value heads, each shared by a group of query heads; 0 = n_head"""
    n_embd: int = 768
    """width"""
    head_dim: int = 0
    """width of an attention head; 0 = n_embd / n_head (Qwen3 models have other widths)"""
    intermediate_size: int = 0
    """width inside the MLP; 0 = 4 n_embd (gpt, bert) or 8/3 n_embd rounded up to a multiple of 64
    (qwen)"""
    activation: Literal["gelu", "gelu_tanh"] | None = None
    """gpt, bert: GELU, or its approximation by tanh; null = as published (gelu_tanh for gpt, gelu
    for bert)"""
    block_size: int = 1024
    """longest context, in tokens"""
    vocab_size: int = 0
    """rows of the token table; 0 = the vocabulary of the data (with the mask token, for bert),
    rounded up to a multiple of 64"""
    real_vocab_size: int = 0
    """ids below this are tokens. Rows from here on are padding and have no probability. 0 = the
    vocabulary of the data"""
    dropout: float = free(0.0)
    """dropout of embeddings, attention and residual branches"""
    label_smoothing: float = 0.0
    """share of each target's probability that training spreads over all tokens (an ablation, which
    holds all logits in memory); evaluation never smooths"""
    bias: bool | None = None
    """biases in the linear layers and norms of blocks (qwen: in Q, K, V); null = as the
    architecture was published. The layers after bert's blocks always have biases"""
    doc_mask: bool = False
    """tokens attend only to their own document, and positions restart where it begins. On CUDA this
    is FlexAttention, which skips blocks that share no document. On a CPU, or if training has
    dropout, it is a dense mask: slower, with block_size^2 numbers for each window"""
    eot_id: int | None = None
    """for doc_mask: the token that begins a document; null = the end-of-text token of the data"""
    tie_weights: bool = True
    """use one table for the prototypes and the input embedding"""
    qk_norm: bool = False
    """qwen: RMSNorm on queries and keys (Qwen3)"""
    rope_theta: float = 1e6
    """qwen: base of the rotary frequencies (1e6 in Qwen2)"""
    head: Literal[*HEADS] = field(  # type: ignore[valid-type]
        default="cross_entropy", metadata={"other_names": OTHER_NAMES}
    )
    """the head: a distance, or a control without a distance, such as cross_entropy"""
    link: Literal["harmonic", "softmax"] = "harmonic"
    """how a distance d becomes a logit: harmonic (-n log d) or softmax (-s d)"""
    exponent: float | Literal[*EXPONENTS] | None = None  # type: ignore[valid-type]
    """n of the harmonic link, the power of the distance; dim is n_embd; null = the distance's
    default"""
    scale: float | None = None
    """s of the softmax link; null = as steep at the start as the exponent would be"""
    learn_exponent: bool = False
    """train the exponent, as log n"""
    learn_scale: bool = False
    """train the scale, as log s"""
    head_p: float | None = head_option("p")
    """minkowski: p; null = 1.5"""
    head_a: float | None = head_option("a")
    """chebyshev_smooth: sharpness a; null = 10"""
    head_t: float | None = head_option("t")
    """hamming_soft, hamming_gumbel, hamming_hard: temperature t; null = 1"""
    head_q: float | None = head_option("q")
    """canberra_weighted: power q; null = 1"""
    head_init_std: float = 0.02
    """standard deviation of the prototypes at the start, and so of an embedding that is tied to
    them (0.02 in GPT-2)"""
    head_impl: Literal["auto", "dense", "chunked", "numba", "triton"] = free("auto")
    """how the loss is computed: dense holds all logits in memory; chunked holds a chunk of rows;
    numba (CPU) and triton (CUDA) are compiled kernels; auto = the fastest that is available"""
    head_skip: float = free(1e-6)
    """numba's kernels skip tokens whose gradients together are less than this share of the
    target's gradient; 0 = skip none. On a GPU nothing is skipped"""
    head_precision: Literal["auto", "float32", "split", "autocast"] = free("auto")
    """precision of the head's matrix products: float32; split (two half-precision parts, nearly as
    exact as float32); autocast (the dtype of the trunk). auto on a GPU = split for distances, and
    autocast for controls; auto elsewhere = float32"""

    @classmethod
    def free_settings(cls) -> set[str]:
        """The names of the `free` settings, with which a run can resume at another value."""
        return {f.name for f in fields(cls) if "free" in f.metadata}

    @property
    def architecture(self) -> Architecture:
        """The entry of ARCHITECTURES that `arch` names."""
        return ARCHITECTURES[self.arch]

    def attention_width(self) -> int:
        """D, the width of an attention head."""
        return self.head_dim or self.n_embd // self.n_head

    def gelu(self) -> str:
        """The `approximate` of PyTorch's GELU."""
        if self.activation is None:
            return self.architecture.gelu
        return "tanh" if self.activation == "gelu_tanh" else "none"

    def mlp_width(self) -> int:
        """Width inside the MLP."""
        if self.intermediate_size:
            return self.intermediate_size
        if self.architecture.gated:
            return 64 * math.ceil(8 * self.n_embd / 3 / 64)
        return 4 * self.n_embd

    def has_bias(self) -> bool:
        """Whether linear layers and norms have biases. In qwen only Q, K and V can have them."""
        return not self.qk_norm if self.bias is None else self.bias

    def norm(self, width: int) -> nn.Module:
        """A new normalisation layer of the architecture."""
        return self.architecture.norm(width, self.has_bias())

    def head_options(self) -> dict[str, float]:
        """The options of the head's distance that are not None, by the distance's names."""
        marked = {
            f.metadata["head_option"]: f.name for f in fields(self) if "head_option" in f.metadata
        }
        options = {option: getattr(self, name) for option, name in marked.items()}
        return {option: value for option, value in options.items() if value is not None}

    def head_arguments(self) -> dict[str, Any]:
        """Keyword arguments of HarmonicHead after (n_embd, vocab_size, name)."""
        return dict(
            exponent=self.exponent,
            link=self.link,
            scale=self.scale,
            learn_exponent=self.learn_exponent,
            learn_scale=self.learn_scale,
            # Distances have no place for a bias.
            bias=self.architecture.head_bias and self.head == "cross_entropy",
            init_std=self.head_init_std,
            impl=self.head_impl,
            skip=self.head_skip,
            precision=self.head_precision,
            **self.head_options(),
        )

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings, one sentence each."""
        if found := self._size_problems():
            return found
        return self._trunk_problems() + self._head_problems()

    def _size_problems(self) -> list[str]:
        found = []
        for key in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, key) < 1:
                found.append(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("n_kv_head", "head_dim", "intermediate_size", "vocab_size", "real_vocab_size"):
            if getattr(self, key) < 0:
                found.append(f"{key}={getattr(self, key)} must not be negative")
        if not self.rope_theta > 0:
            found.append(f"rope_theta={self.rope_theta} must be positive")
        if self.eot_id is not None and self.eot_id < 0:
            found.append(f"eot_id={self.eot_id} is not a token")
        return found

    def _trunk_problems(self) -> list[str]:
        found, arch = [], self.architecture
        if self.n_embd % self.n_head and not self.head_dim:
            found.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        elif arch.rotary and self.attention_width() % 2:
            found.append(f"rotary positions need an even head width, got {self.attention_width()}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            found.append(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        for key in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                found.append(f"{key}={getattr(self, key)} is not in [0, 1)")
        if self.eot_id is not None and not self.doc_mask:
            found.append(f"eot_id={self.eot_id} does nothing without doc_mask=true")
        if self.activation is not None and arch.gated:
            found.append(f"activation={self.activation} is for gpt and bert: qwen has SwiGLU")
        if self.qk_norm and not arch.rotary:
            found.append(f"qk_norm=true is for arch=qwen, not {self.arch}")
        if self.rope_theta != 1e6 and not arch.rotary:
            found.append(f"rope_theta={self.rope_theta} is for arch=qwen, not {self.arch}")
        return found

    def _head_problems(self) -> list[str]:
        try:
            resolve(self.head)
        except ValueError as error:
            return [f"head={self.head}: {error}"]
        found, control = [], HEADS[self.head].is_control
        if not 0 < self.head_init_std < math.inf:
            found.append(f"head_init_std={self.head_init_std} must be positive and finite")
        if control:
            given = {"exponent": self.exponent, "scale": self.scale}
            if self.link != "harmonic":
                given["link"] = self.link
            found += [
                f"{key}={value} does nothing with head={self.head}: a control has no distance"
                for key, value in given.items()
                if value is not None
            ]
        elif self.link == "softmax" and None not in (self.exponent, self.scale):
            found.append(f"exponent={self.exponent} does nothing with link=softmax and a scale")
        arguments, own = self.head_arguments() | {"init_std": 1.0}, HEADS[self.head].options
        for option, value in self.head_options().items():
            if option not in own:
                del arguments[option]
                has = "".join(f", which has head_{name}" for name in own)
                found.append(f"head_{option}={value:g} does nothing with head={self.head}{has}")
        try:
            HarmonicHead(self.n_embd, 1, self.head, **arguments)
        except ValueError as error:
            found.append(f"head={self.head}: {str(error).removeprefix(f'{self.head}: ')}")
        return found


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotates x (B, H, T, D) by its positions. Coordinate i is paired with i + D/2.

    rope: cosines and sines, (B or 1, 1, T, D/2) each.
    """
    cos, sin = (r.to(x.dtype) for r in rope)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class KVCache:
    """Keys and values of the tokens seen so far: buffers (B, key/value heads, size, D), one for
    each layer.

    batch: B. size: how many tokens fit; None = block_size.

    The weights must not change while a cache is in use. It does not notice that its keys and values
    come from older weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        size: int | None = None,
    ):
        heads = config.n_kv_head or config.n_head
        size = size or config.block_size
        shape = batch, heads, size, config.attention_width()
        layers = range(config.n_layer)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.length = 0

    def select(self, rows: torch.Tensor) -> "KVCache":
        """A new cache. Its row r is a copy of row rows[r] of this cache."""
        chosen = copy.copy(self)
        chosen.keys = [keys[rows] for keys in self.keys]
        chosen.values = [values[rows] for values in self.values]
        return chosen

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends k and v of a layer, (B, key/value heads, T, D). Returns all that it has so far.

        The model advances `length` after all layers.
        """
        keys, values = self.keys[layer], self.values[layer]
        begin, count = self.length, k.shape[2]
        # A step of sampling is many small operations. `narrow` is the quickest way to slice.
        keys.narrow(2, begin, count).copy_(k)
        values.narrow(2, begin, count).copy_(v)
        return keys.narrow(2, 0, begin + count), values.narrow(2, 0, begin + count)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int = 64
) -> torch.Tensor:
    """Causal scaled dot-product attention, `rows` queries at a time: (B, H, T, D) each.

    When compiled, it takes a third less time in bfloat16 on a CPU than PyTorch's own kernel. Scores
    are rounded to bfloat16. The backward pass keeps all probabilities, so it is for short contexts.
    """
    parts = []
    for i in range(0, q.shape[2], rows):
        end = min(i + rows, q.shape[2])
        scores = (q[:, :, i:end] @ k[:, :, :end].mT).float() * q.shape[-1] ** -0.5
        later = torch.arange(end, device=q.device) > torch.arange(i, end, device=q.device)[:, None]
        parts.append(scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(parts, 2)


def uses_flex_attention(config: ModelConfig, idx: torch.Tensor, training: bool) -> bool:
    """Whether attention within the documents of `idx` (B, T) uses FlexAttention and a block mask.

    Otherwise it uses a dense mask.
    """
    # On a CPU FlexAttention has no backward pass.
    has_kernel = idx.is_cuda and importlib.util.find_spec("triton") is not None
    # FlexAttention has no dropout.
    drops = training and config.dropout > 0
    # Narrower heads have no kernel. Wider ones may not fit into shared memory.
    fits = 16 <= config.attention_width() <= 256
    # Within one block there is little to skip.
    return has_kernel and not drops and fits and idx.shape[1] >= MASK_BLOCK


def document_block_mask(number: torch.Tensor, causal: bool) -> BlockMask:
    """FlexAttention's mask for tokens that attend within their document only.

    It comes from the first and the last document of each block, so a (T, T) mask never exists.

    Args:
        number: (B, T), the number of each token's document, which never decreases along T.
        causal: a token attends to itself and what is before it only.
    """
    T = number.shape[1]
    # The padding is a document of its own.
    padded = F.pad(number, (0, -T % MASK_BLOCK), value=T + 1)
    # (B, 1, blocks)
    first = padded[:, None, ::MASK_BLOCK]
    last = padded[:, None, MASK_BLOCK - 1 :: MASK_BLOCK]
    single = first == last
    # (B, 1, query blocks, key blocks)
    begins_before_end = first[..., :, None] <= last[..., None, :]
    ends_after_begin = last[..., :, None] >= first[..., None, :]
    some = begins_before_end & ends_after_begin
    every = some & single[..., :, None] & single[..., None, :]
    if causal:
        some, every = some.tril(), every.tril(-1)

    def allowed(
        b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        same = number[b, query] == number[b, key]
        return same & (query >= key) if causal else same

    return BlockMask.from_kv_blocks(
        *listed_blocks(some & ~every),
        *listed_blocks(every),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=allowed,
        seq_lengths=(T, T),
    )


def listed_blocks(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists chosen key blocks, given as booleans (B, 1, query blocks, key blocks).

    Returns: how many each query block has (B, 1, query blocks), and the indices of all key blocks
        with the chosen ones first (B, 1, query blocks, key blocks).
    """
    chosen = chosen.int()
    indices = chosen.argsort(dim=-1, descending=True, stable=True).int()
    return chosen.sum(-1, dtype=torch.int32), indices


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention compiled to one kernel. Without compilation it holds all scores in memory."""
    return torch.compile(flex_attention)


def block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask
) -> torch.Tensor:
    """FlexAttention: q (B, H, T, D), k and v (B, key/value heads, T, D) -> (B, H, T, D).

    Each key/value head is shared by a group of query heads.
    """
    attend = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        attend = compiled_flex_attention()
    # Under autocast a norm leaves q and k in float32, but FlexAttention needs one dtype.
    return attend(
        q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.width, self.dropout = config.attention_width(), config.dropout
        self.causal, bias = config.architecture.causal, config.has_bias()
        rows = (self.n_head + 2 * self.n_kv_head) * self.width
        self.qkv = nn.Linear(config.n_embd, rows, bias=bias)
        out_bias = bias and config.architecture.out_bias
        self.out = nn.Linear(self.n_head * self.width, config.n_embd, bias=out_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.width, eps=1e-6) for _ in range(2))

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        B, T, _ = x.shape
        parts = self.qkv(x).view(B, T, -1, self.width).transpose(1, 2)
        q, k, v = parts.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)  # (B, H, T, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = self.attend(q, k, v, mask)
        out: torch.Tensor = self.out(y.transpose(1, 2).reshape(B, T, -1))
        return out

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None
    ) -> torch.Tensor:
        """Attention: q (B, H, T, D), k and v (B, key/value heads, T or more, D) -> (B, H, T, D)."""
        if isinstance(mask, BlockMask):
            return block_attention(q, k, v, mask)
        T, seen = q.shape[2], k.shape[2]
        causal = self.causal and mask is None
        if causal and 1 < T < seen:  # Several tokens after those in the cache.
            mask = torch.ones(T, seen, dtype=torch.bool, device=q.device).tril(seen - T)
            causal = False
        # With a dynamic T, `causal and T > 1` would be a symbol and not a bool.
        if T == 1:
            causal = False
        dropout, gqa = self.dropout if self.training else 0.0, self.n_kv_head != self.n_head
        on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
        small = causal and on_cpu and T <= 512 and not (dropout or gqa)
        if small and torch.compiler.is_compiling():
            return causal_attention(q, k, v)
        # Grouped heads with a mask have no fast kernel on GPUs.
        if gqa and mask is not None:
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, 1) for t in (k, v))
            gqa = False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=gqa
        )


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, width, self.gated = config.n_embd, config.mlp_width(), config.architecture.gated
        self.gelu = config.gelu()
        if self.gated:
            self.up = nn.Linear(C, 2 * width, bias=False)  # the gate, then the value
            self.down = nn.Linear(width, C, bias=False)
        else:
            self.up = nn.Linear(C, width, bias=config.has_bias())
            self.down = nn.Linear(width, C, bias=config.has_bias())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if self.gated:
            gate, value = x.chunk(2, -1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x, approximate=self.gelu)
        x = self.down(x)
        return x


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_after = config.architecture.norm_after
        self.norm1, self.norm2 = config.norm(config.n_embd), config.norm(config.n_embd)
        self.attention, self.mlp = Attention(config, layer), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        if self.norm_after:
            x = self.norm1(x + self.drop(self.attention(x, rope, mask, cache)))
            x = self.norm2(x + self.drop(self.mlp(x)))
            return x
        x = x + self.drop(self.attention(self.norm1(x), rope, mask, cache))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x) if self.dropout.training else x


class Model(nn.Module):
    """A language model: a trunk (everything up to the hidden states) and a head.

    Weights start as in GPT-2 and BERT: every matrix and embedding N(0, 0.02^2), the prototypes
    N(0, head_init_std^2), biases 0, norms 1. With `scaled_residual`, the layers that add to the
    residual stream have weights divided by sqrt(2 n_layer) (GPT-2, section 2.3).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, arch = config.n_embd, config.architecture
        self.head = HarmonicHead(
            C,
            config.vocab_size,
            config.head,
            real_vocab_size=config.real_vocab_size or None,
            **config.head_arguments(),
        )
        self.tokens = nn.Embedding(config.vocab_size, C)
        self.positions = None if arch.rotary else nn.Embedding(config.block_size, C)
        self.token_types = nn.Embedding(2, C) if arch.token_types else None
        self.embedding_norm = config.norm(C) if arch.norm_after else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.final_norm = None if arch.norm_after else config.norm(C)
        self.transform = None
        if arch.transform:
            self.transform = nn.Sequential(nn.Linear(C, C), nn.GELU(config.gelu()), config.norm(C))
        self._initialise()
        if config.tie_weights:
            self.tokens.weight = self.head.weight

    def _initialise(self) -> None:
        """Initialises all weights except those of the head, which initialises itself."""
        config = self.config
        for name, p in self.named_parameters():
            if name.startswith("head."):
                continue
            if p.dim() >= 2:
                std = 0.02
                if config.architecture.scaled_residual and name.endswith(
                    ("out.weight", "down.weight")
                ):
                    std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block. For each batch size all blocks share one compilation.

        Training and evaluation have few batch sizes, and code for any size is slower.
        options: other options of torch.compile.
        """
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, **options)

    def parameter_count(self) -> int:
        """The number of parameters. Tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, predicted: float = 1.0) -> float:
        """Floating-point operations per token, forward and backward.

        They are 6 for each weight that multiplies, and 12 n_layer H D T for attention (PaLM, arXiv
        2204.02311, appendix B). The head counts as one matrix product for every distance, so that
        the MFU of different heads can be compared.

        predicted: the share of the tokens that the head sees. It is less than 1 if only masked
            tokens are predicted.
        """
        c = self.config
        ends = [m for m in (self.head, self.transform) if m is not None]
        head = sum(q.numel() for m in ends for q in m.parameters())
        tables = [e for e in (self.positions, self.token_types) if e is not None]
        if not c.tie_weights:
            tables.append(self.tokens)
        trunk = self.parameter_count() - head - sum(e.weight.numel() for e in tables)
        attention = 12 * c.n_layer * c.n_head * c.attention_width() * c.block_size
        return 6 * (trunk + predicted * head) + attention

    def documents(self, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | BlockMask]:
        """Finds the documents in ids (B, T).

        Returns: the position of each token in its document (B, T), and the mask of pairs that may
            attend: a BlockMask for FlexAttention, or booleans (B, 1, T, T).
        Raises: ValueError if eot_id is None.
        """
        T, causal = idx.shape[1], self.config.architecture.causal
        if self.config.eot_id is None:
            raise ValueError("doc_mask needs eot_id")
        begins = idx == self.config.eot_id
        number, here = begins.cumsum(1), torch.arange(T, device=idx.device)
        positions = here - (here * begins).cummax(1).values
        if uses_flex_attention(self.config, idx, self.training):
            return positions, document_block_mask(number, causal)
        mask = number[:, :, None] == number[:, None, :]
        if causal:
            mask = mask & (here[:, None] >= here)
        return positions, mask[:, None]

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (T,) or (B, T) -> cosines and sines for `rotate`, (1 or B, 1, T, D/2) each."""
        D = self.config.attention_width()
        half = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32)
        frequency = self.config.rope_theta ** (-half / D)
        angle = positions.view(-1, 1, positions.shape[-1], 1).float() * frequency
        return angle.cos(), angle.sin()

    def trunk(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        token_types: torch.Tensor | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C).

        Args:
            positions: (T,) or (B, T). None = from 0, or those after the cache. With doc_mask and
                without a cache, None = from the start of each document, and `mask` is made too.
            mask: which pairs of tokens may attend; None = all, or in a causal model each token to
                itself and those before it.
            cache: keys and values of earlier tokens. This call appends its own.
            token_types: (B, T) of 0 and 1, for bert; None = all 0.
            recompute: do not keep the activations of blocks, and compute them again in the backward
                pass.
        """
        T = idx.shape[1]
        if self.config.doc_mask and positions is None and cache is None:
            positions, mask = self.documents(idx)
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + T, device=idx.device)
        x: torch.Tensor = self.tokens(idx)
        rope: Rope | None = None
        if self.positions is not None:
            x = x + self.positions(positions)
        else:
            rope = self.rope(positions)
        if self.token_types is not None:
            x = x + self.token_types(torch.zeros_like(idx) if token_types is None else token_types)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += T
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x

    def hidden(self, idx: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The states that the head sees: ids (B, T) -> (B, T, C). arguments: see `trunk`."""
        x = self.trunk(idx, **arguments)
        if self.transform is not None:
            x = self.transform(x)
        return x

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: str = "mean",
        with_distance: bool = False,
        recompute: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """Computes logits, or a loss.

        The loss never holds all logits, except with label smoothing or head_impl="dense".

        Args:
            idx: token ids (B, T).
            targets: (B, T), IGNORE_INDEX where nothing is predicted. None = compute logits.
            reduction: "mean", "sum" or "none" of the losses.
            with_distance: also return d(h, w_target) of the N targets, without a gradient.
            recompute: see `trunk`.
        Returns: without targets (logits (B, T, real_vocab_size), None), and with targets
            (None, loss in nats). With `with_distance` a third value follows: (N,), or None if the
            head has no distance.
        """
        if targets is None:
            return self.head(self.hidden(idx)), None
        x = self.trunk(idx, recompute=recompute)
        # The transform and the head see the masked positions alone, 15 % of the tokens.
        if not self.config.architecture.causal:
            kept = (targets != IGNORE_INDEX).flatten().nonzero()[:, 0]  # Waits for a GPU once.
            x, targets = x.flatten(0, -2)[kept], targets.flatten()[kept]
        if self.transform is not None:
            x = self.transform(x)
        loss = self.loss(x, targets, reduction)
        if with_distance:
            return None, loss, self.head.target_distance(x, targets)
        return None, loss

    def loss(self, x: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        """The loss in nats of states x (..., C). label_smoothing applies in training mode only."""
        smoothing = self.config.label_smoothing if self.training else 0.0
        if not smoothing:
            return self.head.loss(x, targets, reduction=reduction)
        logits, targets = self.head(x).flatten(0, -2), targets.flatten()
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / (targets != IGNORE_INDEX).sum().clamp_min(1)  # 0 without targets

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        seed: int = 0,
        cache: bool = True,
        explain: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **sampling: Any,
    ) -> Iterator[list[int]]:
        """Continues prompts. Each step yields the next token of every prompt as a list of ints.

        Row r draws from its own generator with the seed `seed + r`, so the text of a row does not
        depend on other rows. When the context of a row reaches block_size, its older half is
        dropped and positions start again, with the cache and without it. A prompt that several rows
        share is computed once.

        The weights must not change between steps, because cached keys and values would be stale.
        A change in place that PyTorch counts raises an error. It does not count changes by fused
        optimisers or through `.data`.

        Args:
            prompts: lists of ids, each with at least one. Shorter ones are padded on the left and
                masked.
            cache: keep keys and values, so that a step computes one token. False computes the whole
                context in each step: the text is the same, but slower.
            explain: called in each step with (hidden states (B, C), tokens (B,)).
            head: computes the logits instead of the model's head: (B, C) -> (B, V).
            sampling: temperature, top_k, top_p, min_p: see Sampler.
        Raises: ValueError for a masked language model, an empty prompt or sampling that is not
            valid. RuntimeError if logits are not finite or the weights have changed.
        """
        if not self.config.architecture.causal:
            raise ValueError(f"{self.config.arch} is a masked language model: it does not generate")
        if not prompts or not all(prompts):
            raise ValueError("a prompt is empty: each needs at least one token")
        device, sampler = self.tokens.weight.device, Sampler(**sampling)
        score = self.head.prepared() if head is None else head
        generators = [torch.Generator(device).manual_seed(seed + r) for r in range(len(prompts))]
        texts = Texts(self.config, prompts, max_new_tokens, device)
        store: KVCache | None = None
        weights = [p for p in self.parameters() if not p.is_inference()]
        changes = sum(p._version for p in weights)
        for step in range(max_new_tokens):
            if sum(p._version for p in weights) != changes:
                raise RuntimeError(
                    "the weights have changed since this text began: call generate again"
                )
            moved = texts.begin_contexts()
            if store is not None and not moved:
                h = self.trunk(*texts.last(1), cache=store)[:, -1]
            else:
                h, store = self._read(texts, step == 0, cache)
            tokens = sampler.pick(score(h), generators)
            if explain is not None:
                explain(h, tokens)
            yield texts.add(tokens)

    def _read(
        self, texts: "Texts", first: bool, cache: bool
    ) -> tuple[torch.Tensor, KVCache | None]:
        """Computes whole contexts. Returns the last state of each row (B, C), and a new cache.

        first: whether this is the first step. cache: False returns None instead of a cache.
        """
        # In the first step, rows with the same prompt have the same context.
        rows, of_row = texts.different() if first else (None, None)
        context, positions, mask = texts.whole(rows)
        store = None
        if cache:
            batch, device = len(context), context.device
            store = KVCache(self.config, batch, device, self._compute_dtype(), texts.longest())
        h = self.trunk(context, positions, mask, store)[:, -1]
        if of_row is not None:
            h = h[of_row]
            store = None if store is None else store.select(of_row)
        return h, store

    def _compute_dtype(self) -> torch.dtype:
        device = self.tokens.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.tokens.weight.dtype


class Texts:
    """A batch of growing texts, and the part of each that fits into the model's context.

    ids: (B, room). Shorter prompts are padded on the left.
    pad: the number of padding tokens of each row.
    length: the number of columns that are written so far.
    starts: the column where the context of each row begins.
    new: the number of tokens that may be added.
    """

    def __init__(
        self, config: ModelConfig, prompts: list[list[int]], new: int, device: torch.device
    ):
        self.config, self.prompts, self.length = config, prompts, max(map(len, prompts))
        self.room = self.length + new
        self.pad = [self.length - len(prompt) for prompt in prompts]
        padded = [
            [0] * pad + list(prompt) + [0] * new
            for pad, prompt in zip(self.pad, prompts, strict=True)
        ]
        self.ids = torch.tensor(padded, device=device)
        self.columns = torch.arange(self.room, device=device)
        # With doc_mask: the column where the last document of each row begins.
        self.document = [0] * len(prompts)
        if config.doc_mask:
            for row, (pad, prompt) in enumerate(zip(self.pad, prompts, strict=True)):
                begins = [i for i, token in enumerate(prompt) if token == config.eot_id]
                self.document[row] = pad + begins[-1] if begins else 0
        self.starts: list[int] = []

    def add(self, tokens: torch.Tensor) -> list[int]:
        """Appends the next token of each row, (B,). Returns them as ints."""
        self.ids[:, self.length] = tokens
        listed: list[int] = tokens.tolist()
        if self.config.doc_mask:
            for row, token in enumerate(listed):
                if token == self.config.eot_id:
                    self.document[row] = self.length
        self.length += 1
        return listed

    def begin_contexts(self) -> bool:
        """Finds where the contexts begin. Returns whether one has moved since the last call."""
        size, before = self.config.block_size, self.starts
        half = max(1, size // 2)
        self.starts = []
        for pad, document in zip(self.pad, self.document, strict=True):
            # A context contains nothing before its document.
            begin = max(pad, document)
            too_many = max(0, self.length - begin - size)
            self.starts.append(begin + math.ceil(too_many / half) * half)
        if self.starts == before:
            return False
        self.first = min(self.starts)
        self.alike = self.first == max(self.starts)
        self.begin = torch.tensor(self.starts, device=self.ids.device)[:, None]
        # Which columns a token may see: those of its context. (B, 1, 1, columns)
        self.in_text = (self.columns >= self.begin)[:, None, None]
        return True

    def longest(self) -> int:
        """The most tokens that a context can reach before the texts are complete."""
        return min(self.config.block_size, self.room - self.first)

    def different(self) -> tuple[list[int] | None, torch.Tensor | None]:
        """Finds rows with the same prompt.

        Returns: one row for each different prompt, and the index into these for each row (B,).
            (None, None) if all prompts are different.
        """
        found: dict[tuple[int, ...], int] = {}
        numbers = [found.setdefault(tuple(prompt), len(found)) for prompt in self.prompts]
        if len(found) == len(numbers):
            return None, None
        rows = [numbers.index(number) for number in range(len(found))]
        return rows, torch.tensor(numbers, device=self.ids.device)

    def last(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The last `count` tokens of each row.

        Returns: their ids (B, count), their positions (count,) or (B, count), and the mask of keys
            that they may see (B, 1, count, keys). The mask is None if all contexts begin in the
            same column: then each token sees itself and all before it.
        """
        end = self.length
        ids, here = self.ids[:, end - count : end], self.columns[end - count : end]
        if self.alike:
            return ids, here - self.first, None
        seen = self.in_text[..., self.first : end]
        if count > 1:
            keys = self.columns[self.first : end]
            # A padding token sees itself, because a softmax over nothing is NaN.
            seen = (seen | (keys == here[:, None])) & (keys <= here[:, None])
        return ids, (here - self.begin).clamp_min(0), seen

    def whole(
        self, rows: list[int] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The whole contexts of some rows (None = all rows), in the form that `last` returns."""
        ids, positions, mask = self.last(self.length - self.first)
        if rows is None:
            return ids, positions, mask
        if mask is None:
            return ids[rows], positions, None
        return ids[rows], positions[rows], mask[rows]


class Diverged(RuntimeError):
    """A model's logits are not finite."""


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from the logits.

    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k: keep the k likeliest tokens.
    top_p: keep the smallest set of the likeliest tokens that has probability p.
    min_p: keep tokens with at least this share of the likeliest one's probability.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a setting that no distribution has."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for all tokens")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}={share} must be in (0, 1], or None for all tokens")

    def pick(self, logits: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """A token for each row of logits: (B, V) -> (B,)."""
        largest = logits.amax(-1, keepdim=True)
        if not math.isfinite(largest.float().sum().item()):
            raise Diverged("logits are not finite: the model's weights have diverged")
        if self.temperature < torch.finfo(torch.float32).tiny:  # float32 cannot divide by it.
            return logits.argmax(-1)
        p = ((logits - largest) / self.temperature).softmax(-1, dtype=torch.float32)
        if self.top_k is not None and self.top_k < p.shape[-1]:
            p = p * largest_k(p, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            ordered, tokens = p.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            outside = before >= self.top_p * ordered.sum(-1, keepdim=True)
            outside[..., 0] = False  # With a tiny top_p the product is 0.
            p = torch.zeros_like(p).scatter_(-1, tokens, ordered.masked_fill(outside, 0.0))
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        # As in torch.multinomial, each token has an exponential clock, and the first to ring is
        # drawn. Each clock depends on its own token only, so rounding errors of other tokens do not
        # change the choice.
        return p.div_(exponential_clocks(p, generators)).argmax(-1)


def exponential_clocks(p: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Random numbers of the exponential distribution, (B, V) like p. Row r uses generators[r]."""
    if p.device.type != "cpu":
        clocks = torch.empty_like(p)
        for row, generator in zip(clocks, generators, strict=True):
            row.exponential_(1, generator=generator)
        return clocks
    # These are the numbers of `exponential_`, which is slow on a CPU: it takes one logarithm at a
    # time.
    u = torch.empty_like(p, dtype=torch.float64)
    for row, generator in zip(u, generators, strict=True):
        row.uniform_(generator=generator)
    return u.neg_().log1p_().neg_().to(p.dtype)


def largest_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """Whether each number is one of the k largest of its row: (B, V) -> (B, V), bool. Exactly k
    are, even if numbers are equal."""
    kept = x >= kth_largest(x, k)
    if (kept.sum(-1) > k).any():
        kept = torch.zeros_like(kept).scatter_(-1, x.topk(k, -1).indices, True)
    return kept


def kth_largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest number of each row: (B, V) -> (B, 1)."""
    if x.device.type != "cpu":
        return x.topk(k, -1).values[:, -1:]
    # NumPy selects with vector instructions, and takes an eighth of the time of topk.
    place = x.shape[-1] - k
    return torch.from_numpy(np.partition(x.detach().numpy(), place, -1)[:, place : place + 1])
