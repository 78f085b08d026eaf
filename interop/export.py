"""A run as a folder in Hugging Face's format: configuration, safetensors, tokenizer, model card.

    python -m interop.export out/run --to=DIR

cross_entropy becomes transformers' own GPT2LMHeadModel, BertForMaskedLM, Qwen2ForCausalLM or
Qwen3ForCausalLM. A harmonic head is kept by a small modelling file in the folder:
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True). `--init_from=DIR` reads either
back.
"""

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from base.command_line import cli, parse
from base.errors import UserError
from interop.pretrained import ACTIVATIONS, HEADS, TABLES, TRUNK, layout
from model import Model, ModelConfig
from text.token_files import tokenizer_folder
from text.tokenizers import MASK, Tokenizer, load_tokenizer, rust_tokenizer
from training import checkpoint
from training.telemetry import energy, read_metrics

PACKAGE = Path(__file__).resolve().parent.parent / "harmonic"
# Of the package, what a head needs without its compiled kernels.
PARTS = (
    "distances.py", "head.py", "kernels.py", "links.py", "loss.py", "maps.py", "match.py",
    "pairwise.py", "precision.py",
    "backends/__init__.py", "backends/autograd.py", "backends/chunked.py", "backends/mapped.py",
    "integrations/transformers.py",
)  # fmt: skip
CLASSES = {
    "gpt2": ("GPT2LMHeadModel", "HarmonicGPT2"),
    "bert": ("BertForMaskedLM", "HarmonicBert"),
    "qwen2": ("Qwen2ForCausalLM", "HarmonicQwen2"),
    "qwen3": ("Qwen3ForCausalLM", "HarmonicQwen3"),
}


@dataclass
class ExportConfig:
    """Export"""

    run: list[str] = field(default_factory=list)
    """the run's folder"""
    to: str | None = None
    """the folder to write, which must not exist"""
    checkpoint: Literal["newest", "best"] = "newest"
    """which checkpoint"""

    def problems(self) -> list[str]:
        found = [] if len(self.run) == 1 else ["name one run's folder, such as out/run"]
        if self.to is None:
            found.append("name the folder to write with --to=DIR")
        elif Path(self.to).exists():
            found.append(f"to={self.to} exists already: name another folder")
        elif not Path(self.to).resolve().parent.is_dir():
            found.append(
                f"to={self.to}: the folder {Path(self.to).resolve().parent} does not exist"
            )
        return found


def kind_of(c: ModelConfig) -> str:
    """transformers' model type."""
    return {"gpt": "gpt2", "bert": "bert"}.get(c.arch) or ("qwen3" if c.qk_norm else "qwen2")


def config_of(c: ModelConfig, tokenizer: Tokenizer):
    """A model's configuration as transformers'."""
    import transformers

    from interop import modeling_harmonic

    kind = kind_of(c)
    settings = dict(
        vocab_size=c.vocab_size,
        tie_word_embeddings=c.tie_weights,
        bos_token_id=tokenizer.eot_id,
        eos_token_id=tokenizer.eot_id,
    )
    if kind == "gpt2":
        settings |= dict(
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            n_positions=c.block_size,
            n_inner=c.mlp_width(),
        )
        settings["activation_function"] = {v: k for k, v in ACTIVATIONS.items()}[
            c.activation or "gelu_tanh"
        ]
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    else:
        settings |= dict(
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            hidden_size=c.n_embd,
            intermediate_size=c.mlp_width(),
        )
        settings["max_position_embeddings"] = c.block_size
    if kind == "bert":
        settings["hidden_act"] = {v: k for k, v in ACTIVATIONS.items()}[c.activation or "gelu"]
        settings |= dict(
            hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout, pad_token_id=None
        )
    elif kind != "gpt2":
        settings |= dict(
            num_key_value_heads=c.n_kv_head or c.n_head,
            head_dim=c.attention_width(),
            attention_dropout=c.dropout,
        )
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.head == "cross_entropy":
        return transformers.CONFIG_MAPPING[kind](**settings)
    own = ("impl", "skip", "precision", "init_std")  # no part of the function
    arguments = {
        k: v for k, v in c.head_arguments().items() if k not in own and v not in (None, False)
    }
    if c.real_vocab_size < c.vocab_size:
        arguments["real_vocab_size"] = c.real_vocab_size
    named = CLASSES[kind][1]
    settings["auto_map"] = {
        "AutoConfig": f"modeling_harmonic.{named}Config",
        auto_class(c): f"modeling_harmonic.{named}",
    }
    return getattr(modeling_harmonic, f"{named}Config")(
        **settings, harmonic={"name": c.head, **arguments}
    )


