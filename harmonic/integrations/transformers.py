"""Harmonic heads in models of transformers. `swap_head` puts a head into a model, `save_pretrained`
writes the model, and `load_swapped` reads it.

A swapped model gets a subclass of its old class, such as HarmonicGPT2LMHeadModel. Its forward takes
the labels out of the call and runs the old forward. When that asks the head for logits, the head
also computes the loss of the labels, chunk by chunk. The labels reach the head in a `_Request`. No
module stores anything of a call, so a copied, wrapped or sharded head works too.

The prototypes are the head's `table`. It has no `weight`, because some libraries would silently
multiply hidden states by a `weight`.
"""

import copy
import functools
import importlib.abc
import importlib.util
import inspect
import json
import math
import pkgutil
import re
import sys
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..head import HarmonicHead
from ..loss import IGNORE_INDEX
from ..match import match

PREFIX = "harmonic_"  # Begins the model type in the config.json of a swapped model.
# Settings of models that change their logits afterwards, or add something to their loss.
MORE_WITH_LOGITS = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier", "output_router_logits", "logits_soft_cap", "output_logit_soft_cap",
    "z_loss_coefficient",
)  # fmt: skip
# Names of heads whose table was called `weight` in folders of older versions.
HEADS_BEFORE = ("lm_head", "lm_head.decoder", "predictions.decoder", "vocab_projector", "embed_out")
AUTO = "transformers.models.auto.configuration_auto"
# Finite, so that an entropy is not 0 times infinity.
PADDING_LOGIT = -1e9
ENTROPY_ROWS = 256  # For TRL's metrics, so many rows of logits are in memory at a time.


@dataclass
class _Request:
    """What one call of a model asks its head to compute, and the result.

    labels: (B, T). shift: whether position t predicts the label of t + 1.
    count: the number of targets in all micro-batches, or None.
    each: whether TRL wants the log-probability of every label.
    logits: whether the model returns logits, too.
    found: the result: the loss, or the output that TRL reads.
    """

    labels: torch.Tensor
    shift: bool
    count: torch.Tensor | int | None
    each: bool
    logits: bool
    found: object = None


# The request of the current call. An argument would be simpler, but transformers' forward calls its
# head with nothing but hidden states: `lm_head(h)`. A context variable belongs to a call, not to a
# module. So threads of DataParallel do not see each other's request, FSDP and PEFT may wrap the
# head in another module, and a failed call leaves nothing behind.
_request: ContextVar[_Request | None] = ContextVar("request", default=None)


