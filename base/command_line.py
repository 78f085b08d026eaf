"""Command lines: flat typed dataclasses filled from a YAML file and from `--key=value` flags.

A script declares its settings as dataclasses, with a docstring for each field, and calls `parse`.
jsonargparse reads the types and makes the help. `parse` collects all mistakes in the file and on
the command line. `cli` prints them in one message, without a traceback, and exits with status 2.
"""

import argparse
import codecs
import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Container
from pathlib import Path

import jsonargparse
import yaml

from base.errors import UserError, check, nearest
from base.files import write_whole
from base.output import tell

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# jsonargparse raises these for a value of the wrong type.
WRONG_VALUE = (jsonargparse.ArgumentError, ValueError, TypeError)
UNREAD: typing.Any = object()  # In place of such a value.

# Settings that name a file or folder. A shell replaces `~` only at the start of a word.
PATHS = {
    "out", "out_dir", "to", "dataset", "source", "init_from", "run", "runs", "prompts", "table",
    "config", "corpus", "other", "data", "instructions", "measured",
}  # fmt: skip


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of a script's docstring. It gives types in words, such as
    `(a number or null, default: null)`, and no type where the choices stand beside the flag."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        hint = getattr(action, "_typehint", action.type)
        if hint is None:  # --help itself
            return text
        listed = hint in (bool, bool | None) or typing.get_origin(hint) is typing.Literal
        start = "(" if listed else f"({describe(hint)}, "
        default = json.dumps(action.default) if hint is bool else f"{action.default}"
        default = {"None": "null", "": "none", "[]": "none"}.get(default, default)
        before, found, _ = text.rpartition("(type: ")
        return f"{before}{start}default: {default})" if found else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # jsonargparse has a second form of each list, `--start+`, which `parse` does not take.
        return re.sub(r", --\w+\+ .*", "", super()._format_action_invocation(action))


def show_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler that prints file names that are not UTF-8, such as `caf\\xe9.txt`.

    Python stores such a byte as a character, here U+DCE9.
    """
    assert isinstance(error, UnicodeEncodeError)
    rest = error.object[error.start : error.end]
    if not all("\udc80" <= character <= "\udcff" for character in rest):
        # Characters that the terminal's encoding lacks.
        return codecs.backslashreplace_errors(error)
    return rest.encode("ascii", "surrogateescape").decode("ascii", "backslashreplace"), error.end


codecs.register_error("show_bytes", show_bytes)


def cli(main: Callable[[], object], prints: bool = True) -> None:
    """Runs `main()`. For a UserError it prints the message on stderr and exits with status 2.

    The same holds for a file that the system refuses, and for output that a full disk does not
    take. Ctrl-C exits with status 130 and a word, unless `main` handles it.
    prints: whether what it prints is its result. If not, lost output does not change the status.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # from `say_loading`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="show_bytes")
    status: str | int | None = 1  # of an exception that nobody has foreseen
    try:
        _report_errors(main)
        status = 0
    except SystemExit as stop:
        status = stop.code
        raise
    finally:
        lost = flush()
        if lost and not status and prints:
            sys.exit(lost)


def _report_errors(main: Callable[[], object]) -> None:
    """Runs `main()`. Errors that a user can fix, and Ctrl-C, become a message and SystemExit."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # Only one process on each machine speaks.
    try:
        main()
    except UserError as error:
        leave(2, f"{script_name()}: {error}" if first else None)
    except KeyboardInterrupt:
        leave(130, f"\n{script_name()}: interrupted" if first else None)
    except BrokenPipeError:  # The reader of a pipe (head, less) has closed it.
        leave(1, None)
    except OSError as error:
        # Each process speaks here, because its files may be its own.
        if error.filename is not None:
            leave(2, f"{script_name()}: {error.filename}: {error.strerror}")
        if error.errno == errno.ENOSPC:  # Of the output, which `flush` tells, or of an open file.
            leave(2, None if flush() else f"{script_name()}: {error.strerror}")
        raise  # It names no file, so it may be a fault of the program.


def leave(status: int, message: str | None) -> typing.NoReturn:
    """Ends the process with a message on stderr."""
    with contextlib.suppress(OSError):  # stderr can be a full disk, too.
        if message:
            print(message, file=sys.stderr)
    sys.exit(status)


def flush() -> int:
    """Writes out what was printed. What cannot be written is dropped, so that Python does not fail
    on it at exit. Returns 0, or the exit status if some of the output is lost."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:  # None: closed before the program started.
                stream.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
            if stream is sys.stdout:
                status = 1 if isinstance(error, BrokenPipeError) else 2
            if status == 2:
                with contextlib.suppress(OSError):
                    print(f"{script_name()}: output: {error.strerror}", file=sys.stderr)
    return status


