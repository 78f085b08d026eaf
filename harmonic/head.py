"""The head as a PyTorch module: prototypes, a distance and a link."""

import math
import numbers
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .distances import HEADS, Distance, is_option, resolve
from .links import resolve_exponent, resolve_strength
from .loss import IGNORE_INDEX, SKIP, check_how, harmonic_logits, harmonic_loss
from .pairwise import full_float32, log_pairs, operands, paired_distance
from .precision import Products, choose_products
from .prepared import PreparedHead


def _at_least_float32(before: Tensor, after: Tensor) -> Tensor:
    """`after`, unless the cast made it half precision: then `before` on the device of `after`."""
    narrow, wide = (torch.float16, torch.bfloat16), (torch.float32, torch.float64)
    return before.to(after.device) if after.dtype in narrow and before.dtype in wide else after


def _check_table(
    n_embd: int, vocab_size: int, real_vocab_size: int | None, init_std: float
) -> None:
    """Raises ValueError for an empty table, more tokens than rows, or a negative init_std."""
    if n_embd < 1 or vocab_size < 1:
        raise ValueError(f"a table of {vocab_size} prototypes of {n_embd} coordinates is empty")
    if real_vocab_size is not None and not 0 < real_vocab_size <= vocab_size:
        raise ValueError(f"real_vocab_size {real_vocab_size} is not in 1..{vocab_size}")
    if not 0 <= init_std < math.inf:
        raise ValueError(f"init_std must be a finite number from 0 on, got {init_std}")


def _known(options: dict[str, Any], link: str) -> dict[str, Any]:
    """The options. Raises ValueError for one that has another name here."""
    strength = "scale" if link == "softmax" else "exponent"
    meant = {"n": strength, "s": strength, "head": "name", "distance": "name"}
    for key in options:
        if key in meant:
            raise ValueError(f"a head has no setting {key!r}; did you mean {meant[key]}?")
    return options


