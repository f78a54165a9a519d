"""
Checkpoints that a run can be killed over: written aside, flushed, checked by their digests, used only if whole.

A checkpoint is a folder `checkpoint-STEP`: the model as `from_pretrained` opens it, `training_state.pt` (optimizer,
scaler), `process_states.pt` (random states and running sums of each process), and `checkpoint.json` (the rest, and the
digest of each file), which is written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
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
from .state import save_model

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says why, and what to do."""


class Checkpoint(NamedTuple):
    """
    A checkpoint that was found whole.

    Attributes:
        path: Its folder.
        manifest: What its `checkpoint.json` holds: `step`, `progress`, `feed`, `arguments`, `versions`, ...
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates completed."""
        return int(self.manifest["step"])


def random_state() -> dict[str, Any]:
    """All of this process's random states, in types that `torch.load(weights_only=True)` accepts."""
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set what `random_state` gave."""
    random.setstate(state["python"])
    numpy_state = dict(state["numpy"])
    numpy_state["state"] = {**numpy_state["state"], "key": np.array(numpy_state["state"]["key"], dtype=np.uint32)}
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself before going on."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks flush no folders
            raise
    finally:
        os.close(descriptor)


def _write(
    path: Path, model: DinoSRForPreTraining, training: dict[str, Any], processes: list[Any], manifest: dict[str, Any]
) -> None:
    """The whole folder, aside under another name until it is complete."""
    aside = path.with_name(f".unfinished-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_model(model, aside)
        torch.save(training, aside / "training_state.pt")
        torch.save(processes, aside / "process_states.pt")
        files = sorted(file for file in aside.iterdir() if file.is_file())
        for file in files:
            _flush(file)
        described = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files}
        (aside / MANIFEST).write_text(json.dumps({**manifest, "files": described}, indent=1), encoding="utf-8")
        _flush(aside / MANIFEST)
        _flush(aside)
        if path.exists():  # the same step of an earlier attempt, refused or run over again
            _remove(path)
        aside.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed is none."""
    aside = path.with_name(f".removed-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def find_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-STEP` in a folder, newest first, whole or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=_step_of, reverse=True)


def _older(path: Path) -> list[Path]:
    """The checkpoints before one, newest first. One that claims to be after it was refused, and is left alone."""
    return [other for other in find_checkpoints(path.parent) if _step_of(other) < _step_of(path)]


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
) -> Path:
    """
    Write `checkpoint-STEP`, then remove all but the newest. All processes call it together; the main one writes.

    Args:
        output_dir: Of the run.
        step: Updates completed.
        model: Without wrappers.
        optimizer: Its state is saved.
        accelerator: For its scaler and processes.
        process_state: What each process has of its own, besides its random states: tensors and plain values.
        manifest: What all have in common; values that JSON can hold.
        keep: How many checkpoints stay.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it cannot be written; checkpoints that are there stay as they are.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    processes = gather_object([{"random": random_state(), **process_state}])
    problem = None
    if accelerator.is_main_process:
        training = {"optimizer": optimizer.state_dict()}
        if accelerator.scaler is not None:
            training["scaler"] = accelerator.scaler.state_dict()
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        manifest = {
            "format": FORMAT,
            "step": step,
            "num_processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "versions": {**versions, "accelerate": accelerate.__version__, "numpy": np.__version__},
            **manifest,
        }
        try:
            _write(path, model, training, processes, dict(manifest))
            for old in _older(path)[keep - 1 :]:
                _remove(old)
        except Exception as error:  # whatever it is, the run is worth more than this checkpoint
            problem = f"{type(error).__name__}: {error}"
    problem = broadcast_object_list([problem])[0]
    if problem is not None:
        whole = next(iter(find_checkpoints(output_dir)), None)
        rest = f"The last one, {whole}, is as it was." if whole else "There is none before it."
        raise CheckpointError(
            f"{path} could not be written ({problem}). {rest} Free space in {Path(output_dir).resolve()}."
        )
    return path


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """
    Open a checkpoint and check that each of its files is what was written.

    Raises:
        CheckpointError: If it is unfinished, truncated, changed, or not from this program.
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
        raise CheckpointError(f"{path / MANIFEST} is of format {found}, and this version reads {FORMAT}.")
    for name, wanted in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}.")
        size = file.stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(f"{file} has {size:,} bytes instead of {wanted['bytes']:,}: it is truncated.")
        if _digest(file) != wanted["sha256"]:
            raise CheckpointError(f"{file} is not what was written: its SHA-256 differs.")
    return Checkpoint(path, manifest)


def _candidates(folder: Path, architecture: Mapping[str, Any]) -> Iterator[Checkpoint | str]:
    """Each checkpoint of a folder, newest first: itself if it can be used, or why not."""
    for path in find_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(path)
            check_architecture(checkpoint, architecture)
        except CheckpointError as error:
            yield str(error)
        else:
            yield checkpoint


