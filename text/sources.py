"""The files that --source names, problems with them, and their documents.

A folder is searched only once, even if several links lead to it. Skipped files are counted.
"""

import collections
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from base.errors import UserError, nearest
from base.files import sha256, special_file
from text.readers import COMPRESSED, KINDS, Broken, compression_of, kind_of, records

SKIP_HINT = "--on_bad_file=skip leaves out what cannot be read"
NOUNS = ("folder", "pipe", "socket", "device", "link", "file")  # These reasons have a plural.
TEXTS = (".md", ".rst", ".tex", ".text", ".html", "without an ending")  # May be text to train on.
SHOWN = 8  # The summary of skipped files names so many reasons, and counts the others together.


# ---- which files there are -----------------------------------------------------------------------


@dataclass
class Found:
    """The files that a source names, in the order in which they are read.

    Attributes:
        files: one entry for each file, even if several links lead to it.
        left_out: reason -> how many files were skipped for it, such as ".pdf" -> 2.
        folders: real paths of all folders that were searched.
        unreadable: a problem for each folder that cannot be searched.
    """

    files: list[Path] = field(default_factory=list)
    left_out: collections.Counter = field(default_factory=collections.Counter)
    folders: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)


def find(source: list[str]) -> Found:
    """The files that `source` names. Those in a folder are sorted by path.

    In a folder, hidden files and files of unknown kinds are skipped. No file is opened, so a named
    pipe cannot block.
    """
    found = Found()
    known = set()
    for path in map(Path, source):
        inside = _search(path, found) if path.is_dir() else [(False, path, os.path.realpath(path))]
        kept = []
        for _, file, real in sorted(inside):  # The file itself comes before a link to it.
            if real not in known:
                known.add(real)
                kept.append(file)
        found.files += sorted(kept)
    return found


def _search(folder: Path, found: Found) -> list[tuple[bool, Path, str]]:
    """(reached by a link, path, real path) of each file to read in a folder.

    Skipped files are counted in `found`.
    """
    files: list[tuple[bool, Path, str]] = []
    waiting, links = [folder], list[Path]()
    while waiting or links:
        linked = not waiting  # Links are last, so a folder keeps its own path.
        links.sort()
        here = links.pop(0) if linked else waiting.pop()
        real = os.path.realpath(here)
        if real in found.folders:
            continue
        found.folders.add(real)
        try:
            entries = list(os.scandir(here))
        except OSError as error:
            found.unreadable.append(f"{here}: {error.strerror}")
            continue
        for entry in entries:
            what = _classify(entry)
            path = here / entry.name
            if what == "folder":
                (links if linked or entry.is_symlink() else waiting).append(path)
            elif what == "file":
                target = os.path.join(real, entry.name)
                if entry.is_symlink():
                    target = os.path.realpath(path)
                files.append((linked or entry.is_symlink(), path, target))
            else:
                found.left_out[what] += 1
    return files


def _classify(entry: os.DirEntry) -> str:
    """`folder`, `file`, or the reason why an entry of a folder is skipped."""
    if entry.name.startswith("."):
        return "hidden folder" if entry.is_dir(follow_symlinks=False) else "hidden"
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "broken link" if entry.is_symlink() else "unreadable file"
    if stat.S_ISDIR(mode):
        return "folder"
    if special := special_file(mode):
        return special
    path = Path(entry.name)
    if kind_of(path):
        return "file"
    if compression_of(path):
        return Path(path.stem).suffix.lower() + path.suffix.lower()
    return path.suffix.lower() or "without an ending"


