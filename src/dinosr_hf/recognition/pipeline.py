"""
transformers' pipeline of speech recognition, which reads files and other sampling rates by itself and times words.

    pipeline("automatic-speech-recognition", model=folder, pipeline_class=SpeechRecognitionPipeline)

transformers' own class runs ffmpeg for files, wants torchaudio for arrays that are not at 16 kHz, and takes the frames
in which a word's labels are emitted for the time in which it is spoken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline

from ..data import SAMPLING_RATE, load_audio
from ..data.audio import read_resampled
from ..model.configuration_dinosr import DinoSRConfig
from .decoding import GreedyDecoder


def _mono(samples: Any) -> np.ndarray:
    """float32 (S,) of (S,) or (channels, S)."""
    if isinstance(samples, torch.Tensor):
        samples = samples.cpu().numpy()
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim == 2 and samples.shape[0] <= 2:
        samples = samples.mean(axis=0)
    if samples.ndim != 1:
        raise ValueError(
            f"The audio has shape {samples.shape}, but must be (samples,), or (channels, samples) of one or two"
            " channels. soundfile.read gives (samples, channels): transpose it."
        )
    return samples


class SpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """
    `AutomaticSpeechRecognitionPipeline` for `DinoSRForCTC`.

    Files and their bytes are read by `load_audio`, and arrays of another rate than 16 kHz, in a dict with
    "sampling_rate", resampled as it does. Times of words (`return_timestamps="word"`) are those of
    `CTCDecoder.word_times`; of "char", transformers'. Addresses of the web are left to transformers, which needs
    ffmpeg.
    """

    # transformers' classes disagree about these signatures themselves.
    def preprocess(self, inputs: Any, **parameters: Any) -> Any:  # type: ignore[override]
        """As in the class above, of what its docstring names."""
        if isinstance(inputs, (bytes, Path)) or (isinstance(inputs, str) and "://" not in inputs):
            inputs = load_audio(inputs)
        elif isinstance(inputs, dict) and "sampling_rate" in inputs and ("raw" in inputs or "array" in inputs):
            inputs = self._at_our_rate(dict(inputs))
        yield from super().preprocess(inputs, **parameters)

    def _at_our_rate(self, inputs: dict[str, Any]) -> dict[str, Any]:
        samples = _mono(inputs.pop("raw") if "raw" in inputs else inputs.pop("array"))
        rate = int(inputs.pop("sampling_rate"))
        inputs.pop("path", None)  # of a row of `datasets`
        if "stride" in inputs:
            inputs["stride"] = tuple(round(length * SAMPLING_RATE / rate) for length in inputs["stride"])
        samples = read_resampled(lambda first, count: samples[first : first + count], len(samples), rate)
        return {"raw": samples, "sampling_rate": SAMPLING_RATE, **inputs}

    def _forward(self, input_tensors: Any, **parameters: Any) -> Any:  # type: ignore[override]
        num_samples = input_tensors["attention_mask"].sum(dim=-1)
        outputs = super()._forward(input_tensors, **parameters)
        return {**outputs, "num_frames": self.model.config.num_frames(num_samples)}

    def postprocess(
        self, model_outputs: Any, decoder_kwargs: Any = None, return_timestamps: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the class above, with other times of words."""
        outputs = list(model_outputs)
        num_frames = 0
        for output in outputs:
            own = int(output.pop("num_frames"))  # without those of padding
            total, left, right = output.get("stride") or (own, 0, 0)
            num_frames += len(range(own)[left : total - right])
        result = super().postprocess(outputs, decoder_kwargs, return_timestamps, *args, **kwargs)
        if return_timestamps == "word" and result["chunks"]:
            tokenizer, config = cast(Any, self.tokenizer), cast(DinoSRConfig, self.model.config)
            decoder = GreedyDecoder.from_tokenizer(tokenizer, config)
            spans = np.array([chunk["timestamp"] for chunk in result["chunks"]]) / decoder.frame_seconds
            first, end = spans.round().astype(int).T
            times = decoder.word_times(first, end - 1, num_frames)
            result["chunks"] = [
                {**chunk, "timestamp": time} for chunk, time in zip(result["chunks"], times, strict=True)
            ]
        return result
