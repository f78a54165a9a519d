"""Decide where a fine-tuning run starts: at its first step, at a checkpoint of its output folder, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..training.resume import (
    CheckpointError,
    changed_arguments,
    choose_by_path,
    choose_checkpoint,
    find_checkpoints,
    refuse_existing_model,
    warn_of_changes,
)
from ..training.run_record import RECORD_NAME, RunRecord, public_record, public_values, read_record_if_any, record_of
from ..training.sealed_files import check_files, describe_files, read_sealed, seal
from ..utils.command_line import ArgumentError
from ..utils.files import flush_to_disk, write_atomically
from ..utils.model_folder import explain_folder
from ..utils.text_files import read_json

logger = logging.getLogger(__name__)

FILE_LIST = "checkpoint.json"  # in a checkpoint of `Trainer`

# Beginnings of the names of arguments that change no weight: where a run writes, what it reports, and what it runs on.
_UNCHECKED = (
    *("output_dir", "resume_from_checkpoint", "save_total_limit", "run_name", "report_to"),
    *("project", "disable_tqdm", "log_", "logging_", "num_threads", "dataloader_", "use_cpu", "ddp_", "local_rank"),
    "dry_run",
)


# Files that loading a checkpoint may read; `Trainer` writes the first last.
_REQUIRED = ("trainer_state.json", "*.safetensors", "optimizer*", "scheduler.pt", "rng_state*.pth")
_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".json")


class TrainerCheckpoint(NamedTuple):
    """A checkpoint that was found complete, and the record and the labels of its run, if it has them."""

    path: Path
    record: RunRecord | None
    labels: Sequence[str] | None

    @property
    def step(self) -> int:
        """Number of updates that were done."""
        return int(read_json(self.path / "trainer_state.json")["global_step"])


class ResumePoint(NamedTuple):
    """Where a run starts (None: at its first step), and the record that it has left in its folder, if it has."""

    checkpoint: TrainerCheckpoint | None
    record: RunRecord | None
    goes_back: bool = False  # to a checkpoint that was named, so later ones are set aside


def write_file_list(folder: Path, record: RunRecord | None, labels: Sequence[str] | None) -> None:
    """Write the list of a new checkpoint's files, with their digests, and what is known of its run; flush all."""
    described = describe_files(folder)
    for name in described:
        flush_to_disk(folder / name)
    about = None if record is None else public_record(record)
    write_atomically(folder / FILE_LIST, seal({"files": described, "record": about, "labels": labels}))


def read_file_list(path: Path) -> TrainerCheckpoint:
    """
    Check the files of a checkpoint against its list, and return it with what the list says of its run.

    Raises `CheckpointError` if the list is missing, or a file is not what was written.
    """
    content = read_sealed(path / FILE_LIST)
    described: Any = content.get("files")
    record: Any = content.get("record")
    check_files(path, described)
    for file in path.rglob("[!.]*"):
        name = file.relative_to(path).as_posix()
        if file.suffix in _LOADED and file.is_file() and name not in {*described, FILE_LIST}:
            raise CheckpointError(f"{path} has {name}, which was not written with it. Remove that file.")
    try:
        found = None if record is None else record_of(record, str(path / FILE_LIST), is_finished=False)
        return TrainerCheckpoint(path, found, content.get("labels"))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_trainer_checkpoint(path: Path) -> TrainerCheckpoint:
    """Open a checkpoint; raise `CheckpointError` if a file is missing, or not what was written."""
    for pattern in _REQUIRED:
        if not any(path.glob(pattern)):
            raise CheckpointError(f"{path} has no {pattern}: it is incomplete, or not of a fine-tuning run.")
    return read_file_list(path)


def _has_model(folder: Path) -> bool:
    """Return whether a folder has a model whose files open; warn if they do not."""
    problem = explain_folder(folder) if (folder / "config.json").is_file() else f"{folder} has no config.json."
    if problem is not None:
        logger.warning("The run had finished, but its model is damaged and will be written again: %s", problem)
    return problem is None


