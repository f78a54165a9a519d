"""Units of a corpus, of a live signal, by codebooks or k-means; features of layers as files; baseline models."""

from ..utils.model_folder import has_codebooks
from .baseline_models import BaselineExtractor, load_baseline, open_extractors
from .corpus import UnitCorpus, load_units
from .extraction import LayerExtractor, UnitExtractor, Units, fit_layer_kmeans, load_model, scored_units
from .features import FEATURE_FORMATS, FeatureFiles
from .layer_kmeans import LayerKMeans
from .live import UnitStreamer

__all__ = [
    "has_codebooks",
    "load_model",
    "UnitExtractor",
    "Units",
    "scored_units",
    "LayerKMeans",
    "fit_layer_kmeans",
    "UnitCorpus",
    "load_units",
    "FEATURE_FORMATS",
    "FeatureFiles",
    "UnitStreamer",
    "LayerExtractor",
    "BaselineExtractor",
    "load_baseline",
    "open_extractors",
]
