"""Swapping the head of a model that was trained with another one.

`match` gives a harmonic head prototypes and a strength with which it predicts what a softmax of dot products, `h . w + b`, predicts.

Distances of kernel l2 in closed form. All prototypes are put on a sphere around the origin, so that no norm penalty is left: one direction
u, in which prototypes and states vary least, is given up, and prototype v becomes `a P w_v + K_v u`, P the projection away from u, with K_v
such that all norms are equal (euclidean: `|.|^2 = R^2 - 2 a b_v`, which carries the bias). Then

    -n/2 log(|h|^2 + R^2 - 2 a (h.w_v + b_v)) = const + n a / (|h|^2 + R^2) (h.w_v + b_v) + ...    (euclidean, mahalanobis at P = I)
    -n log(1 - h.w'_v / (|h| R)) = const + n a / (|h| R) h.w_v + ...                               (cosine)

are the source's logits as n grows, with `a n = |h|^2 + R^2` (euclidean; a large R makes light of states whose norms vary) or
`a n = |h| R` (cosine; states of different norms get different temperatures). What is left out falls as z^2 / n for a logit z: the default n
is where that costs NEAR nats. A larger one is nearer, until float32 rounds more off; a smaller one is less of a softmax, and bears larger
steps in training. Other distances take `a w_v`, a and n fitted on some states.
"""

import inspect
import math

import torch

from harmonic.distances import exactly, log_pairs, operands, resolve
from harmonic.loss import HarmonicHead

NEAR = 1e-4  # nats: perplexity within 0.01 %
ROWS = 256  # states that are looked at: (ROWS, V) numbers are held
PAIRS = 2**24  # pairs of a state and a prototype for which elementwise distances are computed at each trial of a scale


