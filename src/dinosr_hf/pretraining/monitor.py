"""
Detection of collapse and divergence: figures of a run that leave their bounds, since when, and what usually helps.

The loss of a collapsed model falls: if all frames are alike, they are easy to predict. Collapse shows in the
perplexities, the codewords in use, and the share of the energy that changes over time. docs/experiments-2026-11.md has
the measurements behind the default bounds. A run diverges if its loss stays far above that of guessing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..model.configuration_dinosr import DinoSRConfig
from .pretraining_arguments import RunArguments

_TOO_FAST = "a lower learning_rate or a larger warmup_share"
_CODEWORDS = (
    "a lower codebook_decay for the first hundreds of steps (codebook_end_decay and codebook_end_decay_step raise it"
    " again), a larger step_seconds, so that more frames fall on a codeword, or codebook_revival_share=0.1, which lets"
    " unused codewords start anew"
)
_FRAMES = (
    f"{_TOO_FAST}; longer and cleaner utterances (min_seconds): in short ones the distance to the edge is the easiest"
    " to predict. The loss does not show it, because instance norm scales up the little variation that is left"
)


_DIVERGED = (
    f"{_TOO_FAST}, or max_grad_norm, with resume set to a checkpoint from before the rise; weights that have diverged"
    " seldom recover"
)
# A guess among V labels costs ln V nats, a fresh model about as much, and a run that learns less. A loss that stays
# above this many times ln V is sure of wrong labels.
DIVERGED_LOSS = 2.0


class _Figure(NamedTuple):
    """A figure of `MetricSums.compute`, its bound, what usually helps, and what it has a value for each of."""

    key: str
    label: str
    bound: str | None  # option with the lower bound; None: a loss, with `DIVERGED_LOSS` for its upper bound
    advice: str
    places: str = "codebooks"  # or "frames" (masked and unmasked), or "all"


_FIGURES = (
    _Figure("codebook_losses", "loss", None, _DIVERGED),
    _Figure("anchor_losses", "loss of the anchor", None, _DIVERGED, "frames"),
    _Figure("target_perplexities", "target perplexity", "collapse_perplexity", f"{_CODEWORDS}; {_TOO_FAST}"),
    _Figure("prediction_perplexities", "prediction perplexity", "collapse_perplexity", _TOO_FAST),
    _Figure("codebook_active_codewords", "number of codewords in use", "collapse_active", _CODEWORDS),
    _Figure("target_variations", "variation over time of the teacher", "collapse_variation", _FRAMES),
    _Figure("feature_variation", "variation over time of the convolutions", "collapse_variation", _FRAMES, "all"),
)


@dataclass
class Watch:
    """State of one figure of one codebook, or of all."""

    is_warned: bool = False  # whether the last message about it was a warning
    since: int | None = None  # step of the first line beyond the bound; None: not beyond it
    num_lines: int = 0  # number of consecutive lines that contradict the last message
    value: float | None = 0.0  # the last one; None: not finite

    def update(self, step: int, value: float, is_beyond: bool, patience: int) -> bool:
        """Take in the value of a line; return whether there is news."""
        self.value = value if math.isfinite(value) else None
        if not is_beyond and not self.is_warned:
            self.since = None
        elif self.since is None:
            self.since = step
        self.num_lines = self.num_lines + 1 if is_beyond != self.is_warned else 0
        if self.num_lines < patience:
            return False
        self.is_warned, self.num_lines = is_beyond, 0
        return True


def _number(value: float | None) -> str:
    if value is None:
        return "a value that is not finite"
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"


class CollapseMonitor:
    """
    Report, from a run's lines of metrics, each figure that left its bound or recovered.

    A figure has left its bound, or recovered, once `collapse_patience` consecutive lines agree; then it is reported
    once. Losses have an upper bound, `DIVERGED_LOSS`, the others a lower one. Save the state in checkpoints, so that a
    resumed run neither repeats nor forgets a warning.

    Args:
        config: Configuration of the model.
        bounds: Has `collapse_perplexity` and `collapse_active` (shares of the codewords), `collapse_variation` (share
            of the energy) and `collapse_patience` (consecutive lines of metrics). A share of 0 is no bound.
        grace_steps: Number of first steps to ignore, in which codebooks settle from their random start.
    """

    def __init__(self, config: DinoSRConfig, bounds: RunArguments, *, grace_steps: int = 50) -> None:
        self._bounds, self._grace_steps, self._codebook_size = bounds, grace_steps, config.codebook_size
        self._num_anchor_labels = config.num_anchor_labels
        layers = enumerate(config.codebook_layers, start=1)
        self._places = {
            "codebooks": [f"codebook {number} (layer {layer})" for number, layer in layers],
            "frames": ["masked frames", "unmasked frames"],
            "all": [""],
        }
        self._watches = {figure.key: [Watch() for _ in self._places[figure.places]] for figure in _FIGURES}

    def check(self, metrics: Mapping[str, Any]) -> list[str]:
        """
        Take in a line of metrics; return a text for each figure that left its bound, or recovered.

        Figures that the line lacks keep their state, and a line without masked frames is ignored.
        """
        step, num_frames = int(metrics["step"]), metrics.get("masked_frames", math.inf)
        if step <= self._grace_steps or not num_frames:
            return []
        texts: list[str] = []
        for figure in self._watched():
            if figure.key in metrics:
                values = [metrics[figure.key]] if figure.places == "all" else metrics[figure.key]
                texts += self._check_figure(figure, step, values, self._bound(figure, num_frames))
        return texts

    def _watched(self) -> list[_Figure]:
        """Return the figures whose bound is not turned off."""
        return [figure for figure in _FIGURES if figure.bound is None or getattr(self._bounds, figure.bound)]

    def _num_labels(self, figure: _Figure) -> int:
        return self._num_anchor_labels if figure.places == "frames" else self._codebook_size

    def _bound(self, figure: _Figure, num_frames: float = math.inf) -> float:
        if figure.bound is None:
            return DIVERGED_LOSS * math.log(self._num_labels(figure))
        share: float = getattr(self._bounds, figure.bound)
        # Frames cannot fall on more codewords than there are frames.
        return share if figure.bound == "collapse_variation" else share * min(self._codebook_size, num_frames)

    def _check_figure(self, figure: _Figure, step: int, values: Sequence[float], bound: float) -> Iterator[str]:
        watches, is_loss = self._watches[figure.key], figure.bound is None
        news = [
            number
            for number, (watch, value) in enumerate(zip(watches, values, strict=True))
            # NaN counts as beyond the bound.
            if watch.update(
                step, value, not (value <= bound if is_loss else value >= bound), self._bounds.collapse_patience
            )
        ]
        if beyond := [number for number in news if watches[number].is_warned]:
            yield f"Step {step:,}: {self._describe(figure, beyond)}"
        inside, outside = ("below", "above") if is_loss else ("above", "below")
        for number in news:
            watch = watches[number]
            if not watch.is_warned:
                place = self._places[figure.places][number]
                yield (
                    f"Step {step:,}: {figure.label}{place and f', {place},'} is back at {_number(watch.value)},"
                    f" {inside} its bound of {_number(bound)}; it was {outside} since step {watch.since:,}."
                )
                watch.since = None

    def _describe(self, figure: _Figure, numbers: Sequence[int]) -> str:
        """Say which figure left its bound, in which codebooks, how far, since when, and what usually helps."""
        watches, bound = self._watches[figure.key], _number(self._bound(figure))
        places = [f"{place} " if place else "" for place in self._places[figure.places]]
        fallen = "; ".join(
            f"{places[number]}at {_number(watches[number].value)} since step {watches[number].since:,}"
            for number in numbers
        )
        if figure.bound is None:
            guessing = f"{DIVERGED_LOSS:g} times that of guessing among {self._num_labels(figure)} labels"
            problem = f"the run diverges. The {figure.label} is above {bound} ({guessing})"
        else:
            of_what = "" if figure.bound == "collapse_variation" else f" of {self._codebook_size} codewords"
            option = f"{figure.bound}={getattr(self._bounds, figure.bound)}{of_what}"
            problem = f"the run looks collapsed. The {figure.label} is below {bound} ({option})"
        return f"{problem}: {fallen}. What usually helps: {figure.advice}."

    def standing(self) -> list[str]:
        """Return the warnings for all figures that are beyond their bounds, as of now."""
        return [
            self._describe(figure, beyond)
            for figure in self._watched()
            if (beyond := [i for i, watch in enumerate(self._watches[figure.key]) if watch.is_warned])
        ]

    @property
    def since(self) -> int:
        """First step at which a figure was beyond its bound and has not come back since, warned of or not; 0: none."""
        watches = (watch for figure in self._watched() for watch in self._watches[figure.key])
        return min((watch.since for watch in watches if watch.since is not None), default=0)

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return the state, in values that JSON can hold."""
        return {key: [asdict(watch) for watch in watches] for key, watches in self._watches.items()}

    def load_state_dict(self, state: Mapping[str, list[dict[str, Any]]]) -> None:
        """Go on from another monitor's state; raise `ValueError` if it is of other figures or codebooks."""
        own, given = ({key: len(group) for key, group in groups.items()} for groups in (self._watches, state))
        if given != own:
            raise ValueError(
                f"The state is of {given}, but this monitor watches {own}. Give a state of a run of the same model."
            )
        self._watches = {key: [Watch(**watch) for watch in watches] for key, watches in state.items()}
