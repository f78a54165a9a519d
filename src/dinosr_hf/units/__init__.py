"""Acoustic units: of a corpus, of hours-long recordings, of a live signal; by k-means; features of layers as files."""

from .baseline_models import BaselineExtractor, load_baseline
from .certainty import ScoredUnits, scored_units
from .corpus import UnitCorpus, deduplicate, load_units
from .extraction import UnitExtractor, Units, has_codebooks, load_model
from .features import FEATURE_FORMATS, FeatureFiles
from .kmeans import LayerKMeans, fit_kmeans
from .live import UnitStreamer

__all__ = [
    "has_codebooks",
    "load_model",
    "UnitExtractor",
    "Units",
    "ScoredUnits",
    "scored_units",
    "UnitCorpus",
    "deduplicate",
    "load_units",
    "FeatureFiles",
    "FEATURE_FORMATS",
    "LayerKMeans",
    "fit_kmeans",
    "UnitStreamer",
    "BaselineExtractor",
    "load_baseline",
]