def script_name() -> str:
    """The script that runs, as a user calls it: `train.py`, `python -m analysis.report`."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent.parent
    if script.is_relative_to(root) and script.parent != root:  # in a room: run as a module
        parts = script.relative_to(root).with_suffix("").parts
        return f"python -m {'.'.join(parts).removesuffix('.__main__')}"
    return script.name


class Flat(yaml.SafeLoader):
    """Reads YAML, but refuses a key that is given twice: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"{key} is given {keys.count(key)} times")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """A number. What YAML reads in another way than Python stays a text: 1:30 (as 90), 010 (as
        8) and .inf."""
        if re.search(r":|inf|nan|^[-+]?0\d", node.value.lower()):
            return str(node.value)
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    Flat.add_constructor(f"tag:yaml.org,2002:{_kind}", Flat.construct_number)


def read_yaml(path: str | Path) -> dict:
    """The `key: value` lines of a YAML file. UserError if it is missing or holds anything else."""
    path = Path(path)
    if not path.is_file():
        folders = (path.parent, Path("configs"))
        there = sorted({str(p) for f in folders for p in f.glob("*.yaml") if p.is_file()})
        raise UserError(f"no config file {path}{nearest(str(path), there) if there else ''}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Flat) or {}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is not YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # such as `!!bool x`
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise UserError(f"{path}: expected flat `key: value` lines")
    if strange := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{path}: {strange[0]} is not the name of a setting")
    return {key: _at_home(key, value) for key, value in values.items()}


def _at_home(key: str, value: typing.Any) -> typing.Any:
    """The value of a setting. If it names files or folders, `~` is replaced."""
    if key not in PATHS or not isinstance(value, str):
        return value
    return ",".join(map(os.path.expanduser, value.split(",")))


def known(stored: dict, where: str | Path, *schemas: type) -> dict:
    """A stored configuration without the keys that no schema has. A note on stderr names those.

    Such keys come from another version. where: names the file in the note.
    """
    names = {f.name for schema in schemas for f in dataclasses.fields(schema)}
    strange = [key for key in stored if key not in names]
    if strange:
        _note_once(
            f"{where} has settings of another version, which are ignored:"
            f" {', '.join(map(str, strange))}"
        )
    return {key: value for key, value in stored.items() if key in names}


@functools.cache
def _note_once(text: str) -> None:
    """Prints a note on stderr, but each text only once: several parts of a program read a file."""
    tell(f"note: {text}")


def write_yaml(path: str | Path, *configs: "DataclassInstance") -> None:
    """Writes every field of the given dataclasses as one flat YAML file."""
    merged = {k: v for c in configs for k, v in dataclasses.asdict(c).items()}
    write_whole(Path(path), yaml.safe_dump(merged, sort_keys=False))


def split_flags(
    argv: list[str], switches: set[str], known: Container[str] = ()
) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Splits a command line into positional words and (key, value) pairs.

    `--key=value` and `--key value` both work.
    switches: names of bool fields. `--key` without a value means true for them.
    known: all valid keys. An unknown `--key` takes no following word as its value.
    """
    words: list[str] = []
    flags: list[tuple[str, str | None]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        value: str | None = text
        if not equals and key in switches:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals and (not known or key in known) and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals:
            value = None
        flags.append((key, _at_home(key, value)))
    return words, flags


def parse(
    argv: list[str],
    *schemas: type,
    words: str | None = None,
    config_file: bool = False,
    base: dict | None = None,
) -> list:
    """Fills one instance of each dataclass in `schemas` from a command line.

    Args:
        argv: the words after the script's name.
        schemas: dataclasses with different field names. If one has a method `problems() ->
            list[str]`, it reports invalid values.
        words: the list field that takes positional words, such as run folders; None if there is
            none.
        config_file: whether the first positional word is a YAML file, which flags override.
        base: values that the file and the flags override, such as a stored run's configuration.
    Raises: UserError that lists every unknown key (with the nearest valid one), wrong type and
        invalid value.
    """
    types = {name: hint for s in schemas for name, hint in typing.get_type_hints(s).items()}
    parser = _parser(schemas)
    if "--help" in argv or "-h" in argv:
        parser.usage = _usage(words, config_file)
        parser.print_help()
        sys.exit(0)

    switches = {name for name, hint in types.items() if hint is bool}
    positional, flags = split_flags(argv, switches, types)
    given = [("config.yaml: ", k, v) for k, v in (base or {}).items()]
    if config_file and positional:
        path = positional.pop(0)
        given += [(f"{path}: ", k, v) for k, v in read_yaml(path).items()]
    given += [("--", k, v) for k, v in flags]
    values, problems = _read(parser, schemas, types, words, given)
    if positional and words is None:
        more = " and only one config file may be given" if config_file else ""
        problems.append(f"unexpected word {positional[0]!r}: flags are --key=value{more}")
    elif positional:
        values[words] = [*values.get(words, []), *positional]

    built = []
    # A setting that could not be read has its default here. So a problem that names it says nothing
    # about the command.
    unread = [rf"\b{re.escape(key)}=" for _, key, _ in given if key not in values]
    for schema in schemas:
        names = {f.name for f in dataclasses.fields(schema)}
        built.append(schema(**{k: v for k, v in values.items() if k in names}))
        found = built[-1].problems() if hasattr(schema, "problems") else []
        problems += [p for p in found if not any(re.search(key, p) for key in unread)]
    check(problems)
    return built


@functools.cache
def _parser(schemas: tuple[type, ...]) -> jsonargparse.ArgumentParser:
    """A parser for all fields. Its help begins with the docstring of the script."""
    doc = inspect.cleandoc(sys.modules["__main__"].__doc__ or "")
    parser = jsonargparse.ArgumentParser(description=doc, exit_on_error=False, formatter_class=Help)
    for schema in schemas:
        parser.add_class_arguments(schema, fail_untyped=True)
    return parser


def _usage(words: str | None, config_file: bool) -> str:
    """How the script is called, in one line. The flags are listed below it."""
    name = script_name()
    parts = [name if name.startswith("python") else f"python {name}"]
    if config_file:
        parts.append("[CONFIG.yaml]")
    if words:
        parts.append(f"[{words.removesuffix('s').upper()} ...]")
    return " ".join([*parts, "[--key=value ...]"])


def _read(
    parser: jsonargparse.ArgumentParser,
    schemas: tuple[type, ...],
    hints: dict[str, typing.Any],
    words: str | None,
    given: list[tuple],
) -> tuple[dict, list[str]]:
    """Converts settings (where it was given, key, value). hints: the type of each setting.

    Returns: values by key, and the problems of the other settings.
    """
    settings = {f.name: f for s in schemas for f in dataclasses.fields(s)}
    values: dict[str, typing.Any] = {}
    problems: list[str] = []
    texts: list[tuple[str, str, str]] = []
    for where, key, value in given:
        if key not in settings:
            problems.append(f"{where}{key}: unknown key{nearest(key, settings)}")
        elif value is None and where == "--":
            problems.append(f"--{key} needs a value: --{key}=...")
        elif key == words and where == "--":
            values.setdefault(key, []).append(value)
        elif where != "--" and _is_no_text(value, hints[key]):
            what = "is empty: write a text"
            if value is not None:
                what = f"YAML reads the value as {value}, which is not a text: put it in quotes"
            problems.append(f"{where}{key}: {what}")
        elif hints[key] == (str | None):  # The parser would read `#` and `---` as YAML: as nothing.
            values[key] = None if value == "null" else value
        else:
            text = value if isinstance(value, str) else _as_json(value)
            texts.append((where, key, _as_list(text, hints[key]) if _is_list(hints[key]) else text))
    found = _converted(parser, texts)
    values |= {key: value for (_, key, _), value in zip(texts, found, strict=True)}
    last = {key: i for i, (_, key, _) in enumerate(texts)}  # It overrides the earlier ones.
    for i, ((where, key, text), value) in enumerate(zip(texts, found, strict=True)):
        if value is UNREAD or (last[key] == i and _is_odd(text, value)):
            values.pop(key, None)
            problems.append(f"{where}{key}={text}: {_expected(text, settings[key])}")
    return values, problems


def _as_json(value: object) -> str:
    """A value of a YAML file as JSON."""
    try:
        return json.dumps(value, default=str)
    except ValueError:  # It contains itself, by an anchor.
        return "a value that contains itself"


def _converted(
    parser: jsonargparse.ArgumentParser, texts: list[tuple[str, str, str]]
) -> list[typing.Any]:
    """The value of each setting (where it was given, key, text), or UNREAD for a wrong type."""
    with contextlib.suppress(*WRONG_VALUE):  # All in one call, which is faster.
        found = parser.parse_args([f"--{key}={text}" for _, key, text in texts])
        return [getattr(found, key) for _, key, _ in texts]
    values = []
    for _, key, text in texts:
        value = UNREAD
        with contextlib.suppress(*WRONG_VALUE):
            value = getattr(parser.parse_args([f"--{key}={text}"]), key)
        values.append(value)
    return values


def _is_odd(text: str, value: object) -> bool:
    """Whether YAML has made an infinite number of a text, or read 1:30 as 90."""
    numbers = value if isinstance(value, list) else [value]
    numbers = [x for x in numbers if isinstance(x, int | float) and not isinstance(x, bool)]
    return bool(numbers) and (":" in text or not all(map(math.isfinite, numbers)))


def _is_no_text(value: object, hint: typing.Any) -> bool:
    """Whether a YAML value, such as 5, yes or a date, stands for a setting that is a text."""
    if _is_list(hint):
        return False
    choices = set(typing.get_args(hint) or [hint])
    allowed = isinstance(value, str) or (value is None and type(None) in choices)
    return choices <= {str, type(None)} and not allowed


def _is_list(hint: typing.Any) -> bool:
    """Whether a type is a list, or a list or null."""
    return list in [typing.get_origin(h) for h in (hint, *typing.get_args(hint))]


def _as_list(text: str, hint: typing.Any) -> str:
    """`8,4` as the list `[8,4]`. An empty text, a list and null stay as they are."""
    if not text or text.lstrip().startswith("[") or text == "null":
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    of_texts = str in typing.get_args(hint)
    return json.dumps(parts) if of_texts else f"[{','.join(parts)}]"


def _expected(text: str, setting: dataclasses.Field) -> str:
    """What a wrong value should be, in words."""
    hint = setting.type
    if typing.get_origin(hint) is typing.Literal:
        other_names = setting.metadata.get("other_names", {})
        return f"unknown {setting.name}{nearest(text, typing.get_args(hint), other_names)}"
    return f"expected {describe(hint)}"


def describe(hint: typing.Any) -> str:
    """A type in words, such as `a whole number` or `a number, sqrt_dim, dim or null`."""
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
    elif typing.get_origin(hint) is list:
        return "a list"
    else:
        names = [describe(a) for a in typing.get_args(hint)] or [str(hint)]
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
