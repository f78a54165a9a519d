"""
The rule by which the same command goes on from the checkpoints in its output folder.

A run resumes from the newest checkpoint that is complete and fits its arguments, and says so. A folder whose
checkpoints cannot be used, or that has a model and no checkpoint, is refused and left alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..utils.command_line import ArgumentError
from ..utils.files import lock_folder, remove
from ..utils.names import printable_name

logger = logging.getLogger(__name__)

CheckpointT = TypeVar("CheckpointT")


class CheckpointError(ArgumentError):
    """A checkpoint that cannot be written or used; the message says why, and what to do."""


def step_of(path: Path) -> int:
    """Return the number of updates that a folder `checkpoint-STEP` is named after."""
    return int(path.name.partition("-")[2])


def find_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Return the folders `checkpoint-STEP` in a folder, newest first, whether they are complete or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def _usable(
    output_dir: str | os.PathLike, read: Callable[[Path], CheckpointT], refused: list[str]
) -> Iterator[CheckpointT]:
    """Yield what `read` returns for each usable checkpoint, newest first; log the reasons of others into `refused`."""
    for path in find_checkpoints(output_dir):
        try:
            yield read(path)
        except CheckpointError as error:
            logger.warning("Checkpoint refused: %s", error)
            refused.append(str(error))


def choose_checkpoint(
    resume: str, output_dir: str | os.PathLike, read: Callable[[Path], CheckpointT]
) -> CheckpointT | None:
    """
    Choose what a run goes on from; return what `read` returns for it, or None to begin at the first step.

    Args:
        resume: "auto": the newest usable checkpoint in `output_dir`, if it has any; "never": none, and `output_dir`
            may have none.
        output_dir: Folder of the run.
        read: Opens a checkpoint; raises `CheckpointError` unless it is complete and fits the run's arguments.

    Raises:
        CheckpointError: If none of those in `output_dir` can be used, or there are some and `resume` is "never".
    """
    if resume == "never":
        if find_checkpoints(output_dir):
            raise CheckpointError(
                f"output_dir={output_dir} has checkpoints, and resume is never. Remove them, give another output_dir,"
                " or set resume to auto."
            )
        return None
    refused: list[str] = []
    for checkpoint in _usable(output_dir, read, refused):
        return checkpoint
    if refused:
        raise CheckpointError(
            f"No checkpoint in output_dir={output_dir} can be used, and a run does not start over by itself. Give"
            f" another output_dir, or remove them. {' '.join(refused)}"
        )
    return None


def choose_by_path(
    option: str,
    path: Path,
    output_dir: Path,
    read: Callable[[Path], CheckpointT],
    began_there: Callable[[CheckpointT], bool],
) -> CheckpointT:
    """
    Choose what a run goes on from that is to begin at the checkpoint at a path, the value of an option.

    That is the newest checkpoint in `output_dir` of a run that `began_there`, even if the one at the path was removed
    since; otherwise the one at the path. Raises `CheckpointError` if that cannot be used, or is of another folder and
    `output_dir` has checkpoints.
    """
    for candidate in _usable(output_dir, read, []):
        if began_there(candidate):
            return candidate
    if not path.is_dir():
        raise CheckpointError(f"{option}={path} is not a folder. Give a checkpoint, or leave {option} out.")
    if found := find_checkpoints(path):
        raise CheckpointError(
            f"{option}={path} is the folder of a run. Give one of its checkpoints, such as {found[0]}; or leave"
            f" {option} out, and the same command goes on from the newest one in output_dir."
        )
    checkpoint = read(path)
    if path.resolve().parent != output_dir.resolve() and (others := find_checkpoints(output_dir)):
        raise CheckpointError(
            f"output_dir={output_dir} has checkpoints of another run, the newest {others[0].name}, and {option}={path}"
            f" is not one of them. Give another output_dir, or leave {option} out."
        )
    return checkpoint


def set_aside_later(output_dir: Path, step: int) -> None:
    """Rename the checkpoints in a folder that are of later steps than the one from which a run goes on."""
    for later in find_checkpoints(output_dir):
        if step_of(later) > step:
            abandoned = later.with_name(f"abandoned-{later.name}")
            remove(abandoned)
            later.rename(abandoned)
            logger.warning("%s is after step %d, so it is renamed to %s.", later.name, step, abandoned.name)


def refuse_existing_model(output_dir: str | os.PathLike) -> None:
    """Raise `ArgumentError` if a folder has a model, which a run without a checkpoint there would overwrite."""
    if Path(output_dir, "config.json").is_file():
        raise ArgumentError(f"output_dir={output_dir} has a model already. Give another folder, or remove this one.")


def _resolved(value: Any) -> Any:
    """Return an argument in a form that is the same for all spellings of a path."""
    if isinstance(value, list):
        return [_resolved(entry) for entry in value]
    return os.path.realpath(value) if isinstance(value, str) else value


def changed_arguments(saved: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return which of the named arguments a run had otherwise, with both values; empty if none."""
    return ", ".join(
        f"{name} is {now.get(name, 'not given')} and was {saved.get(name, 'not given')}"
        for name in names
        if _resolved(now.get(name)) != _resolved(saved.get(name))
    )


def warn_of_changes(saved: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> None:
    """Warn if a run that resumes had other arguments of these names."""
    if changes := changed_arguments(saved, now, sorted(names)):
        logger.warning("Resuming a run that had other arguments: %s.", changes)


@contextlib.contextmanager
def lock_output_folder(output_dir: str | os.PathLike) -> Iterator[None]:
    """Create an output folder and lock it. Raises `ArgumentError` if another run has, or it cannot be written to."""
    if (shown := printable_name(str(output_dir))) != str(output_dir):
        raise ArgumentError(f"output_dir={shown} is not UTF-8 text, which the libraries that save models need.")
    with lock_folder(output_dir):
        yield