def _checked(*given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the arguments that a run had and those that it has now, as `run.json` has them, and names to compare."""
    before, now = ({name: value for name, value in public_values(each).items() if value is not None} for each in given)
    return before, now, sorted(name for name in before.keys() | now.keys() if not name.startswith(_UNCHECKED))


def _check_task(record: RunRecord | None, task: str, option: str, value: object) -> None:
    """Raise `ArgumentError` if what an option names is of a run of another task."""
    if record is not None and record.task != task:
        raise ArgumentError(f"{option}={value} has a run of the task {record.task}. Give another {option}.")


def _resume_point_by_path(path: Path, folder: Path) -> ResumePoint:
    """Return where a run starts that is to begin at the checkpoint at a path, or has begun there."""
    option = "resume_from_checkpoint"

    def began_there(record: RunRecord | None) -> bool:
        asked = None if record is None else record.arguments.get(option)
        return asked is not None and Path(str(asked)).resolve() == path.resolve()

    def read(candidate: Path) -> TrainerCheckpoint:
        try:
            return read_trainer_checkpoint(candidate)
        except CheckpointError as error:
            raise CheckpointError(f"{option}={error}" if candidate == path else str(error)) from error

    record = read_record_if_any(folder)
    if record is not None and record.finished is not None and began_there(record) and _has_model(folder):
        return ResumePoint(None, record)
    found = choose_by_path(option, path, folder, read, lambda checkpoint: began_there(checkpoint.record))
    if began_there(found.record):
        return ResumePoint(found, found.record)
    if not find_checkpoints(folder):
        refuse_existing_model(folder)
    return ResumePoint(found, None, goes_back=True)


def find_resume_point(
    output_dir: str, resume_from_checkpoint: str | None, task: str, arguments: Mapping[str, Any]
) -> ResumePoint:
    """
    Find where a run starts: a checkpoint, the first step, or neither, if there is a record and no checkpoint.

    The same command goes on from the newest complete checkpoint. `resume_from_checkpoint` is None for this rule;
    "true" to go on even with other arguments or if finished; "false" to refuse a folder with a run; or the path of a
    checkpoint to begin at. Raises `ArgumentError` for a run with other arguments or of another task, a model of
    unknown origin, and checkpoints that cannot be used.
    """
    folder, mode = Path(output_dir), str(resume_from_checkpoint).lower()
    if mode not in ("none", "true", "false"):
        point = _resume_point_by_path(Path(str(resume_from_checkpoint)), folder)
        if point.checkpoint is None:  # the run is finished, so as without a path
            return find_resume_point(output_dir, None, task, arguments)
        _check_task(point.checkpoint.record, task, "resume_from_checkpoint", resume_from_checkpoint)
        if point.checkpoint.record is not None:
            warn_of_changes(*_checked(point.checkpoint.record.arguments, arguments))
        return point
    has_checkpoints, record = bool(find_checkpoints(folder)), read_record_if_any(folder)
    is_finished = record is not None and record.finished is not None and _has_model(folder)
    where, advice = f"output_dir={folder} has", "Give another output_dir, or go on anyway"
    if mode == "true" and not has_checkpoints:
        raise ArgumentError(f"{where} no checkpoint. Remove resume_from_checkpoint.")
    if not has_checkpoints and not is_finished:
        refuse_existing_model(folder)
        return ResumePoint(None, None)
    if mode == "false":
        raise ArgumentError(f"{where} a run, and resume_from_checkpoint is false. {advice} without it.")
    checkpoint = None
    if mode == "true" or not is_finished:
        checkpoint = choose_checkpoint("auto", folder, read_trainer_checkpoint)
        assert checkpoint is not None
        record = checkpoint.record or record  # run.json may be damaged
    _check_task(record, task, "output_dir", folder)
    advice += " with --resume_from_checkpoint true."
    if mode == "true":
        if record is not None:
            warn_of_changes(*_checked(record.arguments, arguments))
    elif record is None:
        raise ArgumentError(f"{where} checkpoints, but no {RECORD_NAME} to compare. {advice}")
    elif changes := changed_arguments(*_checked(record.arguments, arguments)):
        raise ArgumentError(f"{where} a run with other arguments: {changes}. {advice}")
    return ResumePoint(checkpoint, record)
