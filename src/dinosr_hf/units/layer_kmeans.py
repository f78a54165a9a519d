"""Clusters of a layer's features, as a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..analysis.kmeans import KMeans
from ..model.modeling_dinosr import SOURCES
from ..utils.damaged_files import explain_damage
from ..utils.digests import value_digest
from ..utils.files import write_atomically
from ..utils.names import one_line
from ..utils.text_files import check_regular_file


@dataclass(frozen=True)
class LayerKMeans(KMeans):
    """Clusters of the features of a transformer layer, counted from 1; `source` is that of `LayerExtractor`."""

    layer: int
    source: str
    is_smoothed: bool = False  # as for `LayerExtractor`
    # Of the model that they were fitted on; None: not known, as in files of earlier releases.
    dtype: str | None = None
    model_sha256: str | None = None

    @property
    def digest(self) -> str:
        """Digest of the clusters and of what they are clusters of, whatever file they come from."""
        return value_digest([self.layer, self.source, self.is_smoothed, self.centroids.tolist()])

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file atomically, and return its path."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {name: value for name, value in vars(self).items() if name != "centroids"}
        metadata = {"kmeans": json.dumps(about)}
        return write_atomically(file, save({"centroids": np.ascontiguousarray(self.centroids)}, metadata=metadata))

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a file that `save` wrote. Raises `ValueError` for any other file, and for centroids that are none."""
        try:
            check_regular_file(file)
            with safe_open(file, "numpy") as opened:
                about = json.loads((opened.metadata() or {})["kmeans"])
                kmeans = cls(np.asarray(opened.get_tensor("centroids"), dtype=np.float32), **about)
                kmeans.check()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            damage = explain_damage(file) if Path(file).is_file() else None
            problem = damage or f"{file} is not a k-means file: {one_line(error)}."
            raise ValueError(f"{problem} Give a file that `dinosr kmeans` wrote.") from error
        return kmeans

    def check(self) -> None:
        """Raise `ValueError` unless the fields are those of clusters."""
        if self.centroids.ndim != 2 or 0 in self.centroids.shape:
            raise ValueError(f"its centroids have shape {self.centroids.shape}; expected (clusters, hidden size)")
        if not np.isfinite(self.centroids).all():
            raise ValueError("its centroids are not all finite: fit them again")
        is_layer = isinstance(self.layer, int) and self.layer >= 1
        if not is_layer or self.source not in SOURCES or not isinstance(self.is_smoothed, bool):
            found = f"layer={self.layer!r}, source={self.source!r} and is_smoothed={self.is_smoothed!r}"
            raise ValueError(f"it has {found}; expected a number from 1, {' or '.join(SOURCES)}, and true or false")
