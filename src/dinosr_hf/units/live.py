"""
Units of a live signal, chunk by chunk, with bounded latency and memory.

`S` samples at 16 kHz, `T` frames, `L` layers.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..data import SAMPLING_RATE
from ..inference.windowed import RunningMoments
from ..model.modeling_dinosr import DinoSRForPreTraining


class UnitStreamer:
    """
    Turns a live signal into units, chunk by chunk.

    Units come in steps of `step_seconds`. The units of a step are computed from a window: the step itself,
    `context_seconds` before it, and `lookahead_seconds` after it. Offline, samples, log-mel frames and teacher output
    are normalised by the mean and variance of the recording; here, by those of the signal so far. Steps lie on a fixed
    grid of frames, so units do not depend on how the signal is cut into chunks. A signal that ends within its first
    step gets exactly its offline units.

    Args:
        model: In any precision, on any device; it is put into evaluation mode.
        layer: Number of the transformer layer whose codebook is used, from 1. None: `DinoSRConfig.default_layer`.
        source: "student", "teacher" or "anchor", see `DinoSRForPreTraining.encode_units`.
        layers: Several layers at once, instead of `layer`.
        context_seconds: Past signal in each window; memory and the time per step grow with it.
        lookahead_seconds: Future signal in each window; a part of the latency.
        step_seconds: Seconds from one step to the next; the other part of the latency. Longer steps cost less.
        level: Mean and variance of the samples if known in advance, to use instead of those of the signal so far.

    Attributes:
        delay_seconds: Maximum time from a frame's first sample to the sample that completes its unit.
    """

    def __init__(
        self,
        model: DinoSRForPreTraining,
        layer: int | None = None,
        source: str = "student",
        *,
        layers: Sequence[int] | None = None,
        context_seconds: float = 5.0,
        lookahead_seconds: float = 0.5,
        step_seconds: float = 0.5,
        level: tuple[float, float] | None = None,
    ) -> None:
        self._layers = model.check_unit_request(layer, layers, source)
        self._is_single = layers is None
        self._model, self._source, self._level = model.eval(), source, level
        self._hop, self._field = model.config.inputs_to_logits_ratio, model.config.receptive_field
        self._context, self._lookahead, self._step = (
            round(seconds * SAMPLING_RATE / self._hop)
            for seconds in (context_seconds, lookahead_seconds, step_seconds)
        )
        if self._step < 1 or self._context < 0 or self._lookahead < 0:
            raise ValueError(
                f"context_seconds={context_seconds} and lookahead_seconds={lookahead_seconds} must not be negative,"
                f" and step_seconds={step_seconds} must be at least {self._hop / SAMPLING_RATE}, one frame."
            )
        self.delay_seconds = ((self._step + self._lookahead - 1) * self._hop + self._field) / SAMPLING_RATE
        self._reset()

    def _reset(self) -> None:
        self._pieces: list[NDArray[np.float32]] = []  # the signal from sample `_offset` on
        self._offset = self._num_heard = self._num_measured = 0  # samples; those measured are in `_signal`
        self._done = 0  # frames whose units were returned
        self._signal = RunningMoments(*(self._level or ()))
        self._outputs, self._mels = RunningMoments(), RunningMoments()

    def push(self, samples: ArrayLike) -> NDArray[np.int64]:
        """
        Process the next samples of the signal, float (S,) at 16 kHz, not normalised; any number.

        Returns the next units, int64 (T,), or (L, T) with `layers`; often none. Raises `ValueError` if the shape is
        another, or a sample is not finite; such a chunk is ignored.
        """
        chunk = np.asarray(samples, dtype=np.float32)
        if chunk.ndim != 1 or not np.isfinite(chunk).all():
            raise ValueError(
                f"samples have shape {chunk.shape}, all finite: {bool(np.isfinite(chunk).all())}. Give one channel of"
                " audio at 16 kHz as finite numbers of shape (samples,)."
            )
        found: list[NDArray[np.int64]] = []
        while True:
            needed = (self._done + self._step + self._lookahead - 1) * self._hop + self._field - self._num_heard
            # At most one window at a time, and a copy: the caller may reuse its buffer.
            self._pieces.append(chunk[:needed].copy())
            self._num_heard += len(self._pieces[-1])
            if len(chunk) < needed:
                return self._joined(found)
            chunk = chunk[needed:]
            found.append(self._units(self._done + self._step))

    def flush(self) -> NDArray[np.int64]:
        """End the signal and return its remaining units, as `push` does. The next `push` begins another signal."""
        num_frames = int(self._model.config.num_frames(self._num_heard))
        found = [self._units(num_frames)] if num_frames > self._done else []
        self._reset()
        return self._joined(found)

    def _joined(self, found: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        codes = np.concatenate([np.empty((len(self._layers), 0), np.int64), *found], axis=1)
        return codes[0] if self._is_single else codes

    def _normalize_mels(self, encoder: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        frames = encoder.energies(inputs[0])[0].cpu().numpy()  # type: ignore[operator] # (T, C)
        self._mels.add(frames[self._mels.count - self._offset // self._hop :])
        return torch.from_numpy(self._mels.normalize(frames)).T[None].to(output)

    @contextmanager
    def _mels_so_far(self) -> Iterator[None]:
        """Have the model normalise the log-mel frames of a window by mean and variance of the signal so far."""
        thread = threading.get_ident()

        def normalize(encoder: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            # Others may use the model at the same time.
            return self._normalize_mels(encoder, inputs, output) if threading.get_ident() == thread else None

        front_ends = (self._model.dinosr.feature_extractor, self._model.teacher.feature_extractor)
        is_log_mel = self._model.config.feature_encoder == "log_mel"
        hooks = [part.register_forward_hook(normalize) for part in front_ends if part is not None and is_log_mel]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _units(self, last: int) -> NDArray[np.int64]:
        """Compute the units (L, T) of the frames up to `last`, from a window that ends with the newest sample."""
        window = np.concatenate(self._pieces)
        if self._level is None:
            self._signal.add(window[self._num_measured - self._offset :])
            self._num_measured = self._num_heard
        normalized = torch.from_numpy(self._signal.normalize(window))
        values = normalized[None].to(self._model.device)
        begin = self._offset // self._hop
        step = slice(self._done - begin, last - begin)
        if self._source != "teacher":
            with self._mels_so_far():
                codes = self._model.encode_units(values, layers=self._layers, source=self._source)[0][:, 0, step]
        else:
            with self._mels_so_far():
                features = self._model.layer_features(values, layers=self._layers, source="teacher")
            rows = features[:, 0, step].transpose(0, 1).float().cpu().numpy()  # (T, L, D)
            self._outputs.add(rows)
            targets = torch.from_numpy(self._outputs.normalize(rows)).transpose(0, 1).to(self._model.device)
            codes = self._model.teacher_units(targets, self._layers)
        self._done = last
        keep = max(0, last - self._context) * self._hop
        self._pieces, self._offset = [window[keep - self._offset :].copy()], keep
        return codes.cpu().numpy()
