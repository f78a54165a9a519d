"""Recordings with phones and speakers, opened together: what units and layers are judged on."""

from __future__ import annotations

import logging
from pathlib import Path

from ..data import DatasetSource, SpeechSource, TableSource, open_recordings
from ..data.labelled import METADATA_FILES
from ..data.synthetic import SyntheticCorpus
from .alignment import Segment
from .alignment_files import read_alignments
from .unit_evaluation import Reference

logger = logging.getLogger(__name__)

SPEAKER_COLUMN = "speaker_id"


def _speakers(source: SpeechSource, column: str | None) -> list[str | None] | None:
    """Who speaks in each recording, where that is known."""
    try:
        return source.labels(column or SPEAKER_COLUMN)
    except ValueError as error:
        if column is not None:
            raise ValueError(f"The speakers: {error}") from error
        logger.warning(
            "There is no column %s: each recording counts as a speaker of its own. Name the column of speakers.",
            SPEAKER_COLUMN,
        )
        return None


def _synthetic(num_utterances: int, seed: int, split: str) -> tuple[SpeechSource, Reference]:
    corpus = SyntheticCorpus(num_utterances, seed=seed, split=split, noise=False, text="mixed")
    rows = corpus.to_dataset()
    source = DatasetSource(rows)
    labels = {
        row["id"]: [Segment(phone["label"], phone["start"], phone["end"]) for phone in row["phones"]]
        for row in rows.select_columns(["id", "phones"])
    }
    ids = [utterance.id for utterance in source.utterances]
    return source, Reference(ids, labels, speakers=source.labels(SPEAKER_COLUMN))


def open_reference(
    data: str | Path,
    *,
    labels: str | Path | None = None,
    tier: str = "phones",
    step_seconds: float = 0.01,
    speaker_column: str | None = None,
    num_synthetic: int = 50,
    seed: int = 0,
    split: str = "test",
) -> tuple[SpeechSource, Reference]:
    """
    Open recordings and what their units are judged by.

    Args:
        data: Whatever `open_source` opens; a folder with metadata.csv is read as that table, which has the speakers.
            Or "synthetic": utterances of the synthetic corpus, which have labels of their own.
        labels: As `read_alignments` reads them; None only for "synthetic".
        tier: Of TextGrids.
        step_seconds: Length of a step, where labels are one a step.
        speaker_column: Of a table or dataset; None: `speaker_id`, if there is one.
        num_synthetic: Utterances of the synthetic corpus.
        seed: Of the synthetic corpus.
        split: Of the synthetic corpus.

    Returns:
        The recordings, and their phones and speakers.

    Raises:
        ValueError: If there are no labels, or as `open_source`, `read_alignments` and `Reference`.
        ImportError: For "synthetic" without the extra `demo`.
    """
    if str(data) == "synthetic":
        if labels is not None:
            raise ValueError(f"labels={str(labels)!r}: the synthetic corpus has labels of its own. Leave labels out.")
        return _synthetic(num_synthetic, seed, split)
    if labels is None:
        raise ValueError(
            "There are no labels. Give a file of phones (.jsonl, .ctm, .TextGrid) or a folder of TextGrids."
        )
    table = next((Path(data, name) for name in METADATA_FILES if Path(data, name).is_file()), None)
    source = TableSource(table) if table is not None else open_recordings([data])
    ids = [utterance.id for utterance in source.utterances]
    found = read_alignments(labels, tier=tier)
    speakers = _speakers(source, speaker_column)
    return source, Reference(ids, found, speakers=speakers, step_seconds=step_seconds)
