"""Documents to token ids in several processes. The result is the same for any number of them."""

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

# Characters that a process encodes at a time: enough to hide the cost of sending them.
BATCH = 1 << 20


def encode_documents(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, folder: Path, num_proc: int
) -> Iterator[tuple[str, str, bytes]]:
    """Yields (split, text, bytes in a token file) of each document, in order.

    Args:
        documents: (split, text) pairs.
        folder: where a trained tokenizer's file lies, so that each process can load it.
    Raises: UserError when a process is killed.
    """
    batches = batched(documents)
    if num_proc == 1:
        for splits, texts in batches:
            yield from zip(splits, texts, encode(tokenizer, texts))
        return
    # Processes are started afresh and not forked: the threads of pyarrow and tokenizers do not
    # survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, context, start_worker)
    # It is kept short, so that reading does not run ahead of encoding.
    pending: collections.deque[tuple[list[str], list[str], Future[list[bytes]]]]
    pending = collections.deque()
    try:
        for splits, texts in batches:
            # `submit` may start a process. That process must not hear of Ctrl-C: the parent alone
            # does, and ends the pool.
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
        size += len(text) + 100  # so that very short documents fill a batch too
        if size >= BATCH:
            yield splits, texts
            splits, texts, size = [], [], 0
    if texts:
        yield splits, texts


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[bytes]:
    """The bytes of each document in a token file, with the end-of-text id that ends it."""
    return [
        np.array([*ids, tokenizer.eot_id], tokenizer.dtype).tobytes()
        for ids in tokenizer.encode_batch(texts)
    ]


@contextlib.contextmanager
def ctrl_c_held() -> Iterator[None]:
    """Ctrl-C (SIGINT) waits until the block ends.

    Processes that start in the block never get it: they inherit that it is blocked.
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
    """Readies a process for `encode_in_worker`."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is parallel enough


def end_with_parent() -> None:
    """Waits until the parent process ends, which may be killed, and ends this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def encode_in_worker(name: str, folder: Path, texts: list[str]) -> list[bytes]:
    """`encode` with the tokenizer called `name`, which each process loads once."""
    return encode(load_once(name, folder), texts)