class ModelHead(HarmonicHead):
    """The head inside a transformers model. If there is a request, it also computes the loss when
    the model asks for logits."""

    padded = False
    exact = False  # Whether the table is float32 and has to stay so; not if it is tied.

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.table = nn.Parameter(self._parameters.pop("weight").data)  # (V, C)
        self.padded = self._rows < len(self.table)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The strength is no tensor, because files of transformers have it in the configuration. It
        is metadata, as the kind of the head."""
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            about = destination._metadata[prefix[:-1]]
            about["head"] = self.kind()
            if self.strength_name is not None and self.log_strength is None:
                about["strength"] = float(self.strength)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *arguments):
        """Also takes the state of a plain model, whose output layer has a `weight`."""
        if f"{prefix}table" not in state_dict and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}table"] = state_dict.pop(f"{prefix}weight")
        if "strength" in local_metadata and local_metadata["head"] == self.kind():
            self.set_strength(local_metadata["strength"])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def __getattr__(self, name):
        if name == "weight":
            raise AttributeError(
                f"a {self.name} head has no `weight` to multiply hidden states by."
                " Use `head(h)` for logits, `head.loss(h, labels)` for the loss and `head.table`"
                " for the prototypes. If a fused or chunked loss asked for `weight`, or PEFT's"
                " trainable_token_indices did, turn that off"
            )
        return super().__getattr__(name)

    def padded_prototypes(self) -> torch.Tensor:
        return self.table

    @property
    def real_vocab_size(self) -> int:
        """The number of rows that are tokens: all rows, unless the head was made with padding."""
        return self._rows if self.padded else len(self.table)

    @real_vocab_size.setter
    def real_vocab_size(self, rows: int) -> None:
        self._rows = rows

    def forward(
        self,
        h: torch.Tensor,
        targets: torch.Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> torch.Tensor:
        if targets is not None:
            return self._loss(h, targets, ignore_index, reduction)
        request = _request.get()
        if request is None:
            return self._logits(h)
        if self.exact and self.table.dtype in (torch.float16, torch.bfloat16):
            warnings.warn(
                f"the prototypes of this {self.name} head are {self.table.dtype} here. A matched"
                " head needs float32 to be exact."
                " With FSDP2, shard the head first, by itself and without a param_dtype",
                stacklevel=1,
            )
        states, labels = h, request.labels.to(h.device)
        if request.shift:
            states, labels = h[..., :-1, :], labels[..., 1:]
        if request.each:
            request.found = self._score(states, labels, request.count)
        elif request.count is None:
            request.found = self._loss(states, labels)
        else:  # Trainer divides by the number of targets in all micro-batches.
            count = torch.as_tensor(request.count, device=h.device).clamp(min=1)
            request.found = self._loss(states, labels, reduction="sum") / count
        if not request.logits:
            return h.new_empty(*h.shape[:-1], 0)
        return self._logits(h)

    def _logits(self, h):
        """The logits of all rows, which transformers expects: (..., C) -> (..., V). Padding has
        probability 0."""
        logits = super().forward(h)
        padding = len(self.table) - self.real_vocab_size
        if not padding:
            return logits
        return F.pad(logits, (0, padding), value=PADDING_LOGIT)

    def _score(self, h, labels, count):
        """The output that TRL's trainers read; see `trl.trainer.utils.FusedCausalLMOutput`."""
        kept = labels != IGNORE_INDEX
        log_p = -self._loss(h, labels, reduction="none")
        entropy, top = torch.zeros_like(log_p), torch.zeros_like(kept)
        mean, squares = torch.zeros_like(log_p), torch.zeros_like(log_p)
        with torch.no_grad():
            for states, targets, where in zip(
                *(t.split(ENTROPY_ROWS) for t in (h[kept], labels[kept], kept.nonzero())),
                strict=True,
            ):
                logits = super().forward(states)
                log_q = logits.log_softmax(-1)
                mean[tuple(where.T)] = logits.mean(-1).to(mean)
                squares[tuple(where.T)] = (2 * log_q).logsumexp(-1).to(squares)
                entropy[tuple(where.T)] = (
                    -torch.special.xlogy(log_q.exp(), log_q.exp()).sum(-1).to(entropy)
                )
                top[tuple(where.T)] = log_q.argmax(-1) == targets
        loss = -log_p.sum() / torch.as_tensor(
            kept.sum() if count is None else count, device=h.device
        ).clamp(min=1)
        from transformers.utils import ModelOutput

        return ModelOutput(
            loss=loss, log_probs=log_p, entropy=entropy, log_sum_sq_probs=squares, mean_logits=mean,
            is_top1=top, label_mask=kept, aux_loss=None,
        )  # fmt: skip

    @torch.no_grad()
    def resize(self, table: torch.Tensor, tokens: int) -> None:
        """Takes another table (V', C). If the head is padded, `tokens` rows of it are tokens."""
        if not isinstance(table, nn.Parameter):
            table = nn.Parameter(table, self.table.requires_grad)
        self.table = table
        if self.bias is not None:
            bias = F.pad(self.bias, (0, len(table) - len(self.bias)))
            self.bias = nn.Parameter(bias, self.bias.requires_grad)
        self.real_vocab_size = min(tokens, len(table))


