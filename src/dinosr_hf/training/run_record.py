"""`run.json`: the record of a run, beside its model, for the model card and for whoever finds the folder later."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..utils.files import write_atomically
from ..utils.names import one_line
from ..utils.text_files import read_json

logger = logging.getLogger(__name__)

RECORD_NAME = "run.json"
# The Hub's names where it has one.
TASKS = ("pretraining", "automatic-speech-recognition", "audio-classification")

# The metrics that an entry of `evaluation` may have. Rates and accuracy are shares, from 0 to 1.
METRICS = (
    *("wer", "cer", "accuracy", "macro_f1", "real_time_factor"),
    *("loss", "target_perplexity", "prediction_perplexity", "active_codewords", "pnmi", "phone_purity"),
    "anchor_pnmi",
)


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that determine a run, if installed."""
    # torch's own version also names the CUDA that it was built for, which its package from PyPI does not.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("dinosr-hf", "transformers", "accelerate", "datasets", "peft"):
        try:
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """
    What a run did.

    Attributes:
        task: One of `TASKS`.
        arguments: All arguments, in plain types.
        base_model: Folder or Hub name of the model that the run began with; None: random weights.
        data: A mapping for each dataset: `name` as given; `split` or None; `hours` of audio and number of
            `utterances`, None for a stream; in fine-tuning how many of these were `unreadable`.
        steps: Number of optimizer updates.
        evaluation: A mapping for each result at the end: `dataset`, `split` or None, `num_utterances`, and any of
            `METRICS`.
        versions: Versions of the libraries; at least of dinosr_hf, torch and transformers.
        started: Time in ISO 8601, with time zone.
        finished: Time as `started`; None while the run is going on.
        hardware: Description of the devices, as by `describe_hardware`.
    """

    task: str
    arguments: dict[str, Any]
    base_model: str | None
    data: list[dict[str, Any]]
    steps: int = 0
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=library_versions)
    started: str
    finished: str | None = None
    hardware: str


def time_now() -> str:
    """Return the time in the format of `started` and `finished`: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_hardware(device: torch.device, num_processes: int = 1) -> str:
    """Describe the hardware: the device of this process, times the number of processes."""
    if device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    if device.type == "mps":
        return f"GPU of an Apple {platform.machine()}, {num_processes} process(es)"
    return f"CPU ({platform.machine()}), {os.cpu_count()} cores, {num_processes} process(es)"


# Names of secrets, and names whose values are secrets if they are text.
_SECRET = re.compile("passw|passphrase|secret|credential|(^|_)(pwd|signature|sig)$|(key|token)$")
_SECRET_TEXT = re.compile("(^|_)(key|token|auth|authorization)_|(keys|tokens|auth|authorization)$")
# In an address: user and password, and an entry of its query.
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_QUERY = re.compile(r"([?&;]([^=&#;\s]+)=)[^&#;\s]*")


def _is_secret(name: str, value: Any) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).strip("_").lower()
    is_text = not isinstance(value, bool | int | float | None)
    return value is not None and bool(_SECRET.search(words) or (is_text and _SECRET_TEXT.search(words)))


def _public_text(text: str) -> str:
    if "://" not in text:
        return text
    return _QUERY.sub(lambda entry: entry[1] if _is_secret(entry[2], "") else entry[0], _USER.sub("", text))


def public_values(values: Any) -> Any:
    """
    Return values in the plain types of JSON, without secrets.

    Secrets are entries named like a key, a token or a password; in addresses, user and password, and the values of
    query parameters with such names.
    """
    if isinstance(values, Mapping):
        return {str(key): public_values(value) for key, value in values.items() if not _is_secret(str(key), value)}
    if isinstance(values, list | tuple | set | frozenset):
        return [public_values(value) for value in values]
    if isinstance(values, np.generic):
        values = values.item()
    return values if isinstance(values, bool | int | float | None) else _public_text(str(values))


def public_record(record: RunRecord) -> dict[str, Any]:
    """Return the content of `run.json` for a record: its fields in plain types, without secrets."""
    return public_values(dataclasses.asdict(record))


def write_record(folder: str | os.PathLike, record: RunRecord) -> Path:
    """Write `run.json` into a folder, atomically, and return its path. Raises `ValueError` for an invalid field."""
    content = public_record(record)
    _check(content, "This record", is_finished=record.finished is not None)
    return write_atomically(Path(folder, RECORD_NAME), json.dumps(content, indent=2) + "\n")


def read_record_if_any(folder: str | os.PathLike) -> RunRecord | None:
    """Return the record that a run has left, finished or not; None if it is not there or, with a warning, damaged."""
    file = Path(folder, RECORD_NAME)
    try:
        return record_of(read_json(file), str(file), is_finished=False) if file.is_file() else None
    except (ValueError, OSError) as error:
        logger.warning("%s is damaged and will be written again: %s.", file, one_line(error))
        return None


def read_record(folder: str | os.PathLike) -> RunRecord:
    """Read the record of a finished run. Raises `ValueError` if there is none, it is unfinished, or invalid."""
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {RECORD_NAME}, which every run writes. Give the folder of a run, or the record's fields"
            " under `run` in the provenance file."
        )
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error} Run the same command again to rewrite it.") from error
    return record_of(content, str(path))


def record_of(content: Any, where: str, *, is_finished: bool = True) -> RunRecord:
    """
    Build the record of a run, finished or not, from the parsed content of a file, whose name is for errors.

    Raises `ValueError` if a field is missing or invalid; the message lists all problems.
    """
    _check(content, where, is_finished=is_finished)
    return RunRecord(**{field.name: content[field.name] for field in dataclasses.fields(RunRecord)})


def _check(content: Any, where: str, *, is_finished: bool) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be an object with the fields of a run, not a {type(content).__name__}.")
    problems = list(_problems(content, is_finished))
    if problems:
        raise ValueError(f"{where} is not a complete record of a run:\n" + "\n".join(f"- {line}" for line in problems))


def _is_list_of(value: Any, required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> bool:
    """Return whether a value is a list of mappings with the required entries, and entries of these types."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping)
        and required.keys() <= item.keys()
        and all(
            isinstance(item[name], kind) for name, kind in {**required, **(optional or {})}.items() if name in item
        )
        for item in value
    )


