"""
Evaluation of the units of a corpus against its phones: counts per speaker, metrics of their sum, and intervals.

`P` phones, `V` units, `T` frames, `L` layers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..data import SAMPLING_RATE, SpeechSource
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.command_line import argument_errors, check_ranges
from ..utils.extras import import_extra
from ..utils.visible_text import visible_text
from .alignment import FIELD, SILENCE, STRIDE, Labels, frame_labels, match_labels, phone_name, relabel
from .quality import UnitQuality, contingency
from .reports import LayerReport, Metric
from .segmentation import SegmentCounts, bitrate, label_boundaries, match_boundaries, run_counts, unit_boundaries


@dataclass(frozen=True)
class UnitCounts:
    """Counts that all metrics of units are computed from; they add up over recordings and speakers."""

    cells: Any  # scipy's csr_array (P, V) of int64, the table: one of a recording is nearly empty
    runs: NDArray[np.int64]  # (V,), runs of each unit
    seconds: float  # of speech: frames times their length
    segments: SegmentCounts

    def __add__(self, other: UnitCounts) -> UnitCounts:
        return UnitCounts(*map(operator.add, vars(self).values(), vars(other).values()))

    @property
    def table(self) -> NDArray[np.int64]:
        """Frames of each phone and unit (P, V)."""
        return self.cells.toarray()

    def figures(self) -> dict[str, float]:
        """Compute all metrics, by the names of `REPORT`; `ValueError` if no frame is counted."""
        quality = UnitQuality.from_table(self.table)
        return {
            "phone_purity": quality.phone_purity,
            "cluster_purity": quality.cluster_purity,
            "pnmi": quality.pnmi,
            "code_perplexity": quality.code_perplexity,
            "active_codes": float(quality.num_active_codes),
            "bitrate": bitrate(self.cells.sum(axis=0), self.seconds),
            "deduplicated_bitrate": bitrate(self.runs, self.seconds),
            **self.segments.figures(),
        }


REPORT = LayerReport(
    names={"model": "model", "layer": "layer", "units": "units"},
    metrics={
        # PNMI and purity of many units and of few frames are too high, so a table says how many there were.
        "num_units": Metric("number of units", digits=0, is_plotted=False),
        "num_frames": Metric("frames", digits=0, is_plotted=False),
        "phone_purity": Metric("phone purity"),
        "cluster_purity": Metric("cluster purity"),
        "pnmi": Metric("PNMI"),
        "code_perplexity": Metric("code perplexity", digits=1),
        "active_codes": Metric("active codes", digits=0),
        "bitrate": Metric("bits/s", digits=0),
        "deduplicated_bitrate": Metric("bits/s, joined", digits=0),
        # Precision and recall are in the F1 and the R-value.
        "boundary_precision": Metric("boundary precision", is_plotted=False),
        "boundary_recall": Metric("boundary recall", is_plotted=False),
        "boundary_f1": Metric("boundary F1"),
        "over_segmentation": Metric("over-segmentation", is_plotted=False),
        "r_value": Metric("R-value"),
    },
)


def count_units(
    codes: ArrayLike,
    labels: Labels,
    phones: Sequence[str],
    *,
    num_codes: int,
    step_seconds: float = 0.01,
    tolerance: float = 0.02,
    stride: int = STRIDE,
    field: int = FIELD,
) -> UnitCounts:
    """
    Count the units (T,) of one recording, integers below V, `num_codes`.

    `labels`, `step_seconds`, `stride` and `field` are as for `frame_labels`. `phones` are those of the table's rows,
    the same for all recordings; `tolerance` is the largest distance of a boundary of units from one of phones, in
    seconds. Raises `ValueError` if labels and codes do not cover the same time, or a label is not in `phones`, and
    `ImportError` without scipy.
    """
    array = np.asarray(codes)
    frames = frame_labels(labels, len(array), step_seconds=step_seconds, stride=stride, field=field)
    table, _ = contingency(frames, array, num_codes=num_codes, phones=phones)
    seconds = len(array) * stride / SAMPLING_RATE
    found = unit_boundaries(array, stride=stride, field=field)
    true = label_boundaries(labels, step_seconds=step_seconds, seconds=seconds)
    segments = match_boundaries(found, true, tolerance=tolerance)
    cells = import_extra("scipy.sparse", "analysis").csr_array(table)
    return UnitCounts(cells, run_counts(array, num_codes), seconds, segments)


def total(counts: Iterable[UnitCounts]) -> UnitCounts:
    """Add up counts, at least one."""
    return reduce(operator.add, counts)


def bootstrap_intervals(
    speakers: Mapping[str, UnitCounts], *, num_samples: int = 1_000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """
    Estimate how far each metric would vary with other speakers of the same kind: centred percentile intervals.

    `num_samples` times, as many speakers as there are, drawn with replacement, are added up and evaluated; the share
    `level` of these values is inside the interval (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
    chapter 13). With fewer distinct speakers purity and PNMI are higher, since they are biased upwards the less there
    is to count; so the mean of the draws is moved to the metric itself (their estimate of bias, chapter 10). Speakers
    are drawn rather than recordings, because a speaker's recordings are alike. With few speakers the intervals are too
    narrow. Raises `ValueError` with one speaker, or if `level` or `num_samples` is out of range.
    """
    if len(speakers) < 2:
        raise ValueError(
            f"There are {len(speakers)} speakers, but an interval over speakers needs at least 2. Evaluate more"
            " speakers, or name the column that has them."
        )
    is_level = 0 < level < 1
    check_ranges(
        [(is_level, "level", level, "between 0 and 1"), (num_samples >= 1, "num_samples", num_samples, "at least 1")]
    )
    parts = [speakers[name] for name in sorted(speakers)]
    sparse = import_extra("scipy.sparse", "analysis")
    shape = parts[0].cells.shape
    tables = sparse.vstack([part.cells.reshape(1, -1) for part in parts], format="csr")
    runs = np.stack([part.runs for part in parts])
    seconds = np.array([part.seconds for part in parts])
    segments = np.array([list(vars(part.segments).values()) for part in parts])
    generator = np.random.default_rng(seed)
    drawn = []
    for times in generator.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=num_samples):
        cells = sparse.csr_array((times @ tables).reshape(shape))
        counts = UnitCounts(cells, times @ runs, float(times @ seconds), SegmentCounts(*(times @ segments).tolist()))
        drawn.append(counts.figures())
    intervals = {}
    for name, value in total(parts).figures().items():
        values = [figures[name] for figures in drawn]
        low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2)) - np.mean(values) + value
        intervals[name] = (float(low), float(high))
    return intervals


class Reference:
    """
    The reference that units are evaluated against: phones and speakers of recordings.

    `labels` has phones by name, as `read_alignments` returns them, with steps of `step_seconds`; recordings without
    labels are not evaluated. `speakers` has the speaker of each recording, None where unknown. `others` are the ids of
    recordings that are left out, whose labels may be there. Raises `ValueError` if no recording has labels, they fit
    several, or the number of speakers differs from that of recordings.

    Attributes:
        labels: Phones of each recording that has some, by id.
        speakers: Speaker of each recording, by id; the id itself where unknown.
        has_speakers: Whether the speaker of any recording is known.
        phones: All phones, sorted: the rows of tables.
    """

    def __init__(
        self,
        ids: Sequence[str],
        labels: Mapping[str, Labels],
        *,
        speakers: Sequence[str | None] | None = None,
        step_seconds: float = 0.01,
        others: Iterable[str] = (),
    ) -> None:
        speakers = [None] * len(ids) if speakers is None else speakers
        if len(speakers) != len(ids):
            raise ValueError(f"There are {len(speakers)} speakers for {len(ids)} recordings, but each needs one.")
        names = match_labels(ids, labels, others=others)
        # Those that look alike are one.
        self.labels = {recording: relabel(labels[name], phone_name) for recording, name in names.items()}
        known = [visible_text(speaker or "") for speaker in speakers]
        self.has_speakers = any(known)
        self.speakers = {recording: speaker or recording for recording, speaker in zip(ids, known, strict=True)}
        self.step_seconds = step_seconds
        spoken = (label for own in self.labels.values() for label in own)
        self.phones = sorted({SILENCE, *(label if isinstance(label, str) else label.label for label in spoken)})

    def check_lengths(self, source: SpeechSource, config: DinoSRConfig) -> None:
        """Raise `ValueError` if the labels of a recording do not fit its frames; nothing is read."""
        frames: dict[str, Any] = {"stride": config.inputs_to_logits_ratio, "field": config.receptive_field}
        for recording, num_samples in source.utterances:
            num_frames = int(config.num_frames(num_samples))
            if recording in self.labels and num_frames:
                with argument_errors(f"{recording}: "):
                    frame_labels(self.labels[recording], num_frames, step_seconds=self.step_seconds, **frames)

    def count_by_speaker(
        self,
        units: Iterable[tuple[str, NDArray[np.integer]]],
        *,
        num_codes: int,
        stride: int = STRIDE,
        field: int = FIELD,
    ) -> list[dict[str, UnitCounts]]:
        """
        Count the units of recordings: for each of L layers, the counts of each speaker.

        `units` has id and codes (L, T), below `num_codes`, of each recording; those without labels are skipped. Raises
        `ValueError` if labels do not fit their recording, or no recording was counted.
        """
        frames: dict[str, Any] = {"step_seconds": self.step_seconds, "stride": stride, "field": field}
        layers: list[dict[str, UnitCounts]] = []
        for recording, codes in units:
            if recording not in self.labels or codes.shape[1] == 0:
                continue
            layers = layers or [{} for _ in codes]
            labels, speaker = self.labels[recording], self.speakers[recording]
            for counts, row in zip(layers, codes, strict=True):
                with argument_errors(f"{recording}: "):
                    own = count_units(row, labels, self.phones, num_codes=num_codes, **frames)
                counts[speaker] = counts[speaker] + own if speaker in counts else own
        if not layers:
            raise ValueError("No recording with labels was evaluated. Were all of them unreadable?")
        return layers


def evaluate_units(
    model: str, layer: int, units: str, counts: Mapping[str, UnitCounts], *, num_samples: int = 1_000
) -> dict[str, Any]:
    """
    Return a row of `REPORT`: the metrics of all speakers together and, with several, `bootstrap_intervals`.

    `layer` is counted from 1, 0 for units of the input; `units` says what they are: "student", "teacher", "anchor",
    "k-means". With `num_samples=0` there are no intervals.
    """
    whole = total(counts.values())
    has_intervals = len(counts) > 1 and num_samples > 0
    return {
        "model": model,
        "layer": layer,
        "units": units,
        "num_units": whole.cells.shape[1],
        "num_frames": int(whole.cells.sum()),
        "seconds": whole.seconds,
        "num_speakers": len(counts),
        **whole.figures(),
        "intervals": bootstrap_intervals(counts, num_samples=num_samples) if has_intervals else {},
    }
