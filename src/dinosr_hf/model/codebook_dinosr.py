# SPDX-License-Identifier: Apache-2.0
"""
The online codebooks of DinoSR: a table of codewords for each teacher layer, learnt by counting (paper, Section 3.2).

`N` codebooks, `V` codewords of a codebook, `D` hidden size, `M` masked frames.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

# Decay, per commit, of the running mean of frames that decides which codewords are out of use.
USAGE_DECAY = 0.9
# Where a revived codeword starts: this share of the way from the much used codeword to its old place.
REVIVAL_DISTANCE = 0.1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over all processes, in place; a no-op without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which operations on a device keep the precision of their inputs."""
    is_available = torch.amp.is_autocast_available(device.type)  # it is not on the meta device
    return torch.autocast(device.type, enabled=False) if is_available else nullcontext()


def perplexity(histogram: torch.Tensor) -> torch.Tensor:
    """
    Return the number of codewords in use: `2 ** entropy` of a distribution over codewords.

    Args:
        histogram: (..., V), counts or summed probabilities, not normalised.

    Returns:
        float32 (...), from 1 (one codeword has all, or the histogram is empty) to V (all are equal).
    """
    histogram = histogram.float()
    share = histogram / histogram.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.exp2(-(share * torch.log2(share + 1e-8)).sum(dim=-1))