def left_out_line(left_out: collections.Counter) -> str:
    """`left out 3 files: 2 .pdf, 1 hidden`, with the most frequent reason first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = []
    for what, count in ordered[:SHOWN]:
        if count > 1 and what.endswith(NOUNS):
            what += "s"
        parts.append(f"{count:,} {what}")
    if ordered[SHOWN:]:
        parts.append(f"{sum(count for _, count in ordered[SHOWN:]):,} of other kinds")
    total = sum(left_out.values())
    noun = "file" if total == 1 else "files"
    if "hidden folder" in left_out:
        noun = "folder" if total == 1 else "files and folders"
    hint = "; text needs a name in .txt" if any(what in TEXTS for what in left_out) else ""
    return f"left out {total:,} {noun}: {', '.join(parts)}{hint}"


# ---- what is wrong with them ---------------------------------------------------------------------


def source_problems(
    source: list[str], corpora: list[str], column: str | None, skip: bool
) -> list[str]:
    """Everything that is wrong with files and folders, in words.

    It reads the first document of every file, so that all problems are found at once.

    Args:
        corpora: names of corpora, which are not files.
        column: the text column; None for one of the usual names.
        skip: whether to ignore files that cannot be read.
    """
    problems, good = [], []
    for name in source:
        problem = path_problem(name)
        if name in corpora and not os.path.exists(name):
            problems.append(f"--source={name} cannot be combined with other sources")
        elif problem:
            hint = nearest(name, corpora) if problem.startswith("no file or folder") else ""
            problems.append(problem + hint)
        else:
            good.append(name)
    found = find(good)
    if not skip:
        problems += _unreadable(found, {Path(name) for name in good}, column)
    if column and not problems and all(kind_of(path) == ".txt" for path in found.files):
        problems.append("--column: a .txt file has no columns")
    return problems


def _unreadable(found: Found, named: set[Path], column: str | None) -> list[str]:
    """A problem for each folder or file that cannot be read, and for each empty file in `named`."""
    problems = list(found.unreadable)
    for path in found.files:
        try:
            if path in named and path.stat().st_size == 0:
                problems.append(f"{path} is empty")
                continue
            first = next(records(path, column), None)
        except UserError as error:
            problems.append(str(error))
            continue
        if isinstance(first, Broken):
            problems.append(first.problem)
    if problems:
        problems[-1] += f"\n{SKIP_HINT}"
    return problems


def path_problem(name: str) -> str | None:
    """Why a path cannot be a source, in words; None if it can. No file is opened."""
    if not name:
        return "--source is empty: name a file or folder"
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"{name} is a link to {os.readlink(path)}, which does not exist"
        several = " (put spaces between sources, not commas)" if "," in name else ""
        return f"no file or folder {name}{several}"
    except OSError as error:
        return f"{name}: {error.strerror}"
    if stat.S_ISDIR(mode):
        found = find([name])
        if found.files or found.unreadable:
            return None
        left_out = f"; {left_out_line(found.left_out)}" if found.left_out else ""
        return f"no file to read in the folder {name}{left_out}; known kinds are {known_kinds()}"
    if special := special_file(mode):
        return f"{name} is a {special}: save its text in a file, and name that"
    if kind_of(path) is None:
        return f"{name}: unknown kind of file; known are {known_kinds()}. Text needs a name in .txt"
    return None


def known_kinds() -> str:
    """The kinds of files that can be read, in words."""
    return f"{', '.join(KINDS)}, also compressed ({', '.join(COMPRESSED)})"


# ---- their documents -----------------------------------------------------------------------------


def read_files(
    found: Found, column: str | None, on_broken: Callable[[Broken], None] | None
) -> Iterator[str | None]:
    """Yields the documents of files, and None for an empty document.

    Args:
        on_broken: is called for each part that cannot be read. None raises a UserError instead.
    """
    on_broken = on_broken or _stop
    for problem in found.unreadable:
        on_broken(Broken(problem, file=True))
    for path in found.files:
        for record in records(path, column):
            if isinstance(record, Broken):
                on_broken(record)
            else:
                yield record


def _stop(broken: Broken) -> None:
    raise UserError(f"{broken.problem}\n{SKIP_HINT}")


def source_names(source: list[str]) -> str:
    """The names of files and folders without their paths. Links are followed."""
    return " ".join(Path(os.path.realpath(name)).name for name in source)


def contents_hash(found: Found) -> str:
    """Identifies the files: `sha256:` and a hash of their names and contents."""
    total = hashlib.sha256()
    for path in found.files:
        try:
            digest = sha256(path)
        except OSError:
            digest = "unreadable"  # Reading the file later reports why.
        total.update(os.fsencode(f"{path.name} {digest}\n"))
    return f"sha256:{total.hexdigest()}"
