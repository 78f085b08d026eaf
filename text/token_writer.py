"""Writes token files. Their folder appears completely or not at all.

The files are written into a hidden folder, which is then renamed to the final one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import UserError
from base.files import fsync, locked, seal
from text.documents import Tally
from text.parallel import ctrl_c_held
from text.token_files import VERIFIED, has_tokenizer, load_data, verify
from text.tokenizers import TRAINED_FILES, Tokenizer, tokenizer_file

SPLITS = ("train", "val", "test")


def write_tokens(
    documents: Iterable[tuple[str, str, bytes]], dtype: np.dtype, folder: Path
) -> dict[str, dict]:
    """Writes SPLIT.bin for every split. Returns the entry of each split in meta.json.

    Args:
        documents: (split, text, bytes for the token file) of each document.
        dtype: the type of the ids.
    """
    files, hashes = {}, {}
    splits: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        for split, text, data in documents:
            if split not in splits:
                files[split] = stack.enter_context(open(folder / f"{split}.bin", "wb"))
                hashes[split] = hashlib.sha256()
                splits[split] = {"file": f"{split}.bin", "tokens": 0, "documents": 0, "bytes": 0}
            files[split].write(data)
            hashes[split].update(data)
            splits[split]["tokens"] += len(data) // dtype.itemsize
            splits[split]["documents"] += 1
            splits[split]["bytes"] += len(text.encode("utf-8"))
    return {
        name: splits[name] | {"sha256": hashes[name].hexdigest()}
        for name in SPLITS
        if name in splits
    }


def write_meta(
    folder: Path, identity: dict, settings: dict, tokenizer: Tokenizer, splits: dict, tally: Tally
) -> None:
    """Writes meta.json.

    Args:
        identity: format_version, source and tokenizer.
        settings: the flags that the token files depend on.
        splits: as from `write_tokens`.
    """
    meta = {
        **identity,
        "tokenizer_file": tokenizer_file(tokenizer.name),
        "vocab_size": tokenizer.vocab_size,
        "dtype": tokenizer.dtype.name,
        "eot_id": tokenizer.eot_id,
        "mask_id": tokenizer.mask_id,
        "splits": splits,
        "documents_read": tally.read,
        "duplicates": tally.duplicates,
        "empty": tally.empty,
        "settings": settings,
    }
    if "on_bad_file" in settings:
        meta["skipped"] = {"files": tally.files, "records": tally.records}
    (folder / "meta.json").write_text(seal(meta), encoding="utf-8")


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`. It is removed after any error.

    If a kill has left an earlier preparation under another name, that is put back first.

    Raises: UserError if another process is writing into it.
    """
    folder, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "old"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out.with_name(f".{out.name}.lock")))
        except BlockingIOError:
            raise UserError(f"another preparation is writing {out}") from None
        try:
            shutil.rmtree(folder, ignore_errors=True)  # A killed preparation has left it.
            if old.exists() and not out.exists():  # It was killed between the renames of `publish`.
                os.rename(old, out)
            folder.mkdir()
            yield folder
        except BaseException as error:
            published = not folder.exists()  # Ctrl-C came while `publish` renamed it.
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt) and not published:
                print(f"\n{out}: nothing was written", file=sys.stderr)
            raise


def publish(folder: Path, out: Path) -> None:
    """Replaces `out` by `folder`, after flushing all its files to the disk."""
    for path in [*folder.iterdir(), folder]:
        fsync(path)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with ctrl_c_held():
        if out.exists():
            os.rename(out, old)
        os.rename(folder, out)
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_prepared(out: Path, identity: dict, overwrite: bool) -> bool:
    """Whether `out` already holds this preparation.

    Args:
        identity: the entries of meta.json that identify it.
        overwrite: whether another preparation in `out` may be replaced.
    Raises: UserError if `out` holds something that must not be replaced.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir={out} is a file: name another")
    if os.path.ismount(out):
        raise UserError(
            f"--out_dir={out} is a mount point, which cannot be replaced: name a folder inside it"
        )
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not overwrite and "meta.json" in names and _is_same(out, identity):
        return True
    ours = {"meta.json", VERIFIED, *TRAINED_FILES, *(f"{split}.bin" for split in SPLITS)}
    if others := sorted(names - ours):
        raise UserError(
            f"--out_dir={out} holds other files ({', '.join(others[:3])}): name another"
        )
    if names and not overwrite:
        raise UserError(
            f"{out} holds another preparation, or a damaged one: replace it with"
            " --overwrite=true, or name another --out_dir"
        )
    return False


def _is_same(out: Path, identity: dict) -> bool:
    """Whether meta.json in `out` has these entries, and no file is missing or damaged."""
    try:
        meta = json.loads((out / "meta.json").read_bytes())
        if any(meta[key] != value for key, value in identity.items()):
            return False
        data = load_data(out)
        verify(data)
        return has_tokenizer(data)
    except (OSError, ValueError, KeyError, TypeError):  # A UserError is a ValueError.
        return False
