"""Checkpoints: folders `ckpt/iter_000200/` that appear completely or not at all.

    model.safetensors         weights, tied ones once
    train_state.safetensors   tensors of the optimiser, such as `exp_avg/blocks.0.mlp.up.weight`
    manifest.json             iteration, val_loss, counters, the sha256 of the other files, and a
                              checksum of itself

Nothing is pickled. A background thread writes a checkpoint under another name, flushes it to the
disk and renames it. Weights and optimiser states are not sharded, so any number of processes can
resume from them. The newest two checkpoints and the best one are kept. If the newest is corrupt,
the one before it is used.
"""

import itertools
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
from base.output import listed, say
from model import Model, ModelConfig
from training.config import TrainConfig
from training.environment import evaluated_alike_since, kept_starts

WEIGHTS, STATE, MANIFEST = "model.safetensors", "train_state.safetensors", "manifest.json"
SET_ASIDE = ".replaced"  # Where the files of a run are while another start replaces it.


def own_weights(model: Model) -> dict[str, torch.Tensor]:
    """The tensors of a model by name, tied ones once."""
    return {
        k: v
        for k, v in model.state_dict().items()
        if not (model.config.tie_weights and k == "tokens.weight")
    }


def snapshot(
    model: Model, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, dict[str, torch.Tensor]]:
    """Copies weights and optimiser state to the CPU. Returns them by file and name.

    All processes call it, because it gathers shards. Those without `keep` get empty results.
    """
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
    """Writes checkpoints of a run, one after the other, in a thread of low priority."""

    def __init__(self, out_dir: Path):
        self.out_dir = out_dir
        self.thread: threading.Thread | None = None
        self.error: str | None = None

    def save(
        self, iteration: int, files: dict[str, dict[str, torch.Tensor]], counters: dict
    ) -> None:
        """Starts to write a snapshot as the checkpoint of an iteration. Call `wait` before it.

        If the disk is full or read-only, training continues and earlier checkpoints stay. The error
        is printed on stderr. `error` holds it until a later checkpoint is written.
        """
        what = (iteration, files, counters)
        self.thread = threading.Thread(target=self._write, args=what, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self.thread:
            self.thread.join()

    def _write(
        self, iteration: int, files: dict[str, dict[str, torch.Tensor]], counters: dict
    ) -> None:
        if sys.platform == "linux":  # Only there can a thread have its own priority.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            save(self.out_dir, iteration, files, counters)
            self.error = None
        except Exception as error:  # Training continues; the exit status reports it.
            reason = isinstance(error, OSError) and error.strerror or repr(error)
            self.error = (
                f"the checkpoint of iteration {iteration} could not be written ({reason}); the last"
                f" good one: {last(self.out_dir)}"
            )
            say(self.error, file=sys.stderr)


def save(
    out_dir: Path, iteration: int, files: dict[str, dict[str, torch.Tensor]], counters: dict
) -> Path:
    """Writes a checkpoint. Then only the newest two and the best are kept. Returns its folder.

    Args:
        files: a `snapshot`.
        counters: more entries of the manifest, of JSON types. `val_loss` is one of them; it is None
            if there was no evaluation.
    Raises: OSError if it cannot be written.
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
        if folder.exists():  # Renamed, because to delete it takes longer and could be cut short.
            os.replace(folder, aside.with_name(f"{aside.name}.old"))
        os.replace(aside, folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    kept = {*list(manifests(out_dir))[-2:], best(out_dir)}
    # Removes old checkpoints and incomplete ones of killed runs, but no other files.
    for path in {*folders(out_dir), *folder.parent.glob(".iter_*")} - kept:
        # If this fails, the next checkpoint tries it again.
        shutil.rmtree(path, ignore_errors=True)
    return folder


def folders(out_dir: Path) -> list[Path]:
    """The folders of all checkpoints, oldest first. Some may be corrupt."""
    found = [p for p in (Path(out_dir) / "ckpt").glob("iter_*") if p.name[5:].isdecimal()]
    return sorted(found, key=iteration)


def iteration(folder: Path) -> int:
    """The iteration of a checkpoint, from the name of its folder."""
    return int(folder.name[5:])


def _manifest(folder: Path) -> dict:
    """The manifest of a checkpoint. ValueError or OSError if it is missing or corrupt."""
    manifest = unseal((folder / MANIFEST).read_bytes())
    if missing := {"iter", "val_loss", "sha256"} - set(manifest):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return manifest


def manifests(out_dir: Path) -> dict[Path, dict]:
    """The checkpoints with a valid manifest, oldest first: folder -> manifest."""
    found = {}
    for folder in folders(out_dir):
        try:
            found[folder] = _manifest(folder)
        except (OSError, ValueError):
            continue  # `damage` tells what is wrong with it.
    return found


def last(out_dir: Path) -> str:
    """The name of the newest checkpoint with a valid manifest, or `none`."""
    return next((f.name for f in reversed(manifests(out_dir))), "none")


def last_good(out_dir: Path) -> str:
    """As `last`, without checkpoints whose validation loss is not finite."""
    losses = {f.name: m["val_loss"] for f, m in manifests(out_dir).items()}
    return next((n for n, x in reversed(losses.items()) if x is None or math.isfinite(x)), "none")


def damage(folder: Path, files: Iterable[str] = (WEIGHTS, STATE)) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is good.

    It compares the manifest with its checksum, and `files` with their sha256.
    """
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


def runs_in(folder: Path) -> list[str]:
    """The runs in a folder and in its subfolders, such as `out/demo/cosine`."""
    found = (sorted(Path(folder).glob(f"{depth}/config.yaml")) for depth in ("*", "*/*"))
    return [str(path.parent) for path in itertools.chain(*found)]


def runs_instead(folder: Path) -> str:
    """`: it holds the runs X, Y and 4 more; name one`, or an empty text if it holds none."""
    paths = runs_in(folder)
    return f": it holds the runs {listed(paths, 3)}; name one" if paths else ""


def newest(out_dir: Path, files: Iterable[str] = (WEIGHTS, STATE)) -> Path:
    """The newest checkpoint that is not corrupt. A message on stderr names newer, corrupt ones.

    Raises: UserError if there is no such checkpoint.
    """
    found = folders(out_dir)
    bad: list[str] = []
    for folder in reversed(found):
        if (problem := damage(folder, files)) is None:
            if bad:
                print(f"{'; '.join(bad)}: using {folder.name}", file=sys.stderr, flush=True)
            return folder
        bad.append(f"checkpoint {folder} is corrupt, {problem}")
    if bad:
        raise UserError(
            f"no checkpoint can be used: {'; '.join(bad)}; copy a good one there, or train the run"
            " again (train.py --overwrite=true)"
        )
    there = "" if Path(out_dir).is_dir() else " (the folder does not exist)"
    if Path(out_dir).is_file():
        there = " (it is a file, not a run's folder)"
    instead = runs_instead(out_dir) or ": train it first, or name another run's folder"
    if (Path(out_dir) / SET_ASIDE).is_dir():
        instead = (
            f". An interrupted --overwrite=true has left its files in {Path(out_dir) / SET_ASIDE}:"
            " move them back"
        )
    elif (Path(out_dir) / "ckpt.pt").is_file():
        instead = (
            f": its ckpt.pt is nanoGPT's. Import it with train.py --init_from={out_dir}/ckpt.pt"
            " --dataset=FOLDER --max_iters=0 --out_dir=out/NAME"
        )
    elif (Path(out_dir) / "config.json").is_file():
        instead = ": it is a model in Hugging Face's format. Load it with transformers"
    raise UserError(f"{out_dir} holds no checkpoint{there}{instead}")


def set_aside(out_dir: Path, chosen: Path) -> None:
    """Renames the checkpoints after the chosen one, which are corrupt, to `damaged_...`."""
    for folder in folders(out_dir):
        if iteration(folder) > iteration(chosen):
            shutil.rmtree(folder.with_name(f"damaged_{folder.name}"), ignore_errors=True)
            folder.rename(folder.with_name(f"damaged_{folder.name}"))


def best(out_dir: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None if there is none with a loss.

    If a resume has changed the validation windows, only later ones count, once there are any.
    """
    scored = {f: m for f, m in manifests(out_dir).items() if m["val_loss"] is not None}
    since = evaluated_alike_since(kept_starts(out_dir))

    def counts(manifest: dict) -> bool:
        """Whether its loss is of the same windows as the newest one."""
        newest = list(scored.values())[-1]
        if "windows" in manifest and "windows" in newest:
            return all(manifest[key] == newest[key] for key in ("windows", "val_data"))
        return bool(manifest["iter"] > since)  # Another version wrote one of the two.

    late = {f: m for f, m in scored.items() if counts(m)}
    found = {f: m["val_loss"] for f, m in (late or scored).items()}
    return min(found, key=lambda f: (math.isnan(found[f]), found[f])) if found else None


def read(folder: Path) -> tuple[dict, dict]:
    """Reads (weights, manifest) of a checkpoint. `newest` and `damage` have compared its sha256."""
    return load_tensors(folder / WEIGHTS), _manifest(folder)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file. UserError if it is corrupt or another kind of file."""
    try:
        if _is_utf8(path):
            return load_file(path)
        return load(path.read_bytes())  # The library cannot open a file whose name is not UTF-8.
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); it was not loaded, and nothing in it was"
            " executed"
        ) from None


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def load_weights(model: Model, weights: dict[str, torch.Tensor], assign: bool = False) -> None:
    """Loads weights into a model.

    assign: make these tensors the parameters of the model, which may be on the meta device.
    Raises: UserError that lists what does not fit.
    """
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
    """Loads the optimiser state of a checkpoint. Learning rates and decays stay as configured.

    Raises: UserError if the state is not that of this model.
    """
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name, _ in model.named_parameters()}
    for key, tensor in load_tensors(folder / STATE).items():
        kind, _, name = key.partition("/")
        if name not in states:
            raise UserError(
                f"{folder / STATE} holds {key!r}, which is not part of the model: another version"
                " wrote it. Start from the weights only, "
                f"with --init_from={folder.parent.parent} and another --out_dir"
            )
        states[name][kind] = tensor.clone()  # Not memory-mapped from the file.
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
    """The stored configuration of a run, of this version or another.

    A note on stderr names settings that do not exist any more. New settings get their defaults.
    Raises: UserError for a value that is not valid.
    """
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
    """Loads the "newest" or "best" checkpoint of a run, for evaluation or sampling.

    Returns: the model in eval mode, the stored settings, and the manifest of the checkpoint.
    Raises: UserError if there is no checkpoint, or it is corrupt.
    """
    out_dir = Path(out_dir)
    folder = best(out_dir) if which == "best" else None
    if folder and (problem := damage(folder, (WEIGHTS,))):
        raise UserError(
            f"the best checkpoint {folder} is corrupt, {problem}: use the newest, or move that"
            " folder out of ckpt"
        )
    folder = folder or newest(out_dir, (WEIGHTS,))
    model_config, config = read_config(out_dir)
    model = Model(model_config)
    weights, manifest = read(folder)
    load_weights(model, weights)
    return model.to(device).eval(), {**vars(model_config), **vars(config)}, manifest
