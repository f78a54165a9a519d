"""
What the layers of a model know about phones and speakers: units by k-means, a linear probe, canonical correlations.

Everything is fitted on some recordings and judged on others, of other speakers where it is about phones. A layer is
judged on frames drawn at random, the same of every layer and, for models of the same frames, of every model.

`n` frames, `L` layers, `D` dimensions, `K` classes (phones or speakers), `C` canonical components.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data import SpeechSource
from ..data.collator import utterance_generator
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.extras import import_extra
from .baselines import kmeans_units
from .plots.lines import LayerCurves
from .quality import contingency, phone_normalized_mutual_information, phone_purity
from .unit_evaluation import Reference

METRICS = {
    "kmeans_phone_purity": "phone purity of k-means",
    "kmeans_pnmi": "PNMI of k-means",
    "phone_probe": "phone probe, accuracy",
    "phone_cca": "PWCCA with phones",
    "speaker_cca": "PWCCA with speakers",
}
"""Name of each figure of a layer -> what tables and pictures call it."""

# Of the variance of a dimension, added to each: it keeps directions in which frames hardly differ from deciding.
REGULARIZATION = 1e-3


class FeatureExtractor(Protocol):
    """What `units.UnitExtractor` and `units.BaselineExtractor` have in common."""

    config: DinoSRConfig
    layers: list[int]

    def features(
        self, recordings: SpeechSource, *, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Id and features float32 (T, L, D) of each recording."""


class Recordings(NamedTuple):
    """
    Recordings to fit on, or to judge on.

    Attributes:
        source: Where they are.
        reference: Their phones and speakers.
        ids: Which of them.
    """

    source: SpeechSource
    reference: Reference
    ids: frozenset[str]

    @classmethod
    def all_of(cls, source: SpeechSource, reference: Reference) -> Recordings:
        """Those that have labels."""
        return cls(source, reference, frozenset(reference.ids))

    @property
    def speakers(self) -> set[str]:
        """All of them."""
        return {self.reference.speaker_of(recording) for recording in self.ids}

    def split(self, seed: int = 0) -> tuple[Recordings, Recordings]:
        """
        Two parts without a speaker in common, each of about half of the speakers.

        Args:
            seed: Of the draw.

        Raises:
            ValueError: With one speaker.
        """
        speakers = sorted(self.speakers)
        if len(speakers) < 2:
            raise ValueError(
                f"All recordings are of one speaker, {speakers[0]!r}, but layers are judged on other speakers"
                " than they are fitted on. Give recordings of other speakers to fit on."
            )
        drawn = np.random.default_rng(seed).permutation(len(speakers))[: len(speakers) // 2]
        chosen = {speakers[number] for number in drawn}
        first = frozenset(name for name in self.ids if self.reference.speaker_of(name) in chosen)
        return self._replace(ids=first), self._replace(ids=self.ids - first)


def check_apart(fit: Recordings, judged: Recordings) -> None:
    """Raises `ValueError` if two sets of recordings have a speaker in common."""
    both = sorted(fit.speakers & judged.speakers)
    if both:
        raise ValueError(
            f"Recordings to fit on and to judge on have {len(both)} speakers in common, for example {both[0]!r}."
            " Figures would be better than for new speakers: give recordings of different ones."
        )


class LayerFrames(NamedTuple):
    """
    Frames of some recordings, drawn at random.

    Attributes:
        features: float32 (n, L, D).
        phones: Text (n,).
        speakers: Text (n,).
        recordings: Text (n,), their ids.
    """

    features: NDArray[np.float32]
    phones: NDArray[np.str_]
    speakers: NDArray[np.str_]
    recordings: NDArray[np.str_]


def draw_frames(
    extractor: FeatureExtractor, recordings: Recordings, *, max_frames: int = 20_000, seed: int = 0
) -> LayerFrames:
    """
    Features of frames of recordings, in memory: `max_frames` of 12 layers of a base model have 0.7 GB.

    Which frames are drawn depends on the seed, the ids and the lengths alone.

    Args:
        extractor: Of the layers.
        recordings: To draw from.
        max_frames: About so many are drawn, or all if there are fewer.
        seed: Of the draw.

    Raises:
        ValueError: If labels do not fit a recording, or no frame is left.
    """
    config, reference = extractor.config, recordings.reference
    utterances = recordings.source.utterances
    indices = [index for index, utterance in enumerate(utterances) if utterance.id in recordings.ids]
    total = sum(int(config.num_frames(utterances[index].num_samples)) for index in indices)
    share = min(1.0, max_frames / max(1, total))
    kept: list[LayerFrames] = []
    for name, features in extractor.features(recordings.source, indices=indices):
        labels = reference.frames_of(
            name, len(features), stride=config.inputs_to_logits_ratio, field=config.receptive_field
        )
        drawn = utterance_generator(seed, 0, name, "frames of layers").random(len(features)) < share
        num_drawn = int(drawn.sum())
        if num_drawn:
            speaker = reference.speaker_of(name)
            texts = (np.array(labels)[drawn], np.full(num_drawn, speaker), np.full(num_drawn, name))
            kept.append(LayerFrames(np.array(features[drawn]), *texts))
    if not kept:
        raise ValueError("No frame was drawn: no recording with labels is long enough, or could be read.")
    return LayerFrames(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))