def swap_head(
    model: Any, name: str, *, match_to: torch.Tensor | None = None, **arguments: Any
) -> HarmonicHead:
    """Puts a harmonic head into a causal or masked language model of transformers.

    `model(input_ids)` gives the logits of the head, so `generate` and pipelines work unchanged.
    `model(input_ids, labels=labels)` computes the loss chunk by chunk. In training it returns no
    logits, because they are never computed. `save_pretrained` writes the model, and `load_swapped`
    reads it. After `import harmonic`, `AutoModelForCausalLM.from_pretrained` reads it too.

    Args:
        model: such as GPT2LMHeadModel, Qwen2ForCausalLM or BertForMaskedLM, of transformers 5. Its
            output layer is replaced in place.
        name: a key of `DISTANCES` or `CONTROLS`.
        match_to: token ids (B, T) of real text. The head is matched to the predictions of the model
            on this text (see `match`), and gets its own prototypes in float32. None: the rows of
            the model's output matrix become the prototypes, tied if they were tied. That is for
            training from scratch.
        arguments: of `HarmonicHead` (exponent, link, impl, ...), and the options of the distance
            (p, a, t, q).
    Returns: the head, not the model. It is now the output embedding of the model, and
        `model.config.harmonic` stores its settings.
    Raises: ValueError for a model without an output layer, an encoder-decoder, a model that changes
        its logits afterwards, adds a loss or reads the `weight` of its output layer, or arguments
        that `HarmonicHead` does not accept.
    """
    old = _output_layer(model, match_to)
    swapped = isinstance(old, ModelHead)
    weight, bias = old.table if swapped else old.weight, getattr(old, "bias", None)
    if name == "cross_entropy" and bias is not None:
        arguments["bias"] = True
    head = ModelHead(weight.shape[1], len(weight), name, **arguments)
    head.padded = "real_vocab_size" in arguments
    head.to(weight.device)
    if match_to is None:
        head.table = weight
    else:
        match(head, _states(model, old, match_to), weight, bias)
    if head.bias is not None and bias is not None:
        head.bias = bias
    if not head.is_control and not head.given:
        arguments[head.strength_name] = head._strength_number()
    config = _own_config(model)
    # TRL and PEFT would load the plain model of that name again.
    config._name_or_path = model.name_or_path = ""
    if match_to is not None:
        _untie(model)
    where = _path(model, old)
    model.set_output_embeddings(head.train(model.training))
    config.harmonic = {"name": name, **arguments}
    if not isinstance(model, Swapped):
        model.__class__ = harmonic_class(type(model))
    _retie(model, head, where)
    _share_bias(model, head)
    return head


def _own_config(model):
    """A configuration that no other model shares, of the class that its folder will name.

    In memory its model type is the plain one, because other libraries depend on that.
    """
    shared = model.config
    config = copy.copy(shared)
    if not shared.__class__.model_type.startswith(PREFIX):
        config.__class__ = _harmonic_config(type(shared))
        _register(config.__class__.model_type)
    config.model_type = config.__class__.model_type.removeprefix(PREFIX)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    return config


def _untie(model):
    """Says in the configuration that the prototypes are not the input embedding.

    A multimodal model has a configuration of its text model, too, and takes the setting from there
    when it is loaded.
    """
    model.config.tie_word_embeddings = False
    text = model.config.get_text_config()
    if text is model.config:
        return
    own = copy.copy(text)
    own.tie_word_embeddings = False
    setattr(model.config, next(key for key, v in vars(model.config).items() if v is text), own)
    for module in model.modules():
        if getattr(module, "config", None) is text:
            module.config = own


def _register(model_type: str):
    """Lets AutoModelForCausalLM.from_config read the configuration of a swapped model."""
    from transformers import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        CONFIG_MAPPING.__getitem__(model_type)  # `_Types` adds what is missing.


