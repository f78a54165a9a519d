"""
Padded batches without their padding, for all that is done frame by frame.

`B` batch, `T` frames, `M` frames of all utterances that are not padding.
"""

from collections.abc import Sequence

import torch


class ValidFrames:
    """
    Where a batch has frames, and where padding.

    Args:
        frame_mask: bool (B, T), True for frames; padding is at the end.
        lengths: Frames of each utterance, for packing by them. None: batches are left as they are.

    Attributes:
        lengths: As given, or empty.
        are_packed: Whether lengths were given.
    """

    def __init__(self, frame_mask: torch.Tensor, lengths: Sequence[int] | None = None) -> None:
        self._frame_mask = frame_mask
        self.lengths = list(lengths or ())
        self.are_packed = lengths is not None
        if self.are_packed:
            self._places = frame_mask.flatten().nonzero()[:, 0]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) to (M, ...), or itself if nothing is packed."""
        return padded.flatten(0, 1).index_select(0, self._places) if self.are_packed else padded

    def unpack(self, frames: torch.Tensor) -> torch.Tensor:
        """What `pack` gives to (B, T, D), with zeros in the padding in any case."""
        if not self.are_packed:
            return frames.masked_fill(~self._frame_mask[..., None], 0.0)
        padded = frames.new_zeros(self._frame_mask.numel(), *frames.shape[1:])
        return padded.index_copy_(0, self._places, frames).unflatten(0, self._frame_mask.shape)


def valid_frames(frame_mask: torch.Tensor | None) -> ValidFrames | None:
    """
    Whatever is the faster way to deal with padding.

    Shapes that depend on the data are what GPUs and compilers are slow at, so there nothing is packed.

    Args:
        frame_mask: bool (B, T), True for frames; None: no padding.

    Returns:
        None if there is no padding, or if the mask says so on a CPU.
    """
    if frame_mask is None:
        return None
    if frame_mask.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return ValidFrames(frame_mask)
    lengths = frame_mask.sum(dim=-1).tolist()
    if sum(lengths) == frame_mask.numel():
        return None
    return ValidFrames(frame_mask, lengths if any(lengths) else None)
