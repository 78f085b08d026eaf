"""Writes a run as a folder in Hugging Face's format: config, safetensors, tokenizer, model card.

    python -m interop.export out/run --to=DIR

A cross_entropy model becomes transformers' own GPT2LMHeadModel, BertForMaskedLM, Qwen2ForCausalLM
or Qwen3ForCausalLM. For a harmonic head the folder also holds code. You load it with
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True). `--init_from=DIR` reads both.

    python -m interop.export out/run --to=DIR --linear

This writes an ordinary GPT-2 or Qwen model, without code, that ranks all tokens as the head does.
It works for heads whose ranking is linear in the hidden state (see `interop.linear`).
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from base.command_line import cli, parse
from base.errors import UserError
from harmonic import HarmonicHead
from harmonic.integrations.transformers import harmonic_class
from interop import linear
from interop.formats import Format, format_of
from interop.pretrained import TABLES, layout
from model import Model, ModelConfig
from text.token_files import Data, data_folder, load_data, tokenizer_folder
from text.tokenizers import MASK, Tokenizer, load_tokenizer, rust_tokenizer
from training import checkpoint
from training.emissions import energy
from training.metrics import read_metrics

# Arguments of a head that do not change its logits.
COMPUTING = ("impl", "skip", "precision", "init_std")


@dataclass
class ExportConfig:
    """Export"""

    run: list[str] = field(default_factory=list)
    """the run's folder"""
    to: str | None = None
    """the folder to write, which must not exist"""
    checkpoint: Literal["newest", "best"] = "newest"
    """which checkpoint"""
    linear: bool = False
    """write an ordinary output layer that ranks tokens as the head does, and no code"""
    dataset: str | None = None
    """with linear: fit the probabilities on the validation text of this prepared data (a folder
    under data/, or a path); null = the data that the run was trained on"""

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
        if self.dataset is not None and not self.linear:
            found.append(f"dataset={self.dataset} does nothing without linear=true")
        return found


def build(c: ModelConfig, tokenizer: Tokenizer) -> Any:
    """A model of transformers for this configuration, with new weights."""
    import transformers

    form = format_of(c)
    end = tokenizer.eot_id
    settings = form.write(c) | {"bos_token_id": end, "eos_token_id": end}
    kind = getattr(transformers, form.model)
    if c.head != "cross_entropy":
        kind = harmonic_class(kind)
        settings["harmonic"] = {"name": c.head}
        for key, value in c.head_arguments().items():
            if key not in COMPUTING and value not in (None, False):
                settings["harmonic"][key] = value
        if c.real_vocab_size < c.vocab_size:
            settings["harmonic"]["real_vocab_size"] = c.real_vocab_size
    return kind(kind.config_class(**settings))


