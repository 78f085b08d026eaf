"""Configuration: flat typed dataclasses filled from a YAML file and from `--key=value` flags.

A script declares what it takes as dataclasses whose fields carry a docstring each, and calls
`parse`. Types and help come from jsonargparse. Whatever is wrong, in the file and on the command
line, is gathered into one message; `cli` prints it and exits with status 2, so that a user sees
every mistake at once and never a traceback.
"""

import argparse
import codecs
import dataclasses
import difflib
import functools
import inspect
import io
import json
import os
import re
import sys
import typing
from pathlib import Path

import jsonargparse
import yaml

from training.files import write_whole

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclasses.dataclass
class TrainConfig:
    """The run"""

    dataset: str = "wiki"
    """a folder under data/, or a path"""
    tokenizer: str | None = None
    """names the tokenizer of .bin files without meta.json (nanoGPT's own)"""
    batch_size: int = 12
    """windows of a micro-batch; batch_size * gradient_accumulation_steps windows make an iteration,
    whatever the number of processes"""
    gradient_accumulation_steps: int = 1
    """micro-batches of an iteration, over all processes together"""
    max_iters: int = 1000
    """iterations to train"""
    learning_rate: float = 6e-4
    """peak learning rate"""
    min_lr: float | None = None
    """learning rate at the end of the decay; null = learning_rate / 10"""
    warmup_iters: int = 100
    """iterations of linear warm-up"""
    lr_decay_iters: int | None = None
    """iteration at which the cosine decay ends; null = max_iters"""
    weight_decay: float = 0.1
    """AdamW's decay of weight matrices"""
    prototype_decay: float | None = None
    """AdamW's decay of the prototypes, which it pulls to the origin; null = weight_decay"""
    beta1: float = 0.9
    """AdamW's beta1"""
    beta2: float = 0.95
    """AdamW's beta2"""
    grad_clip: float = 1.0
    """clip the global gradient norm at this; 0 = never"""
    eval_interval: int = 200
    """iterations between evaluations (and checkpoints)"""
    eval_iters: int = 20
    """validation batches of batch_size windows: a fixed set, spread evenly over the split"""
    log_interval: int = 10
    """iterations between console lines; metrics.jsonl has every iteration"""
    eval_only: bool = False
    """evaluate once and stop"""
    init_from: str = "scratch"
    """scratch; resume (goes on from out_dir's newest checkpoint); auto (resume if there is one); or
    a model to start from, which is scratch
    with that --source"""
    source: str | None = None
    """a model to start from: a name on the Hugging Face hub (gpt2, bert-base-uncased, OWNER/NAME),
    a folder in its format, nanoGPT's
    ckpt.pt, a run's folder. Another --head than its own is matched to the model's softmax"""
    out_dir: str = "out/run"
    """the run's folder"""
    overwrite: bool = False
    """delete the run that out_dir holds"""
    new_data_order: bool = False
    """resume although batch_size, gradient_accumulation_steps, seed or the dataset differ: from
    then on the windows come in another order,
    so some are read twice in this epoch and others not at all"""
    seed: int = 1337
    """determines weights, data order, noise and dropout"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    dtype: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the trunk (autocast); auto = bfloat16 where a GPU has it, else float32.
    Distances are float32 always"""
    compile: bool = True
    """torch.compile the trunk (on a CPU this needs a C++ compiler)"""
    backend: typing.Literal["auto", "nccl", "gloo"] = "auto"
    """between processes: auto = nccl on GPUs, gloo on CPUs"""
    parallel: typing.Literal["ddp", "fsdp"] = "ddp"
    """how processes share the model: ddp (each holds all of it) or fsdp (each holds a part of
    weights, gradients and optimiser)"""
    timeout: float = 600.0
    """seconds that a process waits for another one before it gives up"""
    activation_checkpointing: bool = False
    """compute each block's activations again in the backward pass: less memory, about a third more
    time"""
    on_nan: typing.Literal["stop", "skip"] = "stop"
    """a loss or gradient that is not finite: stop the run, or skip the step (this looks at every
    step's norm, which a GPU waits for)"""
    verify_resume: bool = False
    """instead of training: train some 20 iterations whole, and again killed and resumed, and say
    whether they are equal bit for bit"""
    tensorboard: bool = False
    """also log to TensorBoard, in out_dir/tensorboard"""
    wandb: bool = False
    """also log to Weights & Biases"""
    emissions: bool = True
    """measure energy with CodeCarbon (offline)"""
    emissions_country: str = "USA"
    """ISO 3166 alpha-3 code of the country whose electricity is used, for kg CO2e"""

    def problems(self) -> list[str]:
        found = [
            f"{key}={getattr(self, key)} must be at least {least}"
            for key, least in dict(
                batch_size=1,
                gradient_accumulation_steps=1,
                max_iters=0,
                warmup_iters=0,
                eval_interval=1,
                eval_iters=1,
                log_interval=1,
            ).items()
            if getattr(self, key) < least
        ]
        if not self.timeout > 0:
            found.append(f"timeout={self.timeout} must be positive")
        if self.parallel == "fsdp" and self.dtype == "float16":
            found.append("parallel=fsdp does not scale losses as dtype=float16 needs: use bfloat16")
        for key in ("weight_decay", "prototype_decay", "grad_clip", "min_lr"):
            if getattr(self, key) is not None and getattr(self, key) < 0:
                found.append(f"{key}={getattr(self, key)} must not be negative")
        if not 0 <= self.seed < 2**31:
            found.append(f"seed={self.seed} is not in 0..{2**31 - 1}")
        if not self.out_dir:
            found.append("out_dir is empty: name a folder")
        if not re.fullmatch("[A-Z]{3}", self.emissions_country):
            found.append(
                f"emissions_country={self.emissions_country}: expected a code of three letters,"
                " such as USA, DEU or IND"
            )
        if not self.learning_rate > 0:
            found.append(f"learning_rate={self.learning_rate} must be positive")
        found += [
            f"{key}={getattr(self, key)} is not in [0, 1)"
            for key in ("beta1", "beta2")
            if not 0 <= getattr(self, key) < 1
        ]
        if self.lr_decay_iters is not None and self.lr_decay_iters < self.warmup_iters:
            found.append(
                f"lr_decay_iters={self.lr_decay_iters} ends before warmup_iters={self.warmup_iters}"
            )
        return found


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that leaves the examples in a script's docstring as they are written."""


