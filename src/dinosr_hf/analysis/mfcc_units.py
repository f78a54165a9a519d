"""
K-means units of the MFCCs of recordings: the baseline that units of a model have to beat.

`T` frames of 20 ms, each centred on the `field` samples of a model's frame (`baselines.mfcc`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..data import AudioFileError, SpeechSource
from ..utils.command_line import check_choice
from .alignment import FIELD, STRIDE
from .baselines import MFCC_KINDS, NUM_MFCCS, mfcc
from .kmeans import KMeans, check_num_clusters, fit_kmeans

logger = logging.getLogger(__name__)

MAX_FRAMES_IN_MEMORY = 4_000_000  # of MFCCs: 0.6 GB


def _features(recordings: SpeechSource, kind: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield id and MFCCs (T, 39) of each recording of at least a frame; warn of those that cannot be read."""
    check_choice("kind", kind, MFCC_KINDS)
    for index, utterance in enumerate(recordings.utterances):
        try:
            waveform = recordings.load(index)
        except (AudioFileError, OSError) as error:
            logger.warning("Skipped %s: %s", utterance.id, error)
            continue
        if len(waveform) >= FIELD:
            yield utterance.id, mfcc(waveform, tuned=MFCC_KINDS[kind])


def fit_mfcc_kmeans(recordings: SpeechSource, num_clusters: int, kind: str, *, seed: int = 0) -> KMeans:
    """
    Cluster the MFCCs of recordings with `kmeans.fit_kmeans`; of more than 22 hours, those of a random share of frames.

    `kind` is "textbook" or "tuned". Raises `ValueError` for another, and as `fit_kmeans`.
    """
    total = sum(length // STRIDE for _, length in recordings.utterances)
    check_num_clusters(num_clusters, total)
    share = min(1.0, MAX_FRAMES_IN_MEMORY / max(1, total))
    generator = np.random.default_rng(seed)
    features = [np.empty((0, NUM_MFCCS), np.float32)]
    for _, rows in _features(recordings, kind):
        features.append(rows if share == 1 else rows[generator.random(len(rows)) < share])
    return fit_kmeans(np.concatenate(features), num_clusters, seed)


def mfcc_units(recordings: SpeechSource, kmeans: KMeans, kind: str) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield id and units, int64 (1, T), of each recording, by clusters that `fit_mfcc_kmeans` fitted on this kind."""
    for name, rows in _features(recordings, kind):
        yield name, kmeans.predict(rows)[None]
