"""Speech recognition: transcripts and vocabularies, decoding, error rates, transcription, subtitles."""

from ..data.output_names import output_path, output_paths
from .decoding import BeamSearchDecoder, CTCDecoder, DecodingOptions, GreedyDecoder, Hypothesis, TimedWord
from .pipeline import SpeechRecognitionPipeline
from .scoring import ErrorReport, UtteranceErrors, score, speech_errors_metric, texts_of
from .subtitles import FORMATS, Caption, captions
from .text import TextNormalization, build_vocabulary, load_processor, make_processor
from .transcript_folder import TranscriptFiles
from .transcription import Transcriber, Transcript

__all__ = ["TextNormalization", "build_vocabulary", "make_processor", "load_processor"]
__all__ += ["score", "texts_of", "ErrorReport", "UtteranceErrors", "speech_errors_metric"]
__all__ += ["CTCDecoder", "GreedyDecoder", "BeamSearchDecoder", "DecodingOptions", "Hypothesis", "TimedWord"]
__all__ += ["SpeechRecognitionPipeline", "Transcriber", "Transcript", "TranscriptFiles"]
__all__ += ["Caption", "captions", "FORMATS"]
__all__ += ["output_path", "output_paths"]