def _output_layer(model, match_to) -> nn.Module:
    """The output layer of a model. Raises ValueError for a model whose head cannot be swapped."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"swap_head takes a model of transformers, not {type(model).__name__}: it changes the"
            " model in place and returns the head. Swap first, then wrap or compile"
        )
    old = model.get_output_embeddings()
    name, config = type(model).__name__, model.config
    if old is None or config.is_encoder_decoder:
        raise ValueError(f"{name} is not a causal or masked language model with an output layer")
    if not isinstance(old, ModelHead) and (type(old) is not nn.Linear or old._forward_hooks):
        raise ValueError(
            f"the output layer of {name} is not a plain torch.nn.Linear but a"
            f" {type(old).__name__}{' with hooks' * bool(old._forward_hooks)}: what it adds would"
            " be lost. Merge or remove it first"
        )
    weight = old.table if isinstance(old, ModelHead) else old.weight
    if weight.is_meta and hasattr(old, "_hf_hook"):
        raise ValueError(
            f"the output layer of {name} is offloaded by accelerate: swap the head first, and"
            " offload the model then"
        )
    if len(weight) < (tokens := getattr(config.get_text_config(), "vocab_size", 0)):
        raise ValueError(
            f"{name} cannot be swapped: what it calls its output layer has {len(weight)} rows for"
            f" {tokens} tokens"
        )
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        raise ValueError("swap_head needs transformers 5: pip install -U transformers")
    values = {key: getattr(config.get_text_config(), key, None) for key in MORE_WITH_LOGITS}
    if more := [key for key, value in values.items() if value is True or value not in (None, 0, 1)]:
        raise ValueError(
            f"{name} changes logits or loss after its output layer: {', '.join(more)}. Set that to"
            " None in model.config if you can do without it"
        )
    _check_code(model, old)
    if isinstance(old, ModelHead) and match_to is not None:
        raise ValueError(
            f"the head of this model is {old.name} already: match_to needs a dot product's head"
        )
    return old


def _check_code(model, old):
    """Raises ValueError for a model whose code does more with its output layer than to call it."""
    source, layer = _calling_source(model, old)
    if f"{layer}.weight" in source:
        raise ValueError(
            f"{type(model).__name__} cannot be swapped: its code reads the `weight` of its output"
            " layer, and a head has none"
        )
    if re.search(rf"{re.escape(layer)}\([^()]*\) *[-+]", source):
        raise ValueError(
            f"{type(model).__name__} cannot be swapped: its code adds something to the logits of"
            " its output layer"
        )


def _calling_source(model, layer: nn.Module) -> tuple[str, str]:
    """The code of the forward that calls a layer, and the layer's name in it, such as
    `self.lm_head`. The code is empty if Python has no source."""
    parent, _, name = _path(model, layer).rpartition(".")
    try:
        source = inspect.getsource(type(model.get_submodule(parent)).forward)
    except OSError:
        source = ""
    return source, f"self.{name}"


def _path(model, module: nn.Module) -> str:
    """The name of a module in a model, such as `cls.predictions.decoder`."""
    return next(path for path, found in model.named_modules() if found is module)


def _retie(model, head: ModelHead, where: str):
    """Tells transformers which tensors of the head are tied, and which stay float32 at loading."""
    tied = {}
    for name, source in (model._tied_weights_keys or {}).items():
        if name == f"{where}.weight":
            name = f"{where}.table"
        if head.bias is not None or not name.endswith("bias"):
            tied[name] = source
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    tied_now = f"{where}.table" in model.all_tied_weights_keys
    head.exact = (
        not head.is_control
        and not tied_now
        and (head.table.is_meta or head.table.dtype == torch.float32)
    )
    if not head.is_control:  # The predictions of a matched head depend on small differences.
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), where}


def _share_bias(model, head: ModelHead):
    """Gives the module around the head the head's bias, if its own was tied to the old one. RoBERTa
    ties `lm_head.bias` and `lm_head.decoder.bias`, and LUKE ties them the other way round."""
    inner, keys = f"{_path(model, head)}.bias", type(model)._tied_weights_keys or {}
    outer = keys.get(inner) or next((name for name in keys if keys[name] == inner), None)
    if outer is not None:
        owner, _, name = outer.rpartition(".")
        tied = not {inner, outer}.isdisjoint(model.all_tied_weights_keys)
        setattr(model.get_submodule(owner), name, head.bias if tied else None)


class Swapped:
    """The first base class of a swapped model. It swaps in the head of `config.harmonic`."""

    def __init__(self, config):
        super().__init__(config)
        folder = config._name_or_path
        swap_head(self, **config.harmonic)
        self.config._name_or_path = self.name_or_path = folder

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        plain = _plain(cls)
        if plain is not object:  # Many libraries look at the signature of a model's forward.

            @functools.wraps(plain.forward)
            def forward(self, *arguments, **given):
                return Swapped.forward(self, *arguments, **given)

            cls.forward = forward

    def forward(self, *arguments: Any, **given: Any) -> Any:
        """The forward of the plain model. The head computes the loss of the labels, unless it is
        not the usual one."""
        plain = super().forward
        each = given.pop("fused_lm_head", False)  # TRL's trainers
        if not each and not self._has_usual_loss(given):
            return plain(*arguments, **given)
        if arguments:
            bound = inspect.signature(plain).bind(*arguments, **given).arguments
            given = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
        if labels is None and shifted is None:
            return plain(**given)
        shift = shifted is None and self.can_generate()
        request = _Request(
            labels=labels if shifted is None else shifted,
            shift=shift,
            count=given.get("num_items_in_batch"),
            each=each,
            logits=not (self.training or each),
        )
        token = _request.set(request)
        try:
            output = plain(**given)
        finally:
            _request.reset(token)
        if request.found is None:
            raise RuntimeError(
                f"{type(self).__name__} did not call its harmonic head, so there is no loss. In its"
                f" place is a {type(self.get_output_embeddings()).__name__}. PEFT's"
                " ensure_weight_tying replaces the head: leave it out"
            )
        return request.found if each else _with_loss(output, request.found, self.training)

    def _has_usual_loss(self, given):
        """Whether the loss is the mean cross-entropy of the labels. If it is not, because of the
        model's class, its user or the arguments of a call, the plain model computes it from the
        logits."""
        router = given.get("output_router_logits")
        if router is None:
            router = getattr(self.config.get_text_config(), "output_router_logits", False)
        return (
            type(self)._usual_forward
            and not hasattr(self, "_loss_function")
            and getattr(self, "loss_type", None)
            in (None, "ForCausalLM" if self.can_generate() else "ForMaskedLM")
            and given.get("ignore_index", IGNORE_INDEX) == IGNORE_INDEX
            and given.get("entity_labels") is None  # LUKE has a second loss
            and not router
        )

    def _init_weights(self, module):
        """New values for the tensors that a folder lacks."""
        if not isinstance(module, ModelHead):
            return super()._init_weights(module)
        from transformers import initialization as init

        init.normal_(module.table, std=getattr(self.config, "initializer_range", None) or 0.02)
        if module.bias is not None:
            init.zeros_(module.bias)
        if module.log_strength is not None:
            init.constant_(module.log_strength, math.log(module.fixed_strength))
        for name, value in module.distance.parameters(module.table.shape[1]).items():
            init.copy_(module.distance_parameters[name], value)

    def _get_name(self):
        """The name of the plain class. By it, Trainer's label smoothing knows whether to shift."""
        return _plain(type(self)).__name__

    def __setattr__(self, name, value):
        """Ignores the forward that TRL's trainers set, which multiplies by the head's weight.

        `forward` above does its job.
        """
        if name == "forward" and "fused_lm_head" in getattr(
            getattr(value, "__code__", None), "co_varnames", ()
        ):
            _check_temperature(value)
        else:
            super().__setattr__(name, value)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        """For resize_token_embeddings: resizes the input embedding and the prototypes.

        Both get the same number of rows. Old rows keep their values.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        new = self._get_resized_embeddings(
            embedding, new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        new.requires_grad_(embedding.weight.requires_grad)
        tied = head.table is embedding.weight
        table = new.weight if tied else _resized_table(head.prototypes(), len(new.weight))
        tokens = (
            head.real_vocab_size
            if new_num_tokens is None and head.padded
            else new_num_tokens or len(new.weight)
        )
        self.set_input_embeddings(new)
        head.resize(table, tokens)
        _share_bias(self, head)
        if head.padded:
            self.config.harmonic["real_vocab_size"] = min(tokens, len(table))
        return new

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *arguments: Any,
        **options: Any,
    ) -> None:
        """As in transformers. config.json gets a model type of its own.

        So no plain class can silently load the folder.
        """
        head = self.get_output_embeddings()
        settings = head.settings()
        if not settings["bias"]:
            del settings["bias"]
        if head.padded:
            settings["real_vocab_size"] = head.real_vocab_size
        self.config.harmonic = settings
        # A class that came from a folder of an older version has its own file, which transformers
        # copies.
        if type(self).__reduce_ex__ is _reduce and is_main_process:
            _add_code(self, Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, *arguments, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *arguments: Any, **options: Any) -> Any:
        """As in transformers. It also reads folders of versions whose table was called `weight`."""
        options.setdefault(
            "key_mapping", {f"{name}.weight": f"{name}.table" for name in HEADS_BEFORE}
        )
        return super().from_pretrained(folder, *arguments, **options)


def _resized_table(table, rows: int):
    """Prototypes for `rows` tokens: (V, C) -> (rows, C).

    New ones have the direction of the mean prototype and the average length. The mean itself is
    shorter, so it would be nearer to every state than any old prototype.
    """
    if rows <= len(table):
        return table.detach()[:rows].clone()
    mean = table.detach().mean(0)
    new = mean * (
        table.detach().norm(dim=-1).mean() / mean.norm().clamp_min(torch.finfo(table.dtype).tiny)
    )
    return torch.cat((table.detach(), new.expand(rows - len(table), -1)))


def _check_temperature(forward):
    """Raises ValueError if TRL's forward has a temperature other than 1.

    A harmonic head scores labels at temperature 1.
    """
    temperature = inspect.getclosurevars(forward).nonlocals["temperature"]
    if temperature != 1.0:
        raise ValueError(
            f"a harmonic head scores labels at temperature 1, not {temperature}: set the trainer's"
            " temperature to 1.0"
        )


def _with_loss(output, loss, training: bool):
    """The output of a model with the head's loss in front. In training it has no logits."""
    if isinstance(output, tuple):
        return (loss, None, *output[1:]) if training else (loss, *output)
    rest = {k: v for k, v in output.items() if k != "loss" and not (k == "logits" and training)}
    return type(output)(loss=loss, **rest)


