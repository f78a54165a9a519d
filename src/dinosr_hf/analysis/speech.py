"""Recordings opened together with their phones and speakers, to evaluate units and layers on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..data import DatasetSource, SpeechSource
from ..data.labelled import open_with_metadata
from ..data.sources import NoLabelsError
from ..data.synthetic import SyntheticCorpus
from .alignment import Labels, relabel, to_segment
from .alignment_files import read_alignments
from .plots.phones import fold_phone
from .unit_evaluation import Reference

logger = logging.getLogger(__name__)


def _top_folders(ids: Sequence[str]) -> list[str]:
    """Return the first folder of each id, a path; `ValueError` if one begins with none."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in ids]
    if "" in folders:
        raise ValueError(
            f"--speakers folder takes the first folder of a path, but {ids[folders.index('')]} begins with none. Give"
            " the folder above those of the speakers as the data, or name a column."
        )
    return folders


def open_reference(
    data: str | Path,
    *,
    labels: str | Path | None = None,
    tier: str = "phones",
    step_seconds: float = 0.01,
    fold_stress: bool = False,
    speaker_column: str | None = None,
    split: str | None = None,
    config_name: str | None = None,
    audio_column: str = "audio",
    num_synthetic: int = 50,
) -> tuple[SpeechSource, Reference]:
    """
    Open recordings, and the reference to evaluate their units against: phones and speakers.

    Args:
        data: Anything that `open_source` opens; a folder with metadata.csv is read as that table, if it has a
            column of paths, for the speakers. Or "synthetic": the synthetic corpus, which has its own labels.
        labels: Path to the labels, as for `read_alignments`, and `tier` too; None only for "synthetic".
        step_seconds: Length of a step of fixed-rate labels.
        fold_stress: Whether to take phones without stress and place in the word, by `plots.phones.fold_phone`.
        speaker_column: Column of a table or dataset; None: `speaker_id`, if it exists. "folder": the first folder of
            each recording's path, as in LibriSpeech.
        split, config_name, audio_column: As in `open_source`.
        num_synthetic: Number of utterances of the synthetic corpus; its test split is used.

    Raises `ValueError` if there are no labels, or as `open_source`, `read_alignments` and `Reference`; and
    `ImportError` for "synthetic" without the extra `demo`.
    """
    source: SpeechSource
    if str(data) == "synthetic":
        if labels is not None:
            raise ValueError(f"labels={str(labels)!r}: the synthetic corpus has labels of its own. Leave labels out.")
        if split is not None:
            raise ValueError(f"split={split!r}: of the synthetic corpus, the test split is used. Leave split out.")
        others = {"tier": (tier, "phones"), "speakers": (speaker_column, None)}
        others |= {"data_config": (config_name, None), "audio_column": (audio_column, "audio")}
        for name, (value, default) in others.items():
            if value != default:
                raise ValueError(f"{name}={value!r} has no effect on the synthetic corpus. Leave {name} out.")
        rows = SyntheticCorpus(num_synthetic, split="test", noise=False, text="mixed").to_dataset()
        source, speaker_column = DatasetSource(rows), "speaker_id"
        found: dict[str, Labels] = {
            row["id"]: [*map(to_segment, row["phones"])] for row in rows.select_columns(["id", "phones"])
        }
    elif labels is None:
        kinds = "a file of phones (.jsonl, .ctm, .TextGrid) or a folder of TextGrids"
        raise ValueError(f"--labels is missing, and only `--data synthetic` has its own: give {kinds}.")
    else:
        source = open_with_metadata(data, split=split, config_name=config_name, audio_column=audio_column)
        found = read_alignments(labels, tier=tier)
        if not any(found.values()):
            raise ValueError(f"{labels} has no phones. Give other labels.")
    if fold_stress:
        found = {name: relabel(own, fold_phone) for name, own in found.items()}
    speakers: Sequence[str | None] | None = None
    try:
        is_folder = speaker_column == "folder"
        speakers = _top_folders(source.ids) if is_folder else source.labels(speaker_column or "speaker_id")
    except ValueError as error:
        if speaker_column is not None or not isinstance(error, NoLabelsError):
            raise ValueError(f"The speakers: {error}") from error
        logger.warning(
            "There is no column speaker_id: each recording counts as a speaker of its own. Give --speakers: the column"
            " that has them, or folder, if the first folder of a path is the speaker."
        )
    if speakers is not None and None in speakers:
        counts = f"{speakers.count(None):,} of {len(speakers):,} recordings have no speaker"
        logger.warning("%s, and each of them counts as a speaker of its own.", counts)
    return source, Reference(source.ids, found, speakers=speakers, step_seconds=step_seconds, others=source.others)
