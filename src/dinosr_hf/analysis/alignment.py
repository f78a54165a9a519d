"""
Phone labels at the frames of the model.

Frame `i` of the model sees the samples `[stride * i, stride * i + field)`, with the paper's encoder
`[320 i, 320 i + 400)`. Its label is the one spoken at the centre of that field, sample `320 i + 200`: at 12.5 ms,
32.5 ms, 52.5 ms, ... The convolutions do not pad, so this holds from the first frame to the last.

`T` frames. Times are seconds, intervals contain their start and not their end.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

STRIDE = 320
FIELD = 400
SAMPLING_RATE = 16_000
SILENCE = "SIL"

# Seconds that may lie between two segments that follow each other, as their times are rounded.
_LONGEST_ROUNDING = 0.01


class Segment(NamedTuple):
    """A label and the time it is spoken at, in seconds."""

    label: str
    start: float
    end: float


Labels = Sequence[str] | Sequence[Segment]
"""Of one recording: a phone a step, or segments."""


def frame_centers(
    num_frames: int, *, stride: int = STRIDE, field: int = FIELD, sampling_rate: int = SAMPLING_RATE
) -> NDArray[np.float64]:
    """
    Time of the centre of each frame's field.

    Args:
        num_frames: T, as `config.num_frames(num_samples)` gives it.
        stride: Samples from one frame to the next (`config.inputs_to_logits_ratio`).
        field: Samples that a frame sees.
        sampling_rate: Samples a second.

    Returns:
        float64 (T,), `(stride * i + field / 2) / sampling_rate` seconds.

    Raises:
        ValueError: If `num_frames` is negative.
    """
    if num_frames < 0:
        raise ValueError(f"num_frames={num_frames} is out of range: it must be at least 0.")
    return (stride * np.arange(num_frames) + field / 2) / sampling_rate


def _to_segment(item: Segment | tuple[str, float, float] | Mapping[str, Any]) -> Segment:
    if isinstance(item, Mapping):
        try:
            label, start, end = item["label"], item["start"], item["end"]
        except KeyError as error:
            raise ValueError(f"A segment lacks {error}: it needs label, start and end. It is {dict(item)}.") from None
    else:
        label, start, end = item
    segment = Segment(str(label), float(start), float(end))
    if not (math.isfinite(segment.start) and segment.start <= segment.end < math.inf):
        raise ValueError(f"The segment {tuple(segment)} ends before it starts: times are seconds, start first.")
    return segment


def frame_labels(
    segments: Iterable[Segment | tuple[str, float, float] | Mapping[str, Any]],
    num_frames: int,
    *,
    stride: int = STRIDE,
    field: int = FIELD,
    sampling_rate: int = SAMPLING_RATE,
    silence: str = SILENCE,
) -> list[str]:
    """
    Label frames from segments with times: each frame has the label at its centre.

    Args:
        segments: (label, start, end) in seconds, or mappings with these keys (the column `phones` of the synthetic
            corpus); in any order. Segments of no length are never seen. Neighbours may overlap by half a stride, as
            rounded times do; there the later one counts.
        num_frames: T, as `config.num_frames(num_samples)` gives it.
        stride: Samples from one frame to the next.
        field: Samples that a frame sees.
        sampling_rate: Samples a second.
        silence: Label of frames in gaps between segments, before the first and after the last.

    Returns:
        T labels.

    Raises:
        ValueError: If a segment ends before it starts, segments overlap by more, or `num_frames` is negative.
    """
    spoken = sorted((s for s in map(_to_segment, segments) if s.end > s.start), key=lambda segment: segment.start)
    tolerance = stride / 2 / sampling_rate
    for left, right in pairwise(spoken):
        if left.end - right.start > tolerance:
            raise ValueError(
                f"The segments {tuple(left)} and {tuple(right)} overlap: each moment can have one label only. "
                "Give one tier of an alignment (phones, not phones and words)."
            )
    centers = frame_centers(num_frames, stride=stride, field=field, sampling_rate=sampling_rate)
    # The last segment that has begun; -1 before the first.
    positions = np.searchsorted([segment.start for segment in spoken], centers, side="right") - 1
    return [
        spoken[position].label if position >= 0 and center < spoken[position].end else silence
        for position, center in zip(positions.tolist(), centers.tolist(), strict=True)
    ]


def step_labels(
    labels: Sequence[str],
    step_seconds: float,
    num_frames: int,
    *,
    stride: int = STRIDE,
    field: int = FIELD,
    sampling_rate: int = SAMPLING_RATE,
) -> list[str]:
    """
    Label frames from one label a step: each frame has the label of the step that holds its centre.

    Label `j` stands for `[j, j + 1)` steps; with steps of 10 ms frame `i` has label `2 i + 1`. Aligners round the
    number of steps of a file in their own ways, so labels may end up to one field (25 ms) before the last frame does;
    the last label then lasts on.

    Args:
        labels: One label a step, from the start of the recording.
        step_seconds: Length of a step, such as 0.01.
        num_frames: T, as `config.num_frames(num_samples)` gives it.
        stride: Samples from one frame to the next.
        field: Samples that a frame sees.
        sampling_rate: Samples a second.

    Returns:
        T labels.

    Raises:
        ValueError: If labels and frames do not cover the same time, or `step_seconds` or `num_frames` is out of range.
    """
    if not 0 < step_seconds < math.inf:
        raise ValueError(f"step_seconds={step_seconds} is out of range: it must be more than 0, such as 0.01.")
    # Counted in samples: 0.01 * 16,000 is 160 exactly, where 0.0325 / 0.01 is not 3.25.
    step = step_seconds * sampling_rate
    centers = frame_centers(num_frames, stride=stride, field=field, sampling_rate=1)
    covered = len(labels) * step
    # T frames need at least stride * (T - 1) + field samples, and stride more would give another frame.
    shortest, longest = stride * (num_frames - 1) + field, stride * num_frames + field
    if (num_frames and covered < shortest - field) or covered > longest + field:
        raise ValueError(
            f"{len(labels):,} labels of {step_seconds} s cover {covered / sampling_rate:.3f} s, but {num_frames:,} "
            f"frames cover {shortest / sampling_rate:.3f} s. Check step_seconds and that both are of the same "
            "recording; cut the labels where the audio was cut."
        )
    positions = np.minimum(np.floor(centers / step + 1e-9).astype(np.int64), len(labels) - 1)
    return [labels[position] for position in positions.tolist()]


def label_segments(
    labels: Labels, *, step_seconds: float = 0.01, seconds: float | None = None, silence: str = SILENCE
) -> list[Segment]:
    """
    Labels of a recording as segments that follow each other without gaps.

    Gaps are silence, but those of 10 ms and less, which rounding leaves, are closed in their middle; so are overlaps.
    A label that is followed by itself is one segment, so that steps and segments give the same.

    Args:
        labels: One label a step, or segments in any order, as `read_labels` gives them.
        step_seconds: Length of a step; segments have times of their own.
        seconds: Length of the recording, up to which silence goes on; None: to the last label.
        silence: Label of gaps, also before the first segment.

    Returns:
        Segments from 0 on, in order.
    """
    steps = [label for label in labels if isinstance(label, str)]
    spoken = [_to_segment(label) for label in labels if not isinstance(label, str)]
    spoken += [Segment(label, step * step_seconds, (step + 1) * step_seconds) for step, label in enumerate(steps)]
    spoken = sorted((segment for segment in spoken if segment.end > segment.start), key=lambda segment: segment.start)
    last = max((segment.end for segment in spoken), default=0.0)
    if seconds is not None and seconds - last > _LONGEST_ROUNDING + 1e-9:
        spoken.append(Segment(silence, last, seconds))
    found: list[Segment] = []
    label, start, end = silence, 0.0, 0.0
    for segment in spoken:
        if segment.start - end > _LONGEST_ROUNDING + 1e-9:
            pieces = [(silence, end), (segment.label, segment.start)]
        else:
            pieces = [(segment.label, (segment.start + end) / 2 if end else 0.0)]
        for following, moment in pieces:
            if following != label:
                found += [Segment(label, start, moment)] if moment > start else []
                label, start = following, moment
        end = max(end, segment.end)
    return [*found, Segment(label, start, end)] if end > start else found


def align_labels(
    labels: Sequence[str] | Sequence[Segment],
    num_frames: int,
    *,
    step_seconds: float = 0.01,
    stride: int = STRIDE,
    field: int = FIELD,
    sampling_rate: int = SAMPLING_RATE,
    silence: str = SILENCE,
) -> list[str]:
    """
    Label frames from what `read_labels` gives for one recording, of either form.

    Args:
        labels: One label a step, or segments.
        num_frames: T, as `config.num_frames(num_samples)` gives it.
        step_seconds: Length of a step; segments have times of their own.
        stride: Samples from one frame to the next.
        field: Samples that a frame sees.
        sampling_rate: Samples a second.
        silence: Label of frames outside all segments.

    Returns:
        T labels.

    Raises:
        ValueError: As `step_labels` and `frame_labels` do.
    """
    steps = [label for label in labels if isinstance(label, str)]
    if steps:
        return step_labels(steps, step_seconds, num_frames, stride=stride, field=field, sampling_rate=sampling_rate)
    segments = [segment for segment in labels if not isinstance(segment, str)]
    return frame_labels(segments, num_frames, stride=stride, field=field, sampling_rate=sampling_rate, silence=silence)


def _parse_line(line: str, place: str, tier: str) -> tuple[str, list[str] | list[Segment]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}. Give one object a line.") from None
    name = row.get("name", row.get("id")) if isinstance(row, dict) else None
    if not isinstance(name, str) or not isinstance(row.get(tier), list):
        raise ValueError(f'{place} must be an object with a string "name" (or "id") and a list "{tier}".')
    labels = row[tier]
    if all(isinstance(label, str) for label in labels):
        return name, labels
    if all(isinstance(label, dict) for label in labels):
        try:
            return name, [_to_segment(label) for label in labels]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place} holds what is no segment: {error}") from None
    raise ValueError(f'{place} must hold all strings or all objects with label, start and end in "{tier}".')


def read_labels(path: str | Path, tier: str = "phones") -> dict[str, list[str] | list[Segment]]:
    """
    Read a file of phone labels.

    One JSON object a line, `{"name": ..., "phones": [...]}`, or "id" for "name"; other keys are left alone. `phones`
    holds strings, one label a fixed step, or objects `{"label": ..., "start": seconds, "end": seconds}`.

    Args:
        path: A `.jsonl` file, or `.jsonl.gz`.
        tier: Which key has the labels; "words" for those of words.

    Returns:
        For each name, in the order of the file, its labels as they are written: strings or segments (`align_labels`
        takes both).

    Raises:
        ValueError: If the file has another suffix, a line is not of this form, or a name comes twice.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path} is no file of labels that can be read: give .jsonl or .jsonl.gz.")
    rows: dict[str, list[str] | list[Segment]] = {}
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, labels = _parse_line(line, f"{path}, line {number},", tier)
            if name in rows:
                raise ValueError(f"{path}, line {number}, names {name!r} again, but each recording has one line.")
            rows[name] = labels
    return rows


