"""Open the training, validation and test speech of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..data import DatasetSource, LabelledSource, open_labelled
from ..data.labelled import find_metadata
from ..data.synthetic import SyntheticCorpus
from ..utils.command_line import ArgumentError
from .finetuning_arguments import LabelledDataArguments

logger = logging.getLogger(__name__)

SYNTHETIC = ["synthetic"]


class Splits(NamedTuple):
    """Speech for training, for the choice of the best checkpoint and for the final evaluation; None if not given."""

    train: LabelledSource
    eval: LabelledSource | None
    test: LabelledSource | None


def _open_synthetic(arguments: LabelledDataArguments, split: str, seed: int) -> LabelledSource:
    num_utterances, num_speakers = arguments.synthetic_eval_utterances, 40
    if split == "train":
        num_utterances, num_speakers = arguments.synthetic_utterances, arguments.synthetic_speakers
    corpus = SyntheticCorpus(
        num_utterances,
        seed=seed,
        languages=arguments.synthetic_languages,
        num_speakers=num_speakers,
        split=split,
        noise=arguments.synthetic_noise,
        text=arguments.synthetic_text,
    )
    source = DatasetSource(corpus.to_dataset())
    return LabelledSource(source, source.labels(arguments.label_column), name="synthetic", split=split)


def _have_metadata(folders: Sequence[str], split: str, audio_column: str) -> bool:
    """Return whether each folder has a table of labels for the split; the split "" is the folder itself."""
    return all(find_metadata(Path(folder, split), audio_column) is not None for folder in folders)


def open_splits(arguments: LabelledDataArguments, seed: int) -> Splits:
    """
    Open the data that the arguments name; `seed` is that of synthetic speech.

    The splits of a folder with `train/metadata.csv` are train, validation and test, unless the arguments name others.
    Raises `ValueError` as `open_labelled`, and `ArgumentError` if an evaluation split is in the training split.
    """
    data, is_synthetic = arguments.train_data, arguments.train_data == SYNTHETIC
    if not data:
        raise ArgumentError("train_data is empty. Give at least one folder, table, manifest or dataset.")
    train, validation, test = arguments.train_split, arguments.eval_split, arguments.test_split
    column = arguments.audio_column
    has_splits = all(
        _have_metadata([name], "train", column) and not _have_metadata([name], "", column) for name in data
    )
    if is_synthetic or (train is None and has_splits):
        train = train or "train"
        if not arguments.eval_data and (is_synthetic or _have_metadata(data, "validation", column)):
            validation = validation or "validation"
        if not arguments.test_data and (is_synthetic or _have_metadata(data, "test", column)):
            test = test or "test"

    def open_one(names: Sequence[str], split: str | None, default: str) -> LabelledSource | None:
        if not names and split is None:
            return None
        if not names and train in (split, None):
            trained_on = "all of train_data" if train is None else f"train_split={train}"
            raise ArgumentError(
                f"eval_split or test_split is {split}, but the run trains on {trained_on}. Name another split, or give"
                " another train_split as well."
            )
        if (names or data) == SYNTHETIC:
            return _open_synthetic(arguments, split or default, seed)
        return open_labelled(
            names or data,
            column=arguments.label_column,
            split=split,
            audio_column=arguments.audio_column,
            config_name=arguments.data_config,
            column_option="label_column",
        )

    held_out = {"eval_data": (arguments.eval_data, validation), "test_data": (arguments.test_data, test)}
    for option, (names, split) in held_out.items():
        if names != SYNTHETIC and (same := {*names} & {*data}) and split == train:
            logger.warning("%s=%s is trained on, so its figures are too good. Give another.", option, min(same))
    training = open_one(data, train, "train")
    assert training is not None
    evaluation = open_one(arguments.eval_data, validation, "validation")
    return Splits(training, evaluation, open_one(arguments.test_data, test, "test"))
