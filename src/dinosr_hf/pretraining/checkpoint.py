"""
Checkpoints that survive a kill at any moment: written atomically, checked by their digests, used only if complete.

A checkpoint is a folder `checkpoint-STEP`: the model as `from_pretrained` opens it, `training_state.pt` (optimizer,
scaler), `process_states.pt` (random states and running sums of each process), and `checkpoint.json` (the rest, and the
digests of the other files and of itself).
"""

from __future__ import annotations

import copy
import logging
import os
import random
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, recursively_apply
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.resume import (
    CheckpointError,
    choose_by_path,
    choose_checkpoint,
    find_checkpoints,
    set_aside_later,
    step_of,
)
from ..training.run_record import library_versions
from ..training.sealed_files import check_files, describe_files, seal
from ..utils.files import TEMPORARY_PREFIX, atomic_folder, remove
from ..utils.model_folder import save_folder
from ..utils.names import one_line
from .checkpoint_manifest import FORMAT, MANIFEST, PROCESS_FILE, TRAINING_FILE, Manifest, read_manifest
from .run_folder import FINISHED_FILE, finished_step

logger = logging.getLogger(__name__)

REMOVED_PREFIX = ".removed-"
_GPUS: dict[str, Any] = {"cuda": torch.cuda, "mps": torch.mps}  # which have random states of their own


class Checkpoint(NamedTuple):
    """A checkpoint that was found complete: its folder, and the content of its `checkpoint.json`."""

    path: Path
    manifest: Manifest
    goes_back: bool = False  # it was named, and later ones are to be set aside

    @property
    def step(self) -> int:
        """Number of completed updates."""
        return self.manifest["step"]


def random_state() -> dict[str, Any]:
    """Return all random states of this process, in types that `torch.load(weights_only=True)` accepts."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    return state | {name: module.get_rng_state() for name, module in _GPUS.items() if module.is_available()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the random states that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for name, module in _GPUS.items():
        if name in state and module.is_available():
            module.set_rng_state(state[name])


def _remove(path: Path) -> None:
    """Remove a checkpoint: rename it, then delete it, so that a kill never leaves half of one under its name."""
    removed = path.with_name(f"{REMOVED_PREFIX}{path.name}")
    remove(removed)
    path.rename(removed)
    remove(removed)


def remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Remove what a killed run left half written or half removed."""
    for prefix in (TEMPORARY_PREFIX, REMOVED_PREFIX):
        for path in Path(output_dir).glob(f"{prefix}*"):
            remove(path)


class CheckpointContent(NamedTuple):
    """All that a checkpoint is written from, in copies on the CPU that training does not change."""

    weights: dict[str, torch.Tensor]
    training: dict[str, Any]  # state of optimizer and scaler
    processes: list[Any]  # of each process: random states and its part of the sums
    manifest: dict[str, Any]  # without the list of files


def _copy(state: Any) -> Any:
    """Copy the tensors in nested containers to the CPU."""
    return recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), state)


def _collect(
    step: int,
    model: DinoSRForPreTraining,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    process_state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> CheckpointContent | None:
    """Gather the state of all processes, which all of them call; the main one gets it."""
    processes = gather_object([_copy({"random": random_state(), **process_state})])
    if not accelerator.is_main_process:
        return None
    training = {"optimizer": optimizer.state_dict()}
    if accelerator.scaler is not None:
        training["scaler"] = accelerator.scaler.state_dict()
    about = {
        "format": FORMAT,
        "step": step,
        "num_processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "versions": library_versions(),
    }
    manifest = {**about, **copy.deepcopy(dict(manifest))}
    return CheckpointContent(_copy(model.state_dict()), _copy(training), processes, manifest)


def _write(path: Path, model: DinoSRForPreTraining, content: CheckpointContent, keep: int, spare_before: int) -> None:
    if path.exists():  # of an earlier attempt that was refused
        _remove(path)
    with atomic_folder(path) as temporary:
        save_folder(model, temporary, weights=content.weights)
        torch.save(content.training, temporary / TRAINING_FILE)
        torch.save(content.processes, temporary / PROCESS_FILE)
        sealed = seal({**content.manifest, "files": describe_files(temporary)})
        (temporary / MANIFEST).write_text(sealed, encoding="utf-8")
    # One that claims to be of a later step was refused, and is left alone.
    earlier = [other for other in find_checkpoints(path.parent) if step_of(other) < step_of(path)]
    spared = next((other for other in earlier if step_of(other) < spare_before), None)
    for old in earlier[keep - 1 :]:
        if old != spared:
            _remove(old)


class CheckpointWriter:
    """
    Writes `checkpoint-STEP` to a folder while training goes on, then removes all but the `keep` newest.

    Training waits only while the state is copied, and for the checkpoint before, if that is still being written. A
    context manager: at its end, a checkpoint that is being written is completed.

    Attributes:
        step: Step of the newest checkpoint, which may still be being written; 0: there is none.
    """

    def __init__(self, output_dir: str | os.PathLike, accelerator: Accelerator, keep: int) -> None:
        self.step = 0
        self._folder, self._accelerator, self._keep = Path(output_dir), accelerator, keep
        self._thread: threading.Thread | None = None
        self._problem: str | None = None  # of the newest checkpoint

    def begin(
        self,
        step: int,
        model: DinoSRForPreTraining,
        optimizer: torch.optim.Optimizer,
        *,
        process_state: Mapping[str, Any],
        manifest: Mapping[str, Any],
        spare_before: int = 0,
    ) -> None:
        """
        Copy the state and begin to write a checkpoint of it; all processes together, of which the main one writes.

        `process_state` is the state of this process besides its random states, in tensors and plain values, and
        `manifest` that of all, in values that JSON can hold. The newest checkpoint from before the step `spare_before`
        is not removed. If this one cannot be written, that is logged, and earlier checkpoints are unchanged.
        """
        self._join()  # first, so that there is one copy in memory and never two
        content = _collect(step, model, optimizer, self._accelerator, process_state, manifest)
        self.step, self._problem = step, None
        if content is not None:
            path = self._folder / f"checkpoint-{step}"
            work = partial(self._try_to_write, path, model, content, spare_before)
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)  # a second Ctrl-C ends it
            self._thread.start()

    def _try_to_write(
        self, path: Path, model: DinoSRForPreTraining, content: CheckpointContent, spare_before: int
    ) -> None:
        try:
            _write(path, model, content, self._keep, spare_before)
        except Exception as error:  # whatever it is, the run is worth more than this checkpoint
            last = next(iter(find_checkpoints(self._folder)), None)
            rest = f"The last checkpoint, {last}, is unchanged." if last else "There is no earlier checkpoint."
            self._problem = (
                f"{path} could not be written ({type(error).__name__}: {error}). {rest} Free space in"
                f" {self._folder.resolve()}."
            )
            logger.error("A checkpoint is missing: %s The run goes on.", self._problem)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until the newest checkpoint is written; all processes together. Raises `CheckpointError` if not."""
        self._join()
        problem = broadcast_object_list([self._problem])[0]
        if problem is not None:
            self.step = 0
            raise CheckpointError(problem)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:
            self._join()


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """
    Open a checkpoint and check that each of its files is what was written, and its `checkpoint.json`.

    Raises `CheckpointError` if it is unfinished, truncated, changed, or not from this program.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        check_files(path, manifest["files"])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Checkpoint(path, manifest)


