"""
Speech for pre-training: where it comes from, how it is read, and how it becomes the same steps on any machine.

Importing this needs none of the optional packages; reading audio does (`pip install "dinosr-hf[train]"`).
"""

from .archives import TarSource
from .audio import SAMPLING_RATE, AudioFileError, AudioInfo, audio_info, load_audio, normalize_waveform
from .batching import (
    Crop,
    MicroBatch,
    PlanSummary,
    SkippedPart,
    StepDataset,
    StepLoader,
    micro_batches,
    plan_epoch,
    summarize_plan,
)
from .collator import PretrainingCollator, min_maskable_samples, utterance_generator
from .labelled import JoinedSource, LabelledSource, open_labelled
from .manifests import ManifestSource, TableSource
from .mixture import MixedSource
from .opening import open_recordings, open_source
from .scan import FolderScan, ScannedFile, scan_folder, write_manifest
from .sources import DatasetSource, FileSource, FolderSource, SpeechSource, Utterance
from .streaming import SpeechStream, StreamChangedError, StreamWindow

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
    "FileSource",
    "ManifestSource",
    "TableSource",
    "TarSource",
    "DatasetSource",
    "SpeechStream",
    "StreamWindow",
    "StreamChangedError",
    "MixedSource",
    "open_source",
    "open_recordings",
    "JoinedSource",
    "LabelledSource",
    "open_labelled",
    "FolderScan",
    "ScannedFile",
    "scan_folder",
    "write_manifest",
    "Crop",
    "plan_epoch",
    "micro_batches",
    "PlanSummary",
    "summarize_plan",
    "MicroBatch",
    "SkippedPart",
    "StepDataset",
    "StepLoader",
    "PretrainingCollator",
    "min_maskable_samples",
    "utterance_generator",
]
