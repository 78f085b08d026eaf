"""environment.json: what each start of a run ran on, and what it changed."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from base.files import json_object, write_whole
from base.machine import installed, processor

TEXTS = ("text", "val_text")  # What a resume can change besides settings.


def environment(device: str, world: int, torchruns: list[str]) -> dict:
    """Versions, git commit, device and command line, as environment.json stores them."""
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "codecarbon")
        if installed(p)
    }
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{device} ({processor()})",
        "threads": torch.get_num_threads(),
        "world_size": world,
        "torchrun": os.environ.get("TORCHELASTIC_RUN_ID"),
        "torchruns": torchruns,
        "command": " ".join(sys.argv),
    }


def write_environment(out_dir: Path, now: dict, iteration: int, changed: dict) -> None:
    """Writes environment.json: the environments of this start and of earlier ones, oldest first.

    Args:
        now: the `environment` of this start.
        iteration: where this start begins.
        changed: settings that it changes, key -> [before, now].
    """
    path, earlier = out_dir / "environment.json", []
    if path.is_file():
        before = json_object(path.read_text(encoding="utf-8", errors="replace"))
        if before is None or not isinstance(before.get("earlier", []), list):
            path.rename(path.with_name("damaged_environment.json"))
        else:
            earlier = [*before.pop("earlier", []), before]
    write_whole(
        path,
        json.dumps({**now, "iter": iteration, "changed": changed, "earlier": earlier}, indent=2),
    )


def starts(out_dir: Path) -> list[dict]:
    """The environments of all starts of a run, oldest first; see `write_environment`."""
    path = out_dir / "environment.json"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    now = json_object(text)
    earlier = now.get("earlier", []) if now else []
    found = [*earlier, now] if now and isinstance(earlier, list) else []
    known = [s for s in found if isinstance(s, dict) and isinstance(s.get("iter"), int)]
    return [{**s, "changed": s.get("changed") or {}} for s in known]


def kept_starts(out_dir: Path, now: dict | None = None) -> list[dict]:
    """The starts of a run whose iterations still count.

    A start that resumed at or before the first iteration of an earlier start replaces that one. Its
    `changed` then compares it with the start before the replaced one.

    now: the `iter` and `changed` of a start that environment.json does not have yet.
    """
    kept: list[dict] = []
    for start in [*starts(out_dir), *([now] if now else [])]:
        changed = start["changed"]
        while kept and kept[-1]["iter"] >= start["iter"]:
            changed = _together(kept.pop()["changed"], changed)
        kept.append({**start, "changed": changed})
    return kept


def _together(first: dict, then: dict) -> dict:
    """The changes of two starts in a row, key -> [before, now], as those of one.

    Texts are compared with the checkpoint, so only the second start's count.
    """
    found = {key: both for key, both in first.items() if key not in TEXTS}
    for key, (before, now) in then.items():
        found[key] = [found[key][0] if key in found else before, now]
    return {key: both for key, both in found.items() if both[0] != both[1]}


def evaluated_alike_since(kept: list[dict]) -> int:
    """The iteration of the newest start of a run with other validation windows than before; -1 if
    there is none. Losses up to it cannot be compared with later ones. kept: `kept_starts`."""
    return max((s["iter"] for s in kept if other_windows(s["changed"])), default=-1)


def other_windows(changed: dict) -> bool:
    """Whether changed settings, key -> [before, now], change the windows of the validation loss."""
    return any(key in changed for key in TEXTS) or _resized(changed, "eval_iters", "batch_size")


def other_iterations(out_dir: Path) -> bool:
    """Whether a start of a run has changed the number of windows in an iteration."""
    keys = "batch_size", "gradient_accumulation_steps"
    return any(_resized(s["changed"], *keys) for s in starts(out_dir) if s["iter"])


def _resized(changed: dict, *keys: str) -> bool:
    before, now = (math.prod(changed.get(key, (1, 1))[i] for key in keys) for i in (0, 1))
    return before != now


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