# ---- classes -----------------------------------------------------------------------------------


@functools.cache
def harmonic_class(plain: type) -> type:
    """The class of a swapped model, with the bases `Swapped` and `plain`."""
    members = {
        "__module__": __name__,
        "__reduce_ex__": _reduce,
        "register_for_auto_class": classmethod(_stay_unregistered),
        "config_class": _harmonic_config(plain.config_class),
        "_usual_forward": _is_usual(plain),
    }
    return type(f"Harmonic{plain.__name__}", (Swapped, plain), members)


def _is_usual(plain: type) -> bool:
    """Whether the forward of a class is transformers' own, and computes the loss as most do: by
    `loss_function` for a causal model, which shifts the labels."""
    from transformers import PreTrainedModel

    if plain.loss_function is not PreTrainedModel.loss_function:
        return False
    if not plain.forward.__module__.startswith("transformers."):
        return False
    try:
        source = inspect.getsource(plain.forward)
    except OSError:
        return False
    return plain.__name__.endswith("ForMaskedLM") or "self.loss_function(" in source


def _has_head(plain: type) -> bool:
    """Whether models of a class of transformers have an output layer for tokens: they name the
    tensor to which it can be tied."""
    return bool(plain._tied_weights_keys)


class _Config:
    """The first base class of the configuration of a swapped model.

    In memory the model type is the plain one, which PEFT and other libraries need. In a folder it
    is the harmonic one, unless the folder is of a model without a head, such as a classifier.
    """

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model_type": self.model_type}

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        super().save_pretrained(save_directory, *arguments, **options)
        # With push_to_hub transformers uploads only files that are newer than its start.
        for path in (Path(save_directory) / name for name in CODE):
            if path.is_file():
                path.touch()

    def to_json_string(self, *arguments: Any, **options: Any) -> str:
        import transformers

        stored = json.loads(super().to_json_string(*arguments, **options))
        stored["model_type"] = type(self).model_type
        architectures = stored.get("architectures") or [""]
        plain = getattr(transformers, architectures[0], None)
        if plain is not None and not _has_head(plain):
            stored["model_type"] = type(self).model_type.removeprefix(PREFIX)
            for key in ("harmonic", "auto_map"):
                stored.pop(key, None)
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"