def _standardized(train: ArrayLike, test: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean 0 and variance 1 of each dimension of `train`; one that does not vary stays 0 there."""
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


def probe_accuracy(
    train: ArrayLike,
    train_classes: ArrayLike,
    test: ArrayLike,
    test_classes: ArrayLike,
    *,
    regularization: float = REGULARIZATION,
) -> float:
    """
    How often a linear function of a frame's features names its class: ridge regression to classes as one-hot vectors.

    Features are standardised by `train`; of the K values of a frame the largest decides (scikit-learn's
    `RidgeClassifier`, with a penalty of `regularization` times n). A class that `train` lacks is never right. Alain
    and Bengio, "Understanding intermediate layers using linear classifier probes" (arXiv 1610.01644), which has
    logistic regression; ridge regression has a closed solution.

    Args:
        train: Features to fit on, (n, D).
        train_classes: Their classes (n,).
        test: Features to judge on, (m, D).
        test_classes: Their classes (m,).
        regularization: Of the variance of a dimension.

    Returns:
        Share of the m frames that are right.

    Raises:
        ValueError: For other shapes, or if there is one class only.
        ImportError: Without scikit-learn.
    """
    _check_features(train, train_classes, test, test_classes)
    if len(np.unique(np.asarray(train_classes))) < 2:
        raise ValueError("There is one class only in train, but a probe tells at least two apart.")
    fitted, judged = _standardized(train, test)
    linear = import_extra("sklearn.linear_model", "analysis").RidgeClassifier(alpha=regularization * len(fitted))
    return float(linear.fit(fitted, train_classes).score(judged, test_classes))


def _whitening(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse square root, of directions that vary."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-10 * max(values[-1], 1e-300)
    return vectors[:, kept] / np.sqrt(values[kept])


class CanonicalCorrelations(NamedTuple):
    """
    Of features with classes, by `canonical_correlations`.

    Attributes:
        values: float64 (C,), the correlation of each component on the frames that are judged; from -1 to 1.
        weights: float64 (C,), how much of the features each component is; they sum to 1.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """All components count alike."""
        return float(self.values.mean())

    @property
    def projection_weighted(self) -> float:
        """PWCCA: the mean by `weights`, so that a component that is hardly in the features counts little."""
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
    Canonical correlation analysis between features x and classes as one-hot vectors y, judged on other frames.

        T = Sxx^(-1/2) Sxy Syy^(-1/2) = U diag(rho) V'
        a_i = x Sxx^(-1/2) u_i,   b_i = y Syy^(-1/2) v_i,   values_i = correlation of a_i and b_i over `test`
        weights_i ~ sum_d |<a_i, x_d>| over `train`

    with the covariances S of `train`, x standardised and `regularization` added to the diagonal of Sxx; Syy has rank
    K - 1 and is inverted there. On the frames it was fitted on, without regularisation, values_i is rho_i (Hotelling,
    Biometrika 28, 1936). Weights: Morcos, Raghu and Bengio (arXiv 1806.05759), section 3. For layers of speech models:
    Pasad, Chou and Livescu (arXiv 2107.04734), who judge on held-out frames too.

    Args:
        train: Features to fit on, (n, D).
        train_classes: Their classes (n,).
        test: Features to judge on, (m, D); frames of classes that `train` lacks are left out.
        test_classes: Their classes (m,).
        regularization: Of the variance of a dimension.

    Returns:
        min(D, K - 1) correlations and weights, those that are largest on `train` first. A component that does not vary
        over `test` has 0.

    Raises:
        ValueError: For other shapes, or if there is one class only.
    """
    _check_features(train, train_classes, test, test_classes)
    names, known = np.unique(np.asarray(train_classes), return_inverse=True)
    if len(names) < 2:
        raise ValueError("There is one class only in train, but correlations need at least two.")
    is_known = np.isin(np.asarray(test_classes), names)
    x, judged = _standardized(train, np.asarray(test)[is_known])
    y = np.eye(len(names))[known]
    y_mean = y.mean(axis=0)
    y_judged = np.eye(len(names))[np.searchsorted(names, np.asarray(test_classes)[is_known])] - y_mean
    y -= y_mean
    x_whitening = _whitening(x.T @ x / len(x) + regularization * np.eye(x.shape[1]))
    y_whitening = _whitening(y.T @ y / len(y))
    left, _, right = np.linalg.svd(x_whitening.T @ (x.T @ y / len(x)) @ y_whitening, full_matrices=False)
    x_directions, y_directions = x_whitening @ left, y_whitening @ right.T
    weights = np.abs((x @ x_directions).T @ x).sum(axis=1)
    a, b = judged @ x_directions, y_judged @ y_directions
    if len(a):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    values = np.divide((a * b).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 1e-12)
    return CanonicalCorrelations(values, weights / weights.sum() if weights.sum() else np.full_like(weights, math.nan))


def _alternating(frames: LayerFrames) -> NDArray[np.bool_]:
    """Of each speaker's recordings every second one, as a mask (n,) over frames."""
    recordings: dict[str, list[str]] = defaultdict(list)
    for speaker, recording in sorted(set(zip(frames.speakers.tolist(), frames.recordings.tolist(), strict=True))):
        recordings[speaker].append(recording)
    chosen = {recording for names in recordings.values() for recording in names[::2]}
    return np.array([recording in chosen for recording in frames.recordings.tolist()])


def _speaker_correlation(train: LayerFrames, test: LayerFrames, features: tuple[NDArray, NDArray]) -> float:
    """Speakers must be known, so recordings are halved and not speakers; nan if no speaker has two of them."""
    fitted = np.concatenate([_alternating(train), _alternating(test)])
    frames = np.concatenate(features)
    speakers = np.concatenate([train.speakers, test.speakers])
    judged = ~fitted
    if not judged.any() or len(np.unique(speakers[fitted])) < 2:
        return math.nan
    return canonical_correlations(
        frames[fitted], speakers[fitted], frames[judged], speakers[judged]
    ).projection_weighted


def evaluate_layer(
    train: LayerFrames, test: LayerFrames, position: int, *, num_clusters: int = 100, seed: int = 0
) -> dict[str, float]:
    """
    All figures of a layer.

    Args:
        train: Frames to fit on.
        test: Frames of other speakers to judge on.
        position: Of the layer among those of the frames.
        num_clusters: Of k-means, fitted on `train` by `baselines.kmeans_units`.
        seed: Of k-means.

    Returns:
        Of the names of `METRICS`: phone purity and PNMI (`quality`) of the clusters; accuracy of a linear probe;
        projection-weighted canonical correlation with phones; and with speakers, for which every second recording of
        each speaker is fitted on and the others are judged; nan if no speaker has two recordings.

    Raises:
        ValueError: If there are fewer frames than clusters, or a single phone.
        ImportError: Without scikit-learn.
    """
    fitted, judged = (np.ascontiguousarray(frames.features[:, position]) for frames in (train, test))
    clusters = kmeans_units(fitted, num_clusters, seed).predict(judged)
    table, _ = contingency(test.phones.tolist(), clusters, num_codes=num_clusters)
    phones = (fitted, train.phones, judged, test.phones)
    return {
        "kmeans_phone_purity": phone_purity(table),
        "kmeans_pnmi": phone_normalized_mutual_information(table),
        "phone_probe": probe_accuracy(*phones),
        "phone_cca": canonical_correlations(*phones).projection_weighted,
        "speaker_cca": _speaker_correlation(train, test, (fitted, judged)),
    }


class EvaluatedLayer(NamedTuple):
    """
    A row of the table of layers.

    Attributes:
        model: Name of the model.
        source: "student" or "teacher"; "student" for the outputs of any other model.
        layer: Transformer layer, the lowest is 1.
        figures: By the names of `METRICS`.
    """

    model: str
    source: str
    layer: int
    figures: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, nan as null."""
        figures = {name: None if math.isnan(value) else value for name, value in self.figures.items()}
        return {"model": self.model, "source": self.source, "layer": self.layer, **figures}


def layers_table(rows: Sequence[EvaluatedLayer]) -> str:
    """Markdown: a line a layer."""
    heads = ["model", "features", "layer", *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        model = row.model.replace("|", "\\|")
        figures = (f"{row.figures[name]:.3f}" for name in METRICS)
        lines.append(f"| {' | '.join([model, row.source, str(row.layer), *figures])} |")
    return "\n".join(lines) + "\n"


def layers_csv(rows: Iterable[EvaluatedLayer]) -> str:
    """A line a layer."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", "source", "layer", *METRICS])
    table.writerows([row.model, row.source, row.layer, *(row.figures[name] for name in METRICS)] for row in rows)
    return text.getvalue()


def layers_curves(rows: Sequence[EvaluatedLayer]) -> list[LayerCurves]:
    """A curve for each model and source, for `layer_curves_figure`."""
    curves = []
    for model, source in dict.fromkeys((row.model, row.source) for row in rows):
        own = [row for row in rows if (row.model, row.source) == (model, source)]
        metrics = {title: [row.figures[name] for row in own] for name, title in METRICS.items()}
        curves.append(LayerCurves(f"{model}, {source}", [row.layer for row in own], metrics))
    return curves
