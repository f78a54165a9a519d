"""
Evaluation of layers: what they know about phones and speakers, by k-means, a linear probe and canonical correlations.

Everything is fitted on some recordings and evaluated on others, of other speakers where it is about phones, and on
randomly drawn frames: the same for every layer and, for models with the same frames, for every model.

`n` and `m` frames, `L` layers, `D` dimensions, `K` classes (phones or speakers), `C` canonical components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data import SpeechSource
from ..data.collator import utterance_generator
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.command_line import argument_errors
from ..utils.extras import import_extra
from .alignment import frame_labels
from .kmeans import fit_kmeans
from .quality import contingency, phone_normalized_mutual_information, phone_purity
from .reports import LayerReport, Metric
from .unit_evaluation import Reference

# "source" is "student" or "teacher", and "student" for other models.
REPORT = LayerReport(
    names={"model": "model", "source": "features", "layer": "layer"},
    metrics={
        "num_clusters": Metric("clusters", digits=0, is_plotted=False),
        "num_frames": Metric("frames", digits=0, is_plotted=False),
        "kmeans_phone_purity": Metric("phone purity of k-means"),
        "kmeans_pnmi": Metric("PNMI of k-means"),
        "phone_probe": Metric("phone probe, accuracy"),
        "phone_cca": Metric("PWCCA with phones"),
        "speaker_cca": Metric("PWCCA with speakers"),
    },
)

# Share of the variance that is added to each dimension, so that directions with hardly any variance do not decide.
REGULARIZATION = 1e-3


class FeatureExtractor(Protocol):
    """The part of `units.LayerExtractor` that frames are drawn with."""

    config: DinoSRConfig

    def features(
        self, recordings: SpeechSource, *, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield id and features float32 (T, L, D) of each recording."""


class Recordings(NamedTuple):
    """Recordings to fit or to evaluate on."""

    source: SpeechSource
    reference: Reference  # their phones and speakers
    ids: frozenset[str]  # the recordings of `source` to use

    @classmethod
    def with_labels(cls, source: SpeechSource, reference: Reference) -> Recordings:
        """Take all recordings that have labels."""
        return cls(source, reference, frozenset(reference.labels))

    @property
    def speakers(self) -> set[str]:
        """Speakers of the recordings."""
        return {self.reference.speakers[recording] for recording in self.ids}

    def num_frames(self, config: DinoSRConfig) -> dict[int, int]:
        """Return the number of frames of each recording, by its index in the source."""
        return {
            index: int(config.num_frames(utterance.num_samples))
            for index, utterance in enumerate(self.source.utterances)
            if utterance.id in self.ids
        }

    def split(self, seed: int = 0) -> tuple[Recordings, Recordings]:
        """Split into two parts, each with about half of the speakers; `ValueError` with one speaker."""
        speakers = sorted(self.speakers)
        if len(speakers) < 2:
            raise ValueError(
                f"All recordings are of one speaker, {speakers[0]!r}, but layers are fitted and evaluated on different"
                " speakers. Give recordings of other speakers to fit on."
            )
        drawn = np.random.default_rng(seed).permutation(len(speakers))[: len(speakers) // 2]
        chosen = {speakers[number] for number in drawn}
        first = frozenset(name for name in self.ids if self.reference.speakers[name] in chosen)
        return self._replace(ids=first), self._replace(ids=self.ids - first)


def check_disjoint_speakers(fit: Recordings, test: Recordings) -> None:
    """Raise `ValueError` if two sets of recordings have a speaker in common."""
    both = sorted(fit.speakers & test.speakers)
    if both:
        raise ValueError(
            f"Recordings to fit on and to evaluate on have {len(both)} speakers in common, for example {both[0]!r},"
            " which makes metrics better than for new speakers. Give recordings of different speakers."
        )


class LayerFrames(NamedTuple):
    """Randomly drawn frames of recordings."""

    features: NDArray[np.float32]  # (n, L, D)
    phones: NDArray[np.str_]  # (n,)
    speakers: NDArray[np.str_]  # (n,)
    recordings: NDArray[np.str_]  # (n,), ids


def draw_frames(
    extractor: FeatureExtractor, recordings: Recordings, *, max_frames: int = 20_000, seed: int = 0
) -> LayerFrames:
    """
    Draw frames of recordings, and compute their features.

    About `max_frames` are drawn, or all if there are fewer, and kept in memory: 20,000 frames of 12 layers of a base
    model take 0.7 GB. Which are drawn depends only on the seed and on the ids and lengths of the recordings. Raises
    `ValueError` if labels do not fit a recording, or no frame is drawn.
    """
    config, reference = extractor.config, recordings.reference
    lengths = recordings.num_frames(config)
    share = min(1.0, max_frames / max(1, sum(lengths.values())))
    kept: list[LayerFrames] = []
    for name, features in extractor.features(recordings.source, indices=list(lengths)):
        with argument_errors(f"{name}: "):
            labels = frame_labels(
                reference.labels[name],
                len(features),
                step_seconds=reference.step_seconds,
                stride=config.inputs_to_logits_ratio,
                field=config.receptive_field,
            )
        drawn = utterance_generator(seed, 0, name, "frames of layers").random(len(features)) < share
        if drawn.any():
            speakers, names = (np.full(drawn.sum(), text) for text in (reference.speakers[name], name))
            kept.append(LayerFrames(features[drawn], np.array(labels)[drawn], speakers, names))
    if not kept:
        raise ValueError("No frame was drawn: no recording with labels is long enough, or could be read.")
    return LayerFrames(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))