@functools.cache
def _harmonic_config(plain: type) -> type:
    """The configuration class of a swapped model."""
    members = {
        "__module__": __name__,
        "__reduce_ex__": _reduce_config,
        "register_for_auto_class": classmethod(_stay_unregistered),
        "model_type": PREFIX + plain.model_type,
    }
    return type(f"Harmonic{plain.__name__}", (_Config, plain), members)


def _stay_unregistered(cls, auto_class=None):
    """Does nothing, in place of transformers' `register_for_auto_class`.

    transformers would copy the file of a registered class into each folder. `_add_code` does that.
    """


def _plain(kind: type, front: type = Swapped) -> type:
    """The class of transformers that follows `front` among the base classes of `kind`."""
    return kind.__mro__[kind.__mro__.index(front) + 1]


def _reduce(model, protocol):
    """Pickles a swapped model by its plain class, which can be imported."""
    return _made, (harmonic_class, _plain(type(model))), model.__dict__


def _reduce_config(config, protocol):
    return _made, (_harmonic_config, _plain(type(config), _Config)), config.__dict__


def _made(make, plain: type):
    kind = make(plain)
    return kind.__new__(kind)


def __getattr__(name: str):
    """Finds Harmonic classes by name, for code that pickles a class itself."""
    if name.startswith("Harmonic"):
        import transformers

        plain = getattr(transformers, name.removeprefix("Harmonic"), None)
        if isinstance(plain, type):
            return (
                _harmonic_config
                if issubclass(plain, transformers.PreTrainedConfig)
                else harmonic_class
            )(plain)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- folders -----------------------------------------------------------------------------------