def checkpoint_to_resume(
    resume: str, output_dir: str | os.PathLike, check: Callable[[Checkpoint], None], accelerator: Accelerator
) -> Checkpoint | None:
    """
    Choose what a run resumes from by the rule of `training.resume`, the same in all processes.

    A run that was started with the path of a checkpoint goes on from what it has reached since. `check` raises a
    `CheckpointError` for one that does not fit the run or cannot be restored. Raises `CheckpointError` as
    `choose_checkpoint`, and if `output_dir` has checkpoints of another run than the path.
    """

    def read(path: Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        check(checkpoint)
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

    def began_there(checkpoint: Checkpoint) -> bool:
        return checkpoint.manifest["origin"] == origin

    checkpoint = choose_by_path("resume", path, output_dir, read, began_there)
    if began_there(checkpoint):
        return checkpoint
    checkpoint.manifest["origin"] = origin
    return checkpoint._replace(goes_back=True)


def abandon_later(output_dir: Path, checkpoint: Checkpoint) -> None:
    """Set aside what a run has reached after the checkpoint that it goes back to."""
    if finished_step(output_dir) > checkpoint.step:
        (output_dir / FINISHED_FILE).unlink()
    set_aside_later(output_dir, checkpoint.step)


def _weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read the weights from the files that the manifest lists; there are several if the model is large."""
    weights: dict[str, torch.Tensor] = {}
    for name in checkpoint.manifest["files"]:
        if name.endswith(".safetensors"):
            weights |= load_file(checkpoint.path / name)
    for file in sorted(checkpoint.path.glob("[!.]*.safetensors")):
        if file.name not in checkpoint.manifest["files"]:
            logger.warning("%s is not part of the checkpoint and is ignored.", file)
    return weights


def load_model_weights(checkpoint: Checkpoint, model: DinoSRForPreTraining) -> None:
    """Load a checkpoint's weights, teacher and codebooks into a model. Raises `CheckpointError` if they do not fit."""
    try:
        # A model on the meta device takes no values, but the file's tensors in place of its own.
        model.load_state_dict(_weights(checkpoint), strict=True, assign=model.device.type == "meta")
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {one_line(error)}.") from error


def _check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` unless Adam's averages have the shapes of their parameters, which torch does not check."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameter.shape:
                shapes = f"{tuple(state[name].shape)} instead of {tuple(parameter.shape)}"
                raise ValueError(f"{name} of the optimizer has the shape {shapes}")


def load_training_state(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """
    Restore optimizer and scaler, and the random states of this process; return its `process_state`.

    With another number of processes, random states start anew, and the main process gets the sums over all (`sums`,
    and `held` of the codebooks), the others nothing. Whatever the files hold instead raises some `Exception`.
    """

    def load(name: str) -> Any:
        return torch.load(checkpoint.path / name, map_location="cpu", weights_only=True)

    training, processes = load(TRAINING_FILE), load(PROCESS_FILE)
    before, now = checkpoint.manifest["num_processes"], accelerator.num_processes
    if len(processes) != before:
        raise ValueError(f"{PROCESS_FILE} has {len(processes)} processes instead of {before}")
    optimizer.load_state_dict(training["optimizer"])
    _check_optimizer_state(optimizer)
    if accelerator.scaler is not None and "scaler" in training:
        accelerator.scaler.load_state_dict(training["scaler"])
    if before == now:
        state = cast(dict[str, Any], processes[accelerator.process_index])
        set_random_state(state["random"])
        return state
    sums = torch.stack([state["sums"] for state in processes]).sum(dim=0)
    if not accelerator.is_main_process:
        return {"sums": torch.zeros_like(sums), "held": None}
    held = [state["held"] for state in processes if state["held"] is not None]
    return {"sums": sums, "held": torch.stack(held).sum(dim=0) if held else None}
