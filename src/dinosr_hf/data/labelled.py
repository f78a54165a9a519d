"""Recordings with one label each: a transcript, phones, or the name of a class."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.command_line import argument_errors
from ..utils.names import printable_name
from ..utils.visible_text import remove_invisible
from .manifests import TableSource, names_paths, path_columns
from .mixture import JoinedSource
from .opening import open_source
from .sources import SpeechSource

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl")


class LabelledSource:
    """
    Utterances of `source` and their labels, one text each; None or empty if it has none. `ValueError` if all are.

    Utterances without one are left out, and counted in `skipped["no label"]`. `name` is that of the data in messages;
    of a `JoinedSource`, one for each of its sources.

    Attributes:
        names: Name of each dataset.
        datasets: Dataset of each utterance, by its index in `names`, like `indices`.
        indices: Index in `source` of each utterance with a label, in the order of `labels`, `ids` and `num_samples`.
        skipped: Ids of what was left out, by reason.
    """

    def __init__(
        self,
        source: SpeechSource,
        labels: Sequence[str | None],
        *,
        name: str | Sequence[str] = "The data",
        split: str | None = None,
    ) -> None:
        assert len(labels) == len(source), (len(labels), len(source))
        sources = source.sources if isinstance(source, JoinedSource) else [source]
        self.names = [name] if isinstance(name, str) else list(name)
        assert len(self.names) == len(sources), (self.names, len(sources))
        self.source, self.name, self.split = source, ", ".join(self.names), split
        numbers = [number for number, one in enumerate(sources) for _ in range(len(one))]
        self.indices = [index for index, label in enumerate(labels) if remove_invisible(label or "").strip()]
        self.datasets = [numbers[index] for index in self.indices]
        self.labels = [str(labels[index]) for index in self.indices]
        self.ids = [source.utterances[index].id for index in self.indices]
        self.num_samples = [source.utterances[index].num_samples for index in self.indices]
        self.skipped = {reason: list(ids) for reason, ids in source.skipped.items()}
        without = [source.utterances[index].id for index in sorted(set(range(len(source))) - set(self.indices))]
        if without:
            self.skipped.setdefault("no label", []).extend(without)
            counts = f"{len(without):,} of {len(source):,} recordings"
            logger.warning("%s: %s have no label and are left out, for example %s.", self.name, counts, without[0])
        if not self.indices:
            raise ValueError(f"{self.name}: none of its {len(source):,} recordings has a label. Is it another column?")

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, position: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """Read the utterance at `position` among those with a label; see `SpeechSource.load`."""
        return self.source.load(self.indices[position], start, num_samples)


def find_metadata(folder: Path, audio_column: str = "audio") -> Path | None:
    """Return the table of a folder of audio, metadata.csv or metadata.jsonl; None if there is none with paths."""
    for table in (folder / name for name in METADATA_FILES):
        if table.exists():
            if names_paths(table, audio_column):
                return table
            columns = ", ".join(path_columns(audio_column))
            logger.warning("%s is not used: its first line names none of %s.", table, columns)
    return None


def open_with_metadata(
    name: str | Path, *, split: str | None = None, config_name: str | None = None, audio_column: str = "audio"
) -> SpeechSource:
    """
    Open what `open_source` opens, with its arguments; of a folder that has one, the table of `find_metadata`.

    Files that the table does not list are left out with a warning.
    """
    table = find_metadata(Path(name) if split is None else Path(name, split), audio_column)
    if table is None or config_name is not None:
        return open_source(name, split=split, config_name=config_name, audio_column=audio_column)
    source = TableSource(table, audio_column)
    if unlisted := [*map(printable_name, source.unlisted())]:
        source.skipped["no label"] = unlisted
        counts = f"{len(unlisted):,} audio files beside it are not in the table"
        logger.warning("%s: %s and are left out, for example %s.", table, counts, unlisted[0])
    return source


def open_labelled(
    names: str | Path | Sequence[str | Path],
    *,
    column: str | None = None,
    split: str | None = None,
    audio_column: str = "audio",
    config_name: str | None = None,
    column_option: str = "column",
) -> LabelledSource:
    """
    Open recordings with labels. Raises `ValueError` as `open_source`, or if there are no labels.

    Args:
        names: One or several of: a folder with `metadata.csv` or `metadata.jsonl`, a folder with LibriSpeech's
            `.trans.txt` or MLS's `transcripts.txt`, a table (`.csv`, `.tsv`, `.jsonl`), a fairseq manifest (`.tsv`)
            with a `.wrd` file beside it, a dataset as in `open_source`.
        column: Column of the labels; None: the first of `TEXT_COLUMNS` that exists.
        split: Split to use of each, if they have several; for a folder, the name of a subfolder.
        audio_column: As in `open_source`, like `config_name`.
        column_option: Name of the user's option for `column`, for errors.
    """
    several = [names] if isinstance(names, (str, Path)) else list(names)
    if not several:
        raise ValueError("There is no data. Give at least one folder, table, manifest or dataset.")
    sources = [
        open_with_metadata(str(name), split=split, config_name=config_name, audio_column=audio_column)
        for name in several
    ]
    source = sources[0] if len(sources) == 1 else JoinedSource(sources)
    with argument_errors("" if column is None else f"{column_option}={column}: "):
        labels = source.labels(column)
    return LabelledSource(source, labels, name=[*map(str, several)], split=split)
