"""
Read what a run does not know about its model: names, languages, licences. The user gives it in a YAML file:

    repo_id: organisation/name
    license: cc-by-4.0
    languages: [en]
    datasets:
      - name: LibriSpeech/train-clean-100
        id: openslr/librispeech_asr
        license: cc-by-4.0
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # imported lazily

from ..training.run_record import RunRecord, read_record, record_of
from ..utils.command_line import read_yaml, refuse_unknown

UNPUBLISHED = "unpublished"
HUB_METRICS = ("wer", "cer", "accuracy")  # those that the Hub knows under these names


@dataclass(frozen=True)
class Dataset:
    """A dataset of a run."""

    name: str  # in the run: all of it, or enough parts from the end of a path to tell the datasets apart
    license: str  # by the Hub's identifier or in words
    id: str | None = None  # on the Hub; None: it is not there
    config: str | None = None  # on the Hub, if it has several
    task_id: str | None = None  # if it is a benchmark on the Hub: the task's id in its eval.yaml
    title: str | None = None  # on the card; None: the id or the name
    hours: float | None = None  # of audio, if the run could not count them

    @property
    def label(self) -> str:
        """Name on the card."""
        return self.title or " ".join(filter(None, (self.id, self.config))) or self.name

    def is_named(self, name: str) -> bool:
        """Return whether a run's name for a dataset means this one; a name for several has them all, after commas."""
        own, given = (
            [re.split(r"[\\/]+", each.strip("\\/")) for each in text.split(", ")] for text in (self.name, name)
        )
        pairs = zip(own, given, strict=False)
        return len(own) == len(given) and all(whole[-len(parts) :] == parts for parts, whole in pairs)


# Fields of text, in which YAML may have read a number, such as a dataset that is named by its year.
_TEXTS = (
    *("repo_id", "license", "license_name", "license_link", "license_reason", "base_model", "intended_use"),
    *("limitations", "name", "id", "config", "title"),
)


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from and what may be done with it."""

    repo_id: str  # `organisation/name` of the model on the Hub
    license: str  # of the weights, by the Hub's identifier
    languages: list[str]  # ISO 639 codes of the languages in the training data
    datasets: list[Dataset]  # all that the run was trained or evaluated on
    base_model: str | None = None  # that the run started from: its name on the Hub, or "unpublished"
    license_name: str | None = None  # for `license: other`, which the Hub has no identifier for
    license_link: str | None = None  # address of its text
    license_reason: str | None = None  # reason for this licence, in a sentence
    intended_use: str | None = None  # in a sentence or two; None: a text for the task
    limitations: str | None = None  # what was not tested or does not work; None: a general text

    def dataset(self, name: str) -> Dataset:
        """Return the dataset with this name in the run; `read_provenance` made sure that there is exactly one."""
        return next(dataset for dataset in self.datasets if dataset.is_named(name))


REQUIRED = {
    "repo_id": "`organisation/name` of the model on the Hub (--repo_id)",
    "license": "licence of the weights, by the Hub's identifier, such as cc-by-4.0 (--license)",
    "languages": "ISO 639 codes of the languages in the training data, such as [en, de] (--languages)",
    "datasets": "a list of the run's datasets, each with name and license, and with id if it is on the Hub",
}


def read_provenance(
    folder: str | os.PathLike, path: str | os.PathLike | None = None, **given: Any
) -> tuple[Provenance, RunRecord]:
    """
    Read the provenance of a model, with an entry for every dataset of its run, and the record of that run.

    Args:
        folder: Path of the run's output folder, with its `run.json`.
        path: Path of a YAML file with the fields of `Provenance`; under `run`, the record if there is no `run.json`.
        **given: Fields that replace those of the file; None keeps the file's.

    Raises:
        ValueError: If anything is missing or invalid. The message lists all of it, with where to give it.
    """
    known = [field.name for field in dataclasses.fields(Provenance)]
    content = read_yaml(Path(path), [*known, "run"], "field") if path is not None else {}
    run = content.pop("run", None)
    if isinstance(run, Mapping):  # YAML reads times as datetime
        run = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in run.items()}
    content = _with_texts(content | {name: value for name, value in given.items() if value is not None})
    refuse_unknown(given, known, "field", where="read_provenance")
    record = read_record(folder) if run is None else record_of(run, f"`run` of {path}")
    datasets, problems = _read_datasets(content.get("datasets"))
    problems = [*_find_problems(content, record), *problems, *_find_run_problems(record, datasets)]
    if problems:
        where = f"add it to {path}" if path is not None else "give a provenance file"
        lines = "\n".join(f"- {line}" for line in problems)
        raise ValueError(f"The card of {folder} cannot be written. Missing or invalid ({where}):\n{lines}")
    return Provenance(**{**content, "datasets": datasets}), record


def _with_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with numbers as text where text belongs."""
    is_number = {name: isinstance(value, int | float) and name in _TEXTS for name, value in values.items()}
    return {name: str(value) if is_number[name] else value for name, value in values.items()}


