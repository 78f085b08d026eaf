"""Encodes documents in several processes. The result is the same for any number of processes."""

import collections
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from base.errors import UserError
from text.tokenizers import Tokenizer, load_tokenizer

# Characters that a process encodes at a time. That is enough to hide the cost of sending them.
BATCH = 1 << 20


def encode_documents(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, folder: Path, num_proc: int
) -> Iterator[tuple[str, str, bytes]]:
    """Yields (split, text, bytes for the token file) of each document, in order.

    Args:
        documents: (split, text) pairs.
        folder: holds the file of a trained tokenizer, which each process loads.
        num_proc: the number of processes. 1 encodes in this process.
    Raises: UserError if a process is killed.
    """
    batches = batched(documents)
    if num_proc == 1:
        for splits, texts in batches:
            yield from zip(splits, texts, encode(tokenizer, texts))
        return
    # "spawn", because the threads of pyarrow and tokenizers do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, context, start_worker)
    # This queue is short, so that reading does not run ahead of encoding.
    pending: collections.deque[tuple[list[str], list[str], Future[list[bytes]]]]
    pending = collections.deque()
    try:
        for splits, texts in batches:
            # `submit` may start a process. Only the parent may receive Ctrl-C; it then ends the
            # pool.
            with ctrl_c_held():
                data = pool.submit(encode_in_worker, tokenizer.name, folder, texts)
            pending.append((splits, texts, data))
            if len(pending) > 2 * num_proc:
                splits, texts, data = pending.popleft()
                yield from zip(splits, texts, data.result())
        for splits, texts, data in pending:
            yield from zip(splits, texts, data.result())
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes was killed, perhaps for lack of memory: try a smaller"
            " --num_proc"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def batched(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    """Groups (split, text) pairs into (splits, texts) of about BATCH characters."""
    splits, texts, size = [], [], 0
    for split, text in documents:
        splits.append(split)
        texts.append(text)
        size += len(text) + 100  # So that very short documents also fill a batch.
        if size >= BATCH:
            yield splits, texts
            splits, texts, size = [], [], 0
    if texts:
        yield splits, texts


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    """The bytes of each document for a token file, with an end-of-text id at its end."""
    return [
        np.array([*ids, tokenizer.eot_id], tokenizer.dtype).tobytes()
        for ids in tokenizer.encode_batch(texts)
    ]


@contextlib.contextmanager
def ctrl_c_held() -> Iterator[None]:
    """Delays Ctrl-C (SIGINT) until the block ends.

    Processes that start in the block never receive it, because they inherit the blocked signal.
    """
    asked = []
    # The handler is replaced too, because another thread of this process may take the signal.
    handler = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, handler)
    if asked:
        raise KeyboardInterrupt


# ---- in a worker process -------------------------------------------------------------------------

load_once = functools.cache(load_tokenizer)


def start_worker() -> None:
    """Prepares a process for `encode_in_worker`."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are parallel already.


def end_with_parent() -> None:
    """Waits until the parent process ends, also if it is killed. Then ends this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def encode_in_worker(name: str, folder: Path, texts: list[str]) -> list[bytes]:
    """`encode` with the tokenizer called `name`, which each process loads once."""
    return encode(load_once(name, folder), texts)