# The files that a folder needs. Compiled kernels are only in the installed package.
SOURCES = (
    "__init__.py", "compiled.py", "distances.py", "head.py", "kernels.py", "links.py", "loss.py",
    "maps.py", "match.py", "pairwise.py", "precision.py", "prepared.py", "double_backward.py",
    "graph_breaks.py",
    "backends/__init__.py", "backends/autograd.py", "backends/chunked.py", "backends/mapped.py",
    "integrations/__init__.py", "integrations/modeling_harmonic.py", "integrations/transformers.py",
)  # fmt: skip


CODE = ("modeling_harmonic.py", "harmonic_files.py")  # What `write_code` writes.


def write_code(folder: Path) -> None:
    """Writes the files that `from_pretrained(folder, trust_remote_code=True)` runs: a copy of
    modeling_harmonic.py, and the text of this package."""
    package = __package__.rpartition(".")[0]
    # The package's loader reads them. If the package itself was imported from such a folder, it has
    # no files.
    texts = {f"harmonic/{name}": pkgutil.get_data(package, name).decode() for name in SOURCES}
    folder.mkdir(parents=True, exist_ok=True)
    modelling = texts["harmonic/integrations/modeling_harmonic.py"]
    (folder / "modeling_harmonic.py").write_text(modelling, encoding="utf-8")
    lines = {name: text.split("\n") for name, text in texts.items()}
    (folder / "harmonic_files.py").write_text(
        '"""The package `harmonic`, file by file. modeling_harmonic.py imports it."""\n'
        f"\nFILES = {json.dumps(lines, indent=0, ensure_ascii=False)}\n",
        encoding="utf-8",
    )


def _add_code(model, folder: Path) -> None:
    """Writes the code of a model's class into its folder, and the class names into its config."""
    import transformers

    plain = _plain(type(model))
    if getattr(transformers, plain.__name__, None) is not plain:  # The user wrote this class.
        return
    write_code(folder)
    kind = harmonic_class(plain)  # Without the prefix that FSDP adds.
    auto = "AutoModelForCausalLM" if model.can_generate() else "AutoModelForMaskedLM"
    model.config.auto_map = {
        "AutoConfig": f"modeling_harmonic.{kind.config_class.__name__}",
        auto: f"modeling_harmonic.{kind.__name__}",
    }


