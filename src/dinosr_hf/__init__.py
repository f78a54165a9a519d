"""DinoSR (arXiv 2305.10005) as a Hugging Face Transformers model: pre-training, fine-tuning, acoustic units."""

import transformers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from .model import modeling_dinosr
from .model.codebook_dinosr import OnlineCodebooks, perplexity
from .model.configuration_dinosr import DinoSRConfig
from .model.fast_cpu_dinosr import set_fast_cpu
from .model.masking_dinosr import TorchDraws, sample_span_mask
from .model.modeling_dinosr import (
    AUTO_CLASSES,
    DinoSRForAudioFrameClassification,
    DinoSRForCTC,
    DinoSRForPreTraining,
    DinoSRForPreTrainingOutput,
    DinoSRForSequenceClassification,
    DinoSRForXVector,
    DinoSRModel,
    DinoSRModelOutput,
    DinoSRPreTrainedModel,
)
from .utils.model_folder import FolderTokenizer

__version__ = "0.1.0.dev0"


def _register() -> None:
    """Tell transformers' automatic classes and pipelines what belongs to the model type "dinosr"."""
    AutoConfig.register("dinosr", DinoSRConfig, exist_ok=True)
    DinoSRConfig.register_for_auto_class()
    for auto_name, model_name in AUTO_CLASSES.items():
        model_class = getattr(modeling_dinosr, model_name)
        getattr(transformers, auto_name).register(DinoSRConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_name)
    AutoFeatureExtractor.register(DinoSRConfig, Wav2Vec2FeatureExtractor, exist_ok=True)
    AutoTokenizer.register(DinoSRConfig, FolderTokenizer, exist_ok=True)
    AutoProcessor.register(DinoSRConfig, Wav2Vec2Processor, exist_ok=True)


_register()

__all__ = [
    "DinoSRConfig",
    "DinoSRForAudioFrameClassification",
    "DinoSRForCTC",
    "DinoSRForPreTraining",
    "DinoSRForPreTrainingOutput",
    "DinoSRForSequenceClassification",
    "DinoSRForXVector",
    "DinoSRModel",
    "DinoSRModelOutput",
    "DinoSRPreTrainedModel",
    "OnlineCodebooks",
    "TorchDraws",
    "perplexity",
    "sample_span_mask",
    "set_fast_cpu",
]