@torch.no_grad()
def model_of(model: Model, tokenizer: Tokenizer):
    """The same model as transformers', without padded rows."""
    import transformers

    from interop import modeling_harmonic

    rows = model.config.real_vocab_size
    if not model.config.architecture.causal:
        rows = max(rows, tokenizer.mask_id + 1)
    c = replace(model.config, vocab_size=rows)
    if not model.head.is_control:
        c.scale, c.exponent = None, None
        setattr(c, model.head.strength_name, float(model.head.strength))
    if c.arch != "qwen" and (
        c.n_kv_head not in (0, c.n_head) or c.head_dim not in (0, c.n_embd // c.n_head)
    ):
        raise UserError(
            f"transformers' {kind_of(c)} has neither n_kv_head={c.n_kv_head} nor"
            f" head_dim={c.head_dim}"
        )
    if c.qk_norm and c.has_bias():
        raise UserError("transformers' qwen3 has no bias on Q, K and V alone (bias=true)")
    own, tensors = checkpoint.own_weights(model), {}
    for name, where in layout(c).items():
        part = own[name].detach()
        for theirs, tensor in where.split(part[:rows] if name in TABLES else part).items():
            tensors[("" if theirs.startswith(("lm_head", "cls.")) else TRUNK[c.arch]) + theirs] = (
                tensor
            )
    if c.head != "cross_entropy":
        tensors[f"{HEADS[c.arch]}.table"] = tensors.pop(f"{HEADS[c.arch]}.weight")
    if (
        "cls.predictions.bias" in tensors
    ):  # a mask token beyond the vocabulary is read, never predicted
        tensors["cls.predictions.bias"][c.real_vocab_size :] = torch.finfo(torch.float32).min
    plain, harmonic = CLASSES[kind_of(c)]
    made = (
        getattr(transformers, plain)
        if c.head == "cross_entropy"
        else getattr(modeling_harmonic, harmonic)
    )(config_of(c, tokenizer))
    lost, over = made.load_state_dict(tensors, strict=False)
    tied = {*made.all_tied_weights_keys, *made.all_tied_weights_keys.values()}
    lost = [
        name for name in lost if name not in tied and not name.endswith("bias")
    ]  # biases that this model does without start as zeros
    if lost or over:
        raise UserError(
            f"transformers {transformers.__version__} has another {type(made).__name__}:"
            f" {', '.join(lost + over)}"
        )
    return made.eval()


def write_parts(folder: Path):
    """The modelling file, and the parts of the package `harmonic` beside it: transformers copies
    single files, hence their flat names."""
    for part in PARTS:
        text = (PACKAGE / part).read_text()
        text = re.sub(r"from harmonic\.(?:\w+\.)?(\w+) import", r"from .harmonic_\1 import", text)
        name = part.replace("/__init__", "").rpartition("/")[2]
        (folder / f"harmonic_{name}").write_text(text)
    shutil.copyfile(
        Path(__file__).with_name("modeling_harmonic.py"), folder / "modeling_harmonic.py"
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int, masked: bool, source):
    """The run's tokenizer as transformers': it adds no special tokens, as in training."""
    import transformers

    options = (
        {"unk_token": tokenizer.decode_token(tokenizer.unk_id).strip()}
        if tokenizer.unk_id is not None
        else {}
    )
    end = tokenizer.decode_token(tokenizer.eot_id).strip()
    if tokenizer.mask_id < tokenizer.vocab_size:
        options["mask_token"] = tokenizer.decode_token(tokenizer.mask_id).strip()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust_tokenizer(tokenizer.name, source),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=longest,
        **options,
    )
    if masked and tokenizer.mask_id == tokenizer.vocab_size:
        made.add_special_tokens({"mask_token": MASK})
    made.save_pretrained(folder)


CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [{arch}, harmonic-loss, {head}]{base}
---
# {name}

{arch}, {n_layer} layers, {n_embd} wide, {parameters:.2f} M parameters, contexts of {block_size} tokens. {about}

```python
from transformers import {auto}, AutoTokenizer, pipeline

model = {auto}.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
pipe = pipeline("{task}", model=model, tokenizer=tokenizer)
```

The tokenizer ({tokenizer}) adds no special tokens: the model was trained without.{documents}

## Results after {iterations:,} iterations

Negative log likelihood in nats per {what}, unsmoothed, over a fixed set of validation windows of `{dataset}`.

| | |
|---|---|
{results}
| energy of training | {energy} |

## Training

PyTorch {torch}, processes: {world_size}, device: {device}, commit {git_commit}.

| setting | |
|---|---|
{settings}
"""  # noqa: E501


def card(run: Path, model: Model, stored: dict, manifest: dict, name: str) -> str:
    """The model card: what it is, how it was trained, what came of it."""
    evaluated = [m for m in read_metrics(run) if "val_loss" in m and m["iter"] <= manifest["iter"]]
    results = [
        (k, evaluated[-1][k])
        for k in ("val_loss", "perplexity", "bits_per_byte")
        if evaluated and k in evaluated[-1]
    ]
    try:
        environment = json.loads((run / "environment.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run}/environment.json cannot be read ({error}): the model card tells what the run"
            " was made with"
        ) from None
    used = energy(run)
    masked = stored["arch"] == "bert"
    link = (
        ""
        if model.head.is_control
        else f": a token's logit is `{'-n log d' if model.head.is_harmonic else '-s d'}(h, w)`"
    )
    return CARD.format(
        **{k: v for k, v in stored.items() if k != "tie_weights"},
        **{k: environment[k] for k in ("world_size", "git_commit")},
        base=f"\nbase_model: {stored['source']}" if stored.get("source") else "",
        task="fill-mask" if masked else "text-generation",
        auto=auto_class(model.config),
        trust=trust(model.config),
        name=name,
        parameters=model.parameter_count() / 1e6,
        about=f"Unembedding: {model.head.extra_repr()}{link}.",
        documents=" It saw each document alone (`doc_mask`): give it one at a time."
        if stored["doc_mask"]
        else "",
        iterations=manifest["iter"],
        what="masked token" if masked else "token",
        results="\n".join(f"| {k.replace('_', ' ')} | {v:.4f} |" for k, v in results),
        energy="not measured" if used is None else consumed(used, stored["emissions_country"]),
        torch=environment["versions"]["torch"],
        settings="\n".join(f"| `{k}` | {v} |" for k, v in stored.items() if v is not None),
    )


def consumed(used: dict, country: str) -> str:
    return (
        f"{1000 * used['energy_consumed']:.2f} Wh, {1000 * used['emissions']:.2f} g CO2e"
        f" (CodeCarbon, {country})"
    )


def auto_class(c: ModelConfig) -> str:
    return "AutoModelForCausalLM" if c.architecture.causal else "AutoModelForMaskedLM"


def trust(c: ModelConfig) -> str:
    return "" if c.head == "cross_entropy" else ", trust_remote_code=True"


def main():
    (c,) = parse(sys.argv[1:], ExportConfig, words="run")
    run, to = Path(c.run[0]), Path(c.to)
    model, stored, manifest = checkpoint.load_run(run, "cpu", c.checkpoint)
    folder = tokenizer_folder(run, stored["dataset"])
    tokenizer = load_tokenizer(stored["tokenizer"], folder)
    from transformers import logging

    logging.disable_progress_bar()
    aside = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        aside.mkdir()
        model_of(model, tokenizer).save_pretrained(aside)
        if model.config.head != "cross_entropy":
            write_parts(aside)
        write_tokenizer(
            tokenizer, aside, model.config.block_size, not model.config.architecture.causal, folder
        )
        (aside / "README.md").write_text(card(run, model, stored, manifest, to.name))
        os.replace(aside, to)
    except OSError as error:
        raise UserError(f"to={to} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(
        f"wrote {to}: {auto_class(model.config)}.from_pretrained({str(to)!r}{trust(model.config)})"
    )


if __name__ == "__main__":
    cli(main)