def load_swapped(folder: str | Path, **arguments: Any) -> Any:
    """Loads a model that `swap_head` changed and `save_pretrained` wrote.

    Args:
        folder: a folder or a name on the hub, as for from_pretrained.
        arguments: as for from_pretrained.
    Raises: ValueError for a folder that does not exist, or a model whose head was not swapped.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    path = Path(folder)
    # OWNER/NAME may be a name on the hub.
    if not path.is_dir() and (len(path.parts) != 2 or path.parent.is_dir()):
        raise ValueError(f"no folder {folder}")
    stored, _ = PreTrainedConfig.get_config_dict(folder, **arguments)
    if not stored.get("harmonic"):
        raise ValueError(f"{folder} holds no swapped head")
    plain = CONFIG_MAPPING[stored["model_type"].removeprefix(PREFIX)]
    kind = _harmonic_config(plain)
    config = arguments.pop("config", None)
    if config is None:
        config, arguments = kind.from_dict(
            {**stored, "model_type": kind.model_type}, return_unused_kwargs=True, **arguments
        )
    return harmonic_class(_stored_class(stored, plain)).from_pretrained(
        folder, config=config, **arguments
    )


def _stored_class(stored: dict, config: type) -> type:
    """The plain class of the model in a folder."""
    import transformers

    name = stored["architectures"][0].removeprefix("Harmonic")
    if hasattr(transformers, name):
        return getattr(transformers, name)
    # `interop.export` writes class names of its own.
    auto = next((key for key in stored.get("auto_map", {}) if key != "AutoConfig"), None)
    if auto is None:
        raise ValueError(
            f"the folder holds a {name}, which is no class of transformers: load it with"
            f" harmonic.integrations.transformers.harmonic_class({name}).from_pretrained(folder)"
        )
    return getattr(transformers, auto)._model_mapping[config]


class _Types(dict):
    """The table of additional model types in transformers, with a `harmonic_X` for every type X."""

    def __init__(self, mapping):
        super().__init__(mapping._extra_content)
        self.mapping = mapping

    def __contains__(self, key):
        return (
            super().__contains__(key)
            or str(key).startswith(PREFIX)
            and str(key).removeprefix(PREFIX) in self.mapping._mapping
        )

    def __missing__(self, key):
        from transformers.models.auto import modeling_auto

        plain = self.mapping[key.removeprefix(PREFIX)]
        self[key] = _harmonic_config(plain)
        for name, auto in vars(modeling_auto).items():
            model = (
                getattr(auto, "_model_mapping", {}).get(plain, None)
                if name.startswith("AutoModel")
                else None
            )
            if isinstance(model, type):
                headed = name in ("AutoModelForCausalLM", "AutoModelForMaskedLM")
                headed = headed or _has_head(model)  # It must not be read as a plain model.
                auto._model_mapping.register(
                    self[key], harmonic_class(model) if headed else model, exist_ok=True
                )
        return self[key]


def _add_types(module):
    module.CONFIG_MAPPING._extra_content = _Types(module.CONFIG_MAPPING)


class _Watcher(importlib.abc.MetaPathFinder):
    """Adds the types when transformers' table is imported.

    So `import harmonic` does not have to import transformers, which takes a second.
    """

    looking = False

    def find_spec(self, name, path, target=None):
        if name != AUTO or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec:
            execute = spec.loader.exec_module

            def execute_and_add(module):
                execute(module)
                _add_types(module)

            spec.loader.exec_module = execute_and_add
        return spec


# Not in the copy of this file that an exported model has.
if __name__ == "harmonic.integrations.transformers":
    if AUTO in sys.modules:
        _add_types(sys.modules[AUTO])
    else:
        sys.meta_path.insert(0, _Watcher())


class _Enough(Exception):
    pass


@torch.no_grad()
def _states(model, unembedding, ids):
    """The hidden states (N, C) that reach the output layer of a model for token ids.

    The output layer itself is not computed.
    """
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(
            "match_to: expected token ids of real text, a tensor of integers (texts, length)"
        )
    rows = len(model.get_input_embeddings().weight)
    if ids.numel() and not 0 <= ids.min() <= ids.max() < rows:
        raise ValueError(
            f"match_to has ids from {ids.min()} to {ids.max()}; the model has {rows} tokens"
        )
    seen = []

    def take(_, inputs):
        seen.append(inputs[0])
        raise _Enough

    hook = unembedding.register_forward_pre_hook(take)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()(input_ids=ids)
    except _Enough:
        return seen[0].reshape(-1, seen[0].shape[-1])
    finally:
        hook.remove()
        for module, before in training.items():
            module.training = before