class HarmonicHead(nn.Module):
    """The output layer of a language model: prototypes (V, C), a distance and a link.

    `head(h)` gives the logits of all tokens, so F.cross_entropy, sampling and top-k work unchanged.
    `head.loss(h, targets)` gives the loss. It never holds all logits, except with impl="dense".

    The prototypes of a distance stay float32 when you cast the model to half precision. Prototypes
    that are tied to an embedding are cast with it.

    Args:
        n_embd: C, the width of hidden states and prototypes.
        vocab_size: V, the rows of the table of prototypes.
        name: a key of `DISTANCES` or `CONTROLS`.
        exponent: n of the harmonic link; see `harmonic_logits`.
        link: "harmonic" or "softmax".
        scale: s of the softmax link; see `harmonic_logits`.
        learn_exponent: train log n, starting at `exponent`.
        learn_scale: train log s, starting at `scale`.
        real_vocab_size: the number of tokens. Rows beyond it are padding: they get no logit, no
            probability and no gradient. None: all rows are tokens.
        bias: add a trained bias (V,); "cross_entropy" only.
        init_std: the standard deviation of new prototypes. The default is GPT-2's.
        impl: what computes the loss; see `harmonic_loss`.
        skip: the share of a gradient that may be skipped; see `harmonic_loss`.
        precision: how matrices are multiplied; see `harmonic_loss`.
        options: the options of the distance: p, a, t or q.

    Raises: ValueError for a name, number or combination that is not valid.
    """

    def __init__(  # noqa: PLR0913
        self,
        n_embd: int,
        vocab_size: int,
        name: str = "euclidean",
        *,
        exponent: float | str | None = None,
        link: str = "harmonic",
        scale: float | None = None,
        learn_exponent: bool = False,
        learn_scale: bool = False,
        real_vocab_size: int | None = None,
        bias: bool = False,
        init_std: float = 0.02,
        impl: str = "auto",
        skip: float = SKIP,
        precision: str = "auto",
        **options: float,
    ):
        super().__init__()
        distance, _ = resolve(name, **_known(options, link))
        kind, strength = resolve_strength(name, n_embd, link, exponent, scale, **options)
        if distance.is_control and (learn_exponent or learn_scale):
            raise ValueError(f"{name} has no exponent or scale to learn")
        if (learn_exponent and link == "softmax") or (learn_scale and link == "harmonic"):
            has = (
                "a scale: set learn_scale"
                if link == "softmax"
                else "an exponent: set learn_exponent"
            )
            raise ValueError(f"the {link} link has {has}")
        if scale is not None and link == "harmonic" and not distance.is_control:
            raise ValueError(
                f"scale={scale} is for the softmax link: set link=softmax too, or an exponent"
                " instead of the scale"
            )
        _check_table(n_embd, vocab_size, real_vocab_size, init_std)
        check_how(impl, skip, precision)
        if bias and name != "cross_entropy":
            raise ValueError(f"{name} takes no bias")
        self.name, self.link, self.options = name, link, options
        self.impl, self.skip, self.precision = impl, skip, precision
        self.real_vocab_size = real_vocab_size or vocab_size
        # A model that is built in half precision has float32 prototypes too.
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        dtype = torch.get_default_dtype() if distance.is_control else wide
        self.init_std = init_std
        self.weight = table = nn.Parameter(torch.empty(vocab_size, n_embd, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None
        self.fixed_strength = self.built_strength = strength
        self.given = (scale if kind == "softmax" else exponent) is not None
        log_strength = nn.Parameter(torch.empty(1, dtype=wide))
        self.log_strength = log_strength if learn_exponent or learn_scale else None
        trained = {key: t.to(wide) for key, t in distance.parameters(n_embd).items()}
        self.distance_parameters = nn.ParameterDict(trained)
        self._fill(table)

    def reset_parameters(self) -> None:
        """Gives all parameters the values of a new head, in place. A trained n or s gets the value
        that was set last. A head that was built on the meta device needs this after `to_empty`."""
        self._fill(self.padded_prototypes())

    @torch.no_grad()
    def _fill(self, table: Tensor) -> None:
        """Draws the table (V, C), and sets the other parameters to their first values."""
        table.normal_(std=self.init_std)
        if self.bias is not None:
            self.bias.zero_()
        if self.log_strength is not None:
            self.log_strength.fill_(math.log(self.fixed_strength))
        for key, first in self.distance.parameters(table.shape[1]).items():
            own = self.distance_parameters[key]
            if hasattr(own, "placements"):  # sharded by FSDP2
                from torch.distributed.tensor import distribute_tensor

                first = distribute_tensor(first.to(own.device), own.device_mesh, own.placements)
            own.copy_(first)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute. Refuses a table that does not fit, and what cannot be set later.

        A new table may have more rows than tokens. They are padding.
        """
        if is_option(name) or (name == "name" and "name" in self.__dict__):
            raise AttributeError(f"{name} cannot be set later: build another head")
        if name in ("n", "s"):
            raise AttributeError(f"no {name}: set head.exponent (n) or head.scale (s)")
        if name in ("weight", "table"):
            old = self.__dict__.get("_parameters", {}).get(name)
            # Libraries that shard a table may hold its parts in one dimension.
            if (
                isinstance(old, Tensor)
                and isinstance(value, Tensor)
                and old.dim() == value.dim() == 2
            ):
                self._check_fits(value, old.shape[1])
        super().__setattr__(name, value)

    def _check_fits(self, table: Tensor, width: int) -> None:
        """Raises ValueError for a table (V, C) that has not the head's width or too few rows."""
        rows = self.real_vocab_size if "weight" in self._parameters else 0  # The other one grows.
        if table.shape[1] != width or len(table) < rows:
            raise ValueError(
                f"a table of {len(table)} x {table.shape[1]} does not fit a head of"
                f" {self.real_vocab_size} prototypes of {width} coordinates: build another head"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """torch.nn's hook behind `.to`, `.half` and `.cuda`: every tensor becomes fn(tensor)."""
        kept = fn if self.is_control else lambda tensor: _at_least_float32(tensor, fn(tensor))
        applied: Self = super()._apply(kept, recurse)  # type: ignore[no-untyped-call]  # torch
        return applied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Adds the kind of the head and its strength to the metadata. A strength that was set after
        the head was built is a tensor too, because files of tensors have no metadata."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if hasattr(destination, "_metadata"):
            about = destination._metadata[prefix[:-1]]
            about["head"] = self.kind()
            if self.strength_name is not None and self.log_strength is None:
                about["strength"] = float(self.fixed_strength)
        built = getattr(self, "built_strength", self.fixed_strength)  # Old pickles have none.
        if self.log_strength is None and self.fixed_strength != built:
            strength = torch.tensor(self.fixed_strength, dtype=torch.float64)
            destination[f"{prefix}strength"] = strength

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Reads the strength. Without one, as in a file of tensors, it is that of the head when it
        was built.

        The state of a head of another kind is an error: its prototypes mean something else.
        """
        kind = local_metadata.get("head", self.kind())
        if kind != self.kind():
            error_msgs.append(
                f"the state is of a head of another kind ({kind}) than this one ({self.kind()}). To"
                " start from its prototypes, copy the tensor `weight`"
            )
            for key, own in self.distance_parameters.items():  # PyTorch loads these afterwards.
                state_dict[f"{prefix}distance_parameters.{key}"] = own
            return
        strength = state_dict.pop(f"{prefix}strength", None)
        if strength is not None and self.log_strength is not None:
            first = torch.tensor([math.log(float(strength))], dtype=self.log_strength.dtype)
            state_dict.setdefault(f"{prefix}log_strength", first)
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) > errors:
            return
        if strength is not None:
            self.set_strength(float(strength))
        elif self.log_strength is None and "strength" in local_metadata:
            self.fixed_strength = local_metadata["strength"]
        elif self.log_strength is None and f"{prefix}weight" in state_dict:
            self.fixed_strength = getattr(self, "built_strength", self.fixed_strength)

    def extra_repr(self) -> str:
        table = self.padded_prototypes()
        if table.dim() != 2:  # FSDP shows a flat part of it.
            return self.describe()
        rows, coordinates = table.shape
        padded = f" (padded to {rows:,})" if rows != self.real_vocab_size else ""
        return (
            f"{self.describe()}, {self.real_vocab_size:,} prototypes{padded} of {coordinates}"
            " coordinates"
        )

    # What it is

    @property
    def distance(self) -> Distance:
        """The entry of the head in `DISTANCES` or `CONTROLS`."""
        return resolve(self.name, **self.options)[0]

    @property
    def is_control(self) -> bool:
        """Whether the head is a dot product, without distance, exponent and scale."""
        return self.distance.is_control

    @property
    def is_harmonic(self) -> bool:
        """Whether the logits are -n log d."""
        return not self.is_control and self.link == "harmonic"

    @property
    def has_linearization(self) -> bool:
        """Whether `softmax_linearization_kl` is defined."""
        return self.is_harmonic and self.distance.kernel == "l2"

    @property
    def strength(self) -> float | Tensor:
        """n or s: a float, or a 0-dim tensor if it is trained. 1 for a control."""
        return self.fixed_strength if self.log_strength is None else self.log_strength.exp()[0]

    @property
    def strength_name(self) -> str | None:
        """What the strength is called: "exponent" or "scale"; None for a control."""
        if self.is_control:
            return None
        return "exponent" if self.is_harmonic else "scale"

    @property
    def exponent(self) -> float | Tensor | None:
        """n of the harmonic link, which can be set; None for another head."""
        return self.strength if self.strength_name == "exponent" else None

    @exponent.setter
    def exponent(self, value: float | str) -> None:
        if isinstance(value, str):
            value = resolve_exponent(self.name, self.padded_prototypes().shape[1], value)
        self._set("exponent", value)

    @property
    def scale(self) -> float | Tensor | None:
        """s of the softmax link, which can be set; None for another head."""
        return self.strength if self.strength_name == "scale" else None

    @scale.setter
    def scale(self, value: float) -> None:
        self._set("scale", value)

    def _set(self, kind: str, value: float) -> None:
        if self.strength_name != kind:
            raise ValueError(f"{self.describe()}: this head has no {kind}")
        self.set_strength(value)

    def _strength_number(self) -> float:
        """The strength; on the meta device, where a trained one has no value, its first one."""
        strength = self.strength
        if isinstance(strength, Tensor) and not strength.is_meta:
            return strength.item()
        return float(self.fixed_strength)

    def kind(self) -> str:
        """The distance, its options and the link, such as "minkowski, p = 3, harmonic link"."""
        given = {**HEADS[self.name].options, **self.options}
        options = [f"{key} = {value:g}" for key, value in sorted(given.items())]
        link = [] if self.is_control else [f"{self.link} link"]
        return ", ".join([self.name, *options, *link])

    def describe(self) -> str:
        """The head in words, such as "euclidean, harmonic link, n = 768", with options that differ
        from the distance's own."""
        if self.is_control:
            return self.name
        own = HEADS[self.name].options
        options = [f"{k} = {v:g}" for k, v in sorted(self.options.items()) if v != own.get(k)]
        strength = f"{'n' if self.is_harmonic else 's'} = {self._strength_number():.4g}"
        return ", ".join([self.name, *options, f"{self.link} link", strength])

    @torch.no_grad()
    def set_strength(self, value: float) -> None:
        """Sets n or s. ValueError for anything but a positive number."""
        value = value.item() if isinstance(value, Tensor) else value
        if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
            raise ValueError(f"the strength must be a positive number, got {value!r}")
        self.fixed_strength = value = float(value)
        if self.log_strength is not None:
            self.log_strength.fill_(math.log(value))

    def config(self) -> dict[str, Any]:
        """The settings that `from_config` takes. It holds no prototypes and no parameters."""
        rows, width = self.padded_prototypes().shape
        sizes = {"n_embd": width, "vocab_size": rows, "real_vocab_size": self.real_vocab_size}
        return {**sizes, **self.settings()}

    def settings(self) -> dict[str, Any]:
        """The settings of `config` without its sizes."""
        found = {
            "name": self.name,
            "link": self.link,
            "bias": self.bias is not None,
            "impl": self.impl,
            "skip": self.skip,
            "precision": self.precision,
            **self.options,
        }
        strength = self.strength_name
        if strength is not None:
            found[strength] = self._strength_number()
            found[f"learn_{strength}"] = self.log_strength is not None
        return found

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HarmonicHead":
        """A head with the settings that `config` returned, and new prototypes."""
        return cls(**config)

    def rebuild(self, vocab_size: int) -> "HarmonicHead":
        """A new head with the same settings and `vocab_size` new prototypes, without padding."""
        return type(self).from_config(
            self.config() | {"vocab_size": vocab_size, "real_vocab_size": vocab_size}
        )

    def products(self) -> Products:
        """How `loss` multiplies matrices, on this device and under the torch.autocast of now."""
        precision = "float32" if self.impl == "dense" else self.precision
        return choose_products(
            precision,
            self.distance.multiplies,
            self.distance.has_products,
            self.padded_prototypes().device,
        )

    def geometry(self) -> dict[str, Any]:
        """The options and trained parameters of the distance.

        They are the keyword settings of `distance`, `paired_distance` and `contributions`.
        """
        return {**self.options, **self.distance_parameters}

    def prototypes(self) -> Tensor:
        """The prototypes without padding: (real_vocab_size, C)."""
        table = self.padded_prototypes()
        return table if self.real_vocab_size == len(table) else table[: self.real_vocab_size]

    def padded_prototypes(self) -> Tensor:
        """All rows of the table, padding included: (V, C)."""
        return self.weight

    # What it computes

    def _settings(self) -> dict[str, Any]:
        name = self.strength_name
        strength = {} if name is None else {name: self.strength}
        bias = None if self.bias is None else self.bias[: self.real_vocab_size]
        return {
            **strength,
            "link": self.link,
            "bias": bias,
            "training": self.training,
            **self.geometry(),
        }

    def forward(
        self,
        h: Tensor,
        targets: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits of all tokens: (..., C) -> (..., real_vocab_size). With targets: the loss, as
        `loss` gives it.

        torch.compile breaks its graph at logits. It does not at a loss.
        """
        if targets is None:
            return harmonic_logits(h, self.prototypes(), self.name, **self._settings())
        return self._loss(h, targets, ignore_index, reduction)

    def _loss(
        self, h: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
    ) -> Tensor:
        """As `loss`, without hooks."""
        return harmonic_loss(
            h,
            self.padded_prototypes(),
            targets,
            self.name,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=self.impl,
            skip=self.skip,
            precision=self.precision,
            rows=self.real_vocab_size,  # A slice of the table would copy its gradient.
            check_finite=False,
            **self._settings(),
        )

    def tensors(self) -> list[Tensor]:
        """All that its logits depend on: the table, and what is trained beside it."""
        beside = (self.bias, self.log_strength, *self.distance_parameters.values())
        return [self.padded_prototypes(), *(t for t in beside if t is not None)]

    def prepared(self) -> PreparedHead:
        """The head for many calls: what depends only on prototypes is computed once.

        `head.prepared()(h)` is `head(h)` without noise and without gradients.
        """
        return PreparedHead(self)

    def loss(
        self, h: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX, reduction: str = "mean"
    ) -> Tensor:
        """The negative log likelihood in nats; see `harmonic_loss`.

        h: (..., C), targets: (...) -> a scalar, or (...) for reduction="none". Where h or w is not
        finite the loss is NaN, and there is no error.
        """
        if targets is None:
            raise ValueError("a loss needs targets, got None")
        # A call, so that hooks run: those of pruning, spectral_norm and FSDP2 prepare the table.
        # By name, because a hook that changes h would drop the other positional arguments.
        found: Tensor = self(h, targets=targets, ignore_index=ignore_index, reduction=reduction)
        return found

    @torch.no_grad()
    def target_distance(self, h: Tensor, targets: Tensor) -> Tensor | None:
        """The distance from each state to its target's prototype: (..., C), (...) -> (...).

        None for a control. NaN where a target is not a token, such as IGNORE_INDEX. Without noise.
        """
        if self.is_control:
            return None
        known = (targets >= 0) & (targets < self.real_vocab_size)
        d = paired_distance(
            h, self.prototypes()[torch.where(known, targets, 0)], self.name, **self.geometry()
        )
        return torch.where(known, d, math.nan)


@torch.no_grad()
def softmax_linearization_kl(h: Tensor, head: HarmonicHead) -> float | None:
    """How much a head differs from a softmax of dot products: the mean KL(p || q) in nats.

    h: (N, C). p are the predictions of the head, q those of its first-order approximation.

    The logit is -m log r. Here r = |x - y|^2 is the squared distance of the mapped vectors, and m
    is n / 2 if d is a square root of r, else n. The tangent at r0, the mean of r over prototypes,
    is -m r / r0 and a constant. Because r = |x|^2 + |y|^2 - 2 x.y, the tangent is a dot product
    with a penalty on |y|^2.

    Examples of r0: about |x|^2 for euclidean with small prototypes, so that n = |x|^2 = C gives
    q = softmax(x.y - |y|^2 / 2). About 2 for cosine, the value at right angles.

    Returns: None for a head whose kernel is not l2 or whose link is not harmonic.
    """
    if not head.has_linearization:
        return None
    with full_float32(h.device):
        both = operands(h, head.prototypes(), head.name, **head.geometry())
        root = both.distance.root()
        log_r = log_pairs(both) / root - math.log(both.distance.factor)
        r0 = log_r.exp().mean(-1, keepdim=True)
        m = head.strength * root
        p, q = (-m * log_r).log_softmax(-1), (-m * log_r.exp() / r0).log_softmax(-1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean").item()