@torch.no_grad()
def match(head: HarmonicHead, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Gives `head` the prototypes and the strength with which it is nearest to softmax(h . w + b): see above.

    An exponent (softmax link: scale) that the head was given stays, and the prototypes are made for it; else it is fitted.

    Args:
        head: of a distance, with V rows; trained parameters of the distance should be at their start. Changed in place.
        states: (N, C) hidden states of real text, N >= 2, better several times C; predictions are compared on ROWS of them.
        weight: (V', C) the source's unembedding, V' <= V (rows beyond are padding). bias: (V',) or None.
    Returns: the mean KL divergence in nats of the head's predictions from the source's, over those states.
    Raises: ValueError for mismatched sizes or fewer than 2 states.
    """
    rows = head.real_vocab_size
    if weight.shape[1] != head.weight.shape[1] or not rows <= len(weight) <= len(head.weight):
        raise ValueError(f"a head of {tuple(head.weight.shape)} does not match an unembedding of {tuple(weight.shape)}")
    if states.dim() != 2 or states.shape[1] != weight.shape[1] or len(states) < 2:
        raise ValueError(f"states {tuple(states.shape)} are not (N, {weight.shape[1]}), N at least 2")
    head.weight[: len(weight)] = weight
    with exactly(states.device):
        h = _spread(states.float(), ROWS)
        w = weight[:rows].float()
        w = w - w.mean(0)  # a logit the same for all tokens
        b = torch.zeros(rows, device=w.device) if bias is None else bias[:rows].float() - bias[:rows].float().mean()
        z = h @ w.T + b
        p = z.softmax(-1)
        row, _ = resolve(head.name, **head.options)
        if row.kernel == "l2":
            head.weight[:rows] = _on_a_sphere(head, row.degree, states.float(), w, b, z, p)
            return _fit_strength(head, h, p)
        few = max(2, PAIRS // rows)
        return _fit_scale(head, _spread(h, few), weight[:rows].float() + torch.outer(b, _constant(states.float())), _spread(p, few))


def _constant(h):
    """The vector whose products with the states h are nearest to 1 in least squares: it carries a bias. The ridge keeps it short."""
    second = (h.T @ h).cpu().double()
    second += 1e-2 * second.trace() / len(second) * torch.eye(len(second), dtype=second.dtype)
    return torch.linalg.solve(second, h.sum(0).cpu().double()).to(h)


def _spread(x, count):
    return x[torch.linspace(0, len(x) - 1, min(count, len(x)), device=x.device).round().long()]


def _on_a_sphere(head, degree, h, w, b, z, p):
    """The prototypes of the closed form, (V, C)."""
    mean = (p * z).sum(-1)  # of the logit, for each state, over the source's own predictions
    spread = ((p * z.square()).sum(-1) - mean.square()).clamp_min(1e-6).mean().sqrt().item()
    size = h.square().sum(-1)
    H = size.mean().item()
    if degree == 0:  # cosine: the radius carries no bias
        w = w + torch.outer(b, _constant(h))
    covariances = [m / m.trace().clamp_min(1e-30) for m in ((w.T @ w).cpu().double(), (h.T @ h).cpu().double())]
    u = torch.linalg.eigh(sum(covariances)).eigenvectors[:, 0].to(w)
    along = h @ u

    # the exponent of the harmonic head whose prototypes these are
    n = float(head.strength()) * max(1, degree) if head.given else None  # of the distance, not of its square
    if n is not None and head.link == "softmax":
        n *= math.sqrt(2 * H) ** degree  # s d has the slope of n log d at the d of R = |h|
    off = mean.square().mean().sqrt().item() * (2 if degree else 1)
    enough = spread * off / math.sqrt(2 * NEAR)  # z^2 / n (cosine z^2 / 2n) moves logits by off / n a nat: KL (spread off / n)^2 / 2

    projected = w - torch.outer(w @ u, u)
    norms = projected.square().sum(-1)
    W = norms.max().item()
    if degree == 0:
        n = n or max(enough, 2 * math.sqrt(H * W))
        radius = n / math.sqrt(H)  # over a
        # their scale is free: with this one a step of the optimiser moves logits as far as it did in the source
        return projected + torch.outer((radius**2 - norms).clamp_min(0).sqrt(), u)
    n = n or max(enough, 2 * (H + W))
    # a makes the rest smallest: temperatures off by sd(|h|^2) / (a n), and (h.u) K_v / a, which differs from token to token
    a = torch.logspace(-6, 6, 2401, dtype=torch.float64)
    height = n / a - H / a.square()  # R^2 / a^2, of which W is the least
    tempered = spread**2 * size.var().item() / (a * n).square()
    tilted = along.var().item() * norms.var().item() / 4 / height.clamp_min(1e-30)
    error = torch.where(height >= 2 * W, tempered + tilted, 1e6 * (1 + 2 * W - height))  # out of reach: as near as possible
    a = a[error.argmin()].item()
    middle = along.mean().item()
    R = middle + math.sqrt(max(0.0, middle**2 + a * n - H))  # |h|^2 + R^2 - 2 (h.u) R = a n
    K = (R**2 - 2 * a * b - a**2 * norms).clamp_min(0).sqrt()
    return a * projected + torch.outer(K, u)


def _logits_of_one(head, h):
    """The head's logits at strength 1, largest of each row 0: (N, C) -> (N, V)."""
    _, x, y, u, v, options = operands(h, head.prototypes(), head.name, **head.geometry())
    log_d = log_pairs(resolve(head.name, **head.options)[0], x, y, u, v, options, compiled=True)
    logits = -(log_d if head.link == "harmonic" else log_d.exp())
    return logits - logits.amax(-1, keepdim=True)


def _fit_strength(head, h, p) -> float:
    """Sets the strength that minimises KL(p || head) unless it was given -> that KL in nats. The loss is convex in it."""
    entropy = -torch.special.xlogy(p, p).sum(-1).mean().item()
    if head.kind == "control":
        return (-(p * head(h)[:, : p.shape[1]].log_softmax(-1)).sum(-1).mean()).item() - entropy
    logits = _logits_of_one(head, h)
    target = (p * logits).sum(-1)
    s = float(head.strength())
    if not head.given:
        low, high = 0.0, math.inf
        for _ in range(60):
            q = (s * logits).softmax(-1)
            first = (q * logits).sum(-1)
            slope = (first - target).mean().item()
            curve = ((q * logits.square()).sum(-1) - first.square()).mean().item()
            low, high = (s, high) if slope < 0 else (low, s)
            step = s - slope / curve if curve > 0 else math.inf
            new = step if low < step < high else 2 * s if high == math.inf else (low + high) / 2
            if abs(new - s) < 1e-6 * s:
                break
            s = max(new, 1e-6)
        head.set_strength(s)
    return (torch.logsumexp(s * logits, -1) - s * target).mean().item() - entropy


def _fit_scale(head, h, w, p) -> float:
    """Prototypes a w with the a (and the strength) of the smallest KL, to 1/16 of log a -> that KL in nats."""

    def error(log_a):
        head.weight[: len(w)] = math.exp(log_a) * w
        return _fit_strength(head, h, p)

    if head.kind == "control":
        return error(0.0)
    best = 0.0
    for step in (1.0, 1 / 4, 1 / 16):
        best = min((best + step * i for i in range(-4, 5)), key=error)
    return error(best)


class ModelHead(HarmonicHead):
    """The head inside a transformers model: while there are labels it computes their loss where the model asks for logits."""

    labels = count = found = None
    shift = True  # the next token's label; masked models predict in place
    padded = False

    @property
    def real_vocab_size(self) -> int:
        """Rows that are tokens: all, also after resize_token_embeddings, unless the head was made with padding."""
        return self._rows if self.padded else len(self.weight)

    @real_vocab_size.setter
    def real_vocab_size(self, rows: int):
        self._rows = rows

    def forward(self, h):
        if self.labels is None:
            return super().forward(h)
        states, labels = (h[..., :-1, :], self.labels[..., 1:]) if self.shift else (h, self.labels)
        labels = labels.to(h.device)
        if self.count is None:
            self.found = self.loss(states, labels, ignore_index=-100)
        else:  # Trainer's: targets of all micro-batches together
            self.found = self.loss(states, labels, ignore_index=-100, reduction="sum") / torch.as_tensor(self.count, device=h.device)
        return h.new_empty(*h.shape[:-1], 0) if self.training else super().forward(h)


def swap_head(model, name: str, *, match_to: torch.Tensor | None = None, **arguments) -> HarmonicHead:
    """Replaces the unembedding of a transformers causal or masked language model, and its loss, by a harmonic head.

    `model(input_ids)` gives the head's logits, so that `generate` and pipelines work unchanged. `model(input_ids, labels=labels)` computes
    the loss chunk by chunk; while training it gives no logits, which never exist. `save_pretrained` writes it, `load_swapped` reads it.

    Args:
        model: such as GPT2LMHeadModel, Qwen2ForCausalLM, BertForMaskedLM (transformers 5); changed in place.
        name: a key of `DISTANCES` or `CONTROLS`.
        match_to: token ids (B, T) of real text: the head is matched to the model's own on their states (`match`) and gets prototypes of its
            own, in float32 whatever the model is. None: the prototypes are the model's unembedding as it is, tied where it was, which is
            for training from the start.
        arguments: of `HarmonicHead` (exponent, link, impl, ...), and the distance's options (p, a, t, q).
    Returns: the head, which is the model's output embedding now; `model.config.harmonic` remembers how it was made.
    Raises: ValueError for a model without an unembedding, for encoder-decoders, for models that change their logits afterwards or add a
        loss of their own, and whatever HarmonicHead could not honour.
    """
    old, config = model.get_output_embeddings(), model.config
    if old is None or config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is not a causal or masked language model with an unembedding")
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        raise ValueError("swap_head needs transformers 5")
    more = [
        key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_router_logits") if getattr(config, key, None)
    ]
    if more:
        raise ValueError(f"{type(model).__name__} does more with logits than its unembedding: {', '.join(more)}")
    if isinstance(old, ModelHead) and match_to is not None:
        raise ValueError(f"the head of this model is {old.name} already: a head is matched to a dot product's")
    weight, bias = old.weight, getattr(old, "bias", None)
    if name == "cross_entropy" and bias is not None:
        arguments["bias"] = True
    head = ModelHead(weight.shape[1], len(weight), name, **arguments)
    head.padded = "real_vocab_size" in arguments
    head.shift = model.can_generate()
    head.to(weight.device)
    if match_to is None:
        head.weight = weight
    else:
        match(head, _states(model, old, match_to), weight, bias)
        config.tie_word_embeddings = False
    if head.bias is not None:
        head.bias = bias
    if head.kind != "control" and not head.given:
        arguments["scale" if head.link == "softmax" else "exponent"] = float(head.strength())
    model.set_output_embeddings(head.train(model.training))
    tied = {k: v for k, v in (model._tied_weights_keys or {}).items() if head.bias is not None or not k.endswith("bias")}
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    config.harmonic = {"name": name, **arguments}
    if not isinstance(old, ModelHead):  # its hooks are there
        model.register_forward_pre_hook(_take_labels, with_kwargs=True)
        model.register_forward_hook(_give_loss)
    return head


class Swapped:
    """In front of a class of transformers: its unembedding becomes the head that `config.harmonic` describes."""

    _keep_in_fp32_modules_strict = {"lm_head", "decoder"}  # a matched head lives on small differences of large prototypes

    def __init__(self, config):
        super().__init__(config)
        swap_head(self, **config.harmonic)


def load_swapped(folder, **arguments):
    """A model that `swap_head` changed and `save_pretrained` wrote; `from_pretrained` of its class would put a dot product back.

    Args: folder: as for from_pretrained, and so are the arguments.
    Raises: ValueError for a model whose head was not swapped.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if not getattr(config, "harmonic", None):
        raise ValueError(f"{folder} holds no swapped head")
    plain = getattr(transformers, config.architectures[0])
    return type(plain.__name__, (Swapped, plain), {}).from_pretrained(folder, **arguments)


class _Enough(Exception):
    pass


@torch.no_grad()
def _states(model, unembedding, ids):
    """What a model's unembedding sees of token ids: (N, C). It is not computed itself."""
    seen = []

    def take(_, inputs):
        seen.append(inputs[0])
        raise _Enough

    hook, training = unembedding.register_forward_pre_hook(take), model.training
    try:
        model.eval()(input_ids=ids)
    except _Enough:
        return seen[0].reshape(-1, seen[0].shape[-1])
    finally:
        hook.remove()
        model.train(training)


def _take_labels(model, args, kwargs):
    """Before a model's forward: hands labels to the head in the model's stead."""
    head = model.get_output_embeddings()
    given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    given = {**{k: v for k, v in given.items() if k not in ("self", "kwargs")}, **given.get("kwargs", {})}
    head.labels, head.found, head.count = given.pop("labels", None), None, given.get("num_items_in_batch")
    return (), given


def _give_loss(model, inputs, output):
    """After it: puts the head's loss in front of what the model gives, and takes away the logits that were none."""
    head = model.get_output_embeddings()
    if head.labels is None:
        return None
    loss, head.labels, head.found = head.found, None, None
    if isinstance(output, tuple):
        return (loss, *(output[1:] if head.training else output))
    rest = {k: v for k, v in output.items() if k != "loss" and not (k == "logits" and head.training)}
    return type(output)(loss=loss, **rest)
