"""Speech recognition: transcripts and vocabularies, fine-tuning, error rates, decoding, transcribing."""

from ..recordings import output_path
from .decoding import BeamSearchDecoder, CTCDecoder, DecodingOptions, GreedyDecoder, Hypothesis, TimedWord
from .pipelines import SpeechRecognitionPipeline
from .recognition import Recognition, RecognitionArguments
from .scoring import ErrorReport, UtteranceErrors, score, speech_errors_metric, texts_of
from .subtitles import FORMATS, Caption, captions
from .text import TextNormalization, build_vocabulary, load_processor, make_processor
from .transcription import Transcriber, Transcript

__all__ = [
    "TextNormalization",
    "build_vocabulary",
    "make_processor",
    "load_processor",
    "Recognition",
    "RecognitionArguments",
    "score",
    "texts_of",
    "ErrorReport",
    "UtteranceErrors",
    "speech_errors_metric",
    "CTCDecoder",
    "GreedyDecoder",
    "BeamSearchDecoder",
    "DecodingOptions",
    "Hypothesis",
    "TimedWord",
    "SpeechRecognitionPipeline",
    "Transcriber",
    "Transcript",
    "Caption",
    "captions",
    "FORMATS",
    "output_path",
]
