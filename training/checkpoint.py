"""Checkpoints: folders `ckpt/iter_000200/` that appear whole or not at all.

    model.safetensors         weights, tied ones once
    train_state.safetensors   the optimiser's tensors, as `exp_avg/blocks.0.mlp.up.weight`
    manifest.json             iteration, val_loss, counters, the sha256 of the other files and of
                              itself

Nothing in them is pickled. A checkpoint is written aside, flushed to the disk and renamed, in the
background of training. It holds whole weights and optimiser states, so any number of processes can
resume from it. The newest two and the best are kept. If the newest is corrupt, the one before it is
used.
"""

import math
import os
import shutil
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from base.command_line import known, parse, read_yaml
from base.errors import UserError
from base.files import fsync, seal, sha256, unseal
from model import Model, ModelConfig
from training.config import TrainConfig

WEIGHTS, STATE, MANIFEST = "model.safetensors", "train_state.safetensors", "manifest.json"


def own_weights(model: Model) -> dict[str, torch.Tensor]:
    """A model's tensors by name, tied ones once."""
    return {
        k: v
        for k, v in model.state_dict().items()
        if not (model.config.tie_weights and k == "tokens.weight")
    }


def snapshot(
    model: Model, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of weights and optimiser state on the CPU, by file and name. All processes call it, to
    put shards together; those that do not `keep` the result get nothing."""
    names: dict[torch.Tensor, str] = {q: name for name, q in model.named_parameters()}
    state = {
        f"{key}/{names[q]}": v for q, values in optimizer.state.items() for key, v in values.items()
    }
    found: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}, STATE: {}}
    for file, tensors in ((WEIGHTS, own_weights(model)), (STATE, state)):
        for name, tensor in tensors.items():
            own = tensor.detach()
            whole = own.full_tensor() if isinstance(own, DTensor) else own
            if keep:
                found[file][name] = whole.to("cpu", copy=True).contiguous()
    return found


class Writer:
    """Writes checkpoints of a run in a thread of low priority, one after the other."""

    def __init__(self, out_dir: Path):
        self.out_dir = out_dir
        self.thread: threading.Thread | None = None
        self.error: str | None = None

    def save(
        self, iteration: int, files: dict[str, dict[str, torch.Tensor]], counters: dict
    ) -> None:
        """Begins to write a snapshot as the checkpoint of an iteration; `wait` for the one before
        first.

        A disk that is full or read-only does not stop training: stderr says so, `error` holds the
        message until a later checkpoint is written, and the checkpoints that are there stay.
        """
        what = (iteration, files, counters)
        self.thread = threading.Thread(target=self._write, args=what, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread:
            self.thread.join()

    def _write(
        self, iteration: int, files: dict[str, dict[str, torch.Tensor]], counters: dict
    ) -> None:
        if sys.platform == "linux":  # there a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            save(self.out_dir, iteration, files, counters)
            self.error = None
        except Exception as error:  # whatever it is, training goes on and the exit status tells
            reason = isinstance(error, OSError) and error.strerror or repr(error)
            self.error = (
                f"the checkpoint of iteration {iteration} could not be written ({reason}); the last"
                f" good one: {last(self.out_dir)}"
            )
            print(self.error, file=sys.stderr, flush=True)


def save(
    out_dir: Path, iteration: int, files: dict[str, dict[str, torch.Tensor]], counters: dict
) -> Path:
    """Writes a checkpoint and removes those that are neither the newest two nor the best.

    Args:
        files: a `snapshot`. counters: what the manifest holds besides, as JSON, with `val_loss`
            (None where there was no evaluation).
    """
    folder = out_dir / "ckpt" / f"iter_{iteration:06d}"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            save_file(tensors, aside / name)
        hashes = {name: sha256(aside / name) for name in files}
        (aside / MANIFEST).write_text(seal({"iter": iteration, **counters, "sha256": hashes}))
        for path in (*aside.iterdir(), aside):
            fsync(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    kept = {*list(manifests(out_dir))[-2:], best(out_dir)}
    # Checkpoints, and what killed runs left aside; nothing foreign.
    for path in {*folders(out_dir), *folder.parent.glob(".iter_*")} - kept:
        # What cannot be removed now is tried again at the next checkpoint.
        shutil.rmtree(path, ignore_errors=True)
    return folder


def folders(out_dir: Path) -> list[Path]:
    """Checkpoints by name, oldest first, sound or not."""
    found = [p for p in (Path(out_dir) / "ckpt").glob("iter_*") if p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def _manifest(folder: Path) -> dict:
    """ValueError or OSError for one that is missing or damaged."""
    manifest = unseal((folder / MANIFEST).read_bytes())
    if missing := {"iter", "val_loss", "sha256"} - set(manifest):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return manifest


def manifests(out_dir: Path) -> dict[Path, dict]:
    """The checkpoints with a sound manifest, oldest first: folder -> manifest."""
    found = {}
    for folder in folders(out_dir):
        try:
            found[folder] = _manifest(folder)
        except (OSError, ValueError):
            continue  # `damage` says what is wrong with it, where it is wanted
    return found


def last(out_dir: Path) -> str:
    """The name of the newest checkpoint with a sound manifest, or `none`."""
    return next((f.name for f in reversed(manifests(out_dir))), "none")


def damage(folder: Path, files: Iterable[str] = (WEIGHTS, STATE)) -> str | None:
    """What is wrong with a checkpoint, None if nothing is: its manifest and the given files are
    compared with their sha256."""
    try:
        manifest = _manifest(folder)
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    for file in files:
        try:
            if sha256(folder / file) != manifest["sha256"].get(file):
                return f"{file} does not match its sha256"
        except OSError as error:
            return f"{file}: {error.strerror}"
    return None


def newest(out_dir: Path, files: Iterable[str] = (WEIGHTS, STATE)) -> Path:
    """The newest checkpoint that is not damaged; stderr names those that are. UserError when there
    is none."""
    found = folders(out_dir)
    bad: list[str] = []
    for folder in reversed(found):
        if (problem := damage(folder, files)) is None:
            if bad:
                print(f"{'; '.join(bad)}: using {folder.name}", file=sys.stderr, flush=True)
            return folder
        bad.append(f"checkpoint {folder} is damaged, {problem}")
    if bad:
        raise UserError(
            f"no checkpoint can be used: {'; '.join(bad)}; begin again with --overwrite=true, or"
            " name another --out_dir"
        )
    there = "" if Path(out_dir).is_dir() else " (the folder does not exist)"
    raise UserError(
        f"{out_dir} holds no checkpoint{there}: train it first, or name another --out_dir"
    )


def set_aside(out_dir: Path, chosen: Path) -> None:
    """Renames the checkpoints after the chosen one, which are damaged, so that nothing takes them
    for good ones."""
    for folder in folders(out_dir):
        if int(folder.name[5:]) > int(chosen.name[5:]):
            shutil.rmtree(folder.with_name(f"damaged_{folder.name}"), ignore_errors=True)
            folder.rename(folder.with_name(f"damaged_{folder.name}"))


def best(out_dir: Path) -> Path | None:
    """The folder with the lowest validation loss."""
    found = {f: m["val_loss"] for f, m in manifests(out_dir).items() if m["val_loss"] is not None}
    return min(found, key=lambda f: (math.isnan(found[f]), found[f])) if found else None


def read(folder: Path) -> tuple[dict, dict]:
    """A checkpoint's (weights, manifest), not compared with their sha256 again: `newest` and
    `damage` do that."""
    return load_tensors(folder / WEIGHTS), _manifest(folder)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a safetensors file holds. UserError for one that is damaged or something else."""
    try:
        if _is_utf8(path):
            return load_file(path)
        return load(path.read_bytes())  # the library maps no file whose name is not UTF-8
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); it is refused, and nothing in it was"
            " executed"
        ) from None


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def load_weights(model: Model, weights: dict[str, torch.Tensor], assign: bool = False) -> None:
    """Puts weights into a model. UserError listing what does not fit. assign: these tensors become
    the model's parameters (the model may be on the meta device)."""
    own = own_weights(model)
    wrong = [f"{k} is missing" for k in own if k not in weights] + [
        f"{k} is not part of the model" for k in weights if k not in own
    ]
    wrong += [
        f"{k} is {tuple(weights[k].shape)}, the model's is {tuple(v.shape)}"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if wrong:
        raise UserError(
            "the checkpoint does not fit the model: "
            + "; ".join(wrong[:5])
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    model.load_state_dict(weights, strict=False, assign=assign)
    if assign and model.config.tie_weights:
        model.tokens.weight = model.head.weight


def load_optimizer(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts a checkpoint's optimiser state into an optimiser; rates and decays stay as they are
    configured now."""
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name, _ in model.named_parameters()}
    for key, tensor in load_tensors(folder / STATE).items():
        kind, _, name = key.partition("/")
        if name not in states:
            raise UserError(
                f"{folder / STATE} holds {key!r}, which is not part of the model: another version"
                " wrote it; start from the weights "
                f"alone with --init_from={folder.parent.parent} and another --out_dir"
            )
        states[name][kind] = tensor.clone()  # the file is mapped: training must not hold on to it
    names = {q: name for name, q in model.named_parameters()}
    state = {}
    for i, q in enumerate(q for group in optimizer.param_groups for q in group["params"]):
        state[i] = states[names[q]]
        if isinstance(q, DTensor):
            state[i] = {
                k: distribute_tensor(v.to(q.device), q.device_mesh, q.placements) if v.dim() else v
                for k, v in state[i].items()
            }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def read_config(out_dir: Path) -> tuple[ModelConfig, TrainConfig]:
    """A run's stored configuration, whatever version wrote it: a key that is no more is named and
    ignored, one that was not yet known has its default. UserError for a value that is not valid."""
    path = out_dir / "config.yaml"
    try:
        model_config, config = parse(
            [],
            ModelConfig,
            TrainConfig,
            base=known(read_yaml(path), path, ModelConfig, TrainConfig),
        )
    except UserError as error:
        raise UserError(f"{out_dir}: {error}") from None
    if not model_config.vocab_size:
        raise UserError(
            f"{path} has no vocab_size, which training writes there: copy the file from the run"
            " again"
        )
    return model_config, config


def load_run(
    out_dir: str | Path, device: str = "cpu", which: str = "newest"
) -> tuple[Model, dict, dict]:
    """A run's "newest" or "best" checkpoint for evaluation or sampling -> (model in eval mode, its
    stored config, the manifest)."""
    out_dir = Path(out_dir)
    folder = best(out_dir) if which == "best" else None
    if folder and (problem := damage(folder, (WEIGHTS,))):
        raise UserError(f"the best checkpoint {folder} is damaged, {problem}: use the newest")
    folder = folder or newest(out_dir, (WEIGHTS,))
    model_config, config = read_config(out_dir)
    model = Model(model_config)
    weights, manifest = read(folder)
    load_weights(model, weights)
    return model.to(device).eval(), {**vars(model_config), **vars(config)}, manifest
