"""Files that survive a crash, and JSON with a checksum.

A file is written under another name, flushed to the disk and renamed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from base.errors import UserError

NOT_FILES = [
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
]


def json_object(text: str) -> dict | None:
    """The JSON object in a text. None if it is not one, for example if it was cut off."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal. OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Writes a file so that, even after a crash, it has either its old content or the new one.

    content: a text, bytes, or a function that writes the file at the path that it gets.
    Raises: OSError if it cannot be written.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content if isinstance(content, bytes) else content.encode())
        fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync(path.parent)


def write_result(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Writes a result for the user as `write_whole` does. UserError if it cannot be written.

    If `path` is a link, the file that it points to is written.
    """
    try:
        write_whole(path.resolve(), content)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads back to itself
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {why}") from None


def special_file(mode: int) -> str | None:
    """`named pipe`, `socket` or `device`; None for a regular file or a folder."""
    for test, name in NOT_FILES:
        if test(mode):
            return name
    return None


def writable(path: Path) -> Path:
    """Returns --out=`path` if a file can be written there. Raises UserError if not."""
    try:
        target = path.resolve() if path.is_symlink() else path
    except RuntimeError:  # A link that leads back to itself.
        raise UserError(f"--out={path} is a link that cannot be followed: name a file") from None
    except OSError as error:
        raise UserError(f"--out={path}: {error.strerror}") from None
    if target.is_dir():
        raise UserError(f"--out={path} is a folder: name a file")
    if target.exists() and (special := special_file(target.stat().st_mode)):
        raise UserError(f"--out={path} is a {special}: name a file")
    if not target.parent.is_dir():
        raise UserError(f"--out={path}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--out={path}: the folder {target.parent} is not writable")
    return path


def result_file(path: str | Path) -> Path:
    """The file of --out, which a program checks before long work. Raises UserError if it cannot be
    written. If it exists, a note on stderr says that it will be replaced."""
    path = writable(Path(path))
    if path.exists():
        print(f"note: {path} will be replaced", file=sys.stderr)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Creates and locks a file, and removes it at the end. The lock ends with the process too.

    On a file system that has no locks, nothing is locked.
    Raises: BlockingIOError if another process holds the lock, and OSError if there can be no file.
    """
    with _lock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path) -> BinaryIO:
    while True:
        # Open for writing, because NFS needs that for a lock.
        file = open(path, "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # Some file systems answer with the second one.
            file.close()
            raise BlockingIOError(errno.EAGAIN, "another process holds the lock") from None
        except OSError:
            return file
        # The process that held the lock before may have removed the file meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def seal(content: dict) -> str:
    """A mapping as JSON text, with a `checksum` of all other entries."""
    return json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n"


def unseal(text: bytes | str) -> dict:
    """The mapping in a JSON text, without its checksum.

    Raises: ValueError if it is no JSON mapping, or if it has a checksum that does not match.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    checksum = content.pop("checksum", None)
    if checksum not in (None, _checksum(content)):
        raise ValueError("its checksum does not match: the file is corrupt or was edited")
    return content


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