def _name_error(name: Any) -> str | None:
    """Return what the Hub refuses about a name, if anything."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None


def _find_problems(content: Mapping[str, Any], record: RunRecord) -> Iterator[str]:
    fields = ("repo_id", "license", "languages", "base_model")
    repo_id, license_id, languages, base_model = (content.get(name) or "" for name in fields)
    is_list = not languages or isinstance(languages, list)
    yield from (f"{name}: {meaning}" for name, meaning in REQUIRED.items() if not content.get(name))
    for name in _TEXTS:
        if not isinstance(content.get(name), str | None):
            yield f"{name}: {content[name]!r} is no text"
    if repo_id and (error := _name_error(repo_id)):
        yield f"repo_id: {error}"
    elif repo_id and repo_id.count("/") != 1:
        yield f"repo_id: {repo_id} must be `organisation/name`"
    if not is_list or not all(re.fullmatch("[a-z]{2,3}", str(code)) for code in languages):
        yield f'languages: {languages} must be a list of ISO 639 codes, such as [en, de]; quote Norwegian: "no"'
    if not re.fullmatch(r"[a-z0-9.\-]*", str(license_id)):
        yield f"license: {license_id} must be an identifier of the Hub, such as cc-by-4.0, or other"
    for name in ("license_name", "license_link"):
        if license_id == "other" and not content.get(name):
            yield f"{name}: required with `license: other`, for a licence that the Hub has no identifier for"
    if record.base_model is None and base_model:
        yield f"base_model: {base_model} is given, but the run started from random weights"
    elif record.base_model is not None and not base_model:
        start = f"the run started from {record.base_model}"
        yield f"base_model: {start}; give its name on the Hub, or {UNPUBLISHED} (--base_model)"
    elif base_model not in ("", UNPUBLISHED) and (error := _name_error(base_model)):
        yield f"base_model: {error}"


def _read_datasets(entries: Any) -> tuple[list[Dataset], list[str]]:
    """Return the datasets that have a name, and what is wrong with the entries."""
    datasets: list[Dataset] = []
    problems: list[str] = []
    if not isinstance(entries, list | None):
        return datasets, [f"datasets: {entries!r} is not {REQUIRED['datasets']}"]
    known = [field.name for field in dataclasses.fields(Dataset)]
    for number, entry in enumerate(entries or (), start=1):
        if not isinstance(entry, Mapping) or not entry.get("name"):
            problems.append(f"datasets: entry {number} has no name")
            continue
        entry = _with_texts(entry)
        refuse_unknown(entry, known, "field", where=f"datasets: {entry['name']}")
        if not entry.get("license"):
            problems.append(f"datasets: {entry['name']} has no license, the licence of the data")
        if entry.get("id") and (error := _name_error(entry["id"])):
            problems.append(f"datasets: id of {entry['name']}: {error}")
        if entry.get("task_id") and not (entry.get("id") and isinstance(entry["task_id"], str)):
            problems.append(f"datasets: {entry['name']} has task_id, which must be text, beside the benchmark's id")
        hours = entry.get("hours")
        if not isinstance(hours, int | float | None) or isinstance(hours, bool) or (hours is not None and hours < 0):
            problems.append(f"datasets: hours of {entry['name']} is {hours!r}, which is no number of hours")
        problems += [
            f"datasets: {name} of an entry is {entry[name]!r}, which is no text"
            for name in _TEXTS
            if not isinstance(entry.get(name), str | None)
        ]
        if isinstance(entry["name"], str):
            datasets.append(Dataset(**{"license": "", **entry}))
    return datasets, problems


def main_metric(entry: Mapping[str, Any]) -> str | None:
    """Return the first of `HUB_METRICS` that an entry of a record's evaluation has; None: it has none of them."""
    return next((metric for metric in HUB_METRICS if entry.get(metric) is not None), None)


def _find_run_problems(record: RunRecord, datasets: list[Dataset]) -> Iterator[str]:
    verbs = {entry["dataset"]: "evaluated" for entry in record.evaluation}
    verbs |= {entry["name"]: "trained" for entry in record.data}
    matches = {name: [dataset for dataset in datasets if dataset.is_named(name)] for name in verbs}
    for name, verb in verbs.items():
        if (number := len(matches[name])) != 1:
            count = f"{number} entries match" if number else "no entry matches"
            yield f"datasets: {count} {name}, which the run was {verb} on; give exactly one"
    for entry in record.data:
        if entry["hours"] is None and any(dataset.hours is None for dataset in matches[entry["name"]][:1]):
            yield f"datasets: {entry['name']} needs hours, which the run did not count"
    results = {entry["dataset"] for entry in record.evaluation if main_metric(entry) is not None}
    for dataset in datasets:
        if not any(map(dataset.is_named, verbs)):
            yield f"datasets: {dataset.name} is none of the run's, {'; '.join(verbs)}; remove it or rename it"
        elif dataset.task_id and not any(map(dataset.is_named, results)):
            yield f"datasets: {dataset.name} has task_id, but the run measured no {', '.join(HUB_METRICS)} on it"
    if not record.data:
        yield "data: the record of the run has no training data"
    if not record.evaluation and record.task != "pretraining":
        yield "evaluation: the record of the run has no results; let the run evaluate the model at its end"
