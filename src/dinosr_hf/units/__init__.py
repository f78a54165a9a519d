"""Units of a corpus, of a live signal, by codebooks or k-means; features of layers as files; baseline models."""

from ..utils.model_folder import has_codebooks
from .baseline_models import BaselineExtractor, load_baseline, open_extractors
from .corpus import UnitCorpus, load_units
from .extraction import LayerKMeans, UnitExtractor, Units, fit_layer_kmeans, load_model, scored_units
from .features import FEATURE_FORMATS, FeatureFiles
from .live import UnitStreamer

__all__ = ["UnitExtractor", "Units", "has_codebooks", "load_model", "scored_units"]
__all__ += ["UnitCorpus", "load_units", "FeatureFiles", "FEATURE_FORMATS", "LayerKMeans", "fit_layer_kmeans"]
__all__ += ["UnitStreamer", "BaselineExtractor", "load_baseline", "open_extractors"]
