"""
Anchors: labels of frames from outside of the model, which it predicts beside its own codewords.

Two kinds: `MfccAnchor` computes labels from the waveform, `TrackAnchor` looks them up in what was labelled before.
`anchor_making` makes them for a run. `S` samples, `T` frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..analysis.alignment import STRIDE
from ..analysis.baselines import mfcc
from ..analysis.kmeans import KMeans
from ..data.collator import NO_LABEL, Part
from ..training.resume import CheckpointError
from ..utils.files import write_atomically

ANCHOR_FILE = "anchor.safetensors"


class Anchor(Protocol):
    """Labels frames; a `data.collator.FrameLabeler` that can be stored."""

    @property
    def num_labels(self) -> int:
        """Number of different labels: they are from 0 on."""

    def __call__(self, part: Part) -> NDArray[np.int64]:
        """Label the model's frames of a part of an utterance: (T,), `NO_LABEL` where there is none."""

    def to_bytes(self) -> bytes:
        """Return the content of its file, the same for the same labels."""


def _serialize(tensors: dict[str, NDArray[Any]], about: Mapping[str, Any]) -> bytes:
    return save(tensors, metadata={"anchor": json.dumps(about)})


def _at_centres(
    track: NDArray[np.integer], centres: NDArray[np.float64], *, stride: int, field: int
) -> NDArray[np.int64]:
    """Return the label nearest to each centre (T,); label `k` of a track is centred on `stride * k + field / 2`."""
    nearest = np.floor((centres - field / 2) / stride + 0.5).astype(np.int64)
    return track[nearest.clip(0, len(track) - 1)].astype(np.int64)


@dataclass(frozen=True)
class MfccAnchor:
    """
    The nearest of the clusters of MFCCs (`analysis.baselines.mfcc`), computed from the part alone, as recorded.

    At another speed a frame gets the label of the recorded frame with the nearest centre.
    """

    kmeans: KMeans
    field: int  # number of samples that a frame of the model sees
    is_tuned: bool

    @property
    def num_labels(self) -> int:
        """Number of clusters."""
        return len(self.kmeans.centroids)

    def __call__(self, part: Part) -> NDArray[np.int64]:
        # A part that is slowed down may be shorter than a frame as recorded.
        waveform = np.pad(part.waveform, (0, max(0, self.field - len(part.waveform))))
        labels = self.kmeans.predict(mfcc(waveform, field=self.field, tuned=self.is_tuned))
        return _at_centres(labels, part.centres(STRIDE, self.field), stride=STRIDE, field=self.field)

    def to_bytes(self) -> bytes:
        about = {"kind": "mfcc", "field": self.field, "tuned": self.is_tuned}
        return _serialize({"centroids": np.ascontiguousarray(self.kmeans.centroids)}, about)


@dataclass(frozen=True)
class TrackAnchor:
    """
    Labels of whole recordings, made before, of which a frame gets the one with the nearest centre.

    Label `k` of a track is centred on sample `stride * k + field / 2` of its recording, frame `i` of the model's
    features on `model_stride * i + model_field / 2` of its part, at the part's speed. Recordings without a track, or
    with an empty one, get no labels.
    """

    tracks: Mapping[str, NDArray[np.unsignedinteger]]  # by utterance id; empty: known when they were made, unlabelled
    num_labels: int
    stride: int
    field: int
    model_stride: int
    model_field: int

    def __call__(self, part: Part) -> NDArray[np.int64]:
        track = self.tracks.get(part.utterance_id)
        if track is None or not len(track):
            return np.full(part.num_frames, NO_LABEL)
        centres = part.start + part.centres(self.model_stride, self.model_field)
        return _at_centres(track, centres, stride=self.stride, field=self.field)

    def to_bytes(self) -> bytes:
        # Ids of a large corpus are more than the header of a safetensors file can hold.
        ids = np.frombuffer(json.dumps(list(self.tracks)).encode(), dtype=np.uint8)
        lengths = np.array([len(track) for track in self.tracks.values()], dtype=np.int64)
        labels = np.concatenate(list(self.tracks.values()))
        about = {"kind": "tracks", "num_labels": self.num_labels, "stride": self.stride, "field": self.field}
        about |= {"model_stride": self.model_stride, "model_field": self.model_field}
        return _serialize({"ids": ids, "lengths": lengths, "labels": labels}, about)


def anchor_digest(anchor: Anchor) -> str:
    """Return a digest by which a resumed run recognises its anchor."""
    return hashlib.sha256(anchor.to_bytes()).hexdigest()


def save_anchor(anchor: Anchor, folder: str | Path) -> None:
    """Write `anchor.safetensors` into a folder, atomically."""
    write_atomically(Path(folder, ANCHOR_FILE), anchor.to_bytes())


def load_anchor(folder: str | Path) -> Anchor:
    """Read `anchor.safetensors` of a folder. Raises `CheckpointError` if it is missing or cannot be read."""
    file = Path(folder, ANCHOR_FILE)
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing: it has the anchor's labels, without which the run cannot go on as it began. Copy it"
            " back, or start another run in another output_dir, with base_model set to the last checkpoint."
        )
    try:
        with safe_open(file, "numpy") as opened:
            about = json.loads((opened.metadata() or {})["anchor"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not iterable)
        if about.pop("kind") == "mfcc":
            return MfccAnchor(KMeans(tensors["centroids"]), about["field"], about["tuned"])
        ids = json.loads(tensors["ids"].tobytes())
        tracks = np.split(tensors["labels"], np.cumsum(tensors["lengths"])[:-1])
        return TrackAnchor(dict(zip(ids, tracks, strict=True)), **about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as an anchor: {error}") from error
