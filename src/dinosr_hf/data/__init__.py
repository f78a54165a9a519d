"""Speech data: sources, audio, steps. Needs no optional packages until audio is read (`dinosr-hf[train]`)."""

from .archives import TarSource
from .audio import SAMPLING_RATE, AudioFileError, audio_info, load_audio, normalize_waveform
from .batching import Crop, MicroBatch, PlanSummary, StepDataset, StepLoader, micro_batches, plan_epoch, summarize_plan
from .collator import PretrainingCollator, min_maskable_samples, utterance_generator
from .labelled import LabelledSource, open_labelled
from .manifests import ManifestSource, TableSource
from .mixture import MixedSource
from .opening import open_recordings, open_source, open_stream
from .scan import scan_folder, write_manifest
from .sources import DatasetSource, FileSource, FolderSource, SpeechSource, Utterance
from .streaming import SpeechStream, StreamChangedError, StreamWindow

__all__ = ["SAMPLING_RATE", "AudioFileError", "audio_info", "load_audio", "normalize_waveform"]
__all__ += ["SpeechSource", "Utterance", "FolderSource", "FileSource", "ManifestSource", "TableSource", "TarSource"]
__all__ += ["DatasetSource", "SpeechStream", "StreamWindow", "StreamChangedError", "MixedSource", "LabelledSource"]
__all__ += ["open_source", "open_stream", "open_recordings", "open_labelled", "scan_folder", "write_manifest"]
__all__ += ["Crop", "plan_epoch", "micro_batches", "PlanSummary", "summarize_plan"]
__all__ += ["MicroBatch", "StepDataset", "StepLoader"]
__all__ += ["PretrainingCollator", "min_maskable_samples", "utterance_generator"]