class UserError(ValueError):
    """Something the user can mend. `cli` prints it without a traceback and exits with status 2."""


def nearest(name: str, names) -> str:
    """`'; did you mean X?'` for the valid name most like `name`, or the list of names when nothing
    is like it."""
    names = [str(n) for n in names]
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(names)}"


def check(problems: list[str]):
    """Raises one UserError that lists all `problems`, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))


def show_bytes(error: UnicodeEncodeError) -> tuple[str, int]:
    """An error handler that prints a file name that is not UTF-8: `caf\\xe9.txt`. Python holds such
    a byte as U+DCE9."""
    rest = error.object[error.start : error.end]
    if not all("\udc80" <= character <= "\udcff" for character in rest):
        return codecs.backslashreplace_errors(
            error
        )  # characters that the terminal's encoding lacks
    return rest.encode("ascii", "surrogateescape").decode("ascii", "backslashreplace"), error.end


codecs.register_error("show_bytes", show_bytes)


def cli(main: typing.Callable):
    """Runs `main()`; a UserError becomes its message on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="show_bytes")
    try:
        main()
    except UserError as error:
        script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent.parent
        name = script.name
        if script.is_relative_to(root) and script.parent != root:  # in a room: run as a module
            name = f"python -m {'.'.join(script.relative_to(root).with_suffix('').parts)}"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one message a machine, not one a process
            print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (
        BrokenPipeError
    ):  # the reader (head, less) went away; leave without the interpreter's complaint at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def read_yaml(path) -> dict:
    """The flat mapping in a YAML file. UserError when it is missing, not YAML or not a flat
    mapping."""
    path = Path(path)
    if not path.is_file():
        there = sorted(
            {str(p) for folder in (path.parent, Path("configs")) for p in folder.glob("*.yaml")}
        )
        raise UserError(f"no config file {path}{nearest(path, there) if there else ''}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise UserError(f"{path}: expected flat `key: value` lines")
    return values


def known(stored: dict, where, *schemas) -> dict:
    """A stored configuration without the keys that no schema has, such as those of another version;
    a note on stderr names them."""
    names = {f.name for schema in schemas for f in dataclasses.fields(schema)}
    strange = [key for key in stored if key not in names]
    if strange:
        _note_once(
            f"{where} has settings of another version, which are ignored:"
            f" {', '.join(map(str, strange))}"
        )
    return {key: value for key, value in stored.items() if key in names}


@functools.cache
def _note_once(text: str):
    """Prints a note on stderr, the first time that it is to be printed: several parts of a program
    read the same file."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one note a machine, not one a process
        print(f"note: {text}", file=sys.stderr)


def write_yaml(path, *configs):
    """Writes every field of the given dataclasses as one flat YAML file."""
    merged = {k: v for c in configs for k, v in dataclasses.asdict(c).items()}
    write_whole(Path(path), yaml.safe_dump(merged, sort_keys=False))


def split_flags(
    argv: list[str], switches: set[str], known=()
) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits a command line into positional words and (key, value) pairs.

    `--key=value` and `--key value` both work; a key in `switches` (the bool fields) may stand alone
    and means true.
    """
    words, flags, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals and key in switches:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals and (not known or key in known) and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals:
            value = None
        flags.append((key, value))
    return words, flags


def parse(
    argv: list[str],
    *schemas,
    words: str | None = None,
    config_file: bool = False,
    base: dict | None = None,
) -> list:
    """Fills one instance of each dataclass in `schemas` from a command line.

    Args:
        argv: the words after the script's name.
        schemas: dataclasses with disjoint field names. One with a method `problems() -> list[str]`
            is asked for impossible values.
        words: name of the list field that takes positional words (such as run folders); None when
            there are none.
        config_file: the first positional word is a YAML file that the flags override.
        base: values that stand below the file and the flags, such as a stored run's configuration.
    Raises: UserError listing every unknown key (with the nearest valid one), wrong type and
        impossible value.
    """
    fields = {f.name: f for s in schemas for f in dataclasses.fields(s)}
    types = {name: hint for s in schemas for name, hint in typing.get_type_hints(s).items()}
    doc = inspect.cleandoc(
        sys.modules["__main__"].__doc__ or ""
    )  # the script's own: what it does, and examples
    parser = jsonargparse.ArgumentParser(description=doc, exit_on_error=False, formatter_class=Help)
    for schema in schemas:
        parser.add_class_arguments(schema, fail_untyped=True)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        sys.exit(0)

    positional, flags = split_flags(argv, {n for n in fields if types[n] is bool}, fields)
    problems, values = [], {}
    given = [("config.yaml", k, v) for k, v in (base or {}).items()]
    if config_file and positional:
        path = positional.pop(0)
        given += [(path, k, v) for k, v in read_yaml(path).items()]
    given += [("", k, v) for k, v in flags]
    for origin, key, value in given:
        where = f"{origin}: " if origin else "--"
        if key not in fields:
            problems.append(f"{where}{key}: unknown key{nearest(key, fields)}")
            continue
        if value is None and not origin:
            problems.append(f"--{key} needs a value: --{key}=...")
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if words == key and origin == "":
            values.setdefault(key, []).append(value)
            continue
        try:
            values[key] = getattr(parser.parse_args([f"--{key}={text}"]), key)
        except (jsonargparse.ArgumentError, ValueError, TypeError):
            choices = (
                typing.get_args(types[key])
                if typing.get_origin(types[key]) is typing.Literal
                else None
            )
            if choices:
                problems.append(f"{where}{key}={text}: unknown {key}{nearest(text, choices)}")
            else:
                problems.append(f"{where}{key}={text}: expected {describe(types[key])}")
    if positional and words is None:
        problems.append(
            f"unexpected word {positional[0]!r}: flags are --key=value"
            + (" and only one config file may be given" if config_file else "")
        )
    elif words is not None and positional:
        values.setdefault(words, []).extend(positional)

    built = []
    for schema in schemas:
        made = schema(
            **{k: v for k, v in values.items() if k in {f.name for f in dataclasses.fields(schema)}}
        )
        problems += made.problems() if hasattr(made, "problems") else []
        built.append(made)
    check(problems)
    return built


def describe(hint) -> str:
    """A type as a user would say it: `a whole number`, `a number, sqrt_dim, dim or null`."""
    plain = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }
    if hint in plain:
        return plain[hint]
    if typing.get_origin(hint) is typing.Literal:
        names = [str(a) for a in typing.get_args(hint)]
    else:
        names = [describe(a) for a in typing.get_args(hint)] or [str(hint)]
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
