"""
Checkpoints that survive a kill at any moment: written atomically, checked by their digests, used only if complete.

A checkpoint is a folder `checkpoint-STEP`: the model as `from_pretrained` opens it, `training_state.pt` (optimizer,
scaler), `process_states.pt` (random states and running sums of each process), and `checkpoint.json` (the rest, and the
digest of each file).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file

from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.resume import CheckpointError, choose_checkpoint, find_checkpoints, step_of, usable_checkpoints
from ..utils.files import TEMPORARY_PREFIX, atomic_folder, remove
from ..utils.model_folder import save_folder

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "checkpoint.json"
REMOVED_PREFIX = ".removed-"


class Checkpoint(NamedTuple):
    """A checkpoint that was found complete: its folder, and the content of its `checkpoint.json`."""

    path: Path
    manifest: dict[str, Any]  # `step`, `progress`, `feed`, `arguments`, `versions`, ...

    @property
    def step(self) -> int:
        """Number of completed updates."""
        return int(self.manifest["step"])


def random_state() -> dict[str, Any]:
    """Return all random states of this process, in types that `torch.load(weights_only=True)` accepts."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the random states that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill leaves all of it or no checkpoint."""
    removed = path.with_name(f"{REMOVED_PREFIX}{path.name}")
    remove(removed)
    path.rename(removed)
    remove(removed)


def remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Remove what a killed run left half written or half removed."""
    for prefix in (TEMPORARY_PREFIX, REMOVED_PREFIX):
        for path in Path(output_dir).glob(f"{prefix}*"):
            remove(path)


def _write(
    path: Path, model: DinoSRForPreTraining, training: dict[str, Any], processes: list[Any], manifest: dict[str, Any]
) -> None:
    if path.exists():  # of an earlier attempt that was refused
        _remove(path)
    with atomic_folder(path) as temporary:
        save_folder(model, temporary)
        torch.save(training, temporary / "training_state.pt")
        torch.save(processes, temporary / "process_states.pt")
        files = sorted(file for file in temporary.iterdir() if file.is_file())
        described = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files}
        (temporary / MANIFEST).write_text(json.dumps({**manifest, "files": described}, indent=1), encoding="utf-8")


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    model: DinoSRForPreTraining,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    process_state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    keep: int,
) -> None:
    """
    Write `checkpoint-STEP`, then remove all but the `keep` newest. All processes call it; the main one writes.

    `process_state` is the state of this process besides its random states, in tensors and plain values, and `manifest`
    that of all, in values that JSON can hold. Raises `CheckpointError` if it cannot be written; earlier checkpoints
    are unchanged.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    processes = gather_object([{"random": random_state(), **process_state}])
    problem = None
    if accelerator.is_main_process:
        training = {"optimizer": optimizer.state_dict()}
        if accelerator.scaler is not None:
            training["scaler"] = accelerator.scaler.state_dict()
        about = {
            "format": FORMAT,
            "step": step,
            "num_processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "versions": {library.__name__: library.__version__ for library in (torch, transformers, accelerate, np)},
        }
        try:
            _write(path, model, training, processes, {**about, **manifest})
            # One that claims to be of a later step was refused, and is left alone.
            earlier = [other for other in find_checkpoints(output_dir) if step_of(other) < step]
            for old in earlier[keep - 1 :]:
                _remove(old)
        except Exception as error:  # whatever it is, the run is worth more than this checkpoint
            problem = f"{type(error).__name__}: {error}"
    problem = broadcast_object_list([problem])[0]
    if problem is not None:
        last = next(iter(find_checkpoints(output_dir)), None)
        rest = f"The last checkpoint, {last}, is unchanged." if last else "There is no earlier checkpoint."
        raise CheckpointError(
            f"{path} could not be written ({problem}). {rest} Free space in {Path(output_dir).resolve()}."
        )


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """
    Open a checkpoint and check that each of its files is what was written.

    Raises `CheckpointError` if it is unfinished, truncated, changed, or not from this program.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is unfinished, or from another program.") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} has format {found}, but this version reads format {FORMAT}.")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}.")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} has {size:,} bytes instead of {expected['bytes']:,}: it is truncated.")
        if _digest(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is not what was written: its SHA-256 differs.")
    return Checkpoint(path, manifest)


def checkpoint_to_resume(
    resume: str, output_dir: str | os.PathLike, architecture: Mapping[str, Any], accelerator: Accelerator
) -> Checkpoint | None:
    """
    Choose what a run resumes from by the rule of `training.resume`, the same in all processes.

    A run that was started with the path of a checkpoint goes on from what it has reached since. `architecture` has the
    fields of the configuration that must be the same. Raises `CheckpointError` as `choose_checkpoint`, and if
    `output_dir` has checkpoints of another run than the path.
    """

    def read(path: Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        # Checkpoints from before these options lack them.
        saved = {"feature_encoder": "conv", "num_anchor_labels": 0} | checkpoint.manifest["architecture"]
        differing = [
            f"{name} {saved.get(name)} instead of {value}"
            for name, value in architecture.items()
            if saved.get(name) != value
        ]
        if differing:
            raise CheckpointError(f"{path} is of another model: {', '.join(differing)}.")
        return checkpoint

    choice: Checkpoint | None = None
    problem: str | None = None
    if accelerator.is_main_process:
        try:
            if resume in ("auto", "never"):
                choice = choose_checkpoint(resume, output_dir, read)
            else:
                choice = _choose_by_path(Path(resume), Path(output_dir), read)
        except CheckpointError as error:
            problem = str(error)
    choice, problem = broadcast_object_list([choice, problem])
    if problem is not None:
        raise CheckpointError(problem)
    return choice


def _choose_by_path(path: Path, output_dir: Path, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Return the newest checkpoint that a run has reached from the one at a path, or that one."""
    origin = str(path.resolve())
    if path.is_dir():
        for candidate in usable_checkpoints(output_dir, read):
            if isinstance(candidate, Checkpoint) and candidate.manifest["origin"] == origin:
                return candidate
    checkpoint = choose_checkpoint(str(path), output_dir, read)
    assert checkpoint is not None
    others = find_checkpoints(output_dir)
    if path.resolve().parent == output_dir.resolve():
        for newer in others:
            if step_of(newer) > checkpoint.step:
                abandoned = newer.with_name(f"abandoned-{newer.name}")
                remove(abandoned)
                newer.rename(abandoned)
                logger.warning("%s is after %s, so it is renamed to %s.", newer.name, path.name, abandoned.name)
    elif others:
        raise CheckpointError(
            f"output_dir={output_dir} has checkpoints of another run, the newest {others[0].name}, and resume={path}"
            " is not one of them. Give another output_dir, or set resume to auto."
        )
    checkpoint.manifest["origin"] = origin
    return checkpoint


