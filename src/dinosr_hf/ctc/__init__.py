"""Speech recognition: transcripts and vocabularies, fine-tuning, error rates, decoding."""

from .decoding import BeamSearchDecoder, CTCDecoder, DecodingOptions, GreedyDecoder, Hypothesis, TimedWord
from .recognition import Recognition, RecognitionArguments
from .scoring import ErrorReport, UtteranceErrors, score, speech_errors_metric, texts_of
from .text import TextNormalization, build_vocabulary, load_processor, make_processor

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
]
