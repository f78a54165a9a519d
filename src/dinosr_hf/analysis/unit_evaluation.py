"""
Units of a corpus against its phones: counts per speaker, the figures of their sum, and how sure they are.

`P` phones, `V` units, `T` frames, `S` speakers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .alignment import FIELD, SAMPLING_RATE, SILENCE, STRIDE, Labels, align_labels, match_labels
from .plots.lines import LayerCurves
from .quality import (
    cluster_purity,
    code_perplexity,
    contingency,
    num_active_codes,
    phone_normalized_mutual_information,
    phone_purity,
)
from .segmentation import SegmentCounts, bitrate, label_boundaries, match_boundaries, run_counts, unit_boundaries


@dataclass(frozen=True)
class UnitCounts:
    """
    All that the figures of units are made of; adds up over recordings and speakers.

    Attributes:
        table: Frames of each phone and unit, int64 (P, V).
        runs: Runs of each unit, int64 (V,).
        seconds: Of speech, frames times their length.
        segments: Boundaries found, true and both.
    """

    table: NDArray[np.int64]
    runs: NDArray[np.int64]
    seconds: float
    segments: SegmentCounts = field(default_factory=SegmentCounts)

    def __add__(self, other: UnitCounts) -> UnitCounts:
        return UnitCounts(
            self.table + other.table,
            self.runs + other.runs,
            self.seconds + other.seconds,
            self.segments + other.segments,
        )

    def figures(self) -> dict[str, float]:
        """
        All metrics, by the names of the columns of a table; each is the function or property of its name.

        Raises:
            ValueError: If no frame is counted.
        """
        return {
            "phone_purity": phone_purity(self.table),
            "cluster_purity": cluster_purity(self.table),
            "pnmi": phone_normalized_mutual_information(self.table),
            "code_perplexity": code_perplexity(self.table),
            "active_codes": float(num_active_codes(self.table)),
            "bitrate": bitrate(self.table.sum(axis=0), self.seconds),
            "deduplicated_bitrate": bitrate(self.runs, self.seconds),
            "boundary_precision": self.segments.precision,
            "boundary_recall": self.segments.recall,
            "boundary_f1": self.segments.f1,
            "over_segmentation": self.segments.over_segmentation,
            "r_value": self.segments.r_value,
        }


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
    sampling_rate: int = SAMPLING_RATE,
) -> UnitCounts:
    """
    Count one recording.

    Args:
        codes: Its units, integers (T,).
        labels: Its phones, one a step or segments, as `read_labels` gives them.
        phones: The phones in the order of the table's rows, the same for all recordings.
        num_codes: V.
        step_seconds: Length of a step, where labels are one a step.
        tolerance: Seconds between a boundary of units and one of phones.
        stride: Samples from one frame to the next.
        field: Samples that a frame sees.
        sampling_rate: Samples a second.

    Raises:
        ValueError: If labels and codes do not cover the same time, or a label is not in `phones`.
    """
    array = np.asarray(codes)
    frames = align_labels(
        labels, len(array), step_seconds=step_seconds, stride=stride, field=field, sampling_rate=sampling_rate
    )
    table, _ = contingency(frames, array, num_codes=num_codes, phones=phones)
    found = unit_boundaries(array, stride=stride, field=field, sampling_rate=sampling_rate)
    seconds = len(array) * stride / sampling_rate
    true = label_boundaries(labels, step_seconds=step_seconds, seconds=seconds)
    return UnitCounts(
        table,
        run_counts(array, num_codes),
        seconds,
        match_boundaries(found, true, tolerance=tolerance),
    )


def total(counts: Iterable[UnitCounts]) -> UnitCounts:
    """The sum of counts. Raises `ValueError` if there are none."""
    parts = list(counts)
    if not parts:
        raise ValueError("There are no counts to add up: no recording was judged.")
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def bootstrap_intervals(
    speakers: Mapping[str, UnitCounts], *, num_samples: int = 1_000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """
    How far each figure would vary with other speakers of the same kind: percentile intervals, centred.

    As many speakers as there are, drawn with replacement, are added up and judged, `num_samples` times; the interval
    leaves out the same share of these figures at both ends (Efron and Tibshirani, "An Introduction to the Bootstrap",
    1993, chapter 13). Fewer different speakers look better in purity and PNMI, which are biased upwards the less there
    is to count; so the draws' mean is moved to the figure itself (their estimate of bias, chapter 10). Speakers are
    drawn and not recordings, since recordings of a speaker are alike. With few speakers such intervals are too narrow.

    Args:
        speakers: Counts of each speaker, two at least.
        num_samples: How often speakers are drawn.
        level: Share of the figures inside.
        seed: Of the draws.

    Returns:
        For each name of `UnitCounts.figures` the two ends.

    Raises:
        ValueError: With one speaker, and for a level or a number of samples that cannot be.
    """
    if len(speakers) < 2:
        raise ValueError(
            f"There are {len(speakers)} speakers, but an interval over speakers needs at least 2. Judge more of them,"
            " or say which column has the speakers."
        )
    if not 0 < level < 1 or num_samples < 1:
        raise ValueError(
            f"level={level} and num_samples={num_samples}: level must be between 0 and 1, num_samples at least 1."
        )
    parts = [speakers[name] for name in sorted(speakers)]
    tables, runs = np.stack([part.table for part in parts]), np.stack([part.runs for part in parts])
    seconds = np.array([part.seconds for part in parts])
    hits = np.array([(p.segments.num_hits, p.segments.num_found, p.segments.num_true) for p in parts])
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=num_samples)
    found: dict[str, list[float]] = {}
    for times in drawn:
        counts = UnitCounts(
            np.tensordot(times, tables, axes=1),
            times @ runs,
            float(times @ seconds),
            SegmentCounts(*(times @ hits).tolist()),
        )
        for name, value in counts.figures().items():
            found.setdefault(name, []).append(value)
    figures, intervals = total(parts).figures(), {}
    for name, values in found.items():
        low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2)) - np.mean(values) + figures[name]
        intervals[name] = (float(low), float(high))
    return intervals


class Reference:
    """
    What units are judged by: the phones of recordings, and who speaks.

    Args:
        ids: Of the recordings.
        labels: Phones by name, as `read_alignments` gives them; recordings without are not judged.
        speakers: One a recording; None where it is not known. None: of all.
        step_seconds: Length of a step, where labels are one a step.
        tolerance: Seconds between a boundary of units and one of phones.

    Attributes:
        phones: All of them, sorted: the rows of tables.
        ids: Of recordings that are judged.
        step_seconds: As given.

    Raises:
        ValueError: If no recording has labels, or there is not one speaker a recording.
    """

    def __init__(
        self,
        ids: Sequence[str],
        labels: Mapping[str, Labels],
        *,
        speakers: Sequence[str | None] | None = None,
        step_seconds: float = 0.01,
        tolerance: float = 0.02,
    ) -> None:
        names = match_labels(ids, labels)
        if speakers is not None and len(speakers) != len(ids):
            raise ValueError(f"There are {len(speakers)} speakers for {len(ids)} recordings, but each needs one.")
        self._labels = {recording: labels[name] for recording, name in names.items()}
        self._speakers = dict(zip(ids, speakers or [None] * len(ids), strict=True))
        self.step_seconds, self._tolerance = step_seconds, tolerance
        self.ids = [recording for recording in ids if recording in names]
        self.phones = sorted(
            {label if isinstance(label, str) else label.label for phones in self._labels.values() for label in phones}
            | {SILENCE}
        )

    def labels_of(self, recording: str) -> Labels:
        """The phones of a recording that is judged, as they were given."""
        return self._labels[recording]

    def speaker_of(self, recording: str) -> str:
        """Who speaks; a recording whose speaker is not known is a speaker of its own."""
        return self._speakers[recording] or recording

    def frames_of(
        self,
        recording: str,
        num_frames: int,
        *,
        stride: int = STRIDE,
        field: int = FIELD,
        sampling_rate: int = SAMPLING_RATE,
    ) -> list[str]:
        """
        The phone of each frame of a recording that is judged.

        Args:
            recording: Its id.
            num_frames: T.
            stride: Samples from one frame to the next.
            field: Samples that a frame sees.
            sampling_rate: Samples a second.

        Returns:
            T labels.

        Raises:
            ValueError: If labels and frames do not cover the same time.
        """
        try:
            return align_labels(
                self._labels[recording],
                num_frames,
                step_seconds=self.step_seconds,
                stride=stride,
                field=field,
                sampling_rate=sampling_rate,
            )
        except ValueError as error:
            raise ValueError(f"{recording}: {error}") from error

    def judge(
        self,
        units: Iterable[tuple[str, NDArray[np.integer]]],
        *,
        num_codes: int,
        stride: int = STRIDE,
        field: int = FIELD,
        sampling_rate: int = SAMPLING_RATE,
    ) -> list[dict[str, UnitCounts]]:
        """
        Count the units of recordings.

        Args:
            units: Id and codes (L, T) of each recording; those without labels are passed over.
            num_codes: V.
            stride: Samples from one frame to the next.
            field: Samples that a frame sees.
            sampling_rate: Samples a second.

        Returns:
            For each layer the counts of each speaker; a recording whose speaker is not known is a speaker of its own.

        Raises:
            ValueError: If labels do not fit their recording, or none was judged.
        """
        layers: list[dict[str, UnitCounts]] = []
        for recording, codes in units:
            if recording not in self._labels or codes.shape[1] == 0:
                continue
            layers = layers or [{} for _ in codes]
            speaker = self.speaker_of(recording)
            for counts, row in zip(layers, codes, strict=True):
                try:
                    own = count_units(
                        *(row, self._labels[recording], self.phones),
                        num_codes=num_codes,
                        step_seconds=self.step_seconds,
                        tolerance=self._tolerance,
                        stride=stride,
                        field=field,
                        sampling_rate=sampling_rate,
                    )
                except ValueError as error:
                    raise ValueError(f"{recording}: {error}") from error
                counts[speaker] = counts[speaker] + own if speaker in counts else own
        if not layers:
            raise ValueError("No recording with labels was judged. Were all of them unreadable?")
        return layers


class EvaluatedUnits(NamedTuple):
    """
    A row of the table of units.

    Attributes:
        model: Name of the model.
        layer: Transformer layer, the lowest is 1.
        units: "student", "teacher" or "k-means".
        counts: Of each speaker.
        figures: Of all speakers together.
        intervals: Of each figure; empty with one speaker.
    """

    model: str
    layer: int
    units: str
    counts: dict[str, UnitCounts]
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    @classmethod
    def of(
        cls, model: str, layer: int, units: str, counts: dict[str, UnitCounts], *, num_samples: int = 1_000
    ) -> EvaluatedUnits:
        """Add up the speakers' counts; with two or more, and `num_samples` above 0, with intervals."""
        has_intervals = len(counts) > 1 and num_samples > 0
        intervals = bootstrap_intervals(counts, num_samples=num_samples) if has_intervals else {}
        return cls(model, layer, units, counts, total(counts.values()).figures(), intervals)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: names, frames, speakers, figures and intervals."""
        whole = total(self.counts.values())
        return {
            "model": self.model,
            "layer": self.layer,
            "units": self.units,
            "num_frames": int(whole.table.sum()),
            "seconds": whole.seconds,
            "num_speakers": len(self.counts),
            **self.figures,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
        }


HEADINGS = {
    "phone_purity": "phone purity",
    "cluster_purity": "cluster purity",
    "pnmi": "PNMI",
    "code_perplexity": "code perplexity",
    "active_codes": "active codes",
    "bitrate": "bits/s",
    "deduplicated_bitrate": "bits/s, joined",
    "boundary_precision": "boundary precision",
    "boundary_recall": "boundary recall",
    "boundary_f1": "boundary F1",
    "over_segmentation": "over-segmentation",
    "r_value": "R-value",
}


def _cell(name: str, row: EvaluatedUnits) -> str:
    digits = {"code_perplexity": 1, "active_codes": 0, "bitrate": 0, "deduplicated_bitrate": 0}.get(name, 3)
    text = f"{row.figures[name]:.{digits}f}"
    if name not in row.intervals:
        return text
    low, high = row.intervals[name]
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def units_table(rows: Sequence[EvaluatedUnits]) -> str:
    """Markdown: a line a row, figures with their intervals in brackets."""
    heads = ["model", "layer", "units", *HEADINGS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        model = row.model.replace("|", "\\|")
        lines.append(f"| {' | '.join([model, str(row.layer), row.units, *(_cell(n, row) for n in HEADINGS)])} |")
    return "\n".join(lines) + "\n"


def units_csv(rows: Sequence[EvaluatedUnits]) -> str:
    """A line a row, with a column for each figure and the two ends of its interval."""
    text = io.StringIO()
    ends = [f"{name}_{end}" for name in HEADINGS for end in ("low", "high")]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", "layer", "units", *HEADINGS, *ends])
    for row in rows:
        nothing = ("", "")
        interval = [end for name in HEADINGS for end in row.intervals.get(name, nothing)]
        table.writerow([row.model, row.layer, row.units, *(row.figures[name] for name in HEADINGS), *interval])
    return text.getvalue()


# What is drawn of the figures: precision and recall of boundaries are in their F1 and the R-value.
_DRAWN = [name for name in HEADINGS if name not in ("boundary_precision", "boundary_recall", "over_segmentation")]


def units_curves(rows: Sequence[EvaluatedUnits]) -> list[LayerCurves]:
    """A curve for each model and kind of units, with intervals where there are any, for `layer_curves_figure`."""
    curves = []
    for model, units in dict.fromkeys((row.model, row.units) for row in rows):
        own = sorted((row for row in rows if (row.model, row.units) == (model, units)), key=lambda row: row.layer)
        metrics = {HEADINGS[name]: [row.figures[name] for row in own] for name in _DRAWN}
        intervals = {
            HEADINGS[name]: [row.intervals[name] for row in own]
            for name in _DRAWN
            if all(name in row.intervals for row in own)
        }
        curves.append(LayerCurves(f"{model}, {units}", [row.layer for row in own], metrics, intervals))
    return curves
