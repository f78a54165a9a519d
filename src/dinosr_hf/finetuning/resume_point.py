"""Decide where a fine-tuning run starts: at its first step, at a checkpoint of its output folder, or not at all."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..training.resume import CheckpointError, choose_checkpoint, find_checkpoints, refuse_existing_model
from ..training.run_record import RECORD_NAME, RunRecord
from ..utils.command_line import ArgumentError
from ..utils.text_files import read_json

logger = logging.getLogger(__name__)

# Beginnings of the names of arguments that change no weight: where a run writes, what it reports, and what it runs on.
_UNCHECKED = (
    *("output_dir", "resume_from_checkpoint", "save_total_limit", "push_to_hub", "hub_", "run_name", "report_to"),
    *("project", "disable_tqdm", "log_", "logging_", "num_threads", "dataloader_", "use_cpu", "ddp_", "local_rank"),
)


def read_checkpoint(path: Path) -> str:
    """
    Return the path of a checkpoint of `Trainer`; raise `CheckpointError` if a file is missing or truncated.

    `Trainer` writes trainer_state.json last. Files that were truncated later, by a disk that lost them, do not open.
    """
    for pattern in ("trainer_state.json", "*.safetensors", "optimizer*", "scheduler.pt"):
        if not any(path.glob(pattern)):
            raise CheckpointError(f"{path} has no {pattern}: it is incomplete, or not of a fine-tuning run.")
    try:
        read_json(path / "trainer_state.json")
        for file in path.glob("[!.]*.safetensors"):
            with safe_open(file, framework="pt"):
                pass
        for file in path.glob("[!.]*.pt*"):  # also .pth
            zipfile.ZipFile(file).close()
    except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} has a truncated file: {error}.") from error
    return str(path)


def _read_record(folder: Path) -> RunRecord | None:
    """Return the record in a folder, finished or not."""
    file = folder / RECORD_NAME
    try:
        return RunRecord(**read_json(file)) if file.is_file() else None
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{file} cannot be read ({error}). Remove it, or give another output_dir.") from error


def _checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given arguments that may not change when a run resumes, in the form in which `run.json` has them."""
    plain = json.loads(json.dumps(arguments, default=str))
    return {name: value for name, value in plain.items() if value is not None and not name.startswith(_UNCHECKED)}


def find_resume_point(
    output_dir: str, resume_from_checkpoint: str | None, task: str, arguments: Mapping[str, Any]
) -> tuple[str | None, RunRecord | None]:
    """
    Return the checkpoint to resume from, and the record that the run has left in its folder.

    The same command goes on from the newest complete checkpoint: (None, None) is to start at the first step, (None,
    record) a finished run. `resume_from_checkpoint` is None for this rule; "true" to go on even with other arguments
    or if finished; "false" to refuse a folder with a run; or the path of a checkpoint. Raises `ArgumentError` for a
    run with other arguments or of another task, a model of unknown origin, and checkpoints that cannot be used.
    """
    folder, mode = Path(output_dir), str(resume_from_checkpoint).lower()
    if mode not in ("none", "true", "false"):
        try:
            return read_checkpoint(Path(str(resume_from_checkpoint))), None
        except CheckpointError as error:
            raise CheckpointError(f"resume_from_checkpoint={error}") from error
    checkpoints, record = find_checkpoints(folder), _read_record(folder)
    is_finished = record is not None and record.finished is not None
    now, before = _checked(arguments), {} if record is None else _checked(record.arguments)
    changes = [
        f"{name} is {now.get(name, 'not given')} and was {before.get(name, 'not given')}"
        for name in sorted(now.keys() | before.keys())
        if now.get(name) != before.get(name)
    ]
    advice = "Give another output_dir, or go on anyway with --resume_from_checkpoint true."
    problem = None
    if mode == "true":
        if not checkpoints:
            problem = "no checkpoint. Remove resume_from_checkpoint."
        elif record is not None and changes:
            logger.warning("Resuming a run that had other arguments: %s.", ", ".join(changes))
    elif not checkpoints and not is_finished:
        refuse_existing_model(folder)
        return None, None
    elif mode == "false":
        problem = f"a run, and resume_from_checkpoint is false. {advice}"
    elif record is None:
        problem = f"checkpoints, but no {RECORD_NAME} to compare. {advice}"
    elif record.task != task:
        problem = f"a run of the task {record.task}. Give another output_dir."
    elif changes:
        problem = f"a run with other arguments: {', '.join(changes)}. {advice}"
    elif is_finished:
        return None, record
    if problem is not None:
        raise ArgumentError(f"output_dir={folder} has {problem}")
    return choose_checkpoint("auto", folder, read_checkpoint), record
