"""
`run.json`: what a run did, in its own words, for the model card and for whoever finds the folder later.

A run writes it into the folder of its model. Its fields are those of `RunRecord`:

    {
      "task": "automatic-speech-recognition",
      "arguments": {"learning_rate": 5e-05, ...},
      "base_model": "runs/base",
      "data": [{"name": "corpus/train", "split": null, "hours": 9.8, "utterances": 2763}],
      "steps": 20000,
      "evaluation": [{"dataset": "corpus/test", "split": null, "wer": 0.082, "cer": 0.021, "num_utterances": 410}],
      "versions": {"dinosr_hf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
      "started": "2026-11-25T09:00:00+00:00",
      "finished": "2026-11-25T15:30:00+00:00",
      "hardware": "1 x NVIDIA H100"
    }
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RECORD_NAME = "run.json"
TASKS = ("pretraining", "automatic-speech-recognition", "audio-classification")

# What an entry of `evaluation` may have. Rates and accuracy are shares, from 0 to 1.
METRICS = (
    *("wer", "cer", "accuracy", "macro_f1", "real_time_factor"),
    *("loss", "target_perplexity", "prediction_perplexity", "active_codewords", "pnmi", "phone_purity"),
)


@dataclass(frozen=True)
class RunRecord:
    """
    What a run did.

    Attributes:
        task: One of `TASKS`; the Hub's names where it has one.
        arguments: What the run was told, all of it, in plain types.
        base_model: What it started from, a folder or a name on the Hub; None: from random weights.
        data: What it trained on: `name`, as the run was told; `split` or None; `hours` of audio and number of
            `utterances`, None where a stream was not counted.
        steps: Updates of the optimizer.
        evaluation: What it measured at its end: `dataset`, `split` or None, `num_utterances`, and any of `METRICS`.
        versions: Of the libraries, by name; those of dinosr_hf, torch and transformers at least.
        started: Time in ISO 8601 with its zone.
        finished: The same; None while the run is going on.
        hardware: In a few words.
    """

    task: str
    arguments: dict[str, Any]
    base_model: str | None
    data: list[dict[str, Any]]
    steps: int
    evaluation: list[dict[str, Any]]
    versions: dict[str, str]
    started: str
    finished: str | None
    hardware: str


def time_now() -> str:
    """The time as `started` and `finished` have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that decide what a run does, where installed."""
    versions = {"python": platform.python_version()}
    for name in ("dinosr-hf", "torch", "transformers", "accelerate", "datasets", "peft"):
        try:
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware(num_processes: int = 1) -> str:
    """The device of this process, times the number of processes, in a few words."""
    if torch.cuda.is_available():
        return f"{num_processes} x {torch.cuda.get_device_name()}"
    return f"CPU ({platform.machine()}), {os.cpu_count()} cores, {num_processes} process(es)"


def write_record(folder: str | os.PathLike, record: RunRecord) -> Path:
    """
    Write `run.json` into a folder, or over the one there, whole or not at all.

    Returns:
        The file.

    Raises:
        ValueError: If a field of the record cannot be so.
    """
    content = dataclasses.asdict(record)
    _check(content, "This record", is_finished=record.finished is not None)
    path = Path(folder) / RECORD_NAME
    aside = path.with_suffix(".unfinished")
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


def read_record(folder: str | os.PathLike) -> RunRecord:
    """
    Read the record of a finished run.

    Args:
        folder: Where the run left its model.

    Raises:
        ValueError: If there is none, the run is not finished, or a field is missing or cannot be so.
    """
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {RECORD_NAME}, the record that a run leaves. Give the folder of a run, or the record's"
            " fields under `run` in the provenance file."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Let the run write it again.") from error
    return record_of(content, str(path))


def record_of(content: Any, where: str) -> RunRecord:
    """
    Take the record of a finished run from what a file has.

    Args:
        content: As `run.json` has it.
        where: What to call it in errors.

    Raises:
        ValueError: If a field is missing or cannot be so; all that is wrong is named.
    """
    _check(content, where, is_finished=True)
    return RunRecord(**{field.name: content[field.name] for field in dataclasses.fields(RunRecord)})


def _check(content: Any, where: str, *, is_finished: bool) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must have the fields of a run's record, but holds a {type(content).__name__}.")
    problems = list(_problems(content, is_finished))
    if problems:
        raise ValueError(f"{where} is no complete record of a run:\n" + "\n".join(f"- {line}" for line in problems))


def _problems(content: Mapping[str, Any], is_finished: bool) -> Iterator[str]:
    known = {field.name for field in dataclasses.fields(RunRecord)}
    yield from (f"{name} is no field of it" for name in content if name not in known)
    missing = known - set(content)
    yield from (f"{name} is missing" for name in sorted(missing))
    rules = [
        ("task", content.get("task") in TASKS, f"must be one of {', '.join(TASKS)}"),
        ("arguments", isinstance(content.get("arguments"), Mapping), "must be arguments by their names"),
        ("base_model", isinstance(content.get("base_model"), str | None), "must be a name or null"),
        ("data", _is_list(content.get("data"), ("name", "split", "hours", "utterances")), _DATA_RULE),
        ("steps", isinstance(content.get("steps"), int) and content["steps"] >= 0, "must be a number of updates"),
        ("evaluation", _is_list(content.get("evaluation"), ("dataset", "split", "num_utterances")), _EVALUATION_RULE),
        ("versions", isinstance(content.get("versions"), Mapping), "must be versions by the libraries' names"),
        ("started", _is_time(content.get("started")), "must be a time, such as 2026-11-25T09:00:00+00:00"),
        ("hardware", bool(content.get("hardware")), "must say what the run ran on"),
    ]
    yield from (f"{name} {allowed}" for name, holds, allowed in rules if not holds and name not in missing)
    if is_finished and "finished" not in missing and not _is_time(content["finished"]):
        yield "finished is not a time: the run was not seen to its end. Finish it"
    for entry in content.get("evaluation") or ():
        unknown = set(entry) - {"dataset", "split", "num_utterances", *METRICS} if isinstance(entry, Mapping) else ()
        yield from (f"evaluation has {name}, which is none of {', '.join(METRICS)}" for name in sorted(unknown))


_DATA_RULE = "must be a list, each with name, split, hours and utterances"
_EVALUATION_RULE = "must be a list, each with dataset, split and num_utterances"


def _is_list(value: Any, names: tuple[str, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) and set(names) <= set(item) for item in value)


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False