def check_format(c: ModelConfig, form: Format) -> None:
    """Raises UserError for settings that the model of transformers does not support."""
    grouped = c.n_kv_head not in (0, c.n_head) or c.head_dim not in (0, c.n_embd // c.n_head)
    if grouped and not form.rotary:
        raise UserError(
            f"transformers' {form.model_type} supports neither n_kv_head={c.n_kv_head} nor"
            f" head_dim={c.head_dim}"
        )
    if c.qk_norm and c.has_bias():
        raise UserError(
            f"transformers' {form.model_type} has no bias on Q, K and V alone (bias=true)"
        )


@torch.no_grad()
def model_of(model: Model, tokenizer: Tokenizer) -> Any:
    """The same model in transformers, without padded rows. UserError if that is impossible."""
    import transformers

    form = format_of(model.config)
    rows = model.config.real_vocab_size
    if form.masked:  # The mask may be a token beyond the vocabulary.
        rows = max(rows, tokenizer.mask_id + 1)
    c = replace(model.config, vocab_size=rows)
    if model.head.strength_name is not None:
        c.scale, c.exponent = None, None
        setattr(c, model.head.strength_name, float(model.head.strength))
    check_format(c, form)
    made = build(c, tokenizer)
    lost, over = made.load_state_dict(tensors_of(model, c), strict=False)
    tied = {*made.all_tied_weights_keys, *made.all_tied_weights_keys.values()}
    # Biases that this model does not have start as zeros.
    lost = [name for name in lost if name not in tied and not name.endswith("bias")]
    if lost or over:
        raise UserError(
            f"transformers {transformers.__version__} names the tensors of {type(made).__name__} in"
            f" another way ({', '.join(lost + over)}): install the version of requirements.txt"
        )
    return made.eval()


def tensors_of(model: Model, c: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights of a model by their names in transformers, with the number of rows in `c`."""
    form, own, found = format_of(c), checkpoint.own_weights(model), {}
    for name, where in layout(c).items():
        part = own[name].detach()
        if name in TABLES:
            part = part[: c.vocab_size]
        for theirs, tensor in where.split(part).items():
            trunk = "" if name.startswith(("head.", "transform.")) else form.trunk
            found[trunk + theirs] = tensor
    if c.head != "cross_entropy":
        found[f"{form.head}.table"] = found.pop(f"{form.head}.weight")
    if form.head_bias in found:  # A mask token beyond the vocabulary is never predicted.
        found[form.head_bias][c.real_vocab_size :] = torch.finfo(torch.float32).min
        found[f"{form.head}.bias"] = found[form.head_bias]  # which an untied BERT uses
    return found


def write_tokenizer(tokenizer: Tokenizer, folder: Path, c: ModelConfig, source: Path) -> None:
    """Writes the tokenizer of a run for transformers. As in training, it adds no special tokens.

    source: the folder that holds the file of a trained tokenizer.
    """
    import transformers

    options = {}
    if tokenizer.unk_id is not None:
        options["unk_token"] = tokenizer.decode_token(tokenizer.unk_id).strip()
    end = tokenizer.decode_token(tokenizer.eot_id).strip()
    if tokenizer.mask_id < tokenizer.vocab_size:
        options["mask_token"] = tokenizer.decode_token(tokenizer.mask_id).strip()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust_tokenizer(tokenizer.name, source),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=c.block_size,
        **options,
    )
    if format_of(c).masked and tokenizer.mask_id == tokenizer.vocab_size:
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


LINEAR = """

This is a linear export: an ordinary unembedding stands in for the head. It ranks all tokens as the head does, so greedy text and the candidates of top-k are the same.
Its probabilities are not the head's: the KL divergence is {kl:.2e} nats a token, on {states:,} tokens of the validation text of `{data}`. The results below are those of the head itself."""  # noqa: E501


def about_head(head: HarmonicHead) -> str:
    """What the model card says about the head."""
    logit = ""
    if not head.is_control:
        formula = "-n log d" if head.is_harmonic else "-s d"
        logit = f": a token's logit is `{formula}(h, w)`"
    return f"Unembedding: {head.extra_repr()}{logit}."


def card(
    run: Path,
    model: Model,
    stored: dict[str, Any],
    manifest: dict[str, Any],
    name: str,
    about: str,
) -> str:
    """The text of the model card: the model, its training and its results.

    model: the one in the folder. about: what the card says about its head.
    Raises: UserError if the run's environment.json cannot be read.
    """
    evaluated = [m for m in read_metrics(run) if "val_loss" in m and m["iter"] <= manifest["iter"]]
    last = evaluated[-1] if evaluated else {}
    results = [
        f"| {key.replace('_', ' ')} | {last[key]:.4f} |"
        for key in ("val_loss", "perplexity", "bits_per_byte")
        if key in last
    ]
    try:
        environment = json.loads((run / "environment.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run}/environment.json cannot be read ({error}), and the model card needs it: copy"
            " it from the run again"
        ) from None
    form, documents, base = format_of(model.config), "", ""
    if stored["doc_mask"]:
        documents = " It saw each document alone (`doc_mask`): give it one at a time."
    if stored.get("source") and not Path(stored["source"]).exists():  # a name on the hub
        base = f"\nbase_model: {stored['source']}"
    return CARD.format(
        **{k: v for k, v in stored.items() if k != "tie_weights"},
        **{k: environment[k] for k in ("world_size", "git_commit")},
        base=base,
        task=form.task,
        auto=form.auto_class,
        trust=trust(model.config),
        name=name,
        parameters=model.parameter_count() / 1e6,
        about=about,
        documents=documents,
        iterations=manifest["iter"],
        what="masked token" if form.masked else "token",
        results="\n".join(results),
        energy=consumed(energy(run), stored["emissions_country"]),
        torch=environment["versions"]["torch"],
        settings="\n".join(f"| `{k}` | {v} |" for k, v in stored.items() if v is not None),
    )


def consumed(used: dict[str, float] | None, country: str) -> str:
    """Energy and emissions in words, or `not measured`."""
    if used is None:
        return "not measured"
    return (
        f"{1000 * used['energy_consumed']:.2f} Wh, {1000 * used['emissions']:.2f} g CO2e"
        f" (CodeCarbon, {country})"
    )


def trust(c: ModelConfig) -> str:
    """The argument of from_pretrained that lets the code in a folder run, if there is code."""
    return "" if c.head == "cross_entropy" else ", trust_remote_code=True"


def validation_data(c: ExportConfig, stored: dict[str, Any]) -> Data:
    """The data on whose validation text a linear export is fitted. UserError if it is missing."""
    folder = data_folder(c.dataset or stored["dataset"])
    if not folder.is_dir():
        raise UserError(
            f"no data folder {folder}: linear=true fits probabilities on its validation text. Name"
            " its place on this machine with --dataset=FOLDER"
        )
    return load_data(folder, stored["tokenizer"])


def export(c: ExportConfig) -> None:
    """Writes the folder completely or not at all, and prints how to load it."""
    assert c.to is not None  # `problems` has checked it.
    run, to = Path(c.run[0]), Path(c.to)
    model, stored, manifest = checkpoint.load_run(run, "cpu", c.checkpoint)
    source = tokenizer_folder(run, stored["dataset"])
    tokenizer = load_tokenizer(stored["tokenizer"], source)
    about, fitted = about_head(model.head), ""
    if c.linear and linear.is_dot_product(model.head.distance):
        fitted = f"; head={stored['head']} is linear already, so this is the plain export"
    elif c.linear:
        linear.check_model(model)
        data = validation_data(c, stored)
        model, kl = linear.linearize(model, data)
        about += LINEAR.format(kl=kl, states=linear.STATES, data=data.folder.name)
        fitted = f"; KL divergence from the head's probabilities: {kl:.2e} nats a token"
    from transformers import logging

    logging.disable_progress_bar()
    aside = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        aside.mkdir()
        model_of(model, tokenizer).save_pretrained(aside)
        write_tokenizer(tokenizer, aside, model.config, source)
        text = card(run, model, stored, manifest, to.name, about)
        (aside / "README.md").write_text(text)
        os.replace(aside, to)
    except OSError as error:
        raise UserError(f"to={to} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    auto = format_of(model.config).auto_class
    print(f"wrote {to}: {auto}.from_pretrained({str(to)!r}{trust(model.config)}){fitted}")


def main() -> None:
    (c,) = parse(sys.argv[1:], ExportConfig, words="run")
    export(c)


if __name__ == "__main__":
    cli(main)
