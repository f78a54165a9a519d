"""
Units of a live signal, chunk by chunk, with bounded delay and memory.

`S` samples at 16 kHz, `T` frames, `D` hidden size, `L` layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..data import SAMPLING_RATE
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..model.units_dinosr import check_layers, check_source


class RunningMoments:
    """
    Mean and variance of all that has been added, in float64.

    Attributes:
        count: Rows added.
        mean: (...), 0 before the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray | float = 0.0
        self._squares: np.ndarray | float = 0.0

    def add(self, rows: np.ndarray) -> None:
        """Add rows (R, ...)."""
        if not len(rows):
            return
        difference, total = rows.mean(axis=0, dtype=np.float64) - self.mean, self.count + len(rows)
        self._squares += rows.var(axis=0, dtype=np.float64) * len(rows)
        self._squares += difference**2 * (self.count * len(rows) / total)
        self.mean = self.mean + difference * (len(rows) / total)
        self.count = total

    def normalize(self, rows: np.ndarray) -> np.ndarray:
        """Rows (R, ...) less the mean, divided by the deviation; float32."""
        variance = self._squares / max(1, self.count)
        return ((rows - self.mean) / np.sqrt(variance + 1e-5)).astype(np.float32)


class UnitStreamer:
    """
    A live signal, chunk by chunk, to units.

    Units come in steps of `step_seconds`. Those of a step are computed from a window: the step itself,
    `context_seconds` before it, and `lookahead_seconds` behind it. Offline, a recording is normalised by its mean and
    variance; here, by those of all that was heard so far, and so is the teacher's output. Steps lie on a fixed grid of
    frames, so that the units do not depend on how the signal is cut into chunks. A signal that ends before its first
    step is complete has exactly the units that it has offline.

    Args:
        model: In any precision, on any device; put into evaluation mode.
        layer: Transformer layer whose codebook is asked for, the lowest is 1.
        source: "student" or "teacher", see `DinoSRForPreTraining.encode_units`.
        layers: Several layers at once, instead of `layer`.
        context_seconds: What is heard of the past; the memory that is needed grows with it, and the time of a step.
        lookahead_seconds: What is heard of the future before a unit is decided; a part of the delay.
        step_seconds: From one step to the next; the other part of the delay. Longer steps cost less.
        level: Mean and variance of the samples, known in advance, in place of those heard so far.

    Attributes:
        delay_seconds: The greatest time from a frame's first sample to the sample that brings its unit.

    Raises:
        ValueError: If a layer has no codebook, there is no such source, or a number of seconds cannot be.
    """

    def __init__(
        self,
        model: DinoSRForPreTraining,
        layer: int = 5,
        source: str = "student",
        *,
        layers: Sequence[int] | None = None,
        context_seconds: float = 5.0,
        lookahead_seconds: float = 0.5,
        step_seconds: float = 0.5,
        level: tuple[float, float] | None = None,
    ) -> None:
        check_source(source)
        self._layers = check_layers(model.config, [layer] if layers is None else layers, with_codebooks=True)
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
        frames = self._step + self._lookahead
        self.delay_seconds = ((frames - 1) * self._hop + self._field) / SAMPLING_RATE
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pieces: list[NDArray[np.float32]] = []  # of the signal from sample `_offset` on
        self._offset = 0
        self._num_heard = 0  # samples
        self._num_measured = 0  # samples that the moments have
        self._done = 0  # frames whose units are out
        self._signal, self._outputs = RunningMoments(), RunningMoments()

    def push(self, samples: ArrayLike) -> NDArray[np.int64]:
        """
        Hear more of the signal.

        Args:
            samples: float (S,) at 16 kHz, any number; not normalised.

        Returns:
            Units int64 (T,), or with `layers` (L, T), that follow those returned before; often none.

        Raises:
            ValueError: For another shape, or samples that are not finite; then nothing of them was heard.
        """
        chunk = np.asarray(samples, dtype=np.float32)
        if chunk.ndim != 1 or not np.isfinite(chunk).all():
            raise ValueError(
                f"samples have shape {chunk.shape}, all finite: {bool(np.isfinite(chunk).all())}. Give one channel of"
                " audio at 16 kHz as finite numbers, of shape (samples,)."
            )
        found, taken = [self._nothing()], 0
        while True:
            needed = (self._done + self._step + self._lookahead - 1) * self._hop + self._field
            # No more than a window at once, however long the chunk is; and the caller may fill its buffer again.
            piece = chunk[taken : taken + needed - self._num_heard].copy()
            self._pieces.append(piece)
            self._num_heard += len(piece)
            taken += len(piece)
            if self._num_heard < needed:
                return self._joined(found)
            found.append(self._units(self._done + self._step))

    def flush(self) -> NDArray[np.int64]:
        """
        The signal is over: the units that are left, as `push` returns them. The next `push` begins another signal.
        """
        num_frames = int(self._model.config.num_frames(self._num_heard))
        found = [self._nothing()]
        if num_frames > self._done:
            found.append(self._units(num_frames))
        self._begin_anew()
        return self._joined(found)

    def _nothing(self) -> NDArray[np.int64]:
        return np.empty((len(self._layers), 0), np.int64)

    def _joined(self, found: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        codes = np.concatenate(found, axis=1)
        return codes[0] if self._is_single else codes

    @torch.no_grad()
    def _units(self, last: int) -> NDArray[np.int64]:
        """Units (L, T) of the frames from the last step to `last`, from a window that ends with what was heard."""
        begin = self._offset // self._hop
        window = np.concatenate(self._pieces)
        if self._level is None:
            self._signal.add(window[self._num_measured - self._offset :])
            self._num_measured = self._num_heard
            normal = self._signal.normalize(window)
        else:
            mean, variance = self._level
            normal = ((window - mean) / np.sqrt(variance + 1e-5)).astype(np.float32)
        values = torch.from_numpy(normal)[None].to(self._model.device, self._model.dtype)
        own = slice(self._done - begin, last - begin)
        if self._source == "student":
            codes, _ = self._model.encode_units(values, layers=self._layers)
            found = codes[:, 0, own].cpu().numpy()
        else:
            features = self._model.layer_features(values, layers=self._layers, source="teacher")
            rows = features[:, 0, own].transpose(0, 1).float().cpu().numpy()
            self._outputs.add(rows)
            targets = torch.from_numpy(self._outputs.normalize(rows)).transpose(0, 1).to(self._model.device)
            found = self._model.teacher_units(targets, self._layers).cpu().numpy()
        self._done = last
        keep = max(0, last - self._context) * self._hop
        self._pieces, self._offset = [window[keep - self._offset :].copy()], keep
        return found
