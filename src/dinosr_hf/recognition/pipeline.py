"""
transformers' speech recognition pipeline, with our readers of audio and our times of words.

transformers' own class runs ffmpeg for files, needs torchaudio for arrays that are not at 16 kHz, and takes the frames
in which a word's labels are emitted for the time at which it is spoken.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline

from ..data import SAMPLING_RATE, load_audio
from ..data.audio import Samples
from ..model.configuration_dinosr import DinoSRConfig
from .decoding import GreedyDecoder
from .text import units_of


def _mono(samples: Any) -> np.ndarray:
    """Convert (S,) or (channels, S) to float32 (S,)."""
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().float().cpu().numpy()
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim == 2 and samples.shape[0] in (1, 2):
        samples = samples.mean(axis=0)
    if samples.ndim != 1:
        raise ValueError(
            f"The audio has shape {samples.shape}, but must be (samples,), or (channels, samples) with one or two"
            " channels. soundfile.read returns (samples, channels): transpose it."
        )
    return samples


class SpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """
    `AutomaticSpeechRecognitionPipeline` for `DinoSRForCTC`; give it to `pipeline` as `pipeline_class`.

    `load_audio` reads files and bytes, and its resampler converts other rates than 16 kHz: of arrays, given in a dict
    with "sampling_rate", and of the `AudioDecoder` in a row of `datasets`. Samples before channels, NaN and arrays
    without samples are refused; a recording too short for a frame has an empty transcript. Times of words
    (`return_timestamps="word"`) are those of `CTCDecoder.word_times`; times of characters ("char") are transformers'.
    URLs are left to transformers, which needs ffmpeg for them.
    """

    # transformers' own classes disagree about these signatures.
    def preprocess(self, inputs: Any, **parameters: Any) -> Any:  # type: ignore[override]
        """Read and resample audio, then do what the base class does."""
        if callable(getattr(inputs, "get_all_samples", None)):  # of a row of `datasets`, or torchcodec's own
            decoded = inputs.get_all_samples()
            inputs = self._resampled({"raw": decoded.data, "sampling_rate": decoded.sample_rate})
        elif isinstance(inputs, (bytes, Path)) or (isinstance(inputs, str) and "://" not in inputs):
            inputs = load_audio(inputs)
        elif isinstance(inputs, dict) and "sampling_rate" in inputs and ("raw" in inputs or "array" in inputs):
            inputs = self._resampled(dict(inputs))
        elif isinstance(inputs, (np.ndarray, torch.Tensor)):
            inputs = self._resampled({"raw": inputs, "sampling_rate": SAMPLING_RATE})
        yield from super().preprocess(inputs, **parameters)

    def _resampled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        samples = _mono(inputs.pop("raw") if "raw" in inputs else inputs.pop("array"))
        given = inputs.pop("sampling_rate")
        try:
            rate = int(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"sampling_rate is {given!r}, but must be a whole number of Hz.") from error
        inputs.pop("path", None)  # rows of older `datasets` have one
        if "stride" in inputs:
            inputs["stride"] = tuple(round(length * SAMPLING_RATE / rate) for length in inputs["stride"])
        return {"raw": load_audio(Samples(samples, rate)), "sampling_rate": SAMPLING_RATE, **inputs}

    def _forward(self, input_tensors: Any, **parameters: Any) -> Any:  # type: ignore[override]
        num_samples = input_tensors["attention_mask"].sum(dim=-1)
        outputs = super()._forward(input_tensors, **parameters)
        return {**outputs, "num_frames": self.model.config.num_frames(num_samples)}

    def postprocess(
        self, model_outputs: Any, decoder_kwargs: Any = None, return_timestamps: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Do what the base class does, with `CTCDecoder.word_times`."""
        outputs = list(model_outputs)
        num_frames = 0
        for output in outputs:
            own = int(output.pop("num_frames"))  # without padding
            total, left, right = output.get("stride") or (own, 0, 0)
            num_frames += len(range(own)[left : total - right])
        tokenizer = cast(Any, self.tokenizer)
        # Each phone is a word, for which transformers' tokenizer of phones knows only "char".
        is_phones = return_timestamps == "word" and units_of(tokenizer) == "phonemes"
        kind = "char" if is_phones else return_timestamps
        result = super().postprocess(outputs, decoder_kwargs, kind, *args, **kwargs)
        if is_phones:
            special = set(tokenizer.all_special_tokens)
            result["chunks"] = [chunk for chunk in result["chunks"] if chunk["text"] not in special]
        if return_timestamps == "word" and result["chunks"]:
            config = cast(DinoSRConfig, self.model.config)
            decoder = GreedyDecoder.from_tokenizer(tokenizer, config)
            spans = np.array([chunk["timestamp"] for chunk in result["chunks"]]) / decoder.frame_seconds
            first, end = spans.round().astype(int).T
            times = decoder.word_times(first, end - 1, num_frames)
            for chunk, time in zip(result["chunks"], times, strict=True):
                chunk["timestamp"] = time
        return result