def _standardize(train: ArrayLike, test: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale to mean 0 and variance 1 over `train`; dimensions that are constant there become 0."""
    fitted = np.asarray(train, dtype=np.float64)
    mean, deviation = fitted.mean(axis=0), fitted.std(axis=0)
    factor = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-12)
    return (fitted - mean) * factor, (np.asarray(test, dtype=np.float64) - mean) * factor


def _check_features(train: ArrayLike, train_classes: ArrayLike, test: ArrayLike, test_classes: ArrayLike) -> None:
    for what, features, classes in (("train", train, train_classes), ("test", test, test_classes)):
        if np.ndim(features) != 2 or np.shape(classes) != np.shape(features)[:1] or not len(np.asarray(classes)):
            raise ValueError(
                f"{what} has features of shape {np.shape(features)} and classes of shape {np.shape(classes)}, but must"
                " have (n, D) and (n,), with at least one frame."
            )
    if len(np.unique(np.asarray(train_classes))) < 2:
        raise ValueError("There is one class only in train, but at least two are needed.")


def probe_accuracy(
    train: ArrayLike,
    train_classes: ArrayLike,
    test: ArrayLike,
    test_classes: ArrayLike,
    *,
    regularization: float = REGULARIZATION,
) -> float:
    """
    Return the accuracy of a linear probe for the class of a frame: ridge regression to one-hot vectors.

    Features are standardised by `train`; the largest of the K outputs decides (scikit-learn's `RidgeClassifier`, with
    a penalty of `regularization` times n). A class that `train` lacks is never right. Alain and Bengio,
    "Understanding intermediate layers using linear classifier probes" (arXiv 1610.01644), use logistic regression;
    ridge regression has a closed-form solution.

    Features to fit on are (n, D), their classes (n,); features to evaluate on are (m, D), their classes (m,).
    `regularization` is a share of the variance of a dimension. Raises `ValueError` for other shapes, or if there is
    only one class, and `ImportError` without scikit-learn.
    """
    _check_features(train, train_classes, test, test_classes)
    fitted, held_out = _standardize(train, test)
    linear = import_extra("sklearn.linear_model", "analysis").RidgeClassifier(alpha=regularization * len(fitted))
    return float(linear.fit(fitted, train_classes).score(held_out, test_classes))


def _whitening(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse square root of a covariance, restricted to directions that vary."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-10 * max(values[-1], 1e-300)
    return vectors[:, kept] / np.sqrt(values[kept])


class CanonicalCorrelations(NamedTuple):
    """Canonical correlations between features and classes."""

    values: NDArray[np.float64]  # (C,), correlation of each component on the evaluated frames, from -1 to 1
    weights: NDArray[np.float64]  # (C,), how much of the features each component explains; they sum to 1

    @property
    def projection_weighted(self) -> float:
        """PWCCA: mean weighted by `weights`, so a component that is hardly in the features counts little."""
        return float(self.weights @ self.values)


def canonical_correlations(
    train: ArrayLike,
    train_classes: ArrayLike,
    test: ArrayLike,
    test_classes: ArrayLike,
    *,
    regularization: float = REGULARIZATION,
) -> CanonicalCorrelations:
    """
    Fit a canonical correlation analysis of features x and one-hot classes y, and evaluate it on other frames.

        T = Sxx^(-1/2) Sxy Syy^(-1/2) = U diag(rho) V'
        a_i = x Sxx^(-1/2) u_i,   b_i = y Syy^(-1/2) v_i,   values_i = correlation of a_i and b_i over `test`
        weights_i ~ sum_d |<a_i, x_d>| over `train`

    with the covariances S of `train`, x standardised and `regularization` added to the diagonal of Sxx; Syy has rank
    K - 1 and is inverted there. On the frames it was fitted on, without regularisation, values_i is rho_i (Hotelling,
    Biometrika 28, 1936). Weights: Morcos, Raghu and Bengio (arXiv 1806.05759), section 3. For layers of speech models:
    Pasad, Chou and Livescu (arXiv 2107.04734), who evaluate on held-out frames too.

    Arguments and errors are those of `probe_accuracy`; frames of classes that `train` lacks are left out of `test`.
    There are min(D, K - 1) components, in descending order of the correlation on `train`; one that is constant over
    `test` has the correlation 0.
    """
    _check_features(train, train_classes, test, test_classes)
    names, known = np.unique(np.asarray(train_classes), return_inverse=True)
    is_known = np.isin(np.asarray(test_classes), names)
    x, x_test = _standardize(train, np.asarray(test)[is_known])
    y = np.eye(len(names))[known]
    y_mean = y.mean(axis=0)
    y_test = np.eye(len(names))[np.searchsorted(names, np.asarray(test_classes)[is_known])] - y_mean
    y -= y_mean
    x_whitening = _whitening(x.T @ x / len(x) + regularization * np.eye(x.shape[1]))
    y_whitening = _whitening(y.T @ y / len(y))
    left, _, right = np.linalg.svd(x_whitening.T @ (x.T @ y / len(x)) @ y_whitening, full_matrices=False)
    x_directions, y_directions = x_whitening @ left, y_whitening @ right.T
    weights = np.abs((x @ x_directions).T @ x).sum(axis=1)
    a, b = x_test @ x_directions, y_test @ y_directions
    if len(a):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    values = np.divide((a * b).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 1e-12)
    return CanonicalCorrelations(values, weights / weights.sum() if weights.sum() else np.full_like(weights, math.nan))


def _in_every_second_recording(frames: LayerFrames) -> NDArray[np.bool_]:
    """Mask (n,) of the frames of every second recording of each speaker."""
    pairs = sorted(set(zip(frames.speakers.tolist(), frames.recordings.tolist(), strict=True)))
    chosen = [pair for _, own in groupby(pairs, key=itemgetter(0)) for pair in list(own)[::2]]
    return np.isin(frames.recordings, [recording for _, recording in chosen])


def _speaker_correlation(train: LayerFrames, test: LayerFrames, features: tuple[NDArray, NDArray]) -> float:
    """Speakers must be known, so recordings are halved instead of speakers; nan if no speaker has two recordings."""
    fitted = np.concatenate([_in_every_second_recording(frames) for frames in (train, test)])
    x, speakers = np.concatenate(features), np.concatenate([train.speakers, test.speakers])
    if fitted.all() or len(np.unique(speakers[fitted])) < 2:
        return math.nan
    return canonical_correlations(x[fitted], speakers[fitted], x[~fitted], speakers[~fitted]).projection_weighted


def evaluate_layer(
    train: LayerFrames, test: LayerFrames, position: int, *, num_clusters: int = 100, seed: int = 0
) -> dict[str, float]:
    """
    Compute the metrics of the layer at a position of the frames, fitted on `train` and evaluated on other speakers.

    By the names of `REPORT`: numbers of k-means clusters and of frames of `test`; phone purity and PNMI (`quality`) of
    the clusters; accuracy of a linear probe; and projection-weighted canonical correlation with phones, and with
    speakers, fitted on every second recording of each speaker and evaluated on the others, nan if no speaker has two
    recordings. Raises `ValueError` if there are fewer frames than clusters, or a single phone, and `ImportError`
    without scikit-learn.
    """
    fitted, held_out = (np.ascontiguousarray(frames.features[:, position]) for frames in (train, test))
    clusters = fit_kmeans(fitted, num_clusters, seed).predict(held_out)
    table, _ = contingency(test.phones.tolist(), clusters, num_codes=num_clusters)
    phones = (fitted, train.phones, held_out, test.phones)
    return {
        "num_clusters": num_clusters,
        "num_frames": len(held_out),
        "kmeans_phone_purity": phone_purity(table),
        "kmeans_pnmi": phone_normalized_mutual_information(table),
        "phone_probe": probe_accuracy(*phones),
        "phone_cca": canonical_correlations(*phones).projection_weighted,
        "speaker_cca": _speaker_correlation(train, test, (fitted, held_out)),
    }