def label_name(recording: str, labels: Mapping[str, Labels]) -> str | None:
    """
    What labels call a recording.

    Args:
        recording: Its id, `84/84-121123.flac`.
        labels: By name.

    Returns:
        The id, or the name of its file without folders and suffix (`84-121123`); None if there are no labels of it.
    """
    file = recording.rpartition("/")[2]
    stem, dot, suffix = file.rpartition(".")
    name = stem if dot and suffix.isalnum() and not suffix.isdigit() else file
    return next((known for known in (recording, file, name) if known in labels), None)


def match_labels(ids: Sequence[str], labels: Mapping[str, Labels]) -> dict[str, str]:
    """
    Find the labels of recordings: under a recording's id, or else the name of its file without suffix.

    Args:
        ids: Of the recordings.
        labels: As `read_alignments` gives them.

    Returns:
        For each recording that has labels their name.

    Raises:
        ValueError: If none has any, or two recordings have the same.
    """
    found = ((recording, label_name(recording, labels)) for recording in ids)
    names = {recording: name for recording, name in found if name is not None}
    if not names:
        raise ValueError(
            f"None of {len(ids):,} recordings has labels. They are named like {ids[0]!r}, the labels like"
            f" {next(iter(labels), 'nothing')!r}: both must have the same id, or the name of the file without suffix."
        )
    owners: dict[str, str] = {}
    for recording, name in names.items():
        if name in owners:
            raise ValueError(
                f"The labels of {name!r} fit two recordings, {owners[name]!r} and {recording!r}. Name the labels by"
                " the recordings' ids."
            )
        owners[name] = recording
    return names
