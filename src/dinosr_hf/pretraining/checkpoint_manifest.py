"""What `checkpoint.json` holds, the state of a run besides its tensors, and a check that it is what was written."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

from ..training.resume import CheckpointError, find_checkpoints, step_of
from ..training.sealed_files import read_sealed
from .monitor import Watch

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
    progress: Annotated[dict[str, Any], RunProgress]  # the fields of a dataclass
    feed: FeedState
    monitor: Annotated[dict[str, list[dict[str, Any]]], dict[str, list[Watch]]]
    architecture: dict[str, Any]
    arguments: dict[str, Any]
    origin: str | None
    anchor: str | None
    files: dict[str, FileEntry]


def _problems(value: Any, kind: Any, name: str) -> Iterator[str]:
    """Say what in a value from JSON is not of a type. Whole numbers must be at least 0, and all numbers finite."""
    if kind is Any:
        return
    if get_origin(kind) is Annotated:
        kind = kind.__metadata__[0]
    choices = get_args(kind)
    if isinstance(kind, types.UnionType):
        if all(any(_problems(value, choice, name)) for choice in choices):
            yield f"{name} is {value!r:.80}"
    elif get_origin(kind) is list and isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _problems(entry, choices[0], f"{name}[{number}]")
    elif get_origin(kind) is dict and isinstance(value, dict):
        for key, entry in value.items():
            yield from _problems(entry, choices[1], f"{name}.{key}")
    elif (fields := _fields(kind)) is not None and isinstance(value, dict):
        yield from (f"{name}.{key} is missing" for key in fields if key not in value)
        yield from (f"{name}.{key} is not known" for key in value if key not in fields)
        for key in fields.keys() & value.keys():
            yield from _problems(value[key], fields[key], f"{name}.{key}")
    elif not (
        (kind is int and type(value) is int and value >= 0)
        or (kind is float and type(value) in (int, float) and math.isfinite(value))
        or (kind in (str, bool, type(None)) and type(value) is kind)
    ):
        yield f"{name} is {value!r:.80}"


def _fields(kind: Any) -> dict[str, Any] | None:
    """Return the types of the fields of a dataclass or a dictionary with known keys; None if it is neither."""
    is_known = dataclasses.is_dataclass(kind) or is_typeddict(kind)
    return get_type_hints(kind, include_extras=True) if is_known else None


def read_manifest(folder: Path) -> Manifest:
    """
    Read and check the `checkpoint.json` of a checkpoint.

    Raises `CheckpointError` if it is missing, damaged or changed, of another format, or inconsistent.
    """
    file = folder / MANIFEST
    content = read_sealed(file)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {content.get('format')}, but this version reads format {FORMAT}.")
    problems = list(_problems(content, Manifest, MANIFEST)) or list(_contradictions(folder, cast(Manifest, content)))
    if problems:
        raise CheckpointError(f"{file} is not what this program writes: {'; '.join(problems[:3])}.")
    return cast(Manifest, content)


def _contradictions(folder: Path, manifest: Manifest) -> Iterator[str]:
    step, progress, files = manifest["step"], manifest["progress"], manifest["files"]
    if progress["step"] != step or progress["logged_step"] > step:
        yield f"step is {step}, but progress is {progress}"
    if folder in find_checkpoints(folder.parent) and step_of(folder) != step:
        yield f"step is {step}, but the folder is named {folder.name}"
    if manifest["num_processes"] < 1:
        yield "num_processes is 0"
    yield from (f"files has {name!r}, which is not a name" for name in files if not _is_plain_name(name))
    yield from (f"files lacks {name}" for name in (TRAINING_FILE, PROCESS_FILE) if name not in files)
    if not any(name.endswith(".safetensors") for name in files):
        yield "files has no weights"


def _is_plain_name(name: str) -> bool:
    """Return whether it is the name of a file in the folder itself."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
