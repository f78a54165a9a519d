"""
Recordings with a text each: transcripts, phones, or names of classes.

They are read where recordings for pre-training are, and from what stands beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from .manifests import TableSource
from .opening import open_source
from .sources import SpeechSource

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl")


class JoinedSource(SpeechSource):
    """
    Several sources, one after the other, each utterance once. Ids get the number of their source in front.

    Args:
        sources: At least one.
    """

    def __init__(self, sources: Sequence[SpeechSource]) -> None:
        self._sources = list(sources)
        self._starts = [0, *accumulate(map(len, self._sources))]
        self.utterances = [
            utterance._replace(id=f"{number}:{utterance.id}")
            for number, source in enumerate(self._sources)
            for utterance in source.utterances
        ]
        self.skipped = {}
        for number, source in enumerate(self._sources):
            for reason, ids in source.skipped.items():
                self.skipped.setdefault(reason, []).extend(f"{number}:{skipped}" for skipped in ids)

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """See `SpeechSource.load`."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number].load(index - self._starts[number], start, num_samples)

    def labels(self, column: str | None = None) -> list[str | None]:
        """See `SpeechSource.labels`."""
        return list(chain.from_iterable(source.labels(column) for source in self._sources))


class LabelledSource:
    """
    Utterances and their labels.

    Utterances without one are left out, and counted in `skipped["no label"]`.

    Args:
        source: Where the audio comes from.
        labels: One text an utterance; None or empty: none.
        name: What messages call it.
        split: What of it this is, if it has several splits.

    Attributes:
        source: As given.
        indices: Position in `source` of each utterance that has a label.
        labels: Their labels.
        ids: Their ids.
        num_samples: Their lengths, at 16 kHz.
        skipped: Reason -> ids of what was left out.

    Raises:
        ValueError: If no utterance has a label.
    """

    def __init__(
        self, source: SpeechSource, labels: Sequence[str | None], *, name: str = "The data", split: str | None = None
    ) -> None:
        assert len(labels) == len(source), (len(labels), len(source))
        self.source = source
        self.name = name
        self.split = split
        self.indices = [index for index, label in enumerate(labels) if label is not None and label.strip()]
        self.labels = [str(labels[index]) for index in self.indices]
        self.ids = [source.utterances[index].id for index in self.indices]
        self.num_samples = [source.utterances[index].num_samples for index in self.indices]
        self.skipped = {reason: list(ids) for reason, ids in source.skipped.items()}
        without = sorted(set(range(len(source))) - set(self.indices))
        if without:
            self.skipped["no label"] = [source.utterances[index].id for index in without]
            logger.warning(
                "%s: %s of %s recordings have no label and are left out, for example %s.",
                *(name, f"{len(without):,}", f"{len(source):,}", self.skipped["no label"][0]),
            )
        if not self.indices:
            raise ValueError(f"{name}: none of its {len(source):,} recordings has a label. Is it another column?")

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, position: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """
        Samples of the utterance at `position` of those with a label, or a part of them.

        Args:
            position: Which utterance.
            start: First sample, at 16 kHz.
            num_samples: How many; None: to the end.

        Returns:
            float32 (S,) at 16 kHz.

        Raises:
            AudioFileError: As `SpeechSource.load`.
        """
        return self.source.load(self.indices[position], start, num_samples)


def _open_one(name: str, split: str | None, audio_column: str, config_name: str | None) -> SpeechSource:
    folder = Path(name) if split is None else Path(name, split)
    table = next((folder / file for file in METADATA_FILES if (folder / file).is_file()), None)
    if table is not None:
        return TableSource(table)
    return open_source(name, split=split, audio_column=audio_column, config_name=config_name)


def open_labelled(
    names: str | Path | Sequence[str | Path],
    *,
    column: str | None = None,
    split: str | None = None,
    audio_column: str = "audio",
    config_name: str | None = None,
) -> LabelledSource:
    """
    Open recordings with labels.

    Args:
        names: One or several of: a folder with `metadata.csv` or `metadata.jsonl`, a folder with LibriSpeech's
            `.trans.txt` files, a table (`.csv`, `.jsonl`), a fairseq manifest (`.tsv`) with a `.wrd` file beside it, a
            dataset as `open_source` takes it.
        column: Column of the labels; None: the first of `TEXT_COLUMNS` that exists.
        split: Of each, where they have several; of a folder, the name of a folder in it.
        audio_column: Column of a dataset that has the audio.
        config_name: Of a Hub dataset that has several configurations.

    Returns:
        Those with a label; what is left out is counted.

    Raises:
        ValueError: As `open_source`, or if there are no labels.
    """
    several = [names] if isinstance(names, (str, Path)) else list(names)
    if not several:
        raise ValueError("There is no data. Give at least one folder, table, manifest or dataset.")
    sources = [_open_one(str(name), split, audio_column, config_name) for name in several]
    source = sources[0] if len(sources) == 1 else JoinedSource(sources)
    return LabelledSource(source, source.labels(column), name=", ".join(map(str, several)), split=split)