def check_architecture(checkpoint: Checkpoint, architecture: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a checkpoint is of another model than `architecture` describes."""
    saved = checkpoint.manifest["architecture"]
    differing = [name for name, value in architecture.items() if saved.get(name) != value]
    if differing:
        shown = ", ".join(f"{name} {saved.get(name)} instead of {architecture[name]}" for name in differing)
        raise CheckpointError(f"{checkpoint.path} is of another model: {shown}.")


def choose_checkpoint(
    resume: str, output_dir: str | os.PathLike, architecture: Mapping[str, Any], accelerator: Accelerator
) -> Checkpoint | None:
    """
    The checkpoint that a run goes on from, the same in all processes.

    Args:
        resume: "auto": the newest in `output_dir` that is whole and of this model; others are named, with the reason.
            "never": none. Else the path of one.
        output_dir: Of the run.
        architecture: What the model must have been built with.
        accelerator: The main process reads and decides.

    Returns:
        It, or None where there is none.

    Raises:
        CheckpointError: If there are checkpoints in `output_dir` but none can be used, if there are some and `resume`
            is "never", or if the one asked for cannot be used.
    """
    choice: Checkpoint | None = None
    problem: str | None = None
    if accelerator.is_main_process:
        try:
            choice = _choose(resume, Path(output_dir), architecture)
        except CheckpointError as error:
            problem = str(error)
    choice, problem = broadcast_object_list([choice, problem])
    if problem is not None:
        raise CheckpointError(problem)
    return choice


def _choose(resume: str, output_dir: Path, architecture: Mapping[str, Any]) -> Checkpoint | None:
    if resume == "never":
        if find_checkpoints(output_dir):
            raise CheckpointError(
                f"{output_dir} has checkpoints, and resume is never. Give another output_dir, or remove them, or let"
                " resume be auto."
            )
        return None
    if resume != "auto":
        return _choose_by_path(Path(resume), output_dir, architecture)
    refused = []
    for candidate in _candidates(output_dir, architecture):
        if isinstance(candidate, Checkpoint):
            return candidate
        logger.warning("Checkpoint refused: %s", candidate)
        refused.append(candidate)
    if refused:
        raise CheckpointError(
            f"No checkpoint in {output_dir} can be used, and the run does not start over by itself. Give another"
            f" output_dir, or remove them. {' '.join(refused)}"
        )
    return None


def _choose_by_path(path: Path, output_dir: Path, architecture: Mapping[str, Any]) -> Checkpoint:
    """The one asked for, or what a run that began from it has reached since: the same command goes on."""
    if not path.is_dir():
        raise CheckpointError(f"resume={path} is not a folder. Give auto, never, or the path of a checkpoint.")
    origin = str(path.resolve())
    for candidate in _candidates(output_dir, architecture):
        if isinstance(candidate, Checkpoint) and candidate.manifest["origin"] == origin:
            return candidate
    checkpoint = read_checkpoint(path)
    check_architecture(checkpoint, architecture)
    others = find_checkpoints(output_dir)
    if path.resolve().parent == output_dir.resolve():
        for newer in others:
            if _step_of(newer) > checkpoint.step:
                aside = newer.with_name(f"abandoned-{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
                logger.warning("%s is after %s, so it is set aside as %s.", newer.name, path.name, aside.name)
    elif others:
        raise CheckpointError(
            f"{output_dir} has checkpoints of another run, the newest {others[0].name}, and resume={path} is none"
            " of them. Give another output_dir, or let resume be auto."
        )
    checkpoint.manifest["origin"] = origin
    return checkpoint


def load_model_weights(checkpoint: Checkpoint, model: DinoSRForPreTraining) -> None:
    """Put a checkpoint's weights, teacher and codebooks into a model. Raises `CheckpointError` if they do not fit."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.path.glob("*.safetensors")):  # several, if the model is large
        weights |= load_file(file)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {error}") from error


def load_training_state(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """
    Put back optimizer and scaler, and this process's random states.

    With another number of processes random states begin anew, with a warning that says so.

    Returns:
        This process's `process_state`. With another number of processes, what all of them had gathered (`sums`, and
        `held` of the codebooks) is the main process's.
    """
    training = torch.load(checkpoint.path / "training_state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(training["optimizer"])
    if accelerator.scaler is not None and "scaler" in training:
        accelerator.scaler.load_state_dict(training["scaler"])
    processes = torch.load(checkpoint.path / "process_states.pt", map_location="cpu", weights_only=True)
    before, now = checkpoint.manifest["num_processes"], accelerator.num_processes
    if before == now:
        state = processes[accelerator.process_index]
        set_random_state(state["random"])
        return state
    logger.warning(
        "The checkpoint is of %d process(es), and now there are %d: the same steps and masks, but random numbers of"
        " dropout and layerdrop are others, and sums are rounded otherwise. The run is not bit for bit what it would"
        " have been.",
        before,
        now,
    )
    sums = torch.stack([state["sums"] for state in processes]).sum(dim=0)
    if not accelerator.is_main_process:
        return {"sums": torch.zeros_like(sums), "held": None}
    held = [state["held"] for state in processes if state["held"] is not None]
    return {"sums": sums, "held": torch.stack(held).sum(dim=0) if held else None}
