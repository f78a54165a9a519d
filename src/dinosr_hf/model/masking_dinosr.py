# SPDX-License-Identifier: Apache-2.0
"""
Span masks of frames (or channels), with the exact semantics of the sampler that the paper's code draws from.

`B` batch, `T` frames.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .configuration_dinosr import DinoSRConfig


def numpy_generator(generator: torch.Generator | None) -> np.random.Generator:
    """Return a numpy generator seeded by a draw from torch's; None: the global one, which `torch.manual_seed` sets."""
    device = generator.device if generator is not None else torch.device("cpu")
    return np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator, device=device)))


class TorchDraws:
    """The draws of `sample_span_mask` from a torch generator, as SpidR makes them."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def random(self) -> float:
        """Draw uniformly from [0, 1), in float32."""
        return float(torch.rand((), generator=self._generator))

    def choice(self, values: Any, size: int, replace: bool = False) -> np.ndarray:
        """Draw `size` different ones of `values`: an array, or a number for those below it."""
        assert not replace
        values = np.arange(values) if isinstance(values, int) else values
        return values[torch.randperm(len(values), generator=self._generator)[:size].numpy()]


Draws = np.random.Generator | np.random.RandomState | TorchDraws


def _draw_span_starts(num_frames: int, num_spans: int, mask_length: int, generator: Draws) -> np.ndarray:
    # The last frame of a row is never masked: the largest start is num_frames - mask_length - 1.
    num_starts = num_frames - mask_length
    if num_starts <= num_spans:
        # A short row: one start more than there are spans; spans that reach past the end are cut there.
        num_starts = num_spans + 1
    return generator.choice(num_starts, num_spans, replace=False)


def _cut_to_same_count(mask: np.ndarray, generator: Draws) -> None:
    counts = mask.sum(axis=1)
    fewest = int(counts.min())
    for row, count in zip(mask, counts, strict=True):
        if count > fewest:
            kept = generator.choice(np.flatnonzero(row), fewest, replace=False)
            row[:] = False
            row[kept] = True


def sample_span_mask(
    shape: tuple[int, int],
    mask_prob: float,
    mask_length: int,
    *,
    min_spans: int = 1,
    lengths: Sequence[int] | None = None,
    require_same_masks: bool = False,
    generator: Draws,
) -> np.ndarray:
    """
    Draw a mask of randomly placed spans for each row of a batch.

    A row of `n` frames gets `int(mask_prob * n / mask_length + u)` spans with `u` uniform in [0, 1), at least
    `min_spans`, at distinct starts. Spans overlap, so that fewer than `mask_prob` of the frames are masked: with the
    paper's 0.8 and 10 it is 57 % of a long row. With `require_same_masks`, rows are cut to the smallest count of the
    batch by dropping single frames at random, which makes holes in spans and lowers the rate further (51 % in a batch
    of eight rows of 250 frames).

    With a `RandomState` seeded as the authors' code seeds numpy, `min_spans=1` and `require_same_masks=True` this
    draws the masks of the authors' pre-training, frame for frame, and leaves the generator in the same state. With
    `TorchDraws`, `min_spans=2`, `require_same_masks=True` and the `lengths` of all rows it draws those of SpidR.

    Args:
        shape: (B, T).
        mask_prob: Frames covered if spans did not overlap, as a share of the row, in [0, 1].
        mask_length: Frames of a span, at least 1.
        min_spans: Least number of spans of a row.
        lengths: Valid frames of each row; the rest is padding and never masked. None: no padding, and then one draw
            of `u` serves all rows.
        require_same_masks: Whether all rows have the same number of masked frames.
        generator: Source of all randomness; a numpy `Generator` or legacy `RandomState`, or `TorchDraws`.

    Returns:
        bool (B, T), True where masked.

    Raises:
        ValueError: For impossible arguments, or `lengths` that do not fit `shape`.
    """
    batch_size, num_frames = shape
    if not 0 <= mask_prob <= 1:
        raise ValueError(f"mask_prob={mask_prob} is out of range: it must be at least 0 and at most 1.")
    if mask_length < 1:
        raise ValueError(f"mask_length={mask_length} is out of range: it must be at least 1.")
    if min_spans < 0:
        raise ValueError(f"min_spans={min_spans} is out of range: it must be at least 0.")
    if lengths is not None and (len(lengths) != batch_size or max(lengths, default=0) > num_frames):
        raise ValueError(f"lengths={list(lengths)} does not fit shape={shape}: give one length a row, at most T.")

    def draw_num_spans(size: int) -> int:
        return max(min_spans, int(mask_prob * size / float(mask_length) + generator.random()))

    # Drawn even where every row then draws its own: the reference consumes this number too.
    shared_num_spans = draw_num_spans(num_frames)
    mask = np.zeros(shape, dtype=bool)
    for row in range(batch_size):
        size = num_frames if lengths is None else int(lengths[row])
        num_spans = shared_num_spans if lengths is None else draw_num_spans(size)
        if num_spans == 0 or size <= 0:
            continue
        starts = _draw_span_starts(size, num_spans, mask_length, generator)
        frames = (starts[:, None] + np.arange(min(mask_length, size))).ravel()
        mask[row, frames[frames < size]] = True
    if require_same_masks:
        _cut_to_same_count(mask, generator)
    return mask


def sample_spec_augment(
    config: DinoSRConfig,
    batch_size: int,
    num_frames: int,
    *,
    lengths: Sequence[int] | None = None,
    generator: np.random.Generator | np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Draw the masks of fine-tuning: spans over time, and spans over channels for all frames of an utterance.

    Args:
        config: Its `mask_time_*`, `mask_feature_*` and `hidden_size` count; a probability of 0 switches a mask off.
        batch_size: B.
        num_frames: T.
        lengths: Valid frames of each utterance; None: no padding.
        generator: Source of all randomness.

    Returns:
        bool (B, T) over time and bool (B, D) over channels, True where masked.
    """
    over_time = np.zeros((batch_size, num_frames), dtype=bool)
    if config.mask_time_prob > 0:
        over_time = sample_span_mask(
            (batch_size, num_frames),
            config.mask_time_prob,
            config.mask_time_length,
            min_spans=config.mask_time_min_masks,
            lengths=[num_frames] * batch_size if lengths is None else lengths,
            generator=generator,
        )
    over_channels = np.zeros((batch_size, config.hidden_size), dtype=bool)
    if config.mask_feature_prob > 0:
        over_channels = sample_span_mask(
            (batch_size, config.hidden_size),
            config.mask_feature_prob,
            config.mask_feature_length,
            min_spans=config.mask_feature_min_masks,
            generator=generator,
        )
    return over_time, over_channels