def load_model_weights(checkpoint: Checkpoint, model: DinoSRForPreTraining) -> None:
    """Load a checkpoint's weights, teacher and codebooks into a model. Raises `CheckpointError` if they do not fit."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.path.glob("[!.]*.safetensors")):  # several, if the model is large
        weights |= load_file(file)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {error}") from error


def load_training_state(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """
    Restore optimizer and scaler, and the random states of this process; return its `process_state`.

    With another number of processes, random states start anew, with a warning, and the main process gets the sums over
    all (`sums`, and `held` of the codebooks), the others nothing.
    """

    def load(name: str) -> Any:
        return torch.load(checkpoint.path / name, map_location="cpu", weights_only=True)

    training, processes = load("training_state.pt"), load("process_states.pt")
    optimizer.load_state_dict(training["optimizer"])
    if accelerator.scaler is not None and "scaler" in training:
        accelerator.scaler.load_state_dict(training["scaler"])
    before, now = checkpoint.manifest["num_processes"], accelerator.num_processes
    if before == now:
        state = processes[accelerator.process_index]
        set_random_state(state["random"])
        return state
    logger.warning(
        f"The checkpoint is of {before} process(es), but there are {now} now. Steps and masks stay the same; dropout"
        " and layerdrop draw other random numbers, and sums are rounded differently. The run is not bit for bit what"
        " it would have been."
    )
    sums = torch.stack([state["sums"] for state in processes]).sum(dim=0)
    if not accelerator.is_main_process:
        return {"sums": torch.zeros_like(sums), "held": None}
    held = [state["held"] for state in processes if state["held"] is not None]
    return {"sums": sums, "held": torch.stack(held).sum(dim=0) if held else None}
