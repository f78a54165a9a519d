"""
What a run cannot know of itself: names, languages, licences. A YAML file of the user's has it:

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


@dataclass(frozen=True)
class Dataset:
    """
    Data that a run names, as the Hub and its readers know it.

    Attributes:
        name: As the run names it: the whole, or as many of the last parts of a path as tell it from the others.
        license: Its licence, by the Hub's name for it or in words.
        id: Its name on the Hub; None where it is not there.
        config: Its configuration there, where it has several.
        title: What to call it; left out, the id or the name.
        hours: Hours of audio, where the run could not count them.
    """

    name: str
    license: str
    id: str | None = None
    config: str | None = None
    title: str | None = None
    hours: float | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        return self.title or " ".join(filter(None, (self.id, self.config))) or self.name

    def is_named(self, name: str) -> bool:
        """Whether a run's name for data means this."""
        own, theirs = _parts(self.name), _parts(name)
        return theirs[-len(own) :] == own


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[\\/]", name) if part]


@dataclass(frozen=True)
class Provenance:
    """
    Where a model comes from and what may be done with it.

    Attributes:
        repo_id: `organisation/name` that it gets on the Hub.
        license: Licence of the weights, by the Hub's identifier.
        languages: ISO 639 codes of the languages spoken in the training data.
        datasets: All data that the run trained or was measured on.
        base_model: Name on the Hub of the model that the run started from, or "unpublished"; None: from nothing.
        license_name: Of a licence that the Hub has no identifier for (`license: other`).
        license_link: Its text.
        license_reason: Why this licence, in a sentence.
        intended_use: In a sentence or two; left out, what the task says.
        limitations: The same of what was not tested or does not work.
    """

    repo_id: str
    license: str
    languages: list[str]
    datasets: list[Dataset]
    base_model: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_reason: str | None = None
    intended_use: str | None = None
    limitations: str | None = None

    def dataset(self, name: str) -> Dataset:
        """The data that a run calls so, of which there is one: `read_provenance` looks."""
        return next(dataset for dataset in self.datasets if dataset.is_named(name))


REQUIRED = {
    "repo_id": "`organisation/name` that the model gets on the Hub (--repo_id)",
    "license": "licence of the weights, by the Hub's identifier, such as cc-by-4.0 (--license)",
    "languages": "ISO 639 codes of the languages of the training data, such as [en, de] (--languages)",
    "datasets": "a list with name and license, and id if it is on the Hub, of each data of the run",
}


def read_provenance(
    folder: str | os.PathLike, path: str | os.PathLike | None = None, **given: Any
) -> tuple[Provenance, RunRecord]:
    """
    Read what the user says of a model, and with it the record of the run that made it.

    Args:
        folder: Where the run left its model and its `run.json`.
        path: The YAML file with the fields of `Provenance`; where the run left no record, with that under `run`.
        **given: Fields that go over the file's; None is left out.

    Returns:
        Provenance and record. All data of the record have an entry in the provenance.

    Raises:
        ValueError: If anything is missing or cannot be so. The message names all of it, and where to give it.
    """
    known = [field.name for field in dataclasses.fields(Provenance)]
    content = read_yaml(Path(path), [*known, "run"], "field of it") if path is not None else {}
    run = content.pop("run", None)
    if isinstance(run, Mapping):  # YAML makes times of what looks so
        run = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in run.items()}
    content |= {name: value for name, value in given.items() if value is not None}
    refuse_unknown(given, known, "field of it", where="read_provenance")
    record = read_record(folder) if run is None else record_of(run, f"`run` of {path}")
    problems = list(_problems(content))
    datasets = _datasets(content.get("datasets"), problems)
    problems += _missing_data(record, datasets)
    problems += _base_model_problems(record, content.get("base_model"))
    if problems:
        where = f"add it to {path}" if path is not None else "give a provenance file"
        raise ValueError(
            f"The card of {folder} cannot be written. What is missing or wrong ({where}):\n"
            + "\n".join(f"- {line}" for line in problems)
        )
    return Provenance(**{**content, "datasets": datasets}), record


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name}: {meaning}" for name, meaning in REQUIRED.items() if not content.get(name))
    repo_id = content.get("repo_id")
    if repo_id:
        try:
            validate_repo_id(repo_id)
            if repo_id.count("/") != 1:
                yield f"repo_id: {repo_id} must be `organisation/name`"
        except HFValidationError as error:
            yield f"repo_id: {error}"
    languages = content.get("languages") or []
    if not isinstance(languages, list) or not all(re.fullmatch("[a-z]{2,3}", str(code)) for code in languages):
        yield f'languages: {languages} must be a list of ISO 639 codes, such as [en, de]; of Norwegian, "no" in quotes'
    license_id = content.get("license")
    if license_id and not re.fullmatch(r"[a-z0-9.\-]+", str(license_id)):
        yield f"license: {license_id} must be an identifier of the Hub, such as cc-by-4.0, or other"
    if license_id == "other":
        yield from (
            f"{name}: of a licence that the Hub has no identifier for"
            for name in ("license_name", "license_link")
            if not content.get(name)
        )


def _datasets(content: Any, problems: list[str]) -> list[Dataset]:
    """The entries that are whole; what is wrong with the others goes to `problems`."""
    found = []
    known = [field.name for field in dataclasses.fields(Dataset)]
    for number, entry in enumerate(content or ()):
        if not isinstance(entry, Mapping) or not entry.get("name"):
            problems.append(f"datasets: entry {number + 1} has no name")
            continue
        refuse_unknown(entry, known, "field of it", where=f"datasets: {entry['name']}")
        if not entry.get("license"):
            problems.append(f"datasets: {entry['name']} has no license, the licence of the data")
        found.append(Dataset(**{"license": "", **entry}))
    return found


def _missing_data(record: RunRecord, datasets: list[Dataset]) -> Iterator[str]:
    names = {entry["name"]: "trained" for entry in record.data}
    names |= {entry["dataset"]: "was measured" for entry in record.evaluation if entry["dataset"] not in names}
    for name, what in names.items():
        entries = [dataset for dataset in datasets if dataset.is_named(name)]
        if len(entries) != 1:
            count = f"{len(entries)} entries mean" if entries else "no entry means"
            yield f"datasets: {count} {name}, which the run {what} on; give one"
    for entry in record.data:
        entries = [dataset for dataset in datasets if dataset.is_named(entry["name"])]
        if entry["hours"] is None and entries and entries[0].hours is None:
            yield f"datasets: {entry['name']} needs hours, which the run did not count"
    if not record.data:
        yield "data: the record of the run names no training data"
    if not record.evaluation and record.task != "pretraining":
        yield "evaluation: the record of the run has no figure; evaluate the model, which the run does at its end"


def _base_model_problems(record: RunRecord, base_model: Any) -> Iterator[str]:
    if record.base_model is not None and not base_model:
        yield (
            f"base_model: the run started from {record.base_model}; say what that is on the Hub, or {UNPUBLISHED}"
            " (--base_model)"
        )
    elif record.base_model is None and base_model:
        yield f"base_model: {base_model} is given, but the run started from random weights"
    elif base_model and base_model != UNPUBLISHED:
        try:
            validate_repo_id(base_model)
        except HFValidationError as error:
            yield f"base_model: {error}"
