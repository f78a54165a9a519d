"""
Speech for pre-training: where it comes from, how it is read, and how it becomes the same steps on any machine.

Importing this needs none of the optional packages; reading audio does (`pip install "dinosr-hf[train]"`).
"""

from .audio import SAMPLING_RATE, AudioFileError, AudioInfo, audio_info, load_audio, normalize_waveform
from .batching import Crop, PlanSummary, StepDataset, StepLoader, micro_batches, plan_epoch, summarize_plan
from .collator import PretrainingCollator, min_maskable_samples, utterance_generator
from .sources import DatasetSource, FolderSource, ManifestSource, SpeechSource, Utterance, open_source

__all__ = [
    "SAMPLING_RATE",
    "AudioFileError",
    "AudioInfo",
    "audio_info",
    "load_audio",
    "normalize_waveform",
    "SpeechSource",
    "Utterance",
    "FolderSource",
    "ManifestSource",
    "DatasetSource",
    "open_source",
    "Crop",
    "plan_epoch",
    "micro_batches",
    "PlanSummary",
    "summarize_plan",
    "StepDataset",
    "StepLoader",
    "PretrainingCollator",
    "min_maskable_samples",
    "utterance_generator",
]
