"""What `checkpoint.json` holds: the state of a run besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from ..training.resume import CheckpointError, find_checkpoints, step_of
from ..training.sealed_files import read_sealed

MANIFEST = "checkpoint.json"
FORMAT = 3
TRAINING_FILE, PROCESS_FILE = "training_state.pt", "process_states.pt"


@dataclass
class RunProgress:
    """Counters of a run, over all processes and sessions."""

    step: int = 0  # number of completed updates
    skipped_steps: int = 0  # because gradients or targets were not finite
    skipped_in_row: int = 0  # of those, since the last update
    skipped_files: int = 0  # recordings that could not be used
    utterances: int = 0  # recordings asked for
    recent_skipped: float = 0.0  # these two are halved every 10,000 recordings, so that only recent ones count
    recent_utterances: float = 0.0
    logged_step: int = 0  # of the last line of metrics
    interval_seconds: float = 0.0  # spent training since that line
    audio_seconds: float = 0.0  # trained on, without padding
    elapsed_seconds: float = 0.0  # of all sessions, evaluations included


class FeedState(TypedDict):
    """The position of the next step in the data, and by what a resumed run recognises the data."""

    epoch: int
    window: int
    step: int
    stream_state: dict[str, Any] | None
    fingerprint: str
    excerpts: dict[str, list[float]]  # of a few recordings, by utterance id
    plan: dict[str, Any]


class FileEntry(TypedDict):
    """What a file of a checkpoint must be."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """The content of `checkpoint.json`."""

    format: int
    step: int
    num_processes: int
    precision: str
    versions: dict[str, str]
    progress: dict[str, Any]  # the fields of `RunProgress`
    feed: FeedState
    monitor: dict[str, list[dict[str, Any]]]  # the fields of `Watch`
    architecture: dict[str, Any]
    arguments: dict[str, Any]
    origin: str | None
    anchor: str | None
    files: dict[str, FileEntry]


def read_manifest(folder: Path) -> Manifest:
    """
    Read the `checkpoint.json` of a checkpoint.

    Raises `CheckpointError` if it is missing, damaged or changed, of another format or step, or lists what is no file
    of the folder. That it is sealed is enough for all else: this program has written it.
    """
    file = folder / MANIFEST
    content = read_sealed(file)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {content.get('format')}, but this version reads format {FORMAT}.")
    manifest = cast(Manifest, content)
    if folder in find_checkpoints(folder.parent) and step_of(folder) != manifest["step"]:
        raise CheckpointError(f"{file} is of step {manifest['step']}, but the folder is named {folder.name}.")
    for name in manifest["files"]:
        if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
            raise CheckpointError(f"{file} lists {name!r}, which is not the name of a file.")
    return manifest
