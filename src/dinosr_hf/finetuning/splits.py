"""Training, validation and test speech with labels, from what a run was told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..command_line import ArgumentError
from ..data import DatasetSource, LabelledSource, open_labelled
from ..data.labelled import METADATA_FILES
from ..data.synthetic import SyntheticCorpus
from .arguments import LabelledDataArguments

SYNTHETIC = ["synthetic"]


class Splits(NamedTuple):
    """Speech to train on, to choose the best checkpoint by, and for the last word; None where there is none."""

    train: LabelledSource
    eval: LabelledSource | None
    test: LabelledSource | None


def _synthetic(arguments: LabelledDataArguments, split: str, seed: int) -> LabelledSource:
    is_train = split == "train"
    corpus = SyntheticCorpus(
        arguments.synthetic_utterances if is_train else arguments.synthetic_eval_utterances,
        seed=seed,
        languages=arguments.synthetic_languages,
        num_speakers=arguments.synthetic_speakers if is_train else 40,
        split=split,
        noise=arguments.synthetic_noise,
        text=arguments.synthetic_text,
    )
    source = DatasetSource(corpus.to_dataset())
    return LabelledSource(source, source.labels(arguments.label_column), name="synthetic", split=split)


def _has_table(folder: Path) -> bool:
    return any((folder / name).is_file() for name in METADATA_FILES)


def _folders_of_splits(data: Sequence[str]) -> bool:
    """Whether each of them is a folder whose splits are folders with a table each, as of an audio folder."""
    return all(_has_table(Path(name, "train")) and not _has_table(Path(name)) for name in data)


def open_splits(arguments: LabelledDataArguments, seed: int) -> Splits:
    """
    Open what the arguments name.

    A folder with `train/metadata.csv` has the splits train, validation and test unless others are asked for.

    Args:
        arguments: Of the data.
        seed: Of synthetic speech.

    Returns:
        The splits. Validation and test are None where nothing names them.

    Raises:
        ValueError: As `open_labelled`.
        ArgumentError: If a split of the evaluation is asked for and is that of training.
    """
    train, validation, test = arguments.train_split, arguments.eval_split, arguments.test_split
    if arguments.train_data == SYNTHETIC:
        named = (train or "train", validation or "validation", test or "test")
        return Splits(*(_synthetic(arguments, split, seed) for split in named))
    if train is None and _folders_of_splits(arguments.train_data):
        train = "train"
        found = [
            name for name in ("validation", "test") if all(_has_table(Path(d, name)) for d in arguments.train_data)
        ]
        validation = validation or ("validation" if "validation" in found and not arguments.eval_data else None)
        test = test or ("test" if "test" in found and not arguments.test_data else None)

    def open_one(data: Sequence[str], split: str | None) -> LabelledSource | None:
        if not data and split is None:
            return None
        if not data and split == train:
            raise ArgumentError(f"eval_split or test_split is {split}, which is what is trained on. Name another.")
        return open_labelled(
            data or arguments.train_data,
            column=arguments.label_column,
            split=split,
            audio_column=arguments.audio_column,
            config_name=arguments.data_config,
        )

    trained = open_one(arguments.train_data, train)
    assert trained is not None
    return Splits(trained, open_one(arguments.eval_data, validation), open_one(arguments.test_data, test))
