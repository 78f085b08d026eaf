"""Which files a --source names. Folders are searched, linked ones once; the rest is counted."""

import collections
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
NOUNS = ("folder", "pipe", "socket", "device", "link", "file")  # reasons that have a plural
SHOWN = 8  # reasons that the line about what is left out names; the others are counted together

NOT_FILES = [
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
]


@dataclass
class Found:
    """The files of a source, in the order in which they are read.

    Attributes:
        files: one entry for each file, however many links lead to it.
        left_out: why -> how many, such as ".pdf" -> 2.
        folders: real paths of all folders that were searched.
        unreadable: a problem for each folder that may not be searched.
    """

    files: list[Path] = field(default_factory=list)
    left_out: collections.Counter = field(default_factory=collections.Counter)
    folders: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)


def kind_of(path: Path) -> str | None:
    """`.jsonl` for a.jsonl and for A.JSONL.gz; None for a kind that is not read."""
    inner = Path(path.stem) if compression_of(path) else path
    kind = inner.suffix.lower()
    return kind if kind in KINDS else None


def compression_of(path: Path) -> str | None:
    """`.gz`, `.bz2`, `.xz` or `.zst` if the name ends so, else None."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else None


def plain_name(path: Path) -> str:
    """A file's name without the endings that say how to read it: `b` for b.txt.gz."""
    return Path(path.stem).stem if compression_of(path) else path.stem


def known_kinds() -> str:
    """The kinds of files that are read, for messages."""
    return f"{', '.join(KINDS)}, also compressed ({', '.join(COMPRESSED)})"


def special_file(mode: int) -> str | None:
    """`named pipe`, `socket` or `device`; None for a regular file or a folder."""
    for test, name in NOT_FILES:
        if test(mode):
            return name
    return None


def find(source: list[str]) -> Found:
    """The files that `source` names, those of a folder sorted by path.

    Hidden files, and in a folder other kinds, are left out. No file is opened, so no named pipe can
    block.
    """
    found = Found()
    known = set()
    for path in map(Path, source):
        inside = _search(path, found) if path.is_dir() else [(False, path, os.path.realpath(path))]
        kept = []
        for _, file, real in sorted(inside):  # a file's own name before a link to it
            if real not in known:
                known.add(real)
                kept.append(file)
        found.files += sorted(kept)
    return found


def _search(folder: Path, found: Found) -> list[tuple[bool, Path, str]]:
    """(reached by a link, path, real path) of each file to read; what is left out goes to
    `found`."""
    files = []
    waiting, links = [folder], []
    while waiting or links:
        linked = not waiting  # links come last, so that a folder keeps its own path
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
    """`folder`, `file`, or why an entry of a folder is left out."""
    if entry.name.startswith("."):
        return "hidden folder" if entry.is_dir() else "hidden"
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
    """`left out 3 files: 2 .pdf, 1 hidden`, the most frequent first."""
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
    return f"left out {total:,} {noun}: {', '.join(parts)}"


def path_problem(name: str) -> str | None:
    """Why a path cannot be a source, in words; None for one that can. Opens nothing."""
    if not name:
        return "--source is empty: name a file or folder"
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"{name} is a link to {os.readlink(path)}, which does not exist"
        return f"no file or folder {name}"
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
        return f"{name}: unknown kind of file; known are {known_kinds()}"
    return None
