"""Training, validation and test speech with labels, from what a run was told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..data import DatasetSource, LabelledSource, open_labelled
from ..data.labelled import METADATA_FILES
from ..data.synthetic import SyntheticCorpus
from ..utils.command_line import ArgumentError
from .finetuning_arguments import LabelledDataArguments

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
        ArgumentError: If a split of the evaluation is asked for and is that of training, or a part of it.
    """
    train, validation, test = arguments.train_split, arguments.eval_split, arguments.test_split
    if arguments.train_data == SYNTHETIC:
        train = train or "train"
        validation = validation or (None if arguments.eval_data else "validation")
        test = test or (None if arguments.test_data else "test")
    elif train is None and _folders_of_splits(arguments.train_data):
        train = "train"
        found = [
            name for name in ("validation", "test") if all(_has_table(Path(d, name)) for d in arguments.train_data)
        ]
        validation = validation or ("validation" if "validation" in found and not arguments.eval_data else None)
        test = test or ("test" if "test" in found and not arguments.test_data else None)

    def open_one(data: Sequence[str], split: str | None, default: str) -> LabelledSource | None:
        if not data and split is None:
            return None
        if not data and train in (split, None):
            trained_on = "all of train_data" if train is None else train
            raise ArgumentError(
                f"eval_split or test_split is {split}, but {trained_on} is what is trained on. Name another, or a"
                " train_split beside it."
            )
        if (data or arguments.train_data) == SYNTHETIC:
            return _synthetic(arguments, split or default, seed)
        return open_labelled(
            data or arguments.train_data,
            column=arguments.label_column,
            split=split,
            audio_column=arguments.audio_column,
            config_name=arguments.data_config,
        )

    trained = open_one(arguments.train_data, train, "train")
    assert trained is not None
    judged_by = open_one(arguments.eval_data, validation, "validation")
    return Splits(trained, judged_by, open_one(arguments.test_data, test, "test"))
