"""Checkpoints: folders `ckpt/iter_000200/` that appear whole or not at all.

    model.safetensors   weights, tied ones once
    train_state.pt      optimiser and scaler: tensors and numbers, loaded with weights_only=True, so nothing pickled is ever executed
    manifest.json       iteration, val_loss, counters, and the sha256 of the other files

A checkpoint is written aside, flushed to the disk and renamed. The newest one and the best one are kept.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import Model, ModelConfig
from training.config import UserError, read_yaml


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path):
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(out_dir: Path, iteration: int, model: Model, state: dict, counters: dict) -> Path:
    """Writes a checkpoint and removes those that are neither the newest nor the best.

    Args:
        state: optimiser and scaler state dicts. counters: what the manifest holds besides, with `val_loss`, as JSON.
    """
    folder = out_dir / "ckpt" / f"iter_{iteration:06d}"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not (model.config.tie_weights and k == "tokens.weight")
    }
    save_file(weights, aside / "model.safetensors")
    torch.save(state, aside / "train_state.pt")
    files = {f: _sha256(aside / f) for f in ("model.safetensors", "train_state.pt")}
    (aside / "manifest.json").write_text(json.dumps({"iter": iteration, **counters, "sha256": files}, indent=2))
    for path in (*aside.iterdir(), aside):
        fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    fsync(folder.parent)
    kept = {folder, best(out_dir)}
    for path in (*folder.parent.glob("iter_*"), *folder.parent.glob(".iter_*")):  # and what killed runs left aside; nothing foreign
        if path not in kept:
            shutil.rmtree(path)
    return folder


def manifests(out_dir: Path) -> dict[Path, dict]:
    """Complete checkpoints, oldest first: folder -> manifest."""
    found = {}
    for path in sorted((Path(out_dir) / "ckpt").glob("iter_*/manifest.json"), key=lambda p: int(p.parent.name[5:])):
        found[path.parent] = _manifest(path.parent)
    return found


def _manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if {"iter", "val_loss", "sha256"} <= set(manifest):
            return manifest
    except (OSError, ValueError, TypeError):
        manifest = None
    raise UserError(f"checkpoint {folder} is damaged: its manifest.json is not one; delete the folder to use an older checkpoint")


def newest(out_dir: Path) -> Path:
    """The folder of the newest checkpoint. UserError when there is none."""
    found = list(manifests(out_dir))
    if not found:
        raise UserError(
            f"{out_dir} holds no checkpoint"
            + ("" if Path(out_dir).is_dir() else " (the folder does not exist)")
            + ": train it first, or name another --out_dir"
        )
    return found[-1]


def best(out_dir: Path) -> Path | None:
    """The folder with the lowest validation loss."""
    found = manifests(out_dir)
    return min(found, key=lambda p: (math.isnan(found[p]["val_loss"]), found[p]["val_loss"])) if found else None


def read(folder: Path, training: bool = True) -> tuple[dict, dict | None, dict]:
    """-> (weights, optimiser and scaler state, manifest). UserError for a damaged file."""
    manifest = _manifest(folder)
    for file, expected in manifest["sha256"].items():
        if not (folder / file).is_file() or ((training or file == "model.safetensors") and _sha256(folder / file) != expected):
            raise UserError(
                f"checkpoint {folder} is damaged: {file} does not match its sha256; delete the folder to use an older checkpoint"
            )
    try:
        state = torch.load(folder / "train_state.pt", map_location="cpu", weights_only=True) if training else None
    except pickle.UnpicklingError:
        raise UserError(f"checkpoint {folder}: train_state.pt holds more than tensors and numbers; it is refused, not executed") from None
    return load_file(folder / "model.safetensors"), state, manifest


def load_weights(model: Model, weights: dict):
    """Puts weights into a model. UserError listing what does not fit."""
    own = {k: v for k, v in model.state_dict().items() if not (model.config.tie_weights and k == "tokens.weight")}
    wrong = [f"{k} is missing" for k in own if k not in weights] + [f"{k} is not part of the model" for k in weights if k not in own]
    wrong += [
        f"{k} is {tuple(weights[k].shape)}, the model's is {tuple(v.shape)}"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if wrong:
        raise UserError(
            "the checkpoint does not fit the model: " + "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    model.load_state_dict(weights, strict=False)


def load_run(out_dir, device: str = "cpu", which: str = "newest") -> tuple[Model, dict, dict]:
    """A run's "newest" or "best" checkpoint for evaluation or sampling -> (model in eval mode, its stored config, the manifest)."""
    out_dir = Path(out_dir)
    folder = newest(out_dir) if which == "newest" else best(out_dir) or newest(out_dir)
    stored = read_yaml(out_dir / "config.yaml")
    config = ModelConfig(**{k: v for k, v in stored.items() if k in ModelConfig.__dataclass_fields__})
    model = Model(config)
    weights, _, manifest = read(folder, training=False)
    load_weights(model, weights)
    return model.to(device).eval(), stored, manifest