def _problems(content: Mapping[str, Any], is_finished: bool) -> Iterator[str]:
    known = [each.name for each in dataclasses.fields(RunRecord)]
    missing = [name for name in sorted(known) if name not in content]
    yield from (f"{name} is not a known field" for name in content if name not in known)
    yield from (f"{name} is missing" for name in missing)
    values: dict[str, Any] = {**dict.fromkeys(known), **content}
    steps, evaluation = values["steps"], values["evaluation"]
    rules = {
        "task must be one of " + ", ".join(TASKS): values["task"] in TASKS,
        "arguments must map names to values": isinstance(values["arguments"], Mapping),
        "base_model must be a name or null": isinstance(values["base_model"], str | None),
        "data must be a list, each with name, split, hours and utterances": _is_list_of(
            values["data"],
            {"name": str, "split": str | None, "hours": float | int | None, "utterances": int | None},
        ),
        "steps must be a number of updates": isinstance(steps, int) and steps >= 0,
        "evaluation must be a list, each with dataset, split and num_utterances, and metrics as numbers": _is_list_of(
            evaluation,
            {"dataset": str, "split": str | None, "num_utterances": int},
            dict.fromkeys(METRICS, float | int | None),
        ),
        "versions must map libraries to versions": isinstance(values["versions"], Mapping)
        and all(isinstance(version, str) for version in values["versions"].values()),
        "started must be a time, such as 2026-11-25T09:00:00+00:00": _is_time(values["started"]),
        "finished is not a time: the run did not finish. Run the same command again to finish it": (
            _is_time(values["finished"]) or (values["finished"] is None and not is_finished)
        ),
        "hardware must not be empty": isinstance(values["hardware"], str) and bool(values["hardware"]),
    }
    yield from (text for text, holds in rules.items() if not holds and text.split()[0] not in missing)
    for entry in evaluation or ():
        unknown = set(entry) - {"dataset", "split", "num_utterances", *METRICS} if isinstance(entry, Mapping) else ()
        yield from (f"evaluation has {name}, which is not one of {', '.join(METRICS)}" for name in sorted(unknown))


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False
