"""The decoder in one file: GPT, BERT and Qwen blocks under a swappable unembedding
(harmonic.HarmonicHead).

    gpt    GPT-2 (Radford et al. 2019): pre-LayerNorm, learned positions, tanh GELU, causal.
    bert   BERT (Devlin et al. 2018): post-LayerNorm, learned positions, token types, erf GELU,
           bidirectional; a transform before the head, which is computed at masked positions only.
    qwen   Qwen2 (arXiv 2407.10671): RMSNorm, rotary positions, grouped key/value heads, SwiGLU,
           bias on Q, K, V only; with qk_norm the
           Qwen3 style (RMSNorm on Q and K per head, no bias).

Shapes: B batch, T time, C = n_embd, H heads, D = head_dim (C / H), V = vocab_size rows, of which
    the first real_vocab_size are tokens.
"""

import functools
import importlib.util
import inspect
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from harmonic import EXPONENTS, HEADS, IGNORE_INDEX, HarmonicHead

MASK_BLOCK = (
    128  # Tokens along a side of a block in FlexAttention's masks. Its kernels' tiles divide 128.
)


@dataclass
class ModelConfig:
    """The model"""

    arch: Literal["gpt", "bert", "qwen"] = "gpt"
    """blocks: GPT-2, BERT or Qwen2 style"""
    n_layer: int = 12
    """number of blocks"""
    n_head: int = 12
    """attention heads"""
    n_kv_head: int = 0
    """key/value heads shared by groups of n_head; 0 = n_head"""
    n_embd: int = 768
    """width"""
    head_dim: int = 0
    """width of an attention head; 0 = n_embd / n_head (Qwen3 models have their own)"""
    intermediate_size: int = 0
    """width inside the MLP; 0 = 4 n_embd (gpt, bert) or 8/3 n_embd rounded up to a multiple of 64
    (qwen)"""
    activation: Literal["gelu", "gelu_tanh"] | None = None
    """gpt, bert: GELU, or its approximation by tanh; null = as published (gelu_tanh for gpt, gelu
    for bert)"""
    block_size: int = 1024
    """longest context, in tokens"""
    vocab_size: int = 0
    """rows of the token table; 0 = the data's vocabulary (and its mask token) rounded up to a
    multiple of 64"""
    real_vocab_size: int = 0
    """ids below this are tokens, rows above are padding without probability; 0 = from the data"""
    dropout: float = 0.0
    """dropout of embeddings, attention and residual branches"""
    label_smoothing: float = 0.0
    """share of the target spread over all tokens while training (an ablation: it materialises the
    logits); evaluation never does"""
    bias: bool | None = None
    """biases in linear layers and LayerNorms (qwen: in Q, K, V); null = as the architecture was
    published"""
    doc_mask: bool = False
    """attend within a document only, and count positions from its beginning: each is seen as if it
    stood alone. CUDA: FlexAttention, which
    skips blocks that share no document; a CPU, or dropout in training: a dense mask, slower and T x
    T numbers a window"""
    eot_id: int | None = None
    """doc_mask: the token that begins a document; null = the data's"""
    tie_weights: bool = True
    """prototypes are the input embedding"""
    qk_norm: bool = False
    """qwen: RMSNorm on queries and keys (Qwen3)"""
    rope_theta: float = 1e6
    """qwen: base of the rotary frequencies (1e6 in Qwen2)"""
    head: Literal[*HEADS] = "cross_entropy"
    """distance of the head, or a control"""
    link: Literal["harmonic", "softmax"] = "harmonic"
    """logits from distances: harmonic (-n log d) or softmax (-s d), its control"""
    exponent: float | Literal[*EXPONENTS] | None = None
    """n, the power of the distance; dim is n_embd; null = the distance's default"""
    scale: float | None = None
    """s of the softmax link; null = matched to the exponent at initialisation"""
    learn_exponent: bool = False
    """train log n"""
    learn_scale: bool = False
    """train log s"""
    head_p: float | None = None
    """minkowski: p (1.5)"""
    head_a: float | None = None
    """chebyshev_smooth: sharpness a (10)"""
    head_t: float | None = None
    """hamming_*: temperature t (1)"""
    head_q: float | None = None
    """canberra_weighted: power q (1)"""
    head_init_std: float = 0.02
    """standard deviation of the prototypes at the start; tied, of the embedding (GPT-2's 0.02)"""
    head_impl: Literal["auto", "dense", "chunked", "numba", "triton"] = "auto"
    """how the loss is computed: dense materialises all logits, chunked does not, numba (CPU) and
    triton are compiled; auto = the fastest"""
    head_skip: float = 1e-6
    """elementwise distances leave out gradients that add up to less than this share of the
    target's; 0 = none"""
    head_precision: Literal["auto", "float32", "split", "autocast"] = "auto"
    """matrix products of the head: float32, split (two half-precision parts, nearly exact),
    autocast (the trunk's dtype); auto = on a GPU
    split for distances and autocast for cross_entropy and cosine_linear, else float32"""

    def attention_width(self) -> int:
        """D, the width of an attention head."""
        return self.head_dim or self.n_embd // self.n_head

    def gelu(self) -> str:
        """GELU's `approximate` in PyTorch."""
        tanh = self.arch == "gpt" if self.activation is None else self.activation == "gelu_tanh"
        return "tanh" if tanh else "none"

    def mlp_width(self) -> int:
        """Width inside the MLP."""
        return self.intermediate_size or (
            64 * math.ceil(8 * self.n_embd / 3 / 64) if self.arch == "qwen" else 4 * self.n_embd
        )

    def head_options(self) -> dict:
        """The options of the head's distance that are set."""
        return {
            k: getattr(self, f"head_{k}") for k in "patq" if getattr(self, f"head_{k}") is not None
        }

    def head_arguments(self) -> dict:
        """Keyword arguments of HarmonicHead after (n_embd, vocab_size, name)."""
        return dict(
            exponent=self.exponent,
            link=self.link,
            scale=self.scale,
            learn_exponent=self.learn_exponent,
            learn_scale=self.learn_scale,
            bias=self.arch == "bert"
            and self.head
            == "cross_entropy",  # BERT's decoder has one; distances have no place for it
            init_std=self.head_init_std,
            impl=self.head_impl,
            skip=self.head_skip,
            precision=self.head_precision,
            **self.head_options(),
        )

    def problems(self) -> list[str]:
        found = []
        for key in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, key) < 1:
                found.append(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("n_kv_head", "head_dim", "intermediate_size", "vocab_size", "real_vocab_size"):
            if getattr(self, key) < 0:
                found.append(f"{key}={getattr(self, key)} must not be negative")
        if found:
            return found
        if self.n_embd % self.n_head and not self.head_dim:
            found.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        elif self.arch == "qwen" and self.attention_width() % 2:
            found.append(f"rotary positions need an even head width, got {self.attention_width()}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            found.append(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        for key in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                found.append(f"{key}={getattr(self, key)} is not in [0, 1)")
        if self.eot_id is not None and not self.doc_mask:
            found.append(f"eot_id={self.eot_id} does nothing without doc_mask=true")
        if not self.head_init_std > 0:
            found.append(f"head_init_std={self.head_init_std} must be positive")
        if self.activation is not None and self.arch == "qwen":
            found.append(f"activation={self.activation} is for gpt and bert: qwen has SwiGLU")
        if self.qk_norm and self.arch != "qwen":
            found.append(f"qk_norm=true is for arch=qwen, not {self.arch}")
        if self.exponent is not None and (
            HEADS[self.head].is_control or (self.link == "softmax" and self.scale is not None)
        ):
            found.append(
                f"exponent={self.exponent} does nothing with head={self.head}, link={self.link}"
                + (", scale set" if self.scale is not None else "")
            )
        if self.link != "harmonic" and HEADS[self.head].is_control:
            found.append(
                f"link={self.link} does nothing with head={self.head}: a control has no distance"
            )
        if self.rope_theta != 1e6 and self.arch != "qwen":
            found.append(f"rope_theta={self.rope_theta} is for arch=qwen, not {self.arch}")
        if self.scale is not None and (self.link == "harmonic" or HEADS[self.head].is_control):
            found.append(
                f"scale={self.scale} does nothing with head={self.head}, link={self.link}: scale"
                " belongs to a distance with link=softmax"
            )
        try:
            HarmonicHead(self.n_embd, 1, self.head, **self.head_arguments())
        except ValueError as error:
            found.append(f"head={self.head}: {error}")
        return found


def norm(config: ModelConfig, width: int) -> nn.Module:
    if config.arch == "qwen":
        return nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, eps=1e-12 if config.arch == "bert" else 1e-5, bias=has_bias(config))


def has_bias(config: ModelConfig) -> bool:
    return not config.qk_norm if config.bias is None else config.bias


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions, halves layout: x (B, H, T, D), rope = cos and sin (B or 1, 1, T, D/2)."""
    cos, sin = (r.to(x.dtype) for r in rope)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class KVCache:
    """Keys and values of the tokens seen so far, one buffer for all layers."""

    def __init__(self, config: ModelConfig, batch: int, device, dtype):
        shape = (
            config.n_layer,
            batch,
            config.n_kv_head or config.n_head,
            config.block_size,
            config.attention_width(),
        )
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Stores k, v (B, H, T, D) behind what is there -> all keys and values so far. The model
        advances `length` after a pass."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def causal_attention(q, k, v, rows: int = 64):
    """Scaled dot-product attention written out for blocks of queries, (B, H, T, D) each. Compiled,
    it spares a CPU a third of the time of
    PyTorch's own kernel in bfloat16. Scores are rounded to bfloat16, as products are; probabilities
    are kept for the backward pass, so it is for short contexts."""
    parts = []
    for i in range(0, q.shape[2], rows):
        end = min(i + rows, q.shape[2])
        scores = (q[:, :, i:end] @ k[:, :, :end].mT).float() * q.shape[-1] ** -0.5
        later = torch.arange(end, device=q.device) > torch.arange(i, end, device=q.device)[:, None]
        parts.append(scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(parts, 2)


def uses_flex_attention(config: ModelConfig, idx: torch.Tensor, training: bool) -> bool:
    """Whether attention within the documents of `idx` (B, T) is FlexAttention under a block mask.
    Otherwise the mask is dense."""
    has_kernel = (
        idx.is_cuda and importlib.util.find_spec("triton") is not None
    )  # On a CPU FlexAttention has no backward pass.
    drops = training and config.dropout > 0  # FlexAttention has no dropout.
    fits = (
        16 <= config.attention_width() <= 256
    )  # Narrower heads have no kernel. Wider ones may not fit into shared memory.
    return (
        has_kernel and not drops and fits and idx.shape[1] >= MASK_BLOCK
    )  # Within one block there is little to skip.


def document_block_mask(number: torch.Tensor, causal: bool) -> BlockMask:
    """FlexAttention's mask for tokens that attend within their document only.

    It comes from the first and the last document of each block, so a (T, T) mask never exists.

    Args:
        number: (B, T), the number of each token's document, which never decreases along T.
        causal: a token attends to itself and what is before it only.
    """
    T = number.shape[1]
    padded = F.pad(
        number, (0, -T % MASK_BLOCK), value=T + 1
    )  # The padding is a document of its own.
    first, last = (
        padded[:, None, ::MASK_BLOCK],
        padded[:, None, MASK_BLOCK - 1 :: MASK_BLOCK],
    )  # (B, 1, blocks)
    single = first == last
    some = (first[..., :, None] <= last[..., None, :]) & (
        last[..., :, None] >= first[..., None, :]
    )  # (B, 1, query blocks, key blocks)
    every = some & single[..., :, None] & single[..., None, :]
    if causal:
        some, every = some.tril(), every.tril(-1)

    def allowed(b, h, query, key):
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
    """Chosen key blocks (B, 1, query blocks, key blocks) -> how many each query block has, and all
    indices, the chosen first."""
    chosen = chosen.int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(
        dim=-1, descending=True, stable=True
    ).int()


@functools.cache
def compiled_flex_attention():
    """FlexAttention as one kernel. Outside of a compiled block it would compute all scores
    first."""
    return torch.compile(flex_attention)


def block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask
) -> torch.Tensor:
    """FlexAttention of q (B, H, T, D) to k, v (B, key/value heads, T, D), which groups of q's heads
    share."""
    attend = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        attend = compiled_flex_attention()
    # Under autocast a norm leaves q and k in float32. FlexAttention wants one dtype.
    return attend(
        q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = (
            layer,
            config.n_head,
            config.n_kv_head or config.n_head,
        )
        self.width = config.attention_width()
        self.causal, self.dropout = config.arch != "bert", config.dropout
        self.qkv = nn.Linear(
            config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.width, bias=has_bias(config)
        )
        self.out = nn.Linear(
            self.n_head * self.width, config.n_embd, bias=config.arch != "qwen" and has_bias(config)
        )
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.width, eps=1e-6) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x, rope=None, mask=None, cache=None):
        B, T, _ = x.shape
        parts = self.qkv(x).view(B, T, -1, self.width).transpose(1, 2)
        q, k, v = parts.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)  # (B, H, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        causal = self.causal and mask is None
        if (
            T == 1
        ):  # not in one expression: where the compiler holds T open, that would be no plain bool
            causal = False
        dropout, gqa = self.dropout if self.training else 0.0, self.n_kv_head != self.n_head
        if isinstance(mask, BlockMask):
            y = block_attention(q, k, v, mask)
        elif (
            causal
            and x.device.type == "cpu"
            and q.dtype == torch.bfloat16
            and T <= 512
            and not (dropout or gqa)
            and torch.compiler.is_compiling()
        ):
            y = causal_attention(q, k, v)
        else:
            if gqa and mask is not None:  # grouped heads with a mask have no fast kernel on GPUs
                k, v, gqa = (
                    *(t.repeat_interleave(self.n_head // self.n_kv_head, 1) for t in (k, v)),
                    False,
                )
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=gqa
            )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, width, bias = config.n_embd, config.mlp_width(), has_bias(config)
        self.arch, self.gelu = config.arch, config.gelu()
        if self.arch == "qwen":
            self.up, self.down = (
                nn.Linear(C, 2 * width, bias=False),
                nn.Linear(width, C, bias=False),
            )  # up holds the gate and the value
        else:
            self.up, self.down = nn.Linear(C, width, bias=bias), nn.Linear(width, C, bias=bias)

    def forward(self, x):
        x = self.up(x)
        if self.arch == "qwen":
            gate, value = x.chunk(2, -1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(x, approximate=self.gelu))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.post_norm = config.arch == "bert"
        self.norm1, self.norm2 = norm(config, config.n_embd), norm(config, config.n_embd)
        self.attention, self.mlp = Attention(config, layer), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, mask=None, cache=None):
        if self.post_norm:
            x = self.norm1(x + self.dropout(self.attention(x, rope, mask, cache)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.norm1(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Model(nn.Module):
    """A trunk and a head.

    Initialisation: every weight matrix and embedding N(0, 0.02^2) as in GPT-2 and BERT, the
        prototypes N(0, head_init_std^2), biases 0,
    norms 1; for gpt the projections back into the residual stream are divided by sqrt(2 n_layer)
    (GPT-2, section 2.3).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.head = HarmonicHead(
            C,
            config.vocab_size,
            config.head,
            real_vocab_size=config.real_vocab_size or None,
            **config.head_arguments(),
        )
        self.tokens = nn.Embedding(config.vocab_size, C)
        self.positions = None if config.arch == "qwen" else nn.Embedding(config.block_size, C)
        self.token_types = nn.Embedding(2, C) if config.arch == "bert" else None
        self.embedding_norm = norm(config, C) if config.arch == "bert" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.final_norm = None if config.arch == "bert" else norm(config, C)
        self.transform = (
            nn.Sequential(nn.Linear(C, C), nn.GELU(config.gelu()), norm(config, C))
            if config.arch == "bert"
            else None
        )
        for name, p in self.named_parameters():
            if name.startswith("head."):
                continue
            if p.dim() >= 2:
                residual = config.arch == "gpt" and name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if config.tie_weights:
            self.tokens.weight = self.head.weight
        self.target_distance = None  # (N,) distances of the last loss's targets, for the log
        self.recompute = False  # activation checkpointing: train.py's --activation_checkpointing

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(
        self, weight_decay: float, prototype_decay: float | None = None
    ) -> list[dict]:
        """AdamW's groups: matrices decay; biases, norms, the exponent and Mahalanobis' parameters
        do not (decay would shrink the distance itself); the prototypes decay by `prototype_decay`,
        None = like matrices."""
        prototypes = [self.head.weight]
        others = [(n, p) for n, p in self.named_parameters() if p is not self.head.weight]
        decay = [p for n, p in others if p.dim() >= 2 and not n.startswith("head.")]
        rest = [p for n, p in others if p.dim() < 2 or n.startswith("head.")]
        return [
            {"params": decay, "weight_decay": weight_decay},
            {
                "params": prototypes,
                "weight_decay": weight_decay if prototype_decay is None else prototype_decay,
            },
            {"params": rest, "weight_decay": 0.0},
        ]

    def flops_per_token(self, predicted: float = 1.0) -> float:
        """Floating-point operations per token of forward + backward: 6 per weight that multiplies,
        12 n_layer H D T for attention (PaLM, arXiv 2204.02311, appendix B). The head counts as a
        matmul whatever its distance, so that MFU compares like with like.

        Args:
            predicted: share of the tokens that the head sees; bert's are the masked ones.
        """
        c, head = (
            self.config,
            sum(
                q.numel()
                for m in (self.head, self.transform)
                if m is not None
                for q in m.parameters()
            ),
        )
        tables = [
            e.weight
            for e in (self.positions, self.token_types, None if c.tie_weights else self.tokens)
            if e is not None
        ]
        trunk = self.parameter_count() - head - sum(q.numel() for q in tables)
        return (
            6 * (trunk + predicted * head)
            + 12 * c.n_layer * c.n_head * c.attention_width() * c.block_size
        )

    def documents(self, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | BlockMask]:
        """Ids (B, T) -> the position of each in its document (B, T), and which pairs may attend:
        FlexAttention's mask or (B, 1, T, T)."""
        T, causal = idx.shape[1], self.config.arch != "bert"
        begins = idx == self.config.eot_id
        number, here = begins.cumsum(1), torch.arange(T, device=idx.device)
        positions = here - (here * begins).cummax(1).values
        if uses_flex_attention(self.config, idx, self.training):
            return positions, document_block_mask(number, causal)
        mask = number[:, :, None] == number[:, None, :]
        if causal:
            mask = mask & (here[:, None] >= here)
        return positions, mask[:, None]

    def trunk(self, idx, positions=None, mask=None, cache=None, token_types=None):
        """Token ids (B, T) -> final hidden states (B, T, C)."""
        c, T = self.config, idx.shape[1]
        if c.doc_mask and positions is None and cache is None:
            positions, mask = self.documents(idx)
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + T, device=idx.device)
        x, rope = self.tokens(idx), None
        if self.positions is not None:
            x = x + self.positions(positions)
        else:
            D = c.attention_width()
            frequency = c.rope_theta ** (
                -torch.arange(0, D, 2, device=idx.device, dtype=torch.float32) / D
            )
            angle = (
                positions.view(-1, 1, T, 1)
                if positions.dim() > 1
                else positions[None, None, :, None]
            ).float() * frequency
            rope = angle.cos(), angle.sin()
        if self.token_types is not None:
            x = x + self.token_types(torch.zeros_like(idx) if token_types is None else token_types)
            x = self.embedding_norm(x)
        x = self.dropout(x)
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += T
        return x if self.final_norm is None else self.final_norm(x)

    def hidden(self, idx, **arguments):
        """What the head sees: (B, T) -> (B, T, C)."""
        x = self.trunk(idx, **arguments)
        return x if self.transform is None else self.transform(x)

    def forward(self, idx, targets=None, reduction="mean"):
        """Ids (B, T) -> (logits of all tokens (B, T, real_vocab_size), None).

        With targets (B, T), which are IGNORE_INDEX where nothing is predicted: -> (None, loss in
        nats), and the logits never exist.
        """
        if targets is None:
            return self.head(self.hidden(idx)), None
        x = self.trunk(idx)
        if self.config.arch == "bert":  # masked positions only: 15 % of the head's work
            kept = targets != IGNORE_INDEX
            x, targets = self.transform(x[kept]), targets[kept]
        if self.training:
            self.target_distance = self.head.target_distance(x, targets)
            if smoothing := self.config.label_smoothing:
                logits = self.head(x).flatten(0, -2)
                return None, F.cross_entropy(
                    logits, targets.flatten(), reduction=reduction, label_smoothing=smoothing
                )
        return None, self.head.loss(x, targets, reduction=reduction)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        cache: bool = True,
        explain=None,
    ):
        """Yields the next token of every prompt, a list of ints a step.

        Row r draws from its own generator seeded `seed + r`, so a row's text does not depend on its
        neighbours. When a row's context reaches block_size, its older half is dropped and positions
        start again, with the cache and without it.

        Args:
            prompts: lists of ids of any lengths >= 1; shorter ones are padded on the left and
                masked.
            temperature: 0 takes the likeliest token. top_k, top_p: keep the k likeliest / the
                smallest set of probability p.
            cache: keep keys and values (one token a step) or recompute the context each step: same
                text, slower.
            explain: called with (hidden states (B, C), tokens (B,)) a step.
        """
        if self.config.arch == "bert":
            raise ValueError("bert fills masks; it does not generate")
        device, size = self.tokens.weight.device, self.config.block_size
        longest = max(map(len, prompts))
        pad = torch.tensor([longest - len(p) for p in prompts])
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        generators = [torch.Generator(device).manual_seed(seed + r) for r in range(len(prompts))]
        store, starts = None, None
        half = max(1, size // 2)
        for _ in range(max_new_tokens):
            L = ids.shape[1]
            beyond = (L - pad - size).clamp_min(0)  # how many tokens no longer fit
            now = pad + (beyond + half - 1) // half * half
            if self.config.doc_mask:  # a context begins with the document
                last = (torch.arange(L) * (ids == self.config.eot_id).cpu()).amax(1)
                now = torch.maximum(now, last)
            if cache and store is not None and torch.equal(now, starts):
                context = ids[:, -1:]
            else:
                starts, first = now, int(now.min())
                context = ids[:, first:]
                store = (
                    KVCache(self.config, len(prompts), device, self._compute_dtype())
                    if cache
                    else None
                )
            padded = bool((starts != first).any())
            T = context.shape[1]
            if padded:
                here = torch.arange(L - T, L, device=device)
                keys = torch.arange(first, L, device=device)
                begin = starts.to(device)[:, None]
                positions = (here - begin).clamp_min(0)
                seen = (keys <= here[:, None]) & (
                    (keys >= begin)[:, None] | (keys == here[:, None])
                )  # a pad sees itself: no empty softmax
                h = self.trunk(context, positions=positions, mask=seen[:, None], cache=store)[:, -1]
            # Nothing begins behind the first token, so positions simply count up, and no mask of
            # documents is needed.
            else:
                h = self.trunk(
                    context,
                    positions=torch.arange(L - first - T, L - first, device=device),
                    cache=store,
                )[:, -1]
            tokens = pick(self.head(h), temperature, top_k, top_p, generators)
            if explain is not None:
                explain(h, tokens)
            ids = torch.cat((ids, tokens[:, None]), 1)
            yield tokens.tolist()

    def _compute_dtype(self):
        device = self.tokens.weight.device.type
        return (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else self.tokens.weight.dtype
        )


def pick(logits, temperature, top_k, top_p, generators):
    """Draws a token per row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        outside = (
            p.cumsum(-1) - p >= top_p
        )  # the mass before a token already reaches top_p; the likeliest always stays
        logits = logits.masked_fill(
            torch.zeros_like(outside).scatter(-1, order, outside), -math.inf
        )
    p = logits.softmax(-1)
    return torch.cat(
        [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)]
    )


def adamw(
    model: Model,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    prototype_decay: float | None,
    device: str,
):
    """AdamW over the model's parameter groups, fused where the device has it."""
    fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device in ("cuda", "cpu")
    return torch.optim.AdamW(
        model.parameter_groups(weight_decay, prototype_decay),
        lr=learning_rate,
        betas=betas,
        fused=fused,
    )