def _fit_usage(module: "OnlineCodebooks", state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a state without `usage` into codebooks with revival, and the reverse: a run may switch it on or off."""
    if module.usage is None:
        state.pop(f"{prefix}usage", None)
    else:
        state.setdefault(f"{prefix}usage", torch.ones_like(module.usage))


class OnlineCodebooks(nn.Module):
    """
    `N` codebooks of `V` codewords each, updated by exponential averages and not by gradient.

    A codeword is the mean of the frames assigned to it: sums divided by counts. These two are stored, and with revival
    the use of each codeword, as frozen parameters in float32 whatever the dtype of the model around them.

    For each micro-batch of a training step, call the module, which assigns, and `accumulate`; then `commit` once. What
    `accumulate` gathers is no part of the state: a checkpoint is taken after `commit`, with `held` beside it.

    All codewords are zero until `codebooks.sums.copy_(codebooks.initial_sums())`, which `DinoSRForPreTraining` does.

    State:
        sums: (N, V, D), decayed sum of the frames of each codeword.
        counts: (N, V), decayed number of frames of each codeword.
        usage: (N, V), running mean of the frames of each codeword, 1 for an even share; it decides on revival. None
            without `revival_share`.

    Args:
        num_codebooks: N.
        codebook_size: V.
        hidden_size: D.
        revival_share: Part of an even share of the frames below which a codeword restarts; 0: never.

    Attributes:
        held: float32 (N, V, D + 1), sums and counts of this process that wait for a later `commit`; None: there are
            none.
    """

    usage: nn.Parameter | None

    def __init__(self, num_codebooks: int, codebook_size: int, hidden_size: int, revival_share: float = 0.0) -> None:
        super().__init__()
        shape = (num_codebooks, codebook_size)
        self.sums = nn.Parameter(torch.zeros(*shape, hidden_size, dtype=torch.float32), requires_grad=False)
        self.counts = nn.Parameter(torch.ones(shape, dtype=torch.float32), requires_grad=False)
        self.revival_share = revival_share
        usage = nn.Parameter(torch.ones(shape, dtype=torch.float32), requires_grad=False)
        self.register_parameter("usage", usage if revival_share > 0 else None)
        self.register_load_state_dict_pre_hook(_fit_usage)
        self._pending: torch.Tensor | None = None
        self.held: torch.Tensor | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "OnlineCodebooks":
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype == torch.float32 or not moved.is_floating_point():
                return moved
            if moved.is_meta or tensor.is_meta:
                return torch.empty_like(moved, dtype=torch.float32)
            # Not moved.float(): the digits that the other dtype lost would be gone.
            return tensor.to(device=moved.device)

        return super()._apply(keep_float32, recurse)

    def initial_sums(self) -> torch.Tensor:
        """
        Draw codewords with zero mean and unit variance over the `V` codewords of each dimension.

        Returns:
            float32 (N, V, D); with counts of one, sums and codewords are the same.
        """
        codewords = torch.randn(self.sums.shape, dtype=torch.float32, device=self.sums.device)
        variance, mean = torch.var_mean(codewords, dim=1, correction=0, keepdim=True)
        return (codewords - mean) * torch.rsqrt(variance + 1e-5)

    @property
    def codewords(self) -> torch.Tensor:
        """float32 (N, V, D): the centroid of each codeword."""
        return self.sums / self.counts[..., None]

    @torch.no_grad()
    def assign(self, targets: torch.Tensor, codebooks: Sequence[int] | None = None) -> torch.Tensor:
        """
        Find the nearest codeword, in Euclidean distance, of each frame in each codebook (paper, equation 3).

        Args:
            targets: float32 (N, M, D), or with `codebooks` the targets of these.
            codebooks: Numbers, from 0, of the codebooks to use; None: all `N`.

        Returns:
            int64 (N, M), or with `codebooks` a row for each of them, in [0, V).
        """
        with without_autocast(targets.device):
            codewords = self.codewords if codebooks is None else self.codewords[list(codebooks)]
            # |t - c|^2 = |t|^2 - 2 (t c - |c|^2 / 2), and |t|^2 is the same for all codewords
            half_norms = codewords.square().sum(dim=-1)[:, None, :] / 2  # (N, 1, V)
            return torch.baddbmm(half_norms, targets.float(), codewords.mT, beta=-1).argmax(dim=-1)

    def forward(self, targets: torch.Tensor, codebooks: Sequence[int] | None = None) -> torch.Tensor:
        """Do what `assign` does, with the module's hooks: those of off-loaded weights bring them to the device."""
        return self.assign(targets, codebooks)

    @torch.no_grad()
    def accumulate(self, targets: torch.Tensor, codes: torch.Tensor) -> None:
        """
        Add a micro-batch to the sums and counts of the next `commit`.

        Args:
            targets: float32 (N, M, D).
            codes: int64 (N, M), as `assign` gave them.
        """
        num_codebooks, codebook_size, hidden_size = self.sums.shape
        if self._pending is None or self._pending.device != self.sums.device:
            self._pending = self.sums.new_zeros(num_codebooks, codebook_size, hidden_size + 1)
        rows = codes + codebook_size * torch.arange(num_codebooks, device=codes.device)[:, None]  # (N, M)
        # One more column of ones: sums and counts travel together, here and between processes.
        frames = torch.nn.functional.pad(targets.float(), (0, 1), value=1.0)  # (N, M, D + 1)
        self._pending.view(-1, hidden_size + 1).index_add_(0, rows.flatten(), frames.flatten(0, 1))

    def discard(self) -> None:
        """Drop what was accumulated since the last `commit`, for a step that is skipped."""
        self._pending = None

    @torch.no_grad()
    def commit(self, decay: float, *, is_due: bool = True) -> None:
        """
        Update the codewords that frames were assigned to, in any process (paper, equations 4 and 5).

        Other codewords keep sums and counts, unless they are revived (`revival_share`; not in the paper). All
        processes must call this together: it is the model's only collective.

        Args:
            decay: Share of the old sums and counts to keep, in [0, 1].
            is_due: Whether to update now; False holds what was accumulated for a later call, without a collective.
        """
        pending, self._pending = self._pending, None
        if self.held is not None:
            held = self.held.to(self.sums.device)
            pending = held if pending is None else pending.to(held.device) + held
        self.held = None if is_due else pending
        if not is_due:
            return
        if pending is None:
            pending = self.sums.new_zeros(*self.sums.shape[:2], self.sums.shape[2] + 1)
        pending = all_reduce_sum(pending.to(self.sums.device))
        new_sums, new_counts = pending[..., :-1], pending[..., -1]
        weight = torch.where(new_counts > 0, 1.0 - decay, 0.0)  # (N, V)
        self.sums.lerp_(new_sums, weight[..., None])
        self.counts.lerp_(new_counts, weight)
        if self.usage is not None:
            self._follow_usage(self.usage, new_counts)
            self._revive(self.usage)

    def _follow_usage(self, usage: torch.Tensor, new_counts: torch.Tensor) -> None:
        total = new_counts.sum(dim=-1, keepdim=True)
        share = new_counts * new_counts.shape[-1] / total.clamp(min=1.0)
        usage.lerp_(share, torch.where(total > 0, 1.0 - USAGE_DECAY, 0.0))

    def _revive(self, usage: torch.Tensor) -> None:
        """
        Restart codewords out of use beside the most used ones, which halve their counts.

        The split of Linde, Buzo and Gray (1980) during training. Deterministic, so all processes, which have the same
        counts, revive the same codewords; no host synchronisation.
        """
        num_pairs = usage.shape[-1] // 2
        rows = torch.arange(len(usage), device=usage.device)[:, None]
        order = usage.argsort(dim=-1, stable=True)
        unused, used = (rows, order[:, :num_pairs]), (rows, order.flip(-1)[:, :num_pairs])  # indices of (N, V / 2)
        is_revived = (usage[unused] < self.revival_share) & (usage[used] > 2 * self.revival_share)
        codewords = self.codewords
        starts = torch.lerp(codewords[used], codewords[unused], REVIVAL_DISTANCE)
        for values in (usage, self.counts):
            half = values[used] / 2
            values[unused] = torch.where(is_revived, half, values[unused])
            values[used] = torch.where(is_revived, half, values[used])
        for places, centres in ((unused, starts), (used, codewords[used])):
            sums = centres * self.counts[places][..., None]
            self.sums[places] = torch.where(is_revived[..., None], sums, self.sums[places])
